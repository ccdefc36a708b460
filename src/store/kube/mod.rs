//! Owns the store in Kubernetes: every node's subnet is its pod CIDR, and what it says about itself stands in
//! flannel's annotations of its Node object (specification section 6). Never trusts what others have written there.
//!
//! # What is waited for
//!
//! A pod CIDR, a permission, the API server: whatever is missing is named with its remedy and asked for again. Only
//! settings that no time repairs end the daemon.
//!
//! # What is kept true
//!
//! Our own annotations and the node's condition `NetworkUnavailable` are looked at whenever our Node changes, and
//! written again if they say something else. A pod CIDR that changes, or a Node that is deleted, is a lost lease.
//!
//! # What is told
//!
//! What is missing stands in the log, in the condition, and in an Event about the Node.
//!
//! # The others
//!
//! One watch of all nodes, resumed where it was, listed anew when the server no longer knows that place. What is kept
//! of a node is its lease. A node whose annotations make no sense, or that claims another's subnet, is reported by
//! name and costs nobody else anything.

mod annotations;
mod claim;
mod condition;
mod courtesy;
mod event;
mod failure;
mod node;
mod pods;
mod settings;
mod view;
mod watch;

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use kube::Client;
use kube::client::ClientBuilder;
use tokio::sync::{OnceCell, mpsc, watch as latest};
use tower::util::MapResponseLayer;

use super::pods::{PodLookup, PodName};
use super::{AcquireRequest, LeaseStore, RenewError, StoreError, StoreEvent};
use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseAttrs, Subnets};
pub use annotations::{Annotations, PrefixError, Texts, Wrong};
pub use node::NodeFault;
pub use settings::{Identity, KubeSettings, KubeSettingsError, NET_CONFIG, WATCH};

use condition::Report;
use courtesy::Courtesy;
use event::Word;

/// Events that wait for their receiver. What does not fit is kept by node, and is as good later.
const EVENTS: usize = 4;

/// A [`LeaseStore`] in Kubernetes; see the module.
///
/// Clones share the connection and what the node holds.
#[derive(Clone, Debug)]
pub struct KubeStore {
    inner: Arc<Inner>,
}

struct Inner {
    settings: KubeSettings,
    client: Client,
    courtesy: Courtesy,
    /// The API server, for messages.
    location: String,
    /// Our node's name, once it is known.
    name: OnceCell<String>,
    /// What this node holds. Never locked across an await.
    own: Mutex<Option<Own>>,
    /// What the node's condition is to say.
    report: latest::Sender<Option<Report>>,
    /// What is to be told as an Event.
    words: mpsc::Sender<Word>,
}

/// What this node holds, and says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Own {
    subnets: Subnets,
    attrs: LeaseAttrs,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubeStore")
            .field("location", &self.location)
            .field("name", &self.name)
            .field("own", &self.own)
            .finish_non_exhaustive()
    }
}

impl KubeStore {
    /// The store that `settings` describe. Reads credentials, and connects to nobody yet. Needs a runtime.
    ///
    /// # Errors
    ///
    /// The first setting that cannot be used, by the name of its option.
    pub async fn new(settings: KubeSettings) -> Result<Self, KubeSettingsError> {
        let config = settings.config().await?;
        let location = format!("the Kubernetes API at {}", config.cluster_url);
        let courtesy = Courtesy::default();
        let builder = ClientBuilder::try_from(config)
            .map_err(|e| KubeSettingsError::Credentials(failure::causes(&e)))?;
        let client: Client = builder
            .with_layer(&MapResponseLayer::new(courtesy.observe()))
            .build();
        let (report, reports) = latest::channel(None);
        let (words, said) = mpsc::channel(event::WAITING);
        let inner = Arc::new(Inner {
            settings,
            client,
            courtesy,
            location,
            name: OnceCell::new(),
            own: Mutex::new(None),
            report,
            words,
        });
        tokio::spawn(condition::keep(Arc::downgrade(&inner), reports));
        tokio::spawn(event::keep(Arc::downgrade(&inner), said));
        Ok(Self { inner })
    }
}

impl Inner {
    /// What this node holds; `edit` may change it. A panic elsewhere leaves a whole value behind.
    fn own<T>(&self, edit: impl FnOnce(&mut Option<Own>) -> T) -> T {
        edit(&mut self.own.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has it told as an Event, if there is room.
    fn say(&self, word: Word) {
        let _lost = self.words.try_send(word);
    }

    /// Waits for as long as the server has asked us to.
    async fn wait_our_turn(&self) {
        if let Some(until) = self.courtesy.until() {
            tokio::time::sleep_until(until).await;
        }
    }
}

impl LeaseStore for KubeStore {
    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        self.inner.network_config()
    }

    async fn public_ips(&self) -> Result<(Option<Ipv4Addr>, Option<Ipv6Addr>), StoreError> {
        self.inner.public_ips().await
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Lease, StoreError> {
        self.inner.acquire(request.attrs).await
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, RenewError> {
        self.inner.renew(lease).await
    }

    fn can_move(&self) -> bool {
        true
    }

    fn report(&self, missing: &[String]) {
        self.inner.report(missing);
    }

    fn pod(&self, name: PodName) -> PodLookup {
        Box::pin(Arc::clone(&self.inner).pod(name))
    }

    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let (sender, receiver) = mpsc::channel(EVENTS);
        tokio::spawn(watch::run(Arc::clone(&self.inner), sender));
        receiver
    }
}
