//! Owns what can go wrong with the traffic rules, and the words for how a ruleset differs from the wanted one.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

/// Why the rules could not be stated, read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No program of that name in the search path.
    #[error("{program} is not installed (looked in {}): install the package {package}", list(.searched))]
    Missing {
        /// The program's name.
        program: String,
        /// The package that holds it on common distributions.
        package: &'static str,
        /// Where it was looked for.
        searched: Vec<PathBuf>,
    },
    /// A program could not be started or talked to.
    #[error("cannot run {program}: {source}")]
    Start {
        /// Its path.
        program: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A program refused what it was asked.
    #[error("`{command}` failed ({status}): {stderr}{}", at_line(.line))]
    Refused {
        /// The command with its arguments.
        command: String,
        /// Its exit status.
        status: String,
        /// What it wrote to standard error, shortened.
        stderr: String,
        /// The line of its input that it complained about, if it said which.
        line: Option<String>,
    },
    /// A program took too long: another one holds the lock, or the kernel is stuck.
    #[error(
        "`{command}` did not end within {limit:?}: does another program hold /run/xtables.lock?"
    )]
    Timeout {
        /// The command with its arguments.
        command: String,
        /// How long it was given.
        limit: Duration,
    },
    /// A program printed more than any sane ruleset needs.
    #[error("`{command}` printed more than {limit} bytes")]
    TooMuchOutput {
        /// The command with its arguments.
        command: String,
        /// How many bytes are read.
        limit: usize,
    },
    /// A listing that does not follow the program's own syntax.
    #[error("`{command}` printed a listing that cannot be read: {line}")]
    Listing {
        /// The command with its arguments.
        command: String,
        /// The line that made no sense.
        line: String,
    },
    /// A prefix of length 0 in a rule.
    #[error("{0} covers every address: a traffic rule needs a network with a prefix length")]
    WholeInternet(IpNet),
    /// flannel spins on such a value.
    #[error("--iptables-resync={0}: the interval must be at least 1 second")]
    ResyncInterval(i64),
    /// Neither part of the source check works here.
    #[error("the kernel or nft cannot check who sends to a VXLAN device: {0}")]
    NoSenderCheck(String),
    /// The socket for the kernel's notifications failed.
    #[error("cannot listen for changes of the ruleset: {0}")]
    Events(#[source] io::Error),
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
    paths.join(":")
}

fn at_line(line: &Option<String>) -> String {
    line.as_ref()
        .map_or_else(String::new, |line| format!(" (rule: {line})"))
}

/// One way in which the kernel's rules differ from the wanted ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The chain or table, such as `ip6tables filter FORWARD` or `ip flannel-ipv4`.
    pub place: String,
    /// What is wrong with it.
    pub what: What,
}

/// What is wrong with a chain or table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It, or the jump to it, is not there.
    Missing,
    /// Its rules are others, or in another order.
    Changed,
    /// The jump is there more than once.
    Duplicate,
    /// The jump stands behind a rule that decides about every packet, or has other conditions.
    Misplaced,
    /// It is there, but not wanted.
    LeftOver,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            What::Missing => "is missing",
            What::Changed => "has other rules",
            What::Duplicate => "jumps to it more than once",
            What::Misplaced => "jumps to it where it has no effect",
            What::LeftOver => "is left over",
        };
        write!(f, "{} {what}", self.place)
    }
}
