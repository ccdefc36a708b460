//! Owns what is done with a system: the traffic, between which ends, and what is read off it. Every scenario has a
//! text id that stays the same from release to release. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::lab::Wire;

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

/// A number that a scenario yields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Gigabits of TCP payload per second, as the receiver counts them, both directions together.
    Throughput,
    /// Thousands of datagrams per second.
    PacketRate,
    /// TCP connections opened, used and closed per second.
    ConnectRate,
    /// Requests answered per second.
    RequestRate,
    /// Retransmitted TCP segments.
    Retransmits,
    /// Processor seconds of all daemons per gigabyte (10⁹ bytes) of TCP payload.
    CpuPerGigabyte,
    /// Processor seconds of the whole machine, traffic programs and kernel threads included, per gigabyte.
    MachinePerGigabyte,
    /// Processor microseconds of all daemons per datagram that arrived.
    CpuPerPacket,
    /// The same of the whole machine.
    MachinePerPacket,
    /// Datagrams that did not arrive, in percent.
    Loss,
    /// Datagrams that arrived after one sent later; for TCP, how often the sender's kernel found its segments
    /// reordered.
    Reordered,
    /// Microseconds, median: one way, or from request to answer.
    LatencyP50,
    /// The same, 99th percentile.
    LatencyP99,
    /// The same, 99.9th percentile.
    LatencyP999,
    /// Context switches of the daemons' threads per second, voluntary or not.
    ContextSwitches,
    /// System calls that read or wrote packets, of all daemons, per inner packet that crossed.
    CallsPerPacket,
    /// Inner packets moved per such call.
    PacketsPerCall,
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
    /// What a table shows of it, the most important first.
    #[must_use]
    pub const fn metrics(self) -> &'static [Metric] {
        match self {
            Self::Tcp { .. } => &[
                Metric::Throughput,
                Metric::Retransmits,
                Metric::Reordered,
                Metric::CpuPerGigabyte,
                Metric::MachinePerGigabyte,
                Metric::ContextSwitches,
                Metric::CallsPerPacket,
                Metric::PacketsPerCall,
            ],
            Self::Udp { .. } => &[
                Metric::CpuPerPacket,
                Metric::MachinePerPacket,
                Metric::PacketRate,
                Metric::Loss,
                Metric::Reordered,
                Metric::ContextSwitches,
                Metric::CallsPerPacket,
                Metric::PacketsPerCall,
            ],
            Self::OneWay { .. } => &[
                Metric::LatencyP50,
                Metric::LatencyP99,
                Metric::LatencyP999,
                Metric::Loss,
            ],
            Self::Request { .. } => &[
                Metric::LatencyP50,
                Metric::LatencyP99,
                Metric::LatencyP999,
                Metric::RequestRate,
            ],
            Self::Connect => &[Metric::ConnectRate, Metric::LatencyP50, Metric::LatencyP99],
            Self::Lossless { .. } => &[Metric::PacketRate],
        }
    }

    /// The number that systems are ranked by; [`Metric::MachinePerPacket`] where a daemon's processor time would
    /// leave out those without a daemon.
    #[must_use]
    pub const fn headline(self) -> Metric {
        match self {
            Self::Udp { .. } => Metric::MachinePerPacket,
            Self::Tcp { .. } => Metric::Throughput,
            Self::OneWay { .. } | Self::Request { .. } => Metric::LatencyP50,
            Self::Connect => Metric::ConnectRate,
            Self::Lossless { .. } => Metric::PacketRate,
        }
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
            Self::Tcp { .. } => tcp + Duration::from_millis(500),
            Self::Udp { .. } => Duration::from_millis(1_500),
            Self::OneWay { .. } => Duration::from_millis(2_500),
            Self::Request { .. } | Self::Connect => Duration::from_millis(1_300),
            Self::Lossless { .. } => Duration::from_secs(7),
        }
    }
}

/// What a scenario is called on the command line, in reports, and for people.
impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let jumbo = if self.jumbo { "jumbo-" } else { "" };
        let ends = match self.ends {
            Ends::Pods => "",
            Ends::Hosts => "host-",
        };
        let load = |half| if half { "half" } else { "idle" };
        let text = match self.load {
            Load::Tcp { streams, both } => {
                format!("tcp-{streams}{}", if both { "-both" } else { "" })
            }
            Load::Udp { len, burst } => format!("udp-{len}{}", if burst { "-burst" } else { "" }),
            Load::OneWay { half } => format!("latency-{}", load(half)),
            Load::Request { half } => format!("request-{}", load(half)),
            Load::Connect => "connect-rate".to_owned(),
            Load::Lossless { len } => format!("lossless-{len}"),
        };
        f.pad(&format!("{jumbo}{ends}{text}"))
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (jumbo, rest) = stripped(text, "jumbo-");
        let (hosts, rest) = stripped(rest, "host-");
        let ends = if hosts { Ends::Hosts } else { Ends::Pods };
        Load::parse(rest)
            .map(|load| Self { jumbo, ends, load })
            // There is one way to write each, so that ids and scenarios map one to one.
            .filter(|scenario| scenario.id() == text)
            .ok_or_else(|| {
                format!(
                    "there is no scenario {text:?}; there are tcp-N, tcp-N-both (1 to {MAX_STREAMS} streams), \
                     udp-LEN, udp-LEN-burst, lossless-LEN (20 to {MAX_LEN} bytes), latency-idle, latency-half, \
                     request-idle, request-half and connect-rate, each also after host- and, before that, jumbo-"
                )
            })
    }
}

impl Load {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "latency-idle" => return Some(Self::OneWay { half: false }),
            "latency-half" => return Some(Self::OneWay { half: true }),
            "request-idle" => return Some(Self::Request { half: false }),
            "request-half" => return Some(Self::Request { half: true }),
            "connect-rate" => return Some(Self::Connect),
            _ => {}
        }
        let (kind, rest) = text.split_once('-')?;
        let (number, suffix) = rest.split_once('-').unwrap_or((rest, ""));
        let value: u16 = number.parse().ok()?;
        let len = || (20..=MAX_LEN).contains(&value).then_some(value);
        match (kind, suffix) {
            ("tcp", "" | "both") => {
                let streams = u8::try_from(value).ok();
                Some(Self::Tcp {
                    streams: streams.filter(|n| (1..=MAX_STREAMS).contains(n))?,
                    both: suffix == "both",
                })
            }
            ("udp", "" | "burst") => Some(Self::Udp {
                len: len()?,
                burst: suffix == "burst",
            }),
            ("lossless", "") => Some(Self::Lossless { len: len()? }),
            _ => None,
        }
    }
}

fn stripped<'a>(text: &'a str, prefix: &str) -> (bool, &'a str) {
    text.strip_prefix(prefix)
        .map_or((false, text), |rest| (true, rest))
}

impl TryFrom<String> for Scenario {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Scenario> for String {
    fn from(scenario: Scenario) -> Self {
        scenario.to_string()
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
    pub fn is_quick_on(self, wire: Wire) -> bool {
        let load = self.load;
        match wire {
            Wire::Superpacket => true,
            Wire::Packet => load.is_bulk() || matches!(load, Load::Udp { burst: true, .. }),
            Wire::PacketNoGro => load == Self::tcp(1).load,
        }
    }
}

impl Metric {
    /// The unit, for a table.
    #[must_use]
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Throughput => "Gb/s",
            Self::PacketRate => "kpps",
            Self::ConnectRate => "connections/s",
            Self::RequestRate => "requests/s",
            Self::Retransmits => "retransmits",
            Self::CpuPerGigabyte => "CPU s/GB",
            Self::MachinePerGigabyte => "machine s/GB",
            Self::CpuPerPacket => "CPU us/packet",
            Self::MachinePerPacket => "machine us/packet",
            Self::Loss => "% lost",
            Self::Reordered => "reordered",
            Self::LatencyP50 => "p50 us",
            Self::LatencyP99 => "p99 us",
            Self::LatencyP999 => "p99.9 us",
            Self::ContextSwitches => "switches/s",
            Self::CallsPerPacket => "calls/packet",
            Self::PacketsPerCall => "packets/call",
        }
    }

    /// Whether more is better.
    #[must_use]
    pub const fn more_is_better(self) -> bool {
        matches!(
            self,
            Self::Throughput
                | Self::PacketRate
                | Self::ConnectRate
                | Self::RequestRate
                | Self::PacketsPerCall
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_gives_back_its_scenario_and_the_scenario_its_id() {
        for id in [
            "tcp-1",
            "tcp-64",
            "tcp-8-both",
            "udp-64",
            "udp-1472",
            "udp-64-burst",
            "lossless-512",
            "latency-idle",
            "latency-half",
            "request-half",
            "connect-rate",
            "host-tcp-1",
            "jumbo-tcp-1",
            "jumbo-host-latency-idle",
        ] {
            assert_eq!(id.parse::<Scenario>().unwrap().id(), id);
        }
        assert_eq!("tcp-8".parse(), Ok(Scenario::tcp(8)));
        let hosts = "jumbo-host-tcp-1".parse::<Scenario>().unwrap();
        assert_eq!((hosts.jumbo, hosts.ends), (true, Ends::Hosts));
    }

    #[test]
    fn what_no_generator_could_send_is_refused_by_name() {
        for id in [
            "",
            "tcp",
            "tcp-0",
            "tcp-129",
            "tcp-01",
            "tcp-1-",
            "udp-19",
            "udp-2001",
            "udp-64-both",
            "host-jumbo-tcp-1",
            "latency",
            "lossless-64-burst",
            "tcp-one",
        ] {
            let error = id.parse::<Scenario>().unwrap_err();
            assert!(error.contains(&format!("{id:?}")), "{error}");
        }
    }

    #[test]
    fn the_headline_is_among_the_numbers_of_its_load() {
        for id in [
            "tcp-1",
            "udp-64",
            "latency-idle",
            "request-idle",
            "connect-rate",
            "lossless-64",
        ] {
            let load = id.parse::<Scenario>().unwrap().load;
            assert!(load.metrics().contains(&load.headline()), "{id}");
        }
    }
}
