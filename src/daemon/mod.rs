//! Owns the order in which the parts start, run and end. Flannel specification section 1.5, reduced to what
//! exists; the device is open and everything probed before `subnet.env` says that pods may come.
//!
//! 1. signals, lock on the subnet file
//! 2. answers about health, status socket: they say what is waited for
//! 3. store, network configuration (waited for), external interface, lease
//! 4. data plane opened, device configured, routes published, workers started; or the kernel programmed, where it
//!    is what carries the packets
//! 5. traffic rules
//! 6. `subnet.env`, readiness
//! 7. the run loop, until the lease is lost or a signal comes
//!
//! Stopping is dropping: every step holds what it made in a value whose `Drop` takes it away again, so a signal
//! may arrive anywhere.

mod asked;
mod backoff;
mod carrier;
mod checksums;
mod doctor;
mod error;
mod explain;
mod extension;
mod guard;
mod hold;
mod lock;
mod news;
mod past;
pub mod preflight;
mod probes;
mod publication;
mod register;
mod renewal;
mod served;
mod session;
mod status;
mod traffic;
mod tunnel;

use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::sync::mpsc;

use crate::backend::kernel::{Change, Kernel};
use crate::config::NetworkConfig;
use crate::datapath::EngineKind;
use crate::debug::socket::{Asked, Server};
use crate::firewall::ResyncInterval;
use crate::iface::Wanted;
use crate::netlink::Netlink;
use crate::shutdown::Shutdown;
use crate::store::env_file::PreviousEnv;
use crate::store::etcd::EtcdSettings;
use crate::store::kube::KubeSettings;
use crate::store::{EtcdStore, KubeStore, LeaseStore, LocalStore, StoreError};
use crate::sys::heap;
use crate::telemetry::health::{self, Health, SCRAPES, Scrape};

use probes::Probes;
use session::Ended;

pub use error::DaemonError;
pub use extension::CommandError;
pub use lock::LockError;

/// Requests of status clients that may wait; the socket serves fewer clients.
const STATUS_QUEUE: usize = 16;

/// Wait between attempts to register again, once the daemon has run.
const REGISTER_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What is missing first of all.
const NO_LEASE: &str = "no lease yet";

/// How long `--print-config` waits for the store.
const ASK_ONCE: Duration = Duration::from_secs(3);

/// Where the network configuration and the leases are.
#[derive(Debug, Clone)]
pub enum StoreOptions {
    /// In a directory.
    Local(PathBuf),
    /// In etcd.
    Etcd(EtcdSettings),
    /// In the Node objects of Kubernetes.
    Kube(KubeSettings),
}

/// The node's traffic rules, as far as the command line decides.
#[derive(Debug, Clone)]
pub struct TrafficOptions {
    /// `--ip-masq`.
    pub masquerade: bool,
    /// Ask for random ports when masquerading, where that is possible.
    pub fully_random: bool,
    /// `--iptables-forward-rules`.
    pub forward: bool,
    /// How often the rules are looked at where nobody tells of a change; also the blackhole route.
    pub resync: ResyncInterval,
    /// `--ip-blackhole-route`.
    pub blackhole: bool,
    /// Where the programs are that know the rules.
    pub programs: Vec<PathBuf>,
}

/// What the command line says, validated.
#[derive(Debug, Clone)]
pub struct Options {
    /// The external interface and the public IPs.
    pub wanted: Wanted,
    /// The file for the CNI plugin.
    pub subnet_file: PathBuf,
    /// The socket for `loden status`.
    pub status_socket: PathBuf,
    /// The store.
    pub store: StoreOptions,
    /// The lease is renewed this long before it ends.
    pub renew_margin: Duration,
    /// The traffic rules.
    pub traffic: TrafficOptions,
    /// Where to answer about health, if anywhere.
    pub health: Option<SocketAddr>,
    /// Workers of the data plane, at least 1.
    pub workers: usize,
    /// Pin each worker to a CPU.
    pub pin: bool,
    /// The engine of the data plane.
    pub engine: EngineKind,
    /// Who carries the packets of the `vxlan` backend.
    pub vxlan: VxlanPlace,
    /// Finding out how peers are reached.
    pub probes: ProbeOptions,
}

/// Finding out how peers are reached.
#[derive(Debug, Clone, Copy)]
pub struct ProbeOptions {
    /// The port of everybody's responder; without one, nobody is answered or probed.
    pub port: Option<NonZero<u16>>,
    /// Probe a few peers all the time.
    pub background: bool,
}

/// Who carries the packets of the `vxlan` backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum VxlanPlace {
    /// The kernel's device, or our own data plane where the kernel makes none.
    Auto,
    /// The kernel's device.
    Kernel,
    /// Our own data plane.
    User,
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
///
/// Why it cannot run; nothing is left behind.
pub fn run(options: Options) -> Result<(), DaemonError> {
    let failed = |action| move |source| DaemonError::Process { action, source };
    heap::share();
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let mut shutdown = Shutdown::install().map_err(failed("watch for signals"))?;
        tokio::select! {
            biased;
            signal = shutdown.requested() => {
                let signal = signal.map_err(failed("read a signal"))?;
                notify(NotifyState::Stopping);
                tracing::info!(%signal, "stopped");
                Ok(())
            }
            result = serve(&options) => result,
        }
    });
    // A store's blocking call may hang on a dead disk; nothing waits for it any more.
    runtime.shutdown_background();
    result
}

/// The network configuration as the store has it now, waited for no longer than a few seconds.
///
/// # Errors
///
/// What the store says.
pub fn network_config(options: &Options) -> Result<NetworkConfig, DaemonError> {
    async fn ask(store: impl LeaseStore) -> Result<NetworkConfig, StoreError> {
        match tokio::time::timeout(ASK_ONCE, store.network_config()).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(StoreError::Unavailable {
                location: "the store".to_owned(),
                source: std::io::ErrorKind::TimedOut.into(),
            }),
        }
    }
    let runtime = runtime()?;
    let config = runtime.block_on(async {
        Ok(match &options.store {
            StoreOptions::Local(dir) => ask(LocalStore::new(dir)).await?,
            StoreOptions::Etcd(settings) => ask(EtcdStore::new(settings.clone())?).await?,
            StoreOptions::Kube(settings) => ask(KubeStore::new(settings.clone()).await?).await?,
        })
    });
    runtime.shutdown_background();
    config
}

fn runtime() -> Result<tokio::runtime::Runtime, DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.map_err(|source| DaemonError::Process {
        action: "start the event loop",
        source,
    })
}

/// Tells the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!("the service manager does not listen: {error}");
    }
}

async fn serve(options: &Options) -> Result<(), DaemonError> {
    match &options.store {
        StoreOptions::Local(dir) => serve_with(options, LocalStore::new(dir)).await,
        StoreOptions::Etcd(settings) => {
            serve_with(options, EtcdStore::new(settings.clone())?).await
        }
        StoreOptions::Kube(settings) => {
            serve_with(options, KubeStore::new(settings.clone()).await?).await
        }
    }
}

async fn serve_with(options: &Options, store: impl LeaseStore) -> Result<(), DaemonError> {
    let _lock = lock::SubnetLock::take(&options.subnet_file).await?;
    let (scrape, scrapes) = mpsc::channel(SCRAPES);
    let health = Arc::new(Health::default());
    if let Some(addr) = options.health {
        let started = health::start(addr, Arc::clone(&health), scrape.clone()).await;
        started.map_err(|source| DaemonError::Health { addr, source })?;
    }
    let kernel = Netlink::connect()?;
    let changes = kernel.monitor()?;
    let (asked, asked_receiver) = mpsc::channel(STATUS_QUEUE);
    let (resolver, resolved) = mpsc::channel(STATUS_QUEUE);
    let mut daemon = Daemon {
        options,
        store: &store,
        kernel: &kernel,
        changes,
        asked: asked_receiver,
        asked_sender: asked,
        resolved,
        resolver,
        server: None,
        probes: Probes::new(options.probes),
        health,
        scrapes,
        _scrape: scrape,
        started: Instant::now(),
        reopened: 0,
    };
    // It is tried again, and complained of, when the daemon is ready.
    daemon.server = Server::start(&options.status_socket, daemon.asked_sender.clone()).ok();
    daemon.run().await
}

/// What outlives a lease.
struct Daemon<'a, S, K> {
    options: &'a Options,
    store: &'a S,
    kernel: &'a K,
    changes: mpsc::Receiver<Change>,
    asked: mpsc::Receiver<Asked>,
    asked_sender: mpsc::Sender<Asked>,
    /// Packets that were asked about, as soon as it is known who is meant.
    resolved: mpsc::Receiver<asked::Resolved>,
    resolver: mpsc::Sender<asked::Resolved>,
    /// The status socket.
    server: Option<Server>,
    probes: Probes,
    health: Arc<Health>,
    scrapes: mpsc::Receiver<Scrape>,
    /// Keeps the receiver open where nobody listens.
    _scrape: mpsc::Sender<Scrape>,
    started: Instant,
    /// How often the data plane was opened again.
    reopened: u64,
}

impl<S: LeaseStore, K: Kernel> Daemon<'_, S, K> {
    /// One session per lease. Before the first one runs, an error ends the daemon; later it is tried again.
    async fn run(&mut self) -> Result<(), DaemonError> {
        let mut previous = self.previous()?;
        let mut established = false;
        loop {
            match self.session(previous, &mut established).await {
                Ok(Ended::LeaseLost { subnets, to }) => {
                    tracing::error!(
                        "lease {subnets} is lost: {to}: registering again with another subnet; \
                         restart the pods of this node"
                    );
                    previous = None;
                }
                Ok(Ended::LeaseMoved { subnets, to }) => {
                    tracing::error!(
                        "lease {subnets} was deleted and cannot be had again: this node has {to} now; \
                         restart its pods"
                    );
                    previous = Some(to);
                }
                Err(error) if established => {
                    tracing::error!(
                        "cannot register again: {error}: trying every {REGISTER_AGAIN_AFTER:?}"
                    );
                    let health = Arc::clone(&self.health);
                    health.set(vec![
                        NO_LEASE.to_owned(),
                        format!("cannot register again: {error}"),
                    ]);
                    self.answering(tokio::time::sleep(REGISTER_AGAIN_AFTER))
                        .await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for what needs nothing of the daemon. Whoever asks meanwhile is told that there is no lease, and why.
    async fn answering<T>(&mut self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                Some(asked) = self.asked.recv() => asked.refuse(&self.health.missing()),
                // Whoever scrapes is told as soon as the place for the figures is gone.
                Some(_scrape) = self.scrapes.recv() => {}
            }
        }
    }

    /// The subnets of the run before.
    fn previous(&self) -> Result<Option<crate::lease::Subnets>, DaemonError> {
        let env = PreviousEnv::read(&self.options.subnet_file)?;
        for skipped in &env.skipped {
            let file = self.options.subnet_file.display();
            tracing::warn!("{file}: {skipped}: ignored");
        }
        Ok(env.previous())
    }
}
