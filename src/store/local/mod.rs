//! Owns the embedded store: a directory of files in flannel's own formats, shared by the daemons of one machine
//! or synchronised between machines by other means. Never needs a server.
//!
//! ```text
//! <dir>/config          net-conf.json; a link is followed
//! <dir>/subnets/<key>   one lease: flannel's etcd value, byte for byte
//! <dir>/expiry/<key>    what that value has no field for: end, time of claim, owner, ECN
//! <dir>/lock            locked by whoever writes
//! ```
//!
//! A lease without its file in `expiry` is a reservation: it never ends, and the node with its `PublicIP` takes
//! it up. Names that start with a dot are ignored.
//!
//! # Between daemons
//!
//! On one machine (and where the file system has locks across machines) writers exclude each other by a lock.
//! Files are written aside and renamed, or linked into place when they must be new, so that a reader needs no
//! lock and never sees half a file.
//!
//! Between synchronised copies two nodes can claim the same addresses. Each sees the other's file sooner or
//! later, and both decide alike: the earlier claim wins, then the lower public IP. The winner restores its file
//! if that was overwritten; the loser reports [`StoreEvent::OwnLost`].
//!
//! # Time
//!
//! A lease ends by the wall clock of whoever looks, once: a running watch turns the end into a deadline of the
//! monotonic clock when it first sees it. A clock that is stepped, in either direction, therefore ends nobody's
//! lease in running daemons. A daemon that starts with a wrong clock misjudges who is live, but takes addresses
//! that somebody ever leased only when no others are left.

mod claim;
mod files;
mod own;
mod scan;
mod sidecar;
mod watch;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use std::{fmt, io};

use tokio::sync::{Notify, mpsc};

use super::random::random_below;
use super::{
    AcquireRequest, Cause, LeaseStore, LostTo, Problem, RenewError, StoreError, StoreEvent,
};
use crate::config::{MAX_CONFIG_LEN, NetworkConfig};
use crate::lease::Lease;
use files::{Links, Lock, ReadError};
use own::Own;

const CONFIG: &str = "config";
const SUBNETS: &str = "subnets";
const EXPIRY: &str = "expiry";
const LOCK: &str = "lock";

/// How often the directory is looked at without being notified: file systems that are written to from other
/// machines do not notify.
const RESCAN: Duration = Duration::from_secs(5);

/// Events that wait for their receiver. A snapshot replaces the one before, so more would only be older.
const EVENTS: usize = 4;

/// A [`LeaseStore`] in a directory; see the module.
///
/// Clones share what the node holds.
#[derive(Clone, Debug)]
pub struct LocalStore {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    clock: Box<dyn Clock>,
    rescan: Duration,
    /// What this node holds. Never locked across an await.
    own: Mutex<Option<Own>>,
    /// Wakes the watch after our own writes.
    wrote: Notify,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalStore")
            .field("dir", &self.dir)
            .field("own", &self.own)
            .finish()
    }
}

/// What time it is; a test decides that itself.
trait Clock: Send + Sync {
    fn wall(&self) -> SystemTime;
    fn monotonic(&self) -> Duration;
}

struct SystemClock(Instant);

impl Clock for SystemClock {
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }

    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

impl LocalStore {
    /// The store in `dir`, which need not exist yet. Touches nothing.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self::with_clock(dir.into(), Box::new(SystemClock(Instant::now())), RESCAN)
    }

    fn with_clock(dir: PathBuf, clock: Box<dyn Clock>, rescan: Duration) -> Self {
        let (own, wrote) = (Mutex::new(None), Notify::new());
        Self {
            inner: Arc::new(Inner {
                dir,
                clock,
                rescan,
                own,
                wrote,
            }),
        }
    }

    /// Runs file work on a thread that may block, with the lock held.
    async fn locked<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let lock = Lock::take(&self.inner.dir).await?;
        self.blocking(move |inner| {
            let done = work(inner);
            drop(lock);
            done
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = Arc::clone(&self.inner);
        let location = self.inner.dir.display().to_string();
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .map_err(|e| StoreError::Unavailable {
                location,
                source: io::Error::other(e),
            })
    }
}

impl Inner {
    /// What this node holds; `edit` may change it. A panic elsewhere leaves a whole value behind.
    fn own<T>(&self, edit: impl FnOnce(&mut Option<Own>) -> T) -> T {
        edit(&mut self.own.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        let path = self.dir.join(CONFIG);
        let location = path.display().to_string();
        let text = match files::read(&path, MAX_CONFIG_LEN, Links::Followed) {
            Ok(text) => text,
            Err(ReadError::Missing) => return Err(StoreError::ConfigMissing { location }),
            Err(ReadError::Io(source)) => return Err(StoreError::Unavailable { location, source }),
            Err(e @ (ReadError::NotRegular | ReadError::TooLarge { .. })) => {
                return Err(StoreError::Unusable(Problem {
                    subject: location,
                    cause: e.cause(),
                }));
            }
        };
        NetworkConfig::parse(&text).map_err(|source| StoreError::Config { location, source })
    }

    fn renew(&self, lease: &Lease) -> Result<Lease, RenewError> {
        let now = self.clock.wall();
        let held = self
            .own(|own| own.clone())
            .filter(|own| own.subnets == lease.subnets);
        let own = match held {
            Some(own) => own,
            None => claim::adopt(&self.dir, lease)?.ok_or(RenewError::Lost {
                subnets: lease.subnets,
                to: LostTo::Nobody,
            })?,
        };
        let renewed = claim::renew(&self.dir, &own, lease, now);
        match &renewed {
            Ok(renewed) => self.own(|own| *own = Some(renewed.clone())),
            Err(RenewError::Lost { .. }) => self.own(|own| *own = None),
            Err(RenewError::Store(_)) => {}
        }
        renewed.map(|own| own.lease())
    }
}

impl LeaseStore for LocalStore {
    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        self.blocking(Inner::network_config).await?
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Lease, StoreError> {
        let node = request.attrs.node().ok_or(StoreError::NoPublicIp)?;
        // Before the directory is touched: a wrong path must not be created.
        let config = self.network_config().await?;
        let lease = self
            .locked(move |inner| {
                inner.own(|own| *own = None);
                let now = inner.clock.wall();
                let acquired =
                    claim::acquire(&inner.dir, &config, &request, node, now, random_below)?;
                let lease = acquired.lease();
                inner.own(|own| *own = Some(acquired));
                Ok::<_, StoreError>(lease)
            })
            .await??;
        self.inner.wrote.notify_one();
        Ok(lease)
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, RenewError> {
        let lease = lease.clone();
        let renewed = self.locked(move |inner| inner.renew(&lease)).await??;
        self.inner.wrote.notify_one();
        Ok(renewed)
    }

    fn can_move(&self) -> bool {
        true
    }

    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let (events, receiver) = mpsc::channel(EVENTS);
        tokio::spawn(watch::run(Arc::clone(&self.inner), events));
        receiver
    }
}

/// A lease of another node in the place of ours, without the time of its claim.
fn half(dir: &Path, own: &Own, lease: IpAddr) -> Problem {
    let subject = dir
        .join(SUBNETS)
        .join(own.subnets.to_string())
        .display()
        .to_string();
    Problem {
        subject,
        cause: Cause::HalfSynchronised {
            lease,
            sidecar: own.node,
        },
    }
}

#[cfg(test)]
mod tests;
