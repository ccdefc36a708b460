//! Owns the one error type of the lab. Never prints.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a lab could not be built, entered or removed. Every text names the thing and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name or a number that cannot describe a lab.
    #[error("{what} is {given:?}, but must be {rule}")]
    Invalid {
        /// The thing that was given.
        what: &'static str,
        /// Its text.
        given: String,
        /// The values that are allowed.
        rule: &'static str,
    },
    /// A program that the lab calls is not installed.
    #[error("{program} is not installed: run scripts/setup, or install the package that holds it")]
    Missing {
        /// The program's name.
        program: String,
    },
    /// A command ran and refused.
    #[error("`{command}` failed ({status}): {stderr}")]
    Command {
        /// The command and its arguments; for a batch, with the line that failed.
        command: String,
        /// The exit status.
        status: String,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// A system call on a named thing failed.
    #[error("cannot {doing} {thing}: {source}")]
    Io {
        /// The verb.
        doing: &'static str,
        /// The file, namespace or process.
        thing: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A condition did not become true in time.
    #[error("waited {waited:?} in vain for {what}{detail}")]
    Timeout {
        /// The condition.
        what: String,
        /// How long.
        waited: Duration,
        /// What was seen instead; empty, or opened by a line break.
        detail: String,
    },
    /// A daemon ended while the lab needed it.
    #[error("{what} ended by itself ({status}); the end of {}:\n{log_tail}", log.display())]
    Ended {
        /// The process.
        what: String,
        /// Its exit status.
        status: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of the log.
        log_tail: String,
    },
    /// A file of the lab does not hold what it should.
    #[error("{} is not readable as {expected}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The name is taken by a lab that is up.
    #[error("lab {name} is up already: take it down first (`loden lab down --name {name}`)")]
    Exists {
        /// The lab's name.
        name: String,
    },
    /// The lab belongs to a program that is running.
    #[error("lab {name} is in use by a running program (a benchmark or a test): stop that program")]
    InUse {
        /// The lab's name.
        name: String,
    },
    /// There is no such lab, or no such node or pod in it.
    #[error("there is no {thing}: `loden lab status` lists what there is")]
    NotFound {
        /// What was asked for.
        thing: String,
    },
    /// SIGINT, SIGTERM or SIGHUP arrived.
    #[error("interrupted by a signal")]
    Interrupted,
    /// Some things could not be removed; all others were.
    #[error("lab {name} is not wholly removed: {}", join(problems))]
    Teardown {
        /// The lab's name.
        name: String,
        /// One per thing that is left.
        problems: Vec<Self>,
    },
}

impl Error {
    /// Wraps a system error with the verb and the thing it concerns.
    pub(crate) fn io(
        doing: &'static str,
        thing: impl Into<String>,
    ) -> impl FnOnce(io::Error) -> Self {
        let thing = thing.into();
        move |source| Self::Io {
            doing,
            thing,
            source,
        }
    }

    /// Why `program` could not be started.
    pub(crate) fn start(program: String, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::NotFound {
            Self::Missing { program }
        } else {
            Self::Io {
                doing: "start",
                thing: program,
                source,
            }
        }
    }
}

fn join(problems: &[Error]) -> String {
    problems
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}
