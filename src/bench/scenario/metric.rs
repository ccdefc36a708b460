//! Owns what is read off a scenario: the numbers, their units, and which of them a load yields. Pure.

use serde::{Deserialize, Serialize};

use super::Load;

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
    /// Processor time of all daemons per second, in percent of one processor.
    DaemonLoad,
    /// The same of the whole machine.
    MachineLoad,
    /// Context switches of the daemons' threads per second, voluntary or not.
    ContextSwitches,
    /// Context switches of the whole machine per second.
    MachineSwitches,
    /// System calls that read or wrote packets, of all daemons, per inner packet that crossed.
    CallsPerPacket,
    /// Inner packets moved per such call.
    PacketsPerCall,
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
            Self::DaemonLoad => "CPU %",
            Self::MachineLoad => "machine CPU %",
            Self::ContextSwitches => "switches/s",
            Self::MachineSwitches => "machine switches/s",
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
                Metric::MachineSwitches,
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
                Metric::MachineSwitches,
                Metric::CallsPerPacket,
                Metric::PacketsPerCall,
            ],
            Self::OneWay { .. } => &[
                Metric::LatencyP50,
                Metric::LatencyP99,
                Metric::LatencyP999,
                Metric::Loss,
                Metric::DaemonLoad,
                Metric::MachineLoad,
                Metric::ContextSwitches,
                Metric::MachineSwitches,
                Metric::CallsPerPacket,
                Metric::PacketsPerCall,
            ],
            Self::Request { .. } => &[
                Metric::LatencyP50,
                Metric::LatencyP99,
                Metric::LatencyP999,
                Metric::RequestRate,
                Metric::DaemonLoad,
                Metric::MachineLoad,
                Metric::ContextSwitches,
                Metric::MachineSwitches,
                Metric::CallsPerPacket,
                Metric::PacketsPerCall,
            ],
            Self::Connect => &[
                Metric::ConnectRate,
                Metric::LatencyP50,
                Metric::LatencyP99,
                Metric::LatencyP999,
                Metric::DaemonLoad,
                Metric::MachineLoad,
                Metric::ContextSwitches,
                Metric::MachineSwitches,
                Metric::CallsPerPacket,
                Metric::PacketsPerCall,
            ],
            Self::Lossless { .. } => &[
                Metric::PacketRate,
                Metric::CpuPerPacket,
                Metric::MachinePerPacket,
                Metric::Loss,
                Metric::Reordered,
                Metric::ContextSwitches,
                Metric::MachineSwitches,
                Metric::CallsPerPacket,
                Metric::PacketsPerCall,
            ],
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
}

#[cfg(test)]
mod tests {
    use super::super::Scenario;

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
