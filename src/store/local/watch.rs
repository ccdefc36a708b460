//! Owns the watch: notices changes, keeps the last good state of every lease, and defends or gives up our own.
//! Never waits for the lock.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::claim;
use super::files::Lock;
use super::own::{Standing, standing};
use super::scan::{Entry, Listing, Record, Scanner};
use super::{EXPIRY, Inner, LOCK, SUBNETS};
use crate::lease::{Lease, Subnets};
use crate::store::{Cause, LostTo, Problem, StoreEvent};

/// How long changes are collected before the directory is read: a synchronisation writes many files at once.
const SETTLE: Duration = Duration::from_millis(20);

/// When a directory is read again that may not be filled yet.
const FILLING: Duration = Duration::from_secs(1);

/// How long somebody else's lease may stand in the place of ours without the time of its claim, before it is
/// taken for what it looks like: an operator's reservation. Longer than two rescans.
const UNSETTLED: Duration = Duration::from_secs(12);

/// Reports until the receiver is dropped.
pub(super) async fn run(inner: Arc<Inner>, events: mpsc::Sender<StoreEvent>) {
    let mut watcher = Watcher::new(Arc::clone(&inner));
    let mut ticks = tokio::time::interval(inner.rescan);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let notifier = watcher.notifier.clone();
    loop {
        let pass = tokio::task::spawn_blocking(move || {
            let news = watcher.pass();
            (watcher, news)
        });
        // Fails only if the pass panicked, or the runtime is going down.
        let Ok((returned, news)) = pass.await else {
            return;
        };
        watcher = returned;
        for event in news {
            if events.send(event).await.is_err() {
                return;
            }
        }
        let filling = watcher.filling;
        tokio::select! {
            () = events.closed() => return,
            _ = ticks.tick() => {}
            () = tokio::time::sleep(FILLING), if filling => {}
            () = inner.wrote.notified() => {}
            () = changed(notifier.as_deref()) => tokio::time::sleep(SETTLE).await,
        }
    }
}

/// What one pass after the other finds out.
pub(super) struct Watcher {
    inner: Arc<Inner>,
    scanner: Scanner,
    notifier: Option<Arc<Notifier>>,
    no_notifier: Option<String>,
    watches: [Option<WatchDescriptor>; 3],
    /// The last good state of every lease that has not ended.
    known: BTreeMap<Subnets, Known>,
    /// Whether it is what the last event said.
    reported: bool,
    problems: BTreeMap<String, Cause>,
    /// Whether the directory may not be filled yet.
    filling: bool,
    /// Since when our lease is in doubt, by the monotonic clock.
    unsettled: Option<Duration>,
}

struct Known {
    lease: Lease,
    /// When it ends, by the monotonic clock; fixed when the end was first read.
    deadline: Option<Duration>,
}

impl Known {
    /// A lease has ended when both clocks say so: one that was set back makes it last longer, and one that was
    /// set forward does not end it.
    fn lasts(&self, wall: SystemTime, monotonic: Duration) -> bool {
        self.deadline.is_none_or(|at| monotonic < at)
            || self.lease.expires.is_none_or(|at| wall < at)
    }
}

impl Watcher {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        let (notifier, no_notifier) = match Notifier::new() {
            Ok(notifier) => (Some(Arc::new(notifier)), None),
            Err(e) => (None, Some(e.to_string())),
        };
        Self {
            inner,
            scanner: Scanner::default(),
            notifier,
            no_notifier,
            watches: [None; 3],
            known: BTreeMap::new(),
            reported: false,
            problems: BTreeMap::new(),
            filling: false,
            unsettled: None,
        }
    }

    /// Reads the directory once and says what is new.
    pub(super) fn pass(&mut self) -> Vec<StoreEvent> {
        let (wall, monotonic) = (self.inner.clock.wall(), self.inner.clock.monotonic());
        let mut problems = BTreeMap::new();
        // Before reading: what changes after that is notified, what changed before is read.
        self.arm(&mut problems);
        let mut news = Vec::new();
        self.filling = false;
        let complete = match self.scanner.scan(&self.inner.dir) {
            Ok(listing) => {
                self.learn(&listing, wall, monotonic);
                news.extend(self.defend(&listing, wall, monotonic, &mut problems));
                problems.extend(listing.problems);
                self.filling = listing.filling;
                listing.complete
            }
            // Nobody has leased anything yet.
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.known.is_empty() => true,
            Err(e) => {
                problems.insert(self.subject(), Cause::Away(e.to_string()));
                false
            }
        };
        self.forget(|_, known| !known.lasts(wall, monotonic));

        let fresh = news_of(&self.problems, &problems, complete);
        if !self.reported || !fresh.is_empty() {
            let leases = self.known.values().map(|known| known.lease.clone());
            news.push(StoreEvent::Snapshot {
                leases: leases.collect(),
                problems: fresh,
            });
            self.reported = true;
        }
        // What a short listing did not reach is not known to be repaired.
        if !complete {
            for (subject, cause) in std::mem::take(&mut self.problems) {
                problems.entry(subject).or_insert(cause);
            }
        }
        self.problems = problems;
        news
    }

    fn subject(&self) -> String {
        self.inner.dir.display().to_string()
    }

    /// Has changes of the three directories notified. Repeated before every pass, because any of them may be
    /// another one by now.
    fn arm(&mut self, problems: &mut BTreeMap<String, Cause>) {
        let mut trouble = self.no_notifier.clone();
        if let Some(notifier) = &self.notifier {
            let dir = &self.inner.dir;
            let paths = [dir.clone(), dir.join(SUBNETS), dir.join(EXPIRY)];
            for (path, watch) in paths.iter().zip(&mut self.watches) {
                match notifier.watch(path, *watch) {
                    Ok(watching) => *watch = watching,
                    Err(e) => trouble = Some(e.to_string()),
                }
            }
        }
        if let Some(trouble) = trouble {
            problems.insert(
                format!("{} (inotify)", self.subject()),
                Cause::NoNotification(trouble),
            );
        }
    }

    /// Takes over every good entry, and forgets only what is known to be gone or to have ended.
    fn learn(&mut self, listing: &Listing, wall: SystemTime, monotonic: Duration) {
        for (key, entry) in listing.iter() {
            if let Entry::Lease(record) = entry {
                self.learn_one(*key, record, wall, monotonic);
            }
        }
        if listing.complete {
            self.forget(|key, _| !listing.entries.contains_key(key));
        }
    }

    fn forget(&mut self, gone: impl Fn(&Subnets, &Known) -> bool) {
        let before = self.known.len();
        self.known.retain(|key, known| !gone(key, known));
        self.reported &= self.known.len() == before;
    }

    fn learn_one(&mut self, key: Subnets, record: &Record, wall: SystemTime, monotonic: Duration) {
        let lease = record.lease(key);
        if let Some(known) = self.known.get_mut(&key) {
            let same_node = known.lease.attrs.node() == lease.attrs.node();
            let same_end = known.lease.expires == lease.expires;
            if same_node && (same_end || !record.is_live(wall)) {
                if known.lease != lease {
                    known.lease = lease;
                    self.reported = false;
                }
                return;
            }
        }
        if !record.is_live(wall) {
            self.reported &= self.known.remove(&key).is_none();
            return;
        }
        self.reported = false;
        let left = |at: SystemTime| at.duration_since(wall).unwrap_or_default();
        let deadline = lease.expires.map(|at| monotonic.saturating_add(left(at)));
        self.known.insert(key, Known { lease, deadline });
    }

    /// Acts on how our own lease stands.
    fn defend(
        &mut self,
        listing: &Listing,
        wall: SystemTime,
        monotonic: Duration,
        problems: &mut BTreeMap<String, Cause>,
    ) -> Option<StoreEvent> {
        let own = self.inner.own(|own| own.clone())?;
        if standing(&own, listing, wall) == Standing::Held {
            self.unsettled = None;
            return None;
        }
        // An operation of ours may have ended since the listing was read: look again with the lock held. If
        // another holds it, the next pass tells more.
        let lock = match Lock::try_take(&self.inner.dir) {
            Ok(None) => return None,
            Ok(Some(lock)) => Ok(lock),
            Err(e) => Err(e),
        };
        let own = self.inner.own(|own| own.clone())?;
        let was_complete = listing.complete;
        let listing = claim::list(&self.inner.dir).ok()?;
        let standing = standing(&own, &listing, wall);
        let in_doubt = matches!(standing, Standing::Unsettled(_));
        self.unsettled = in_doubt.then(|| self.unsettled.unwrap_or(monotonic));
        let lost_to = match standing {
            Standing::Held => None,
            Standing::Lost(node) => Some(LostTo::Node(node)),
            Standing::Missing => (was_complete && listing.complete).then_some(LostTo::Nobody),
            Standing::Unsettled(node) => self
                .unsettled
                .is_some_and(|since| monotonic.saturating_sub(since) >= UNSETTLED)
                .then_some(LostTo::Node(node)),
            Standing::Overwritten => {
                let restored = lock.and_then(|_held| claim::write(&self.inner.dir, &own));
                let cause = restored
                    .map_or_else(|e| Cause::Unwritable(e.to_string()), |()| Cause::Restored);
                let name = self.inner.dir.join(SUBNETS).join(own.subnets.to_string());
                problems.insert(format!("{} (ours)", name.display()), cause);
                return None;
            }
        };
        let to = lost_to?;
        if let Err(error) = lock.and_then(|_held| claim::give_up(&self.inner.dir, &own)) {
            tracing::warn!(%error, "what is left of a lost lease stays behind");
        }
        self.unsettled = None;
        self.inner.own(|held| *held = None);
        Some(StoreEvent::OwnLost {
            subnets: own.subnets,
            to,
        })
    }
}

/// What `now` says that `before` did not. What is no longer said is solved only if everything was looked at.
fn news_of(
    before: &BTreeMap<String, Cause>,
    now: &BTreeMap<String, Cause>,
    complete: bool,
) -> Vec<Problem> {
    let new = now
        .iter()
        .filter(|&(subject, cause)| before.get(subject) != Some(cause))
        .map(|(subject, cause)| (subject, cause.clone()));
    let solved = before
        .keys()
        .filter(|&subject| complete && !now.contains_key(subject))
        .map(|subject| (subject, Cause::Solved));
    let problem = |(subject, cause): (&String, Cause)| Problem {
        subject: subject.clone(),
        cause,
    };
    new.chain(solved).map(problem).collect()
}

/// The kernel's notification of changes in directories.
struct Notifier(AsyncFd<Descriptor>);

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Notifier {
    fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        #[expect(
            deprecated,
            reason = "its successor trusts the caller that nobody closes the descriptor; this one is owned \
            by the value registered"
        )]
        AsyncFd::new(Descriptor(inotify)).map(Self)
    }

    /// Watches the directory at `path`, which may be missing, in the place of what was watched under that path
    /// before.
    fn watch(
        &self,
        path: &Path,
        before: Option<WatchDescriptor>,
    ) -> io::Result<Option<WatchDescriptor>> {
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_ONLYDIR;
        let inotify = &self.0.get_ref().0;
        let watching = match inotify.add_watch(path, flags) {
            Ok(watch) => Some(watch),
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => None,
            Err(e) => return Err(e.into()),
        };
        if let Some(stale) = before.filter(|_| watching != before) {
            // Fails if the directory is gone, and the watch with it.
            let _gone = inotify.rm_watch(stale);
        }
        Ok(watching)
    }
}

/// Waits for a change; for ever without a notifier.
async fn changed(notifier: Option<&Notifier>) {
    let Some(Notifier(fd)) = notifier else {
        return std::future::pending().await;
    };
    let Ok(mut ready) = fd.readable().await else {
        return std::future::pending().await;
    };
    loop {
        match fd.get_ref().0.read_events() {
            Ok(events) if events.iter().any(concerns_leases) => return,
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_drained) => {
                ready.clear_ready();
                match fd.readable().await {
                    Ok(again) => ready = again,
                    Err(_runtime_is_gone) => return std::future::pending().await,
                }
            }
        }
    }
}

/// Whether a pass could find something. Locking and temporary files are not worth one; that also keeps a pass
/// from causing the next.
fn concerns_leases(event: &InotifyEvent) -> bool {
    event.name.as_ref().is_none_or(|name| {
        let name = name.as_encoded_bytes();
        name != LOCK.as_bytes() && !name.starts_with(b".")
    })
}
