//! Owns the watch of all nodes: from the server's stream to events for the daemon, and what our own Node asks for.
//! Never interprets a node.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use super::Inner;
use super::event::Word;
use super::failure::{Permission, causes, explain_status};
use super::node::{Known, network_unavailable, subnets};
use super::view::View;
use crate::config::NetworkConfig;
use crate::store::backoff::Backoff;
use crate::store::{Cause, LostTo, StoreEvent};

/// Pauses between attempts to list or watch.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Without a failure for so long, the next pause is the first one again. What a server says just before it fails
/// again shortens no pause: thousands of daemons would list all nodes twice a second.
const STEADY: Duration = Duration::from_secs(60);

/// A server that has just started refuses for a moment what it allows: an operator has to act after so long.
const BARRED: Duration = Duration::from_secs(10);

/// How long the server may take for one page of a listing.
const PAGE: Duration = Duration::from_secs(30);

/// Our annotations are restored this much later, so that two who disagree about them do not flood the server.
const RESTORE_AFTER: Duration = Duration::from_secs(2);

const WATCH_NODES: Permission = Permission {
    resource: "nodes",
    verbs: "list watch",
};

struct Watch {
    store: Arc<Inner>,
    name: String,
    config: NetworkConfig,
    view: View,
    /// Our Node was among those listed last.
    own_listed: bool,
    /// A listing is under way; when it is given up, unless more of it comes.
    listing_until: Option<Instant>,
    /// When to write our annotations again.
    restore_at: Option<Instant>,
    /// When to ask the server itself whether our subnets are ours no longer, as the watch says.
    doubt_at: Option<Instant>,
    /// Our lease was lost, and the daemon not told yet.
    lost: Option<StoreEvent>,
    said: String,
    /// Since when the server has refused to know us.
    barred_since: Option<Instant>,
}

/// Watches until the receiver is dropped.
pub(super) async fn run(store: Arc<Inner>, events: mpsc::Sender<StoreEvent>) {
    let began = tokio::select! {
        began = begin(&store) => began,
        () = events.closed() => return,
    };
    let (name, config) = began;
    let mut watch = Watch {
        view: View::new(&name),
        name,
        config,
        own_listed: false,
        listing_until: None,
        restore_at: None,
        doubt_at: None,
        lost: None,
        said: String::new(),
        barred_since: None,
        store,
    };
    let mut stream = watch.open();
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut failed_at: Option<Instant> = None;
    let mut paused_until: Option<Instant> = None;
    loop {
        let now = Instant::now();
        let mut failure = None;
        tokio::select! {
            event = stream.next(), if paused_until.is_none() => match event {
                Some(Ok(event)) => watch.take(event),
                Some(Err(error)) => failure = Some(watch.failed(&error)),
                // It never ends by itself.
                None => return,
            },
            () = sleep_until(paused_until.unwrap_or(now)), if paused_until.is_some() => paused_until = None,
            () = sleep_until(watch.listing_until.unwrap_or(now)),
                if watch.listing_until.is_some() && paused_until.is_none() =>
            {
                watch.away(format!("no answer within {PAGE:?}"), Told::Away);
                failure = Some(Again::AtTheStart);
            }
            () = sleep_until(watch.restore_at.unwrap_or(now)), if watch.restore_at.is_some() => {
                watch.restore().await;
            }
            () = sleep_until(watch.doubt_at.unwrap_or(now)), if watch.doubt_at.is_some() => {
                watch.resolve().await;
            }
            permit = events.reserve(), if watch.lost.is_some() || watch.view.has_news() => match permit {
                Ok(permit) => match watch.lost.take() {
                    Some(lost) => permit.send(lost),
                    None => permit.send(watch.view.tell()),
                },
                Err(_closed) => return,
            },
            () = events.closed() => return,
        }
        let Some(again) = failure else {
            continue;
        };
        let now = Instant::now();
        if failed_at.is_none_or(|at| now.duration_since(at) > STEADY) {
            backoff.reset();
        }
        failed_at = Some(now);
        watch.listing_until = None;
        let asked = watch.store.courtesy.until().unwrap_or(now);
        paused_until = Some(asked.max(now + backoff.pause()));
        if let Again::AtTheStart = again {
            stream = watch.open();
        }
    }
}

/// Where a watch that failed goes on.
enum Again {
    /// Where it was, if it still knows.
    WhereItWas,
    /// With a new listing.
    AtTheStart,
}

/// Who hears of a failure.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    /// Who follows the store: it will pass.
    Away,
    /// Who looks at our Node, too: an operator has to act.
    Act,
}

/// What a watch has to know. The daemon has asked for both before, so they are there.
async fn begin(store: &Inner) -> (String, NetworkConfig) {
    loop {
        match store.name().await.map(str::to_owned) {
            Ok(name) => match store.network_config() {
                Ok(config) => return (name, config),
                Err(error) => tracing::warn!("no watch of the nodes yet: {error}"),
            },
            Err(error) => tracing::warn!("no watch of the nodes yet: {error}"),
        }
        sleep(LONGEST_PAUSE).await;
    }
}

impl Watch {
    /// A new stream, which begins with a listing.
    fn open(&self) -> BoxStream<'static, watcher::Result<Event<Node>>> {
        let config = watcher::Config {
            timeout: u32::try_from(self.store.settings.watch.as_secs()).ok(),
            ..watcher::Config::default()
        };
        watcher(self.store.nodes(), config).boxed()
    }

    fn take(&mut self, event: Event<Node>) {
        // The first of a listing is ours, before the server is asked.
        if !matches!(event, Event::Init) {
            self.said.clear();
            self.barred_since = None;
            self.view.say(self.store.location.clone(), None);
        }
        self.listing_until = match &event {
            Event::Init | Event::InitApply(_) => Some(Instant::now() + PAGE),
            Event::InitDone | Event::Apply(_) | Event::Delete(_) => None,
        };
        match event {
            Event::Init => {
                self.own_listed = false;
                self.view.begin();
            }
            Event::InitApply(node) => {
                self.own_listed |= self.look_at_own(&node);
                let (name, known) = self.known(node);
                self.view.list(name, known);
            }
            Event::InitDone => {
                self.view.done();
                if !self.own_listed {
                    self.doubt();
                }
            }
            Event::Apply(node) => {
                self.look_at_own(&node);
                let (name, known) = self.known(node);
                self.view.put(name, known);
            }
            Event::Delete(node) => {
                let name = node.metadata.name.unwrap_or_default();
                if name == self.name {
                    self.doubt();
                }
                self.view.remove(&name);
            }
        }
    }

    fn known(&self, node: Node) -> (String, Known) {
        let known = Known::new(&node, &self.store.settings.annotations, &self.config);
        (node.metadata.name.unwrap_or_default(), known)
    }

    /// Compares our Node with what it should be; whether this is our Node.
    fn look_at_own(&mut self, node: &Node) -> bool {
        if node.metadata.name.as_deref() != Some(&self.name) {
            return false;
        }
        self.store.condition_seen(network_unavailable(node));
        if self.is_lost(node) {
            self.doubt();
            return true;
        }
        let texts = node.metadata.annotations.clone().unwrap_or_default();
        if self.store.differs(&texts) && self.restore_at.is_none() {
            self.restore_at = Some(Instant::now() + RESTORE_AFTER);
        }
        true
    }

    /// Whether this Node of ours has other subnets than we hold.
    fn is_lost(&self, node: &Node) -> bool {
        let held = self.store.own(|own| own.as_ref().map(|own| own.subnets));
        // A Node without any is one that the watch is yet to hear more of: nobody can take a pod CIDR away.
        matches!((held, subnets(node, &self.config)), (Some(held), Ok(now)) if held != now)
    }

    /// Our subnets seem to be ours no longer. A listing may come from a server that lags behind, and a lease that is
    /// given up costs pods their network: the server is asked for our Node alone first.
    fn doubt(&mut self) {
        self.doubt_at = self.doubt_at.or_else(|| Some(Instant::now()));
    }

    async fn resolve(&mut self) {
        self.doubt_at = None;
        match self.store.look_up().await {
            Ok(Some(node)) if !self.is_lost(&node) => {
                tracing::debug!("our Node is as it was: what the watch said is out of date");
            }
            Ok(Some(_) | None) => self.lose(),
            Err(_unknown) => self.doubt_at = Some(Instant::now() + LONGEST_PAUSE),
        }
    }

    /// Our subnets are ours no longer.
    fn lose(&mut self) {
        if let Some(own) = self.store.own(Option::take) {
            self.lost = Some(StoreEvent::OwnLost {
                subnets: own.subnets,
                to: LostTo::Nobody,
            });
        }
    }

    async fn restore(&mut self) {
        let subject = format!("node {}", self.name);
        match self.store.restore().await {
            Ok(()) => {
                self.restore_at = None;
                self.view.mention(subject, Cause::Restored);
            }
            Err(error) => {
                let cause = Cause::Unwritable(error.to_string());
                let word = Word::warning("FlannelAnnotationsNotWritten", &cause.to_string());
                self.store.say(word);
                self.restore_at = Some(Instant::now() + LONGEST_PAUSE);
                self.view.mention(subject, cause);
            }
        }
    }

    fn failed(&mut self, error: &watcher::Error) -> Again {
        let status = match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status))
            | watcher::Error::WatchFailed(kube::Error::Api(status))
            | watcher::Error::WatchError(status) => status,
            watcher::Error::InitialListFailed(_)
            | watcher::Error::WatchStartFailed(_)
            | watcher::Error::WatchFailed(_)
            | watcher::Error::NoResourceVersion => {
                self.away(causes(error), Told::Away);
                return Again::WhereItWas;
            }
        };
        if status.code == 410 {
            // The place where we were is forgotten, whether the server says so at once or in the middle of a watch.
            tracing::debug!("all nodes are listed anew: {}", status.message);
            return Again::AtTheStart;
        }
        let told = match status.code {
            401 | 403 => Told::Act,
            _ => Told::Away,
        };
        self.away(explain_status(status, WATCH_NODES), told);
        Again::WhereItWas
    }

    fn away(&mut self, text: String, told: Told) {
        let now = Instant::now();
        if told == Told::Act && now.duration_since(*self.barred_since.get_or_insert(now)) >= BARRED
        {
            self.store
                .say(Word::warning("FlannelNeedsPermission", &text));
        }
        // Before the first listing the daemon has nobody to keep, and no event to hear of it by.
        if !self.view.is_listed() && text != self.said {
            tracing::warn!("no peers yet: {}: {text}", self.store.location);
            self.said.clone_from(&text);
        }
        self.view
            .say(self.store.location.clone(), Some(Cause::Away(text)));
    }
}
