//! Owns the goals that the project holds itself to, the floors below which it must not fall again, and the ratios
//! they are held against. Pure.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ratio::{Rule, paired};
use super::report::Cells;
use super::scenario::{Metric, Scenario};
use super::stats::Summary;
use super::system::System;
use crate::lab::Wire;
use crate::lab::spec::cli_name;

/// Whose number it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Loden,
    Vxlan,
    Portable,
    /// The daemon given with `--against`; where there is none, the portable engine, which works as it does, stands
    /// for it.
    Original,
}

impl Who {
    fn among(self, cells: &Cells) -> System {
        match self {
            Self::Loden => System::LODEN,
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
struct Side(Scenario, Who);

/// How the ratio, or the number itself, must lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(floor) => write!(f, ">= {floor}"),
            Self::AtMost(ceiling) => write!(f, "<= {ceiling}"),
        }
    }
}

struct Goal {
    id: &'static str,
    wire: Wire,
    metric: Metric,
    over: Side,
    /// Without it, the number itself is judged.
    under: Option<Side>,
    bound: Bound,
}

const TCP_1: Scenario = Scenario::tcp(1);
const TCP_8: Scenario = Scenario::tcp(8);
const TCP_64: Scenario = Scenario::tcp(64);
const BURST: Scenario = Scenario::udp(true);
const SINGLE: Scenario = Scenario::udp(false);
const IDLE: Scenario = Scenario::LATENCY_IDLE;

/// loden over `under`, in one scenario.
const fn against(
    id: &'static str,
    wire: Wire,
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

const fn throughput(id: &'static str, wire: Wire, under: Who, floor: f64) -> Goal {
    let bound = Bound::AtLeast(floor);
    against(id, wire, TCP_1, Metric::Throughput, under, bound)
}

/// Many streams over one.
const fn streams(id: &'static str, wire: Wire, many: Scenario) -> Goal {
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
    wire: Wire,
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

const SUPER: Wire = Wire::Superpacket;
const PACKET: Wire = Wire::Packet;
const NO_GRO: Wire = Wire::PacketNoGro;

/// What has been reached and must not be lost again; each only ever rises.
const FLOORS: [Goal; 8] = [
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
const PROJECT: [Goal; 24] = [
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
];

/// What came of a goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The median lies where it must.
    Met,
    /// It does not.
    Missed,
    /// It was not measured, or the repetitions disagree.
    Open,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Met => "met",
            Self::Missed => "MISSED",
            Self::Open => "open",
        })
    }
}

/// A goal with what was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Which goal.
    pub goal: String,
    /// What is compared, in words.
    pub what: String,
    /// The ratio, or the number, over the repetitions; none if it is open.
    pub measured: Option<Summary>,
    /// Where it must lie.
    pub bound: Bound,
    /// Whether its median does.
    pub outcome: Outcome,
    /// Why it is open.
    pub why: Option<String>,
}

/// Judges every floor of which both sides were measured.
#[must_use]
pub fn floors(cells: &Cells) -> Vec<Verdict> {
    let verdicts = FLOORS.iter().map(|goal| goal.judge(cells, &Rule::ANY));
    verdicts
        .filter(|verdict| verdict.outcome != Outcome::Open)
        .collect()
}

/// Judges every goal of the project; those that were not measured are open.
#[must_use]
pub fn project(cells: &Cells, rule: &Rule) -> Vec<Verdict> {
    PROJECT.iter().map(|goal| goal.judge(cells, rule)).collect()
}

impl Goal {
    fn judge(&self, cells: &Cells, rule: &Rule) -> Verdict {
        let measured = self.measure(cells, rule);
        let outcome = match &measured {
            Ok(ratio) if self.bound.holds(ratio.median) => Outcome::Met,
            Ok(_) => Outcome::Missed,
            Err(_) => Outcome::Open,
        };
        Verdict {
            goal: self.id.to_owned(),
            what: self.describe(cells),
            measured: measured.as_ref().ok().copied(),
            bound: self.bound,
            outcome,
            why: measured.err(),
        }
    }

    fn measure(&self, cells: &Cells, rule: &Rule) -> Result<Summary, String> {
        let values = |side: Side| {
            let system = side.1.among(cells);
            cells
                .values(self.wire, side.0, &system, self.metric)
                .ok_or_else(|| format!("{} of {system} was not measured", side.0))
        };
        let over = values(self.over)?;
        match self.under {
            Some(under) => rule.judge(&paired(&over, &values(under)?)),
            None => Summary::of(&over.into_iter().flatten().collect::<Vec<_>>())
                .ok_or_else(|| "not measured".to_owned()),
        }
    }

    fn describe(&self, cells: &Cells) -> String {
        let Side(scenario, who) = self.over;
        let system = who.among(cells);
        let (what, wire) = (scenario.describe(), cli_name(&self.wire));
        let unit = self.metric.unit();
        match self.under {
            None => format!("{what} ({unit}), {wire} wire: {system}"),
            Some(Side(other, under)) if other == scenario => {
                let under = under.among(cells);
                format!("{what} ({unit}), {wire} wire: {system} / {under}")
            }
            Some(Side(other, _)) => {
                let other = other.describe();
                format!("{what} / {other} ({unit}), {wire} wire: {system}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::measure::Sample;
    use super::*;

    fn cells(systems: &[(System, &[f64])]) -> Cells {
        let mut cells = Cells::default();
        for (system, values) in systems {
            for &value in *values {
                let sample = Sample {
                    figures: BTreeMap::from([(Metric::Throughput, value)]),
                    failed: None,
                };
                cells.push(SUPER, TCP_1, system, sample);
            }
        }
        cells
    }

    #[test]
    fn ratios_are_taken_within_a_repetition_before_the_median() {
        // The machine slowed down threefold after the first repetition; the ratio did not change.
        let cells = cells(&[
            (System::LODEN, &[9.0, 3.0, 3.0]),
            (System::Vxlan, &[10.0, 5.0, 5.0]),
        ]);
        let verdicts = floors(&cells);
        assert_eq!(verdicts.len(), 1);
        let expected = Summary {
            median: 0.6,
            min: 0.6,
            max: 0.9,
        };
        assert_eq!(verdicts[0].measured, Some(expected));
        assert_eq!(verdicts[0].outcome, Outcome::Met);
    }

    #[test]
    fn a_ratio_below_its_floor_is_missed() {
        let cells = cells(&[(System::LODEN, &[5.0]), (System::Vxlan, &[10.0])]);
        assert_eq!(floors(&cells)[0].outcome, Outcome::Missed);
    }

    #[test]
    fn a_floor_without_both_sides_is_not_judged_and_a_goal_is_open() {
        let cells = cells(&[(System::LODEN, &[5.0, 5.0, 5.0])]);
        assert_eq!(floors(&cells), []);
        let verdicts = project(&cells, &Rule::default());
        assert_eq!(verdicts.len(), PROJECT.len());
        assert!(
            verdicts
                .iter()
                .all(|verdict| verdict.outcome == Outcome::Open)
        );
        let why = verdicts[0].why.as_deref().unwrap();
        assert_eq!(why, "tcp-1 of portable was not measured");
    }

    #[test]
    fn a_goal_is_open_while_the_repetitions_disagree() {
        let cells = cells(&[
            (System::LODEN, &[5.0, 9.0, 15.0]),
            (System::Vxlan, &[10.0, 10.0, 10.0]),
        ]);
        let milestone = &project(&cells, &Rule::default())[1];
        assert_eq!(milestone.outcome, Outcome::Open);
        assert_eq!(milestone.why.as_deref(), Some("spread 1.11 exceeds 0.5"));
    }

    #[test]
    fn the_original_is_the_other_daemon_where_there_is_one() {
        let original = System::Other("flannel".to_owned());
        let measured = [
            (System::LODEN, &[6.0, 6.0, 6.0][..]),
            (System::Portable, &[6.0, 6.0, 6.0]),
            (original, &[0.3, 0.3, 0.3]),
        ];
        let verdict = &project(&cells(&measured), &Rule::default())[0];
        assert!(
            verdict.what.ends_with("loden / flannel"),
            "{}",
            verdict.what
        );
        assert_eq!(verdict.outcome, Outcome::Met);
        let verdict = &project(&cells(&measured[..2]), &Rule::default())[0];
        assert!(
            verdict.what.ends_with("loden / portable"),
            "{}",
            verdict.what
        );
        assert_eq!(verdict.outcome, Outcome::Missed);
    }
}
