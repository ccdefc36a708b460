//! Owns the contract of a lease store and what all stores share: the allocator and `subnet.env`. Never programs
//! the kernel.

pub mod allocator;
pub mod backoff;
pub mod env_file;
pub mod etcd;
pub mod kube;
pub mod local;
pub mod pods;
pub mod progress;
mod random;

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::config::{ConfigError, NetworkConfig};
use crate::lease::{AttrsError, KeyError, Lease, LeaseAttrs, LeaseDelta, LeaseExtension, Subnets};

pub use etcd::EtcdStore;
pub use kube::KubeStore;
pub use local::LocalStore;
use pods::{PodError, PodLookup, PodName};
pub use progress::Progress;

/// How long a lease lasts unless renewed; specification section 5.5.
pub const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// Where the nodes of one network find its configuration and keep their leases.
///
/// One value serves one node. Every operation may be repeated after an error.
pub trait LeaseStore: Send + Sync {
    /// Reads and validates the network configuration.
    ///
    /// # Errors
    ///
    /// [`StoreError::ConfigMissing`] while there is none: wait and ask again every second. Likewise for all
    /// others but [`StoreError::Config`], which an operator has to repair first.
    fn network_config(&self) -> impl Future<Output = Result<NetworkConfig, StoreError>> + Send;

    /// The public IPs that an operator has set for this node in the store; they overrule its command line.
    ///
    /// # Errors
    ///
    /// As [`network_config`](Self::network_config).
    fn public_ips(
        &self,
    ) -> impl Future<Output = Result<(Option<Ipv4Addr>, Option<Ipv6Addr>), StoreError>> + Send {
        std::future::ready(Ok((None, None)))
    }

    /// Leases subnets for this node: those it holds already, else those it held before if they are free, else
    /// free ones. Reads the configuration anew.
    ///
    /// # Errors
    ///
    /// None of them leaves a lease behind.
    fn acquire(
        &self,
        request: AcquireRequest,
    ) -> impl Future<Output = Result<Lease, StoreError>> + Send;

    /// Extends our lease by [`LEASE_TTL`] from now, only if it is still ours. A reservation is returned as it is.
    ///
    /// # Errors
    ///
    /// [`RenewError::Lost`] ends the lease; anything else is worth another try within a minute.
    fn renew(&self, lease: &Lease) -> impl Future<Output = Result<Lease, RenewError>> + Send;

    /// Whether [`renew`](Self::renew) also takes a lease with another public IP than the one it was acquired with:
    /// for a node whose address has changed while it runs.
    fn can_move(&self) -> bool {
        false
    }

    /// Takes note of what is missing for this node's pods to have a network, for those who ask the store; nothing
    /// is missing while all is well. Called often, and returns at once.
    fn report(&self, missing: &[String]) {
        let _unasked = missing;
    }

    /// Starts to report the leases of all nodes, in a task of the current runtime that ends when the receiver
    /// is dropped. The first event is a snapshot.
    ///
    /// Level-triggered: a slow receiver skips states, never the last one. Leases include our own. A store that
    /// cannot be reached says so in `problems` and withdraws nobody.
    fn watch(&self) -> mpsc::Receiver<StoreEvent>;

    /// What a pod's name stands for, in a cluster that has names. Answers within a few seconds, and may be waited for
    /// without the store.
    ///
    /// # Errors
    ///
    /// [`PodError`]; most stores know no pods.
    fn pod(&self, name: PodName) -> PodLookup {
        Box::pin(std::future::ready(Err(PodError::NoCluster(name))))
    }

    /// How far the watch that was started last has come; `None` if the store does not keep track. Whoever takes
    /// events from the watch says what is in effect.
    fn progress(&self) -> Option<Arc<Progress>> {
        None
    }
}

/// What a node asks for.
#[derive(Debug, Clone)]
pub struct AcquireRequest {
    /// What to publish. [`LeaseAttrs::node`] identifies the node and must be there.
    pub attrs: LeaseAttrs,
    /// The subnets of the run before, from `subnet.env`.
    pub previous: Option<Subnets>,
    /// What to publish beside flannel's attributes.
    pub extension: LeaseExtension,
}

/// News from a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreEvent {
    /// All leases that are live now.
    Snapshot {
        /// In the order of their keys.
        leases: Vec<Lease>,
        /// What is wrong now and was not, or was otherwise, at the event before; [`Cause::Solved`] ends it.
        /// Nobody is withdrawn for it.
        problems: Vec<Problem>,
    },
    /// What changed since the event before.
    Delta {
        /// In the order in which it happened.
        deltas: Vec<LeaseDelta>,
        /// As in a snapshot.
        problems: Vec<Problem>,
    },
    /// Our lease is no longer ours. Acquire again; [`LeaseSet::rebase`](crate::lease::LeaseSet::rebase) then
    /// moves the set of peers. Reported once per lease.
    OwnLost {
        /// What we lost.
        subnets: Subnets,
        /// To whom.
        to: LostTo,
    },
}

/// How our lease came to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LostTo {
    /// Another node holds it, or an overlapping one that it claimed before us.
    Node(IpAddr),
    /// Nobody: somebody deleted it.
    Nobody,
}

impl fmt::Display for LostTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(node) => write!(f, "node {node} holds it"),
            Self::Nobody => f.write_str("it was deleted"),
        }
    }
}

/// Something in a store that is not as it should be, and that costs nobody their lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: {cause}")]
pub struct Problem {
    /// The file, key or object.
    pub subject: String,
    /// What is wrong with it.
    pub cause: Cause,
}

/// What is wrong with an entry of a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// Its name is not a lease key.
    #[error("the name is no lease key: {0}")]
    Key(KeyError),
    /// Its content is not a lease value.
    #[error(transparent)]
    Attrs(AttrsError),
    /// What the store keeps beside the value is malformed.
    #[error("{0}")]
    Sidecar(String),
    /// The lease and what is kept beside it name different nodes.
    #[error(
        "the lease names node {lease}, its expiry file names {sidecar}: waiting for the rest to arrive"
    )]
    HalfSynchronised {
        /// According to the lease.
        lease: IpAddr,
        /// According to the file beside it.
        sidecar: IpAddr,
    },
    /// It is a link, a pipe, a device or a directory.
    #[error("not a regular file: replace it by one, or remove it")]
    NotRegular,
    /// It is too large to be read.
    #[error("larger than the {limit} bytes that are read")]
    TooLarge {
        /// What is read.
        limit: usize,
    },
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(String),
    /// There are more entries than are looked at.
    #[error("more than {limit} entries: the rest is not looked at")]
    TooMany {
        /// How many are looked at.
        limit: usize,
    },
    /// The whole store is away; what is known stays valid until it expires.
    #[error("the store cannot be read, known leases are kept: {0}")]
    Away(String),
    /// Changes are seen only by looking again from time to time.
    #[error("no notification of changes, they are seen within seconds only: {0}")]
    NoNotification(String),
    /// Our own entry was overwritten by what nobody can read; renewing the lease writes it anew.
    #[error("our own lease was overwritten")]
    Overwritten,
    /// Our own entry was damaged or overwritten, and cannot be written.
    #[error("our own lease was overwritten and cannot be restored: {0}")]
    Unwritable(String),
    /// What was said about it before holds no longer.
    #[error("in order again, or gone")]
    Solved,
    /// Our own entry was damaged or overwritten, and we have written it anew.
    #[error("our own lease was overwritten and is restored")]
    Restored,
    /// A daemon that is not this one has written our own entry, with our public IP.
    #[error(
        "another daemon leases it with our public IP {0}: give every node a public IP of its own"
    )]
    Twin(IpAddr),
    /// A Kubernetes node is not as it should be.
    #[error(transparent)]
    Node(kube::NodeFault),
    /// The store came back without what it had.
    #[error(
        "it lost its data: {missing} leases are kept for {grace:?}, for their nodes to register again"
    )]
    DataLoss {
        /// How many leases are no longer there.
        missing: usize,
        /// How long they are kept.
        grace: Duration,
    },
}

/// Why a store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no network configuration yet.
    #[error(
        "no network configuration at {location}: write one there, it is looked for every second"
    )]
    ConfigMissing {
        /// Where it is looked for.
        location: String,
    },
    /// The network configuration is not valid.
    #[error("{location}: {source}")]
    Config {
        /// Where it is.
        location: String,
        /// What is wrong.
        source: ConfigError,
    },
    /// The request names no node.
    #[error("the node has no public IP: give one with --public-ip or --public-ipv6")]
    NoPublicIp,
    /// Every subnet is leased.
    #[error("out of subnets: every {family} subnet of {network} from {first} to {last} is leased")]
    OutOfSubnets {
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// The network.
        network: String,
        /// The first subnet nodes may lease.
        first: String,
        /// The last.
        last: String,
    },
    /// Others keep taking what we are about to take.
    #[error("max retries reached trying to acquire a subnet ({attempts} attempts)")]
    Contended {
        /// How often it was tried.
        attempts: u32,
    },
    /// Another process holds the store's lock for too long.
    #[error("{location} is locked by another process for more than {waited:?}")]
    Locked {
        /// The lock.
        location: String,
        /// How long we waited.
        waited: Duration,
    },
    /// The store cannot be reached or written.
    #[error("{location}: {source}")]
    Unavailable {
        /// The file or endpoint.
        location: String,
        /// What the system says.
        source: io::Error,
    },
    /// A part of the store that others may have written is not usable.
    #[error(transparent)]
    Unusable(#[from] Problem),
}

/// Why a lease could not be renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The lease is no longer ours.
    #[error("lease {subnets} is lost: {to}")]
    Lost {
        /// The lease.
        subnets: Subnets,
        /// To whom.
        to: LostTo,
    },
    /// The store could not be asked or written.
    #[error(transparent)]
    Store(#[from] StoreError),
}
