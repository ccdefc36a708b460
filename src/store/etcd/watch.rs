//! Owns the watch: follows the store through disconnects, compaction and loss of data, and says what is new. Never
//! writes to etcd.
//!
//! One session is one connection: 1 check that the store is still the one we know, or list it · 2 watch from there
//! on · 3 hand on what happens, until the connection fails or falls silent.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use etcd_client::{
    GetOptions, GetResponse, KeyValue, ResponseHeader, SortOrder, SortTarget, WatchOptions,
    WatchResponse, WatchStream,
};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::Inner;
use super::claim;
use super::cluster::Connection;
use super::failure::{Failure, FailureCause, Failures};
use super::news::News;
use super::view::{Change, Item, Now, Position, View};
use crate::lease::LeaseAttrs;
use crate::store::backoff::Backoff;
use crate::store::{Progress, StoreEvent};

/// How often the server is asked for a sign of life on the stream itself.
const ASK: Duration = Duration::from_secs(2);

/// How long a stream may be silent although it was asked. Longer than two questions.
const SILENCE: Duration = Duration::from_secs(5);

/// How long a server may take to start a watch.
const START: Duration = Duration::from_secs(3);

/// The pauses between attempts to get the store back: the first change after an outage is to be seen soon.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Likewise when somebody has to repair something first. Checking a password costs a server a lot.
const LONGEST_PAUSE_IN_VAIN: Duration = Duration::from_secs(10);

/// A session that lasted so long was a success.
const LASTING: Duration = Duration::from_secs(5);

/// Reports until the receiver is dropped.
pub(super) async fn run(
    inner: Arc<Inner>,
    events: mpsc::Sender<StoreEvent>,
    progress: Arc<Progress>,
) {
    let mut watcher = Watcher {
        view: View::new(inner.keys.clone()),
        news: News::new(inner.cluster.location()),
        inner,
        events,
        progress,
        start: Instant::now(),
        suspect: true,
        damaged: false,
    };
    // Ends only when the receiver is gone.
    let Closed = watcher.run().await;
}

/// The receiver is gone.
struct Closed;

/// Why a session ended.
enum End {
    Closed,
    Failed(Failures),
    /// What we know is too old to go on from: list anew, now.
    Compacted,
}

impl From<Closed> for End {
    fn from(Closed: Closed) -> Self {
        Self::Closed
    }
}

impl From<Failures> for End {
    fn from(failures: Failures) -> Self {
        Self::Failed(failures)
    }
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure.into())
    }
}

struct Watcher {
    inner: Arc<Inner>,
    events: mpsc::Sender<StoreEvent>,
    progress: Arc<Progress>,
    start: Instant,
    view: View,
    news: News,
    /// Our own lease may be lost: what we see of it is not what we wrote.
    suspect: bool,
    /// What we see of it cannot be read.
    damaged: bool,
}

impl Watcher {
    async fn run(&mut self) -> Closed {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut in_vain = Backoff::new(LONGEST_PAUSE, LONGEST_PAUSE_IN_VAIN);
        let mut list = true;
        loop {
            let began = Instant::now();
            let ended = tokio::select! {
                () = receiver_gone(self.events.clone()) => return Closed,
                ended = self.session(list) => ended,
            };
            let lasted = began.elapsed() >= LASTING && !self.news.is_away();
            if lasted {
                backoff.reset();
                in_vain.reset();
            }
            let pause = match ended {
                End::Closed => return Closed,
                End::Compacted => {
                    list = true;
                    backoff.pause()
                }
                End::Failed(failures) => {
                    list = self.view.position().is_none();
                    // The end of a connection that worked is no outage if the next one works.
                    if !lasted {
                        self.news.away(&failures, Instant::now());
                    }
                    if failures.need_repair() {
                        in_vain.pause()
                    } else {
                        backoff.pause()
                    }
                }
            };
            if let Err(closed) = self.pause(pause).await {
                return closed;
            }
        }
    }

    /// Follows the store over one connection.
    async fn session(&mut self, list: bool) -> End {
        match self.follow(list).await {
            Ok(end) | Err(end) => end,
        }
    }

    async fn follow(&mut self, list: bool) -> Result<End, End> {
        let inner = Arc::clone(&self.inner);
        let connection = inner.cluster.connection().await?;
        let wide = if list || !self.is_the_same_store(&connection).await? {
            self.list(&connection).await?
        } else {
            self.inner.extensions_allowed()
        };
        self.settle_own(&connection).await?;
        let stream = self.open(&connection, wide).await?;
        self.news.back(connection.endpoint());
        let ended = self.stream(&connection, stream).await;
        if matches!(ended, Err(End::Failed(_))) {
            connection.give_up();
        }
        ended
    }

    /// Whether the store still is what it was at our position: has that in its history, with the same keys.
    async fn is_the_same_store(&self, connection: &Connection) -> Result<bool, Failure> {
        let (Some(at), Some(known)) = (self.view.position(), self.view.fingerprint()) else {
            return Ok(false);
        };
        let options = GetOptions::new()
            .with_prefix()
            .with_revision(at.revision)
            .with_sort(SortTarget::Mod, SortOrder::Descend)
            .with_limit(1)
            .with_keys_only();
        let mut kv = connection.kv();
        let answer = connection
            .call(kv.get(self.inner.keys.subnets(), Some(options)))
            .await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(Failure {
                cause: FailureCause::Compacted | FailureCause::FutureRevision,
                ..
            }) => return Ok(false),
            Err(failure) => return Err(failure),
        };
        let newest = answer.kvs().first();
        Ok(cluster_id(answer.header()) == at.cluster
            && usize::try_from(answer.count()) == Ok(known.count)
            && newest.is_some_and(|kv| {
                kv.key() == known.newest && kv.mod_revision() == known.mod_revision
            }))
    }

    /// Lists all leases, and the extensions if we may read them; returns whether we may.
    async fn list(&mut self, connection: &Connection) -> Result<bool, Failure> {
        let keys = &self.inner.keys;
        let range = GetOptions::new().with_range(keys.subnets_end());
        let mut kv = connection.kv();
        let (listing, wide) = match connection
            .call(kv.get(keys.extensions(), Some(range.clone())))
            .await
        {
            Ok(listing) => (listing, true),
            Err(Failure {
                cause: FailureCause::PermissionDenied(_),
                ..
            }) => {
                let narrow = connection.call(kv.get(keys.subnets(), Some(range))).await?;
                self.inner.forbid_extensions();
                (narrow, false)
            }
            Err(failure) => return Err(failure),
        };
        let at = position(&listing);
        let now = self.now();
        let found = self.view.replace(listing.kvs().iter().map(item), at, now);
        self.news.replaced();
        self.news.found(found);
        self.progress.restart();
        self.progress.news(at.revision, Instant::now().into_std());
        self.suspect = true;
        Ok(wide)
    }

    /// Starts to watch behind what is known.
    async fn open(&self, connection: &Connection, wide: bool) -> Result<WatchStream, End> {
        let keys = &self.inner.keys;
        let next = self.view.position().map_or(0, |at| at.revision) + 1;
        let options = WatchOptions::new()
            .with_range(keys.subnets_end())
            .with_start_revision(next);
        let first = if wide {
            keys.extensions()
        } else {
            keys.subnets()
        };
        let mut watches = connection.watches();
        let mut stream = connection.call(watches.watch(first, Some(options))).await?;
        let started = tokio::time::timeout(START, stream.message()).await;
        let answer = match started {
            Ok(answer) => connection.call(std::future::ready(answer)).await?,
            Err(_elapsed) => {
                connection.give_up();
                return Err(connection.failure(FailureCause::TimedOut(START)).into());
            }
        };
        match answer {
            Some(response) if response.canceled() => Err(cancelled(connection, &response)),
            Some(_created) => Ok(stream),
            None => {
                connection.give_up();
                Err(connection.refusal("").into())
            }
        }
    }

    /// Hands on what happens until the stream ends.
    async fn stream(
        &mut self,
        connection: &Connection,
        mut stream: WatchStream,
    ) -> Result<End, End> {
        let mut ask = tokio::time::interval(ASK);
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let events = self.events.clone();
        loop {
            tokio::select! {
                biased;
                permit = events.reserve(), if !self.news.is_empty() => {
                    let permit = permit.map_err(|_gone| Closed)?;
                    self.hand_on(permit);
                }
                message = stream.message() => {
                    heard = Instant::now();
                    let message = connection.call(std::future::ready(message)).await?;
                    let Some(response) = message else {
                        return Err(connection.refusal("").into());
                    };
                    if response.canceled() {
                        return Err(cancelled(connection, &response));
                    }
                    self.learn(&response);
                    self.settle_own(connection).await?;
                }
                _ = ask.tick() => {
                    if heard.elapsed() > SILENCE {
                        return Err(connection.failure(FailureCause::TimedOut(SILENCE)).into());
                    }
                    let asked = connection.call(stream.request_progress()).await;
                    asked?;
                    self.expire_orphans();
                }
            }
        }
    }

    /// Hands on one event.
    fn hand_on(&mut self, permit: mpsc::Permit<'_, StoreEvent>) {
        self.progress.hand_on(Instant::now().into_std());
        self.news.hand_on(permit, &self.view);
    }

    /// Takes over what one message says.
    fn learn(&mut self, response: &WatchResponse) {
        let store_at = response.header().map_or(0, ResponseHeader::revision);
        let changes: Vec<Change<'_>> = response
            .events()
            .iter()
            .filter_map(|event| event.kv())
            .map(|kv| match kv.version() {
                // Only a deleted key has none.
                0 => Change::Delete { key: kv.key() },
                _ => Change::Put(item(kv)),
            })
            .collect();
        let Some(last) = response.events().iter().filter_map(|e| e.kv()).next_back() else {
            // A sign of life: everything up to here was told before.
            self.progress.complete_to(store_at);
            return;
        };
        self.progress.store_is_at(store_at);
        let heard = Instant::now().into_std();
        if let Some(own) = self.inner.own(|own| own.clone()) {
            let key = self.inner.keys.lease(&own.subnets);
            for change in &changes {
                match change {
                    Change::Put(item) if item.key == key.as_bytes() => {
                        let foreign = item.etcd_lease != own.etcd_lease
                            && !self.inner.is_ours(item.etcd_lease);
                        let named = LeaseAttrs::parse(item.value).ok();
                        let names_us = named.and_then(|attrs| attrs.node()) == Some(own.node);
                        if foreign && names_us {
                            self.news.twin(&key, own.node);
                        }
                        self.suspect = true;
                    }
                    Change::Delete { key: gone } if *gone == key.as_bytes() => self.suspect = true,
                    Change::Put(_) | Change::Delete { .. } => {}
                }
            }
        }
        let (deltas, found) = self.view.apply(changes, self.now());
        self.view.advance(last.mod_revision());
        self.news.changed(deltas, self.view.len());
        self.news.found(found);
        if self.news.is_empty() {
            self.progress.nothing_waits(last.mod_revision());
        } else {
            self.progress.news(last.mod_revision(), heard);
        }
    }

    /// Asks whether our lease is still ours if what we see of it is not.
    async fn settle_own(&mut self, connection: &Connection) -> Result<(), Failure> {
        if !self.suspect {
            return Ok(());
        }
        let Some(own) = self.inner.own(|own| own.clone()) else {
            return Ok(());
        };
        let damaged = self.view.is_damaged(&own.subnets);
        if damaged != self.damaged {
            self.damaged = damaged;
            let key = self.inner.keys.lease(&own.subnets);
            self.news.own_is_damaged(&key, damaged);
        }
        let seen = self.view.holds(&own.subnets).and_then(|attrs| attrs.node());
        if seen != Some(own.node) {
            // What we see may be older than our own write, so the key itself decides.
            if let Some(to) = claim::lost_to(&self.inner, connection, &own).await? {
                let still_held = self.inner.own(|held| {
                    let same = held.as_ref() == Some(&own);
                    if same {
                        *held = None;
                    }
                    same
                });
                if still_held {
                    let subnets = own.subnets;
                    let key = self.inner.keys.lease(&subnets);
                    self.news.lost(&key, subnets, to);
                }
            }
        }
        self.suspect = false;
        Ok(())
    }

    fn expire_orphans(&mut self) {
        let monotonic = self.now().monotonic;
        let (deltas, found) = self.view.expire_orphans(monotonic);
        self.news.changed(deltas, self.view.len());
        self.news.found(found);
    }

    /// Waits before the next attempt, and hands on what there is meanwhile.
    async fn pause(&mut self, time: Duration) -> Result<(), Closed> {
        let sleep = tokio::time::sleep(time);
        tokio::pin!(sleep);
        let events = self.events.clone();
        loop {
            tokio::select! {
                () = &mut sleep => return Ok(()),
                () = events.closed() => return Err(Closed),
                permit = events.reserve(), if !self.news.is_empty() => {
                    let permit = permit.map_err(|_gone| Closed)?;
                    self.hand_on(permit);
                }
            }
        }
    }

    fn now(&self) -> Now {
        Now {
            wall: SystemTime::now(),
            monotonic: self.start.elapsed(),
        }
    }
}

async fn receiver_gone(events: mpsc::Sender<StoreEvent>) {
    events.closed().await;
}

/// Why the server has ended the watch.
fn cancelled(connection: &Connection, response: &WatchResponse) -> End {
    if response.compact_revision() > 0 {
        return End::Compacted;
    }
    connection.give_up();
    connection.refusal(response.cancel_reason()).into()
}

fn item(kv: &KeyValue) -> Item<'_> {
    Item {
        key: kv.key(),
        value: kv.value(),
        etcd_lease: kv.lease(),
        mod_revision: kv.mod_revision(),
    }
}

fn position(listing: &GetResponse) -> Position {
    Position {
        cluster: cluster_id(listing.header()),
        revision: listing.header().map_or(0, ResponseHeader::revision),
    }
}

fn cluster_id(header: Option<&ResponseHeader>) -> u64 {
    header.map_or(0, ResponseHeader::cluster_id)
}
