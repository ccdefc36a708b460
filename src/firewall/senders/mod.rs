//! Owns the source check of the kernel's VXLAN devices, which themselves take every datagram: one table that is kept
//! with the peers while the daemon runs and goes with it. Never decides who the peers are.
//!
//! A datagram of our network from an address that is no peer's is dropped before the device sees it; what the device
//! has unwrapped is dropped unless the sender's MAC address and the inner source are those of one lease. Both are
//! counted.

mod table;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::Error;
use super::keeper::Repairs;
use super::kernel_events::{Events, Interest};
use super::tool::{self, SearchPath};
use crate::addr::Mac;

pub(super) use table::PREFIX;
use table::Place;

/// How long a burst of changes by others is given to end.
const SETTLE: Duration = Duration::from_millis(50);

/// The counters are read this often for those who do not ask.
const COUNT_EVERY: Duration = Duration::from_secs(10);

/// What failed is tried again after this long.
const RETRY: Duration = Duration::from_secs(5);

/// Who may send what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Senders {
    /// Where datagrams may come from.
    pub outer: BTreeSet<IpAddr>,
    /// Whose frames may hold packets from which subnet.
    pub inner: BTreeSet<(Mac, IpNet)>,
    /// The kernel's numbers of the devices: for others of the same names the table is made anew.
    pub devices: Vec<u32>,
}

/// The devices whose senders are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The network identifier of all of them.
    pub vni: u32,
    /// The UDP port of all of them.
    pub port: u16,
    /// Their names.
    pub devices: Vec<String>,
    /// Check where datagrams come from, too.
    pub outer: bool,
}

/// What is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Scope {
    /// Where datagrams come from.
    pub outer: bool,
    /// What they hold.
    pub inner: bool,
}

/// What a check does and has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SenderStatus {
    /// What is checked.
    pub scope: Scope,
    /// Why not all that was asked for.
    pub lacking: Option<String>,
    /// Datagrams of unknown nodes.
    pub unknown_peer: u64,
    /// Inner packets that their sender may not send.
    pub spoofed_source: u64,
    /// How often others had changed the table.
    pub repairs: u64,
    /// Why the table is not as it should be, if it is not.
    pub error: Option<String>,
}

/// A check that is kept up. Dropping it removes the table: what nobody keeps with the peers would keep new ones out.
#[derive(Debug)]
pub struct SenderCheck {
    wanted: watch::Sender<Option<Senders>>,
    status: watch::Receiver<SenderStatus>,
    ask: mpsc::Sender<oneshot::Sender<SenderStatus>>,
    task: JoinHandle<()>,
    nft: PathBuf,
    table: String,
}

impl SenderCheck {
    /// Probes what the kernel and `nft` can do, in the network namespace of the calling thread, and begins once
    /// somebody says who the senders are.
    ///
    /// # Errors
    /// There is no nft in `search`, or it can do none of it here.
    pub async fn start(search: Vec<PathBuf>, tunnel: Tunnel) -> Result<Self, Error> {
        let nft = SearchPath(search).require("nft", "nftables")?;
        let (scope, lacking) = probe(&nft, &tunnel).await?;
        let events = Events::subscribe(Interest::SenderTables).map_err(Error::Events)?;
        let status = watch::Sender::new(SenderStatus {
            scope,
            lacking,
            unknown_peer: 0,
            spoofed_source: 0,
            repairs: 0,
            error: None,
        });
        let (wanted, receiver) = watch::channel(None);
        let (ask, asked) = mpsc::channel(1);
        let follower = status.subscribe();
        let keeper = Keeper {
            nft: nft.clone(),
            table: table::name(&tunnel),
            tunnel,
            scope,
            held: None,
            shape: String::new(),
            before: (0, 0),
            status,
            repairs: Repairs::default(),
            retry_at: None,
        };
        Ok(Self {
            wanted,
            status: follower,
            ask,
            table: keeper.table.clone(),
            task: tokio::spawn(async move {
                if let Err(error) = keeper.run(events, receiver, asked).await {
                    tracing::error!("the source check is no longer looked after: {error}");
                }
            }),
            nft,
        })
    }

    /// Says who may send from now on.
    pub fn want(&self, senders: Senders) {
        self.wanted.send_if_modified(|wanted| {
            let differs = wanted.as_ref() != Some(&senders);
            *wanted = Some(senders);
            differs
        });
    }

    /// What was known when the counters were last read.
    #[must_use]
    pub fn last_status(&self) -> SenderStatus {
        self.status.borrow().clone()
    }

    /// What is known now.
    pub async fn status(&self) -> SenderStatus {
        let (answer, answered) = oneshot::channel();
        match self.ask.send(answer).await {
            Ok(()) => answered.await.unwrap_or_else(|_ended| self.last_status()),
            Err(_ended) => self.last_status(),
        }
    }
}

impl Drop for SenderCheck {
    fn drop(&mut self) {
        self.task.abort();
        let removed = std::process::Command::new(&self.nft)
            .args(["delete", "table", "inet", &self.table])
            .stdin(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status();
        // Without senders there was none.
        debug!(?removed, table = self.table, "source check ended");
    }
}

/// Removes the tables of checks that are not kept up any more; those of `kept` stay.
///
/// # Errors
/// That of nft. Without nft there are none, and nothing is wrong.
pub async fn sweep(
    search: Vec<PathBuf>,
    kept: impl Fn(u32) -> bool + Send,
) -> Result<Vec<String>, Error> {
    let Some(nft) = SearchPath(search).find("nft") else {
        return Ok(Vec::new());
    };
    let listing = tool::run(&nft, &["list", "tables"], "")
        .await?
        .success("")?;
    let mut removed = Vec::new();
    for name in table::parse_tables(&listing) {
        let vni = name.strip_prefix(PREFIX).and_then(|vni| vni.parse().ok());
        if vni.is_some_and(&kept) {
            continue;
        }
        let script = table::remove(&name);
        tool::run(&nft, &["-f", "-"], &script)
            .await?
            .success(&script)?;
        removed.push(format!("inet {name}"));
    }
    Ok(removed)
}

/// What can be checked here, and why not all of it.
async fn probe(nft: &std::path::Path, tunnel: &Tunnel) -> Result<(Scope, Option<String>), Error> {
    let mut lacking = None;
    for inner in [true, false] {
        let scope = Scope {
            outer: tunnel.outer,
            inner,
        };
        if !scope.inner && !scope.outer {
            break;
        }
        // Not only read but tried: the kernel says what it lacks when it makes the sets.
        let mut trial = tunnel.clone();
        trial.devices = vec!["loden-trial".to_owned()];
        let script = table::replace(&trial, scope, Place::Prerouting, &Senders::default());
        match tool::run(nft, &["--check", "-f", "-"], &script)
            .await?
            .success(&script)
        {
            Ok(_) => return Ok((scope, lacking)),
            Err(error) => lacking = Some(error.to_string()),
        }
    }
    Err(Error::NoSenderCheck(lacking.unwrap_or_default()))
}

/// The task's state.
struct Keeper {
    nft: PathBuf,
    table: String,
    tunnel: Tunnel,
    scope: Scope,
    /// What the table holds, as far as we know; none if it has to be made.
    held: Option<Senders>,
    /// How the table looks without elements and counts.
    shape: String,
    /// What was counted by tables that are gone.
    before: (u64, u64),
    status: watch::Sender<SenderStatus>,
    repairs: Repairs,
    retry_at: Option<Instant>,
}

impl Keeper {
    async fn run(
        mut self,
        mut events: Events,
        mut wanted: watch::Receiver<Option<Senders>>,
        mut asked: mpsc::Receiver<oneshot::Sender<SenderStatus>>,
    ) -> io::Result<()> {
        let mut verify = false;
        loop {
            let senders = wanted.borrow_and_update().clone();
            if let Some(senders) = senders {
                let outcome = self.bring(&senders, verify).await;
                self.note(outcome);
                // Our own changes are notified as well.
                events.forget()?;
            }
            verify = false;
            let retry_at = self.retry_at;
            let retry = async {
                match retry_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                heard = events.changed() => {
                    heard?;
                    tokio::time::sleep(SETTLE).await;
                    events.forget()?;
                    verify = true;
                }
                changed = wanted.changed() => if changed.is_err() {
                    return Ok(());
                },
                Some(answer) = asked.recv() => {
                    self.count().await;
                    // The client may have given up.
                    let _gone = answer.send(self.status.borrow().clone());
                }
                () = retry => verify = true,
                () = tokio::time::sleep(COUNT_EVERY) => self.count().await,
            }
        }
    }

    /// Makes the table hold these senders.
    async fn bring(&mut self, senders: &Senders, verify: bool) -> Result<(), Error> {
        if verify && self.held.is_some() && !self.is_intact().await? {
            self.count().await;
            self.forget_table();
            self.status.send_modify(|status| status.repairs += 1);
            info!("the source check of VXLAN was changed by somebody else, and is made anew");
            if let Some(pause) = self.repairs.note(Instant::now()) {
                warn!(
                    ?pause,
                    "another program keeps changing the source check of VXLAN"
                );
                self.retry_at = Some(Instant::now() + pause);
                return Ok(());
            }
        }
        if self.held.as_ref() == Some(senders) {
            return Ok(());
        }
        if let Some(held) = self
            .held
            .as_ref()
            .filter(|it| it.devices == senders.devices)
        {
            let script = table::edit(&self.tunnel, self.scope, held, senders);
            if self.transact(&script).await.is_ok() {
                self.held = Some(senders.clone());
                return Ok(());
            }
        }
        if self.held.is_some() {
            // Somebody has changed it, or the devices are not those that it was made for.
            self.count().await;
            self.forget_table();
        }
        let replace = |place| table::replace(&self.tunnel, self.scope, place, senders);
        if let Err(error) = self.transact(&replace(Place::Ingress)).await {
            debug!("inner packets are looked at with all of the node's: {error}");
            self.transact(&replace(Place::Prerouting)).await?;
        }
        self.shape = self
            .list(&["-s", "-t", "list", "table", "inet"], "")
            .await?;
        self.held = Some(senders.clone());
        debug!(table = self.table, "source check made");
        Ok(())
    }

    fn forget_table(&mut self) {
        let status = self.status.borrow();
        self.before = (status.unknown_peer, status.spoofed_source);
        self.held = None;
    }

    async fn transact(&self, script: &str) -> Result<(), Error> {
        let ended = tool::run(&self.nft, &["-f", "-"], script).await?;
        ended.success(script).map(drop)
    }

    async fn list(&self, args: &[&str], set: &str) -> Result<String, Error> {
        let mut args = args.to_vec();
        args.push(&self.table);
        if !set.is_empty() {
            args.push(set);
        }
        tool::run(&self.nft, &args, "").await?.success("")
    }

    /// Whether the table is as it was made, and holds what we put there.
    async fn is_intact(&self) -> Result<bool, Error> {
        let Some(held) = &self.held else {
            return Ok(false);
        };
        match self.list(&["-s", "-t", "list", "table", "inet"], "").await {
            Ok(shape) if shape == self.shape => {}
            Ok(_) | Err(Error::Refused { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
        for set in table::set_names(self.scope) {
            let listing = self.list(&["list", "set", "inet"], set).await?;
            if table::parse_elements(&listing) != table::elements(set, held) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads the counters.
    async fn count(&self) {
        if self.held.is_none() {
            return;
        }
        let listing = self.list(&["list", "counters", "table", "inet"], "").await;
        // A table that is gone is noticed by other means.
        let Ok(listing) = listing else { return };
        let count = |name| table::parse_counter(&listing, name).unwrap_or(0);
        let (unknown_peer, spoofed_source) = (
            self.before.0 + count(table::UNKNOWN_PEER),
            self.before.1 + count(table::SPOOFED_SOURCE),
        );
        self.status.send_modify(|status| {
            status.unknown_peer = unknown_peer;
            status.spoofed_source = spoofed_source;
        });
    }

    fn note(&mut self, outcome: Result<(), Error>) {
        let now = Instant::now();
        self.retry_at = self.retry_at.filter(|&at| at > now);
        let error = outcome.err().map(|error| error.to_string());
        if let Some(error) = &error {
            self.retry_at = Some(now + RETRY);
            if self.status.borrow().error.as_ref() != Some(error) {
                warn!("the source check of VXLAN is not in place: {error}");
            }
        }
        self.status.send_modify(|status| status.error = error);
    }
}
