//! Owns reading the keys where leases are, as somebody who wants one has to see them: with their revisions. Never writes.

use std::net::IpAddr;

use etcd_client::{GetOptions, KeyValue};

use super::Inner;
use super::cluster::Connection;
use super::failure::Failure;
use super::keys::{Keys, Meaning};
use crate::lease::{KeyError, LeaseAttrs, Subnets};

/// A key where leases are.
pub(super) struct Entry {
    pub(super) subnets: Subnets,
    /// None if the value is not a lease value, or was not asked for.
    pub(super) attrs: Option<LeaseAttrs>,
    pub(super) etcd_lease: i64,
    pub(super) create_revision: i64,
    pub(super) mod_revision: i64,
}

impl Entry {
    /// Other spellings of a key count too: somebody took these addresses.
    fn read(keys: &Keys, kv: &KeyValue) -> Option<Self> {
        let subnets = match keys.meaning(kv.key()) {
            Meaning::Lease(subnets) => subnets,
            Meaning::NoLease(_, KeyError::NotCanonical { canonical }) => canonical,
            Meaning::NoLease(..) | Meaning::Extension(_) | Meaning::Foreign => return None,
        };
        let canonical = kv.key() == keys.lease(&subnets).as_bytes();
        Some(Self {
            subnets,
            attrs: LeaseAttrs::parse(kv.value()).ok().filter(|_| canonical),
            etcd_lease: kv.lease(),
            create_revision: kv.create_revision(),
            mod_revision: kv.mod_revision(),
        })
    }

    pub(super) fn node(&self) -> Option<IpAddr> {
        self.attrs.as_ref().and_then(LeaseAttrs::node)
    }

    /// Whether somebody else claimed a part of it earlier. A claim larger than ours is one that every node refuses.
    pub(super) fn is_beaten(&self, all: &[Self]) -> bool {
        all.iter().any(|other| {
            other.create_revision < self.create_revision
                && other.subnets.overlaps(&self.subnets)
                && (other.attrs.is_none() || !other.subnets.is_larger_than(&self.subnets))
                && other.node() != self.node()
        })
    }
}

pub(super) async fn list(inner: &Inner, connection: &Connection) -> Result<Vec<Entry>, Failure> {
    let (mut kv, options) = (connection.kv(), GetOptions::new().with_prefix());
    let listing = connection
        .call(kv.get(inner.keys.subnets(), Some(options)))
        .await?;
    Ok(entries(&inner.keys, listing.kvs()))
}

pub(super) fn entries(keys: &Keys, kvs: &[KeyValue]) -> Vec<Entry> {
    kvs.iter().filter_map(|kv| Entry::read(keys, kv)).collect()
}

pub(super) async fn get(
    inner: &Inner,
    connection: &Connection,
    subnets: &Subnets,
) -> Result<Option<Entry>, Failure> {
    let mut kv = connection.kv();
    let answer = connection
        .call(kv.get(inner.keys.lease(subnets), None))
        .await?;
    Ok(answer
        .kvs()
        .first()
        .and_then(|kv| Entry::read(&inner.keys, kv)))
}
