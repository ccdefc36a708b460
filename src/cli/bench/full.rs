//! Owns `loden bench run` and `loden bench compare`: their arguments, and the files that they write and read.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::Context as _;
use clap::Args;

use super::progress::Progress;
use super::serve::Scratch;
use crate::bench::compare::{self, Change};
use crate::bench::page;
use crate::bench::plan::{Extent, Plan, Remote};
use crate::bench::ratio::Rule;
use crate::bench::remote::Token;
use crate::bench::remote::client::Server;
use crate::bench::report::Report;
use crate::bench::run;
use crate::bench::scenario::{Ends, Scenario};
use crate::bench::system::{Programs, System};
use crate::lab::{Interrupt, Store, Wire};

/// What a run measures by default.
const SCENARIOS: &str = "tcp-1,tcp-8,tcp-64,tcp-1-both,tcp-8-both,tcp-64-both,udp-64,udp-512,udp-1400,udp-1472,\
                         udp-64-burst,udp-512-burst,udp-1400-burst,udp-1472-burst,latency-idle,latency-half,\
                         request-idle,request-half,connect-rate,lossless-64,lossless-1400,host-tcp-1,host-udp-64-burst,\
                         host-latency-idle,jumbo-tcp-1,jumbo-tcp-8";
/// What a quick one does.
const QUICK_SCENARIOS: &str = "tcp-1,tcp-8,udp-64-burst,udp-64,latency-idle";
const SYSTEMS: [System; 8] = [
    System::Veth,
    System::Plain,
    System::Vxlan,
    System::LodenHostGw,
    System::LodenVxlan,
    System::LODEN,
    System::LodenUserVxlan,
    System::Portable,
];
/// What a quick run compares.
const QUICK_SYSTEMS: [System; 4] = [
    System::Plain,
    System::Vxlan,
    System::LODEN,
    System::Portable,
];
/// What a user has after `apt install wireguard-go`; the Go module installs it as `wireguard`.
const WIREGUARD_GO: &str = "wireguard-go";
/// A report of every scenario and system is a few hundred kilobytes.
const MAX_REPORT: u64 = 64 << 20;

#[derive(Args, Debug)]
pub(super) struct RunArgs {
    /// The directory for report.html, report.md, report.json and report.svg
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A subset, within five minutes
    #[arg(long)]
    quick: bool,
    /// How often each sample is taken
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    reps: u32,
    /// Length of each TCP run [default: 3, with --quick 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: Option<u32>,
    /// The wires, separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["superpacket", "packet", "packet-no-gro"])]
    wires: Vec<Wire>,
    /// The systems, separated by commas: veth, plain, vxlan, loden-host-gw, loden-vxlan, loden, loden-Nw with N workers,
    /// loden-user-vxlan, portable, wireguard-go, and the names given with --against [default: all of them but loden-Nw;
    /// with --quick plain, vxlan, loden, portable, wireguard-go, and those names]
    #[arg(long, value_delimiter = ',')]
    systems: Vec<System>,
    /// What is done with them, separated by commas, such as tcp-8, tcp-1-both, udp-64, udp-64-burst, lossless-64,
    /// latency-idle, latency-half, request-idle, request-half, connect-rate, and host-... and jumbo-... [default: all
    /// of these]
    #[arg(long, value_delimiter = ',')]
    scenarios: Vec<Scenario>,
    /// Also loden with so many workers, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..))]
    workers: Vec<u8>,
    /// The program to measure as loden [default: this program]
    #[arg(long, value_name = "PATH")]
    daemon: Option<PathBuf>,
    /// Another program that takes flanneld's arguments and has the udp backend; all daemons then keep their leases in
    /// etcd
    #[arg(long, value_name = "NAME=PATH", value_parser = named_path)]
    against: Vec<(System, PathBuf)>,
    /// The program to measure as wireguard-go, such as `go install golang.zx2c4.com/wireguard@latest` makes it
    /// [default: wireguard-go, if it is in PATH]
    #[arg(long, value_name = "PATH")]
    wireguard_go: Option<PathBuf>,
    /// How far the ratios of single repetitions may differ for their median to be printed: largest less smallest,
    /// over the median
    #[arg(long, default_value_t = Rule::default().spread, value_name = "PART", value_parser = part)]
    max_spread: f64,
    /// Measure between this machine and another, where `loden bench serve` runs, instead of in labs
    #[arg(long, value_name = "HOST[:PORT]", requires = "token_file",
          conflicts_with_all = ["wires", "systems", "workers", "daemon", "against", "wireguard_go"])]
    remote: Option<String>,
    /// The file with the secret that the other machine has, too
    #[arg(long, value_name = "FILE", requires = "remote")]
    token_file: Option<PathBuf>,
    /// An address of the other machine, under the name of what leads there: one for each network between the two
    /// [default: direct=HOST]
    #[arg(long, value_name = "NAME=ADDR", value_parser = named_addr, requires = "remote")]
    path: Vec<(System, IpAddr)>,
}

#[derive(Args, Debug)]
pub(super) struct CompareArgs {
    /// The report.json of the earlier run
    old: PathBuf,
    /// The report.json of the later run
    new: PathBuf,
    /// The system that stands for the state of the machine [default: vxlan, plain or veth]
    #[arg(long, value_name = "SYSTEM")]
    reference: Option<System>,
    /// What may differ, as a part of the old median
    #[arg(long, default_value_t = 0.1, value_name = "PART", value_parser = part)]
    tolerance: f64,
    /// Print the comparison as JSON
    #[arg(long)]
    json: bool,
}

fn named_path(text: &str) -> Result<(System, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("give it as NAME=PATH")?;
    let system: System = name.parse()?;
    if matches!(system, System::Other(_)) {
        Ok((system, path.into()))
    } else {
        Err(format!(
            "{system} is a system of its own: choose another name"
        ))
    }
}

fn named_addr(text: &str) -> Result<(System, IpAddr), String> {
    let (name, addr) = text.split_once('=').ok_or("give it as NAME=ADDR")?;
    let addr = addr.parse().map_err(|error| format!("{addr:?}: {error}"))?;
    named_path(&format!("{name}=")).map(|(system, _)| (system, addr))
}

fn part(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..=100.0).contains(&value) => Ok(value),
        _ => Err("must be a number from 0 to 100".to_owned()),
    }
}

pub(super) fn run(args: &RunArgs, command: String) -> anyhow::Result<()> {
    let scratch = args
        .remote
        .as_ref()
        .map(|_| Scratch::create())
        .transpose()?;
    let plan = plan(args, command, scratch.as_ref())?;
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot create {}", args.out.display()))?;
    let interrupt = Interrupt::on_signals().context("cannot listen for signals")?;
    let mut progress = Progress::here();
    let report = run::run(&plan, &interrupt, &mut progress)?;
    drop(progress);
    write(&args.out, &report)?;
    let out = args.out.display();
    if let Some(why) = &report.stopped {
        anyhow::bail!("the run ended early ({why}); {out} holds what was measured before that");
    }
    super::print(&format!(
        "{out}/report.html, report.md, report.json and report.svg are written"
    ))
}

fn plan(args: &RunArgs, command: String, scratch: Option<&Scratch>) -> anyhow::Result<Plan> {
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    let loden = match &args.daemon {
        Some(path) => existing(path)?,
        None => program.clone(),
    };
    let mut others = BTreeMap::new();
    for (system, path) in &args.against {
        if others.insert(system.clone(), existing(path)?).is_some() {
            anyhow::bail!("--against names {system} twice");
        }
    }
    let wireguard = match &args.wireguard_go {
        Some(path) => Some(existing(path)?),
        None => in_path(WIREGUARD_GO),
    };
    others.extend(wireguard.map(|path| (System::WireguardGo, path)));
    let remote = match (&args.remote, &args.token_file, scratch) {
        (Some(host), Some(token), Some(scratch)) => Some(connect(args, host, token, scratch)?),
        _ => None,
    };
    Ok(Plan {
        reps: args.reps,
        seconds: args.seconds.unwrap_or(if args.quick { 1 } else { 3 }),
        wires: match remote {
            None => unique(args.wires.clone()),
            Some(_) => Vec::new(),
        },
        systems: match &remote {
            None => systems(args, &others)?,
            Some(remote) => remote.paths.iter().map(|(name, _)| name.clone()).collect(),
        },
        scenarios: scenarios(args)?,
        extent: if args.quick {
            Extent::Quick
        } else {
            Extent::All
        },
        programs: Programs {
            loden,
            others,
            // flanneld keeps its leases in etcd, and what is compared differs in as little as possible.
            store: if args.against.is_empty() {
                Store::Local
            } else {
                Store::Etcd
            },
        },
        program,
        command,
        rule: Rule {
            spread: args.max_spread,
            ..Rule::default()
        },
        remote,
    })
}

fn scenarios(args: &RunArgs) -> anyhow::Result<Vec<Scenario>> {
    let between_machines = |scenario: &Scenario| {
        scenario.ends == Ends::Pods && !scenario.jumbo && !scenario.load.needs_one_clock()
    };
    if !args.scenarios.is_empty() {
        let wrong = args.scenarios.iter().find(|one| !between_machines(one));
        if let (Some(wrong), Some(_)) = (wrong, &args.remote) {
            anyhow::bail!(
                "{wrong} is not for two machines: their clocks differ, and their addresses and MTUs are what they are"
            );
        }
        return Ok(unique(args.scenarios.clone()));
    }
    let ids = if args.quick {
        QUICK_SCENARIOS
    } else {
        SCENARIOS
    };
    let scenarios: Result<Vec<Scenario>, String> = ids.split(',').map(str::parse).collect();
    let mut scenarios = scenarios.map_err(anyhow::Error::msg)?;
    if args.remote.is_some() {
        scenarios.retain(between_machines);
    }
    Ok(scenarios)
}

fn connect(args: &RunArgs, host: &str, token: &Path, scratch: &Scratch) -> anyhow::Result<Remote> {
    let server = Server::connect(host, &Token::read(token)?)?;
    let mut paths = args.path.clone();
    if paths.is_empty() {
        paths.push((System::Other("direct".to_owned()), server.addr()));
    }
    for (nth, (name, _)) in paths.iter().enumerate() {
        let twice = paths.iter().take(nth).any(|(other, _)| other == name);
        anyhow::ensure!(!twice, "--path names {name} twice");
    }
    Ok(Remote {
        server: Rc::new(server),
        paths,
        dir: scratch.path().to_owned(),
    })
}

fn systems(args: &RunArgs, others: &BTreeMap<System, PathBuf>) -> anyhow::Result<Vec<System>> {
    let mut systems = args.systems.clone();
    if systems.is_empty() {
        systems.extend_from_slice(if args.quick { &QUICK_SYSTEMS } else { &SYSTEMS });
        systems.extend(others.keys().cloned());
    }
    systems.extend(
        args.workers
            .iter()
            .map(|&workers| System::Loden(Some(workers))),
    );
    for system in &systems {
        let known = !system.needs_program() || others.contains_key(system);
        anyhow::ensure!(
            known,
            "there is no program for the system {system}: give it with {}",
            if *system == System::WireguardGo {
                "--wireguard-go PATH".to_owned()
            } else {
                format!("--against {system}=PATH")
            }
        );
    }
    Ok(unique(systems))
}

/// Each once, in the order of their first.
fn unique<T: PartialEq>(all: Vec<T>) -> Vec<T> {
    let mut kept = Vec::new();
    for one in all {
        if !kept.contains(&one) {
            kept.push(one);
        }
    }
    kept
}

/// A link stays one: a program may go by the name that it is called by.
fn existing(path: &Path) -> anyhow::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    anyhow::ensure!(absolute.is_file(), "there is no program {}", path.display());
    Ok(absolute)
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

fn write(dir: &Path, report: &Report) -> anyhow::Result<()> {
    // The data first: the pages can be made again from it.
    let json = serde_json::to_string_pretty(report)?;
    for (name, text) in [
        ("report.json", json),
        ("report.md", page::markdown(report)?),
        ("report.html", page::html(report)?),
        ("report.svg", page::overview(report)?),
    ] {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Report> {
    let shown = path.display();
    let len = fs::metadata(path)
        .with_context(|| format!("cannot read {shown}"))?
        .len();
    anyhow::ensure!(
        len <= MAX_REPORT,
        "{shown} is too long for a report ({len} bytes)"
    );
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{shown} is not a report of `loden bench run`"))
}

pub(super) fn compare(args: CompareArgs) -> anyhow::Result<()> {
    let (old, new) = (read(&args.old)?, read(&args.new)?);
    let comparison =
        compare::compare(&old, &new, args.reference, args.tolerance).map_err(anyhow::Error::msg)?;
    let text = if args.json {
        serde_json::to_string_pretty(&comparison)?
    } else {
        comparison.render()?
    };
    super::print(&text)?;
    let worse = comparison.count(Change::Worse);
    anyhow::ensure!(worse == 0, "{worse} figures became worse");
    Ok(())
}
