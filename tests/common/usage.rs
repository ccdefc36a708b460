//! Owns what a process costs, as the kernel counts it. Never asks the process.

#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::fs;
use std::time::Duration;

/// Processor time of a process so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    /// Of the workers of the data plane.
    pub(crate) workers: Duration,
    /// Of its other threads, and of the programs that it ran and that have ended.
    pub(crate) rest: Duration,
}

impl Cpu {
    /// Until now. By `/proc/PID/task/TID/schedstat` (`Documentation/scheduler/sched-stats.rst`) in nanoseconds; that
    /// of children is in clock ticks, `cutime` and `cstime` of proc(5).
    pub(crate) fn of(pid: u32) -> Self {
        let mut cpu = Self::default();
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let path = task.unwrap().path();
            // A thread may end between the listing and the look.
            let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
            let nanos = read("schedstat")
                .split(' ')
                .next()
                .and_then(|n| n.parse().ok());
            let time = Duration::from_nanos(nanos.unwrap_or_default());
            if read("comm").starts_with("loden-") {
                cpu.workers += time;
            } else {
                cpu.rest += time;
            }
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        // Behind the name in parentheses, `state` is the first field, number 3 of proc(5).
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let ticks: u64 = [16, 17]
            .map(|n| fields[n - 3].parse::<u64>().unwrap())
            .iter()
            .sum();
        cpu.rest += Duration::from_millis(ticks * 10);
        cpu
    }

    pub(crate) fn total(self) -> Duration {
        self.workers + self.rest
    }

    pub(crate) const fn since(self, before: Self) -> Self {
        Self {
            workers: self.workers.saturating_sub(before.workers),
            rest: self.rest.saturating_sub(before.rest),
        }
    }
}

/// Resident memory in KiB: now (`VmRSS`), and the most there ever was (`VmHWM`).
pub(crate) fn memory(pid: u32) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("VmRSS:"), field("VmHWM:"))
}
