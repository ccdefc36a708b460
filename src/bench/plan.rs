//! Owns what a run is made of: which labs exist at the same time, what is done on them, and how long it takes. Pure.

use std::net::IpAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use super::medium::Medium;
use super::quick;
use super::ratio::Rule;
use super::remote::client::Server;
use super::scenario::Scenario;
use super::system::{Programs, System};
use crate::lab::Wire;

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
    /// Where to measure if not in labs.
    pub remote: Option<Remote>,
}

/// Between this machine and another, where networks of one's own are.
#[derive(Clone, Debug)]
pub struct Remote {
    /// What answers there.
    pub server: Rc<Server>,
    /// By what each system is reached: an address of the other machine.
    pub paths: Vec<(System, IpAddr)>,
    /// For the output of programs that run here.
    pub dir: PathBuf,
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
    pub(super) fn takes(self, medium: Medium, scenario: Scenario, system: &System) -> bool {
        let quick = scenario.is_quick_on(medium);
        system.takes(scenario)
            && match self {
                Self::All => true,
                Self::Quick => quick,
                Self::Floors => quick && quick::includes(scenario, system),
            }
    }
}

/// One underlay: what the labs that exist at the same time have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bed {
    pub(super) place: Place,
    pub(super) jumbo: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Lab(Wire),
    Machines,
}

impl Bed {
    pub(super) fn medium(self) -> Medium {
        match self.place {
            Place::Lab(wire) => wire.into(),
            Place::Machines => Medium::Machines,
        }
    }
}

/// Building one lab and warming it up, about.
pub(super) const BUILD_TIME: Duration = Duration::from_secs(2);
/// Finding the rates that one system carries, about.
pub(super) const CALIBRATION_TIME: Duration = Duration::from_secs(1);

pub(super) fn beds(plan: &Plan) -> Vec<Bed> {
    let beds = plan
        .wires
        .iter()
        .flat_map(|&wire| [false, true].map(|jumbo| (Place::Lab(wire), jumbo)));
    let far = plan.remote.iter().map(|_| (Place::Machines, false));
    let beds = beds.chain(far).map(|(place, jumbo)| Bed { place, jumbo });
    beds.filter(|bed| !scenarios(plan, *bed).is_empty())
        .collect()
}

pub(super) fn scenarios(plan: &Plan, bed: Bed) -> Vec<Scenario> {
    let on_bed = |scenario: &Scenario| {
        let taken = |system| plan.extent.takes(bed.medium(), *scenario, system);
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
                .filter(|scenario| plan.extent.takes(bed.medium(), **scenario, system));
            let each: Duration = taken.map(|s| s.load.expected(plan.seconds)).sum();
            total += each * plan.reps;
        }
    }
    total
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
            remote: None,
        }
    }

    #[test]
    fn labs_are_built_only_for_underlays_on_which_something_runs() {
        let built = |plan: &Plan| -> Vec<(Medium, bool)> {
            let beds = beds(plan).into_iter();
            beds.map(|bed| (bed.medium(), bed.jumbo)).collect()
        };
        let all = plan(Extent::All, &["tcp-8", "jumbo-tcp-1"]);
        assert_eq!(built(&all).len(), 4);
        let quick = plan(Extent::Quick, &["tcp-8", "latency-idle"]);
        assert_eq!(built(&quick), [(Medium::Superpacket, false)]);
    }

    #[test]
    fn the_expected_time_is_that_of_every_sample_and_of_building() {
        // Two wires; host to host, the bare wire has nothing to say.
        let plan = plan(Extent::All, &["tcp-1", "host-tcp-1"]);
        let samples = Duration::from_millis(1_350) * 3 * 3;
        assert_eq!(expected(&plan), (samples + BUILD_TIME * 2) * 2);
    }
}
