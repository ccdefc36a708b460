//! Owns the quick benchmark: what the floors of the project's goals need, and no more. Pure.

use super::scenario::{Load, Metric, Scenario};
use super::system::System;

/// What is measured, in this order.
pub const SCENARIOS: [Scenario; 5] = [
    Scenario::tcp(1),
    Scenario::tcp(8),
    Scenario::udp(true),
    Scenario::udp(false),
    Scenario::LATENCY_IDLE,
];

/// Whether a floor needs this scenario of this system: throughput of many streams is compared with that of one, and
/// processor time per packet is a process's.
#[must_use]
pub const fn includes(scenario: Scenario, system: &System) -> bool {
    match scenario.load {
        Load::Tcp { streams: 1, .. } | Load::OneWay { .. } => true,
        Load::Tcp { .. } => matches!(system, System::Vxlan | System::Loden(_)),
        Load::Udp { .. } => system.has_daemon(),
        Load::Request { .. } | Load::Connect | Load::Lossless { .. } => true,
    }
}

/// What the table shows.
#[must_use]
pub const fn metrics(load: Load) -> &'static [Metric] {
    match load {
        Load::Tcp { .. } => &[
            Metric::Throughput,
            Metric::Retransmits,
            Metric::CpuPerGigabyte,
        ],
        Load::Udp { .. } => &[Metric::CpuPerPacket, Metric::Loss, Metric::Reordered],
        Load::OneWay { .. } => &[Metric::LatencyP50, Metric::LatencyP99],
        Load::Request { .. } | Load::Connect | Load::Lossless { .. } => load.metrics(),
    }
}
