//! Owns keeping a source check's table while the daemon runs: made when the senders are known, edited as they change,
//! made anew when somebody else changed it, and its counters read. Never decides what is in it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::table;
use super::{Scope, SenderStatus, Senders, Tunnel};
use crate::firewall::Error;
use crate::firewall::keeper::Repairs;
use crate::firewall::kernel_events::Events;
use crate::firewall::tool;

/// How long a burst of changes by others is given to end.
const SETTLE: Duration = Duration::from_millis(50);

/// The counters are read this often for those who do not ask.
const COUNT_EVERY: Duration = Duration::from_secs(10);

/// What failed is tried again after this long.
const RETRY: Duration = Duration::from_secs(5);

/// After a change of ours the table is looked at once more: what somebody else changed meanwhile was notified among
/// our own changes.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// The task's state.
pub(super) struct Keeper {
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
    pub(super) fn new(
        nft: PathBuf,
        tunnel: Tunnel,
        scope: Scope,
        status: watch::Sender<SenderStatus>,
    ) -> Self {
        Self {
            nft,
            table: table::name(&tunnel.kind),
            tunnel,
            scope,
            held: None,
            shape: String::new(),
            before: (0, 0),
            status,
            repairs: Repairs::default(),
            retry_at: None,
        }
    }

    /// Keeps the table until nobody wants it any more.
    pub(super) async fn run(
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
                if self.note(outcome) {
                    // Our own changes are notified as well.
                    events.forget()?;
                }
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

    /// Makes the table hold these senders; whether it had to be changed.
    async fn bring(&mut self, senders: &Senders, verify: bool) -> Result<bool, Error> {
        if verify && self.held.is_some() && !self.is_intact().await? {
            self.count().await;
            self.forget_table();
            self.status.send_modify(|status| status.repairs += 1);
            let kind = &self.tunnel.kind;
            info!("the source check of {kind} was changed by somebody else, and is made anew");
            if let Some(pause) = self.repairs.note(Instant::now()) {
                warn!(
                    ?pause,
                    "another program keeps changing the source check of {kind}"
                );
                self.retry_at = Some(Instant::now() + pause);
                return Ok(false);
            }
        }
        if self.held.as_ref() == Some(senders) {
            return Ok(false);
        }
        if let Some(held) = self
            .held
            .as_ref()
            .filter(|it| (&it.devices, it.shared) == (&senders.devices, senders.shared))
        {
            let script = table::edit(&self.tunnel, self.scope, held, senders);
            if self.transact(&script).await.is_ok() {
                self.held = Some(senders.clone());
                return Ok(true);
            }
        }
        if self.held.is_some() {
            // Somebody has changed it, or the devices are not those that it was made for.
            self.count().await;
            self.forget_table();
        }
        let replace = |place| table::replace(&self.tunnel, self.scope, place, senders);
        let (best, least) = (
            table::best_place(&self.tunnel.kind),
            table::least_place(&self.tunnel.kind),
        );
        match self.transact(&replace(best)).await {
            Err(error) if best != least => {
                debug!("inner packets are looked at with all of the node's: {error}");
                self.transact(&replace(least)).await?;
            }
            made => made?,
        }
        self.shape = self
            .list(&["-s", "-t", "list", "table", "inet"], "")
            .await?;
        self.held = Some(senders.clone());
        debug!(table = self.table, "source check made");
        Ok(true)
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
        for set in table::set_names(&self.tunnel.kind, self.scope) {
            let listing = self.list(&["list", "set", "inet"], set).await?;
            if table::parse_elements(&listing) != table::elements(set, &self.tunnel, held) {
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

    /// Says in the status how it went; whether the table was changed.
    fn note(&mut self, outcome: Result<bool, Error>) -> bool {
        let now = Instant::now();
        self.retry_at = self.retry_at.filter(|&at| at > now);
        let changed = outcome.as_ref().is_ok_and(|&changed| changed);
        if changed {
            self.retry_at.get_or_insert(now + LOOK_AGAIN);
        }
        let error = outcome.err().map(|error| error.to_string());
        if let Some(error) = &error {
            self.retry_at = Some(now + RETRY);
            if self.status.borrow().error.as_ref() != Some(error) {
                warn!(
                    "the source check of {} is not in place: {error}",
                    self.tunnel.kind
                );
            }
        }
        self.status.send_modify(|status| status.error = error);
        changed
    }
}
