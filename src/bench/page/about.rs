//! Owns what a report says besides figures: goals, failures, programs and method. Pure.

use std::path::Path;

use super::Block;
use crate::bench::goal::Verdict;
use crate::bench::report::Report;
use crate::bench::table::{cell, number};

pub(super) fn goals(report: &Report, blocks: &mut Vec<Block>) {
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

pub(super) fn failures(report: &Report, blocks: &mut Vec<Block>) {
    let mut lines = Vec::new();
    for wire in report.cells.wires() {
        for scenario in report.cells.scenarios_on(wire) {
            for system in report.cells.systems() {
                let (failed, of) = report.cells.failures(wire, scenario, &system);
                let Some(first) = failed.first() else {
                    continue;
                };
                lines.push(format!(
                    "{}, {scenario}, {system}: {} of {of}: {first}",
                    wire,
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

pub(super) fn programs(report: &Report, blocks: &mut Vec<Block>) {
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
        // Where it lies says nothing to somebody else.
        let file = Path::new(&program.path).file_name().unwrap_or_default();
        let mut line = format!("{}: {}", program.system, file.to_string_lossy());
        if !program.version.is_empty() {
            line.push_str(&format!(", which says {:?}", program.version));
        }
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

const LAB: &str = "Two nodes are network namespaces on one machine, joined by a wire; on each, a pod is another namespace behind \
         a veth pair and a bridge. veth stands for the wire itself, from node to node. A scenario that begins with \
         host- runs between the nodes by their overlay addresses, one that begins with jumbo- on an underlay with an \
         MTU of 9000.";
const MACHINES: &str = "The two ends are two machines, by whatever leads from the one to an address of the other. Their \
    clocks differ, so latency is there and back.";

pub(super) fn method(report: &Report, blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("How it was measured".to_owned()));
    let rule = &report.rule;
    let ends = match report.other_machine {
        None => LAB,
        Some(_) => MACHINES,
    };
    blocks.push(Block::List(vec![
        ends.to_owned(),
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
