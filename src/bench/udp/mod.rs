//! Owns numbered UDP datagrams from pod to pod: what they hold, and running the sender and the sink, which
//! are this same program started inside the pods' namespaces. Never interprets what it measures.

mod probe;
pub mod sender;
pub mod sink;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::Error;
use super::meter::{Meter, Spent};
use super::service::{Kind, Order};
use super::stage::{Served, Stage};
use super::system::Path as Route;
use crate::lab::process::Tracked;

/// Starting, and waiting for the last packets, come on top of the time of sending.
const EXTRA: Duration = Duration::from_secs(10);

/// What to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// UDP payload bytes of each datagram; at least 20.
    pub len: u16,
    /// Datagrams per second.
    pub rate: u32,
    /// Datagrams per send; more than one are sent at once with `UDP_SEGMENT` (one by one, if the path takes
    /// them only in fragments), and the sink takes them with `UDP_GRO`, as programs that send so do.
    pub burst: u16,
    /// For how long.
    pub time: Duration,
}

/// Which of the processors that this program may use an end of the traffic runs on.
#[derive(Clone, Copy, Debug)]
pub(super) enum Processor {
    First,
    Last,
}

impl Processor {
    /// Ties the calling thread to it.
    ///
    /// Left to itself, the scheduler now wakes the sink on the sender's processor, which is quick, and now
    /// on another, which is not, for seconds at a time: an idle run would measure its luck.
    pub(super) fn stay(self) -> Result<(), Error> {
        let this_thread = Pid::from_raw(0);
        let allowed = sched_getaffinity(this_thread).map_err(Error::io("list the processors"))?;
        let mut usable = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu) == Ok(true));
        let chosen = match self {
            Self::First => usable.next(),
            Self::Last => usable.next_back(),
        };
        let mut only = CpuSet::new();
        only.set(chosen.unwrap_or(0))
            .and_then(|()| sched_setaffinity(this_thread, &only))
            .map_err(Error::io("stay on one processor"))
    }
}

/// What the sender prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// Datagrams that the kernel accepted.
    pub sent: u64,
    /// How long that took, which is longer than asked for if the sender could not keep its pace.
    pub elapsed_ns: u64,
    /// Whether the kernel got them as superpackets.
    pub segmented: bool,
}

/// What the sink prints. Latencies are nanoseconds from before the send call to after the receive call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// Different datagrams that arrived.
    pub received: u64,
    /// Datagrams that arrived more than once.
    pub duplicates: u64,
    /// Datagrams that arrived after one with a higher number.
    pub reordered: u64,
    /// Median latency.
    pub p50_ns: u64,
    /// 99th percentile of the latency.
    pub p99_ns: u64,
    /// 99.9th percentile of the latency.
    pub p999_ns: u64,
}

/// One run: both ends' reports and what it cost.
#[derive(Clone, Debug)]
pub struct UdpResult {
    /// The sender's report.
    pub sent: Sent,
    /// The sink's report.
    pub at_sink: Received,
    /// What it cost, from before the first packet to after the last.
    pub spent: Spent,
}

impl UdpResult {
    /// Datagrams that did not arrive.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.sent.sent.saturating_sub(self.at_sink.received)
    }
}

/// A sink that receives, and the sender that is to come.
#[derive(Debug)]
pub struct Flow {
    order: Order,
    sink: Served,
    sender: Option<Tracked>,
}

impl Flow {
    /// Starts a sink and waits until it receives. `program` is this program.
    ///
    /// # Errors
    /// [`Error::Lab`] or [`Error::Remote`] if it does not start.
    pub fn open(
        stage: &dyn Stage,
        program: &Path,
        route: &Route,
        background: bool,
        traffic: &Traffic,
    ) -> Result<Self, Error> {
        let gro = traffic.burst > 1;
        let kind = Kind::UdpSink { background, gro };
        let order = Order::new(kind, route.addr, traffic.time + EXTRA);
        Ok(Self {
            order,
            sink: stage.serve(route, program, order)?,
            sender: None,
        })
    }

    /// Starts the sender.
    ///
    /// # Errors
    /// [`Error::Lab`] if it does not start.
    pub fn send(
        &mut self,
        stage: &dyn Stage,
        program: &Path,
        route: &Route,
        traffic: &Traffic,
    ) -> Result<(), Error> {
        let dest = self.order.socket();
        let mut sender = Command::new(program);
        sender.args(["bench", "udp-send", "--dest", &dest.to_string()]);
        for (flag, value) in [
            ("--len", u128::from(traffic.len)),
            ("--rate", u128::from(traffic.rate)),
            ("--burst", u128::from(traffic.burst)),
            ("--time-ms", traffic.time.as_millis()),
        ] {
            sender.args([flag, &value.to_string()]);
        }
        let label = format!("udp-send-{}", dest.port());
        self.sender = Some(stage.spawn(route, &label, &mut sender)?);
        Ok(())
    }

    /// Waits for both ends' reports.
    ///
    /// # Errors
    /// [`Error::Lab`] or [`Error::Remote`] if an end fails, [`Error::Report`] if its report is not understood,
    /// [`Error::Silence`] if no packet arrived.
    pub fn finish(self, stage: &dyn Stage) -> Result<(Sent, Received), Error> {
        let (limit, interrupt) = (self.order.limit(), stage.interrupt());
        let sent = match self.sender {
            Some(sender) => report(&sender.finish(limit, interrupt)?)?,
            None => Sent {
                sent: 0,
                elapsed_ns: 0,
                segmented: false,
            },
        };
        let at_sink: Received = report(&self.sink.finish(limit, interrupt)?)?;
        if at_sink.received == 0 {
            return Err(Error::Silence { sent: sent.sent });
        }
        Ok((sent, at_sink))
    }
}

/// Sends `traffic` along `route`. `program` is this program.
///
/// # Errors
/// As [`Flow`]'s.
pub fn run(
    stage: &dyn Stage,
    program: &Path,
    route: &Route,
    traffic: &Traffic,
    meter: &Meter,
) -> Result<UdpResult, Error> {
    let mut flow = Flow::open(stage, program, route, false, traffic)?;
    let before = meter.read(stage)?;
    flow.send(stage, program, route, traffic)?;
    let (sent, at_sink) = flow.finish(stage)?;
    Ok(UdpResult {
        sent,
        at_sink,
        spent: meter.read(stage)?.since(&before),
    })
}

fn report<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Error> {
    serde_json::from_str(text).map_err(|error| Error::Report {
        program: "the packet generator",
        reason: error.to_string(),
    })
}
