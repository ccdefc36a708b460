//! Owns the command line: subcommands, flags, `FLANNELD_*`. The only reader of `argv` and the environment.
//! Never touches the system before the whole line is valid; never decides an exit code (`main` does).

pub mod bench;
mod daemon;
mod go_flags;
pub mod lab;
mod status;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::error::{ContextKind, ContextValue};
use clap::{Args as _, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

pub use daemon::DaemonArgs;
pub use status::StatusArgs;

use go_flags::Rewritten;

/// The name under which the program takes flannel's place.
const FLANNELD: &str = "flanneld";

/// The subcommand that is `flanneld`.
const DAEMON: &str = "daemon";

/// A parsed command line.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    /// What the original ignores without a word, worth a warning each.
    warnings: Vec<String>,
}

#[derive(Debug, Parser)]
#[command(name = "loden", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent; what `flanneld` is
    Daemon(DaemonArgs),
    /// Show what a running daemon does and why
    Status(StatusArgs),
    /// Build nodes and pods on this machine to try things out
    Lab(lab::LabArgs),
    /// Measure, and compare with other systems
    Bench(bench::BenchArgs),
}

/// Reads the command line and the environment of the process.
///
/// # Errors
///
/// What clap says: a usage error, or the text for `--help` and `--version`.
pub fn parse() -> Result<Invocation, clap::Error> {
    parse_from(std::env::args_os().collect(), |name| std::env::var_os(name))
}

fn parse_from(
    mut args: Vec<OsString>,
    env: impl Fn(&str) -> Option<OsString>,
) -> Result<Invocation, clap::Error> {
    let called = args.first().map(|arg| Path::new(arg).file_name());
    if called.flatten() == Some(OsStr::new(FLANNELD)) {
        args.insert(1, DAEMON.into());
    }
    if args.get(1).is_none_or(|arg| arg != DAEMON) {
        let command = Cli::try_parse_from(args)?.command;
        return Ok(Invocation {
            command,
            warnings: Vec::new(),
        });
    }
    let given = args.split_off(2);
    let flags = go_flags::valued(&DaemonArgs::augment_args(clap::Command::new(DAEMON)));
    let rewritten = go_flags::rewrite(given, &flags, env);
    if let Some(flag) = &rewritten.unavailable {
        return Err(Cli::command().error(
            clap::error::ErrorKind::UnknownArgument,
            format!("--{flag} is a flag of flannel that is not available yet: leave it out"),
        ));
    }
    args.extend(rewritten.args.iter().cloned());
    let command = Cli::command()
        .try_get_matches_from(args)
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map_err(|error| name_variable(error, &rewritten))?
        .command;
    Ok(Invocation {
        command,
        warnings: rewritten.warnings,
    })
}

/// Says which variable a bad value came from, if it did not come from the command line.
fn name_variable(error: clap::Error, rewritten: &Rewritten) -> clap::Error {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let flag = argument.trim_start_matches('-');
    let flag = flag.split([' ', '=']).next().unwrap_or(flag);
    let Some(variable) = rewritten.from_env.get(flag) else {
        return error;
    };
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let text = text.split("\n\n").next().unwrap_or(text);
    Cli::command().error(
        clap::error::ErrorKind::ValueValidation,
        format!("{text} (from {variable})"),
    )
}

impl Invocation {
    /// How much to log: 0 info, 1 debug, 2 and more trace.
    #[must_use]
    pub const fn verbosity(&self) -> u8 {
        match &self.command {
            Command::Daemon(args) => args.verbosity,
            Command::Status(_) | Command::Lab(_) | Command::Bench(_) => 0,
        }
    }

    /// Does what the command line asks for.
    ///
    /// # Errors
    ///
    /// One line that names the missing thing and the remedy.
    pub fn run(self) -> anyhow::Result<()> {
        for warning in &self.warnings {
            tracing::warn!("{warning}");
        }
        match self.command {
            Command::Daemon(args) => daemon::run(args),
            Command::Status(args) => status::run(&args),
            Command::Lab(args) => lab::run(args),
            Command::Bench(args) => bench::run(args),
        }
    }
}

/// The one line that says why the program ends: the error, then every cause that it does not name itself.
#[must_use]
pub fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests;
