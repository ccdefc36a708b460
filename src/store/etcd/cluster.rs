//! Owns the connection to the cluster: which endpoint is used, when it is given up for another, and that no call
//! waits for ever. Never knows what is stored.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use etcd_client::{Client, GetOptions, KvClient, LeaseClient, WatchClient};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Mutex;

use super::failure::{Failure, FailureCause, Failures};
use super::settings::{Endpoint, EtcdSettings, EtcdSettingsError};
use crate::store::random::random_below;

/// How long an endpoint may take to connect, authenticate and answer once.
const CONNECT: Duration = Duration::from_secs(3);

/// How long a connected endpoint may take to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// How long one endpoint is waited for before the next is tried beside it.
const HEAD_START: Duration = Duration::from_millis(250);

/// The largest answer read: 5 000 leases take about 1 MiB.
const MAX_ANSWER: usize = 256 << 20;

/// The members of a cluster, and the one in use.
pub(super) struct Cluster {
    settings: EtcdSettings,
    endpoints: Vec<Endpoint>,
    /// A key whose reading shows that a server works.
    probe: String,
    current: Mutex<Current>,
}

struct Current {
    /// The endpoint to try first.
    first: usize,
    connection: Option<Arc<Connection>>,
}

impl Cluster {
    pub(super) fn new(settings: EtcdSettings, probe: &str) -> Result<Self, EtcdSettingsError> {
        let endpoints = settings.parse_endpoints()?;
        for endpoint in &endpoints {
            settings.connect_options(endpoint)?;
        }
        // So that the nodes do not all use the same member.
        let first = random_below(endpoints.len());
        Ok(Self {
            settings,
            endpoints,
            probe: probe.to_owned(),
            current: Mutex::new(Current {
                first,
                connection: None,
            }),
        })
    }

    /// The endpoints, for a message.
    pub(super) fn location(&self) -> String {
        let urls: Vec<&str> = self.endpoints.iter().map(|e| e.url.as_str()).collect();
        urls.join(",")
    }

    /// The connection in use, or a new one if it was given up. Of several endpoints the first to answer is
    /// taken; each has a small head start before the next.
    pub(super) async fn connection(&self) -> Result<Arc<Connection>, Failures> {
        let mut current = self.current.lock().await;
        if let Some(connection) = &current.connection {
            if !connection.is_given_up() {
                return Ok(Arc::clone(connection));
            }
            current.first = connection.index + 1;
            current.connection = None;
        }
        let connection = Arc::new(self.connect(current.first).await?);
        current.connection = Some(Arc::clone(&connection));
        Ok(connection)
    }

    async fn connect(&self, first: usize) -> Result<Connection, Failures> {
        let count = self.endpoints.len();
        let mut waiting = (0..count).map(|n| (first + n) % count);
        let mut attempts = FuturesUnordered::new();
        let mut failures = Vec::new();
        loop {
            if let Some(index) = waiting.next() {
                attempts.push(self.attempt(index));
            }
            let more = waiting.len() > 0;
            tokio::select! {
                ended = attempts.next() => match ended {
                    Some(Ok(connection)) => return Ok(connection),
                    Some(Err(failure)) => failures.push(failure),
                    None => return Err(Failures(failures)),
                },
                () = tokio::time::sleep(HEAD_START), if more => {}
            }
        }
    }

    async fn attempt(&self, index: usize) -> Result<Connection, Failure> {
        let endpoint = &self.endpoints[index];
        tokio::time::timeout(CONNECT, self.open(index, endpoint))
            .await
            .unwrap_or_else(|_elapsed| Err(FailureCause::TimedOut(CONNECT)))
            .map_err(|cause| Failure {
                endpoint: endpoint.url.clone(),
                cause: cause.at_once(endpoint.tls, self.settings.cert_file.is_some()),
            })
    }

    async fn open(&self, index: usize, endpoint: &Endpoint) -> Result<Connection, FailureCause> {
        let user = self.settings.user();
        let cause = |e: &etcd_client::Error| FailureCause::of(e, user.map(|(name, _)| name));
        let options = self
            .settings
            .connect_options(endpoint)
            .map_err(|e| FailureCause::Local(e.to_string()))?;
        let anonymous = Client::connect([&endpoint.url], Some(options.clone()));
        let client = match user {
            None => anonymous.await.map_err(|e| cause(&e))?,
            Some((name, password)) => {
                let options = options.clone().with_user(name, password);
                let connected = Client::connect([&endpoint.url], Some(options)).await;
                match connected.map_err(|e| cause(&e)) {
                    // A user that is not asked for does no harm, as with flannel.
                    Err(FailureCause::AuthNotEnabled) => anonymous.await.map_err(|e| cause(&e))?,
                    connected => connected?,
                }
            }
        };
        let connection = Connection {
            index,
            endpoint: endpoint.url.clone(),
            user: user.map(|(name, _)| name.to_owned()),
            client,
            given_up: AtomicBool::new(false),
        };
        // Goes through the leader: whoever answers this has a majority behind it.
        let count_only = GetOptions::new().with_count_only();
        match connection
            .kv()
            .get(self.probe.as_str(), Some(count_only))
            .await
            .map_err(|e| cause(&e))
        {
            Ok(_) => Ok(connection),
            Err(answer) if answer.is_answer() => Ok(connection),
            Err(failed) => Err(failed),
        }
    }
}

/// A connection to one endpoint.
pub(super) struct Connection {
    index: usize,
    endpoint: String,
    user: Option<String>,
    client: Client,
    given_up: AtomicBool,
}

impl Connection {
    pub(super) fn kv(&self) -> KvClient {
        self.client
            .kv_client()
            .max_decoding_message_size(MAX_ANSWER)
    }

    pub(super) fn leases(&self) -> LeaseClient {
        self.client.lease_client()
    }

    pub(super) fn watches(&self) -> WatchClient {
        self.client
            .watch_client()
            .max_decoding_message_size(MAX_ANSWER)
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Waits for an answer, not for ever. A server that does not answer, or answers that it cannot, is not asked
    /// again before all others have been.
    pub(super) async fn call<T>(
        &self,
        rpc: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, Failure> {
        let cause = match tokio::time::timeout(ANSWER, rpc).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => FailureCause::of(&error, self.user.as_deref()),
            Err(_elapsed) => FailureCause::TimedOut(ANSWER),
        };
        if !cause.is_answer() {
            self.give_up();
        }
        Err(self.failure(cause))
    }

    /// A failure of this endpoint.
    pub(super) fn failure(&self, cause: FailureCause) -> Failure {
        Failure {
            endpoint: self.endpoint.clone(),
            cause,
        }
    }

    /// A failure in the words of etcd.
    pub(super) fn refusal(&self, message: &str) -> Failure {
        self.failure(FailureCause::of_message(message, self.user.as_deref()))
    }

    /// Has the next caller of [`Cluster::connection`] connect anew, to another endpoint if there is one.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }
}
