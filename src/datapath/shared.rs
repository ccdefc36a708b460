//! Owns what all workers of one data plane share: settings, sockets to send from, capabilities in force,
//! counters. Never touches a packet.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::stats::SharedCounts;
use super::table::{Clock, Peer};
use super::{Event, Settings, status};
use crate::sys::mmsg::QueuedError;
use crate::tun::TunCaps;
use crate::underlay::{UdpCaps, UnderlaySocket};
use crate::wire::checksum::SumFn;

/// A capability that can be withdrawn while packets flow.
#[derive(Debug, Default)]
pub struct Withdrawable {
    withdrawn: AtomicBool,
    times: AtomicU64,
}

impl Withdrawable {
    /// Not withdrawn.
    #[inline]
    pub fn usable(&self) -> bool {
        !self.withdrawn.load(Ordering::Relaxed)
    }

    /// Withdraws it; true for the one caller who did.
    pub fn withdraw(&self) -> bool {
        let first = !self.withdrawn.swap(true, Ordering::Relaxed);
        self.count(first);
        first
    }

    fn count(&self, happened: bool) {
        self.times.fetch_add(u64::from(happened), Ordering::Relaxed);
    }

    fn times(&self) -> u64 {
        self.times.load(Ordering::Relaxed)
    }
}

/// One worker's published counters.
#[derive(Default)]
pub struct WorkerCounts {
    /// TUN to underlay.
    pub encap: SharedCounts,
    /// Underlay to TUN.
    pub decap: SharedCounts,
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
    /// Sending runs: counted here, withdrawn per next hop.
    pub udp_gso: Withdrawable,
    /// One entry per worker.
    pub counts: Vec<WorkerCounts>,
    /// That the device vanished was told.
    pub device_gone: AtomicBool,
    /// Workers end after the burst in hand.
    pub stop: AtomicBool,
}

impl Shared {
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

    /// Stops using GSO runs towards `peer`.
    pub fn withdraw_gso(&self, peer: &Peer, reason: &std::io::Error) {
        if peer.withdraw_gso(self.clock) {
            self.udp_gso.count(true);
            self.event(Event::CapabilityWithdrawn {
                capability: "udp-gso",
                next_hop: Some(peer.addr),
                reason: reason.to_string(),
            });
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
            if has && !state.usable() {
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
            withdrawable("udp-gso", udp.gso, &self.udp_gso),
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
