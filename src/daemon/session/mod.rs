//! Owns the run loop for as long as one lease is held: what the store, the kernel, the workers, the clock and
//! status clients say, one thing at a time. All state of the session has this one owner.

mod follow;
mod looks;
mod peers;
mod said;
mod told;
mod watches;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};

use super::asked;
use super::backoff::Backoff;
use super::carrier::Carrier;
use super::checksums::{Checksums, Test};
use super::extension;
use super::guard::Guard;
use super::hold::Hold;
use super::news::sentence;
use super::past::Ways;
use super::probes;
use super::publication::Publication;
use super::register::{self, Registration};
use super::renewal::{End, Held, Order, keep};
use super::status;
use super::traffic::{self, Traffic};
use super::{Daemon, DaemonError, NO_LEASE, notify};
use crate::backend::desired::Refused;
use crate::backend::kernel::Kernel;
use crate::backend::udp;
use crate::debug::socket::Server;
use crate::lease::{LeaseSet, Subnets};
use crate::probe::Directory;
use crate::store::{LeaseStore, LostTo, Problem, StoreEvent};
use crate::telemetry::rate_limit::{Allowance, RateLimit};
use said::{Said, ended, looked, next_event};
use watches::Watches;
pub(super) use watches::{Part, Whose};

/// How long the start waits for the peers before packets flow without them. The local store answers at once.
const FIRST_PEERS: Duration = Duration::from_secs(1);

/// The device is looked at this often without any notification.
const RESYNC: Duration = Duration::from_secs(10);

/// Repeated log lines about the same thing are this far apart.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Lines about single leases in that time; thousands may be wrong at once.
const LEASE_LINES: u32 = 20;

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
    /// The peers, for those who probe and who are probed.
    pub(super) directory: Arc<Directory>,
    /// The store has listed them all.
    listed: bool,
    /// Leases that lack what the backend needs, and why.
    refused: Vec<Refused>,
    pub(super) problems: Vec<Problem>,
    pub(super) carrier: Option<Carrier>,
    /// What the last look could not put right.
    incomplete: Option<String>,
    /// Why the carrier is down, if it is.
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
    /// How many tables there were when the heap gave back what was free; none before it did.
    tidied: Option<u64>,
    pub(super) traffic: Option<Traffic>,
    /// Who may send to the kernel's VXLAN devices.
    pub(super) guard: Guard,
    /// Commands for peers, where the backend has any.
    commands: Option<extension::Peers>,
    /// Whether what the kernel's tunnel devices send arrives whole.
    pub(super) checksums: Checksums,
    /// Peers that are reached past the tunnel, and those that may be.
    pub(super) ways: Ways,
    /// Captures of what the kernel carries.
    pub(super) watches: Watches,
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
        let (store, health) = (self.store, Arc::clone(&self.health));
        let waits = |complaint: Option<&str>| {
            let missing = [NO_LEASE].into_iter().chain(complaint);
            health.set(missing.map(str::to_owned).collect());
            if let Some(complaint) = complaint {
                // Who asks the store hears of it, too.
                store.report(&[complaint.to_owned()]);
            }
        };
        waits(None);
        let registered = register::register(store, self.kernel, self.options, previous, waits);
        let mut registration = self.answering(registered).await?;
        let prepared = traffic::prepare(&self.options.traffic, &mut registration).await?;
        let mut events = self.store.watch();
        let now = Instant::now();
        let (orders, received) = mpsc::unbounded_channel();
        let commands = extension::Peers::start(&registration, &self.options.subnet_file);
        let ways = Ways::start(&registration, &self.probes.directory);
        let mut session = Session {
            peers: LeaseSet::new(registration.lease.subnets, &registration.config),
            registration,
            directory: Arc::clone(&self.probes.directory),
            listed: false,
            refused: Vec::new(),
            problems: Vec::new(),
            carrier: None,
            incomplete: None,
            down: None,
            backoff: Backoff::default(),
            reopen_at: now,
            look_at: now + RESYNC,
            tidied: None,
            choose_at: None,
            moved: None,
            env_behind: None,
            hold: Hold::default(),
            publication: Publication::new(self.store.progress(), now),
            traffic: None,
            guard: Guard::Idle,
            commands,
            checksums: Checksums::default(),
            ways,
            watches: Watches::default(),
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
        let wanted = session.wanted();
        let opened = Carrier::open(self.options, &session.registration, self.kernel, wanted);
        session.carrier = Some(opened.await?);
        session.tell_ways();
        session.tell_past();
        session.look_at_checksums();
        self.probes.start(&session.registration.lease.subnets);
        session.publication.started(Instant::now());
        session.backoff.succeeded(Instant::now());
        let started = Traffic::start(prepared, &self.options.traffic, &session.registration);
        session.traffic = Some(started.await?);
        session.guard = Guard::start(&self.options.traffic, &session.registration).await;
        session.tell_senders();
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
        let kernel = self.kernel;
        let mut test: Option<Test<'_>> = None;
        loop {
            let test_at = session.checksums.due().filter(|_| test.is_none());
            let wake_at = match session.carrier {
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
                said = next_event(&mut session.carrier) => match said {
                    Said::News(event) => session.log_limited(sentence(&event)),
                    Said::Fatal(event) => session.close(&sentence(&event)),
                },
                // What is missing is told anew with every turn.
                () = held.changed() => {}
                () = looked(&mut session.traffic) => {}
                Some(change) = self.changes.recv() => session.notice(change),
                () = session.ways.changed() => if session.ways.take() {
                    session.publish();
                },
                Some(asked) = self.asked.recv() => {
                    asked::serve(self, &session, &held, asked).await;
                }
                Some(resolved) = self.resolved.recv() => {
                    asked::explained(self, &session, resolved).await;
                }
                Some(asked) = self.probes.asked() => {
                    probes::answer(self, &session, asked);
                }
                Some(scrape) = self.scrapes.recv() => {
                    let figures = status::figures(self, &session, &held);
                    // The client may have given up.
                    let _gone = scrape.send(figures);
                }
                found = ended(&mut test) => {
                    test = None;
                    session.checksums.take(found);
                    session.look_at_checksums();
                }
                () = sleep_until(test_at.unwrap_or(wake_at).into()), if test_at.is_some() => {
                    let mut checksums = std::mem::take(&mut session.checksums);
                    test = checksums.test(&session, kernel);
                    session.checksums = checksums;
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
                    match session.carrier {
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

    /// Adds the blackhole route for our own subnets if nobody routes them.
    async fn keep_blackhole(&self, session: &mut Session) {
        for net in udp::nets(&session.peers.own()) {
            if let Err(error) = self.kernel.add_blackhole(net).await {
                session.log_limited(error.to_string());
            }
        }
        session.blackhole_at = Some(Instant::now() + self.options.traffic.resync.get());
    }
}
