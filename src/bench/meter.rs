//! Owns what a run costs: processor time of the daemons and of the machine, context switches, and what loden says
//! about its own system calls. Read before and after, and subtracted. Never generates traffic.

use std::fs;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Error;
use super::dataplane::{Picture, Work};
use super::process_clock;
use super::stage::Stage;
use super::system::Expected;

/// Clock ticks per second that `/proc/stat` counts in: fixed for every architecture that Linux has (`USER_HZ`).
const TICKS_PER_SECOND: u32 = 100;

/// What is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    /// What the daemons should say of themselves; `None` if they have no counters of ours.
    pub expected: Option<Expected>,
    /// Whether datagrams can arrive joined: not on a wire without GRO.
    pub gro: bool,
}

/// A machine's processors since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Hundredths of a second in which any of them did anything.
    pub ticks: u64,
    /// Context switches.
    pub switches: u64,
}

/// The meters at one moment.
#[derive(Clone, Debug)]
pub struct Reading {
    at: Instant,
    cpu: Duration,
    machine: Machine,
    switches: u64,
    pictures: Vec<Picture>,
    gro: bool,
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
    /// Context switches of everything.
    pub machine_switches: u64,
    /// What the data planes did, and what they should have; `None` where there are no such counters.
    pub work: Option<Work>,
}

impl Meter {
    /// Reads all meters.
    ///
    /// # Errors
    /// [`Error::Clock`] or [`Error::Io`] if a daemon is gone, [`Error::Status`] if it does not answer,
    /// [`Error::Remote`] if the other machine does not.
    pub fn read(&self, stage: &dyn Stage) -> Result<Reading, Error> {
        let pids = stage.daemon_pids();
        let pictures = match self.expected {
            None => Vec::new(),
            Some(expected) => stage
                .status_sockets()
                .iter()
                .map(|socket| Picture::take(socket, expected))
                .collect::<Result<_, _>>()?,
        };
        Ok(Reading {
            at: Instant::now(),
            cpu: process_clock::total(&pids)?,
            machine: stage.machine()?,
            switches: pids
                .iter()
                .map(|&pid| switches(pid))
                .sum::<Result<_, _>>()?,
            pictures,
            gro: self.gro,
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
            machine: self.machine.busy_since(before.machine),
            switches: self.switches.saturating_sub(before.switches),
            machine_switches: self
                .machine
                .switches
                .saturating_sub(before.machine.switches),
            work: Work::between(&before.pictures, &self.pictures, self.gro),
        }
    }
}

impl Machine {
    /// This machine.
    ///
    /// # Errors
    /// [`Error::Io`] if `/proc/stat` cannot be read, [`Error::Report`] if it is not understood.
    pub fn read() -> Result<Self, Error> {
        let text = fs::read_to_string("/proc/stat").map_err(Error::io("read /proc/stat"))?;
        Self::parse(&text).ok_or_else(|| Error::Report {
            program: "/proc/stat",
            reason: "it has no line `cpu` or `ctxt`".to_owned(),
        })
    }

    /// Both machines together.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            ticks: self.ticks.saturating_add(other.ticks),
            switches: self.switches.saturating_add(other.switches),
        }
    }

    fn busy_since(self, before: Self) -> Duration {
        Duration::from_secs(self.ticks.saturating_sub(before.ticks)) / TICKS_PER_SECOND
    }

    fn parse(stat: &str) -> Option<Self> {
        let switches = stat.lines().find_map(|line| line.strip_prefix("ctxt "))?;
        Some(Self {
            ticks: busy_ticks(stat)?,
            switches: switches.trim().parse().ok()?,
        })
    }
}

/// How often a kernel has found TCP segments of its own reordered, from `/proc/net/netstat`; three ways to notice it
/// (`TCPSACKReorder`, `TCPTSReorder`, `TCPRenoReorder`).
pub(super) fn reorderings_in(netstat: &str) -> u64 {
    let mut lines = netstat
        .lines()
        .filter_map(|line| line.strip_prefix("TcpExt: "));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
        return 0;
    };
    names
        .split(' ')
        .zip(values.split(' '))
        .filter(|(name, _)| name.starts_with("TCP") && name.ends_with("Reorder"))
        .filter_map(|(_, value)| value.parse::<u64>().ok())
        .sum()
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
    use crate::lab::{Interrupt, wait};

    #[test]
    fn a_machine_is_busy_when_it_neither_idles_nor_waits_nor_is_stolen() {
        let stat = "cpu  100 20 30 4000 500 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(busy_ticks(stat), Some(100 + 20 + 30 + 6 + 7));
        assert_eq!(busy_ticks("cpu  1 2\n"), None);
        let machine = Machine::parse(&format!("{stat}intr 5 1\nctxt 1234\n")).unwrap();
        assert_eq!((machine.ticks, machine.switches), (163, 1234));
        assert_eq!(Machine::parse(stat), None);
        assert_eq!(busy_ticks("intr 1\n"), None);
    }

    #[test]
    fn the_kernels_three_counts_of_reordering_are_added() {
        let netstat = "TcpExt: SyncookiesSent TCPTSReorder TCPSACKReorder TCPRenoReorder TCPReqQFullDrop\n\
                       TcpExt: 9 1 20 300 9\nIpExt: InNoRoutes\nIpExt: 7\n";
        assert_eq!(reorderings_in(netstat), 321);
        assert_eq!(reorderings_in(""), 0);
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
        // Time that a hypervisor takes counts for the process and not for the machine: one round without is enough.
        let limit = Duration::from_secs(20);
        wait::until("the machine's clock", limit, &Interrupt::default(), || {
            let before = Machine::read().unwrap();
            let own = process_clock::total(&[pid]).unwrap();
            let mut rounds = 0_u64;
            // Five ticks, of which rounding may take two.
            while process_clock::total(&[pid]).unwrap() < own + Duration::from_millis(50) {
                rounds = std::hint::black_box(rounds + 1);
            }
            let busy = Machine::read().unwrap().busy_since(before);
            Ok((busy >= Duration::from_millis(30)).then_some(()))
        })
        .unwrap();
    }
}
