//! Owns `loden bench`: its arguments, its progress on standard error and its result on standard output.
//! Never measures; [`crate::bench`] does.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};

use crate::bench::quick::{self, Plan};
use crate::bench::scenario::Scenario;
use crate::bench::system::System;
use crate::bench::table;
use crate::bench::udp::{self, Traffic};
use crate::lab::{Interrupt, Wire};

/// Arguments of `loden bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

/// What to measure.
#[derive(Subcommand, Debug)]
enum BenchCommand {
    /// Compare loden with plain routing, kernel VXLAN and its own portable engine, in about three minutes
    Quick(QuickArgs),
    /// Send numbered packets (run inside a pod by the benchmark)
    #[command(hide = true)]
    UdpSend(SendArgs),
    /// Receive and count numbered packets (run inside a pod by the benchmark)
    #[command(hide = true)]
    UdpSink(SinkArgs),
}

#[derive(Args, Debug)]
struct QuickArgs {
    /// Print the result as JSON, every sample included
    #[arg(long)]
    json: bool,
    /// How often each sample is taken
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    reps: u32,
    /// Length of each TCP run
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// The wires, separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["superpacket", "packet", "packet-no-gro"])]
    wires: Vec<Wire>,
    /// The systems, separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["plain", "vxlan", "loden", "portable"])]
    systems: Vec<System>,
    /// What is done with them, separated by commas [default: everything]
    #[arg(long, value_enum, value_delimiter = ',')]
    scenarios: Vec<Scenario>,
    /// The program to measure as the daemon [default: this program]
    #[arg(long)]
    daemon: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct SendArgs {
    #[arg(long)]
    dest: SocketAddr,
    #[arg(long)]
    rate: u32,
    #[arg(long)]
    burst: u16,
    #[arg(long)]
    time_ms: u64,
}

#[derive(Args, Debug)]
struct SinkArgs {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    gro: bool,
    #[arg(long)]
    limit_ms: u64,
}

/// Runs `loden bench`.
///
/// # Errors
/// What [`crate::bench`] reports. A missed goal is a result, not an error.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Quick(args) => run_quick(args),
        BenchCommand::UdpSend(SendArgs {
            dest,
            rate,
            burst,
            time_ms,
        }) => {
            let traffic = Traffic {
                rate,
                burst,
                time: Duration::from_millis(time_ms),
            };
            print(&serde_json::to_string(&udp::sender::run(dest, &traffic)?)?)
        }
        BenchCommand::UdpSink(SinkArgs {
            listen,
            gro,
            limit_ms,
        }) => {
            let received = udp::sink::run(listen, gro, Duration::from_millis(limit_ms))?;
            print(&serde_json::to_string(&received)?)
        }
    }
}

fn run_quick(args: QuickArgs) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    let daemon = match args.daemon {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("daemon {}", path.display()))?,
        None => program.clone(),
    };
    let plan = Plan {
        reps: args.reps,
        seconds: args.seconds,
        wires: args.wires,
        systems: args.systems,
        scenarios: if args.scenarios.is_empty() {
            Scenario::ALL.to_vec()
        } else {
            args.scenarios
        },
        daemon,
        program,
    };
    let interrupt = Interrupt::on_signals().context("cannot listen for signals")?;
    let report = quick::run(&plan, &interrupt, &mut progress)?;
    let text = if args.json {
        serde_json::to_string_pretty(&report)?
    } else {
        table::render(&report)?
    };
    print(&text)
}

fn progress(line: &str) {
    // Nobody may be reading progress; the result goes elsewhere.
    if let Err(error) = writeln!(io::stderr().lock(), "bench: {line}") {
        tracing::trace!(%error, "progress was not shown");
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(io::stdout().lock(), "{text}").context("cannot write to standard output")
}
