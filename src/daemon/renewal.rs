//! Owns keeping the lease: renewed in time by the wall clock, which may be stepped; registered again after somebody
//! deleted it; written anew when what it says about this node changes. Never decides what a lost lease means.

use std::cell::Cell;
use std::future::pending;
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, mpsc};

use super::register::{patiently, time_left};
use crate::lease::{Lease, LeaseAttrs, Subnets};
use crate::store::{AcquireRequest, LeaseStore, LostTo, RenewError};

/// The wall clock is looked at this often, so that a stepped clock moves the renewal.
const CLOCK_CHECK: Duration = Duration::from_secs(10);

/// The wait after a renewal, also one that failed; specification section 5.5.
const RENEW_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Wait after the configuration turned out to be invalid while registering again.
const REGISTER_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What the keeper of the lease is told.
pub(super) enum Order {
    /// The store says that the lease is gone.
    Lost(LostTo),
    /// Say this about the node from now on.
    Publish(LeaseAttrs),
}

/// What others may see of the lease.
#[derive(Default)]
pub(super) struct Held {
    /// When it ends; none for a reservation.
    pub(super) expires: Cell<Option<SystemTime>>,
    /// It was deleted, and is not registered again yet.
    pub(super) lost: Cell<bool>,
    pub(super) renewals: Cell<u64>,
    pub(super) failures: Cell<u64>,
    pub(super) reacquired: Cell<u64>,
    /// Whoever tells of the lease has something else to tell.
    changed: Notify,
}

impl Held {
    fn set_lost(&self, lost: bool) {
        self.lost.set(lost);
        self.changed.notify_one();
    }

    /// Returns when the lease was lost, or registered again, since the last call.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// How the keeping ended.
pub(super) enum End {
    /// Another node has it.
    Lost(LostTo),
    /// It was deleted, and what we got instead is something else.
    Moved(Subnets),
}

/// Keeps the lease for ever; returns when the node has to move.
pub(super) async fn keep(
    store: &impl LeaseStore,
    mut lease: Lease,
    margin: Duration,
    held: &Held,
    mut orders: mpsc::UnboundedReceiver<Order>,
) -> End {
    held.expires.set(lease.expires);
    loop {
        let to = tokio::select! {
            to = renewed_until_lost(store, &mut lease, margin, held) => to,
            order = next_order(&mut orders) => match order {
                Order::Lost(to) => to,
                Order::Publish(attrs) => match publish(store, &mut lease, attrs, held).await {
                    None => continue,
                    Some(to) => to,
                },
            }
        };
        match to {
            LostTo::Node(_) => return End::Lost(to),
            LostTo::Nobody => {}
        }
        held.set_lost(true);
        tracing::warn!("lease {} was deleted: registering it again", lease.subnets);
        let again = acquire_again(store, &lease).await;
        if again.subnets != lease.subnets {
            return End::Moved(again.subnets);
        }
        lease = again;
        held.set_lost(false);
        held.reacquired.set(held.reacquired.get() + 1);
        held.expires.set(lease.expires);
        tracing::info!(
            "lease {} registered again, {}",
            lease.subnets,
            time_left(&lease)
        );
    }
}

async fn next_order(orders: &mut mpsc::UnboundedReceiver<Order>) -> Order {
    match orders.recv().await {
        Some(order) => order,
        None => pending().await,
    }
}

/// Acquires the subnets of `lease` again, or others if those are taken.
async fn acquire_again(store: &impl LeaseStore, lease: &Lease) -> Lease {
    let request = AcquireRequest {
        attrs: lease.attrs.clone(),
        previous: Some(lease.subnets),
        extension: lease.extension,
    };
    let mut said = String::new();
    loop {
        // What is missing meanwhile the session tells.
        match patiently("lease", |_| (), || store.acquire(request.clone())).await {
            Ok(lease) => return lease,
            Err(error) => {
                let text = error.to_string();
                if text != said {
                    tracing::error!("cannot register again: {text}");
                    said = text;
                }
            }
        }
        tokio::time::sleep(REGISTER_AGAIN_AFTER).await;
    }
}

/// Writes what the lease says about this node; to whom it is lost, if it is.
async fn publish(
    store: &impl LeaseStore,
    lease: &mut Lease,
    attrs: LeaseAttrs,
    held: &Held,
) -> Option<LostTo> {
    lease.attrs = attrs;
    let mut said = String::new();
    loop {
        match store.renew(lease).await {
            Ok(renewed) => {
                tracing::info!(
                    "lease {} says now: {}",
                    renewed.subnets,
                    renewed.attrs.to_json()
                );
                held.expires.set(renewed.expires);
                *lease = renewed;
                return None;
            }
            Err(RenewError::Lost { to, .. }) => return Some(to),
            Err(RenewError::Store(error)) => {
                let text = error.to_string();
                if text != said {
                    tracing::warn!("lease not updated, trying again: {text}");
                    said = text;
                }
            }
        }
        tokio::time::sleep(REGISTER_AGAIN_AFTER).await;
    }
}

async fn renewed_until_lost(
    store: &impl LeaseStore,
    lease: &mut Lease,
    margin: Duration,
    held: &Held,
) -> LostTo {
    loop {
        let Some(wait) = until_renewal(lease.expires, margin, SystemTime::now()) else {
            // A reservation never ends.
            return pending().await;
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
            continue;
        }
        match store.renew(lease).await {
            Ok(renewed) => {
                tracing::info!("lease {} renewed, {}", renewed.subnets, time_left(&renewed));
                held.expires.set(renewed.expires);
                held.renewals.set(held.renewals.get() + 1);
                *lease = renewed;
            }
            Err(RenewError::Lost { to, .. }) => return to,
            Err(RenewError::Store(error)) => {
                held.failures.set(held.failures.get() + 1);
                tracing::warn!("lease not renewed, trying again in {RENEW_AGAIN_AFTER:?}: {error}");
            }
        }
        // Never in a tight loop, whatever the store makes of the expiry.
        tokio::time::sleep(RENEW_AGAIN_AFTER).await;
    }
}

/// How long to wait before looking at the clock again; zero when the renewal is due, `None` for a reservation.
fn until_renewal(
    expires: Option<SystemTime>,
    margin: Duration,
    now: SystemTime,
) -> Option<Duration> {
    let due = expires?.checked_sub(margin);
    let left = due.and_then(|due| due.duration_since(now).ok());
    Some(left.unwrap_or_default().min(CLOCK_CHECK))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LocalStore;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn renewal_is_due_a_margin_before_the_end_and_the_clock_is_watched_until_then() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let end = |secs| Some(now + Duration::from_secs(secs));
        let wait = |expires, margin| until_renewal(expires, margin, now);
        assert_eq!(wait(end(24 * 3600), HOUR), Some(CLOCK_CHECK));
        assert_eq!(wait(end(3600 + 7), HOUR), Some(Duration::from_secs(7)));
        assert_eq!(wait(end(3600), HOUR), Some(Duration::ZERO));
        assert_eq!(wait(end(5), HOUR), Some(Duration::ZERO));
        assert_eq!(wait(end(67), HOUR / 60), Some(Duration::from_secs(7)));
        let longest = Duration::from_secs(1439 * 60);
        assert_eq!(wait(end(24 * 3600), longest), Some(CLOCK_CHECK));
        let past = Some(now - Duration::from_secs(1));
        assert_eq!(wait(past, HOUR), Some(Duration::ZERO));
        assert_eq!(
            wait(Some(SystemTime::UNIX_EPOCH), HOUR),
            Some(Duration::ZERO)
        );
        assert_eq!(wait(None, HOUR), None);
    }

    #[tokio::test]
    async fn whoever_tells_of_the_lease_hears_at_once_that_it_is_lost_and_that_it_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config");
        let network = r#"{"Network": "198.18.0.0/16", "Backend": {"Type": "udp"}}"#;
        std::fs::write(&config, network).unwrap();
        let store = LocalStore::new(dir.path());
        let attrs = LeaseAttrs::parse(br#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#).unwrap();
        let request = AcquireRequest {
            attrs,
            previous: None,
            extension: Default::default(),
        };
        let lease = store.acquire(request).await.unwrap();
        std::fs::remove_file(&config).unwrap();

        let held = Held::default();
        let (orders, received) = mpsc::unbounded_channel();
        orders.send(Order::Lost(LostTo::Nobody)).ok().unwrap();
        let tells = async {
            held.changed().await;
            assert!(held.lost.get());
            std::fs::write(&config, network).unwrap();
            held.changed().await;
            assert!(!held.lost.get());
        };
        tokio::select! {
            _end = keep(&store, lease, HOUR, &held, received) => unreachable!("it is kept"),
            () = tells => {}
        }
    }
}
