//! Owns the Events about our Node, for who asks `kubectl describe node`: written once per text and hour, whoever
//! restarts meanwhile, and a few in all. Never a reason for anything else to wait or to fail.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Weak;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::mpsc;

use super::Inner;
use super::failure::{Permission, explain};
use crate::store::backoff::Backoff;
use crate::telemetry::rate_limit::{Allowance, RateLimit};

/// Where Events about objects without a namespace are.
const NAMESPACE: &str = "default";

/// Events that wait to be written. Further ones are lost; the log has them all.
pub(super) const WAITING: usize = 16;

/// One per text in this time. The API server keeps an Event as long (`--event-ttl`).
const EVERY: Duration = Duration::from_secs(60 * 60);

/// Whatever their texts, this many in that time.
const MOST: u32 = 20;

/// Pauses between attempts, and how many there are: ten minutes or so, but half a minute for who has no right to it.
/// A server that has just started may refuse what it allows a moment later.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const ATTEMPTS: u32 = 30;
const FORBIDDEN_ATTEMPTS: u32 = 5;

/// How long the server may take for one answer.
const ANSWER: Duration = Duration::from_secs(10);

/// The API server takes 1024 bytes (`pkg/apis/core/validation/events.go`).
const MAX_MESSAGE_LEN: usize = 1024;

/// Bytes of the node's name in that of an Event, whose limit is 253.
const MAX_NODE_LEN: usize = 200;

const CREATE: Permission = Permission {
    resource: "events",
    verbs: "create",
};

/// What an Event says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Word {
    /// `Warning` or `Normal`.
    kind: &'static str,
    /// For programs, in CamelCase.
    reason: &'static str,
    /// For people.
    message: String,
}

impl Word {
    pub(super) fn warning(reason: &'static str, message: &str) -> Self {
        Self::new("Warning", reason, message)
    }

    pub(super) fn normal(reason: &'static str, message: &str) -> Self {
        Self::new("Normal", reason, message)
    }

    fn new(kind: &'static str, reason: &'static str, message: &str) -> Self {
        let end = message.floor_char_boundary(MAX_MESSAGE_LEN);
        Self {
            kind,
            reason,
            message: message[..end].to_owned(),
        }
    }

    /// The name that whoever says the same in the same hour gives it, too.
    fn name(&self, node: &str, now: Timestamp) -> String {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        (now.as_second() / 3600).hash(&mut hasher);
        let node = &node[..node.floor_char_boundary(MAX_NODE_LEN)];
        let node = node.trim_end_matches(['.', '-']);
        format!("{node}.{:016x}", hasher.finish())
    }

    fn event(self, node: &str, now: Timestamp) -> Event {
        Event {
            metadata: ObjectMeta {
                name: Some(self.name(node, now)),
                namespace: Some(NAMESPACE.to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                kind: Some("Node".to_owned()),
                name: Some(node.to_owned()),
                // As kubelet does, and kubectl expects it.
                uid: Some(node.to_owned()),
                ..ObjectReference::default()
            },
            type_: Some(self.kind.to_owned()),
            reason: Some(self.reason.to_owned()),
            message: Some(self.message),
            source: Some(EventSource {
                component: Some("loden".to_owned()),
                host: Some(node.to_owned()),
            }),
            count: Some(1),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            ..Event::default()
        }
    }
}

/// Writes what is said, for as long as there is a store.
pub(super) async fn keep(store: Weak<Inner>, mut words: mpsc::Receiver<Word>) {
    let mut each = RateLimit::new(EVERY);
    let mut all = Allowance::new(MOST, EVERY);
    let mut refused = String::new();
    while let Some(word) = words.recv().await {
        let now = Instant::now();
        if each.allow(word.clone(), now).is_none() || !all.allow(now) {
            continue;
        }
        if let Err(why) = write(&store, word).await
            && why != refused
        {
            tracing::warn!("an Event about our Node is not written: {why}");
            refused = why;
        }
    }
}

/// Writes one; the reason, if there is no hope.
async fn write(store: &Weak<Inner>, word: Word) -> Result<(), String> {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut why = String::new();
    let mut forbidden = 0;
    for _ in 0..ATTEMPTS {
        let Some(store) = store.upgrade() else {
            return Ok(());
        };
        why = match attempt(&store, &word).await {
            Ok(()) => return Ok(()),
            Err(Failure::Final(why)) => return Err(why),
            Err(Failure::Forbidden(why)) => {
                forbidden += 1;
                why
            }
            Err(Failure::Passing(why)) => why,
        };
        if forbidden == FORBIDDEN_ATTEMPTS {
            break;
        }
        drop(store);
        tokio::time::sleep(backoff.pause()).await;
    }
    Err(why)
}

enum Failure {
    Final(String),
    Forbidden(String),
    Passing(String),
}

async fn attempt(store: &Inner, word: &Word) -> Result<(), Failure> {
    let name = store.name().await;
    let node = name.map_err(|e| Failure::Passing(e.to_string()))?;
    store.wait_our_turn().await;
    let events: Api<Event> = Api::namespaced(store.client.clone(), NAMESPACE);
    let event = word.clone().event(node, Timestamp::now());
    let parameters = PostParams::default();
    let error = match tokio::time::timeout(ANSWER, events.create(&parameters, &event)).await {
        Ok(Ok(_)) => return Ok(()),
        Ok(Err(error)) => error,
        Err(_elapsed) => return Err(Failure::Passing(format!("no answer within {ANSWER:?}"))),
    };
    let why = explain(&error, CREATE);
    let kube::Error::Api(status) = error else {
        return Err(Failure::Passing(why));
    };
    match status.code {
        // Said already in this hour, perhaps by the run before.
        409 => Ok(()),
        403 => Err(Failure::Forbidden(why)),
        400 | 404 | 422 => Err(Failure::Final(why)),
        _ => Err(Failure::Passing(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_same_word_has_the_same_name_for_an_hour_and_another_one_another() {
        let word = Word::warning("FlannelIsDown", "no pod CIDR");
        let name = word.name("n1", at(3600));
        assert_eq!(name, word.name("n1", at(7199)));
        assert_ne!(name, word.name("n1", at(7200)));
        assert_ne!(
            name,
            Word::warning("FlannelIsDown", "x").name("n1", at(3600))
        );
        assert!(name.starts_with("n1."));
    }

    #[test]
    fn no_text_is_longer_than_the_server_takes() {
        let word = Word::normal("FlannelIsUp", &"ö".repeat(1000));
        assert!(word.message.len() <= MAX_MESSAGE_LEN && word.message.len() > 1000);
        let node = format!("{}.{}", "a".repeat(199), "b".repeat(53));
        assert!(word.name(&node, at(0)).len() <= 253);
        assert!(!word.name(&node, at(0)).contains(".."));
    }
}
