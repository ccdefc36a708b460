//! Owns when a lease is renewed: by the wall clock, which may be stepped. Never decides what a lost lease means.

use std::cell::Cell;
use std::future::pending;
use std::time::{Duration, SystemTime};

use super::register::time_left;
use crate::lease::Lease;
use crate::store::{LeaseStore, LostTo, RenewError};

/// A lease is renewed this long before it ends; flannel's default margin.
const RENEW_MARGIN: Duration = Duration::from_secs(60 * 60);

/// The wall clock is looked at this often, so that a stepped clock moves the renewal; also the wait after a
/// renewal that failed.
const RENEW_CHECK: Duration = Duration::from_secs(60);

/// Renews the lease for ever; returns when it is lost. `expires` is what status shows.
pub(super) async fn keep_renewed(
    store: &impl LeaseStore,
    mut lease: Lease,
    expires: &Cell<Option<SystemTime>>,
) -> LostTo {
    loop {
        let Some(wait) = until_renewal(lease.expires, SystemTime::now()) else {
            // A reservation never ends.
            return pending().await;
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
            continue;
        }
        match store.renew(&lease).await {
            Ok(renewed) => {
                tracing::info!("lease {} renewed, {}", renewed.subnets, time_left(&renewed));
                expires.set(renewed.expires);
                lease = renewed;
            }
            Err(RenewError::Lost { to, .. }) => return to,
            Err(RenewError::Store(error)) => {
                tracing::warn!("lease not renewed, trying again in {RENEW_CHECK:?}: {error}");
            }
        }
        // Never in a tight loop, whatever the store makes of the expiry.
        tokio::time::sleep(RENEW_CHECK).await;
    }
}

/// How long to wait before looking at the clock again; zero when the renewal is due, `None` for a reservation.
fn until_renewal(expires: Option<SystemTime>, now: SystemTime) -> Option<Duration> {
    let due = expires?.checked_sub(RENEW_MARGIN);
    let left = due.and_then(|due| due.duration_since(now).ok());
    Some(left.unwrap_or_default().min(RENEW_CHECK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_an_hour_before_the_end_and_the_clock_is_watched_until_then() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let end = |secs| Some(now + Duration::from_secs(secs));
        assert_eq!(until_renewal(end(24 * 3600), now), Some(RENEW_CHECK));
        assert_eq!(
            until_renewal(end(3600 + 7), now),
            Some(Duration::from_secs(7))
        );
        assert_eq!(until_renewal(end(3600), now), Some(Duration::ZERO));
        assert_eq!(until_renewal(end(5), now), Some(Duration::ZERO));
        assert_eq!(
            until_renewal(Some(now - Duration::from_secs(1)), now),
            Some(Duration::ZERO)
        );
        assert_eq!(
            until_renewal(Some(SystemTime::UNIX_EPOCH), now),
            Some(Duration::ZERO)
        );
        assert_eq!(until_renewal(None, now), None);
    }
}
