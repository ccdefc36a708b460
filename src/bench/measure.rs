//! Owns taking one sample: one scenario on one system, once. Never repeats, compares or prints.

mod rates;
mod sample;

use std::path::Path;
use std::time::Duration;

use super::meter::{Meter, Reading, Spent};
use super::remote::client::Pair;
use super::scenario::{BURST, Ends, Load, SMALL, Scenario};
use super::stage::{Stage, reorderings};
use super::system::{Path as Route, System};
use super::tcp::{self, Ask};
use super::udp::{self, Flow, Traffic, UdpResult};
use super::{Error, iperf, lossless};
use crate::lab::{Lab, Wire};

pub use rates::{Rates, calibrate};
pub use sample::Sample;

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
/// What 99 % arriving means.
const LOSSLESS: u64 = 100;
/// The background starts before what is measured and ends after it.
const BACKGROUND_EXTRA: Duration = Duration::from_millis(500);

/// What a sample depends on besides the system and the scenario.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// This program, which is also the packet generator.
    pub program: &'a Path,
    /// Length of a TCP run.
    pub seconds: u32,
    /// Offered rates.
    pub rates: Rates,
}

/// Where a system is measured.
#[derive(Debug)]
pub enum Site {
    /// In a lab of its own.
    Lab(Box<Lab>),
    /// Between this machine and another.
    Pair(Pair),
}

/// One system, ready to be measured.
#[derive(Debug)]
pub struct Subject {
    /// Which it is.
    pub system: System,
    /// Where it runs.
    pub site: Site,
}

impl Subject {
    fn stage(&self) -> &dyn Stage {
        match &self.site {
            Site::Lab(lab) => &**lab,
            Site::Pair(pair) => pair,
        }
    }

    fn meter(&self) -> Meter {
        match &self.site {
            Site::Lab(lab) => Meter {
                expected: self.system.expected(),
                gro: lab.spec().wire != Wire::PacketNoGro,
            },
            Site::Pair(_) => Meter::default(),
        }
    }

    fn read(&self) -> Result<Reading, Error> {
        self.meter().read(self.stage())
    }

    fn route(&self, ends: Ends) -> Result<Route, Error> {
        match &self.site {
            Site::Lab(lab) => Ok(self.system.path(lab, ends)?),
            Site::Pair(pair) => Ok(pair.route()),
        }
    }

    /// Whether packets pass through processes whose processor time is read.
    const fn has_daemon(&self) -> bool {
        match self.site {
            Site::Lab(_) => self.system.has_daemon(),
            Site::Pair(_) => false,
        }
    }

    fn udp(&self, ends: Ends, program: &Path, traffic: &Traffic) -> Result<UdpResult, Error> {
        let route = self.route(ends)?;
        udp::run(self.stage(), program, &route, traffic, &self.meter())
    }

    /// Runs `scenario` once.
    ///
    /// # Errors
    /// Whatever kept the run from yielding its numbers, a daemon that died on the way included.
    pub fn sample(&mut self, scenario: Scenario, settings: &Settings<'_>) -> Result<Sample, Error> {
        let (ends, load) = (scenario.ends, scenario.load);
        let sample = match load {
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
                Sample::of_packets(load, &result, self.has_daemon())
            }
            Load::OneWay { half } => self.beside(half, ends, IDLE_TIME, settings, |subject| {
                let result = subject.udp(ends, settings.program, &small(IDLE_RATE, IDLE_TIME))?;
                Ok(Sample::of_one_way(load, &result, subject.has_daemon()))
            })?,
            Load::Request { half } => self.beside(half, ends, ASK_TIME, settings, |subject| {
                subject.ask(load, ends, Ask::Requests, settings.program)
            })?,
            Load::Connect => self.ask(load, ends, Ask::Connections, settings.program)?,
            Load::Lossless { len } => self.lossless(load, ends, len, settings.program)?,
        };
        if let Site::Lab(lab) = &mut self.site {
            lab.check_daemons()?;
        }
        Ok(sample)
    }

    fn tcp(&self, ends: Ends, streams: u8, both: bool, seconds: u32) -> Result<Sample, Error> {
        let route = self.route(ends)?;
        let reordered = || reorderings(self.stage(), &route);
        let (before, reordered_before) = (self.read()?, reordered()?);
        let result = iperf::run(self.stage(), &route, streams, both, seconds)?;
        let spent = self.read()?.since(&before);
        let reordered = reordered()?.saturating_sub(reordered_before);
        let load = Load::Tcp { streams, both };
        let daemon = self.has_daemon();
        Ok(Sample::of_tcp(load, &result, reordered, &spent, daemon))
    }

    fn ask(&self, load: Load, ends: Ends, ask: Ask, program: &Path) -> Result<Sample, Error> {
        let route = self.route(ends)?;
        let before = self.read()?;
        let answered = tcp::run(self.stage(), program, &route, ask, ASK_TIME)?;
        let spent: Spent = self.read()?.since(&before);
        let daemon = self.has_daemon();
        Ok(Sample::of_answers(load, ask, &answered, &spent, daemon))
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
        let (route, stage) = (self.route(ends)?, self.stage());
        let traffic = small(settings.rates.single / 2, time + BACKGROUND_EXTRA);
        let mut background = Flow::open(stage, settings.program, &route, true, &traffic)?;
        background.send(stage, settings.program, &route, &traffic)?;
        let sample = work(self)?;
        background.finish(stage)?;
        Ok(sample)
    }

    fn lossless(&self, load: Load, ends: Ends, len: u16, program: &Path) -> Result<Sample, Error> {
        let mut best = None;
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
                    let carried = in_time && result.lost() * LOSSLESS <= result.sent.sent;
                    if carried {
                        best = Some(result);
                    }
                    Ok(carried)
                }
                Err(Error::Silence { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        })?;
        // Rates that are carried only rise, so the last one that was is the highest.
        match (found, best) {
            (Some(rate), Some(result)) => {
                let daemon = self.has_daemon();
                Ok(Sample::of_packets(load, &result, daemon).at_rate(rate))
            }
            _ => Err(Error::Report {
                program: "the packet generator",
                reason: "not even the lowest rate crosses".to_owned(),
            }),
        }
    }

    /// Sends a little of everything before anything counts.
    ///
    /// # Errors
    /// As [`Subject::sample`].
    pub fn warm_up(&self, program: &Path) -> Result<(), Error> {
        self.udp(Ends::Pods, program, &small(IDLE_RATE, WARM_UP_TIME))?;
        let route = self.route(Ends::Pods)?;
        tcp::run(self.stage(), program, &route, Ask::Requests, WARM_UP_TIME)?;
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
