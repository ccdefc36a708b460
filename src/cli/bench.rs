//! Owns `loden bench`: its arguments, its progress on standard error and its result on standard output.
//! Never measures; [`crate::bench`] does.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};

mod full;
mod progress;
mod serve;

use crate::bench::plan::{Extent, Plan};
use crate::bench::quick;
use crate::bench::ratio::Rule;
use crate::bench::run;
use crate::bench::scenario::Scenario;
use crate::bench::system::{Programs, System};
use crate::bench::table;
use crate::bench::tcp::{self, Ask};
use crate::bench::udp::{self, Traffic};
use crate::lab::{Interrupt, Store, Wire};
use progress::Progress;

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
    /// Measure a matrix of systems, scenarios and wires, and write a report
    Run(full::RunArgs),
    /// Be the other machine of `loden bench run --remote`
    Serve(serve::ServeArgs),
    /// Compare two reports, and fail if a figure became worse
    Compare(full::CompareArgs),
    /// Send numbered packets (run inside a pod by the benchmark)
    #[command(hide = true)]
    UdpSend(SendArgs),
    /// Receive and count numbered packets (run inside a pod by the benchmark)
    #[command(hide = true)]
    UdpSink(SinkArgs),
    /// Answer TCP requests (run inside a pod by the benchmark)
    #[command(hide = true)]
    TcpServe(AnswerArgs),
    /// Send TCP requests (run inside a pod by the benchmark)
    #[command(hide = true)]
    TcpAsk(AskArgs),
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
    #[arg(long, value_delimiter = ',', default_values = ["plain", "vxlan", "loden", "portable"])]
    systems: Vec<System>,
    /// What is done with them, separated by commas [default: tcp-1,tcp-8,udp-64-burst,udp-64,latency-idle]
    #[arg(long, value_delimiter = ',')]
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
    len: u16,
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

#[derive(Args, Debug)]
struct AnswerArgs {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    limit_ms: u64,
}

#[derive(Args, Debug)]
struct AskArgs {
    #[arg(long)]
    dest: SocketAddr,
    #[arg(long)]
    connect: bool,
    #[arg(long)]
    time_ms: u64,
}

/// Runs `loden bench`.
///
/// # Errors
/// What [`crate::bench`] reports. A missed goal is a result, not an error.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Quick(args) => run_quick(args),
        BenchCommand::Run(args) => full::run(&args, command_line()),
        BenchCommand::Serve(args) => serve::run(args),
        BenchCommand::Compare(args) => full::compare(args),
        BenchCommand::TcpServe(AnswerArgs { listen, limit_ms }) => {
            Ok(tcp::serve(listen, Duration::from_millis(limit_ms))?)
        }
        BenchCommand::TcpAsk(AskArgs {
            dest,
            connect,
            time_ms,
        }) => {
            let ask = if connect {
                Ask::Connections
            } else {
                Ask::Requests
            };
            let answered = tcp::ask(dest, ask, Duration::from_millis(time_ms))?;
            print(&serde_json::to_string(&answered)?)
        }
        BenchCommand::UdpSend(SendArgs {
            dest,
            len,
            rate,
            burst,
            time_ms,
        }) => {
            let traffic = Traffic {
                len,
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
            quick::SCENARIOS.to_vec()
        } else {
            args.scenarios
        },
        extent: Extent::Floors,
        programs: Programs {
            loden: daemon,
            others: BTreeMap::new(),
            store: Store::Local,
        },
        program,
        command: command_line(),
        rule: Rule::ANY,
        remote: None,
    };
    if let Some(system) = plan.systems.iter().find(|system| system.needs_program()) {
        anyhow::bail!("{system} is not part of a quick benchmark: use `loden bench run`");
    }
    let interrupt = Interrupt::on_signals().context("cannot listen for signals")?;
    let report = run::run(&plan, &interrupt, &mut Progress::lines())?;
    let text = if args.json {
        serde_json::to_string_pretty(&report)?
    } else {
        table::render(&report)?
    };
    print(&text)
}

/// The command that does this again, as one would type it; the program by its name alone.
fn command_line() -> String {
    let words = std::env::args_os().skip(1).map(|word| {
        let word = word.to_string_lossy().into_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:@+".contains(c);
        match word.is_empty() || !word.chars().all(plain) {
            true => format!("'{}'", word.replace('\'', r"'\''")),
            false => word,
        }
    });
    std::iter::once("loden".to_owned())
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(io::stdout().lock(), "{text}").context("cannot write to standard output")
}
