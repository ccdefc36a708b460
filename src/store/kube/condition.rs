//! Owns the node's condition `NetworkUnavailable` (specification section 6.6): written until it is written, whenever
//! what it has to say changes or somebody else has written it. Never decides whether the network is available.

use std::sync::Weak;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::sync::watch;

use super::Inner;
use crate::store::backoff::Backoff;

/// Two writes are at least this far apart.
const APART: Duration = Duration::from_secs(1);

/// The longest wait for another attempt.
const RETRY: Duration = Duration::from_secs(30);

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
    /// Takes note of what is missing for pods to have a network.
    pub(super) fn report(&self, missing: &[String]) {
        let now = if missing.is_empty() {
            Report::Available
        } else {
            let text = missing.join("; ");
            Report::Unavailable(text.chars().take(MAX_MESSAGE_LEN).collect())
        };
        self.report.send_if_modified(|last| {
            let differs = self.settings.report_condition && last.as_ref() != Some(&now);
            if differs {
                *last = Some(now);
            }
            differs
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
            let Some(report) = report else {
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
        Report::Available => ("False", "FlannelIsUp", "Flannel is running on this node"),
        Report::Unavailable(missing) => ("True", "FlannelIsDown", missing.as_str()),
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
