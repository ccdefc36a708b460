//! Owns who holds what: acquiring and renewing by compare-and-swap. Every write is conditional on what was read
//! before; nothing is ever overwritten blindly.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse};

use super::Inner;
use super::cluster::Connection;
use super::entry::{Entry, entries, get, list};
use super::extension;
use super::failure::{Failure, FailureCause};
use super::keys::Keys;
use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseAttrs, LeaseExtension, Subnets};
use crate::store::allocator::{Kept, allocate, compatible, exceeds_share};
use crate::store::backoff::Backoff;
use crate::store::random::random_below;
use crate::store::{AcquireRequest, LEASE_TTL, LostTo, RenewError, StoreError};

/// How often others may be faster before it is an error; specification section 5.4.
const ATTEMPTS: u32 = 10;

/// What this node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Own {
    pub(super) subnets: Subnets,
    pub(super) node: IpAddr,
    attrs: LeaseAttrs,
    extension: LeaseExtension,
    /// Zero for a reservation.
    pub(super) etcd_lease: i64,
    expires: Option<SystemTime>,
}

impl Own {
    pub(super) fn lease(&self) -> Lease {
        Lease {
            subnets: self.subnets,
            attrs: self.attrs.clone(),
            expires: self.expires,
            extension: self.extension,
        }
    }
}

/// What one conditional write led to.
enum Written {
    Done(Own),
    /// The condition no longer holds.
    Outrun,
}

/// How a lease is to be written.
struct Draft<'a> {
    subnets: Subnets,
    node: IpAddr,
    attrs: &'a LeaseAttrs,
    extension: LeaseExtension,
    condition: Compare,
    permanent: bool,
}

/// Leases subnets for the node; [`LeaseStore::acquire`](crate::store::LeaseStore::acquire).
pub(super) async fn acquire(
    inner: &Inner,
    config: &NetworkConfig,
    request: &AcquireRequest,
    node: IpAddr,
) -> Result<Own, StoreError> {
    // Those who lost the same race do not meet again at once.
    let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(500));
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            tokio::time::sleep(backoff.pause()).await;
        }
        let connection = inner.cluster.connection().await?;
        if let Written::Done(own) = attempt_once(inner, &connection, config, request, node).await? {
            return Ok(own);
        }
    }
    Err(StoreError::Contended { attempts: ATTEMPTS })
}

async fn attempt_once(
    inner: &Inner,
    connection: &Connection,
    config: &NetworkConfig,
    request: &AcquireRequest,
    node: IpAddr,
) -> Result<Written, StoreError> {
    let entries = list(inner, connection).await?;
    // By the node's address, or by the subnets of the run before, when the network had another family and the node
    // another first address.
    let is_ours = |entry: &&Entry| {
        let shares = |attrs: &LeaseAttrs| request.attrs.shares_address(attrs);
        let before = request.previous == Some(entry.subnets);
        entry.node() == Some(node) || (before && entry.attrs.as_ref().is_some_and(shares))
    };
    let mut mine: Vec<&Entry> = entries.iter().filter(is_ours).collect();
    // A reservation, else the subnets of the run before, else the earliest claim.
    mine.sort_by_key(|entry| {
        (
            entry.etcd_lease != 0,
            Some(entry.subnets) != request.previous,
            entry.create_revision,
        )
    });
    let mut held: Option<&Entry> = None;
    let mut given_back = Vec::new();
    for entry in mine {
        let fits = compatible(config, &entry.subnets) && !entry.is_beaten(&entries);
        if held.is_none() && fits {
            held = Some(entry);
        } else if entry.etcd_lease == 0 {
            tracing::warn!(key = %entry.subnets,
                "a reservation for this node does not fit the network or other leases");
        } else if withdraw(inner, connection, entry).await? {
            given_back.push(entry.subnets);
        } else {
            return Ok(Written::Outrun);
        }
    }
    let draft = |subnets, condition, permanent| Draft {
        subnets,
        node,
        attrs: &request.attrs,
        extension: request.extension,
        condition,
        permanent,
    };
    if let Some(entry) = held {
        let condition = unchanged(&inner.keys, entry);
        let draft = draft(entry.subnets, condition, entry.etcd_lease == 0);
        if draft.permanent && entry.attrs.as_ref() == Some(draft.attrs) {
            return Ok(Written::Done(Own::of(&draft, 0, None)));
        }
        return Ok(write(inner, connection, &draft).await?);
    }

    let others = || {
        entries
            .iter()
            .filter(|entry| !given_back.contains(&entry.subnets))
    };
    let taken: Vec<Subnets> = others().map(|entry| entry.subnets).collect();
    // Without what can be read and is refused by everybody.
    let stands = |entry: &&Entry| entry.attrs.is_none() || !exceeds_share(config, &entry.subnets);
    let standing: Vec<Subnets> = others().filter(stands).map(|e| e.subnets).collect();
    // What was given back may fit in one family.
    let previous = request.previous.or(given_back.first().copied());
    let kept = Kept::of(config, previous, &standing);
    let subnets = allocate(config, kept, &taken, random_below)
        .or_else(|full| allocate(config, kept, &standing, random_below).map_err(|_too| full))?;
    let absent = Compare::version(inner.keys.lease(&subnets), CompareOp::Equal, 0);
    Ok(write(inner, connection, &draft(subnets, absent, false)).await?)
}

/// Extends our lease; [`LeaseStore::renew`](crate::store::LeaseStore::renew).
pub(super) async fn renew(inner: &Inner, lease: &Lease) -> Result<Own, RenewError> {
    let node = lease.attrs.node().ok_or(StoreError::NoPublicIp)?;
    let lost = |to| RenewError::Lost {
        subnets: lease.subnets,
        to,
    };
    for _ in 0..ATTEMPTS {
        let connection = inner.cluster.connection().await.map_err(StoreError::from)?;
        let found = get(inner, &connection, &lease.subnets).await;
        let Some(entry) = found.map_err(StoreError::from)? else {
            return Err(lost(LostTo::Nobody));
        };
        // A value that cannot be read says nothing about another owner: ours takes its place.
        // What we wrote ourselves may name an address that we had before.
        let other = entry.node().filter(|other| *other != node);
        if let Some(other) = other.filter(|_| !inner.is_ours(entry.etcd_lease)) {
            return Err(lost(LostTo::Node(other)));
        }
        let draft = Draft {
            subnets: lease.subnets,
            node,
            attrs: &lease.attrs,
            extension: lease.extension,
            condition: unchanged(&inner.keys, &entry),
            permanent: entry.etcd_lease == 0,
        };
        if draft.permanent && entry.attrs.as_ref() == Some(draft.attrs) {
            return Ok(Own::of(&draft, 0, None));
        }
        let written = write(inner, &connection, &draft).await;
        if let Written::Done(own) = written.map_err(StoreError::from)? {
            return Ok(own);
        }
    }
    Err(StoreError::Contended { attempts: ATTEMPTS }.into())
}

/// Who holds our subnets now; `None` if it is still us.
pub(super) async fn lost_to(
    inner: &Inner,
    connection: &Connection,
    own: &Own,
) -> Result<Option<LostTo>, Failure> {
    Ok(match get(inner, connection, &own.subnets).await? {
        None => Some(LostTo::Nobody),
        Some(entry) => entry
            .node()
            .filter(|node| *node != own.node && !inner.is_ours(entry.etcd_lease))
            .map(LostTo::Node),
    })
}

impl Own {
    fn of(draft: &Draft<'_>, etcd_lease: i64, expires: Option<SystemTime>) -> Self {
        Self {
            subnets: draft.subnets,
            node: draft.node,
            attrs: draft.attrs.clone(),
            extension: draft.extension,
            etcd_lease,
            expires,
        }
    }
}

fn unchanged(keys: &Keys, entry: &Entry) -> Compare {
    let key = keys.lease(&entry.subnets);
    Compare::mod_revision(key, CompareOp::Equal, entry.mod_revision)
}

/// Gives back a lease of ours that does not fit any more. False if it has changed since it was read.
async fn withdraw(inner: &Inner, connection: &Connection, entry: &Entry) -> Result<bool, Failure> {
    let key = inner.keys.lease(&entry.subnets);
    let txn = Txn::new()
        .when([unchanged(&inner.keys, entry)])
        .and_then([TxnOp::delete(key, None)]);
    let mut kv = connection.kv();
    Ok(connection.call(kv.txn(txn)).await?.succeeded())
}

/// Writes a lease under its condition, with a new etcd lease unless it is permanent.
async fn write(
    inner: &Inner,
    connection: &Connection,
    draft: &Draft<'_>,
) -> Result<Written, Failure> {
    if draft.permanent {
        let done = commit(inner, connection, draft, 0).await?;
        return Ok(if done {
            Written::Done(Own::of(draft, 0, None))
        } else {
            Written::Outrun
        });
    }
    // Before it is granted: our lease never seems to last longer than it does.
    let asked = SystemTime::now();
    let ttl = i64::try_from(LEASE_TTL.as_secs()).unwrap_or(i64::MAX);
    let mut leases = connection.leases();
    let grant = connection.call(leases.grant(ttl, None)).await?;
    // Before it is used: the watch must know our own writes.
    inner.granted(grant.id());
    let outcome = commit(inner, connection, draft, grant.id()).await;
    if matches!(outcome, Ok(true)) {
        let granted = Duration::from_secs(u64::try_from(grant.ttl()).unwrap_or_default());
        let own = Own::of(draft, grant.id(), Some(asked + granted));
        return Ok(Written::Done(own));
    }
    // Takes what may have been written with it. If this fails too, etcd does it after the lease's time.
    if let Err(error) = connection.call(leases.revoke(grant.id())).await {
        tracing::debug!(%error, "a lease that was granted in vain stays for its time");
    }
    outcome.map(|_| Written::Outrun)
}

/// Writes the keys of a lease in one piece. False if the condition does not hold, or if somebody else claimed an
/// overlapping key before us: then ours must go.
async fn commit(
    inner: &Inner,
    connection: &Connection,
    draft: &Draft<'_>,
    etcd_lease: i64,
) -> Result<bool, Failure> {
    let beside = extension::to_json(draft.extension).filter(|_| inner.extensions_allowed());
    if let Some(json) = beside {
        match commit_with(inner, connection, draft, etcd_lease, Some(json)).await {
            Err(Failure {
                cause: FailureCause::PermissionDenied(_),
                ..
            }) => inner.forbid_extensions(),
            outcome => return outcome,
        }
    }
    commit_with(inner, connection, draft, etcd_lease, None).await
}

async fn commit_with(
    inner: &Inner,
    connection: &Connection,
    draft: &Draft<'_>,
    etcd_lease: i64,
    extension: Option<String>,
) -> Result<bool, Failure> {
    let keys = &inner.keys;
    let put = |key, value| TxnOp::put(key, value, Some(PutOptions::new().with_lease(etcd_lease)));
    let mut operations = vec![put(keys.lease(&draft.subnets), draft.attrs.to_json())];
    operations.extend(extension.map(|json| put(keys.extension(&draft.subnets), json)));
    // Two keys can differ and still overlap, which no condition on one key can see. The listing is of the very
    // moment of our write, so of two that overlap exactly the later one sees the other.
    let listing = GetOptions::new().with_prefix().with_keys_only();
    operations.push(TxnOp::get(keys.subnets(), Some(listing)));
    let txn = Txn::new()
        .when([draft.condition.clone()])
        .and_then(operations);
    let mut kv = connection.kv();
    let answer = connection.call(kv.txn(txn)).await?;
    if !answer.succeeded() {
        return Ok(false);
    }
    let mut present = Vec::new();
    for operation in answer.op_responses() {
        if let TxnOpResponse::Get(listing) = operation {
            present = entries(keys, listing.kvs());
        }
    }
    let ours = present.iter().find(|entry| entry.subnets == draft.subnets);
    let earlier = |entry: &&Entry| {
        entry.subnets != draft.subnets
            && entry.subnets.overlaps(&draft.subnets)
            && !entry.subnets.is_larger_than(&draft.subnets)
            && ours.is_none_or(|ours| entry.create_revision < ours.create_revision)
    };
    // What was held before stays held: only a new claim gives way.
    let is_new = ours.is_some_and(|ours| ours.create_revision == ours.mod_revision);
    Ok(!(is_new && present.iter().any(|entry| earlier(&entry))))
}
