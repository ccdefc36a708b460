//! Owns taking one sample: one scenario on one lab, once. Never repeats, compares or prints.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::scenario::{BURST, Metric, Scenario};
use super::udp::{self, Traffic, UdpResult};
use super::{Error, iperf, process_clock};
use crate::lab::{Lab, Member};

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
/// A rate that is too high shows at once.
const CALIBRATION_TIME: Duration = Duration::from_millis(300);
/// More loss than one packet in this many, and a rate is too high.
const TOLERATED: u64 = 200;

/// What one run of one scenario yielded. Numbers that do not apply (processor time where there is no
/// process) are not there.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Sample(pub BTreeMap<Metric, f64>);

/// What a sample depends on besides the lab and the scenario.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// This program, which is also the packet generator.
    pub program: &'a Path,
    /// Length of a TCP run.
    pub seconds: u32,
    /// Offered rates of the burst and the single-packet scenario.
    pub rates: Rates,
}

/// Offered rates in datagrams per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rates {
    /// For [`Scenario::UdpBurst`].
    pub burst: u32,
    /// For [`Scenario::UdpSingle`].
    pub single: u32,
}

/// Runs `scenario` on `lab` once.
///
/// # Errors
/// Whatever kept the run from yielding its numbers, a daemon that died on the way included.
pub fn sample(lab: &mut Lab, scenario: Scenario, settings: &Settings<'_>) -> Result<Sample, Error> {
    let udp = |rate, burst, time| udp::run(lab, settings.program, &Traffic { rate, burst, time });
    let sample = match scenario {
        Scenario::TcpOne => tcp(lab, 1, settings.seconds)?,
        Scenario::TcpEight => tcp(lab, 8, settings.seconds)?,
        Scenario::UdpBurst => cpu_per_packet(&udp(settings.rates.burst, BURST, UDP_TIME)?),
        Scenario::UdpSingle => cpu_per_packet(&udp(settings.rates.single, 1, UDP_TIME)?),
        Scenario::IdleLatency => latency(&udp(IDLE_RATE, 1, IDLE_TIME)?),
    };
    lab.check_daemons()?;
    Ok(sample)
}

fn tcp(lab: &Lab, streams: u8, seconds: u32) -> Result<Sample, Error> {
    let daemons = lab.daemon_pids();
    let before = process_clock::total(&daemons)?;
    let result = iperf::run(lab, Member::Pod(1, 1), (2, 1), streams, seconds)?;
    let cpu = process_clock::total(&daemons)?.saturating_sub(before);
    let mut sample = BTreeMap::from([
        (Metric::Throughput, result.bits_per_second / 1e9),
        (Metric::Retransmits, result.retransmits),
    ]);
    if !daemons.is_empty() {
        sample.insert(
            Metric::CpuPerGigabyte,
            cpu.as_secs_f64() / (result.bytes / 1e9),
        );
    }
    Ok(Sample(sample))
}

fn cpu_per_packet(result: &UdpResult) -> Sample {
    let received = as_f64(result.at_sink.received);
    Sample(BTreeMap::from([
        (
            Metric::CpuPerPacket,
            result.cpu.as_secs_f64() * 1e6 / received,
        ),
        (
            Metric::Loss,
            as_f64(result.lost()) / as_f64(result.sent.max(1)) * 100.0,
        ),
        (Metric::Reordered, as_f64(result.at_sink.reordered)),
    ]))
}

fn latency(result: &UdpResult) -> Sample {
    Sample(BTreeMap::from([
        (Metric::LatencyP50, as_f64(result.at_sink.p50_ns) / 1e3),
        (Metric::LatencyP99, as_f64(result.at_sink.p99_ns) / 1e3),
        (
            Metric::Loss,
            as_f64(result.lost()) / as_f64(result.sent.max(1)) * 100.0,
        ),
    ]))
}

/// Finds the highest rates that all `labs` carry almost without loss, so that processor time per packet
/// compares: a system that drops does less work for each.
///
/// # Errors
/// [`Error::Report`] if not even the lowest rate is carried.
pub fn calibrate(labs: &[&Lab], program: &Path) -> Result<Rates, Error> {
    Ok(Rates {
        burst: carried(labs, program, &BURST_RATES, BURST)?,
        single: carried(labs, program, &SINGLE_RATES, 1)?,
    })
}

fn carried(labs: &[&Lab], program: &Path, rates: &[u32], burst: u16) -> Result<u32, Error> {
    for &rate in rates {
        let traffic = Traffic {
            rate,
            burst,
            time: CALIBRATION_TIME,
        };
        let mut all = true;
        for lab in labs {
            all = all && carries(lab, program, &traffic)?;
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

fn carries(lab: &Lab, program: &Path, traffic: &Traffic) -> Result<bool, Error> {
    match udp::run(lab, program, traffic) {
        Ok(result) => Ok(result.lost() * TOLERATED <= result.sent),
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
