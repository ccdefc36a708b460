//! Owns what all workers of one data plane share: settings, sockets to send from, capabilities in force,
//! counters. Never touches a packet.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::drop::DropReason;
use super::stats::SharedCounts;
use super::table::{Clock, Peer, RETRY_AFTER_MS, Table};
use super::tap::Taps;
use super::{Event, Settings, status};
use crate::route::Reader;
use crate::sys::mmsg::QueuedError;
use crate::telemetry::histogram::Histogram;
use crate::tun::TunCaps;
use crate::underlay::{UdpCaps, UnderlaySocket};
use crate::wire::checksum::SumFn;

/// A capability that can be withdrawn while packets flow, and is tried again later.
#[derive(Debug, Default)]
pub struct Withdrawable {
    /// Not used before this time, by [`Clock`]; 0 while it is used.
    off_until: AtomicU64,
    times: AtomicU64,
}

impl Withdrawable {
    /// Whether it is in use: one relaxed load while it is, else `now_ms` is asked.
    #[inline]
    pub fn state(&self, now_ms: impl FnOnce() -> u64) -> Usable {
        let until = self.off_until.load(Ordering::Relaxed);
        if until == 0 {
            return Usable::Yes;
        }
        if now_ms() < until {
            return Usable::No;
        }
        // Several workers may see the time come; one of them says so.
        if self.off_until.swap(0, Ordering::Relaxed) == 0 {
            Usable::Yes
        } else {
            Usable::Again
        }
    }

    /// Withdraws it for a while; true for the one caller who did.
    pub fn withdraw(&self, now_ms: u64) -> bool {
        let until = now_ms + RETRY_AFTER_MS;
        let first = self.off_until.swap(until, Ordering::Relaxed) == 0;
        self.times.fetch_add(u64::from(first), Ordering::Relaxed);
        first
    }

    /// Whether it is withdrawn at this moment.
    pub fn is_withdrawn(&self) -> bool {
        self.off_until.load(Ordering::Relaxed) != 0
    }

    fn times(&self) -> u64 {
        self.times.load(Ordering::Relaxed)
    }
}

/// Whether a capability may be used now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usable {
    /// It is in use.
    Yes,
    /// It is withdrawn.
    No,
    /// It was withdrawn until now.
    Again,
}

/// Buckets for the time that a worker stands still for a new table: from what one reference costs to what would
/// be felt.
pub const TABLE_TAKE_BOUNDS: &[Duration] = &[
    Duration::from_nanos(250),
    Duration::from_nanos(500),
    Duration::from_micros(1),
    Duration::from_micros(2),
    Duration::from_micros(5),
    Duration::from_micros(10),
    Duration::from_micros(50),
    Duration::from_micros(100),
    Duration::from_millis(1),
    Duration::from_millis(10),
];

/// One worker's published counters.
#[derive(Default)]
pub struct WorkerCounts {
    /// TUN to underlay.
    pub encap: SharedCounts,
    /// Underlay to TUN.
    pub decap: SharedCounts,
}

/// Error numbers that were told, one bit each.
#[derive(Default)]
pub struct Told([AtomicU64; 3]);

impl Told {
    /// Whether this one was not told yet; true for one caller. Numbers beyond what Linux has count as one.
    fn is_news(&self, errno: i32) -> bool {
        let bit = usize::try_from(errno).unwrap_or(usize::MAX).min(191);
        let mask = 1 << (bit % 64);
        let word = self.0.get(bit / 64);
        word.is_some_and(|word| word.fetch_or(mask, Ordering::Relaxed) & mask == 0)
    }
}

/// Shared by the workers of one data plane.
pub struct Shared {
    /// As opened.
    pub settings: Settings,
    /// Its time.
    pub clock: Clock,
    /// The checksum of this CPU.
    pub sum: SumFn,
    /// Probed.
    pub tun_caps: TunCaps,
    /// Probed.
    pub udp_caps: UdpCaps,
    /// Send-only sockets; empty when workers send from their receive socket.
    pub send: Vec<UnderlaySocket>,
    /// Writing TCP superpackets to the TUN.
    pub tun_tcp: Withdrawable,
    /// Writing UDP superpackets to the TUN.
    pub tun_udp: Withdrawable,
    /// How often sending runs was withdrawn, for some next hop.
    pub udp_gso_withdrawals: AtomicU64,
    /// One entry per worker.
    pub counts: Vec<WorkerCounts>,
    /// How long workers stood still to take a new table.
    pub table_takes: Histogram,
    /// Where captures reach the workers.
    pub taps: Arc<Taps>,
    /// The kernel takes IPv4 packets from the device that come from an address of this node, so our answers
    /// to local senders may name us (`accept_local`, Documentation/networking/ip-sysctl.rst).
    pub answers_as_self: AtomicBool,
    /// Error numbers that have no drop reason of their own.
    pub rejections: Told,
    /// That the device vanished was told.
    pub device_gone: AtomicBool,
    /// Workers end after the burst in hand.
    pub stop: AtomicBool,
}

impl Shared {
    /// The table for one burst. A new one is taken against the clock; otherwise it costs one atomic load.
    #[inline]
    pub fn table<'a>(&self, reader: &'a mut Reader<Table>) -> &'a Table {
        if reader.is_stale() {
            self.take_table(reader);
        }
        reader.held()
    }

    /// By the monotonic clock, so that it counts, too, if the thread is preempted meanwhile.
    #[cold]
    fn take_table(&self, reader: &mut Reader<Table>) {
        let begun = Instant::now();
        reader.take();
        self.table_takes.record(begun.elapsed());
    }

    /// Tells the control plane.
    pub fn event(&self, event: Event) {
        (self.settings.on_event)(event);
    }

    /// Tells the control plane, once for all workers, that the device vanished.
    pub fn device_gone(&self) {
        if !self.device_gone.swap(true, Ordering::Relaxed) {
            let error = "the TUN device vanished".to_owned();
            self.event(Event::DeviceGone { error });
        }
    }

    /// Why the underlay did not take a datagram. What has no reason of its own is told with its error, once.
    #[cold]
    pub fn send_failed(&self, error: &io::Error) -> DropReason {
        self.tell_rejected(DropReason::of_send(error), "a datagram for a peer", error)
    }

    /// Why the device did not take a packet. Likewise.
    #[cold]
    pub fn write_failed(&self, error: &io::Error) -> DropReason {
        self.tell_rejected(
            DropReason::of_tun_write(error),
            "a packet from a peer",
            error,
        )
    }

    fn tell_rejected(
        &self,
        reason: DropReason,
        what: &'static str,
        error: &io::Error,
    ) -> DropReason {
        let errno = error.raw_os_error().unwrap_or(i32::MAX);
        if reason == DropReason::Rejected && self.rejections.is_news(errno) {
            let error = error.to_string();
            self.event(Event::Rejected { what, error });
        }
        reason
    }

    /// Stops using GSO runs towards `peer`.
    pub fn withdraw_gso(&self, peer: &Peer, reason: &io::Error) {
        if peer.gso.withdraw(self.clock.now_ms()) {
            self.udp_gso_withdrawals.fetch_add(1, Ordering::Relaxed);
            self.event(Event::CapabilityWithdrawn {
                capability: "udp-gso",
                next_hop: Some(peer.addr),
                reason: reason.to_string(),
            });
        }
    }

    /// Whether GSO runs may be sent to `peer`.
    #[inline]
    pub fn may_send_runs(&self, peer: &Peer) -> bool {
        self.udp_caps.gso && self.usable(&peer.gso, "udp-gso", Some(peer.addr))
    }

    /// Whether a withdrawable capability may be used, and a word when it may again.
    #[inline]
    pub fn usable(
        &self,
        state: &Withdrawable,
        capability: &'static str,
        next_hop: Option<SocketAddr>,
    ) -> bool {
        match state.state(|| self.clock.now_ms()) {
            Usable::Yes => true,
            Usable::No => false,
            Usable::Again => {
                self.event(Event::CapabilityRestored {
                    capability,
                    next_hop,
                });
                true
            }
        }
    }

    /// Acts on what a socket's error queue said about `peer`.
    pub fn on_queued_error(&self, error: &QueuedError, peer: &Peer) {
        match error.errno {
            libc::EMSGSIZE => {
                if let Some(mtu) = peer.learn_path_mtu(error.info, self.clock) {
                    self.event(Event::PathMtu {
                        next_hop: peer.addr,
                        mtu,
                    });
                }
            }
            libc::ECONNREFUSED if peer.note_refusal(self.clock) => {
                self.event(Event::PeerRefused {
                    next_hop: peer.addr,
                });
            }
            _ => {}
        }
    }

    /// Capabilities as `status` shows them.
    #[must_use]
    pub fn capabilities(&self) -> Vec<status::Capability> {
        let (tun, udp) = (self.tun_caps, self.udp_caps);
        let probed = |name: &str, has: bool, lack: &str| status::Capability {
            name: name.to_owned(),
            used: has,
            reason: (!has).then(|| lack.to_owned()),
            withdrawals: 0,
        };
        let kernel = "the kernel does not offer it";
        let withdrawable = |name: &str, has: bool, state: &Withdrawable| {
            let mut capability = probed(name, has, kernel);
            if has && state.is_withdrawn() {
                capability.used = false;
                capability.reason = Some("the kernel refused a superpacket (EINVAL)".to_owned());
            }
            capability.withdrawals = state.times();
            capability
        };
        let spread = !self.send.is_empty();
        vec![
            probed("tun-vnet-hdr", tun.vnet_hdr, kernel),
            probed("tun-multi-queue", tun.multi_queue, kernel),
            probed("tun-detached-writes", tun.detached_writes, kernel),
            withdrawable("tun-tso", tun.tso4() && tun.tso6(), &self.tun_tcp),
            withdrawable("tun-uso", tun.uso(), &self.tun_udp),
            status::Capability {
                withdrawals: self.udp_gso_withdrawals.load(Ordering::Relaxed),
                ..probed("udp-gso", udp.gso, kernel)
            },
            probed("udp-gro", udp.gro, kernel),
            probed("reuse-port", udp.reuse_port, kernel),
            probed("source-port-spread", spread, "SourcePort is fixed"),
            probed(
                "forced-buffers",
                udp.receive_buffer >= udp.wanted_buffer,
                "clamped by net.core.rmem_max: raise it or grant CAP_NET_ADMIN",
            ),
        ]
    }

    /// Buffer sizes and bounds as `status` shows them.
    #[must_use]
    pub fn limits(&self) -> BTreeMap<String, u64> {
        let udp = &self.udp_caps;
        let limits = [
            ("receive_buffer", udp.receive_buffer as u64),
            ("send_buffer", udp.send_buffer as u64),
            ("wanted_buffer", udp.wanted_buffer as u64),
            ("gso_max_segments", u64::from(udp.max_segments)),
            ("gso_max_bytes", u64::from(udp.max_run_len)),
            ("source_ports", self.send.len() as u64),
        ];
        limits
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// The socket a flow's packets leave through, for a worker whose own socket is `own`.
    #[inline]
    pub fn socket<'a>(&'a self, idx: u16, own: &'a UnderlaySocket) -> &'a UnderlaySocket {
        self.send.get(usize::from(idx)).unwrap_or(own)
    }

    /// Which socket a flow uses: by its hash alone, so that it never changes.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder of a division by a u16-sized count"
    )]
    pub fn socket_idx(&self, flow_hash: u32) -> u16 {
        match self.send.len() {
            0 => 0,
            sockets => ((u64::from(flow_hash) * sockets as u64) >> 32) as u16,
        }
    }

    /// The underlay address we are bound to.
    #[must_use]
    pub const fn bind(&self) -> SocketAddr {
        self.settings.bind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_number_is_told_once() {
        let told = Told::default();
        for errno in [0, 1, 63, 64, 133, 191, i32::MAX] {
            assert_eq!(told.is_news(errno), errno != i32::MAX, "{errno}");
            assert!(!told.is_news(errno), "{errno}");
        }
        assert!(!told.is_news(-1) && told.is_news(2));
    }

    #[test]
    fn a_withdrawn_capability_comes_back_once_after_a_while() {
        let capability = Withdrawable::default();
        assert_eq!(
            capability.state(|| unreachable!("no clock while in use")),
            Usable::Yes
        );
        assert!(capability.withdraw(5));
        assert!(!capability.withdraw(6), "only one caller says so");
        assert_eq!(capability.state(|| 5 + RETRY_AFTER_MS), Usable::No);
        assert_eq!(capability.state(|| 6 + RETRY_AFTER_MS), Usable::Again);
        assert_eq!(capability.state(|| 0), Usable::Yes);
        assert_eq!(capability.times(), 1);
    }
}
