//! Owns what a report tells people, in which order and in which words: blocks that `markdown` and `html` put
//! into their own form. Pure.

mod about;
mod html;
mod markdown;
mod medium;

use super::Error;
use super::report::{Machine, Report};
use about::{failures, goals, method, programs};
use medium::{figures, numbers, offloads, ratios};

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
            "{}{}. {} repetitions, TCP runs of {} s; it took {} s. Made by:",
            described(machine),
            report
                .other_machine
                .as_ref()
                .map_or_else(String::new, |other| format!(
                    "; the other end: {}",
                    described(other)
                )),
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
        blocks.push(Block::Heading(format!("The {wire}")));
        blocks.push(Block::Paragraph(wire.describe().to_owned()));
        figures(report, wire, &mut blocks)?;
        ratios(report, wire, &mut blocks);
        numbers(report, wire, &mut blocks);
        offloads(report, wire, &mut blocks);
    }
    failures(report, &mut blocks);
    programs(report, &mut blocks);
    method(report, &mut blocks);
    Ok(blocks)
}

fn described(machine: &Machine) -> String {
    format!(
        "Linux {}, {} x {}, {} MiB of memory, load {} before the run",
        machine.kernel, machine.processors, machine.model, machine.memory, machine.load
    )
}

/// The one picture for people in a hurry: one TCP stream on each wire.
///
/// # Errors
/// [`Error::Plot`].
pub fn overview(report: &Report) -> Result<String, Error> {
    medium::overview(report)
}

#[cfg(test)]
mod tests {
    use super::super::medium::Medium;
    use super::super::report::tests::report;
    use super::super::scenario::Scenario;
    use super::super::system::System;
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
            .push(Medium::Packet, Scenario::tcp(1), &System::LODEN, sample);
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
