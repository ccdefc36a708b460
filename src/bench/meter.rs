//! Owns what a run costs: processor time of the daemons and of the machine, context switches, and what loden says
//! about its own system calls. Read before and after, and subtracted. Never generates traffic.

use std::fs;
use std::time::{Duration, Instant};

use super::dataplane::{Picture, Work};
use super::{Error, process_clock};
use crate::lab::spec::cli_name;
use crate::lab::{Engine, Lab};

/// Clock ticks per second that `/proc/stat` counts in: fixed for every architecture that Linux has (`USER_HZ`).
const TICKS_PER_SECOND: u32 = 100;

/// What is read.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    /// The engine that the daemons should run; `None` if they have no counters of ours.
    pub engine: Option<Engine>,
}

/// The meters at one moment.
#[derive(Clone, Debug)]
pub struct Reading {
    at: Instant,
    cpu: Duration,
    machine: Duration,
    switches: u64,
    pictures: Vec<Picture>,
}

/// What was spent between two readings.
#[derive(Clone, Debug)]
pub struct Spent {
    /// Time that passed.
    pub elapsed: Duration,
    /// Processor time of the daemons together.
    pub cpu: Duration,
    /// Processor time of all processors together.
    pub machine: Duration,
    /// Context switches of the daemons' threads that still run.
    pub switches: u64,
    /// What the data planes did, and what they should have; `None` where there are no such counters.
    pub work: Option<Work>,
}

impl Meter {
    /// Reads all meters.
    ///
    /// # Errors
    /// [`Error::Clock`] or [`Error::Io`] if a daemon is gone, [`Error::Status`] if it does not answer.
    pub fn read(&self, lab: &Lab) -> Result<Reading, Error> {
        let pids = lab.daemon_pids();
        let pictures = match self.engine {
            None => Vec::new(),
            Some(engine) => lab
                .spec()
                .node_members()
                .filter_map(|member| member.node())
                .map(|node| Picture::take(&lab.status_socket(node), &cli_name(&engine)))
                .collect::<Result<_, _>>()?,
        };
        Ok(Reading {
            at: Instant::now(),
            cpu: process_clock::total(&pids)?,
            machine: machine()?,
            switches: pids
                .iter()
                .map(|&pid| switches(pid))
                .sum::<Result<_, _>>()?,
            pictures,
        })
    }
}

impl Reading {
    /// The difference to an earlier reading.
    #[must_use]
    pub fn since(&self, before: &Self) -> Spent {
        Spent {
            elapsed: self.at.saturating_duration_since(before.at),
            cpu: self.cpu.saturating_sub(before.cpu),
            machine: self.machine.saturating_sub(before.machine),
            switches: self.switches.saturating_sub(before.switches),
            work: Work::between(&before.pictures, &self.pictures),
        }
    }
}

/// Processor time since boot in which any processor did anything.
fn machine() -> Result<Duration, Error> {
    let text = fs::read_to_string("/proc/stat").map_err(Error::io("read /proc/stat"))?;
    busy_ticks(&text)
        .map(|ticks| Duration::from_secs(ticks) / TICKS_PER_SECOND)
        .ok_or_else(|| Error::Report {
            program: "/proc/stat",
            reason: "it has no line `cpu`".to_owned(),
        })
}

/// proc(5): user, nice, system, (idle, iowait,) irq, softirq. Stolen time is another machine's, and guests' time is
/// part of user already.
fn busy_ticks(stat: &str) -> Option<u64> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = fields
        .split_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    [0, 1, 2, 5, 6]
        .iter()
        .map(|&i| fields.get(i).copied())
        .sum()
}

fn switches(pid: i32) -> Result<u64, Error> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .map_err(Error::io("list the threads of a daemon"))?;
    // A thread may end while one reads; its switches are lost, and there are few of it.
    Ok(tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("status")).ok())
        .map(|status| switches_in(&status))
        .sum())
}

fn switches_in(status: &str) -> u64 {
    status
        .lines()
        .filter_map(|line| line.split_once("ctxt_switches:"))
        .filter_map(|(_, count)| count.trim().parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_busy_when_it_neither_idles_nor_waits_nor_is_stolen() {
        let stat = "cpu  100 20 30 4000 500 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(busy_ticks(stat), Some(100 + 20 + 30 + 6 + 7));
        assert_eq!(busy_ticks("cpu  1 2\n"), None);
        assert_eq!(busy_ticks("intr 1\n"), None);
    }

    #[test]
    fn both_kinds_of_switches_count() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t5\n";
        assert_eq!(switches_in(status), 155);
        assert!(switches(i32::try_from(std::process::id()).unwrap()).unwrap() > 0);
    }

    #[test]
    fn the_machines_clock_goes_forward_while_this_process_works() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let (before, own) = (machine().unwrap(), process_clock::total(&[pid]).unwrap());
        let mut rounds = 0_u64;
        // Five ticks, of which rounding may take two.
        while process_clock::total(&[pid]).unwrap() < own + Duration::from_millis(50) {
            rounds = std::hint::black_box(rounds + 1);
        }
        assert!(
            machine().unwrap() >= before + Duration::from_millis(30),
            "{rounds}"
        );
    }
}
