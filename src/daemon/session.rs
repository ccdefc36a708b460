//! Owns the run loop for as long as one lease is held: what the store, the kernel, the workers, the clock and
//! status clients say, one thing at a time. All state of the session has this one owner.

use std::fmt::Display;
use std::future::pending;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};

use super::backoff::Backoff;
use super::hold::Hold;
use super::news::sentence;
use super::publication::Publication;
use super::register::{self, Registration};
use super::renewal::{End, Held, Order, keep};
use super::status;
use super::traffic::{self, Traffic};
use super::tunnel::Tunnel;
use super::{Daemon, DaemonError, notify};
use crate::backend::kernel::{Change, Kernel};
use crate::backend::reconcile::Outcome;
use crate::backend::udp::{self, Underlay};
use crate::datapath::{Event, PeerRoute};
use crate::debug::socket::Server;
use crate::iface::{self, Choice};
use crate::lease::{Lease, LeaseDelta, LeaseSet, Subnets};
use crate::store::env_file::SubnetEnv;
use crate::store::{Cause, LeaseStore, LostTo, Problem, StoreEvent};
use crate::telemetry::rate_limit::{Allowance, RateLimit};

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

/// Lines about single leases in that time; thousands may be wrong at once.
const LEASE_LINES: u32 = 20;

/// Problems of the store that are remembered for status.
const MAX_PROBLEMS: usize = 64;

/// How a session ended.
pub(super) enum Ended {
    /// The lease is another node's.
    LeaseLost { subnets: Subnets, to: LostTo },
    /// The lease was deleted, and what we got in its place is another.
    LeaseMoved { subnets: Subnets, to: Subnets },
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
    /// Why `subnet.env` does not say what it should, if it does not.
    pub(super) env_behind: Option<String>,
    /// Deleted leases whose routes live on for a moment.
    pub(super) hold: Hold,
    /// When the workers get the next table.
    pub(super) publication: Publication,
    pub(super) traffic: Option<Traffic>,
    /// Orders to the keeper of the lease.
    orders: mpsc::UnboundedSender<Order>,
    /// When to look after the blackhole route.
    blackhole_at: Option<Instant>,
    pub(super) counts: Counts,
    log: RateLimit<String>,
    lease_lines: Allowance,
}

/// What a session has seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub(super) store_events: u64,
    pub(super) store_problems: u64,
    /// When the store last said something.
    pub(super) store_heard: Instant,
    pub(super) looks: u64,
    pub(super) repairs: u64,
}

impl<S: LeaseStore, K: Kernel> Daemon<'_, S, K> {
    /// Registers and runs until the lease is lost. Sets `established` once pods may come.
    pub(super) async fn session(
        &mut self,
        previous: Option<Subnets>,
        established: &mut bool,
    ) -> Result<Ended, DaemonError> {
        self.health.set(vec!["no lease yet".to_owned()]);
        let mut registration =
            register::register(self.store, self.kernel, &self.options.wanted, previous).await?;
        let prepared = traffic::prepare(&self.options.traffic, &mut registration).await?;
        let mut events = self.store.watch();
        let now = Instant::now();
        let (orders, received) = mpsc::unbounded_channel();
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
            env_behind: None,
            hold: Hold::default(),
            publication: Publication::new(self.store.progress(), now),
            traffic: None,
            orders,
            blackhole_at: self.options.traffic.blackhole.then_some(now),
            counts: Counts {
                store_events: 0,
                store_problems: 0,
                store_heard: now,
                looks: 0,
                repairs: 0,
            },
            log: RateLimit::new(LOG_EVERY),
            lease_lines: Allowance::new(LEASE_LINES, LOG_EVERY),
        };
        match timeout(FIRST_PEERS, events.recv()).await {
            Ok(Some(event)) => {
                session.apply(event);
            }
            Ok(None) | Err(_) => tracing::warn!("no peers yet: the store has not listed any"),
        }
        let routes = session.routes();
        let opened = Tunnel::open(self.options, &session.registration, self.kernel, &routes);
        session.tunnel = Some(opened.await?);
        session.publication.started(Instant::now());
        session.backoff.succeeded(Instant::now());
        let started = Traffic::start(prepared, &self.options.traffic, &session.registration);
        session.traffic = Some(started.await?);
        self.write_env(&session)?;
        *established = true;
        self.start_server();
        self.health.set(session.missing(&Held::default()));
        tracing::info!("{} written: ready", self.options.subnet_file.display());
        notify(NotifyState::Ready);
        self.run_loop(session, events, received).await
    }

    fn write_env(&self, session: &Session) -> Result<(), DaemonError> {
        let mut env = session.env();
        env.ip_masq = self.options.traffic.masquerade;
        Ok(env.write(&self.options.subnet_file)?)
    }

    /// Writes `subnet.env` under a running session, which does without it until it can be written.
    fn update_env(&self, session: &mut Session) {
        let error = self.write_env(session).err().map(|e| e.to_string());
        match &error {
            Some(error) => session.log_limited(error.clone()),
            None => tracing::info!("{} written anew", self.options.subnet_file.display()),
        }
        session.env_behind = error;
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
        orders: mpsc::UnboundedReceiver<Order>,
    ) -> Result<Ended, DaemonError> {
        let held = Held::default();
        let (lease, margin) = (
            session.registration.lease.clone(),
            self.options.renew_margin,
        );
        let kept = keep(self.store, lease, margin, &held, orders);
        tokio::pin!(kept);
        let mut store_ended = false;
        loop {
            let wake_at = match session.tunnel {
                Some(_) => session.look_at,
                None => session.reopen_at,
            };
            let choose_at = session.choose_at.unwrap_or(wake_at);
            let hold_ends = session.hold.next();
            let publish_at = session.publication.due();
            let blackhole_at = session.blackhole_at;
            let missing = session.missing(&held);
            self.store.report(&missing);
            self.health.set(missing);
            tokio::select! {
                event = events.recv(), if !store_ended => match event {
                    Some(event) => {
                        if session.apply(event) {
                            session.publication.want();
                        } else {
                            session.publication.unaffected(Instant::now());
                        }
                    }
                    None => {
                        tracing::error!("the store reports no changes any more: peers stay as they are");
                        store_ended = true;
                    }
                },
                end = &mut kept => {
                    let subnets = session.peers.own();
                    return Ok(match end {
                        End::Lost(to) => Ended::LeaseLost { subnets, to },
                        End::Moved(to) => Ended::LeaseMoved { subnets, to },
                    });
                }
                said = next_event(&mut session.tunnel) => match said {
                    Said::News(event) => session.log_limited(sentence(&event)),
                    Said::Fatal(event) => session.close(&sentence(&event)),
                },
                Some(change) = self.changes.recv() => session.notice(change),
                Some(asked) = self.asked.recv() => {
                    let answer = status::answer(self, &session, &held, asked.request).await;
                    // The client may have given up.
                    let _gone = asked.answer.send(answer);
                }
                Some(scrape) = self.scrapes.recv() => {
                    let figures = status::figures(self, &session, &held);
                    // The client may have given up.
                    let _gone = scrape.send(figures);
                }
                () = sleep_until(hold_ends.unwrap_or(wake_at).into()), if hold_ends.is_some() => {
                    let over = session.hold.over(Instant::now());
                    if session.take(over) {
                        session.publication.want();
                    }
                }
                () = sleep_until(publish_at.unwrap_or(wake_at).into()), if publish_at.is_some() => {
                    session.publish();
                }
                () = sleep_until(blackhole_at.unwrap_or(wake_at).into()), if blackhole_at.is_some() => {
                    self.keep_blackhole(&mut session).await;
                }
                () = sleep_until(choose_at.into()), if session.choose_at.is_some() => {
                    session.choose_at = None;
                    self.compare_interface(&mut session).await;
                }
                () = sleep_until(wake_at.into()) => {
                    match session.tunnel {
                        Some(_) => session.look(self.kernel).await,
                        None => self.reopen(&mut session).await,
                    }
                    if session.env_behind.is_some() {
                        self.update_env(&mut session);
                    }
                }
            }
        }
    }

    /// Follows the external interface: where its address, MTU or name is another one now, the lease says so and
    /// the tunnel is opened anew. Without any interface everything stays as it is until there is one.
    async fn compare_interface(&self, session: &mut Session) {
        let wanted = session.registration.wanted.clone();
        let Ok(snapshot) = register::look(self.kernel, &wanted).await else {
            return;
        };
        let registration = &session.registration;
        let was = registration.choice.clone();
        let decision = iface::choose(
            &snapshot,
            &wanted,
            udp::stack(&registration.config, &wanted),
        );
        let moved = match decision.choice {
            Ok(now) => {
                let moved = self.follow(session, &was, now).err();
                session.registration.candidates = decision.candidates;
                moved
            }
            Err(error) => Some(format!("{} with {} is gone: {error}", was.name, was.addr)),
        };
        if moved != session.moved {
            match &moved {
                Some(text) => tracing::warn!("{text}"),
                None => tracing::info!(
                    "the external interface is back: {} with {}",
                    session.registration.choice.name,
                    session.registration.choice.addr
                ),
            }
        }
        session.moved = moved;
    }

    /// Moves the session to what the external interface is now.
    fn follow(&self, session: &mut Session, was: &Choice, now: Choice) -> Result<(), String> {
        let registration = &mut session.registration;
        let same_place = (now.addr, now.public, now.index) == (was.addr, was.public, was.index);
        if same_place && now.mtu == was.mtu {
            registration.choice = now;
            return Ok(());
        }
        let underlay = Underlay::new(&registration.config, &registration.backend, &now)
            .map_err(|error| error.to_string())?;
        let public_moved = underlay.attrs != registration.underlay.attrs;
        if public_moved && !self.store.can_move() {
            return Err(format!(
                "the external interface is {} with {} now, the lease names {}: restart the daemon to \
                 move the lease",
                now.name, now.addr, was.public
            ));
        }
        tracing::warn!(
            "the external interface is {} with {} and MTU {} now, it was {} with {} and MTU {}",
            now.name,
            now.addr,
            now.mtu,
            was.name,
            was.addr,
            was.mtu
        );
        if public_moved {
            // The keeper lives as long as the session.
            let _ended = session.orders.send(Order::Publish(underlay.attrs.clone()));
            registration.lease.attrs = underlay.attrs.clone();
        }
        let resized = underlay.mtu != registration.underlay.mtu;
        registration.choice = now;
        registration.underlay = underlay;
        if resized {
            self.update_env(session);
        }
        session.tunnel = None;
        session.reopen_at = Instant::now();
        session.down = Some("moving to another address".to_owned());
        Ok(())
    }

    /// Adds the blackhole route for our own subnets if nobody routes them.
    async fn keep_blackhole(&self, session: &mut Session) {
        for net in udp::nets(&session.peers.own()) {
            if let Err(error) = self.kernel.add_blackhole(net).await {
                session.log_limited(error.to_string());
            }
        }
        session.blackhole_at = Some(Instant::now() + self.options.traffic.resync.get());
    }

    async fn reopen(&mut self, session: &mut Session) {
        let routes = session.routes();
        let opened = Tunnel::open(self.options, &session.registration, self.kernel, &routes);
        match opened.await {
            Ok(tunnel) => {
                session.tunnel = Some(tunnel);
                session.publication.started(Instant::now());
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
        let now = Instant::now();
        self.publication.taken(now);
        self.counts.store_events += 1;
        self.counts.store_heard = now;
        let (deltas, problems) = match event {
            StoreEvent::Snapshot { leases, problems } => {
                let refused = self.peers.refused().map(|refused| refused.lease.subnets);
                let known = self
                    .peers
                    .leases()
                    .map(|lease| lease.subnets)
                    .chain(refused);
                (self.hold.filter_listing(leases, known, now), problems)
            }
            StoreEvent::Delta { deltas, problems } => (self.hold.filter(deltas, now), problems),
            StoreEvent::OwnLost { to, .. } => {
                // The keeper lives as long as the session.
                let _ended = self.orders.send(Order::Lost(to));
                return false;
            }
        };
        self.counts.store_problems += problems.len() as u64;
        for problem in problems {
            self.problems
                .retain(|known| known.subject != problem.subject);
            if problem.cause == Cause::Solved {
                tracing::info!("{problem}");
                continue;
            }
            if problem.cause == Cause::Overwritten {
                // The keeper lives as long as the session.
                let attrs = self.registration.lease.attrs.clone();
                let _ended = self.orders.send(Order::Publish(attrs));
            }
            self.log_limited(problem.to_string());
            if self.problems.len() >= MAX_PROBLEMS {
                self.problems.remove(0);
            }
            self.problems.push(problem);
        }
        self.take(deltas)
    }

    /// Takes changes of leases in; whether any peer is concerned.
    fn take(&mut self, deltas: Vec<LeaseDelta>) -> bool {
        let applied = self.peers.apply_delta(deltas);
        for change in &applied.changes {
            tracing::debug!(?change, "peer");
        }
        for refused in &applied.refused {
            self.log_lease(refused);
        }
        !applied.changes.is_empty()
    }

    /// What keeps pods of this node from reaching others, or the rules from being right.
    pub(super) fn missing(&self, held: &Held) -> Vec<String> {
        let mut missing = Vec::new();
        if self.tunnel.is_none() {
            let why = self.down.as_deref().unwrap_or("not opened yet");
            missing.push(format!("the tunnel is down: {why}"));
        }
        if held.lost.get() {
            missing.push("the lease was deleted and is not registered again yet".to_owned());
        }
        if let Some(problem) = self.traffic.as_ref().and_then(Traffic::problem) {
            missing.push(format!("traffic rules: {problem}"));
        }
        if let Some(moved) = &self.moved {
            missing.push(moved.clone());
        }
        missing.extend(self.env_behind.clone());
        missing
    }

    fn publish(&mut self) {
        if self.tunnel.is_none() {
            self.publication.put_off();
            return;
        }
        let begun = Instant::now();
        let routes = self.routes();
        if let Some(tunnel) = &self.tunnel {
            tunnel.publish(&routes);
        }
        self.publication.published(begun, Instant::now());
    }

    /// The forwarding table of the peers as they are now.
    fn routes(&mut self) -> Vec<PeerRoute> {
        let (routes, unreachable) = self.registration.underlay.routes(self.peers.leases());
        let unreachable: Vec<Lease> = unreachable.into_iter().cloned().collect();
        let before = std::mem::take(&mut self.unreachable);
        // Both are in the order of their keys, and there may be thousands.
        let was_told = |lease: &Lease| {
            let at = before.binary_search_by(|known| known.subnets.cmp(&lease.subnets));
            at.ok().and_then(|at| before.get(at)) == Some(lease)
        };
        for lease in unreachable.iter().filter(|lease| !was_told(lease)) {
            self.log_lease(&format_args!(
                "lease {} publishes no address of the family of {}: its packets have no route",
                lease.subnets,
                self.registration.underlay.bind.ip()
            ));
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
        self.counts.looks += 1;
        self.counts.repairs +=
            u64::from(matches!(&outcome, Ok(Outcome::Done(actions)) if !actions.is_empty()));
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

    /// A few lines about leases a minute; `loden status` has them all.
    fn log_lease(&mut self, text: &dyn Display) {
        if self.lease_lines.allow(Instant::now()) {
            tracing::warn!("{text}");
        } else {
            self.log_limited(
                "more leases are not used than the log has room for: `loden status` lists them"
                    .to_owned(),
            );
        }
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
