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

use super::{Error, process_clock};
use crate::lab::{Lab, Member, wait};

pub use probe::PAYLOAD_LEN;

/// Where the sink listens.
pub const PORT: u16 = 5301;
/// Starting, and waiting for the last packets, come on top of the time of sending.
const EXTRA: Duration = Duration::from_secs(10);

/// What to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
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
enum Processor {
    First,
    Last,
}

impl Processor {
    /// Ties the calling thread to it.
    ///
    /// Left to itself, the scheduler now wakes the sink on the sender's processor, which is quick, and now
    /// on another, which is not, for seconds at a time: an idle run would measure its luck.
    fn stay(self) -> Result<(), Error> {
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
}

/// One run: both ends' reports and the processor time of the daemons.
#[derive(Clone, Copy, Debug)]
pub struct UdpResult {
    /// The sender's report.
    pub sent: u64,
    /// The sink's report.
    pub at_sink: Received,
    /// Processor time of the lab's daemons, from before the first packet to after the last.
    pub cpu: Duration,
}

impl UdpResult {
    /// Datagrams that did not arrive.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.at_sink.received)
    }
}

/// Sends `traffic` from the first pod of node 1 to the first pod of node 2. `program` is this program.
///
/// # Errors
/// [`Error::Lab`] if a program fails, [`Error::Report`] if its report is not understood,
/// [`Error::Silence`] if no packet arrived.
pub fn run(lab: &Lab, program: &Path, traffic: &Traffic) -> Result<UdpResult, Error> {
    let target = Member::Pod(2, 1);
    let addr = format!("{}:{PORT}", lab.pod_addr(2, 1)?);
    let limit = traffic.time + EXTRA;

    let mut sink = Command::new(program);
    sink.args(["bench", "udp-sink", "--listen", &addr]);
    sink.args(["--limit-ms", &limit.as_millis().to_string()]);
    if traffic.burst > 1 {
        sink.arg("--gro");
    }
    let mut sink = lab.spawn(target, "udp-sink", &mut sink)?;
    wait::until_bound(&lab.netns(target), "udp", PORT, lab.interrupt(), || {
        sink.check_running()
    })?;

    let before = process_clock::total(&lab.daemon_pids())?;
    let mut sender = Command::new(program);
    sender.args(["bench", "udp-send", "--dest", &addr]);
    sender.args([
        "--rate",
        &traffic.rate.to_string(),
        "--burst",
        &traffic.burst.to_string(),
    ]);
    sender.args(["--time-ms", &traffic.time.as_millis().to_string()]);
    let sender = lab.spawn(Member::Pod(1, 1), "udp-send", &mut sender)?;
    let sent: Sent = report(&sender.finish(limit, lab.interrupt())?)?;
    let at_sink: Received = report(&sink.finish(limit, lab.interrupt())?)?;
    let cpu = process_clock::total(&lab.daemon_pids())?.saturating_sub(before);
    if at_sink.received == 0 {
        return Err(Error::Silence { sent: sent.sent });
    }
    Ok(UdpResult {
        sent: sent.sent,
        at_sink,
        cpu,
    })
}

fn report<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Error> {
    serde_json::from_str(text).map_err(|error| Error::Report {
        program: "the packet generator",
        reason: error.to_string(),
    })
}
