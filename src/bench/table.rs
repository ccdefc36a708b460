//! Owns the result of a benchmark as text. Pure.

use std::fmt::{self, Write as _};

use super::goal::Verdict;
use super::quick;
use super::report::Report;
use super::scenario::{Metric, Scenario};
use super::stats::Summary;

/// Wide enough for the longest scenario with its unit.
const LABEL: usize = 42;
const COLUMN: usize = 20;

/// The report as a table for people: every number as median and spread, then the ratios and their floors.
///
/// # Errors
/// None in practice: writing to a `String` does not fail.
pub fn render(report: &Report) -> Result<String, fmt::Error> {
    let mut text = String::new();
    let machine = &report.machine;
    writeln!(
        text,
        "loden {}, pod to pod, Linux {}, {} x {}",
        machine.version, machine.kernel, machine.processors, machine.model
    )?;
    writeln!(text, "median of {} [smallest - largest]", report.reps)?;
    for wire in report.cells.wires() {
        heading(&mut text, report, &format!("{}", wire))?;
        for scenario in report.cells.scenarios_on(wire) {
            for &metric in quick::metrics(scenario.load) {
                row(&mut text, report, wire, scenario, metric)?;
            }
        }
        for bed in report.rates.iter().filter(|bed| bed.wire == wire) {
            writeln!(
                text,
                "  offered UDP rates, packets/s: bursts {}, one at a time {}",
                bed.rates.burst, bed.rates.single
            )?;
        }
    }
    for gap in &report.wire_gaps {
        writeln!(text, "the wire is not as asked for: {gap}")?;
    }
    writeln!(
        text,
        "\n{:<72} {:>22} {:>9}",
        "ratio within a repetition", "measured", "goal"
    )?;
    for verdict in &report.verdicts {
        writeln!(text, "{}", line(verdict))?;
    }
    Ok(text)
}

fn heading(text: &mut String, report: &Report, title: &str) -> fmt::Result {
    write!(text, "\n{title:<LABEL$}")?;
    for system in report.cells.systems() {
        write!(text, " {system:>COLUMN$}")?;
    }
    writeln!(text)
}

fn row(
    text: &mut String,
    report: &Report,
    wire: super::medium::Medium,
    scenario: Scenario,
    metric: Metric,
) -> fmt::Result {
    let systems = report.cells.systems();
    let summaries: Vec<Option<Summary>> = systems
        .iter()
        .map(|system| report.cells.summary(wire, scenario, system, metric))
        .collect();
    if summaries.iter().all(Option::is_none) {
        return Ok(());
    }
    write!(
        text,
        "{:<LABEL$}",
        format!("  {}, {}", scenario.describe(), metric.unit())
    )?;
    for summary in summaries {
        write!(
            text,
            " {:>COLUMN$}",
            summary.map_or_else(|| "-".to_owned(), cell)
        )?;
    }
    writeln!(text)
}

pub(super) fn cell(summary: Summary) -> String {
    format!(
        "{} [{} - {}]",
        number(summary.median),
        number(summary.min),
        number(summary.max)
    )
}

fn line(verdict: &Verdict) -> String {
    format!(
        "{:<72} {:>22} {:>9}  {}",
        verdict.what,
        verdict.measured.map_or_else(|| "-".to_owned(), cell),
        verdict.bound.to_string(),
        verdict.outcome
    )
}

/// Three digits, however large: more would be noise.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        0.0 => "0".to_owned(),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::goal::{Bound, Outcome};
    use super::*;

    #[test]
    fn numbers_have_three_digits_whatever_their_size() {
        let texts: Vec<String> = [0.0, 0.254, 9.876, 12.34, 1234.5].map(number).into();
        assert_eq!(texts, ["0", "0.25", "9.88", "12.3", "1234"]);
    }

    #[test]
    fn a_missed_floor_is_shouted() {
        let ratio = Summary {
            median: 0.5,
            min: 0.4,
            max: 0.6,
        };
        let verdict = Verdict {
            goal: "floor".to_owned(),
            what: "x".to_owned(),
            measured: Some(ratio),
            bound: Bound::AtLeast(0.55),
            outcome: Outcome::Missed,
            why: None,
        };
        assert!(
            line(&verdict).ends_with("0.50 [0.40 - 0.60]   >= 0.55  MISSED"),
            "{}",
            line(&verdict)
        );
    }
}
