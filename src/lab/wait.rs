//! Owns waiting: bounded waits for a condition, pacing, and the token that a signal sets. The only place
//! that may put a thread to sleep. Never waits without a limit.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use super::{Error, NetNs};

/// How often a condition is looked at: soon at first, then ever more rarely up to [`SLOWEST_POLL`].
const FIRST_POLL: Duration = Duration::from_millis(1);
/// Rare enough to cost nothing, often enough that no one notices the delay.
const SLOWEST_POLL: Duration = Duration::from_millis(50);

/// Set once, by SIGINT, SIGTERM or SIGHUP; every wait of a lab looks at it.
///
/// The default token is never set.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP over from their default action for the rest of the process's life.
    ///
    /// # Errors
    /// The system's answer, if a handler or the thread that listens cannot be made.
    pub fn on_signals() -> io::Result<Self> {
        let token = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let (mut int, mut term, mut hup) = {
            let _entered = runtime.enter();
            (
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            )
        };
        let seen = token.clone();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = int.recv() => {}
                        _ = term.recv() => {}
                        _ = hup.recv() => {}
                    }
                    seen.set();
                });
            })?;
        Ok(token)
    }

    /// Sets the token, as a signal would.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// # Errors
    /// [`Error::Interrupted`] once the token is set.
    pub fn check(&self) -> Result<(), Error> {
        if self.0.load(Ordering::Acquire) {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }
}

/// Waits until `poll` yields a value.
///
/// # Errors
/// The error of `poll`; [`Error::Interrupted`]; [`Error::Timeout`], naming `what`, after `limit`.
pub fn until<T>(
    what: &str,
    limit: Duration,
    interrupt: &Interrupt,
    mut poll: impl FnMut() -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    let deadline = Instant::now() + limit;
    let mut interval = FIRST_POLL;
    loop {
        interrupt.check()?;
        if let Some(value) = poll()? {
            return Ok(value);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Timeout {
                what: what.to_owned(),
                waited: limit,
                detail: String::new(),
            });
        }
        pause(interval.min(left));
        interval = (interval * 3 / 2).min(SLOWEST_POLL);
    }
}

/// Waits until a socket in `netns` is bound to `port`: until a server started there listens. `protocol` is
/// `tcp` or `udp`; `alive` is asked before each look and ends the wait with its error.
///
/// # Errors
/// The error of `alive`; [`Error::Timeout`]; [`Error::Interrupted`].
pub fn until_bound(
    netns: &NetNs,
    protocol: &str,
    port: u16,
    interrupt: &Interrupt,
    mut alive: impl FnMut() -> Result<(), Error>,
) -> Result<(), Error> {
    let what = format!("{protocol} port {port} to be bound in {}", netns.name());
    // Servers bind at once; only one that is broken, or a machine that is stuck, takes longer.
    until(&what, Duration::from_secs(10), interrupt, || {
        alive()?;
        let tables = netns.run(|| {
            ["", "6"].map(|family| {
                fs::read_to_string(format!("/proc/thread-self/net/{protocol}{family}"))
            })
        })?;
        let bound = tables.iter().flatten().any(|table| lists_port(table, port));
        Ok(bound.then_some(()))
    })
}

/// Whether a table of sockets (proc(5), `/proc/net/tcp`) lists one that is bound to `port` and has no peer.
fn lists_port(table: &str, port: u16) -> bool {
    table.lines().skip(1).any(|line| {
        let mut columns = line.split_whitespace().skip(1);
        let local = columns.next().and_then(|addr| addr.rsplit_once(':'));
        let peer = columns.next().and_then(|addr| addr.rsplit_once(':'));
        let is = |end: Option<(&str, &str)>, port: u16| {
            end.is_some_and(|(_, digits)| u16::from_str_radix(digits, 16) == Ok(port))
        };
        is(local, port) && is(peer, 0)
    })
}

/// Sleeps for `time`: between two looks at a condition, or to keep a packet generator's pace.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place that every wait and every pace goes through"
)]
pub fn pause(time: Duration) {
    thread::sleep(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_the_value_of_its_condition() {
        let mut looks = 0;
        let value = until(
            "the third look",
            Duration::from_secs(10),
            &Interrupt::default(),
            || {
                looks += 1;
                Ok((looks == 3).then_some(looks))
            },
        );
        assert_eq!(value.unwrap(), 3);
    }

    #[test]
    fn a_wait_in_vain_names_what_it_waited_for() {
        let never = until::<()>("rain", Duration::ZERO, &Interrupt::default(), || Ok(None));
        assert!(matches!(never, Err(Error::Timeout { what, .. }) if what == "rain"));
    }

    #[test]
    fn a_bound_port_is_told_from_a_connection_to_it() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue\n";
        let line =
            |local: &str, peer: &str| format!("{head}   0: {local} {peer} 0A 00000000:00000000\n");
        assert!(lists_port(&line("00000000:1451", "00000000:0000"), 5201));
        assert!(!lists_port(&line("0202C612:1451", "0201C612:A3F0"), 5201));
        assert!(!lists_port(&line("00000000:1452", "00000000:0000"), 5201));
        assert!(!lists_port(head, 5201));
    }

    #[test]
    fn a_set_token_ends_a_wait_before_its_condition_is_asked() {
        let interrupt = Interrupt::default();
        interrupt.set();
        let result = until("anything", Duration::from_secs(10), &interrupt, || {
            Ok(Some(()))
        });
        assert!(matches!(result, Err(Error::Interrupted)));
    }
}
