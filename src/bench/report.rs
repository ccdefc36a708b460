//! Owns the result of a benchmark as data: where it ran, how, every sample, and the verdicts. Never measures.

use std::collections::BTreeMap;
use std::fs;
use std::thread;

use serde::Serialize;

use super::goal::Verdict;
use super::measure::{Rates, Sample};
use super::scenario::{Metric, Scenario};
use super::stats::Summary;
use super::system::System;
use crate::lab::Wire;

/// Everything a reader needs to judge the numbers, and to get them again.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where it ran.
    pub machine: Machine,
    /// How often each sample was taken.
    pub reps: u32,
    /// Length of a TCP run.
    pub seconds: u32,
    /// Offered UDP rates per wire.
    pub rates: BTreeMap<Wire, Rates>,
    /// What a wire should have done but could not on this kernel.
    pub wire_gaps: Vec<String>,
    /// Every sample.
    pub cells: Cells,
    /// The floors, and what was measured against them.
    pub verdicts: Vec<Verdict>,
}

/// The machine, as far as it matters for the numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Kernel release.
    pub kernel: String,
    /// Processors that may be used.
    pub processors: usize,
    /// The model of the first.
    pub model: String,
    /// This program's version.
    pub version: &'static str,
}

impl Machine {
    /// Describes this machine; what cannot be told is empty.
    #[must_use]
    pub fn here() -> Self {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            kernel: kernel.trim().to_owned(),
            processors: thread::available_parallelism().map_or(0, usize::from),
            model: model.map_or_else(String::new, |(_, model)| model.to_owned()),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// One scenario on one wire with one system, repeated.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Cell {
    wire: Wire,
    scenario: Scenario,
    system: System,
    samples: Vec<Sample>,
}

/// All samples, in the order in which their kind was first measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Cells(Vec<Cell>);

impl Cells {
    /// Adds the sample of one more repetition.
    pub fn push(&mut self, wire: Wire, scenario: Scenario, system: System, sample: Sample) {
        match self
            .0
            .iter_mut()
            .find(|cell| cell.is(wire, scenario, system))
        {
            Some(cell) => cell.samples.push(sample),
            None => self.0.push(Cell {
                wire,
                scenario,
                system,
                samples: vec![sample],
            }),
        }
    }

    /// One number of every repetition, in order; `None` if it was not measured in each.
    #[must_use]
    pub fn values(
        &self,
        wire: Wire,
        scenario: Scenario,
        system: System,
        metric: Metric,
    ) -> Option<Vec<f64>> {
        let cell = self.0.iter().find(|cell| cell.is(wire, scenario, system))?;
        cell.samples
            .iter()
            .map(|sample| sample.0.get(&metric).copied())
            .collect()
    }

    /// The same, summarised.
    #[must_use]
    pub fn summary(
        &self,
        wire: Wire,
        scenario: Scenario,
        system: System,
        metric: Metric,
    ) -> Option<Summary> {
        Summary::of(&self.values(wire, scenario, system, metric)?)
    }

    /// The systems that were measured at all.
    #[must_use]
    pub fn systems(&self) -> Vec<System> {
        self.distinct(|cell| cell.system)
    }

    /// The wires that were measured at all.
    #[must_use]
    pub fn wires(&self) -> Vec<Wire> {
        self.distinct(|cell| cell.wire)
    }

    fn distinct<T: Ord>(&self, of: impl Fn(&Cell) -> T) -> Vec<T> {
        let mut all: Vec<T> = self.0.iter().map(of).collect();
        all.sort();
        all.dedup();
        all
    }
}

impl Cell {
    fn is(&self, wire: Wire, scenario: Scenario, system: System) -> bool {
        self.wire == wire && self.scenario == scenario && self.system == system
    }
}
