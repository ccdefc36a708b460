//! Owns keeping the rules in place while the daemon runs: looks when the kernel says that somebody changed
//! them, when the wanted ones change, and at an interval. Never waits on the data path, and never ends.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::kernel_events::Events;
use super::{Error, Firewall, Rules};

/// How long a burst of changes is given to end: a reload of a whole ruleset comes as thousands of notifications.
const SETTLE: Duration = Duration::from_millis(50);

/// Where changes are notified, looking at an interval only guards against what nobody foresaw.
const RARELY: Duration = Duration::from_secs(60);

/// So many repairs within [`PEACE`] are the daily business of a node; more, and two programs are at war.
const FREE_REPAIRS: u32 = 8;
const PEACE: Duration = Duration::from_secs(60);

/// flannel's `--iptables-resync`: at least one second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResyncInterval(Duration);

impl ResyncInterval {
    /// Takes a number of seconds.
    ///
    /// # Errors
    /// [`Error::ResyncInterval`] below 1, where flannel spins.
    pub fn from_secs(seconds: i64) -> Result<Self, Error> {
        match u64::try_from(seconds) {
            Ok(seconds @ 1..) => Ok(Self(Duration::from_secs(seconds))),
            _ => Err(Error::ResyncInterval(seconds)),
        }
    }

    /// The time between two looks.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }
}

/// What a keeper has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeeperStatus {
    /// How often it looked.
    pub looks: u64,
    /// How often it had to change something.
    pub repairs: u64,
    /// Why the last look or repair failed, if it did.
    pub error: Option<String>,
}

/// Keeps the rules in place.
#[derive(Debug)]
pub struct Keeper {
    firewall: Arc<Firewall>,
    events: Option<Events>,
    interval: Duration,
    /// The interval after a failure, which no notification may follow.
    retry: Duration,
    status: watch::Sender<KeeperStatus>,
    repairs: Repairs,
}

impl Keeper {
    /// Subscribes to the kernel's notifications, in the network namespace of the calling thread, where the
    /// firewall's program causes any. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Events`].
    pub fn new(firewall: Arc<Firewall>, resync: ResyncInterval) -> Result<Self, Error> {
        let interest = firewall.interest();
        let events = interest
            .map(Events::subscribe)
            .transpose()
            .map_err(Error::Events)?;
        Ok(Self {
            interval: if events.is_some() {
                resync.get().max(RARELY)
            } else {
                resync.get()
            },
            retry: resync.get(),
            firewall,
            events,
            status: watch::Sender::default(),
            repairs: Repairs::default(),
        })
    }

    /// Follows what it does.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<KeeperStatus> {
        self.status.subscribe()
    }

    /// Keeps what `rules` holds in place, first of all now, until dropped. Failures are logged, shown in the
    /// status, and tried again.
    ///
    /// # Errors
    /// [`Error::Events`] if the subscription breaks, which only a kernel without memory does.
    pub async fn run(mut self, mut rules: watch::Receiver<Rules>) -> Result<Infallible, Error> {
        loop {
            let wanted = rules.borrow_and_update().clone();
            if let Some(pause) = self.look(&wanted).await {
                // A change of what is wanted does not wait for the other program to calm down.
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = changed(&mut rules) => continue,
                }
            }
            self.wait(&mut rules).await.map_err(Error::Events)?;
        }
    }

    /// Returns when there is a reason to look.
    async fn wait(&mut self, rules: &mut watch::Receiver<Rules>) -> std::io::Result<()> {
        let failed = self.status.borrow().error.is_some();
        let interval = if failed { self.retry } else { self.interval };
        let event = async {
            match &mut self.events {
                Some(events) => events.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = event => result?,
            () = changed(rules) => return Ok(()),
            () = tokio::time::sleep(interval) => return Ok(()),
        }
        tokio::time::sleep(SETTLE).await;
        // What arrives from now on is heard after the look that follows.
        self.events.as_mut().map_or(Ok(()), Events::forget)
    }

    /// Looks and repairs; says how long to hold back before the next time.
    async fn look(&mut self, wanted: &Rules) -> Option<Duration> {
        let mut pause = None;
        let mut repaired = false;
        let outcome = match self.firewall.repair(wanted).await {
            Ok(applied) => {
                for difference in &applied.fixed {
                    info!(%difference, "traffic rules repaired");
                }
                for difference in &applied.remaining {
                    warn!(%difference, "traffic rules differ again at once");
                }
                repaired = !applied.fixed.is_empty();
                applied.tracked_because.map(|error| {
                    format!("the tunnel's datagrams are tracked as connections: {error}")
                })
            }
            Err(error) => Some(error.to_string()),
        };
        if repaired {
            pause = self.repairs.note(Instant::now());
            if let Some(pause) = pause {
                warn!(?pause, "another program keeps changing our traffic rules");
            }
        }
        let before = self.status.borrow().error.clone();
        match &outcome {
            // Once, and not at every look.
            Some(reason) if before != outcome => error!(%reason, "traffic rules are incomplete"),
            Some(reason) => debug!(%reason, "traffic rules are still incomplete"),
            None => {}
        }
        self.status.send_modify(|status| {
            status.looks += 1;
            status.repairs += u64::from(repaired);
            status.error = outcome;
        });
        pause
    }
}

/// Returns when something else is wanted. If nobody can want anything any more, what is wanted stays.
async fn changed(rules: &mut watch::Receiver<Rules>) {
    if rules.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Slows down a keeper that another program fights with, so that neither eats the node's CPU.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    count: u32,
    last: Option<Instant>,
}

impl Repairs {
    /// Counts a repair; returns how long to hold back, doubling from one second up to [`PEACE`].
    pub(super) fn note(&mut self, now: Instant) -> Option<Duration> {
        if self.last.is_some_and(|last| now - last > PEACE * 2) {
            self.count = 0;
        }
        self.last = Some(now);
        self.count = self.count.saturating_add(1);
        let over = self.count.checked_sub(FREE_REPAIRS + 1)?;
        let seconds = 1u64.checked_shl(over).unwrap_or(u64::MAX);
        Some(Duration::from_secs(seconds).min(PEACE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_that_would_spin_is_refused() {
        for seconds in [i64::MIN, -1, 0] {
            let error = ResyncInterval::from_secs(seconds).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains(&format!("--iptables-resync={seconds}"))
            );
        }
        let five = ResyncInterval::from_secs(5).unwrap();
        assert_eq!(five.get(), Duration::from_secs(5));
    }

    #[test]
    fn a_war_over_the_rules_slows_down_and_peace_forgives() {
        let mut repairs = Repairs::default();
        let start = Instant::now();
        for _ in 0..FREE_REPAIRS {
            assert_eq!(repairs.note(start), None);
        }
        let pauses: Vec<_> = (0..8)
            .map(|_| repairs.note(start).unwrap().as_secs())
            .collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(repairs.note(start + PEACE * 3), None);
    }

    #[test]
    fn a_very_long_war_does_not_overflow() {
        let mut repairs = Repairs {
            count: u32::MAX - 1,
            last: None,
        };
        let now = Instant::now();
        assert_eq!(repairs.note(now), Some(PEACE));
        assert_eq!(repairs.note(now), Some(PEACE));
    }
}
