//! Owns the packet path between the TUN device and the underlay sockets, and its workers. Never talks to a
//! store or a backend, never uses `tokio`.

pub mod answer;
pub mod decap;
pub mod delivery;
pub mod drop;
pub mod encap;
pub mod encapsulation;
pub mod foretell;
pub mod forward;
pub mod limiter;
pub mod lock;
mod open_error;
pub mod outbox;
pub mod pending;
mod plane;
pub mod portable;
pub mod report;
pub mod shared;
pub mod slow_path;
pub mod stats;
pub mod status;
pub mod table;
pub mod tap;
pub mod worker;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

pub use drop::DropReason;
pub use encapsulation::Encapsulation;
pub use open_error::OpenError;
pub use plane::Datapath;
pub use status::Status;

use crate::addr::{Mac, Mtu};

/// Which implementation of the packet path runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// Batched system calls, offloads, one worker per core.
    Mmsg,
    /// One packet per system call, no offload, one thread: the oracle, and what runs on the oldest kernel.
    Portable,
}

/// How far the source of a datagram is checked before its inner packet is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceCheck {
    /// The outer source is a known peer, and the inner source lies in that peer's lease or is its address.
    Strict,
    /// Any outer source; the inner source lies in some peer's lease (peers behind NAT).
    Loose,
}

/// How the source port of outgoing datagrams is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourcePort {
    /// By the inner flow, from a small fixed set, so that receivers and routers can spread load.
    Spread,
    /// Always the tunnel's port, as the original does.
    Fixed,
}

/// What on this node the data plane delivers to and answers from.
#[derive(Clone, Debug)]
pub struct Local {
    /// The subnets leased to this node; inner destinations must lie inside (or equal one of `addrs`).
    pub nets: Vec<IpNet>,
    /// This node's own underlay addresses, accepted as inner destinations.
    pub addrs: Vec<IpAddr>,
    /// Source address of ICMP errors that we send, the lease's first address as in the original.
    pub icmp_v4: Option<Ipv4Addr>,
    /// Source address of ICMPv6 errors.
    pub icmp_v6: Option<Ipv6Addr>,
}

/// Everything the data plane needs to open; all values are validated by whoever builds it.
#[derive(Clone)]
pub struct Settings {
    /// The engine to run.
    pub engine: EngineKind,
    /// Number of workers, at least 1 (the portable engine always uses one).
    pub workers: usize,
    /// Pin worker i to the i-th CPU this process may use.
    pub pin: bool,
    /// TUN name template as `TUNSETIFF` takes it, `flannel%d`.
    pub device: String,
    /// How packets stand in datagrams; the same on all nodes of a network.
    pub encapsulation: Encapsulation,
    /// Where peers reach us: the external interface's address and the tunnel port.
    pub bind: SocketAddr,
    /// MTU of the overlay, the TUN's.
    pub mtu: Mtu,
    /// Strictness on decap.
    pub source_check: SourceCheck,
    /// Source port policy on encap.
    pub source_port: SourcePort,
    /// What is local.
    pub local: Local,
    /// Called from worker threads for rare things worth a log line; must not block.
    pub on_event: Arc<dyn Fn(Event) + Send + Sync>,
}

/// One overlay prefix and the peer that owns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRoute {
    /// The peer's subnet.
    pub net: IpNet,
    /// Where its datagrams go.
    pub addr: SocketAddr,
    /// Its VTEP's address; without one nothing can be sent to it in VXLAN, and none is checked of what comes.
    pub mac: Option<Mac>,
    /// The peer decapsulates with RFC 6040 normal mode, so the outer ECN field may carry the inner one.
    pub ecn: bool,
}

/// Something rare that happened on the packet path and that the control plane logs or acts upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The TUN device vanished or refuses everything; the control plane reopens the data plane.
    DeviceGone {
        /// The error that told.
        error: String,
    },
    /// A capability was withdrawn at run time.
    CapabilityWithdrawn {
        /// Which (`udp-gso`, `tun-uso`, ...).
        capability: &'static str,
        /// The next hop it was withdrawn for; `None` is the device or all of them.
        next_hop: Option<SocketAddr>,
        /// Why, in the kernel's terms.
        reason: String,
    },
    /// A withdrawn capability works again.
    CapabilityRestored {
        /// Which.
        capability: &'static str,
        /// The next hop concerned; `None` is the device or all of them.
        next_hop: Option<SocketAddr>,
    },
    /// The first packet from this outer source was dropped for this reason.
    FirstDrop {
        /// The reason.
        reason: DropReason,
        /// The outer source.
        outer: SocketAddr,
        /// The inner source, where one could be read.
        inner: Option<IpAddr>,
    },
    /// The kernel refused a packet for a reason that has no [`DropReason`] of its own. Told once for each error.
    Rejected {
        /// What it was.
        what: &'static str,
        /// The kernel's error.
        error: String,
    },
    /// The path MTU towards a peer changed.
    PathMtu {
        /// The peer.
        next_hop: SocketAddr,
        /// What the path carries, outer headers included.
        mtu: Mtu,
    },
    /// A peer's host answered that nothing listens on the tunnel port.
    PeerRefused {
        /// The peer.
        next_hop: SocketAddr,
    },
    /// A worker ended unexpectedly; the control plane reopens the data plane.
    WorkerDied {
        /// Which worker.
        worker: usize,
        /// Its last words.
        error: String,
    },
}
