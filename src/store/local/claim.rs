//! Owns acquiring and renewing. Everything that writes is called with the lock held. Never waits, never reads a clock.

use std::net::IpAddr;
use std::path::Path;
use std::time::SystemTime;

use super::files;
use super::own::{Own, Standing, standing};
use super::scan::{Entry, Listing, Record, Scanner};
use super::sidecar::{nanoseconds, whole_seconds};
use super::{EXPIRY, SUBNETS};
use crate::config::NetworkConfig;
use crate::lease::{Lease, Subnets};
use crate::store::allocator::{Kept, allocate, compatible, exceeds_share};
use crate::store::{AcquireRequest, LEASE_TTL, LostTo, RenewError, StoreError};

/// How often a claim is tried anew after somebody without the lock was faster.
const ATTEMPTS: u32 = 10;

/// Leases subnets for the node; [`LeaseStore::acquire`](crate::store::LeaseStore::acquire).
pub(super) fn acquire(
    dir: &Path,
    config: &NetworkConfig,
    request: &AcquireRequest,
    node: IpAddr,
    now: SystemTime,
    mut choose: impl FnMut(usize) -> usize,
) -> Result<Own, StoreError> {
    files::make_dir(&dir.join(SUBNETS))?;
    files::make_dir(&dir.join(EXPIRY))?;
    // The usual restart: what we had is still ours. Looks only at what could speak against it.
    if let Some(previous) = request.previous {
        let near = Scanner::default()
            .scan_near(dir, &previous)
            .map_err(files::unavailable(dir))?;
        let ours = |entry: &Entry| matches!(entry, Entry::Lease(record) if is_ours(record, &previous, request, node));
        if near.get(&previous).is_some_and(ours)
            && let (Some(own), _) = reuse(dir, config, request, node, &near, now)?
        {
            return Ok(own);
        }
    }
    for _ in 0..ATTEMPTS {
        let mut listing = list(dir)?;
        let (held, given_back) = reuse(dir, config, request, node, &listing, now)?;
        if let Some(own) = held {
            return Ok(own);
        }
        // It may fit in one family.
        let previous = request.previous.or_else(|| given_back.first().copied());
        listing.entries.retain(|key, _| !given_back.contains(key));
        let subnets = choose_free(config, previous, &listing, now, &mut choose)?;
        let own = Own {
            subnets,
            node,
            attrs: request.attrs.clone(),
            extension: request.extension,
            claimed: nanoseconds(now),
            expires: Some(whole_seconds(now + LEASE_TTL)),
        };
        // What overlaps the choice has expired, or claims more than anybody may have and is not ours to remove.
        let expired = listing.iter().filter(|(key, entry)| {
            key.overlaps(&subnets) && (entry.is_expired(now) || **key == subnets)
        });
        for (key, _) in expired {
            remove(dir, key)?;
        }
        write_sidecar(dir, &own)?;
        let (name, value) = (subnets.to_string(), own.attrs.to_json());
        if files::create(&dir.join(SUBNETS), &name, value.as_bytes())? {
            return Ok(own);
        }
    }
    Err(StoreError::Contended { attempts: ATTEMPTS })
}

/// Takes up what is the node's already: a reservation, else the subnets of the run before, else the earliest
/// claim. Whatever else the node has is given back, so that peers do not route to a subnet nobody serves; the
/// second half of the answer.
fn reuse(
    dir: &Path,
    config: &NetworkConfig,
    request: &AcquireRequest,
    node: IpAddr,
    listing: &Listing,
    now: SystemTime,
) -> Result<(Option<Own>, Vec<Subnets>), StoreError> {
    let mut mine: Vec<(Subnets, Option<&Record>, Own)> = Vec::new();
    for (key, entry) in listing.iter() {
        let (record, sidecar) = match entry {
            Entry::Lease(record) if is_ours(record, key, request, node) => {
                (Some(record), record.sidecar)
            }
            Entry::Damaged {
                node: Some(named),
                sidecar,
                ..
            } if *named == node => (None, *sidecar),
            // The run before ended while it wrote its new public IP.
            Entry::Half { sidecar, .. }
                if sidecar.owner == node && request.previous == Some(*key) =>
            {
                (None, Some(*sidecar))
            }
            Entry::Lease(_) | Entry::Damaged { .. } | Entry::Half { .. } => continue,
        };
        // A lease whose sidecar is damaged is no reservation; its time starts anew.
        let fresh = Some(whole_seconds(now + LEASE_TTL));
        let expires = record.map_or_else(|| sidecar.map_or(fresh, |s| s.expires), Record::expires);
        let own = Own {
            subnets: *key,
            node,
            attrs: request.attrs.clone(),
            extension: request.extension,
            claimed: sidecar.map_or_else(|| nanoseconds(now), |s| s.claimed),
            expires,
        };
        mine.push((*key, record, own));
    }
    mine.sort_by_key(|(key, _, own)| {
        (
            own.expires.is_some(),
            Some(*key) != request.previous,
            own.claimed,
            *key,
        )
    });

    let (mut held, mut given_back) = (None, Vec::new());
    for (key, record, own) in mine {
        let lost = matches!(standing(&own, listing, now), Standing::Lost(_));
        if held.is_none() && !lost && compatible(config, &key) {
            held = Some(take_up(dir, own, record, now)?);
        } else if own.expires.is_some() {
            remove(dir, &key)?;
            given_back.push(key);
        } else {
            tracing::warn!(%key, "a reservation for this node does not fit the network or other leases");
        }
    }
    Ok((held, given_back))
}

/// Whether a lease is this node's: it names the node, or it is that of the run before, when the network had another
/// family and the node another first address.
fn is_ours(record: &Record, key: &Subnets, request: &AcquireRequest, node: IpAddr) -> bool {
    record.node == node
        || (request.previous == Some(*key) && request.attrs.shares_address(&record.attrs))
}

/// Makes the files of a lease that is ours say what we want, if they do not yet. Most restarts write nothing.
fn take_up(
    dir: &Path,
    own: Own,
    record: Option<&Record>,
    now: SystemTime,
) -> Result<Own, StoreError> {
    let half_over = own.expires.is_some_and(|at| at <= now + LEASE_TTL / 2);
    let own = if half_over { own.extended(now) } else { own };
    if record.and_then(|record| record.sidecar) != Some(own.sidecar()) {
        write_sidecar(dir, &own)?;
    }
    if record.map(|record| &record.attrs) != Some(&own.attrs) {
        write_lease(dir, &own)?;
    }
    Ok(own)
}

/// The subnets of the run before as far as they are free, else free ones that nobody ever leased, else such whose
/// lease has expired: with a wrong clock, everybody's seems to have.
fn choose_free(
    config: &NetworkConfig,
    previous: Option<Subnets>,
    listing: &Listing,
    now: SystemTime,
    mut choose: impl FnMut(usize) -> usize,
) -> Result<Subnets, StoreError> {
    let entries = || listing.iter();
    let live = || entries().filter(|(_, entry)| !entry.is_expired(now));
    // Without what can be read and is refused by everybody.
    let standing: Vec<Subnets> = live()
        .filter(|(key, entry)| !matches!(entry, Entry::Lease(_)) || !exceeds_share(config, key))
        .map(|(key, _)| *key)
        .collect();
    let kept = Kept::of(config, previous, &standing);
    let ever: Vec<Subnets> = entries().map(|(key, _)| *key).collect();
    let held: Vec<Subnets> = live().map(|(key, _)| *key).collect();
    allocate(config, kept, &ever, &mut choose)
        .or_else(|_full| allocate(config, kept, &held, &mut choose))
        .or_else(|full| allocate(config, kept, &standing, &mut choose).map_err(|_too| full))
}

/// Extends our lease and has it say what `wanted` says; [`LeaseStore::renew`](crate::store::LeaseStore::renew).
/// `own` is what we believe to hold. The node may have another public IP by now: what was held before is held on,
/// by the new one, with the time of its claim. Leases of others that name the new public IP stay as they are.
pub(super) fn renew(
    dir: &Path,
    own: &Own,
    wanted: &Lease,
    now: SystemTime,
) -> Result<Own, RenewError> {
    let node = wanted.attrs.node().ok_or(StoreError::NoPublicIp)?;
    let lost = |to| RenewError::Lost {
        subnets: own.subnets,
        to,
    };
    match standing(own, &list(dir)?, now) {
        Standing::Lost(node) => {
            give_up(dir, own)?;
            Err(lost(LostTo::Node(node)))
        }
        Standing::Missing => Err(lost(LostTo::Nobody)),
        Standing::Unsettled(node) => Err(RenewError::Store(StoreError::Unusable(super::half(
            dir, own, node,
        )))),
        standing @ (Standing::Held | Standing::Overwritten) => {
            let renewed = Own {
                node,
                attrs: wanted.attrs.clone(),
                extension: wanted.extension,
                ..own.extended(now)
            };
            if standing == Standing::Held && renewed.attrs == own.attrs {
                write_sidecar(dir, &renewed)?;
            } else {
                write(dir, &renewed)?;
            }
            Ok(renewed)
        }
    }
}

/// Removes what is left of a lease that we lost, so that nobody takes it for a rival claim. A reservation is the
/// operator's.
pub(super) fn give_up(dir: &Path, own: &Own) -> Result<(), StoreError> {
    let still_ours = |entry: &Entry| matches!(entry, Entry::Lease(r) if r.node == own.node);
    let listing = list(dir)?;
    if own.expires.is_some() && listing.get(&own.subnets).is_some_and(still_ours) {
        remove(dir, &own.subnets)?;
    }
    Ok(())
}

/// Our lease as the directory has it, for a lease that another value of the store acquired.
pub(super) fn adopt(dir: &Path, lease: &Lease) -> Result<Option<Own>, StoreError> {
    let listing = list(dir)?;
    Ok(match (listing.get(&lease.subnets), lease.attrs.node()) {
        (Some(Entry::Lease(record)), Some(node)) if record.node == node => Some(Own {
            subnets: lease.subnets,
            node,
            attrs: lease.attrs.clone(),
            extension: lease.extension,
            claimed: record.claim().0,
            expires: record.expires(),
        }),
        _ => None,
    })
}

/// Reads the whole directory.
pub(super) fn list(dir: &Path) -> Result<Listing, StoreError> {
    Scanner::default()
        .scan(dir)
        .map_err(files::unavailable(dir))
}

/// Writes both files of our lease: the sidecar first, so that whoever sees the lease also sees until when it
/// lasts.
pub(super) fn write(dir: &Path, own: &Own) -> Result<(), StoreError> {
    files::make_dir(&dir.join(EXPIRY))?;
    write_sidecar(dir, own)?;
    write_lease(dir, own)
}

fn write_sidecar(dir: &Path, own: &Own) -> Result<(), StoreError> {
    let json = own.sidecar().to_json();
    files::replace(&dir.join(EXPIRY), &own.subnets.to_string(), json.as_bytes())
}

fn write_lease(dir: &Path, own: &Own) -> Result<(), StoreError> {
    let json = own.attrs.to_json();
    files::replace(
        &dir.join(SUBNETS),
        &own.subnets.to_string(),
        json.as_bytes(),
    )
}

/// The lease first: a sidecar alone means nothing, a lease alone is a reservation.
fn remove(dir: &Path, key: &Subnets) -> Result<(), StoreError> {
    files::remove(&dir.join(SUBNETS), &key.to_string())?;
    files::remove(&dir.join(EXPIRY), &key.to_string())
}
