//! Owns waiting for what the parts of a session say, where there are such parts. Never acts on it.

use std::future::pending;

use crate::daemon::carrier::Carrier;
use crate::daemon::checksums::{Finding, Test};
use crate::daemon::traffic::Traffic;
use crate::datapath::Event;

/// What a test has found; never, while there is none.
pub(super) async fn ended(test: &mut Option<Test<'_>>) -> (u32, String, Finding) {
    match test {
        Some(test) => test.await,
        None => pending().await,
    }
}

/// Returns when the traffic rules were looked at; never, while nobody does.
pub(super) async fn looked(traffic: &mut Option<Traffic>) {
    match traffic {
        Some(traffic) => traffic.looked().await,
        None => pending().await,
    }
}

/// What the workers said.
pub(super) enum Said {
    News(Event),
    Fatal(Event),
}

/// The next event; never, while nothing is open.
pub(super) async fn next_event(carrier: &mut Option<Carrier>) -> Said {
    let Some(Carrier { events, .. }) = carrier else {
        return pending().await;
    };
    tokio::select! {
        Some(event) = events.fatal.recv() => Said::Fatal(event),
        Some(event) = events.news.recv() => Said::News(event),
        else => pending().await,
    }
}
