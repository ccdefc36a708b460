//! Owns the order of a benchmark: the labs of one underlay at a time, and on them every system once per repetition,
//! so that a drift of the machine meets all of them alike. Never computes a result.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::dataplane::Picture;
use super::measure::{self, Rates, Sample, Settings, Site, Subject};
use super::plan::{
    BUILD_TIME, Bed, CALIBRATION_TIME, Extent, Place, Plan, beds, expected, scenarios,
};
use super::remote::client::Pair;
use super::report::{BedRates, Cells, Machine, Program, Report, SCHEMA};
use super::scenario::Scenario;
use super::system::System;
use super::{Error, goal, ratio};
use crate::lab::{Interrupt, Lab, Member};

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

/// How soon a program says its version.
const VERSION_LIMIT: Duration = Duration::from_secs(2);
/// Characters of it that a report has room for.
const MAX_VERSION: usize = 80;

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
    let nothing = || "nothing could be measured".to_owned();
    let stopped = stopped.or_else(|| cells.systems().is_empty().then(nothing));
    let (ratios, verdicts) = match plan.extent {
        Extent::Floors => (Vec::new(), goal::floors(&cells)),
        Extent::All | Extent::Quick => (
            ratio::all(&cells, &plan.rule),
            // The goals are those of the lab's wires.
            match plan.remote {
                None => goal::project(&cells, &plan.rule),
                Some(_) => Vec::new(),
            },
        ),
    };
    let other_machine = plan.remote.as_ref().map(|remote| &remote.server.machine);
    Ok(Report {
        schema: SCHEMA,
        machine,
        other_machine: other_machine.cloned(),
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
                    if plan.extent.takes(bed.medium(), scenario, &subject.system) {
                        self.sample(bed, rep, scenario, subject, &settings)?;
                    }
                }
            }
            // Whoever runs right after another's load must not always be the same.
            let step = usize::from(subjects.len() > 1);
            subjects.rotate_left(step);
        }
        for subject in subjects {
            if let Site::Lab(lab) = subject.site {
                lab.down()?;
            }
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
        let what = format!("{}, {scenario}, {system}", bed.medium());
        self.watch.doing(&what);
        let sample = match subject.sample(scenario, settings) {
            Ok(sample) => sample,
            Err(error) if error.is_final() => return Err(error),
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
        self.cells.push(bed.medium(), scenario, &system, sample);
        Ok(())
    }

    fn build(&mut self, bed: Bed) -> Result<Vec<Subject>, Error> {
        let mut subjects = Vec::new();
        for system in &self.plan.systems {
            let what = format!("{system}, {}", bed.medium());
            self.watch.doing(&format!("building {what}"));
            match self.subject(bed, system) {
                Ok(subject) => subjects.push(subject),
                Err(error) if error.is_final() || self.plan.extent == Extent::Floors => {
                    return Err(error);
                }
                Err(error) => {
                    let note = format!("not measured: {what}: {error}");
                    self.watch.says(&note);
                    self.notes.push(note);
                }
            }
            self.watch.passes(BUILD_TIME);
        }
        Ok(subjects)
    }

    fn subject(&mut self, bed: Bed, system: &System) -> Result<Subject, Error> {
        let site = match (bed.place, &self.plan.remote) {
            (Place::Lab(wire), _) => {
                let (run, programs) = (std::process::id(), &self.plan.programs);
                let spec = system.spec(run, wire, bed.jumbo, programs)?;
                Site::Lab(Box::new(Lab::build(spec, self.interrupt)?))
            }
            (Place::Machines, Some(remote)) => {
                let path = remote.paths.iter().find(|(known, _)| known == system);
                let (_, addr) = path.ok_or_else(|| Error::Remote(format!("no path {system}")))?;
                let (server, dir) = (Rc::clone(&remote.server), remote.dir.clone());
                Site::Pair(Pair::new(server, *addr, dir, self.interrupt.clone()))
            }
            (Place::Machines, None) => {
                return Err(Error::Remote("it was not named".to_owned()));
            }
        };
        let system = system.clone();
        let subject = Subject { system, site };
        subject.warm_up(&self.plan.program)?;
        self.describe(bed, &subject)?;
        Ok(subject)
    }

    /// Notes what the wire cannot do, and which program runs.
    fn describe(&mut self, bed: Bed, subject: &Subject) -> Result<(), Error> {
        let Site::Lab(lab) = &subject.site else {
            return Ok(());
        };
        let system = &subject.system;
        let gaps = lab.layout().wire_gaps.iter();
        self.wire_gaps
            .extend(gaps.map(|gap| format!("{}, {system}: {gap}", bed.medium())));
        let Some(path) = &lab.spec().daemon else {
            return Ok(());
        };
        if self.programs.iter().any(|known| known.system == *system) {
            return Ok(());
        }
        let capabilities = match system.expected() {
            Some(expected) => {
                let picture = Picture::take(&lab.status_socket(1), expected)?;
                picture.capabilities().to_vec()
            }
            None => Vec::new(),
        };
        self.programs.push(Program {
            system: system.clone(),
            path: path.display().to_string(),
            version: version_of(lab, path),
            capabilities,
        });
        Ok(())
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
            wire: bed.medium(),
            jumbo: bed.jumbo,
            rates,
        });
        Ok(rates)
    }
}

/// The first line that a program answers `--version` with; empty if it does not, for that is no reason not to measure it.
fn version_of(lab: &Lab, program: &Path) -> String {
    let said = || -> Result<String, crate::lab::Error> {
        let mut command = Command::new(program);
        let asked = lab.spawn(Member::Node(1), "version", command.arg("--version"))?;
        let log = asked.log_path().to_owned();
        let printed = asked.finish(VERSION_LIMIT, lab.interrupt())?;
        // flanneld writes it to standard error.
        let logged = fs::read(&log).unwrap_or_default();
        Ok(printed + &String::from_utf8_lossy(&logged))
    };
    let text = said().unwrap_or_default();
    let line = text.lines().map(str::trim).find(|line| !line.is_empty());
    line.unwrap_or_default().chars().take(MAX_VERSION).collect()
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
