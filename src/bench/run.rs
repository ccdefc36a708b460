//! Owns the order of a benchmark: the labs of one underlay at a time, and on them every system once per repetition,
//! so that a drift of the machine meets all of them alike. Never computes a result.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::dataplane::Picture;
use super::measure::{self, Rates, Sample, Settings, Subject};
use super::ratio::Rule;
use super::report::{BedRates, Cells, Machine, Program, Report, SCHEMA};
use super::scenario::Scenario;
use super::system::{Programs, System};
use super::{Error, goal, ratio};
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
    /// What is done with them.
    pub scenarios: Vec<Scenario>,
    /// Which of it.
    pub extent: Extent,
    /// Which files are measured.
    pub programs: Programs,
    /// This program, which also generates the packets.
    pub program: PathBuf,
    /// The command that does it again.
    pub command: String,
    /// When a ratio is printed.
    pub rule: Rule,
}

/// Which scenarios run on which wire, with which systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of them, wherever they say something.
    All,
    /// Each wire only with what depends on it.
    Quick,
    /// As quick, and each system only with what the floors need. The first failure ends it.
    Floors,
}

impl Extent {
    fn takes(self, wire: Wire, scenario: Scenario, system: &System) -> bool {
        let quick = scenario.is_quick_on(wire);
        system.takes(scenario)
            && match self {
                Self::All => true,
                Self::Quick => quick,
                Self::Floors => quick && super::quick::includes(scenario, system),
            }
    }
}

/// Who is told how far the run is.
pub trait Watch {
    /// The run has begun and will take about so long.
    fn begins(&mut self, expected: Duration);
    /// Something is being done.
    fn doing(&mut self, what: &str);
    /// Something is worth a line.
    fn says(&mut self, line: &str);
    /// A piece of the run that was expected to take so long is done.
    fn passes(&mut self, expected: Duration);
}

/// One underlay: what the labs that exist at the same time have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bed {
    wire: Wire,
    jumbo: bool,
}

/// Building one lab and warming it up, about.
const BUILD_TIME: Duration = Duration::from_secs(4);
/// Finding the rates that one system carries, about.
const CALIBRATION_TIME: Duration = Duration::from_secs(2);

struct Bench<'a> {
    plan: &'a Plan,
    interrupt: &'a Interrupt,
    watch: &'a mut dyn Watch,
    cells: Cells,
    rates: Vec<BedRates>,
    wire_gaps: Vec<String>,
    notes: Vec<String>,
    programs: Vec<Program>,
}

/// Runs `plan`. A run that is interrupted, or on which something breaks, still has what was measured by then, and
/// says why it stopped.
///
/// # Errors
/// With [`Extent::Floors`], the first thing that went wrong. All labs are gone then, as they are after success.
pub fn run(plan: &Plan, interrupt: &Interrupt, watch: &mut dyn Watch) -> Result<Report, Error> {
    let started = SystemTime::now();
    let clock = Instant::now();
    let machine = Machine::here();
    watch.begins(expected(plan));
    let mut bench = Bench {
        plan,
        interrupt,
        watch,
        cells: Cells::default(),
        rates: Vec::new(),
        wire_gaps: Vec::new(),
        notes: Vec::new(),
        programs: Vec::new(),
    };
    let stopped = match bench.measure() {
        Ok(()) => None,
        Err(error) if plan.extent == Extent::Floors => return Err(error),
        Err(error) => Some(error.to_string()),
    };
    let cells = bench.cells;
    let (ratios, verdicts) = match plan.extent {
        Extent::Floors => (Vec::new(), goal::floors(&cells)),
        Extent::All | Extent::Quick => (
            ratio::all(&cells, &plan.rule),
            goal::project(&cells, &plan.rule),
        ),
    };
    Ok(Report {
        schema: SCHEMA,
        machine,
        command: plan.command.clone(),
        started: started
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        took: clock.elapsed().as_secs(),
        stopped,
        reps: plan.reps,
        seconds: plan.seconds,
        rule: plan.rule,
        rates: bench.rates,
        wire_gaps: bench.wire_gaps,
        notes: bench.notes,
        programs: bench.programs,
        cells,
        ratios,
        verdicts,
    })
}

fn beds(plan: &Plan) -> Vec<Bed> {
    let beds = plan
        .wires
        .iter()
        .flat_map(|&wire| [false, true].map(|jumbo| Bed { wire, jumbo }));
    beds.filter(|bed| !scenarios(plan, *bed).is_empty())
        .collect()
}

fn scenarios(plan: &Plan, bed: Bed) -> Vec<Scenario> {
    let on_bed = |scenario: &Scenario| {
        let taken = |system| plan.extent.takes(bed.wire, *scenario, system);
        scenario.jumbo == bed.jumbo && plan.systems.iter().any(taken)
    };
    plan.scenarios.iter().copied().filter(on_bed).collect()
}

/// About how long `plan` takes.
#[must_use]
pub fn expected(plan: &Plan) -> Duration {
    let mut total = Duration::ZERO;
    for bed in beds(plan) {
        let scenarios = scenarios(plan, bed);
        for system in &plan.systems {
            total += BUILD_TIME;
            if scenarios.iter().any(|scenario| scenario.load.is_paced()) {
                total += CALIBRATION_TIME;
            }
            let taken = scenarios
                .iter()
                .filter(|scenario| plan.extent.takes(bed.wire, **scenario, system));
            let each: Duration = taken.map(|s| s.load.expected(plan.seconds)).sum();
            total += each * plan.reps;
        }
    }
    total
}

impl Bench<'_> {
    fn measure(&mut self) -> Result<(), Error> {
        beds(self.plan)
            .into_iter()
            .try_for_each(|bed| self.measure_bed(bed))
    }

    fn measure_bed(&mut self, bed: Bed) -> Result<(), Error> {
        let mut subjects = self.build(bed)?;
        let scenarios = scenarios(self.plan, bed);
        let rates = self.calibrate(bed, &scenarios, &subjects)?;
        let plan = self.plan;
        let settings = Settings {
            program: &plan.program,
            seconds: plan.seconds,
            rates,
        };
        for rep in 1..=plan.reps {
            for &scenario in &scenarios {
                for subject in &mut subjects {
                    if plan.extent.takes(bed.wire, scenario, &subject.system) {
                        self.sample(bed, rep, scenario, subject, &settings)?;
                    }
                }
            }
            // Whoever runs right after another's load must not always be the same.
            let step = usize::from(subjects.len() > 1);
            subjects.rotate_left(step);
        }
        for subject in subjects {
            subject.lab.down()?;
        }
        Ok(())
    }

    fn sample(
        &mut self,
        bed: Bed,
        rep: u32,
        scenario: Scenario,
        subject: &mut Subject,
        settings: &Settings<'_>,
    ) -> Result<(), Error> {
        self.interrupt.check()?;
        let system = subject.system.clone();
        let what = format!("{} wire, {scenario}, {system}", cli_name(&bed.wire));
        self.watch.doing(&what);
        let sample = match subject.sample(scenario, settings) {
            Ok(sample) => sample,
            Err(error) if error.is_interruption() => return Err(error),
            Err(source) if self.plan.extent == Extent::Floors => {
                let source = Box::new(source);
                return Err(Error::Measuring { what, source });
            }
            Err(error) => Sample::failure(&error),
        };
        let headline = headline(scenario, &sample);
        self.watch
            .says(&format!("{rep}/{}: {what}: {headline}", self.plan.reps));
        self.watch.passes(scenario.load.expected(self.plan.seconds));
        self.cells.push(bed.wire, scenario, &system, sample);
        Ok(())
    }

    fn build(&mut self, bed: Bed) -> Result<Vec<Subject>, Error> {
        let mut subjects = Vec::new();
        for system in &self.plan.systems {
            self.watch.doing(&format!(
                "building {system} on the {} wire",
                cli_name(&bed.wire)
            ));
            match self.subject(bed, system) {
                Ok(subject) => subjects.push(subject),
                Err(error) if error.is_interruption() || self.plan.extent == Extent::Floors => {
                    return Err(error);
                }
                Err(error) => {
                    let note = format!("{system} on the {} wire: {error}", cli_name(&bed.wire));
                    self.watch.says(&format!("not measured: {note}"));
                    self.notes.push(format!("not measured: {note}"));
                }
            }
            self.watch.passes(BUILD_TIME);
        }
        Ok(subjects)
    }

    fn subject(&mut self, bed: Bed, system: &System) -> Result<Subject, Error> {
        let programs = &self.plan.programs;
        let spec = system.spec(std::process::id(), bed.wire, bed.jumbo, programs)?;
        let path = spec.daemon.clone();
        let subject = Subject {
            system: system.clone(),
            lab: Lab::build(spec, self.interrupt)?,
        };
        subject.warm_up(&self.plan.program)?;
        let gaps = subject.lab.layout().wire_gaps.iter();
        self.wire_gaps
            .extend(gaps.map(|gap| format!("{}, {system}: {gap}", cli_name(&bed.wire))));
        if let Some(path) = path
            && !self.programs.iter().any(|known| known.system == *system)
        {
            let capabilities = match system.engine() {
                Some(engine) => {
                    let socket = subject.lab.status_socket(1);
                    Picture::take(&socket, &cli_name(&engine))?
                        .capabilities()
                        .to_vec()
                }
                None => Vec::new(),
            };
            self.programs.push(Program {
                system: system.clone(),
                path: path.display().to_string(),
                capabilities,
            });
        }
        Ok(subject)
    }

    fn calibrate(
        &mut self,
        bed: Bed,
        scenarios: &[Scenario],
        subjects: &[Subject],
    ) -> Result<Rates, Error> {
        if subjects.is_empty() || !scenarios.iter().any(|scenario| scenario.load.is_paced()) {
            return Ok(Rates::default());
        }
        self.watch
            .doing("looking for rates that every system carries");
        let rates = measure::calibrate(subjects, &self.plan.program)?;
        self.watch.says(&format!(
            "every system carries {} packets/s in bursts, {} one at a time",
            rates.burst, rates.single
        ));
        let systems = u32::try_from(self.plan.systems.len()).unwrap_or(u32::MAX);
        self.watch.passes(CALIBRATION_TIME * systems);
        self.rates.push(BedRates {
            wire: bed.wire,
            jumbo: bed.jumbo,
            rates,
        });
        Ok(rates)
    }
}

/// The first number of a sample, which the rest only explains.
fn headline(scenario: Scenario, sample: &Sample) -> String {
    if let Some(why) = &sample.failed {
        return format!("FAILED: {why}");
    }
    let metrics = scenario.load.metrics().iter();
    let first = metrics.filter_map(|metric| Some((metric, sample.figures.get(metric)?)));
    first
        .take(1)
        .map(|(metric, value)| format!("{value:.2} {}", metric.unit()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Store;

    fn plan(extent: Extent, scenarios: &[&str]) -> Plan {
        Plan {
            reps: 3,
            seconds: 1,
            wires: vec![Wire::Superpacket, Wire::PacketNoGro],
            systems: vec![System::Veth, System::LODEN],
            scenarios: scenarios.iter().map(|id| id.parse().unwrap()).collect(),
            extent,
            programs: Programs {
                loden: "/bin/loden".into(),
                others: std::collections::BTreeMap::new(),
                store: Store::Local,
            },
            program: "/bin/loden".into(),
            command: String::new(),
            rule: Rule::default(),
        }
    }

    #[test]
    fn labs_are_built_only_for_underlays_on_which_something_runs() {
        let built = |plan: &Plan| -> Vec<(Wire, bool)> {
            beds(plan).iter().map(|bed| (bed.wire, bed.jumbo)).collect()
        };
        let all = plan(Extent::All, &["tcp-8", "jumbo-tcp-1"]);
        assert_eq!(built(&all).len(), 4);
        let quick = plan(Extent::Quick, &["tcp-8", "latency-idle"]);
        assert_eq!(built(&quick), [(Wire::Superpacket, false)]);
    }

    #[test]
    fn the_expected_time_is_that_of_every_sample_and_of_building() {
        // Two wires; host to host, the bare wire has nothing to say.
        let plan = plan(Extent::All, &["tcp-1", "host-tcp-1"]);
        let samples = Duration::from_millis(1_500) * 3 * 3;
        assert_eq!(expected(&plan), (samples + BUILD_TIME * 2) * 2);
    }
}
