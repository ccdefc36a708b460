//! Owns the command line: subcommands, flags, `FLANNELD_*`. The only reader of `argv` and the environment.
//! Never touches the system before the whole line is valid; never decides an exit code (`main` does).

pub mod bench;
mod capture;
mod cleanup;
mod daemon;
mod docker_opts;
mod doctor;
mod explain;
mod go_flags;
mod install_conf;
pub mod lab;
mod page;
mod status;
mod top;

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use clap::error::{ContextKind, ContextValue};
use clap::{Args as _, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

pub use capture::CaptureArgs;
pub use daemon::DaemonArgs;
pub use doctor::DoctorArgs;
pub use explain::ExplainArgs;
pub use status::StatusArgs;
pub use top::TopArgs;

use daemon::{Understood, understood};
use go_flags::Rewritten;

/// The name under which the program takes flannel's place.
const FLANNELD: &str = "flanneld";

/// The subcommand that is `flanneld`.
const DAEMON: &str = "daemon";

/// Names under which the program takes the place of flannel's, each with its subcommand and what it is given.
const STAND_INS: [(&str, &str, &str); 3] = [
    (FLANNELD, DAEMON, "[OPTIONS]"),
    ("mk-docker-opts.sh", "docker-opts", "[OPTIONS]"),
    ("install-conf", "install-conf", "SRC DEST"),
];

/// A parsed command line.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    /// What the original ignores without a word, worth a warning each.
    warnings: Vec<String>,
    /// Called by the original's name.
    as_flanneld: bool,
    /// The daemon's flags, and where each comes from.
    understood: Vec<Understood>,
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
    Daemon(Box<DaemonArgs>),
    /// Show what a running daemon does and why
    Status(StatusArgs),
    /// Show packets of the overlay and what becomes of them
    Capture(Box<CaptureArgs>),
    /// Say what becomes of a packet between two addresses, and why
    Explain(ExplainArgs),
    /// Find out how peers are reached, and why not
    Doctor(DoctorArgs),
    /// Show rates, peers and drops as they happen
    Top(TopArgs),
    /// Remove the traffic rules, routes and devices that a daemon has left on this node
    Cleanup,
    /// Write what Docker has to be started with; what `mk-docker-opts.sh` is
    DockerOpts(docker_opts::DockerOptsArgs),
    /// Copy a file in one step; what flannel's image calls `install-conf`
    InstallConf(install_conf::InstallConfArgs),
    /// What `flanneld --version` asks for
    #[command(skip)]
    Version,
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

/// Likewise from given arguments, the program's name first, and variables.
///
/// # Errors
///
/// As [`parse`].
pub fn parse_from(
    mut args: Vec<OsString>,
    env: impl Fn(&str) -> Option<OsString>,
) -> Result<Invocation, clap::Error> {
    let called = args.first().map(|arg| Path::new(arg).file_name());
    let called = called.flatten();
    let as_flanneld = called == Some(OsStr::new(FLANNELD));
    let stand_in = STAND_INS
        .into_iter()
        .find(|(name, ..)| called == Some(OsStr::new(name)));
    let mut cli = Cli::command();
    if let Some((name, subcommand, given)) = stand_in {
        args.insert(1, subcommand.into());
        // Else the usage would name the subcommand, which is no argument under that name.
        let usage = format!("{name} {given}");
        cli = cli.mut_subcommand(subcommand, |command| command.override_usage(usage));
    }
    let mut invocation = Invocation {
        command: Command::Version,
        warnings: Vec::new(),
        as_flanneld,
        understood: Vec::new(),
    };
    if args.get(1).is_none_or(|arg| arg != DAEMON) {
        let matches = cli.try_get_matches_from(args)?;
        invocation.command = Cli::from_arg_matches(&matches)?.command;
        return Ok(invocation);
    }
    let given = args.split_off(2);
    let flags = go_flags::valued(&DaemonArgs::augment_args(clap::Command::new(DAEMON)));
    let rewritten = go_flags::rewrite(given, &flags, env);
    args.extend(rewritten.args.iter().cloned());
    let command = cli.try_get_matches_from(args).and_then(|matches| {
        if let Some(matches) = matches.subcommand_matches(DAEMON) {
            invocation.understood = understood(matches, &rewritten);
        }
        Cli::from_arg_matches(&matches)
    });
    let command = command.map_err(|error| name_variable(error, &rewritten))?;
    if !rewritten.version {
        invocation.command = command.command;
    }
    invocation.warnings = rewritten.warnings;
    Ok(invocation)
}

/// Says which variable a bad value came from, if it did not come from the command line.
fn name_variable(mut error: clap::Error, rewritten: &Rewritten) -> clap::Error {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let flag = argument.trim_start_matches('-');
    let flag = flag.split([' ', '=', '[']).next().unwrap_or(flag);
    if let Some(variable) = rewritten.from_env.get(flag) {
        let named = ContextValue::String(format!("{argument} from {variable}"));
        error.insert(ContextKind::InvalidArg, named);
    }
    error
}

impl Invocation {
    /// How much to log; [`log::init`](crate::telemetry::log::init).
    #[must_use]
    pub const fn verbosity(&self) -> u8 {
        match &self.command {
            Command::Daemon(args) => args.verbosity,
            Command::Status(_)
            | Command::Capture(_)
            | Command::Explain(_)
            | Command::Doctor(_)
            | Command::Top(_)
            | Command::Cleanup
            | Command::DockerOpts(_)
            | Command::InstallConf(_)
            | Command::Version
            | Command::Lab(_)
            | Command::Bench(_) => 0,
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
            Command::Daemon(args) => daemon::run(*args, self.as_flanneld, &self.understood),
            Command::Status(args) => status::run(&args),
            Command::Capture(args) => capture::run(&args),
            Command::Explain(args) => explain::run(&args),
            Command::Doctor(args) => doctor::run(args),
            Command::Top(args) => top::run(&args),
            Command::Cleanup => cleanup::run(),
            Command::DockerOpts(args) => docker_opts::run(&args),
            Command::InstallConf(args) => install_conf::run(&args),
            Command::Version => version(),
            Command::Lab(args) => lab::run(args),
            Command::Bench(args) => bench::run(args),
        }
    }
}

/// The version alone, on stderr, as the original says its own.
fn version() -> anyhow::Result<()> {
    writeln!(std::io::stderr(), "{}", env!("CARGO_PKG_VERSION"))
        .context("cannot write to standard error")
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
