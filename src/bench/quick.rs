//! Owns the order of a quick benchmark: the labs of one wire at a time, and on them every system once per
//! repetition, so that a drift of the machine meets all of them alike. Never computes a result.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::measure::{self, Rates, Sample, Settings};
use super::report::{Cells, Machine, Report};
use super::scenario::Scenario;
use super::system::System;
use super::{Error, goal};
use crate::lab::spec::cli_name;
use crate::lab::{Interrupt, Lab, Wire};

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How often each sample is taken.
    pub reps: u32,
    /// Length of a TCP run.
    pub seconds: u32,
    /// The wires, one after the other.
    pub wires: Vec<Wire>,
    /// The systems that are compared.
    pub systems: Vec<System>,
    /// What is done with them, where it applies.
    pub scenarios: Vec<Scenario>,
    /// The program that is measured as the daemon.
    pub daemon: PathBuf,
    /// This program, which also generates the packets.
    pub program: PathBuf,
}

struct Bench<'a> {
    plan: &'a Plan,
    interrupt: &'a Interrupt,
    progress: &'a mut dyn FnMut(&str),
    cells: Cells,
    rates: BTreeMap<Wire, Rates>,
    wire_gaps: Vec<String>,
}

/// Runs `plan`, telling `progress` a line at a time.
///
/// # Errors
/// The first thing that went wrong; all labs are gone then, as they are after success.
pub fn run(
    plan: &Plan,
    interrupt: &Interrupt,
    progress: &mut dyn FnMut(&str),
) -> Result<Report, Error> {
    let mut bench = Bench {
        plan,
        interrupt,
        progress,
        cells: Cells::default(),
        rates: BTreeMap::new(),
        wire_gaps: Vec::new(),
    };
    for &wire in &plan.wires {
        bench.measure_wire(wire)?;
    }
    Ok(Report {
        machine: Machine::here(),
        reps: plan.reps,
        seconds: plan.seconds,
        rates: bench.rates,
        wire_gaps: bench.wire_gaps,
        verdicts: goal::judge(&bench.cells),
        cells: bench.cells,
    })
}

impl Bench<'_> {
    fn measure_wire(&mut self, wire: Wire) -> Result<(), Error> {
        let mut labs = self.build(wire)?;
        let rates = self.calibrate(wire, &labs)?;
        let plan = self.plan;
        let settings = Settings {
            program: &plan.program,
            seconds: plan.seconds,
            rates,
        };
        for rep in 1..=plan.reps {
            for scenario in plan
                .scenarios
                .iter()
                .copied()
                .filter(|scenario| scenario.runs_on(wire))
            {
                for (system, lab) in labs
                    .iter_mut()
                    .filter(|(system, _)| scenario.includes(*system))
                {
                    let what = format!("{} wire, {scenario}, {system}", cli_name(&wire));
                    let sample = measure::sample(lab, scenario, &settings).map_err(|source| {
                        Error::Measuring {
                            what: what.clone(),
                            source: Box::new(source),
                        }
                    })?;
                    (self.progress)(&format!(
                        "{rep}/{}: {what}: {}",
                        plan.reps,
                        headline(scenario, &sample)
                    ));
                    self.cells.push(wire, scenario, *system, sample);
                }
            }
            // Whoever runs right after another's load must not always be the same.
            let step = usize::from(labs.len() > 1);
            labs.rotate_left(step);
        }
        labs.into_iter().try_for_each(|(_, lab)| Ok(lab.down()?))
    }

    fn build(&mut self, wire: Wire) -> Result<Vec<(System, Lab)>, Error> {
        (self.progress)(&format!(
            "building the labs of the {} wire",
            cli_name(&wire)
        ));
        let mut labs = Vec::new();
        for &system in &self.plan.systems {
            let spec = system.spec(std::process::id(), wire, &self.plan.daemon)?;
            let mut lab = Lab::build(spec, self.interrupt)?;
            lab.await_connected()?;
            let gaps = lab.layout().wire_gaps.iter();
            self.wire_gaps
                .extend(gaps.map(|gap| format!("{}, {system}: {gap}", cli_name(&wire))));
            labs.push((system, lab));
        }
        Ok(labs)
    }

    fn calibrate(&mut self, wire: Wire, labs: &[(System, Lab)]) -> Result<Rates, Error> {
        let measured: Vec<&Lab> = labs
            .iter()
            .filter(|(system, _)| system.has_daemon())
            .map(|(_, lab)| lab)
            .collect();
        let paced = |scenario: &Scenario| {
            matches!(scenario, Scenario::UdpBurst | Scenario::UdpSingle) && scenario.runs_on(wire)
        };
        if measured.is_empty() || !self.plan.scenarios.iter().any(paced) {
            return Ok(Rates::default());
        }
        let rates = measure::calibrate(&measured, &self.plan.program)?;
        (self.progress)(&format!(
            "every system carries {} packets/s in bursts, {} one at a time",
            rates.burst, rates.single
        ));
        self.rates.insert(wire, rates);
        Ok(rates)
    }
}

/// The first number of a sample, which the rest only explains.
fn headline(scenario: Scenario, sample: &Sample) -> String {
    let first = scenario
        .metrics()
        .first()
        .and_then(|metric| Some((metric, sample.0.get(metric)?)));
    first.map_or_else(String::new, |(metric, value)| {
        format!("{value:.2} {}", metric.unit())
    })
}
