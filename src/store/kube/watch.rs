//! Owns the watch of all nodes: from the server's stream to events for the daemon, and what our own Node asks for.
//! Never interprets a node.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use super::Inner;
use super::failure::{Permission, causes, explain, explain_status};
use super::node::{Known, network_unavailable, subnets};
use super::view::View;
use crate::config::NetworkConfig;
use crate::store::backoff::Backoff;
use crate::store::{Cause, LostTo, StoreEvent};

/// The server is asked to end a watch after so long. One that says nothing for five seconds more is dead.
const WATCH: Duration = Duration::from_secs(120);

/// Pauses between attempts to list or watch.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

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
    /// When to write our annotations again.
    restore_at: Option<Instant>,
    /// Our lease was lost, and the daemon not told yet.
    lost: Option<StoreEvent>,
    said: String,
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
        restore_at: None,
        lost: None,
        said: String::new(),
        store,
    };
    let seconds = u32::try_from(WATCH.as_secs()).ok();
    let config = watcher::Config {
        timeout: seconds,
        ..watcher::Config::default()
    };
    let mut stream = pin!(watcher(watch.store.nodes(), config));
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut paused_until: Option<Instant> = None;
    loop {
        let now = Instant::now();
        tokio::select! {
            event = stream.next(), if paused_until.is_none() => match event {
                Some(Ok(event)) => {
                    backoff.reset();
                    watch.take(event);
                }
                Some(Err(error)) => {
                    watch.failed(&error);
                    paused_until = Some(Instant::now() + backoff.pause());
                }
                // It never ends by itself.
                None => return,
            },
            () = sleep_until(paused_until.unwrap_or(now)), if paused_until.is_some() => paused_until = None,
            () = sleep_until(watch.restore_at.unwrap_or(now)), if watch.restore_at.is_some() => {
                watch.restore().await;
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
    }
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
    fn take(&mut self, event: Event<Node>) {
        self.said.clear();
        self.view.say(self.store.location.clone(), None);
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
                    self.lose();
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
                    self.lose();
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
        let held = self.store.own(|own| own.as_ref().map(|own| own.subnets));
        // A Node without any is one that the watch is yet to hear more of: nobody can take a pod CIDR away.
        if let (Some(held), Ok(now)) = (held, subnets(node, &self.config))
            && held != now
        {
            self.lose();
            return true;
        }
        let texts = node.metadata.annotations.clone().unwrap_or_default();
        if self.store.differs(&texts) && self.restore_at.is_none() {
            self.restore_at = Some(Instant::now() + RESTORE_AFTER);
        }
        true
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
                self.restore_at = Some(Instant::now() + LONGEST_PAUSE);
                self.view
                    .mention(subject, Cause::Unwritable(error.to_string()));
            }
        }
    }

    fn failed(&mut self, error: &watcher::Error) {
        let text = match error {
            watcher::Error::InitialListFailed(error)
            | watcher::Error::WatchStartFailed(error)
            | watcher::Error::WatchFailed(error) => explain(error, WATCH_NODES),
            // The place where we were is forgotten; the next attempt lists all nodes anew.
            watcher::Error::WatchError(status) if status.code == 410 => return,
            watcher::Error::WatchError(status) => explain_status(status, WATCH_NODES),
            watcher::Error::NoResourceVersion => causes(error),
        };
        // Before the first listing the daemon has nobody to keep, and no event to hear of it by.
        if !self.view.is_listed() && text != self.said {
            tracing::warn!("no peers yet: {}: {text}", self.store.location);
            self.said.clone_from(&text);
        }
        self.view
            .say(self.store.location.clone(), Some(Cause::Away(text)));
    }
}
