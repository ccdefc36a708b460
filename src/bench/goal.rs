//! Owns the goals that the project holds itself to, the floors below which it must not fall again, and the ratios
//! they are held against. Pure.

mod list;

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ratio::{Rule, paired};
use super::report::Cells;
use super::stats::Summary;
use list::{FLOORS, Goal, PROJECT, Side};

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
        let (what, wire) = (scenario.describe(), self.wire);
        let unit = self.metric.unit();
        match self.under {
            None => format!("{what} ({unit}), {wire}: {system}"),
            Some(Side(other, under)) if other == scenario => {
                let under = under.among(cells);
                format!("{what} ({unit}), {wire}: {system} / {under}")
            }
            Some(Side(other, _)) => {
                let other = other.describe();
                format!("{what} / {other} ({unit}), {wire}: {system}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::measure::Sample;
    use super::list::{SUPER, TCP_1};
    use super::*;
    use crate::bench::scenario::Metric;
    use crate::bench::system::System;

    fn cells(systems: &[(System, &[f64])]) -> Cells {
        let mut cells = Cells::default();
        for (system, values) in systems {
            for &value in *values {
                let sample = Sample {
                    figures: BTreeMap::from([(Metric::Throughput, value)]),
                    ..Sample::default()
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
