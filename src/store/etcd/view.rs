//! Owns what the keys mean to a watcher: the last good state of every lease, and what is wrong. Pure: keys and
//! times are handed in. Never talks to etcd, never reads a clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use super::extension;
use super::keys::{Keys, Meaning};
use super::problems::Problems;
use crate::lease::{Lease, LeaseAttrs, LeaseDelta, LeaseExtension, Subnets};
use crate::store::{Cause, LEASE_TTL};

/// How long leases that went with the data of the store are kept, for their nodes to register again. Nodes that
/// watch do so within seconds.
pub(super) const GRACE: Duration = Duration::from_secs(60);

/// The most characters of a key that are shown.
const SHOWN: usize = 200;

/// A key and what etcd knows about it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item<'a> {
    pub(super) key: &'a [u8],
    pub(super) value: &'a [u8],
    /// Zero for a key that never expires.
    pub(super) etcd_lease: i64,
    pub(super) mod_revision: i64,
}

/// What happened to a key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change<'a> {
    Put(Item<'a>),
    Delete { key: &'a [u8] },
}

/// When it is: by the wall clock, which leases end by, and by one that is never stepped.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    pub(super) wall: SystemTime,
    pub(super) monotonic: Duration,
}

/// A history of a store: a position in it, and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) cluster: u64,
    pub(super) revision: i64,
}

/// By what a state of the store is told from another: how many lease keys there are, and which changed last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fingerprint {
    pub(super) count: usize,
    pub(super) newest: Vec<u8>,
    pub(super) mod_revision: i64,
}

#[derive(Debug)]
struct Record {
    attrs: LeaseAttrs,
    expires: Option<SystemTime>,
    mod_revision: i64,
    /// Until when it is kept although the store lost it.
    orphaned: Option<Duration>,
}

/// What the watcher knows.
#[derive(Debug)]
pub(super) struct View {
    keys: Keys,
    at: Option<Position>,
    records: BTreeMap<Subnets, Record>,
    extensions: BTreeMap<Subnets, (i64, LeaseExtension)>,
    /// Every key where leases are, good or bad, with the revision of its last change.
    stored: BTreeMap<Vec<u8>, i64>,
    problems: Problems,
    /// Whether a record may be orphaned.
    orphans: bool,
}

impl View {
    pub(super) const fn new(keys: Keys) -> Self {
        Self {
            keys,
            at: None,
            records: BTreeMap::new(),
            extensions: BTreeMap::new(),
            stored: BTreeMap::new(),
            problems: Problems::new(),
            orphans: false,
        }
    }

    /// Up to where the history of the store is known.
    pub(super) const fn position(&self) -> Option<Position> {
        self.at
    }

    /// What the store must look like at [`Self::position`]; `None` if it tells nothing.
    pub(super) fn fingerprint(&self) -> Option<Fingerprint> {
        let (key, revision) = self.stored.iter().max_by_key(|&(_, revision)| *revision)?;
        Some(Fingerprint {
            count: self.stored.len(),
            newest: key.clone(),
            mod_revision: *revision,
        })
    }

    /// The leases, in the order of their keys.
    pub(super) fn leases(&self) -> Vec<Lease> {
        let all = self.records.keys();
        all.filter_map(|subnets| self.lease(subnets)).collect()
    }

    /// How many leases there are.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// One lease. Its end is the latest possible, unless it never ends: only etcd knows exactly.
    pub(super) fn lease(&self, subnets: &Subnets) -> Option<Lease> {
        let record = self.records.get(subnets)?;
        // Both are written at once, so an extension of another revision is not of this lease.
        let extension = self.extensions.get(subnets);
        let extension = extension.filter(|(revision, _)| *revision == record.mod_revision);
        Some(Lease {
            subnets: *subnets,
            attrs: record.attrs.clone(),
            expires: record.expires,
            extension: extension
                .map(|(_, extension)| *extension)
                .unwrap_or_default(),
        })
    }

    /// Whether `subnets` is leased, and the store has not lost that.
    pub(super) fn holds(&self, subnets: &Subnets) -> Option<&LeaseAttrs> {
        let record = self.records.get(subnets)?;
        record.orphaned.is_none().then_some(&record.attrs)
    }

    /// Whether the value under the key of `subnets` cannot be read.
    pub(super) fn is_damaged(&self, subnets: &Subnets) -> bool {
        let key = self.keys.lease(subnets);
        self.problems.concern(&shown(key.as_bytes()))
    }

    /// Takes over a complete listing; returns what is newly wrong or solved.
    ///
    /// Leases that it lacks are gone, unless the store has lost its data: then they are kept for [`GRACE`].
    pub(super) fn replace<'a>(
        &mut self,
        listing: impl IntoIterator<Item = Item<'a>>,
        at: Position,
        now: Now,
    ) -> BTreeMap<String, Cause> {
        self.problems.restart();
        let known = std::mem::take(&mut self.stored);
        let mut records = std::mem::take(&mut self.records);
        self.extensions.clear();
        let mut other_history = self
            .at
            .is_some_and(|was| was.cluster != at.cluster || was.revision > at.revision);
        let past = self.at.map_or(0, |was| was.revision);
        self.at = Some(at);
        for item in listing {
            // What we have passed already must be as we have seen it.
            other_history |= item.key.starts_with(self.keys.subnets().as_bytes())
                && item.mod_revision <= past
                && known.get(item.key) != Some(&item.mod_revision);
            if !records.is_empty()
                && let Meaning::Lease(subnets) = self.keys.meaning(item.key)
                && let Some(record) = records.remove(&subnets)
            {
                self.records.insert(subnets, record);
            }
            self.put(item, now);
        }
        let lost = records.len();
        for (subnets, mut record) in records {
            let until = now.monotonic.saturating_add(GRACE);
            let until = record.orphaned.or(other_history.then_some(until));
            if until.is_some() && !self.is_replaced(&subnets, &record) {
                record.orphaned = until;
                self.orphans = true;
                self.records.insert(subnets, record);
            }
        }
        if other_history && lost > 0 {
            let cause = Cause::DataLoss {
                missing: lost,
                grace: GRACE,
            };
            self.problems.insert(self.keys.subnets().to_owned(), cause);
        } else if self.orphans {
            self.problems.keep(self.keys.subnets());
        }
        self.problems.fresh()
    }

    /// Takes over changes, in their order; returns what that means and what is newly wrong or solved.
    pub(super) fn apply<'a>(
        &mut self,
        changes: impl IntoIterator<Item = Change<'a>>,
        now: Now,
    ) -> (Vec<LeaseDelta>, BTreeMap<String, Cause>) {
        let mut touched: Vec<Subnets> = Vec::new();
        for change in changes {
            let key = match change {
                Change::Put(Item { key, .. }) | Change::Delete { key } => key,
            };
            if let Meaning::Lease(subnets) | Meaning::Extension(subnets) = self.keys.meaning(key) {
                touched.push(subnets);
            }
            match change {
                Change::Put(item) => {
                    if let Some(at) = &mut self.at {
                        at.revision = at.revision.max(item.mod_revision);
                    }
                    touched.extend(self.put(item, now));
                }
                Change::Delete { key } => self.delete(key),
            }
        }
        // The last state of each counts, in the order in which they were last touched.
        let mut seen = BTreeSet::new();
        touched.reverse();
        touched.retain(|subnets| seen.insert(*subnets));
        touched.reverse();
        let delta = |subnets: &Subnets| {
            self.lease(subnets)
                .map_or(LeaseDelta::Delete(*subnets), LeaseDelta::Put)
        };
        let deltas = touched.iter().map(delta).collect();
        (deltas, self.problems.fresh())
    }

    /// The store's history is known up to `revision`.
    pub(super) fn advance(&mut self, revision: i64) {
        if let Some(at) = &mut self.at {
            at.revision = at.revision.max(revision);
        }
    }

    /// Gives up on the leases whose nodes have not come back in time; returns what that means and what is solved.
    pub(super) fn expire_orphans(
        &mut self,
        monotonic: Duration,
    ) -> (Vec<LeaseDelta>, BTreeMap<String, Cause>) {
        if !self.orphans {
            return (Vec::new(), BTreeMap::new());
        }
        let over = |record: &Record| record.orphaned.is_some_and(|until| until <= monotonic);
        let gone: Vec<Subnets> = self
            .records
            .iter()
            .filter(|(_, record)| over(record))
            .map(|(subnets, _)| *subnets)
            .collect();
        for subnets in &gone {
            self.records.remove(subnets);
        }
        self.orphans = self
            .records
            .values()
            .any(|record| record.orphaned.is_some());
        if !self.orphans {
            self.problems.remove(self.keys.subnets());
        }
        let deltas = gone.into_iter().map(LeaseDelta::Delete).collect();
        (deltas, self.problems.fresh())
    }

    /// Takes over one key; returns the orphans whose place it takes.
    fn put(&mut self, item: Item<'_>, now: Now) -> Vec<Subnets> {
        let subject = || shown(item.key);
        match self.keys.meaning(item.key) {
            Meaning::Foreign => {}
            Meaning::NoLease(_, error) => {
                self.stored.insert(item.key.to_owned(), item.mod_revision);
                self.problems.insert(subject(), Cause::Key(error));
            }
            Meaning::Extension(subnets) => match extension::parse(item.value) {
                Ok(extension) => {
                    self.repaired(item.key);
                    self.extensions
                        .insert(subnets, (item.mod_revision, extension));
                }
                Err(why) => {
                    self.extensions.remove(&subnets);
                    self.problems.insert(subject(), Cause::Sidecar(why));
                }
            },
            Meaning::Lease(subnets) => {
                self.stored.insert(item.key.to_owned(), item.mod_revision);
                match LeaseAttrs::parse(item.value) {
                    Ok(attrs) => {
                        self.repaired(item.key);
                        return self.register(subnets, attrs, item, now);
                    }
                    // What was good stays; the key is still there, so nobody else can take its place.
                    Err(error) => {
                        self.problems.insert(subject(), Cause::Attrs(error));
                        if let Some(record) = self.records.get_mut(&subnets) {
                            record.orphaned = None;
                        }
                    }
                }
            }
        }
        Vec::new()
    }

    /// A key is good, or gone.
    fn repaired(&mut self, key: &[u8]) {
        // Nearly always: then its text is not worth making.
        if !self.problems.is_empty() {
            self.problems.remove(&shown(key));
        }
    }

    fn register(
        &mut self,
        subnets: Subnets,
        attrs: LeaseAttrs,
        item: Item<'_>,
        now: Now,
    ) -> Vec<Subnets> {
        let leased = item.etcd_lease != 0;
        let unchanged = self
            .records
            .get(&subnets)
            .filter(|known| known.mod_revision == item.mod_revision && known.expires.is_some());
        let expires = match unchanged {
            Some(known) if leased => known.expires,
            _ => leased.then(|| now.wall + LEASE_TTL),
        };
        let record = Record {
            attrs,
            expires,
            mod_revision: item.mod_revision,
            orphaned: None,
        };
        let replaced = |(at, orphan): &(&Subnets, &Record)| {
            orphan.orphaned.is_some() && **at != subnets && replaces(&subnets, &record, at, orphan)
        };
        let replaced: Vec<Subnets> = if self.orphans {
            let orphans = self.records.iter().filter(replaced);
            orphans.map(|(at, _)| *at).collect()
        } else {
            Vec::new()
        };
        for orphan in &replaced {
            self.records.remove(orphan);
        }
        self.records.insert(subnets, record);
        replaced
    }

    fn is_replaced(&self, subnets: &Subnets, orphan: &Record) -> bool {
        self.records
            .iter()
            .any(|(at, record)| record.orphaned.is_none() && replaces(at, record, subnets, orphan))
    }

    fn delete(&mut self, key: &[u8]) {
        self.repaired(key);
        self.stored.remove(key);
        match self.keys.meaning(key) {
            Meaning::Lease(subnets) => {
                self.records.remove(&subnets);
            }
            Meaning::Extension(subnets) => {
                self.extensions.remove(&subnets);
            }
            Meaning::NoLease(..) | Meaning::Foreign => {}
        }
    }
}

/// Whether a lease takes the place of one that the store has lost: its node has another one now, or another
/// node its addresses.
fn replaces(at: &Subnets, record: &Record, orphan_at: &Subnets, orphan: &Record) -> bool {
    at.overlaps(orphan_at) || record.attrs.node() == orphan.attrs.node()
}

/// A key as text of bounded length, which a terminal can show.
fn shown(key: &[u8]) -> String {
    let text = String::from_utf8_lossy(key);
    let mut shown: String = text
        .chars()
        .take(SHOWN)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().count() > SHOWN {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests;
