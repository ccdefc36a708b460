//! Owns the comparison of two reports: which figures became worse. Pure.
//!
//! Two runs met different states of the machine, so a figure is compared as its ratio to a reference system that both
//! runs measured beside it; only where the reference has no such figure (plain routing has no daemon whose processor
//! time one could take) is it compared as it is.

use std::fmt::{self, Write as _};

use serde::Serialize;

use super::medium::Medium;
use super::ratio::paired;
use super::report::{Report, SCHEMA};
use super::scenario::{Metric, Scenario};
use super::stats::Summary;
use super::system::System;
use super::table::cell;

/// The figures that are compared, where a scenario has them; the others explain these.
const METRICS: [Metric; 8] = [
    Metric::Throughput,
    Metric::PacketRate,
    Metric::ConnectRate,
    Metric::LatencyP50,
    Metric::LatencyP99,
    Metric::CpuPerGigabyte,
    Metric::CpuPerPacket,
    Metric::MachinePerPacket,
];

/// How a figure changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Worse by more than the tolerance, and no repetition of the one run lies among those of the other.
    Worse,
    /// Likewise better.
    Better,
    /// Within the tolerance.
    Same,
    /// The medians differ by more than the tolerance, but the repetitions overlap.
    Unclear,
    /// The new report does not have it.
    Missing,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Worse => "WORSE",
            Self::Better => "better",
            Self::Same => "same",
            Self::Unclear => "unclear",
            Self::Missing => "missing",
        })
    }
}

/// One figure in both reports.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// On this wire.
    pub wire: Medium,
    /// In this scenario.
    pub scenario: Scenario,
    /// Of this system.
    pub system: System,
    /// This number.
    pub metric: Metric,
    /// Over the same number of the reference.
    pub over_reference: bool,
    /// Before.
    pub old: Summary,
    /// After.
    pub new: Option<Summary>,
    /// The verdict.
    pub change: Change,
}

/// The whole comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// What the figures are taken over.
    pub reference: Option<System>,
    /// What may differ, as a part of the old median.
    pub tolerance: f64,
    /// What makes the two runs hard to compare.
    pub warnings: Vec<String>,
    /// Every figure.
    pub lines: Vec<Line>,
}

/// Compares two reports over `reference`, or over the first of kernel VXLAN, plain routing and the wire that both
/// have.
///
/// # Errors
/// What makes a comparison impossible: a report of another form, or a reference that a report lacks.
pub fn compare(
    old: &Report,
    new: &Report,
    reference: Option<System>,
    tolerance: f64,
) -> Result<Comparison, String> {
    for report in [old, new] {
        if report.schema != SCHEMA {
            return Err(format!(
                "a report has the form {}, and this program reads {SCHEMA}: use the program that wrote it",
                report.schema
            ));
        }
    }
    let both = |system: &System| {
        old.cells.systems().contains(system) && new.cells.systems().contains(system)
    };
    let reference = match reference {
        Some(system) if both(&system) => Some(system),
        Some(system) => return Err(format!("not both reports have the system {system}")),
        None => [System::Vxlan, System::Plain, System::Veth]
            .into_iter()
            .find(both),
    };
    let mut lines = Vec::new();
    for wire in old.cells.wires() {
        for scenario in old.cells.scenarios_on(wire) {
            for system in old.cells.systems() {
                for metric in METRICS {
                    let figure = Figure {
                        wire,
                        scenario,
                        metric,
                        system: &system,
                    };
                    lines.extend(figure.line(old, new, reference.as_ref(), tolerance));
                }
            }
        }
    }
    Ok(Comparison {
        warnings: warnings(old, new, reference.as_ref()),
        reference,
        tolerance,
        lines,
    })
}

struct Figure<'a> {
    wire: Medium,
    scenario: Scenario,
    metric: Metric,
    system: &'a System,
}

impl Figure<'_> {
    fn line(
        &self,
        old: &Report,
        new: &Report,
        reference: Option<&System>,
        tolerance: f64,
    ) -> Option<Line> {
        if reference == Some(self.system) {
            return None;
        }
        let reference = reference.filter(|system| {
            let has = |report: &Report| self.values(report, system).is_some();
            has(old) && (has(new) || self.values(new, self.system).is_none())
        });
        let before = self.summary(old, reference)?;
        let after = self.summary(new, reference);
        Some(Line {
            wire: self.wire,
            scenario: self.scenario,
            system: self.system.clone(),
            metric: self.metric,
            over_reference: reference.is_some(),
            old: before,
            new: after,
            change: after.map_or(Change::Missing, |after| {
                judge(before, after, self.metric.more_is_better(), tolerance)
            }),
        })
    }

    fn values(&self, report: &Report, system: &System) -> Option<Vec<Option<f64>>> {
        report
            .cells
            .values(self.wire, self.scenario, system, self.metric)
    }

    fn summary(&self, report: &Report, reference: Option<&System>) -> Option<Summary> {
        let values = self.values(report, self.system)?;
        Summary::of(&match reference {
            Some(reference) => paired(&values, &self.values(report, reference)?),
            None => values.into_iter().flatten().collect(),
        })
    }
}

fn judge(old: Summary, new: Summary, more_is_better: bool, tolerance: f64) -> Change {
    let change = (new.median - old.median) / old.median.abs();
    // 0 before and 0 after is no number.
    if change.is_nan() || change.abs() <= tolerance {
        return Change::Same;
    }
    if new.min <= old.max && old.min <= new.max {
        Change::Unclear
    } else if (change > 0.0) == more_is_better {
        Change::Better
    } else {
        Change::Worse
    }
}

fn warnings(old: &Report, new: &Report, reference: Option<&System>) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut differs = |what: &str, old: &dyn fmt::Display, new: &dyn fmt::Display| {
        let (old, new) = (old.to_string(), new.to_string());
        if old != new {
            warnings.push(format!("the {what} differs: {old}, then {new}"));
        }
    };
    differs("kernel", &old.machine.kernel, &new.machine.kernel);
    differs("processor", &old.machine.model, &new.machine.model);
    differs(
        "number of processors",
        &old.machine.processors,
        &new.machine.processors,
    );
    differs("length of TCP runs", &old.seconds, &new.seconds);
    for wire in old.cells.wires() {
        let rates = |report: &Report| {
            let of_wire = report.rates.iter().filter(|bed| bed.wire == wire);
            of_wire
                .map(|bed| format!("{}/{}", bed.rates.burst, bed.rates.single))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let what = format!("offered UDP rate on the {}", wire);
        differs(&what, &rates(old), &rates(new));
    }
    for (which, report) in [("old", old), ("new", new)] {
        if let Some(why) = &report.stopped {
            warnings.push(format!("the {which} run ended early: {why}"));
        }
        if report.reps < 3 {
            let reps = report.reps;
            warnings.push(format!(
                "the {which} run has {reps} repetitions: chance decides"
            ));
        }
    }
    if reference.is_none() {
        warnings.push(
            "no system without a daemon is in both reports: a change of the machine looks like one of the program"
                .to_owned(),
        );
    }
    warnings
}

impl Comparison {
    /// How many figures had this fate.
    #[must_use]
    pub fn count(&self, change: Change) -> usize {
        self.lines
            .iter()
            .filter(|line| line.change == change)
            .count()
    }

    /// The comparison as a table for people.
    ///
    /// # Errors
    /// None in practice: writing to a `String` does not fail.
    pub fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        for warning in &self.warnings {
            writeln!(text, "note: {warning}")?;
        }
        if let Some(reference) = &self.reference {
            writeln!(
                text,
                "ratios to {reference} within a repetition, except where marked *"
            )?;
        }
        writeln!(
            text,
            "{:<64} {:>22} {:>22}",
            "median [smallest - largest]", "old", "new"
        )?;
        for line in &self.lines {
            let star = if line.over_reference { "" } else { " *" };
            let what = format!(
                "{}, {}, {} ({}){star}",
                line.wire,
                line.scenario,
                line.system,
                line.metric.unit()
            );
            let new = line.new.map_or_else(|| "-".to_owned(), cell);
            writeln!(
                text,
                "{what:<64} {:>22} {new:>22}  {}",
                cell(line.old),
                line.change
            )?;
        }
        let all = [
            Change::Worse,
            Change::Better,
            Change::Same,
            Change::Unclear,
            Change::Missing,
        ];
        let counts = all.map(|change| format!("{} {change}", self.count(change)));
        write!(text, "{} (tolerance {})", counts.join(", "), self.tolerance)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    fn change(old: &[f64], new: &[f64]) -> Change {
        let wire = [10.0, 10.0, 10.0];
        let of = |values: &[f64]| report(&[(System::Vxlan, &wire), (System::LODEN, values)]);
        let comparison = compare(&of(old), &of(new), None, 0.1).unwrap();
        assert_eq!(comparison.lines.len(), 1, "{:?}", comparison.lines);
        assert_eq!(comparison.warnings, Vec::<String>::new());
        comparison.lines[0].change
    }

    #[test]
    fn a_figure_is_worse_only_beyond_the_tolerance_and_without_overlap() {
        assert_eq!(change(&[5.0, 5.1, 5.2], &[4.0, 4.1, 4.2]), Change::Worse);
        assert_eq!(change(&[4.0, 4.1, 4.2], &[5.0, 5.1, 5.2]), Change::Better);
        assert_eq!(change(&[5.0, 5.1, 5.2], &[4.8, 4.7, 4.9]), Change::Same);
        assert_eq!(change(&[4.0, 5.1, 5.2], &[4.0, 4.1, 4.2]), Change::Unclear);
    }

    #[test]
    fn a_slower_machine_is_no_slower_program() {
        let old = report(&[
            (System::Vxlan, &[10.0, 10.0, 10.0]),
            (System::LODEN, &[5.0, 5.0, 5.0]),
        ]);
        let new = report(&[
            (System::Vxlan, &[5.0, 5.0, 5.0]),
            (System::LODEN, &[2.5, 2.5, 2.5]),
        ]);
        let line = &compare(&old, &new, None, 0.1).unwrap().lines[0];
        assert_eq!((line.change, line.over_reference), (Change::Same, true));
        // Over nothing it would be.
        let alone = |values: &[f64]| report(&[(System::LODEN, values)]);
        let bare = compare(&alone(&[5.0; 3]), &alone(&[2.5; 3]), None, 0.1).unwrap();
        assert_eq!(bare.lines[0].change, Change::Worse);
        assert_eq!(bare.warnings.len(), 1);
    }

    #[test]
    fn what_is_no_longer_measured_is_missing() {
        let old = report(&[(System::Vxlan, &[10.0; 3]), (System::LODEN, &[5.0; 3])]);
        let new = report(&[(System::Vxlan, &[10.0; 3])]);
        let comparison = compare(&old, &new, None, 0.1).unwrap();
        assert_eq!(comparison.count(Change::Missing), 1);
        assert!(comparison.render().unwrap().contains("1 missing"));
    }

    #[test]
    fn less_is_better_for_what_costs() {
        let judged = |old: f64, new: f64| {
            let summary = |value| Summary {
                median: value,
                min: value,
                max: value,
            };
            judge(summary(old), summary(new), false, 0.1)
        };
        assert_eq!(judged(10.0, 12.0), Change::Worse);
        assert_eq!(judged(10.0, 8.0), Change::Better);
        assert_eq!(judged(0.0, 0.0), Change::Same);
        assert_eq!(judged(0.0, 1.0), Change::Worse);
    }

    #[test]
    fn reports_of_another_form_and_missing_references_are_refused() {
        let mut other = report(&[(System::LODEN, &[1.0])]);
        other.schema = 2;
        assert!(
            compare(&other, &other, None, 0.1)
                .unwrap_err()
                .contains("form 2")
        );
        let report = report(&[(System::LODEN, &[1.0])]);
        assert!(compare(&report, &report, Some(System::Plain), 0.1).is_err());
    }
}
