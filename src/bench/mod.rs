//! `loden bench`: what is compared, how one number is taken, and how the numbers become a table. Never
//! builds a topology itself ([`crate::lab`] does), and never reads the daemon's own counters: everything is
//! measured from the pods and from the process clocks, so that every system is measured alike.
//!
//! | Module | Owns |
//! |---|---|
//! | [`system`] | what is compared: plain routing, kernel VXLAN, loden, the portable engine |
//! | [`scenario`] | what is done with it: streams, bursts, single packets, idle latency |
//! | [`measure`] | taking one [`Sample`](measure::Sample) of one scenario on one lab |
//! | [`iperf`], [`udp`] | the traffic: iperf3, and numbered packets of our own |
//! | [`process_clock`] | processor time of the daemons |
//! | [`quick`] | the order of a run: interleaved repetitions on the labs of one wire after the other |
//! | [`goal`] | ratios within a repetition, and the floors they are held against |
//! | [`report`], [`table`] | the result as data, and as text |
//!
//! Figures of different runs do not compare: the machine is shared and its speed drifts. Ratios within one
//! repetition do, and the median of three of them is what a floor is held against.

pub mod goal;
pub mod iperf;
pub mod measure;
pub mod process_clock;
pub mod quick;
pub mod report;
pub mod scenario;
pub mod stats;
pub mod system;
pub mod table;
pub mod udp;

/// Why a benchmark could not be run. Nothing of it is left behind in any case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The lab could not be built or used.
    #[error(transparent)]
    Lab(#[from] crate::lab::Error),
    /// A lab did not get far enough to be measured.
    #[error("measuring {what}: {source}")]
    Measuring {
        /// System, wire and scenario.
        what: String,
        /// The cause.
        source: Box<Self>,
    },
    /// A traffic program answered with something else than its report.
    #[error("the report of {program} is not usable: {reason}")]
    Report {
        /// The program.
        program: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Every packet of a run was lost.
    #[error("no packet of {sent} arrived")]
    Silence {
        /// How many were sent.
        sent: u64,
    },
    /// The process clock of a daemon could not be read.
    #[error("cannot read the process clock of process {pid}: {source}")]
    Clock {
        /// The process.
        pid: i32,
        /// The system's answer.
        source: nix::Error,
    },
    /// A system call of a traffic program failed.
    #[error("cannot {doing}: {source}")]
    Io {
        /// The verb and the thing.
        doing: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl Error {
    fn io<E: Into<std::io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            doing,
            source: source.into(),
        }
    }
}
