//! Owns the floors that the project holds itself to, and the ratios they are held against: taken within a
//! repetition, where both sides met the same state of the machine, and summarised afterwards. Pure.

use serde::Serialize;

use super::report::Cells;
use super::scenario::{Metric, Scenario};
use super::stats::Summary;
use super::system::System;
use crate::lab::Wire;
use crate::lab::spec::cli_name;

/// One side of a ratio.
#[derive(Clone, Copy, Debug)]
struct Side(Scenario, System);

/// How the ratio must lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// Not below this.
    AtLeast(f64),
    /// Not above this.
    AtMost(f64),
}

impl Bound {
    fn holds(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(floor) => ratio >= floor,
            Self::AtMost(ceiling) => ratio <= ceiling,
        }
    }
}

struct Goal {
    wire: Wire,
    metric: Metric,
    over: Side,
    under: Side,
    bound: Bound,
}

const fn throughput(wire: Wire, over: Side, under: Side, floor: f64) -> Goal {
    Goal {
        wire,
        metric: Metric::Throughput,
        over,
        under,
        bound: Bound::AtLeast(floor),
    }
}

const LODEN: Side = Side(Scenario::TcpOne, System::Loden);
const VXLAN: Side = Side(Scenario::TcpOne, System::Vxlan);
const PORTABLE: Side = Side(Scenario::TcpOne, System::Portable);
const LODEN_8: Side = Side(Scenario::TcpEight, System::Loden);

/// The floors of the project's goals; each only ever rises.
const GOALS: [Goal; 8] = [
    throughput(Wire::Superpacket, LODEN, VXLAN, 0.55),
    throughput(Wire::Superpacket, LODEN, PORTABLE, 12.0),
    throughput(Wire::Packet, LODEN, VXLAN, 0.70),
    throughput(Wire::PacketNoGro, LODEN, PORTABLE, 2.0),
    throughput(Wire::Superpacket, LODEN_8, LODEN, 0.9),
    throughput(Wire::Packet, LODEN_8, LODEN, 0.9),
    Goal {
        wire: Wire::Superpacket,
        metric: Metric::CpuPerPacket,
        over: Side(Scenario::UdpBurst, System::Loden),
        under: Side(Scenario::UdpBurst, System::Portable),
        bound: Bound::AtMost(0.25),
    },
    Goal {
        wire: Wire::Superpacket,
        metric: Metric::LatencyP50,
        over: Side(Scenario::IdleLatency, System::Loden),
        under: Side(Scenario::IdleLatency, System::Portable),
        bound: Bound::AtMost(1.0),
    },
];

/// A goal with what was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// What is compared, in words.
    pub what: String,
    /// The ratio over the repetitions.
    pub ratio: Summary,
    /// Where it must lie.
    pub bound: Bound,
    /// Whether its median does.
    pub met: bool,
}

/// Judges every goal of which both sides were measured.
#[must_use]
pub fn judge(cells: &Cells) -> Vec<Verdict> {
    GOALS.iter().filter_map(|goal| goal.judge(cells)).collect()
}

impl Goal {
    fn judge(&self, cells: &Cells) -> Option<Verdict> {
        let over = cells.values(self.wire, self.over.0, self.over.1, self.metric)?;
        let under = cells.values(self.wire, self.under.0, self.under.1, self.metric)?;
        let ratios: Vec<f64> = over
            .iter()
            .zip(&under)
            .map(|(over, under)| over / under)
            .collect();
        let ratio = Summary::of(&ratios)?;
        Some(Verdict {
            what: self.describe(),
            ratio,
            bound: self.bound,
            met: self.bound.holds(ratio.median),
        })
    }

    fn describe(&self) -> String {
        let (over, under) = (self.over, self.under);
        let wire = cli_name(&self.wire);
        let unit = self.metric.unit();
        if over.0 == under.0 {
            format!("{} ({unit}), {wire} wire: {} / {}", over.0, over.1, under.1)
        } else {
            format!("{} / {} ({unit}), {wire} wire: {}", over.0, under.0, over.1)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::measure::Sample;
    use super::*;

    fn cells(loden: &[f64], vxlan: &[f64]) -> Cells {
        let mut cells = Cells::default();
        for (system, values) in [(System::Loden, loden), (System::Vxlan, vxlan)] {
            for &value in values {
                let sample = Sample(BTreeMap::from([(Metric::Throughput, value)]));
                cells.push(Wire::Superpacket, Scenario::TcpOne, system, sample);
            }
        }
        cells
    }

    #[test]
    fn ratios_are_taken_within_a_repetition_before_the_median() {
        // The machine slowed down threefold after the first repetition; the ratio did not change.
        let verdicts = judge(&cells(&[9.0, 3.0, 3.0], &[10.0, 5.0, 5.0]));
        assert_eq!(verdicts.len(), 1);
        assert_eq!(
            verdicts[0].ratio,
            Summary {
                median: 0.6,
                min: 0.6,
                max: 0.9
            }
        );
        assert!(verdicts[0].met);
    }

    #[test]
    fn a_ratio_below_its_floor_is_not_met() {
        assert!(!judge(&cells(&[5.0], &[10.0]))[0].met);
    }

    #[test]
    fn a_goal_without_both_sides_is_not_judged() {
        assert_eq!(judge(&cells(&[5.0], &[])), []);
    }
}
