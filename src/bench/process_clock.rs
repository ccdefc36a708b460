//! Owns reading the processor time of daemons. The kernel's process clock counts all threads, also ended
//! ones, user and system time, to the nanosecond; it does not count what the kernel does in its own threads.

use std::time::Duration;

use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

use super::Error;

/// The processor time that the processes have used together since they started.
///
/// # Errors
/// [`Error::Clock`] names the process that is gone.
pub fn total(pids: &[i32]) -> Result<Duration, Error> {
    pids.iter().map(|&pid| of(pid)).sum()
}

fn of(pid: i32) -> Result<Duration, Error> {
    clock_getcpuclockid(Pid::from_raw(pid))
        .and_then(|clock| clock.now())
        .map(Duration::from)
        .map_err(|source| Error::Clock { pid, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_on_the_clock_of_the_process_that_does_it() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let before = total(&[pid]).unwrap();
        let mut rounds = 0_u64;
        // Ends when the clock has moved; a clock that stands still would hang here, not pass.
        while total(&[pid]).unwrap() < before + Duration::from_millis(5) {
            rounds = std::hint::black_box(rounds + 1);
        }
        assert!(rounds > 0);
    }
}
