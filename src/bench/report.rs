//! Owns the result of a benchmark as data: where it ran, how, every sample, and the verdicts. Never measures.

use std::fs;
use std::thread;

use serde::{Deserialize, Serialize};

use super::dataplane::Capability;
use super::goal::Verdict;
use super::measure::{Rates, Sample};
use super::medium::Medium;
use super::ratio::{Ratio, Rule};
use super::scenario::{Metric, Scenario};
use super::stats::Summary;
use super::system::System;

/// The form of a report. A program reads the reports of its own form and says so of others.
pub const SCHEMA: u32 = 1;

/// Everything a reader needs to judge the numbers, and to get them again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Where it ran.
    pub machine: Machine,
    /// Where the other end was, if not there too.
    #[serde(default)]
    pub other_machine: Option<Machine>,
    /// The command that does it again.
    pub command: String,
    /// When it began, in seconds since 1970.
    pub started: u64,
    /// How long it took, in seconds.
    pub took: u64,
    /// Why it ended early; none if it did not.
    pub stopped: Option<String>,
    /// How often each sample was to be taken.
    pub reps: u32,
    /// Length of a TCP run.
    pub seconds: u32,
    /// When a ratio is printed.
    pub rule: Rule,
    /// Offered UDP rates.
    pub rates: Vec<BedRates>,
    /// What a wire should have done but could not on this kernel.
    pub wire_gaps: Vec<String>,
    /// Systems that could not be measured, and other things that a reader should know.
    pub notes: Vec<String>,
    /// The programs that were measured.
    pub programs: Vec<Program>,
    /// Every sample.
    pub cells: Cells,
    /// Every system over every other.
    pub ratios: Vec<Ratio>,
    /// The goals, and what was measured against them.
    pub verdicts: Vec<Verdict>,
}

/// The rates that every system carried on one kind of underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BedRates {
    /// The wire.
    pub wire: Medium,
    /// With an MTU of 9000.
    pub jumbo: bool,
    /// The rates.
    #[serde(flatten)]
    pub rates: Rates,
}

/// A program that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// As which system.
    pub system: System,
    /// Its file.
    pub path: String,
    /// What it says of its version; empty if it does not.
    #[serde(default)]
    pub version: String,
    /// What of the kernel it uses, where it says so.
    pub capabilities: Vec<Capability>,
}

/// The machine, as far as it matters for the numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Kernel release.
    pub kernel: String,
    /// Processors that may be used.
    pub processors: usize,
    /// The model of the first.
    pub model: String,
    /// Memory in MiB.
    pub memory: u64,
    /// Processes that wanted to run in the minute before: more than a little, and others disturbed the run.
    pub load: f64,
    /// This program's version.
    pub version: String,
}

impl Machine {
    /// Describes this machine; what cannot be told is empty.
    #[must_use]
    pub fn here() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let kernel = read("/proc/sys/kernel/osrelease");
        let info = read("/proc/cpuinfo");
        let model = info
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = read("/proc/meminfo");
        let kibibytes = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))
            .and_then(|count| count.parse::<u64>().ok());
        let load = read("/proc/loadavg");
        Self {
            kernel: kernel.trim().to_owned(),
            processors: thread::available_parallelism().map_or(0, usize::from),
            model: model.map_or_else(String::new, |(_, model)| model.to_owned()),
            memory: kibibytes.unwrap_or(0) / 1024,
            load: load
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(0.0),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// One scenario on one wire with one system, repeated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Cell {
    wire: Medium,
    scenario: Scenario,
    system: System,
    samples: Vec<Sample>,
}

/// All samples, in the order in which their kind was first measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cells(Vec<Cell>);

impl Cells {
    /// Adds the sample of one more repetition.
    pub fn push(&mut self, wire: Medium, scenario: Scenario, system: &System, sample: Sample) {
        let known = |cell: &&mut Cell| cell.is(wire, scenario, system);
        match self.0.iter_mut().find(known) {
            Some(cell) => cell.samples.push(sample),
            None => self.0.push(Cell {
                wire,
                scenario,
                system: system.clone(),
                samples: vec![sample],
            }),
        }
    }

    fn cell(&self, wire: Medium, scenario: Scenario, system: &System) -> Option<&Cell> {
        self.0.iter().find(|cell| cell.is(wire, scenario, system))
    }

    /// One number of every repetition, in order, `None` where a repetition failed or does not have it; `None`
    /// altogether if no repetition has it.
    #[must_use]
    pub fn values(
        &self,
        wire: Medium,
        scenario: Scenario,
        system: &System,
        metric: Metric,
    ) -> Option<Vec<Option<f64>>> {
        let cell = self.cell(wire, scenario, system)?;
        let value = |sample: &Sample| match sample.failed {
            None => sample.figures.get(&metric).copied(),
            Some(_) => None,
        };
        let values: Vec<Option<f64>> = cell.samples.iter().map(value).collect();
        values.iter().any(Option::is_some).then_some(values)
    }

    /// The same, summarised over the repetitions that have it.
    #[must_use]
    pub fn summary(
        &self,
        wire: Medium,
        scenario: Scenario,
        system: &System,
        metric: Metric,
    ) -> Option<Summary> {
        let values = self.values(wire, scenario, system, metric)?;
        Summary::of(&values.into_iter().flatten().collect::<Vec<_>>())
    }

    /// Why repetitions failed, one text per repetition that did, and how many there were.
    #[must_use]
    pub fn failures(
        &self,
        wire: Medium,
        scenario: Scenario,
        system: &System,
    ) -> (Vec<&str>, usize) {
        let cell = self.cell(wire, scenario, system);
        let samples = cell.map_or(&[][..], |cell| &cell.samples);
        let failed = samples.iter().filter_map(|sample| sample.failed.as_deref());
        (failed.collect(), samples.len())
    }

    /// The offloads that took part in every repetition that counts; `None` where no daemon tells.
    #[must_use]
    pub fn engaged(&self, wire: Medium, scenario: Scenario, system: &System) -> Option<Vec<&str>> {
        system.expected()?.engine?;
        let cell = self.cell(wire, scenario, system)?;
        let mut counted = cell.samples.iter().filter(|one| one.failed.is_none());
        let mut engaged: Vec<&str> = counted.next()?.engaged.iter().map(String::as_str).collect();
        for sample in counted {
            engaged.retain(|name| sample.engaged.iter().any(|other| other == name));
        }
        Some(engaged)
    }

    /// The systems that were measured at all.
    #[must_use]
    pub fn systems(&self) -> Vec<System> {
        distinct(self.0.iter().map(|cell| cell.system.clone()))
    }

    /// The wires that were measured at all.
    #[must_use]
    pub fn wires(&self) -> Vec<Medium> {
        distinct(self.0.iter().map(|cell| cell.wire))
    }

    /// The scenarios that were measured on a wire, in the order of measuring.
    #[must_use]
    pub fn scenarios_on(&self, wire: Medium) -> Vec<Scenario> {
        let mut found = Vec::new();
        for cell in self.0.iter().filter(|cell| cell.wire == wire) {
            if !found.contains(&cell.scenario) {
                found.push(cell.scenario);
            }
        }
        found
    }
}

fn distinct<T: Ord>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut all: Vec<T> = all.collect();
    all.sort();
    all.dedup();
    all
}

impl Cell {
    fn is(&self, wire: Medium, scenario: Scenario, system: &System) -> bool {
        self.wire == wire && self.scenario == scenario && self.system == *system
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// A report with one scenario on the packet wire and these throughputs.
    pub(in crate::bench) fn report(throughputs: &[(System, &[f64])]) -> Report {
        let mut cells = Cells::default();
        for (system, values) in throughputs {
            for &value in *values {
                let sample = Sample {
                    figures: BTreeMap::from([(Metric::Throughput, value)]),
                    ..Sample::default()
                };
                cells.push(Medium::Packet, Scenario::tcp(1), system, sample);
            }
        }
        let rule = Rule::default();
        Report {
            schema: SCHEMA,
            machine: Machine {
                kernel: "6.1.0".to_owned(),
                processors: 2,
                model: "A <fast> & \"small\" one".to_owned(),
                memory: 4000,
                load: 0.5,
                version: "9.9.9".to_owned(),
            },
            other_machine: None,
            command: "loden bench run --out report".to_owned(),
            started: 1_800_000_000,
            took: 61,
            stopped: None,
            reps: 3,
            seconds: 2,
            rule,
            rates: vec![BedRates {
                wire: Medium::Packet,
                jumbo: false,
                rates: Rates {
                    burst: 60_000,
                    single: 20_000,
                },
            }],
            wire_gaps: Vec::new(),
            notes: Vec::new(),
            programs: Vec::new(),
            ratios: super::super::ratio::all(&cells, &rule),
            verdicts: Vec::new(),
            cells,
        }
    }

    #[test]
    fn a_report_survives_the_way_through_json() {
        let mut report = report(&[
            (System::Vxlan, &[7.0, 8.0, 7.5]),
            (System::LODEN, &[5.0, 5.5, 5.25]),
            (System::Other("flannel".to_owned()), &[0.3, 0.3, 0.3]),
        ]);
        let failure = Sample {
            failed: Some("no packet arrived".to_owned()),
            ..Sample::default()
        };
        report
            .cells
            .push(Medium::Packet, Scenario::tcp(1), &System::LODEN, failure);
        report.programs.push(Program {
            system: System::LODEN,
            path: "/bin/loden".to_owned(),
            version: "0.1.0".to_owned(),
            capabilities: vec![Capability {
                name: "udp-gso".to_owned(),
                used: true,
                reason: None,
                withdrawals: 0,
            }],
        });
        report.verdicts = super::super::goal::project(&report.cells, &report.rule);
        let text = serde_json::to_string_pretty(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }

    #[test]
    fn a_failed_repetition_keeps_its_place_and_has_no_value() {
        let mut cells = Cells::default();
        let good = |value| Sample {
            figures: BTreeMap::from([(Metric::Throughput, value)]),
            ..Sample::default()
        };
        let bad = Sample {
            failed: Some("x".to_owned()),
            ..good(99.0)
        };
        for sample in [good(1.0), bad, good(3.0)] {
            cells.push(Medium::Packet, Scenario::tcp(1), &System::LODEN, sample);
        }
        let at = (Medium::Packet, Scenario::tcp(1), &System::LODEN);
        assert_eq!(
            cells.values(at.0, at.1, at.2, Metric::Throughput),
            Some(vec![Some(1.0), None, Some(3.0)])
        );
        assert_eq!(
            cells
                .summary(at.0, at.1, at.2, Metric::Throughput)
                .unwrap()
                .median,
            2.0
        );
        assert_eq!(cells.failures(at.0, at.1, at.2), (vec!["x"], 3));
        assert_eq!(cells.values(at.0, at.1, at.2, Metric::Loss), None);
    }
}
