//! Owns opening, starting, publishing to and stopping a data plane as a whole. Never touches a packet.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use mio::Waker;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::lock::{LockError, NameLock};
use super::portable::{Opened, Portable};
use super::shared::{Shared, TABLE_TAKE_BOUNDS, Told, Withdrawable, WorkerCounts};
use super::stats::Counts;
use super::status::{self, Status};
use super::table::{Clock, Table};
use super::tap::{Taps, Transport};
use super::worker::Worker;
use super::{Encapsulation, EngineKind, Event, OpenError, PeerRoute, Settings, SourcePort};
use crate::route::Publisher;
use crate::sys::simd;
use crate::telemetry::histogram::Histogram;
use crate::tun::{TunCaps, TunDevice, TunError};
use crate::underlay::{UdpCaps, Underlay};

/// One thread of the data plane, before it runs.
enum Engine {
    Mmsg(Box<Worker>),
    Portable(Box<Portable>),
}

impl Engine {
    fn run(self) {
        match self {
            Self::Mmsg(worker) => worker.run(),
            Self::Portable(portable) => portable.run(),
        }
    }
}

/// An opened data plane: device and sockets exist; workers run between [`Datapath::start`] and
/// [`Datapath::stop`]. Dropping it stops the workers and closes everything; the TUN device goes with it.
pub struct Datapath {
    pub(super) shared: Arc<Shared>,
    device: String,
    pub(super) publisher: Mutex<Publisher<Table>>,
    engines: Vec<Engine>,
    wakers: Vec<Waker>,
    threads: Vec<JoinHandle<()>>,
    _locks: Vec<NameLock>,
}

impl Datapath {
    /// Takes the locks, opens the sockets and the TUN device, probes capabilities. Starts nothing.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is left behind.
    pub fn open(settings: Settings) -> Result<Self, OpenError> {
        let mut locks = vec![lock("port", &settings.bind.to_string())?];
        // A template makes a new device, which nobody can hold; a full name may be somebody's.
        let named = !settings.device.contains('%');
        if named {
            locks.push(lock("device", &settings.device)?);
        }
        let mut datapath = match settings.engine {
            EngineKind::Mmsg => Self::open_mmsg(settings)?,
            EngineKind::Portable => Self::open_portable(settings)?,
        };
        if !named {
            locks.push(lock("device", &datapath.device)?);
        }
        datapath._locks = locks;
        Ok(datapath)
    }

    fn open_mmsg(settings: Settings) -> Result<Self, OpenError> {
        let bind = settings.bind;
        let spread = settings.source_port == SourcePort::Spread;
        let underlay = Underlay::open(bind, settings.workers.max(1), spread)
            .map_err(|source| OpenError::Bind { bind, source })?;
        let template = settings.device.clone();
        let tun = TunDevice::open(&template, underlay.receive.len()).map_err(|e| match e {
            TunError::Clone(source) => OpenError::NoTun(source),
            TunError::Attach(source) => OpenError::device(&template, source),
            TunError::Setup(step, source) => OpenError::Step {
                step: step.to_owned(),
                source,
            },
        })?;
        Self::from_parts(settings, tun, underlay)
    }

    /// A batched data plane over a device and sockets that are already open: what [`Datapath::open`] does
    /// after opening them, and how tests put something else in the device's place. Takes no locks.
    ///
    /// # Errors
    /// [`OpenError::Step`].
    pub fn from_parts(
        settings: Settings,
        tun: TunDevice,
        underlay: Underlay,
    ) -> Result<Self, OpenError> {
        let workers = underlay.receive.len().min(tun.queues.len());
        let shared = Arc::new(Shared::new(
            settings,
            tun.caps,
            underlay.caps,
            underlay.send,
            workers,
        ));
        let publisher = Publisher::new(Table::default());
        let (mut engines, mut wakers) = (Vec::new(), Vec::new());
        for (idx, (queue, socket)) in tun.queues.into_iter().zip(underlay.receive).enumerate() {
            let reader = publisher.reader();
            let (worker, waker) = Worker::new(idx, queue, socket, Arc::clone(&shared), reader)
                .map_err(|source| OpenError::Step {
                    step: "epoll".to_owned(),
                    source,
                })?;
            engines.push(Engine::Mmsg(Box::new(worker)));
            wakers.push(waker);
        }
        Ok(Self::assemble(shared, tun.name, publisher, engines, wakers))
    }

    fn open_portable(settings: Settings) -> Result<Self, OpenError> {
        let opened = Opened::open(&settings.device, settings.bind)?;
        let device = opened.name().to_owned();
        let (tun, udp) = (TunCaps::NONE, UdpCaps::NONE);
        let shared = Arc::new(Shared::new(settings, tun, udp, Vec::new(), 1));
        let publisher = Publisher::new(Table::default());
        let reader = publisher.reader();
        let (portable, waker) =
            Portable::new(opened, Arc::clone(&shared), reader).map_err(|source| {
                OpenError::Step {
                    step: "epoll".to_owned(),
                    source,
                }
            })?;
        let engines = vec![Engine::Portable(Box::new(portable))];
        Ok(Self::assemble(
            shared,
            device,
            publisher,
            engines,
            vec![waker],
        ))
    }

    fn assemble(
        shared: Arc<Shared>,
        device: String,
        publisher: Publisher<Table>,
        engines: Vec<Engine>,
        wakers: Vec<Waker>,
    ) -> Self {
        let publisher = Mutex::new(publisher);
        let (threads, _locks) = (Vec::new(), Vec::new());
        Self {
            shared,
            device,
            publisher,
            engines,
            wakers,
            threads,
            _locks,
        }
    }

    /// The device's name as the kernel chose it, `flannel0`.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Replaces the whole forwarding table; workers see it at their next burst. Peers that stay keep their
    /// path MTU and counters.
    pub fn publish(&self, routes: &[PeerRoute]) {
        // The lock orders writers only; readers never take it.
        let mut publisher = self
            .publisher
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let table = Table::build(
            routes,
            self.shared.settings.encapsulation,
            &publisher.current(),
        );
        publisher.publish(table);
    }

    /// Says that the device's `accept_local` is set: ICMP errors to local senders then come from this node's
    /// own overlay address, as traceroute expects.
    pub fn answer_as_self(&self) {
        self.shared.answers_as_self.store(true, Ordering::Relaxed);
    }

    /// Starts the workers. The device must be up.
    ///
    /// # Errors
    /// A thread could not be started; those that were are stopped.
    pub fn start(&mut self) -> io::Result<()> {
        let cpus = allowed_cpus();
        for (idx, engine) in self.engines.drain(..).enumerate() {
            let shared = Arc::clone(&self.shared);
            let cpu = self.shared.settings.pin.then(|| pick(&cpus, idx)).flatten();
            let thread = std::thread::Builder::new().name(format!("loden-{idx}"));
            self.threads.push(thread.spawn(move || {
                let mut alarm = Alarm {
                    shared,
                    worker: idx,
                    armed: true,
                };
                if let Some(cpu) = cpu {
                    pin_to(cpu);
                }
                engine.run();
                alarm.armed = false;
            })?);
        }
        Ok(())
    }

    /// Counters, capabilities, peers, at this moment.
    #[must_use]
    pub fn status(&self) -> Status {
        let (mut encap, mut decap) = (Counts::default(), Counts::default());
        let mut workers = Vec::new();
        for counts in &self.shared.counts {
            let (one, other) = (counts.encap.read(), counts.decap.read());
            encap.add(&one);
            decap.add(&other);
            workers.push(worker_status(&one, &other));
        }
        let settings = &self.shared.settings;
        let table = self
            .publisher
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .current();
        let portable = settings.engine == EngineKind::Portable;
        Status {
            engine: if portable { "portable" } else { "mmsg" }.to_owned(),
            device: self.device.clone(),
            mtu: settings.mtu.get(),
            capabilities: if portable {
                Vec::new()
            } else {
                self.shared.capabilities()
            },
            limits: self.shared.limits(),
            workers,
            total: worker_status(&encap, &decap),
            table_takes: self.shared.table_takes.read(),
            peers: table.to_status(),
        }
    }

    /// Where captures begin.
    #[must_use]
    pub fn taps(&self) -> &Taps {
        &self.shared.taps
    }

    /// Stops the workers after they finish the burst in hand, joins them, closes everything.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Datapath {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for waker in &self.wakers {
            // A worker that cannot be woken sees the flag at its next packet.
            drop(waker.wake());
        }
        for thread in self.threads.drain(..) {
            // A panicked worker has already raised its alarm.
            drop(thread.join());
        }
    }
}

/// Raises an event when a worker's thread unwinds: a dead worker must be seen.
struct Alarm {
    shared: Arc<Shared>,
    worker: usize,
    armed: bool,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if self.armed {
            let error = "it panicked; the message is on standard error".to_owned();
            self.shared.event(Event::WorkerDied {
                worker: self.worker,
                error,
            });
        }
    }
}

impl Shared {
    fn new(
        settings: Settings,
        tun_caps: TunCaps,
        udp_caps: UdpCaps,
        send: Vec<crate::underlay::UnderlaySocket>,
        workers: usize,
    ) -> Self {
        let transport = match settings.encapsulation {
            Encapsulation::Plain => Transport::Udp,
            Encapsulation::Vxlan { .. } => Transport::Vxlan,
        };
        Self {
            settings,
            clock: Clock::start(),
            sum: simd::sum(),
            tun_caps,
            udp_caps,
            send,
            tun_tcp: Withdrawable::default(),
            tun_udp: Withdrawable::default(),
            udp_gso_withdrawals: AtomicU64::new(0),
            counts: (0..workers).map(|_| WorkerCounts::default()).collect(),
            table_takes: Histogram::new(TABLE_TAKE_BOUNDS),
            taps: Arc::new(Taps::new(workers, transport)),
            answers_as_self: AtomicBool::new(false),
            rejections: Told::default(),
            device_gone: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        }
    }
}

fn worker_status(encap: &Counts, decap: &Counts) -> status::Worker {
    status::Worker {
        encap: encap.to_status(),
        decap: decap.to_status(),
    }
}

fn lock(kind: &str, name: &str) -> Result<NameLock, OpenError> {
    NameLock::take(&format!("{kind}/{name}")).map_err(|error| match error {
        LockError::Held { pid } => OpenError::Locked {
            what: format!("{kind} {name}"),
            pid,
        },
        LockError::Io(source) => OpenError::Step {
            step: format!("locking {kind} {name}"),
            source,
        },
    })
}

/// The CPUs this process may run on.
fn allowed_cpus() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_else(|_error| CpuSet::new());
    (0..CpuSet::count())
        .filter(|&cpu| set.is_set(cpu).unwrap_or(false))
        .collect()
}

fn pick(cpus: &[usize], idx: usize) -> Option<usize> {
    cpus.get(idx.checked_rem(cpus.len())?).copied()
}

/// Pins the calling thread. Where the kernel refuses, it stays where the scheduler puts it.
fn pin_to(cpu: usize) {
    let mut set = CpuSet::new();
    let pinned = set
        .set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    debug_assert!(pinned.is_ok(), "the CPU is one this process may use");
}
