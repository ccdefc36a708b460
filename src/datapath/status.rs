//! Owns the picture of the data plane that `loden status` shows. Never counts by itself.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

use crate::telemetry::histogram::Distribution;

/// The data plane at one moment.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    /// `mmsg` or `portable`.
    pub engine: String,
    /// The TUN device.
    pub device: String,
    /// Overlay MTU in bytes.
    pub mtu: u16,
    /// Capabilities, in a fixed order.
    pub capabilities: Vec<Capability>,
    /// Forced and granted buffer sizes, queue lengths: name to bytes or packets.
    pub limits: BTreeMap<String, u64>,
    /// One entry per worker.
    pub workers: Vec<Worker>,
    /// Sums over the workers.
    pub total: Worker,
    /// How long workers stood still to take a new table, one entry per worker and table.
    pub table_takes: Distribution,
    /// Every next hop.
    pub peers: Vec<Peer>,
}

impl Status {
    /// Two data planes as one: the second's workers behind the first's. What is one per device is the first's.
    #[must_use]
    pub fn beside(mut self, other: Self) -> Self {
        self.device = format!("{}, {}", self.device, other.device);
        self.workers.extend(other.workers);
        self.total.encap.add(&other.total.encap);
        self.total.decap.add(&other.total.decap);
        self.peers.extend(other.peers);
        self
    }
}

impl Counters {
    fn add(&mut self, other: &Self) {
        for (reason, count) in &other.drops {
            *self.drops.entry(reason).or_default() += count;
        }
        for (mine, theirs) in [
            (&mut self.read, other.read),
            (&mut self.sent, other.sent),
            (&mut self.answered, other.answered),
            (&mut self.queued, other.queued),
            (&mut self.read_bytes, other.read_bytes),
            (&mut self.sent_bytes, other.sent_bytes),
            (&mut self.read_superpackets, other.read_superpackets),
            (&mut self.sent_superpackets, other.sent_superpackets),
            (&mut self.read_calls, other.read_calls),
            (&mut self.send_calls, other.send_calls),
            (&mut self.fragments, other.fragments),
            (&mut self.replays, other.replays),
            (&mut self.wakeups, other.wakeups),
        ] {
            *mine += theirs;
        }
    }
}

/// A kernel feature and whether it is used.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Capability {
    /// `tun-vnet-hdr`, `tun-tso4`, `tun-uso4`, `udp-gso`, `udp-gro`, ...
    pub name: String,
    /// In use now.
    pub used: bool,
    /// Why not, where it is not; or a note.
    pub reason: Option<String>,
    /// How often it was withdrawn since the start.
    pub withdrawals: u64,
}

/// The counters of one worker.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Worker {
    /// TUN to underlay.
    pub encap: Counters,
    /// Underlay to TUN.
    pub decap: Counters,
}

/// One direction's counters. `read = sent + answered + Σ drops + queued`, in inner packets (segments).
#[derive(Clone, Debug, Default, Serialize)]
pub struct Counters {
    /// Inner packets read.
    pub read: u64,
    /// Inner packets handed to the kernel.
    pub sent: u64,
    /// Inner packets answered with an ICMP error instead.
    pub answered: u64,
    /// Inner packets in hand at this moment.
    pub queued: u64,
    /// Inner packets dropped, by reason; every reason is listed.
    pub drops: BTreeMap<&'static str, u64>,
    /// Bytes of inner packets read.
    pub read_bytes: u64,
    /// Bytes of inner packets sent.
    pub sent_bytes: u64,
    /// Superpackets or GRO buffers of more than one segment read.
    pub read_superpackets: u64,
    /// Superpackets or GSO runs of more than one segment sent.
    pub sent_superpackets: u64,
    /// System calls that read.
    pub read_calls: u64,
    /// System calls that sent.
    pub send_calls: u64,
    /// Fragments made of inner packets that were too big and may be fragmented.
    pub fragments: u64,
    /// Runs or superpackets sent again without an offload the kernel refused.
    pub replays: u64,
    /// Wake-ups with something to do.
    pub wakeups: u64,
}

/// One next hop.
#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    /// Where its datagrams go.
    pub addr: SocketAddr,
    /// Its subnets.
    pub nets: Vec<ipnet::IpNet>,
    /// Inner packets sent to it.
    pub sent: u64,
    /// Inner packets accepted from it.
    pub received: u64,
    /// Inner packets from it that were dropped.
    pub dropped: u64,
    /// Path MTU in bytes, outer headers included, where learned.
    pub path_mtu: Option<u16>,
    /// UDP GSO withdrawn for it, and why.
    pub gso_withdrawn: Option<String>,
}
