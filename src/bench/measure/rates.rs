//! Owns looking for the rates that every system carries.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{CALIBRATION_TIME, Subject, small};
use crate::bench::Error;
use crate::bench::scenario::{BURST, Ends};
use crate::bench::udp::Traffic;

/// Rates tried when looking for one that every system carries, datagrams per second.
const BURST_RATES: [u32; 7] = [60_000, 40_000, 30_000, 20_000, 12_000, 8_000, 4_000];
/// The same for single packets: a sender that sleeps between sends keeps no faster pace.
const SINGLE_RATES: [u32; 5] = [20_000, 12_000, 8_000, 4_000, 2_000];
/// More loss than one packet in this many, and a rate is too high for a comparison.
const TOLERATED: u64 = 200;

/// Offered rates in datagrams per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// In bursts.
    pub burst: u32,
    /// One at a time.
    pub single: u32,
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
