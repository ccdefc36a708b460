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
use super::system::Path as Route;
use crate::lab::process::Tracked;
use crate::lab::{Lab, wait};

/// Where the sink listens.
pub const PORT: u16 = 5301;
/// Starting, and waiting for the last packets, come on top of the time of sending.
const EXTRA: Duration = Duration::from_secs(10);

/// What to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// UDP payload bytes of each datagram; at least 20.
    pub len: u16,
    /// Datagrams per second.
    pub rate: u32,
    /// Datagrams per send; more than one are sent at once with `UDP_SEGMENT`, and the sink takes them with
    /// `UDP_GRO`, as programs that send so do.
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
    sink: Tracked,
    sender: Option<Tracked>,
    limit: Duration,
}

impl Flow {
    /// Starts a sink on `port` and waits until it receives. `program` is this program.
    ///
    /// # Errors
    /// [`Error::Lab`] if it does not start.
    pub fn open(
        lab: &Lab,
        program: &Path,
        path: &Route,
        port: u16,
        traffic: &Traffic,
    ) -> Result<Self, Error> {
        let limit = traffic.time + EXTRA;
        let mut sink = Command::new(program);
        sink.args([
            "bench",
            "udp-sink",
            "--listen",
            &format!("{}:{port}", path.addr),
        ]);
        sink.args(["--limit-ms", &limit.as_millis().to_string()]);
        if traffic.burst > 1 {
            sink.arg("--gro");
        }
        let mut sink = lab.spawn(path.to, &format!("udp-sink-{port}"), &mut sink)?;
        wait::until_bound(&lab.netns(path.to), "udp", port, lab.interrupt(), || {
            sink.check_running()
        })?;
        Ok(Self {
            sink,
            sender: None,
            limit,
        })
    }

    /// Starts the sender.
    ///
    /// # Errors
    /// [`Error::Lab`] if it does not start.
    pub fn send(
        &mut self,
        lab: &Lab,
        program: &Path,
        path: &Route,
        port: u16,
        traffic: &Traffic,
    ) -> Result<(), Error> {
        let mut sender = Command::new(program);
        sender.args([
            "bench",
            "udp-send",
            "--dest",
            &format!("{}:{port}", path.addr),
        ]);
        for (flag, value) in [
            ("--len", u128::from(traffic.len)),
            ("--rate", u128::from(traffic.rate)),
            ("--burst", u128::from(traffic.burst)),
            ("--time-ms", traffic.time.as_millis()),
        ] {
            sender.args([flag, &value.to_string()]);
        }
        self.sender = Some(lab.spawn(path.from, &format!("udp-send-{port}"), &mut sender)?);
        Ok(())
    }

    /// Waits for both ends' reports.
    ///
    /// # Errors
    /// [`Error::Lab`] if an end fails, [`Error::Report`] if its report is not understood, [`Error::Silence`] if no
    /// packet arrived.
    pub fn finish(self, lab: &Lab) -> Result<(Sent, Received), Error> {
        let sent = match self.sender {
            Some(sender) => report(&sender.finish(self.limit, lab.interrupt())?)?,
            None => Sent {
                sent: 0,
                elapsed_ns: 0,
            },
        };
        let at_sink: Received = report(&self.sink.finish(self.limit, lab.interrupt())?)?;
        if at_sink.received == 0 {
            return Err(Error::Silence { sent: sent.sent });
        }
        Ok((sent, at_sink))
    }
}

/// Sends `traffic` along `path`. `program` is this program.
///
/// # Errors
/// As [`Flow`]'s.
pub fn run(
    lab: &Lab,
    program: &Path,
    path: &Route,
    traffic: &Traffic,
    meter: &Meter,
) -> Result<UdpResult, Error> {
    let mut flow = Flow::open(lab, program, path, PORT, traffic)?;
    let before = meter.read(lab)?;
    flow.send(lab, program, path, PORT, traffic)?;
    let (sent, at_sink) = flow.finish(lab)?;
    Ok(UdpResult {
        sent,
        at_sink,
        spent: meter.read(lab)?.since(&before),
    })
}

fn report<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Error> {
    serde_json::from_str(text).map_err(|error| Error::Report {
        program: "the packet generator",
        reason: error.to_string(),
    })
}
