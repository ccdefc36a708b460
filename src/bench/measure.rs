//! Owns taking one sample: one scenario on one lab, once. Never repeats, compares or prints.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::meter::{Meter, Spent};
use super::scenario::{BURST, Ends, Load, Metric, SMALL, Scenario};
use super::system::{Path as Route, System};
use super::tcp::{self, Answered, Ask};
use super::udp::{self, Flow, Received, Traffic, UdpResult};
use super::{Error, iperf, lossless};
use crate::lab::Lab;

/// Rates tried when looking for one that every system carries, datagrams per second.
const BURST_RATES: [u32; 7] = [60_000, 40_000, 30_000, 20_000, 12_000, 8_000, 4_000];
/// The same for single packets: a sender that sleeps between sends keeps no faster pace.
const SINGLE_RATES: [u32; 5] = [20_000, 12_000, 8_000, 4_000, 2_000];
/// One datagram each millisecond leaves every queue empty.
const IDLE_RATE: u32 = 1_000;
/// About two thousand datagrams: enough for a 99th percentile.
const IDLE_TIME: Duration = Duration::from_secs(2);
/// Long enough for tens of thousands of packets.
const UDP_TIME: Duration = Duration::from_secs(1);
/// Thousands of requests or connections.
const ASK_TIME: Duration = Duration::from_secs(1);
/// A rate that is too high shows at once.
const CALIBRATION_TIME: Duration = Duration::from_millis(300);
/// Wakes what sleeps and fills what is empty: neighbour entries, caches, the tunnel's own tables.
const WARM_UP_TIME: Duration = Duration::from_millis(300);
/// More loss than one packet in this many, and a rate is too high for a comparison.
const TOLERATED: u64 = 200;
/// What 99 % arriving means.
const LOSSLESS: u64 = 100;
/// Port of the packets that cross beside what is measured.
const BACKGROUND_PORT: u16 = 5302;
/// The background starts before what is measured and ends after it.
const BACKGROUND_EXTRA: Duration = Duration::from_millis(500);

/// What one run of one scenario yielded. Numbers that do not apply (processor time where there is no
/// process) are not there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The numbers.
    #[serde(flatten)]
    pub figures: BTreeMap<Metric, f64>,
    /// Why they do not count, or why there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Sample {
    /// A run that yielded nothing.
    #[must_use]
    pub fn failure(why: &Error) -> Self {
        Self {
            failed: Some(why.to_string()),
            ..Self::default()
        }
    }

    fn set(&mut self, metric: Metric, value: f64) {
        // A division by nothing is no figure.
        if value.is_finite() {
            self.figures.insert(metric, value);
        }
    }

    /// Notes what it cost, and what the data planes have to say about it.
    fn note(&mut self, load: Load, spent: &Spent) {
        let Some(work) = &spent.work else {
            return;
        };
        if let Some(calls) = work.calls_per_packet() {
            self.set(Metric::CallsPerPacket, calls);
        }
        if let Some(packets) = work.packets_per_call() {
            self.set(Metric::PacketsPerCall, packets);
        }
        let faults = work.faults(load);
        if !faults.is_empty() {
            self.failed = Some(faults.join("; "));
        }
    }
}

/// What a sample depends on besides the lab and the scenario.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// This program, which is also the packet generator.
    pub program: &'a Path,
    /// Length of a TCP run.
    pub seconds: u32,
    /// Offered rates.
    pub rates: Rates,
}

/// Offered rates in datagrams per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// In bursts.
    pub burst: u32,
    /// One at a time.
    pub single: u32,
}

/// One system in its lab, ready to be measured.
#[derive(Debug)]
pub struct Subject {
    /// Which it is.
    pub system: System,
    /// Where it runs.
    pub lab: Lab,
}

impl Subject {
    const fn meter(&self) -> Meter {
        Meter {
            engine: self.system.engine(),
        }
    }

    fn path(&self, ends: Ends) -> Result<Route, Error> {
        Ok(self.system.path(&self.lab, ends)?)
    }

    fn udp(&self, ends: Ends, program: &Path, traffic: &Traffic) -> Result<UdpResult, Error> {
        udp::run(
            &self.lab,
            program,
            &self.path(ends)?,
            traffic,
            &self.meter(),
        )
    }

    /// Runs `scenario` once.
    ///
    /// # Errors
    /// Whatever kept the run from yielding its numbers, a daemon that died on the way included.
    pub fn sample(&mut self, scenario: Scenario, settings: &Settings<'_>) -> Result<Sample, Error> {
        let ends = scenario.ends;
        let sample = match scenario.load {
            Load::Tcp { streams, both } => self.tcp(ends, streams, both, settings.seconds)?,
            Load::Udp { len, burst } => {
                let (rate, burst) = match burst {
                    true => (settings.rates.burst, BURST),
                    false => (settings.rates.single, 1),
                };
                let traffic = Traffic {
                    len,
                    rate,
                    burst,
                    time: UDP_TIME,
                };
                let result = self.udp(ends, settings.program, &traffic)?;
                packets(scenario.load, &result, self.system.has_daemon())
            }
            Load::OneWay { half } => self.beside(half, ends, IDLE_TIME, settings, |subject| {
                let result = subject.udp(ends, settings.program, &small(IDLE_RATE, IDLE_TIME))?;
                Ok(one_way(&result))
            })?,
            Load::Request { half } => self.beside(half, ends, ASK_TIME, settings, |subject| {
                subject.ask(ends, Ask::Requests, settings.program)
            })?,
            Load::Connect => self.ask(ends, Ask::Connections, settings.program)?,
            Load::Lossless { len } => self.lossless(ends, len, settings.program)?,
        };
        self.lab.check_daemons()?;
        Ok(sample)
    }

    fn tcp(&self, ends: Ends, streams: u8, both: bool, seconds: u32) -> Result<Sample, Error> {
        let path = self.path(ends)?;
        let meter = self.meter();
        let reordered = || reorderings(&self.lab, &path);
        let (before, reordered_before) = (meter.read(&self.lab)?, reordered()?);
        let result = iperf::run(&self.lab, &path, streams, both, seconds)?;
        let spent = meter.read(&self.lab)?.since(&before);
        let gigabytes = result.bytes / 1e9;
        let mut sample = Sample::default();
        sample.set(Metric::Throughput, result.bits_per_second / 1e9);
        sample.set(Metric::Retransmits, result.retransmits);
        let reordered = reordered()?.saturating_sub(reordered_before);
        sample.set(Metric::Reordered, as_f64(reordered));
        sample.set(
            Metric::MachinePerGigabyte,
            spent.machine.as_secs_f64() / gigabytes,
        );
        if self.system.has_daemon() {
            sample.set(Metric::CpuPerGigabyte, spent.cpu.as_secs_f64() / gigabytes);
            sample.set(Metric::ContextSwitches, per_second(spent.switches, &spent));
        }
        sample.note(Load::Tcp { streams, both }, &spent);
        Ok(sample)
    }

    fn ask(&self, ends: Ends, ask: Ask, program: &Path) -> Result<Sample, Error> {
        let answered = tcp::run(&self.lab, program, &self.path(ends)?, ask, ASK_TIME)?;
        Ok(asked(ask, &answered))
    }

    /// Does `work` while, if `half` is set, other packets cross at half the rate that every system carries.
    fn beside(
        &self,
        half: bool,
        ends: Ends,
        time: Duration,
        settings: &Settings<'_>,
        work: impl FnOnce(&Self) -> Result<Sample, Error>,
    ) -> Result<Sample, Error> {
        if !half {
            return work(self);
        }
        let path = self.path(ends)?;
        let traffic = small(settings.rates.single / 2, time + BACKGROUND_EXTRA);
        let (lab, program, port) = (&self.lab, settings.program, BACKGROUND_PORT);
        let mut background = Flow::open(lab, program, &path, port, &traffic)?;
        background.send(lab, program, &path, port, &traffic)?;
        let sample = work(self)?;
        background.finish(lab)?;
        Ok(sample)
    }

    fn lossless(&self, ends: Ends, len: u16, program: &Path) -> Result<Sample, Error> {
        let found = lossless::highest(|rate| {
            let traffic = Traffic {
                len,
                ..small(rate, CALIBRATION_TIME)
            };
            match self.udp(ends, program, &traffic) {
                Ok(result) => {
                    // A sender that lags has not offered the rate.
                    let in_time =
                        u128::from(result.sent.elapsed_ns) <= CALIBRATION_TIME.as_nanos() * 11 / 10;
                    Ok(in_time && result.lost() * LOSSLESS <= result.sent.sent)
                }
                Err(Error::Silence { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        })?;
        let rate = found.ok_or_else(|| Error::Report {
            program: "the packet generator",
            reason: "not even the lowest rate crosses".to_owned(),
        })?;
        let mut sample = Sample::default();
        sample.set(Metric::PacketRate, f64::from(rate) / 1e3);
        Ok(sample)
    }

    /// Sends a little of everything before anything counts.
    ///
    /// # Errors
    /// As [`Subject::sample`].
    pub fn warm_up(&self, program: &Path) -> Result<(), Error> {
        self.udp(Ends::Pods, program, &small(IDLE_RATE, WARM_UP_TIME))?;
        tcp::run(
            &self.lab,
            program,
            &self.path(Ends::Pods)?,
            Ask::Requests,
            WARM_UP_TIME,
        )?;
        Ok(())
    }
}

const fn small(rate: u32, time: Duration) -> Traffic {
    Traffic {
        len: SMALL,
        rate,
        burst: 1,
        time,
    }
}

fn packets(load: Load, result: &UdpResult, daemon: bool) -> Sample {
    let received = as_f64(result.at_sink.received);
    let per_packet = |time: Duration| time.as_secs_f64() * 1e6 / received;
    let spent = &result.spent;
    let mut sample = Sample::default();
    sample.set(Metric::MachinePerPacket, per_packet(spent.machine));
    if daemon {
        sample.set(Metric::CpuPerPacket, per_packet(spent.cpu));
        sample.set(Metric::ContextSwitches, per_second(spent.switches, spent));
    }
    let seconds = as_f64(result.sent.elapsed_ns) / 1e9;
    sample.set(Metric::PacketRate, received / 1e3 / seconds);
    sample.set(Metric::Loss, loss(result));
    sample.set(Metric::Reordered, as_f64(result.at_sink.reordered));
    sample.note(load, spent);
    sample
}

fn one_way(result: &UdpResult) -> Sample {
    let Received {
        p50_ns,
        p99_ns,
        p999_ns,
        ..
    } = result.at_sink;
    let mut sample = latencies([p50_ns, p99_ns, p999_ns]);
    sample.set(Metric::Loss, loss(result));
    sample
}

fn asked(ask: Ask, answered: &Answered) -> Sample {
    let mut sample = latencies([answered.p50_ns, answered.p99_ns, answered.p999_ns]);
    let metric = match ask {
        Ask::Requests => Metric::RequestRate,
        Ask::Connections => Metric::ConnectRate,
    };
    let seconds = as_f64(answered.elapsed_ns) / 1e9;
    sample.set(metric, as_f64(answered.count) / seconds);
    sample
}

fn latencies(nanoseconds: [u64; 3]) -> Sample {
    let mut sample = Sample::default();
    let metrics = [Metric::LatencyP50, Metric::LatencyP99, Metric::LatencyP999];
    for (metric, value) in metrics.into_iter().zip(nanoseconds) {
        sample.set(metric, as_f64(value) / 1e3);
    }
    sample
}

fn loss(result: &UdpResult) -> f64 {
    as_f64(result.lost()) / as_f64(result.sent.sent.max(1)) * 100.0
}

fn per_second(count: u64, spent: &Spent) -> f64 {
    as_f64(count) / spent.elapsed.as_secs_f64()
}

/// How often the sender's kernel has found its segments reordered; three ways to notice it (`TCPSACKReorder`,
/// `TCPTSReorder`, `TCPRenoReorder` of `/proc/net/netstat`).
fn reorderings(lab: &Lab, path: &Route) -> Result<u64, Error> {
    let text = lab
        .netns(path.from)
        .run(|| fs::read_to_string("/proc/thread-self/net/netstat"))?
        .map_err(Error::io("read the TCP counters of the sender"))?;
    Ok(reorderings_in(&text))
}

fn reorderings_in(netstat: &str) -> u64 {
    let mut lines = netstat
        .lines()
        .filter_map(|line| line.strip_prefix("TcpExt: "));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
        return 0;
    };
    names
        .split(' ')
        .zip(values.split(' '))
        .filter(|(name, _)| name.starts_with("TCP") && name.ends_with("Reorder"))
        .filter_map(|(_, value)| value.parse::<u64>().ok())
        .sum()
}

/// Finds the highest rates that all `subjects` carry almost without loss, so that processor time per packet
/// compares: a system that drops does less work for each.
///
/// # Errors
/// [`Error::Report`] if not even the lowest rate is carried.
pub fn calibrate(subjects: &[Subject], program: &Path) -> Result<Rates, Error> {
    Ok(Rates {
        burst: carried(subjects, program, &BURST_RATES, BURST)?,
        single: carried(subjects, program, &SINGLE_RATES, 1)?,
    })
}

fn carried(subjects: &[Subject], program: &Path, rates: &[u32], burst: u16) -> Result<u32, Error> {
    for &rate in rates {
        let traffic = Traffic {
            burst,
            ..small(rate, CALIBRATION_TIME)
        };
        let mut all = true;
        for subject in subjects {
            all = all && carries(subject, program, &traffic)?;
        }
        if all {
            return Ok(rate);
        }
    }
    Err(Error::Report {
        program: "the packet generator",
        reason: format!(
            "not even {} packets/s cross every system",
            rates.last().unwrap_or(&0)
        ),
    })
}

fn carries(subject: &Subject, program: &Path, traffic: &Traffic) -> Result<bool, Error> {
    match subject.udp(Ends::Pods, program, traffic) {
        Ok(result) => Ok(result.lost() * TOLERATED <= result.sent.sent),
        Err(Error::Silence { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of one run are far below 2^52"
)]
const fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_three_counts_of_reordering_are_added() {
        let netstat = "TcpExt: SyncookiesSent TCPTSReorder TCPSACKReorder TCPRenoReorder TCPReqQFullDrop\n\
                       TcpExt: 9 1 20 300 9\nIpExt: InNoRoutes\nIpExt: 7\n";
        assert_eq!(reorderings_in(netstat), 321);
        assert_eq!(reorderings_in(""), 0);
    }

    #[test]
    fn a_sample_survives_the_way_through_json_with_its_failure() {
        let mut sample = Sample::default();
        sample.set(Metric::Throughput, 6.25);
        sample.set(Metric::CpuPerGigabyte, f64::NAN);
        sample.failed = Some("udp-gso was given up: EIO".to_owned());
        let text = serde_json::to_string(&sample).unwrap();
        assert_eq!(
            text,
            r#"{"throughput":6.25,"failed":"udp-gso was given up: EIO"}"#
        );
        assert_eq!(serde_json::from_str::<Sample>(&text).unwrap(), sample);
    }
}
