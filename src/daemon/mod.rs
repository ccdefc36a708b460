//! Owns the order in which the parts start, run and end. Flannel specification section 1.5, reduced to what
//! exists; the device is open and everything probed before `subnet.env` says that pods may come.
//!
//! 1. signals, lock on the subnet file
//! 2. store, network configuration (waited for), external interface, lease
//! 3. data plane opened, device configured, routes published, workers started
//! 4. `subnet.env`
//! 5. status socket
//! 6. the run loop, until the lease is lost or a signal comes
//!
//! Stopping is dropping: every step holds what it made in a value whose `Drop` takes it away again, so a signal
//! may arrive anywhere.

mod backoff;
mod lock;
mod news;
mod register;
mod renewal;
mod session;
mod status;
mod tunnel;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::backend::kernel::{Change, Kernel, KernelError};
use crate::backend::preflight::Conflict;
use crate::backend::udp::MtuTooSmall;
use crate::datapath::{EngineKind, OpenError};
use crate::debug::socket::{Asked, Server};
use crate::iface::{NoInterface, Wanted};
use crate::netlink::Netlink;
use crate::shutdown::Shutdown;
use crate::store::env_file::{EnvFileError, PreviousEnv};
use crate::store::{LeaseStore, LocalStore, StoreError};

use session::Ended;

pub use lock::LockError;

/// Requests of status clients that may wait; the socket serves fewer clients.
const STATUS_QUEUE: usize = 16;

/// Wait between attempts to register again, once the daemon has run.
const REGISTER_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What the command line says, validated.
#[derive(Debug, Clone)]
pub struct Options {
    /// The external interface and the public IPs.
    pub wanted: Wanted,
    /// The file for the CNI plugin.
    pub subnet_file: PathBuf,
    /// The socket for `loden status`.
    pub status_socket: PathBuf,
    /// The directory of the local store.
    pub local_store: PathBuf,
    /// Workers of the data plane, at least 1.
    pub workers: usize,
    /// Pin each worker to a CPU.
    pub pin: bool,
    /// The engine of the data plane.
    pub engine: EngineKind,
}

/// Why the daemon ended by itself. Each text names the missing thing and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another daemon, or no place for the subnet file.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The process itself cannot be set up.
    #[error("cannot {action}: {source}")]
    Process {
        /// What was tried.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The kernel refuses to configure the network.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The network configuration is not valid, or no lease can be asked for.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no external interface.
    #[error(transparent)]
    Interface(#[from] NoInterface),
    /// The underlay's MTU is too small.
    #[error(transparent)]
    Mtu(#[from] MtuTooSmall),
    /// Something on the node rules the overlay out.
    #[error("{0}")]
    Conflict(Conflict),
    /// The data plane cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The data plane's device vanished while it was configured.
    #[error("device {0} vanished while it was configured: find out who removes it")]
    DeviceVanished(String),
    /// A worker could not be started.
    #[error("cannot start the workers: {0}: raise the limit on threads (ulimit -u, pids.max)")]
    Workers(io::Error),
    /// `subnet.env` cannot be written or read.
    #[error("{0}: make it a writable regular file, or give another --subnet-file")]
    EnvFile(#[from] EnvFileError),
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
///
/// Why it cannot run; nothing is left behind.
pub fn run(options: Options) -> Result<(), DaemonError> {
    let failed = |action| move |source| DaemonError::Process { action, source };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed("start the event loop"))?;
    let result = runtime.block_on(async {
        let mut shutdown = Shutdown::install().map_err(failed("watch for signals"))?;
        tokio::select! {
            biased;
            signal = shutdown.requested() => {
                let signal = signal.map_err(failed("read a signal"))?;
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

async fn serve(options: &Options) -> Result<(), DaemonError> {
    let _lock = lock::SubnetLock::take(&options.subnet_file)?;
    let store = LocalStore::new(&options.local_store);
    let kernel = Netlink::connect()?;
    let changes = kernel.monitor()?;
    let (asked, asked_receiver) = mpsc::channel(STATUS_QUEUE);
    let mut daemon = Daemon {
        options,
        store: &store,
        kernel: &kernel,
        changes,
        asked: asked_receiver,
        asked_sender: asked,
        server: None,
        started: Instant::now(),
        reopened: 0,
    };
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
    /// The status socket, from the first `subnet.env` on.
    server: Option<Server>,
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
                Err(error) if established => {
                    tracing::error!(
                        "cannot register again: {error}: trying every {REGISTER_AGAIN_AFTER:?}"
                    );
                    tokio::time::sleep(REGISTER_AGAIN_AFTER).await;
                }
                Err(error) => return Err(error),
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
