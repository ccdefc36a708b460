//! Owns building ICMP errors about packets that do not go on, within the rate limit. Never sends.

use super::forward::Rules;
use super::limiter::Limiter;
use super::shared::Shared;
use crate::wire::icmp_error::{self, IcmpError, MAX_LEN};
use crate::wire::ip::IpMeta;

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

    /// The error to send about `packet`; `None` when the rules of ICMP forbid one, the rate limit is
    /// exhausted, or we have no address of that family to send it from.
    pub fn build(
        &mut self,
        shared: &Shared,
        rules: &Rules,
        kind: IcmpError,
        packet: &[u8],
        meta: &IpMeta,
    ) -> Option<&[u8]> {
        let from = rules.answer_from(meta.src())?;
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
