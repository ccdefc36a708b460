//! `loden bench`: what is compared, how one number is taken, and how the numbers become a table and a report. Never
//! builds a topology itself ([`crate::lab`] does). What is compared is measured from the ends and from the clocks of
//! processes and machine, so that every system is measured alike; loden's own counters only explain.
//!
//! | Module | Owns |
//! |---|---|
//! | [`system`] | what is compared: the wire, plain routing, kernel VXLAN, loden's engines, other programs |
//! | [`scenario`] | what is done with it, by text id: streams, bursts, single packets, latency |
//! | [`measure`] | taking one [`Sample`](measure::Sample) of one scenario on one lab |
//! | [`stage`], [`service`], [`remote`] | where the two ends run: in a lab, or here and on another machine |
//! | [`medium`] | what lies between them |
//! | [`iperf`], [`udp`], [`tcp`], [`lossless`] | the traffic: iperf3, and packets and requests of our own |
//! | [`meter`], [`process_clock`], [`dataplane`] | what it cost: processors, context switches, system calls |
//! | [`plan`], [`run`] | the order of a run: interleaved repetitions on the labs of one underlay after the other |
//! | [`quick`] | what the quick benchmark takes of it |
//! | [`stats`], [`ratio`], [`goal`] | medians, ratios within a repetition, and the goals they are held against |
//! | [`report`] | the result as data |
//! | [`table`], [`page`], [`plot`] | the same as text, as Markdown and HTML, and as pictures |
//! | [`compare`] | two reports, and what became slower |
//!
//! Figures of different runs do not compare: the machine is shared and its speed drifts. Ratios within one
//! repetition do, and the median of three of them is what a goal is held against.

pub mod compare;
pub mod dataplane;
pub mod goal;
pub mod iperf;
pub mod lossless;
pub mod measure;
pub mod medium;
pub mod meter;
pub mod page;
pub mod plan;
pub mod plot;
pub mod process_clock;
pub mod quick;
pub mod ratio;
pub mod remote;
pub mod report;
pub mod run;
pub mod scenario;
pub mod service;
pub mod stage;
pub mod stats;
pub mod system;
pub mod table;
pub mod tcp;
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
    /// A daemon does not tell about itself.
    #[error(transparent)]
    Status(#[from] crate::debug::socket::SocketError),
    /// A report could not be drawn.
    #[error("cannot draw the figure of {what}: {reason}")]
    Plot {
        /// Which.
        what: String,
        /// What the drawing library says.
        reason: String,
    },
    /// The process clock of a daemon could not be read.
    #[error("cannot read the process clock of process {pid}: {source}")]
    Clock {
        /// The process.
        pid: i32,
        /// The system's answer.
        source: nix::Error,
    },
    /// The other machine does not answer, does not want us, or something failed there.
    #[error("the other machine: {0}")]
    Remote(String),
    /// The connection to the other machine is gone.
    #[error("the connection to the other machine is lost: {0}")]
    Lost(std::io::Error),
    /// There is no token.
    #[error("token file {}: {reason}", path.display())]
    Token {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        reason: String,
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
    /// Whether a signal is the cause.
    #[must_use]
    pub fn is_interruption(&self) -> bool {
        match self {
            Self::Lab(crate::lab::Error::Interrupted) => true,
            Self::Measuring { source, .. } => source.is_interruption(),
            Self::Lab(_)
            | Self::Report { .. }
            | Self::Silence { .. }
            | Self::Status(_)
            | Self::Plot { .. }
            | Self::Clock { .. }
            | Self::Remote(_)
            | Self::Lost(_)
            | Self::Token { .. }
            | Self::Io { .. } => false,
        }
    }

    /// Whether nothing that comes after it can succeed.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Lost(_))
            || matches!(self, Self::Measuring { source, .. } if source.is_final())
            || self.is_interruption()
    }

    fn io<E: Into<std::io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            doing,
            source: source.into(),
        }
    }
}
