//! Owns the node's condition `NetworkUnavailable` (specification section 6.6): written until it is written, whenever
//! what it has to say changes or somebody else has written it. Never decides whether the network is available.

use std::sync::Weak;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::sync::watch;

use super::Inner;
use super::event::Word;
use crate::store::backoff::Backoff;

/// Two writes are at least this far apart.
const APART: Duration = Duration::from_secs(1);

/// The longest wait for another attempt.
const RETRY: Duration = Duration::from_secs(30);

/// Reasons, of the condition and of Events.
const UP: &str = "FlannelIsUp";
const DOWN: &str = "FlannelIsDown";
const UP_MESSAGE: &str = "Flannel is running on this node";

/// The longest message. The API server takes 32 KiB.
const MAX_MESSAGE_LEN: usize = 1024;

/// What the condition is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Report {
    Available,
    /// With what is missing.
    Unavailable(String),
}

impl Inner {
    /// Takes note of what is missing for pods to have a network. A change of that is also an Event.
    pub(super) fn report(&self, missing: &[String]) {
        let now = if missing.is_empty() {
            Report::Available
        } else {
            let text = missing.join("; ");
            Report::Unavailable(text.chars().take(MAX_MESSAGE_LEN).collect())
        };
        self.report.send_if_modified(|last| {
            if last.as_ref() == Some(&now) {
                return false;
            }
            match (&now, last.is_some()) {
                (Report::Unavailable(missing), _) => self.say(Word::warning(DOWN, missing)),
                (Report::Available, true) => self.say(Word::normal(UP, UP_MESSAGE)),
                // It was never otherwise.
                (Report::Available, false) => {}
            }
            *last = Some(now);
            true
        });
    }

    /// Our Node's condition says this now; `None` if there is none.
    pub(super) fn condition_seen(&self, unavailable: Option<bool>) {
        self.report.send_if_modified(|wanted| {
            let wanted = wanted
                .as_ref()
                .map(|wanted| matches!(wanted, Report::Unavailable(_)));
            wanted.is_some() && wanted != unavailable
        });
    }
}

/// Writes every report, for as long as there is a store.
pub(super) async fn keep(store: Weak<Inner>, mut reports: watch::Receiver<Option<Report>>) {
    let mut backoff = Backoff::new(APART, RETRY);
    let mut said = String::new();
    while reports.changed().await.is_ok() {
        loop {
            let report = reports.borrow_and_update().clone();
            let Some(store) = store.upgrade() else {
                return;
            };
            let Some(report) = report.filter(|_| store.settings.report_condition) else {
                break;
            };
            let Err(error) = write(&store, &report).await else {
                said.clear();
                backoff.reset();
                break;
            };
            drop(store);
            let error = error.to_string();
            if error != said {
                tracing::warn!(
                    "the node's condition NetworkUnavailable is not written, trying again: {error}"
                );
                said = error;
            }
            tokio::time::sleep(backoff.pause()).await;
        }
        tokio::time::sleep(APART).await;
    }
}

async fn write(store: &Inner, report: &Report) -> Result<(), crate::store::StoreError> {
    let (status, reason, message) = match report {
        Report::Available => ("False", UP, UP_MESSAGE),
        Report::Unavailable(missing) => ("True", DOWN, missing.as_str()),
    };
    let now = Time(Timestamp::now());
    let patch = json!({"status": {"conditions": [{
        "type": "NetworkUnavailable",
        "status": status,
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
        "reason": reason,
        "message": message,
    }]}});
    store.patch_status(&patch).await?;
    tracing::debug!(
        status,
        reason,
        message,
        "condition NetworkUnavailable written"
    );
    Ok(())
}
