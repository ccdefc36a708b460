//! Owns the decision about one packet, the same for every engine: where it goes, whether it is answered, or why
//! it stops. Changes only TTL and ECN of a packet that goes on; never does I/O.

use std::net::IpAddr;
use std::sync::Arc;

use super::drop::DropReason;
use super::table::{Clock, Peer, Table};
use super::{Encapsulation, Local, Settings, SourceCheck};
use crate::addr::{Mac, Mtu};
use crate::wire::ecn::{self, Ecn, EcnMode};
use crate::wire::icmp_error::IcmpError;
use crate::wire::ip::{self, IpMeta, Version};

/// What happens to a packet read from the TUN.
pub enum EncapVerdict<'t> {
    /// It goes to this peer; TTL is already decremented.
    Send {
        /// The peer's index in the table.
        hop: u32,
        /// The peer.
        peer: &'t Arc<Peer>,
        /// Outer TOS byte.
        tos: u8,
    },
    /// It is too big for the path and may be fragmented; TTL is already decremented.
    Fragment {
        /// The peer's index in the table.
        hop: u32,
        /// The peer.
        peer: &'t Arc<Peer>,
        /// Largest fragment.
        max_len: Mtu,
    },
    /// Its sender is told, or, where no answer is due, it is dropped for the reason.
    Answer(IcmpError, DropReason),
    /// It stops here.
    Drop(DropReason),
}

/// What happens to a packet received from the underlay.
pub enum DecapVerdict<'t> {
    /// It goes to the TUN; TTL and ECN are already set.
    Deliver(&'t Arc<Peer>),
    /// Its sender is told through this peer, or it is dropped for the reason.
    Answer(&'t Arc<Peer>, IcmpError, DropReason),
    /// It stops here.
    Drop(DropReason),
}

/// What a node accepts and answers with.
pub struct Rules {
    local: Local,
    check: SourceCheck,
    encapsulation: Encapsulation,
    clock: Clock,
}

/// What is known of a received packet but the packet.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    /// Whose datagram it came in.
    pub addr: IpAddr,
    /// The datagram's TOS byte.
    pub tos: u8,
    /// The sender's MAC address, where the encapsulation tells.
    pub mac: Option<Mac>,
}

impl Rules {
    /// Rules for one node.
    #[must_use]
    pub fn new(settings: &Settings, clock: Clock) -> Self {
        Self {
            local: settings.local.clone(),
            check: settings.source_check,
            encapsulation: settings.encapsulation,
            clock,
        }
    }

    /// Decides about a packet from the TUN whose largest segment has `segment_len` bytes. `packet` is changed
    /// only when it goes on.
    #[inline]
    pub fn encap<'t>(
        &self,
        table: &'t Table,
        packet: &mut [u8],
        meta: &IpMeta,
        segment_len: usize,
    ) -> EncapVerdict<'t> {
        let dst = meta.dst();
        let Some((hop, peer)) = table.fib.lookup(dst) else {
            if is_group(dst) {
                return EncapVerdict::Drop(DropReason::Multicast);
            }
            return EncapVerdict::Answer(IcmpError::NetUnreachable, DropReason::NoRoute);
        };
        if self.lacks_mac(peer) {
            return EncapVerdict::Drop(DropReason::NoMac);
        }
        if meta.ttl() <= 1 {
            return EncapVerdict::Answer(IcmpError::TimeExceeded, DropReason::TtlExpired);
        }
        let limit = peer
            .max_inner(self.clock)
            .filter(|mtu| segment_len > usize::from(mtu.get()));
        if let Some(mtu) = limit
            && (meta.dont_fragment() || meta.version() == Version::V6)
        {
            return EncapVerdict::Answer(IcmpError::PacketTooBig { mtu }, DropReason::TooBig);
        }
        if ip::decrement_ttl(packet, 1).is_err() {
            return EncapVerdict::Drop(DropReason::TtlExpired);
        }
        if let Some(max_len) = limit {
            return EncapVerdict::Fragment { hop, peer, max_len };
        }
        let mode = if peer.ecn {
            EcnMode::Normal
        } else {
            EcnMode::Compatibility
        };
        let tos = ecn::encap(meta.ecn(), mode).in_tos(0);
        EncapVerdict::Send { hop, peer, tos }
    }

    /// Decides about a packet that came in `outer`. `packet` is changed only when it is delivered.
    #[inline]
    pub fn decap<'t>(
        &self,
        table: &'t Table,
        packet: &mut [u8],
        meta: &IpMeta,
        outer: Outer,
    ) -> DecapVerdict<'t> {
        let peer = match self.sender(table, meta.src(), outer) {
            Ok(peer) => peer,
            Err(reason) => return DecapVerdict::Drop(reason),
        };
        if !self.is_local(meta.dst()) {
            return DecapVerdict::Drop(if is_group(meta.dst()) {
                DropReason::Multicast
            } else {
                DropReason::NotLocal
            });
        }
        if meta.ttl() <= 1 {
            return if self.lacks_mac(peer) {
                DecapVerdict::Drop(DropReason::TtlExpired)
            } else {
                DecapVerdict::Answer(peer, IcmpError::TimeExceeded, DropReason::TtlExpired)
            };
        }
        let Ok(ecn) = ecn::decap(meta.ecn(), Ecn::of(outer.tos)) else {
            return DecapVerdict::Drop(DropReason::EcnInvalid);
        };
        if ecn != meta.ecn() && ip::set_ecn(packet, ecn).is_err() {
            return DecapVerdict::Drop(DropReason::Malformed);
        }
        if ip::decrement_ttl(packet, 1).is_err() {
            return DecapVerdict::Drop(DropReason::TtlExpired);
        }
        DecapVerdict::Deliver(peer)
    }

    /// The peer that may have sent a packet with this inner source, or why none may.
    #[inline]
    fn sender<'t>(
        &self,
        table: &'t Table,
        inner: IpAddr,
        outer: Outer,
    ) -> Result<&'t Arc<Peer>, DropReason> {
        let peer = match table.fib.lookup(inner) {
            Some((_, peer)) if peer.addr.ip() == outer.addr || self.check == SourceCheck::Loose => {
                Some(peer).filter(|peer| peer.may_be(outer.mac))
            }
            _ => match table.peers_by_ip(outer.addr) {
                [] => return Err(DropReason::UnknownPeer),
                // A packet of the peer's own, sent from its underlay address.
                peers if inner == outer.addr => peers.iter().find(|peer| peer.may_be(outer.mac)),
                _ => return Err(DropReason::SpoofedSource),
            },
        };
        peer.ok_or(DropReason::SpoofedMac)
    }

    /// Whether nothing can be sent to a peer because its MAC address is not known.
    #[inline]
    const fn lacks_mac(&self, peer: &Peer) -> bool {
        self.encapsulation.needs_mac() && peer.mac.is_none()
    }

    #[inline]
    fn is_local(&self, dst: IpAddr) -> bool {
        self.local.nets.iter().any(|net| net.contains(&dst)) || self.local.addrs.contains(&dst)
    }

    /// The address our ICMP errors come from, of the family of `about`.
    #[must_use]
    pub fn answer_from(&self, about: IpAddr) -> Option<IpAddr> {
        match about {
            IpAddr::V4(_) => self.local.icmp_v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.local.icmp_v6.map(IpAddr::V6),
        }
    }
}

/// Multicast and limited broadcast: what an overlay of point-to-point tunnels does not carry.
const fn is_group(addr: IpAddr) -> bool {
    addr.is_multicast() || matches!(addr, IpAddr::V4(v4) if v4.is_broadcast())
}
