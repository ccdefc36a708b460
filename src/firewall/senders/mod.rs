//! Owns the source check of the kernel's tunnel devices, which themselves take every datagram: one table that is kept
//! with the peers while the daemon runs and goes with it. Never decides who the peers are.
//!
//! A datagram of our network from an address that is no peer's is dropped before the device sees it, and so is or
//! afterwards a packet whose source is not in the lease of whoever wrapped it. Both are counted.

mod keeper;
mod table;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::debug;

use super::Error;
use super::kernel_events::{Events, Interest};
use super::tool::{self, SearchPath};
use crate::addr::Origin;

use keeper::Keeper;
pub(super) use table::is_ours;

/// Who may send what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Senders {
    /// Where datagrams may come from.
    pub outer: BTreeSet<IpAddr>,
    /// Where inner packets come from, each with the subnet that they may be from. Each kind of tunnel has its own
    /// kind of origin, and no other counts.
    pub inner: BTreeSet<(Origin, IpNet)>,
    /// To which addresses IPIP comes that is checked.
    pub own: BTreeSet<IpAddr>,
    /// From where IPIP is somebody else's, and not checked.
    pub others: BTreeSet<IpAddr>,
    /// VXLAN devices of other networks receive on the same port: only what is of ours is checked.
    pub shared: bool,
    /// The kernel's numbers of the VXLAN devices: for others of the same names the table is made anew.
    pub devices: Vec<u32>,
}

/// What is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The tunnel.
    pub kind: TunnelKind,
    /// Check where datagrams come from, too.
    pub outer: bool,
}

/// How packets are wrapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TunnelKind {
    /// Ethernet in VXLAN.
    Vxlan {
        /// The network identifier of all devices.
        vni: u32,
        /// The UDP port of all devices.
        port: u16,
        /// Their names.
        devices: Vec<String>,
    },
    /// IPv4 in IPv4.
    Ipip,
}

impl fmt::Display for TunnelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vxlan { .. } => "VXLAN",
            Self::Ipip => "IPIP",
        })
    }
}

/// Whose table is meant by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableOf {
    /// The VXLAN network of this number.
    Vxlan(u32),
    /// IPIP.
    Ipip,
}

/// How much is checked.
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
        let table = table::name(&tunnel.kind);
        let keeper = Keeper::new(nft.clone(), tunnel, scope, status);
        Ok(Self {
            wanted,
            status: follower,
            ask,
            table,
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
    kept: impl Fn(TableOf) -> bool + Send,
) -> Result<Vec<String>, Error> {
    let Some(nft) = SearchPath(search).find("nft") else {
        return Ok(Vec::new());
    };
    let listing = tool::run(&nft, &["list", "tables"], "")
        .await?
        .success("")?;
    let mut removed = Vec::new();
    for (name, of) in table::parse_tables(&listing) {
        if kept(of) {
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
async fn probe(nft: &Path, tunnel: &Tunnel) -> Result<(Scope, Option<String>), Error> {
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
        let place = table::least_place(&tunnel.kind);
        let script = table::replace(tunnel, scope, place, &Senders::default());
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
