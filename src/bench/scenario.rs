//! Owns what is done with a system: the traffic, between which ends, and what is read off it. Every scenario has a
//! text id that stays the same from release to release. Pure.

mod id;
mod metric;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use metric::Metric;

use super::medium::Medium;

/// Datagrams in one `UDP_SEGMENT` send of a burst scenario: what a QUIC sender hands over at once.
pub const BURST: u16 = 32;
/// UDP payload bytes of the scenarios that measure packets rather than bytes.
pub const SMALL: u16 = 64;
/// The longest UDP payload that a scenario may have: a burst of them must fit into one send of 65507 bytes.
pub const MAX_LEN: u16 = 2000;
/// The most TCP streams: iperf3 takes no more.
pub const MAX_STREAMS: u8 = 128;

/// What crosses the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Load {
    /// TCP streams at full speed, in one direction or in both at once.
    Tcp {
        /// How many, in each direction.
        streams: u8,
        /// Both directions at once.
        both: bool,
    },
    /// UDP at a rate that every measured system carries, so that processor time per packet compares.
    Udp {
        /// Payload bytes.
        len: u16,
        /// [`BURST`] datagrams per send instead of one.
        burst: bool,
    },
    /// 64-byte UDP, one way, a datagram each millisecond.
    OneWay {
        /// While other packets cross at half the rate that every system carries; else on an idle system.
        half: bool,
    },
    /// 64 bytes there and 64 back over one TCP connection, one request after the other.
    Request {
        /// As for [`Load::OneWay`].
        half: bool,
    },
    /// TCP connections, each for one byte there and one back, eight at a time.
    Connect,
    /// The highest rate of single UDP datagrams of which 99 % arrive.
    Lossless {
        /// Payload bytes.
        len: u16,
    },
}

/// Between whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ends {
    /// A pod behind veth and bridge on each node.
    Pods,
    /// The nodes themselves, by their overlay addresses. This ranks designs differently: a local sender is
    /// throttled while its packets wait in the tunnel's queue, a pod is not.
    Hosts,
}

/// One kind of traffic between two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Scenario {
    /// On an underlay with an MTU of 9000.
    pub jumbo: bool,
    /// Between whom.
    pub ends: Ends,
    /// What.
    pub load: Load,
}

impl Scenario {
    /// `load` from pod to pod on the usual underlay.
    #[must_use]
    pub const fn pods(load: Load) -> Self {
        Self {
            jumbo: false,
            ends: Ends::Pods,
            load,
        }
    }

    /// `streams` TCP streams one way, from pod to pod.
    #[must_use]
    pub const fn tcp(streams: u8) -> Self {
        Self::pods(Load::Tcp {
            streams,
            both: false,
        })
    }

    /// 64-byte UDP from pod to pod.
    #[must_use]
    pub const fn udp(burst: bool) -> Self {
        Self::pods(Load::Udp { len: SMALL, burst })
    }

    /// One-way latency from pod to pod on an idle system.
    pub const LATENCY_IDLE: Self = Self::pods(Load::OneWay { half: false });

    /// The id and nothing else.
    #[must_use]
    pub fn id(self) -> String {
        self.to_string()
    }
}

impl Load {
    /// Whether sender and receiver stamp packets by the same clock, which two machines do not have.
    #[must_use]
    pub const fn needs_one_clock(self) -> bool {
        matches!(self, Self::OneWay { .. })
    }

    /// Whether it needs the rates that every system carries.
    #[must_use]
    pub const fn is_paced(self) -> bool {
        match self {
            Self::Udp { .. } => true,
            Self::OneWay { half } | Self::Request { half } => half,
            Self::Tcp { .. } | Self::Connect | Self::Lossless { .. } => false,
        }
    }

    /// Whether it is made of superpackets, so that a system with offloads must show them.
    #[must_use]
    pub const fn is_bulk(self) -> bool {
        matches!(self, Self::Tcp { .. })
    }

    /// About how long one sample takes, with starting and stopping programs. Only for telling how long a run
    /// will take.
    #[must_use]
    pub fn expected(self, seconds: u32) -> Duration {
        let tcp = Duration::from_secs(u64::from(seconds));
        match self {
            Self::Tcp { .. } => tcp + Duration::from_millis(350),
            Self::Udp { .. } => Duration::from_millis(1_250),
            Self::OneWay { .. } => Duration::from_millis(2_300),
            Self::Request { .. } | Self::Connect => Duration::from_millis(1_300),
            Self::Lossless { .. } => Duration::from_secs(7),
        }
    }
}

impl Scenario {
    /// What it is, in words.
    #[must_use]
    pub fn describe(self) -> String {
        let load = match self.load {
            Load::Tcp { streams, both } => {
                let plural = if streams == 1 { "" } else { "s" };
                let both = if both { " each way at once" } else { "" };
                format!("TCP, {streams} stream{plural}{both}")
            }
            Load::Udp { len, burst: true } => format!("UDP {len} B, bursts of {BURST}"),
            Load::Udp { len, burst: false } => format!("UDP {len} B, one at a time"),
            Load::OneWay { half: false } => "UDP 64 B, idle, one way".to_owned(),
            Load::OneWay { half: true } => "UDP 64 B, half load, one way".to_owned(),
            Load::Request { half: false } => "TCP request and answer, idle".to_owned(),
            Load::Request { half: true } => "TCP request and answer, half load".to_owned(),
            Load::Connect => "TCP connections, 8 at a time".to_owned(),
            Load::Lossless { len } => format!("UDP {len} B, highest rate with 99 % arriving"),
        };
        let ends = match self.ends {
            Ends::Pods => "",
            Ends::Hosts => ", host to host",
        };
        let jumbo = if self.jumbo { ", MTU 9000" } else { "" };
        format!("{load}{ends}{jumbo}")
    }

    /// Whether a quick run takes it on this wire: packet sizes and wake-ups do not depend on the wire, so single
    /// packets are sent over one wire only.
    #[must_use]
    pub fn is_quick_on(self, wire: Medium) -> bool {
        let load = self.load;
        match wire {
            Medium::Superpacket | Medium::Machines => true,
            Medium::Packet => load.is_bulk() || matches!(load, Load::Udp { burst: true, .. }),
            Medium::PacketNoGro => load == Self::tcp(1).load,
        }
    }
}
