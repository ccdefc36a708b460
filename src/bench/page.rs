//! Owns what a report tells people, in which order and in which words: blocks that `markdown` and `html` put
//! into their own form. Pure.

mod html;
mod markdown;

use super::Error;
use super::goal::Verdict;
use super::plot::Bars;
use super::report::Report;
use super::scenario::{Load, Metric, Scenario};
use super::system::System;
use super::table::{cell, number};
use crate::lab::Wire;
use crate::lab::spec::cli_name;

/// A piece of the page.
enum Block {
    Title(String),
    Heading(String),
    Paragraph(String),
    List(Vec<String>),
    Code(String),
    Table {
        head: Vec<String>,
        rows: Vec<Vec<String>>,
    },
    Figure {
        caption: String,
        svg: String,
    },
}

/// The report as Markdown, without pictures.
///
/// # Errors
/// [`Error::Plot`].
pub fn markdown(report: &Report) -> Result<String, Error> {
    Ok(markdown::render(&blocks(report)?))
}

/// The report as one HTML file that needs no other.
///
/// # Errors
/// [`Error::Plot`].
pub fn html(report: &Report) -> Result<String, Error> {
    Ok(html::render(&blocks(report)?))
}

fn blocks(report: &Report) -> Result<Vec<Block>, Error> {
    let machine = &report.machine;
    let mut blocks = vec![
        Block::Title(format!("Benchmark of loden {}", machine.version)),
        Block::Paragraph(format!(
            "Linux {}, {} x {}, {} MiB of memory, load {} before the run. {} repetitions, TCP runs of {} s; it took \
             {} s. Made by:",
            machine.kernel,
            machine.processors,
            machine.model,
            machine.memory,
            machine.load,
            report.reps,
            report.seconds,
            report.took
        )),
        Block::Code(report.command.clone()),
    ];
    if let Some(why) = &report.stopped {
        blocks.push(Block::Paragraph(format!(
            "This run ended early ({why}); what follows was measured before that."
        )));
    }
    goals(report, &mut blocks);
    for wire in report.cells.wires() {
        blocks.push(Block::Heading(format!("The {} wire", cli_name(&wire))));
        blocks.push(Block::Paragraph(describe(wire).to_owned()));
        figures(report, wire, &mut blocks)?;
        ratios(report, wire, &mut blocks);
        numbers(report, wire, &mut blocks);
    }
    failures(report, &mut blocks);
    programs(report, &mut blocks);
    method(report, &mut blocks);
    Ok(blocks)
}

const fn describe(wire: Wire) -> &'static str {
    match wire {
        Wire::Superpacket => {
            "A plain veth pair: superpackets cross it whole, so what is copied per byte decides."
        }
        Wire::Packet => {
            "Segmentation off and GRO on at both ends, as a physical NIC behaves: what is done per packet decides."
        }
        Wire::PacketNoGro => {
            "As the packet wire, but without GRO: only what a program gathers by itself helps."
        }
    }
}

fn goals(report: &Report, blocks: &mut Vec<Block>) {
    if report.verdicts.is_empty() {
        return;
    }
    let row = |verdict: &Verdict| {
        let outcome = match &verdict.why {
            Some(why) => format!("{}: {why}", verdict.outcome),
            None => verdict.outcome.to_string(),
        };
        vec![
            verdict.goal.clone(),
            verdict.what.clone(),
            verdict.measured.map_or_else(|| "-".to_owned(), cell),
            verdict.bound.to_string(),
            outcome,
        ]
    };
    blocks.push(Block::Heading("Goals".to_owned()));
    blocks.push(Block::Table {
        head: ["Goal", "What", "Measured", "Wanted", "Outcome"]
            .map(str::to_owned)
            .to_vec(),
        rows: report.verdicts.iter().map(row).collect(),
    });
    blocks.push(Block::Paragraph(
        "Where no original daemon was given, the portable engine stands for it. P8 (lookups) and P9 (memory) are \
         measured by the micro-benchmarks and the tests, and P11 by the record of each change."
            .to_owned(),
    ));
}

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

fn figures(report: &Report, wire: Wire, blocks: &mut Vec<Block>) -> Result<(), Error> {
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
                "{caption}, {} wire: median, line from smallest to largest; {better} is better.",
                cli_name(&wire)
            ),
            svg: bars.draw()?,
        });
    }
    Ok(())
}

/// loden over every other, as far as the repetitions agree.
fn ratios(report: &Report, wire: Wire, blocks: &mut Vec<Block>) {
    let mut others = report.cells.systems();
    others.retain(|system| *system != System::LODEN);
    let cell_of = |scenario: Scenario, under: &System| {
        let found = report.ratios.iter().find(|ratio| {
            ratio.wire == wire
                && ratio.scenario == scenario
                && ratio.over == System::LODEN
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
    head.extend(others.iter().map(|under| format!("loden / {under}")));
    blocks.push(Block::Table { head, rows });
}

fn numbers(report: &Report, wire: Wire, blocks: &mut Vec<Block>) {
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

fn value(
    report: &Report,
    wire: Wire,
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

fn failures(report: &Report, blocks: &mut Vec<Block>) {
    let mut lines = Vec::new();
    for wire in report.cells.wires() {
        for scenario in report.cells.scenarios_on(wire) {
            for system in report.cells.systems() {
                let (failed, of) = report.cells.failures(wire, scenario, &system);
                let Some(first) = failed.first() else {
                    continue;
                };
                lines.push(format!(
                    "{} wire, {scenario}, {system}: {} of {of}: {first}",
                    cli_name(&wire),
                    failed.len()
                ));
            }
        }
    }
    lines.extend(report.notes.iter().cloned());
    let gaps = report.wire_gaps.iter();
    lines.extend(gaps.map(|gap| format!("the wire is not as asked for: {gap}")));
    blocks.push(Block::Heading("Failed runs and gaps".to_owned()));
    blocks.push(if lines.is_empty() {
        Block::Paragraph("None.".to_owned())
    } else {
        Block::List(lines)
    });
}

fn programs(report: &Report, blocks: &mut Vec<Block>) {
    if report.programs.is_empty() {
        return;
    }
    blocks.push(Block::Heading("Programs".to_owned()));
    let mut lines = Vec::new();
    for program in &report.programs {
        let name = |wanted: bool| -> Vec<String> {
            let with = program.capabilities.iter().filter(|one| one.used == wanted);
            with.map(|one| match &one.reason {
                Some(reason) if !one.used => format!("{} ({reason})", one.name),
                _ => one.name.clone(),
            })
            .collect()
        };
        let (used, unused) = (name(true), name(false));
        let mut line = format!("{}: {}", program.system, program.path);
        if !used.is_empty() {
            line.push_str(&format!("; uses {}", used.join(", ")));
        }
        if !unused.is_empty() {
            line.push_str(&format!("; does not use {}", unused.join(", ")));
        }
        lines.push(line);
    }
    blocks.push(Block::List(lines));
}

fn method(report: &Report, blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("How it was measured".to_owned()));
    let rule = &report.rule;
    blocks.push(Block::List(vec![
        "Two nodes are network namespaces on one machine, joined by a wire; on each, a pod is another namespace behind \
         a veth pair and a bridge. veth stands for the wire itself, from node to node. A scenario that begins with \
         host- runs between the nodes by their overlay addresses, one that begins with jumbo- on an underlay with an \
         MTU of 9000."
            .to_owned(),
        "All systems of a wire exist at the same time, warmed up, and take turns within each repetition; the order \
         rotates. Figures of different runs do not compare, ratios within a repetition do."
            .to_owned(),
        format!(
            "A ratio is printed if both systems were measured in at least {} repetitions and the ratios of single \
             repetitions differ by no more than {} of their median. report.json has the ratios of all pairs.",
            rule.repetitions,
            number(rule.spread)
        ),
        "Processor time of daemons is that of their process clocks, which leaves out the kernel's own threads; that of \
         the machine (from /proc/stat, to a hundredth of a second) has everything, traffic programs included. UDP is \
         offered at a rate that every system carries."
            .to_owned(),
        "A run fails if a daemon ends, nothing arrives, or loden's counters say that an offload which it names as used \
         took no part or was given up. Failed runs count in no median."
            .to_owned(),
        "Reordered counts, for UDP, datagrams that arrived after a later one; for TCP, how often the sender's kernel \
         concluded that its segments were reordered. Latency is one way, from before the send call to after the \
         receive call; request-idle and request-half are there and back."
            .to_owned(),
    ]));
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    fn three() -> Report {
        report(&[
            (System::Vxlan, &[10.0, 8.0, 9.0]),
            (System::LODEN, &[5.0, 4.0, 4.5]),
            (System::Portable, &[0.5, 0.4, 0.1]),
        ])
    }

    #[test]
    fn markdown_has_the_medians_the_ratio_and_the_refusal() {
        let text = markdown(&three()).unwrap();
        for line in [
            "# Benchmark of loden 9.9.9",
            "    loden bench run --out report",
            "| Median [smallest - largest] | vxlan | loden | portable |",
            "| tcp-1, Gb/s | 9.00 [8.00 - 10.0] | 4.50 [4.00 - 5.00] | 0.40 [0.10 - 0.50] |",
            "| tcp-1, Gb/s (more is better) | 0.50 [0.50 - 0.50] | refused: spread 3.50 exceeds 0.5 |",
        ] {
            assert!(
                text.lines().any(|got| got == line),
                "{line:?} is missing in:\n{text}"
            );
        }
        assert!(!text.contains("<svg"), "{text}");
    }

    #[test]
    fn html_is_well_formed_escapes_what_it_shows_and_refers_to_nothing_outside() {
        let text = html(&three()).unwrap();
        let body = text.replace("<meta charset=\"utf-8\">", "");
        let options = roxmltree::ParsingOptions {
            allow_dtd: true,
            ..roxmltree::ParsingOptions::default()
        };
        let tree = roxmltree::Document::parse_with_options(&body, options).unwrap();
        let all: String = tree.descendants().filter_map(|node| node.text()).collect();
        assert!(all.contains("A <fast> & \"small\" one"));
        assert_eq!(
            tree.descendants()
                .filter(|node| node.tag_name().name() == "svg")
                .count(),
            1
        );
        for node in tree.descendants() {
            for attribute in node.attributes() {
                assert!(!matches!(
                    attribute.name(),
                    "src" | "href" | "data" | "srcset"
                ));
            }
            assert!(!matches!(
                node.tag_name().name(),
                "script" | "link" | "iframe" | "object"
            ));
        }
        assert!(!text.contains("url(") && !text.contains("@import"));
    }

    #[test]
    fn a_run_that_ended_early_and_one_that_failed_say_so() {
        let mut report = three();
        report.stopped = Some("interrupted by a signal".to_owned());
        let sample = super::super::measure::Sample {
            failed: Some("udp-gso was given up: EIO".to_owned()),
            ..Default::default()
        };
        report
            .cells
            .push(Wire::Packet, Scenario::tcp(1), &System::LODEN, sample);
        let text = markdown(&report).unwrap();
        assert!(
            text.contains("This run ended early (interrupted by a signal)"),
            "{text}"
        );
        assert!(
            text.contains("4.50 [4.00 - 5.00] (failed 1 of 4)"),
            "{text}"
        );
        assert!(
            text.contains("- packet wire, tcp-1, loden: 1 of 4: udp-gso was given up: EIO"),
            "{text}"
        );
    }
}
