//! Owns building ICMP errors about packets that do not go on, within the rate limit. Never sends.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use super::forward::Rules;
use super::limiter::Limiter;
use super::shared::Shared;
use crate::wire::icmp_error::{self, IcmpError, MAX_LEN};
use crate::wire::ip::{IpMeta, Version};

/// One worker's answers.
pub struct Answerer {
    limiter: Limiter,
    buffer: [u8; MAX_LEN],
}

impl Answerer {
    /// With a full rate limit.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            limiter: Limiter::new(),
            buffer: [0; MAX_LEN],
        }
    }

    /// The error to send about `packet` to a sender on this side of the tunnel.
    ///
    /// It comes from this node's overlay address where the kernel takes that from the device. Where it does
    /// not, an address of this node is a martian (`fib_validate_source`, net/ipv4/fib_frontend.c), and the
    /// answer comes from the packet's own destination, as the kernel's tunnels do it
    /// (`iptunnel_pmtud_build_icmp`, net/ipv4/ip_tunnel_core.c).
    pub fn build_local(
        &mut self,
        shared: &Shared,
        rules: &Rules,
        kind: IcmpError,
        packet: &[u8],
        meta: &IpMeta,
    ) -> Option<&[u8]> {
        // IPv6 knows no such martians.
        let as_self =
            meta.version() == Version::V6 || shared.answers_as_self.load(Ordering::Relaxed);
        let from = rules
            .answer_from(meta.src())
            .filter(|_| as_self)
            .unwrap_or_else(|| meta.dst());
        self.build_from(shared, from, kind, packet, meta)
    }

    /// The error to send about `packet` through the tunnel; `None` when the rules of ICMP forbid one, the
    /// rate limit is exhausted, or we have no address of that family to send it from.
    pub fn build_remote(
        &mut self,
        shared: &Shared,
        rules: &Rules,
        kind: IcmpError,
        packet: &[u8],
        meta: &IpMeta,
    ) -> Option<&[u8]> {
        let from = rules.answer_from(meta.src())?;
        self.build_from(shared, from, kind, packet, meta)
    }

    fn build_from(
        &mut self,
        shared: &Shared,
        from: IpAddr,
        kind: IcmpError,
        packet: &[u8],
        meta: &IpMeta,
    ) -> Option<&[u8]> {
        let len = icmp_error::build(kind, meta, packet, from, shared.sum, &mut self.buffer).ok()?;
        if !self.limiter.allow(shared.clock.now_ms()) {
            return None;
        }
        self.buffer.get(..len)
    }
}

impl Default for Answerer {
    fn default() -> Self {
        Self::new()
    }
}
