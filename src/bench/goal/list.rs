//! Owns the list of goals: whose number, of what, and where it must lie. Pure.

use super::Bound;
use crate::bench::medium::Medium;
use crate::bench::report::Cells;
use crate::bench::scenario::{Metric, Scenario};
use crate::bench::system::System;

/// Whose number it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Loden,
    LodenVxlan,
    LodenHostGw,
    LodenUserVxlan,
    Plain,
    Vxlan,
    Portable,
    /// The daemon given with `--against`; where there is none, the portable engine, which works as it does, stands
    /// for it.
    Original,
}

impl Who {
    pub(super) fn among(self, cells: &Cells) -> System {
        match self {
            Self::Loden => System::LODEN,
            Self::LodenVxlan => System::LodenVxlan,
            Self::LodenHostGw => System::LodenHostGw,
            Self::LodenUserVxlan => System::LodenUserVxlan,
            Self::Plain => System::Plain,
            Self::Vxlan => System::Vxlan,
            Self::Portable => System::Portable,
            Self::Original => cells
                .systems()
                .into_iter()
                .find(|system| matches!(system, System::Other(_)))
                .unwrap_or(System::Portable),
        }
    }
}

/// One side of a ratio.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side(pub(super) Scenario, pub(super) Who);

/// A ratio, or a number, and where it must lie.
pub(super) struct Goal {
    pub(super) id: &'static str,
    pub(super) wire: Medium,
    pub(super) metric: Metric,
    pub(super) over: Side,
    /// Without it, the number itself is judged.
    pub(super) under: Option<Side>,
    pub(super) bound: Bound,
}

pub(super) const TCP_1: Scenario = Scenario::tcp(1);
const TCP_8: Scenario = Scenario::tcp(8);
const TCP_64: Scenario = Scenario::tcp(64);
const BURST: Scenario = Scenario::udp(true);
const SINGLE: Scenario = Scenario::udp(false);
const IDLE: Scenario = Scenario::LATENCY_IDLE;

/// loden over `under`, in one scenario.
const fn against(
    id: &'static str,
    wire: Medium,
    scenario: Scenario,
    metric: Metric,
    under: Who,
    bound: Bound,
) -> Goal {
    Goal {
        id,
        wire,
        metric,
        over: Side(scenario, Who::Loden),
        under: Some(Side(scenario, under)),
        bound,
    }
}

const fn throughput(id: &'static str, wire: Medium, under: Who, floor: f64) -> Goal {
    let bound = Bound::AtLeast(floor);
    against(id, wire, TCP_1, Metric::Throughput, under, bound)
}

/// What a backend costs against what it is made of: the kernel's own by hand, or our own without its headers.
const fn transport(wire: Medium, over: Who, under: Who, floor: f64) -> Goal {
    Goal {
        id: "transport",
        wire,
        metric: Metric::Throughput,
        over: Side(TCP_1, over),
        under: Some(Side(TCP_1, under)),
        bound: Bound::AtLeast(floor),
    }
}

/// Many streams over one.
const fn streams(id: &'static str, wire: Medium, many: Scenario) -> Goal {
    Goal {
        id,
        wire,
        metric: Metric::Throughput,
        over: Side(many, Who::Loden),
        under: Some(Side(TCP_1, Who::Loden)),
        bound: Bound::AtLeast(0.9),
    }
}

/// loden's own number, without a ratio.
const fn alone(
    wire: Medium,
    id: &'static str,
    scenario: Scenario,
    metric: Metric,
    most: f64,
) -> Goal {
    Goal {
        id,
        wire,
        metric,
        over: Side(scenario, Who::Loden),
        under: None,
        bound: Bound::AtMost(most),
    }
}

pub(super) const SUPER: Medium = Medium::Superpacket;
const PACKET: Medium = Medium::Packet;
const NO_GRO: Medium = Medium::PacketNoGro;

/// What has been reached and must not be lost again; each only ever rises.
pub(super) const FLOORS: [Goal; 8] = [
    throughput("floor", SUPER, Who::Vxlan, 0.55),
    throughput("floor", SUPER, Who::Portable, 12.0),
    throughput("floor", PACKET, Who::Vxlan, 0.70),
    throughput("floor", NO_GRO, Who::Portable, 2.0),
    streams("floor", SUPER, TCP_8),
    streams("floor", PACKET, TCP_8),
    against(
        "floor",
        SUPER,
        BURST,
        Metric::CpuPerPacket,
        Who::Portable,
        Bound::AtMost(0.25),
    ),
    against(
        "floor",
        SUPER,
        IDLE,
        Metric::LatencyP50,
        Who::Portable,
        Bound::AtMost(1.0),
    ),
];

/// Where the project wants to be. P8, P9 and P11 are not figures of a network: `benches/` and the tests of memory
/// measure the first two.
pub(super) const PROJECT: [Goal; 30] = [
    throughput("P1", SUPER, Who::Original, 20.0),
    throughput("P1, first milestone", SUPER, Who::Vxlan, 0.6),
    throughput("P1", SUPER, Who::Vxlan, 1.0),
    throughput("P2", PACKET, Who::Original, 20.0),
    throughput("P2, first milestone", PACKET, Who::Vxlan, 0.75),
    throughput("P2", PACKET, Who::Vxlan, 1.0),
    throughput("P3", NO_GRO, Who::Original, 5.0),
    throughput("P3", NO_GRO, Who::Vxlan, 0.6),
    against(
        "P4",
        SUPER,
        BURST,
        Metric::CpuPerPacket,
        Who::Original,
        Bound::AtMost(0.125),
    ),
    against(
        "P4",
        PACKET,
        BURST,
        Metric::CpuPerPacket,
        Who::Original,
        Bound::AtMost(0.125),
    ),
    against(
        "P5",
        SUPER,
        SINGLE,
        Metric::CpuPerPacket,
        Who::Original,
        Bound::AtMost(0.5),
    ),
    against(
        "P6",
        SUPER,
        IDLE,
        Metric::LatencyP50,
        Who::Original,
        Bound::AtMost(0.8),
    ),
    against(
        "P6",
        SUPER,
        IDLE,
        Metric::LatencyP99,
        Who::Original,
        Bound::AtMost(0.8),
    ),
    against(
        "P6",
        SUPER,
        IDLE,
        Metric::LatencyP50,
        Who::Vxlan,
        Bound::AtMost(1.3),
    ),
    against(
        "P6",
        SUPER,
        IDLE,
        Metric::LatencyP99,
        Who::Vxlan,
        Bound::AtMost(1.3),
    ),
    streams("P7", SUPER, TCP_8),
    streams("P7", SUPER, TCP_64),
    streams("P7", PACKET, TCP_8),
    streams("P7", PACKET, TCP_64),
    alone(SUPER, "P7", TCP_8, Metric::Reordered, 0.0),
    alone(PACKET, "P7", TCP_8, Metric::Reordered, 0.0),
    alone(PACKET, "P7", TCP_64, Metric::Reordered, 0.0),
    alone(SUPER, "P10", TCP_1, Metric::CpuPerGigabyte, 1.2),
    alone(PACKET, "P10", TCP_1, Metric::CpuPerGigabyte, 1.2),
    transport(SUPER, Who::LodenVxlan, Who::Vxlan, 0.97),
    transport(PACKET, Who::LodenVxlan, Who::Vxlan, 0.97),
    transport(SUPER, Who::LodenHostGw, Who::Plain, 0.97),
    transport(PACKET, Who::LodenHostGw, Who::Plain, 0.97),
    transport(SUPER, Who::LodenUserVxlan, Who::Loden, 0.8),
    transport(PACKET, Who::LodenUserVxlan, Who::Loden, 0.8),
];
