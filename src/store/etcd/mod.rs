//! Owns the store in etcd, version 3.4 or later: flannel's keys and values, byte for byte, so that nodes of both
//! kinds share a network. Never trusts what others have written there.
//!
//! ```text
//! <prefix>/config                    net-conf.json
//! <prefix>/subnets/<key>             one lease: flannel's value, with an etcd lease of 24 hours
//! <prefix>/subnet-extensions/<key>   what that value has no field for: {"Ecn":true}
//! ```
//!
//! A lease without an etcd lease is a reservation: it never ends, and the node with its `PublicIP` takes it up. An
//! extension counts only if it was written together with its lease, in one transaction: whoever writes the lease
//! alone, as flannel does, takes the extension back. Nodes that may not write it do without.
//!
//! # Ownership
//!
//! Every write is a transaction on the condition that the key is what it was when it was read: absent for a new
//! lease, unchanged for a renewal or a take-over. Whoever was outrun reads again. Keys that differ but overlap (the
//! same IPv4 subnet with two IPv6 subnets, say) are caught by a listing within the transaction: the earlier one
//! stays.
//!
//! # Losing the store
//!
//! A watch resumes where it was, at whichever member answers first, and lists anew when the store has compacted
//! that away or is no longer the one that it was. A store that comes back *without its data* takes nobody's routes:
//! leases that went with it are kept for a minute, in which their nodes register again.

mod claim;
mod cluster;
mod entry;
mod extension;
mod failure;
mod keys;
mod news;
mod problems;
mod settings;
mod view;
mod watch;

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use super::{AcquireRequest, LeaseStore, Progress, RenewError, StoreError, StoreEvent};
use crate::config::NetworkConfig;
use crate::lease::Lease;
use claim::Own;
use cluster::Cluster;
use keys::Keys;
pub use settings::{EtcdSettings, EtcdSettingsError};

/// Events that wait for their receiver. What does not fit is merged into one that is as good.
const EVENTS: usize = 4;

/// How many grants of ours are remembered, to know our own writes.
const GRANTS: usize = 32;

/// A [`LeaseStore`] in etcd; see the module.
///
/// Clones share the connection and what the node holds.
#[derive(Clone, Debug)]
pub struct EtcdStore {
    inner: Arc<Inner>,
}

struct Inner {
    keys: Keys,
    cluster: Cluster,
    /// What this node holds. Never locked across an await.
    own: Mutex<Option<Own>>,
    /// The etcd leases that we were granted last.
    grants: Mutex<VecDeque<i64>>,
    /// Our role may not write extensions.
    no_extensions: AtomicBool,
    /// Of the watch that was started last.
    progress: Mutex<Arc<Progress>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdStore")
            .field("cluster", &self.cluster.location())
            .field("own", &self.own)
            .finish_non_exhaustive()
    }
}

impl EtcdStore {
    /// The store that `settings` describe. Reads the TLS files, and connects to nobody yet.
    ///
    /// # Errors
    ///
    /// The first setting that cannot be used, by the name of its option.
    pub fn new(settings: EtcdSettings) -> Result<Self, EtcdSettingsError> {
        let keys = Keys::new(&settings.prefix);
        let cluster = Cluster::new(settings, keys.config())?;
        Ok(Self {
            inner: Arc::new(Inner {
                keys,
                cluster,
                own: Mutex::new(None),
                grants: Mutex::new(VecDeque::new()),
                no_extensions: AtomicBool::new(false),
                progress: Mutex::default(),
            }),
        })
    }
}

impl Inner {
    /// What this node holds; `edit` may change it. A panic elsewhere leaves a whole value behind.
    fn own<T>(&self, edit: impl FnOnce(&mut Option<Own>) -> T) -> T {
        edit(&mut self.own.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How far the last watch has come; `edit` may put another one in its place.
    fn progress<T>(&self, edit: impl FnOnce(&mut Arc<Progress>) -> T) -> T {
        edit(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// We were granted an etcd lease.
    fn granted(&self, etcd_lease: i64) {
        let mut grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        grants.push_back(etcd_lease);
        if grants.len() > GRANTS {
            grants.pop_front();
        }
    }

    /// Whether we were granted this etcd lease.
    fn is_ours(&self, etcd_lease: i64) -> bool {
        let grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        grants.contains(&etcd_lease)
    }

    fn extensions_allowed(&self) -> bool {
        !self.no_extensions.load(Ordering::Relaxed)
    }

    fn forbid_extensions(&self) {
        if !self.no_extensions.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                key = self.keys.extensions(),
                "etcd does not let us publish extensions: peers will not know of our ECN support; \
                grant our role read and write on the whole prefix"
            );
        }
    }

    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        let location = || {
            format!(
                "{} in etcd at {}",
                self.keys.config(),
                self.cluster.location()
            )
        };
        let mut again = true;
        let answer = loop {
            let connection = self.cluster.connection().await?;
            let mut kv = connection.kv();
            match connection.call(kv.get(self.keys.config(), None)).await {
                Ok(answer) => break answer,
                // The connection may be an old one, to a server that has gone since.
                Err(failure) if again && !failure.cause.is_answer() => again = false,
                Err(failure) => return Err(failure.into()),
            }
        };
        let Some(entry) = answer.kvs().first() else {
            return Err(StoreError::ConfigMissing {
                location: location(),
            });
        };
        NetworkConfig::parse(entry.value()).map_err(|source| StoreError::Config {
            location: location(),
            source,
        })
    }
}

impl LeaseStore for EtcdStore {
    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        self.inner.network_config().await
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Lease, StoreError> {
        let node = request.attrs.node().ok_or(StoreError::NoPublicIp)?;
        let config = self.inner.network_config().await?;
        self.inner.own(|own| *own = None);
        let acquired = claim::acquire(&self.inner, &config, &request, node).await?;
        let lease = acquired.lease();
        self.inner.own(|own| *own = Some(acquired));
        Ok(lease)
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, RenewError> {
        let renewed = claim::renew(&self.inner, lease).await;
        match &renewed {
            Ok(renewed) => self.inner.own(|own| *own = Some(renewed.clone())),
            Err(RenewError::Lost { .. }) => self.inner.own(|own| *own = None),
            Err(RenewError::Store(_)) => {}
        }
        renewed.map(|own| own.lease())
    }

    fn can_move(&self) -> bool {
        true
    }

    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let (events, receiver) = mpsc::channel(EVENTS);
        let progress = Arc::new(Progress::default());
        self.inner.progress(|last| last.clone_from(&progress));
        tokio::spawn(watch::run(Arc::clone(&self.inner), events, progress));
        receiver
    }

    fn progress(&self) -> Option<Arc<Progress>> {
        Some(self.inner.progress(|last| Arc::clone(last)))
    }
}
