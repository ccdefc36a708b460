//! Owns what a report says of one medium: pictures, ratios, and every number. Pure.

use super::Block;
use crate::bench::Error;
use crate::bench::medium::Medium;
use crate::bench::plot::Bars;
use crate::bench::report::Report;
use crate::bench::scenario::{Load, Metric, Scenario};
use crate::bench::system::System;
use crate::bench::table::cell;

/// A caption, the number that is drawn, and the loads that are drawn together.
type Drawn = (&'static str, Metric, fn(Load) -> bool);

/// What is drawn together: scenarios that share a unit, and the number that is drawn.
const FIGURES: [Drawn; 6] = [
    ("TCP throughput", Metric::Throughput, |load| {
        matches!(load, Load::Tcp { .. })
    }),
    (
        "Processor time of the daemons per gigabyte",
        Metric::CpuPerGigabyte,
        |load| matches!(load, Load::Tcp { .. }),
    ),
    (
        "Processor time of the machine per datagram, traffic programs included",
        Metric::MachinePerPacket,
        |load| matches!(load, Load::Udp { .. }),
    ),
    ("Latency, median", Metric::LatencyP50, |load| {
        matches!(load, Load::OneWay { .. } | Load::Request { .. })
    }),
    ("Latency, 99th percentile", Metric::LatencyP99, |load| {
        matches!(load, Load::OneWay { .. } | Load::Request { .. })
    }),
    (
        "Highest rate with 99 % arriving",
        Metric::PacketRate,
        |load| matches!(load, Load::Lossless { .. }),
    ),
];

pub(super) fn figures(report: &Report, wire: Medium, blocks: &mut Vec<Block>) -> Result<(), Error> {
    let systems = report.cells.systems();
    for (caption, metric, belongs) in FIGURES {
        let scenarios = report.cells.scenarios_on(wire).into_iter();
        let group = |scenario: Scenario| {
            let summary = |system| report.cells.summary(wire, scenario, system, metric);
            let bars: Vec<_> = systems.iter().map(summary).collect();
            bars.iter()
                .any(Option::is_some)
                .then(|| (scenario.id(), bars))
        };
        let groups: Vec<_> = scenarios
            .filter(|scenario| belongs(scenario.load))
            .filter_map(group)
            .collect();
        if groups.is_empty() {
            continue;
        }
        let bars = Bars {
            unit: metric.unit().to_owned(),
            series: systems.iter().map(System::to_string).collect(),
            groups,
        };
        let better = if metric.more_is_better() {
            "more"
        } else {
            "less"
        };
        blocks.push(Block::Figure {
            caption: format!(
                "{caption}, {}: median, line from smallest to largest; {better} is better.",
                wire
            ),
            svg: bars.draw()?,
        });
    }
    Ok(())
}

/// One TCP stream, each medium a group.
pub(super) fn overview(report: &Report) -> Result<String, Error> {
    let (systems, metric) = (report.cells.systems(), Metric::Throughput);
    let group = |wire: Medium| {
        let summary = |system| report.cells.summary(wire, Scenario::tcp(1), system, metric);
        let bars: Vec<_> = systems.iter().map(summary).collect();
        (format!("one TCP stream, {wire}"), bars)
    };
    let bars = Bars {
        unit: metric.unit().to_owned(),
        series: systems.iter().map(System::to_string).collect(),
        groups: report.cells.wires().into_iter().map(group).collect(),
    };
    bars.draw()
}

/// loden, or else the first, over every other, as far as the repetitions agree.
pub(super) fn ratios(report: &Report, wire: Medium, blocks: &mut Vec<Block>) {
    let mut others = report.cells.systems();
    let ours = others.iter().position(|system| *system == System::LODEN);
    if others.len() < 2 {
        return;
    }
    let above = others.remove(ours.unwrap_or(0));
    let cell_of = |scenario: Scenario, under: &System| {
        let found = report.ratios.iter().find(|ratio| {
            ratio.wire == wire
                && ratio.scenario == scenario
                && ratio.over == above
                && ratio.under == *under
        });
        match found {
            None => "-".to_owned(),
            Some(ratio) => match (ratio.ratio, &ratio.refused) {
                (Some(summary), _) => cell(summary),
                (None, Some(why)) => format!("refused: {why}"),
                (None, None) => "-".to_owned(),
            },
        }
    };
    let rows: Vec<Vec<String>> = report
        .cells
        .scenarios_on(wire)
        .into_iter()
        .map(|scenario| {
            let metric = scenario.load.headline();
            let better = if metric.more_is_better() {
                "more"
            } else {
                "less"
            };
            let mut row = vec![format!(
                "{scenario}, {} ({better} is better)",
                metric.unit()
            )];
            row.extend(others.iter().map(|under| cell_of(scenario, under)));
            row
        })
        .filter(|row| row.iter().skip(1).any(|cell| cell != "-"))
        .collect();
    if rows.is_empty() {
        return;
    }
    let mut head = vec!["Ratio within a repetition".to_owned()];
    head.extend(others.iter().map(|under| format!("{above} / {under}")));
    blocks.push(Block::Table { head, rows });
}

pub(super) fn numbers(report: &Report, wire: Medium, blocks: &mut Vec<Block>) {
    let systems = report.cells.systems();
    let mut rows = Vec::new();
    for scenario in report.cells.scenarios_on(wire) {
        for &metric in scenario.load.metrics() {
            let cells: Vec<Option<String>> = systems
                .iter()
                .map(|system| value(report, wire, scenario, system, metric))
                .collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let mut row = vec![format!("{scenario}, {}", metric.unit())];
            row.extend(
                cells
                    .into_iter()
                    .map(|cell| cell.unwrap_or_else(|| "-".to_owned())),
            );
            rows.push(row);
        }
    }
    let mut head = vec!["Median [smallest - largest]".to_owned()];
    head.extend(systems.iter().map(System::to_string));
    blocks.push(Block::Table { head, rows });
    for bed in report.rates.iter().filter(|bed| bed.wire == wire) {
        let jumbo = if bed.jumbo {
            " with an MTU of 9000"
        } else {
            ""
        };
        blocks.push(Block::Paragraph(format!(
            "UDP rates that every system carries{jumbo}: {} packets/s in bursts, {} one at a time.",
            bed.rates.burst, bed.rates.single
        )));
    }
}

/// What took part, where daemons tell.
pub(super) fn offloads(report: &Report, wire: Medium, blocks: &mut Vec<Block>) {
    let mut systems = report.cells.systems();
    systems.retain(|system| system.expected().is_some_and(|one| one.engine.is_some()));
    let cell_of = |scenario, system| match report.cells.engaged(wire, scenario, system) {
        None => "-".to_owned(),
        Some(engaged) if engaged.is_empty() => "none".to_owned(),
        Some(engaged) => engaged.join(", "),
    };
    let row = |scenario: Scenario| {
        let mut row = vec![scenario.id()];
        row.extend(systems.iter().map(|system| cell_of(scenario, system)));
        row
    };
    let scenarios = report.cells.scenarios_on(wire).into_iter();
    let rows: Vec<Vec<String>> = scenarios
        .map(row)
        .filter(|row| row.iter().skip(1).any(|cell| cell != "-"))
        .collect();
    if rows.is_empty() {
        return;
    }
    let mut head = vec!["Offloads that took part".to_owned()];
    head.extend(systems.iter().map(System::to_string));
    blocks.push(Block::Table { head, rows });
}

fn value(
    report: &Report,
    wire: Medium,
    scenario: Scenario,
    system: &System,
    metric: Metric,
) -> Option<String> {
    let summary = report.cells.summary(wire, scenario, system, metric);
    let (failed, of) = report.cells.failures(wire, scenario, system);
    let note = || format!("failed {} of {of}", failed.len());
    match (summary, failed.is_empty()) {
        (None, true) => None,
        // Said once per scenario, at its most important number.
        (None, false) => (scenario.load.metrics().first() == Some(&metric)).then(note),
        (Some(summary), true) => Some(cell(summary)),
        (Some(summary), false) => Some(format!("{} ({})", cell(summary), note())),
    }
}
