//! Owns what is done with a system: the traffic, on which wires, for which systems, and what is read off it.
//! Pure.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use super::system::System;
use crate::lab::Wire;

/// Datagrams in one `UDP_SEGMENT` send of the burst scenario: what a QUIC sender hands over at once.
pub const BURST: u16 = 32;

/// One kind of traffic between two pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// One TCP stream.
    TcpOne,
    /// Eight TCP streams side by side.
    TcpEight,
    /// 64-byte UDP, [`BURST`] datagrams per send, at a rate that every measured system carries.
    UdpBurst,
    /// 64-byte UDP, one datagram per send, at such a rate.
    UdpSingle,
    /// 64-byte UDP, one datagram each millisecond: nothing else happens in between.
    IdleLatency,
}

/// A number that a scenario yields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Gigabits of TCP payload per second, as the receiver counts them.
    Throughput,
    /// Retransmitted TCP segments.
    Retransmits,
    /// Processor seconds of both daemons per gigabyte (10⁹ bytes) of TCP payload.
    CpuPerGigabyte,
    /// Processor microseconds of both daemons per datagram that arrived.
    CpuPerPacket,
    /// Datagrams that did not arrive, in percent.
    Loss,
    /// Datagrams that arrived after one sent later.
    Reordered,
    /// One way from application to application, microseconds, median.
    LatencyP50,
    /// The same, 99th percentile.
    LatencyP99,
}

impl Scenario {
    /// Every scenario, in the order of measuring.
    pub const ALL: [Self; 5] = [
        Self::TcpOne,
        Self::TcpEight,
        Self::UdpBurst,
        Self::UdpSingle,
        Self::IdleLatency,
    ];

    /// Whether the scenario is worth its time on this wire: packet sizes and wake-ups do not depend on the
    /// wire, so single packets are sent over one wire only.
    #[must_use]
    pub const fn runs_on(self, wire: Wire) -> bool {
        match self {
            Self::TcpOne => true,
            Self::TcpEight | Self::UdpBurst => !matches!(wire, Wire::PacketNoGro),
            Self::UdpSingle | Self::IdleLatency => matches!(wire, Wire::Superpacket),
        }
    }

    /// Whether the scenario says something about this system.
    #[must_use]
    pub const fn includes(self, system: System) -> bool {
        match self {
            Self::TcpOne | Self::IdleLatency => true,
            Self::TcpEight => matches!(system, System::Vxlan | System::Loden),
            Self::UdpBurst | Self::UdpSingle => system.has_daemon(),
        }
    }

    /// What the table shows of it.
    #[must_use]
    pub const fn metrics(self) -> &'static [Metric] {
        match self {
            Self::TcpOne | Self::TcpEight => &[
                Metric::Throughput,
                Metric::Retransmits,
                Metric::CpuPerGigabyte,
            ],
            Self::UdpBurst | Self::UdpSingle => {
                &[Metric::CpuPerPacket, Metric::Loss, Metric::Reordered]
            }
            Self::IdleLatency => &[Metric::LatencyP50, Metric::LatencyP99],
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::TcpOne => "TCP, 1 stream",
            Self::TcpEight => "TCP, 8 streams",
            Self::UdpBurst => "UDP 64 B, bursts of 32",
            Self::UdpSingle => "UDP 64 B, one at a time",
            Self::IdleLatency => "UDP 64 B, idle, one way",
        })
    }
}

impl Metric {
    /// The unit, for a table.
    #[must_use]
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Throughput => "Gb/s",
            Self::Retransmits => "retransmits",
            Self::CpuPerGigabyte => "CPU s/GB",
            Self::CpuPerPacket => "CPU us/packet",
            Self::Loss => "% lost",
            Self::Reordered => "reordered",
            Self::LatencyP50 => "p50 us",
            Self::LatencyP99 => "p99 us",
        }
    }
}
