//! Owns the run loop for as long as one lease is held: what the store, the kernel, the workers, the clock and
//! status clients say, one thing at a time. All state of the session has this one owner.

use std::cell::Cell;
use std::future::pending;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};

use super::backoff::Backoff;
use super::news::sentence;
use super::register::{self, Registration};
use super::renewal::keep_renewed;
use super::status;
use super::tunnel::Tunnel;
use super::{Daemon, DaemonError};
use crate::backend::kernel::{Change, Kernel};
use crate::backend::reconcile::Outcome;
use crate::backend::udp;
use crate::datapath::{Event, PeerRoute};
use crate::debug::socket::Server;
use crate::iface;
use crate::lease::{Lease, LeaseSet, Subnets};
use crate::store::env_file::SubnetEnv;
use crate::store::{Cause, LeaseStore, LostTo, Problem, StoreEvent};
use crate::telemetry::rate_limit::RateLimit;

/// How long the start waits for the peers before packets flow without them. The local store answers at once.
const FIRST_PEERS: Duration = Duration::from_secs(1);

/// A burst of notifications about the device is answered by one look, this much later.
const SETTLE: Duration = Duration::from_millis(20);

/// News of the external interface is looked into this much later, when an address that is taken away only to be
/// set again is back.
const SETTLE_INTERFACE: Duration = Duration::from_secs(1);

/// The device is looked at this often without any notification.
const RESYNC: Duration = Duration::from_secs(10);

/// Repeated log lines about the same thing are this far apart.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Problems of the store that are remembered for status.
const MAX_PROBLEMS: usize = 64;

/// How a session ended.
pub(super) enum Ended {
    /// The lease is no longer ours.
    LeaseLost { subnets: Subnets, to: LostTo },
}

/// One lease's time.
pub(super) struct Session {
    pub(super) registration: Registration,
    pub(super) peers: LeaseSet,
    /// Peers that publish no address of our underlay's family.
    pub(super) unreachable: Vec<Lease>,
    pub(super) problems: Vec<Problem>,
    pub(super) tunnel: Option<Tunnel>,
    /// Why the tunnel is down, if it is.
    pub(super) down: Option<String>,
    backoff: Backoff,
    reopen_at: Instant,
    /// When to look at the device next.
    look_at: Instant,
    /// When to choose the external interface again, to compare.
    choose_at: Option<Instant>,
    /// How the external interface differs from what was registered, if it does.
    pub(super) moved: Option<String>,
    log: RateLimit<String>,
}

impl<S: LeaseStore, K: Kernel> Daemon<'_, S, K> {
    /// Registers and runs until the lease is lost. Sets `established` once pods may come.
    pub(super) async fn session(
        &mut self,
        previous: Option<Subnets>,
        established: &mut bool,
    ) -> Result<Ended, DaemonError> {
        let registration =
            register::register(self.store, self.kernel, &self.options.wanted, previous).await?;
        let mut events = self.store.watch();
        let now = Instant::now();
        let mut session = Session {
            peers: LeaseSet::new(registration.lease.subnets, &registration.config),
            registration,
            unreachable: Vec::new(),
            problems: Vec::new(),
            tunnel: None,
            down: None,
            backoff: Backoff::default(),
            reopen_at: now,
            look_at: now + RESYNC,
            choose_at: None,
            moved: None,
            log: RateLimit::new(LOG_EVERY),
        };
        match timeout(FIRST_PEERS, events.recv()).await {
            Ok(Some(StoreEvent::OwnLost { subnets, to })) => {
                return Ok(Ended::LeaseLost { subnets, to });
            }
            Ok(Some(event)) => {
                session.apply(event);
            }
            Ok(None) | Err(_) => tracing::warn!("no peers yet: the store has not listed any"),
        }
        let routes = session.routes();
        let opened = Tunnel::open(self.options, &session.registration, self.kernel, &routes);
        session.tunnel = Some(opened.await?);
        session.backoff.succeeded(Instant::now());
        session.env().write(&self.options.subnet_file)?;
        *established = true;
        self.start_server();
        tracing::info!("{} written: ready", self.options.subnet_file.display());
        self.run_loop(session, events).await
    }

    /// A daemon without its status socket is worse than one with it, and better than none.
    fn start_server(&mut self) {
        if self.server.is_some() {
            return;
        }
        match Server::start(&self.options.status_socket, self.asked_sender.clone()) {
            Ok(server) => self.server = Some(server),
            Err(error) => tracing::error!("no status socket: {error}"),
        }
    }

    async fn run_loop(
        &mut self,
        mut session: Session,
        mut events: mpsc::Receiver<StoreEvent>,
    ) -> Result<Ended, DaemonError> {
        let expires = Cell::new(session.registration.lease.expires);
        let renewal = keep_renewed(self.store, session.registration.lease.clone(), &expires);
        tokio::pin!(renewal);
        let mut store_ended = false;
        loop {
            let wake_at = match session.tunnel {
                Some(_) => session.look_at,
                None => session.reopen_at,
            };
            let choose_at = session.choose_at.unwrap_or(wake_at);
            tokio::select! {
                event = events.recv(), if !store_ended => match event {
                    Some(StoreEvent::OwnLost { subnets, to }) => {
                        return Ok(Ended::LeaseLost { subnets, to });
                    }
                    Some(event) => {
                        if session.apply(event) {
                            session.publish();
                        }
                    }
                    None => {
                        tracing::error!("the store reports no changes any more: peers stay as they are");
                        store_ended = true;
                    }
                },
                to = &mut renewal => {
                    let subnets = session.peers.own();
                    return Ok(Ended::LeaseLost { subnets, to });
                }
                said = next_event(&mut session.tunnel) => match said {
                    Said::News(event) => session.log_limited(sentence(&event)),
                    Said::Fatal(event) => session.close(&sentence(&event)),
                },
                Some(change) = self.changes.recv() => session.notice(change),
                Some(asked) = self.asked.recv() => {
                    let document = status::document(self, &session, expires.get()).await;
                    // The client may have given up.
                    let _gone = asked.answer.send(document);
                }
                () = sleep_until(choose_at.into()), if session.choose_at.is_some() => {
                    session.choose_at = None;
                    self.compare_interface(&mut session).await;
                }
                () = sleep_until(wake_at.into()) => match session.tunnel {
                    Some(_) => session.look(self.kernel).await,
                    None => self.reopen(&mut session).await,
                },
            }
        }
    }

    /// Says so if the choice of the external interface would be another one today. The lease names the address
    /// of the start, and so do the peers.
    async fn compare_interface(&self, session: &mut Session) {
        let Ok(snapshot) = self.kernel.snapshot().await else {
            return;
        };
        let registration = &session.registration;
        let (wanted, was) = (&self.options.wanted, &registration.choice);
        let decision = iface::choose(&snapshot, wanted, udp::stack(&registration.config, wanted));
        let moved = match decision.choice {
            Ok(now) if (now.addr, now.public) == (was.addr, was.public) => None,
            Ok(now) => Some(format!(
                "the external interface is {} with {} now, the lease names {}: restart the daemon to \
                 move the lease",
                now.name, now.addr, was.public
            )),
            Err(error) => Some(format!("{} with {} is gone: {error}", was.name, was.addr)),
        };
        if moved != session.moved {
            match &moved {
                Some(text) => tracing::warn!("{text}"),
                None => tracing::info!(
                    "the external interface is back: {} with {}",
                    was.name,
                    was.addr
                ),
            }
        }
        session.moved = moved;
    }

    async fn reopen(&mut self, session: &mut Session) {
        let routes = session.routes();
        let opened = Tunnel::open(self.options, &session.registration, self.kernel, &routes);
        match opened.await {
            Ok(tunnel) => {
                session.tunnel = Some(tunnel);
                session.down = None;
                session.backoff.succeeded(Instant::now());
                session.look_at = Instant::now() + RESYNC;
                self.reopened += 1;
            }
            Err(error) => session.close(&error.to_string()),
        }
    }
}

impl Session {
    /// Takes news from the store in; whether any peer is concerned.
    fn apply(&mut self, event: StoreEvent) -> bool {
        let (applied, problems) = match event {
            StoreEvent::Snapshot { leases, problems } => {
                (self.peers.apply_snapshot(leases), problems)
            }
            StoreEvent::Delta { deltas, problems } => (self.peers.apply_delta(deltas), problems),
            StoreEvent::OwnLost { .. } => return false,
        };
        for change in &applied.changes {
            tracing::debug!(?change, "peer");
        }
        for refused in &applied.refused {
            tracing::warn!("{refused}");
        }
        for problem in problems {
            self.problems
                .retain(|known| known.subject != problem.subject);
            if problem.cause == Cause::Solved {
                tracing::info!("{problem}");
                continue;
            }
            self.log_limited(problem.to_string());
            if self.problems.len() >= MAX_PROBLEMS {
                self.problems.remove(0);
            }
            self.problems.push(problem);
        }
        !applied.changes.is_empty()
    }

    fn publish(&mut self) {
        let routes = self.routes();
        if let Some(tunnel) = &self.tunnel {
            tunnel.publish(&routes);
        }
    }

    /// The forwarding table of the peers as they are now.
    fn routes(&mut self) -> Vec<PeerRoute> {
        let (routes, unreachable) = self.registration.underlay.routes(self.peers.leases());
        let unreachable: Vec<Lease> = unreachable.into_iter().cloned().collect();
        for lease in unreachable
            .iter()
            .filter(|lease| !self.unreachable.contains(lease))
        {
            tracing::warn!(
                "lease {} publishes no address of the family of {}: its packets have no route",
                lease.subnets,
                self.registration.underlay.bind.ip()
            );
        }
        self.unreachable = unreachable;
        routes
    }

    fn env(&self) -> SubnetEnv {
        let registration = &self.registration;
        let config = &registration.config;
        SubnetEnv {
            network: config.ipv4.as_ref().map(|pool| pool.network()),
            ipv6_network: config.ipv6.as_ref().map(|pool| pool.network()),
            subnets: registration.lease.subnets,
            mtu: registration.underlay.mtu,
            ip_masq: false,
        }
    }

    /// Makes the next look at the device come soon if the change may be about it.
    fn notice(&mut self, change: Change) {
        let external = self.registration.choice.index;
        let about_external = match change {
            Change::Link(index) | Change::Address(index) => {
                index == external || self.moved.is_some()
            }
            Change::Route(_) => false,
            Change::Everything => true,
        };
        if about_external && self.choose_at.is_none() {
            self.choose_at = Some(Instant::now() + SETTLE_INTERFACE);
        }
        let Some(tunnel) = &self.tunnel else { return };
        let concerns = match change {
            Change::Link(index) | Change::Address(index) => index == tunnel.index,
            Change::Route(net) => tunnel.desired.networks.contains(&net),
            Change::Everything => true,
        };
        if concerns {
            self.look_at = self.look_at.min(Instant::now() + SETTLE);
        }
    }

    /// Looks at the device and repairs it.
    async fn look(&mut self, kernel: &impl Kernel) {
        let Some(tunnel) = &self.tunnel else { return };
        let device = tunnel.device.clone();
        let outcome = tunnel.repair(kernel).await;
        self.look_at = Instant::now() + RESYNC;
        match outcome {
            Ok(Outcome::Done(actions)) if actions.is_empty() => {}
            Ok(Outcome::Done(actions)) => {
                tracing::debug!(?actions, device, "repaired");
                self.log_limited(format!(
                    "device {device} was changed by somebody else: repaired"
                ));
            }
            Ok(Outcome::Gone) => self.close(&format!("device {device} was removed")),
            Err(error) => self.log_limited(format!("device {device} stays as it is: {error}")),
        }
    }

    /// Closes the data plane, to be opened again.
    fn close(&mut self, why: &str) {
        self.tunnel = None;
        let now = Instant::now();
        self.reopen_at = self.backoff.failed(now);
        let wait = self.reopen_at.saturating_duration_since(now);
        tracing::error!("tunnel is down: {why}: opening it again in {wait:?}");
        self.down = Some(why.to_owned());
    }

    /// At most one line per text and minute.
    fn log_limited(&mut self, text: String) {
        match self.log.allow(text.clone(), Instant::now()) {
            Some(0) => tracing::warn!("{text}"),
            Some(suppressed) => tracing::warn!("{text} (suppressed {suppressed})"),
            None => {}
        }
    }
}

/// What the workers said.
enum Said {
    News(Event),
    Fatal(Event),
}

/// The next event; never, without a tunnel.
async fn next_event(tunnel: &mut Option<Tunnel>) -> Said {
    let Some(tunnel) = tunnel else {
        return pending().await;
    };
    let events = &mut tunnel.events;
    tokio::select! {
        Some(event) = events.fatal.recv() => Said::Fatal(event),
        Some(event) = events.news.recv() => Said::News(event),
        else => pending().await,
    }
}
