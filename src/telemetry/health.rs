//! Owns the HTTP answers about the daemon's health: `/healthz` and `/readyz` with flannel's texts (specification
//! section 11.1), and `/metrics`. Never decides whether the daemon is ready.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::metrics::{self, Snapshot};

/// How long a scrape waits for the daemon's figures.
const SCRAPE_LIMIT: Duration = Duration::from_secs(2);

/// Scrapes that may wait for their figures.
pub const SCRAPES: usize = 8;

/// What the daemon says about itself, for as long as it runs.
#[derive(Debug)]
pub struct Health {
    /// Why the daemon is not ready; empty if it is.
    missing: RwLock<Vec<String>>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            missing: RwLock::new(vec!["starting".to_owned()]),
        }
    }
}

impl Health {
    /// Says what is missing now; with nothing missing the daemon is ready.
    pub fn set(&self, missing: Vec<String>) {
        let mut held = self.missing.write().unwrap_or_else(PoisonError::into_inner);
        *held = missing;
    }

    /// Why the daemon is not ready; empty if it is.
    pub fn missing(&self) -> Vec<String> {
        let held = self.missing.read().unwrap_or_else(PoisonError::into_inner);
        held.clone()
    }
}

/// A request for the figures of this moment.
pub type Scrape = oneshot::Sender<Snapshot>;

#[derive(Clone)]
struct Shared {
    health: Arc<Health>,
    scrapes: mpsc::Sender<Scrape>,
}

/// Listens on `addr` and answers until the runtime ends.
///
/// # Errors
///
/// The address cannot be listened on.
pub async fn start(
    addr: SocketAddr,
    health: Arc<Health>,
    scrapes: mpsc::Sender<Scrape>,
) -> io::Result<()> {
    let listener = TcpListener::bind(addr).await?;
    let app = Router::new()
        .route("/healthz", any(|| async { "flanneld is running" }))
        .route("/readyz", any(ready))
        .route("/metrics", any(scrape))
        .with_state(Shared { health, scrapes });
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!("no more answers about health: {error}");
        }
    });
    Ok(())
}

async fn ready(State(shared): State<Shared>) -> Response {
    let missing = shared.health.missing();
    if missing.is_empty() {
        return "flanneld is ready".into_response();
    }
    let mut body = "flanneld is not ready yet".to_owned();
    for reason in missing {
        body.push('\n');
        body.push_str(&reason);
    }
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

async fn scrape(State(shared): State<Shared>) -> Response {
    let (asked, answer) = oneshot::channel();
    let figures = async {
        shared.scrapes.send(asked).await.ok()?;
        answer.await.ok()
    };
    let snapshot = match timeout(SCRAPE_LIMIT, figures).await {
        Ok(Some(snapshot)) => snapshot,
        Ok(None) | Err(_) => {
            let why = "the daemon has no lease yet, so there are no figures";
            return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
        }
    };
    match metrics::text(snapshot) {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
