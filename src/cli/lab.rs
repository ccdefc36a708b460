//! Owns `loden lab`: its arguments and what it prints. Never builds anything itself;
//! [`crate::lab`] does.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::Context as _;
use clap::{Args, Subcommand};

use crate::lab::spec::cli_name;
use crate::lab::teardown;
use crate::lab::{
    Backend, Engine, Error, Interrupt, Lab, LabName, Layout, Member, NetNs, Spec, Store, Wire,
};

/// Arguments of `loden lab`.
#[derive(Args, Debug)]
pub struct LabArgs {
    #[command(subcommand)]
    command: LabCommand,
}

/// What to do with a lab.
#[derive(Subcommand, Debug)]
enum LabCommand {
    /// Build nodes and pods as network namespaces, and leave them up
    Up(UpArgs),
    /// Run a command inside a node (n1), a pod (n1p1) or the underlay's bridge (u)
    Exec(ExecArgs),
    /// Show the labs that are up
    Status(StatusArgs),
    /// Remove a lab and everything that carries its name
    Down(DownArgs),
}

#[derive(Args, Debug)]
struct NameArg {
    /// The name that keeps labs apart
    #[arg(long, default_value = "lab")]
    name: LabName,
}

#[derive(Args, Debug)]
struct UpArgs {
    #[command(flatten)]
    name: NameArg,
    /// How many nodes
    #[arg(long, default_value_t = 2)]
    nodes: u8,
    /// How many pods on each node
    #[arg(long, default_value_t = 1)]
    pods: u8,
    /// How the wire between the nodes behaves
    #[arg(long, value_enum, default_value_t = Wire::Superpacket)]
    wire: Wire,
    /// What carries packets between pods of different nodes
    #[arg(long, value_enum, default_value_t = Backend::Udp)]
    backend: Backend,
    /// Where the daemons keep their leases
    #[arg(long, value_enum, default_value_t = Store::Local)]
    store: Store,
    /// The daemons' data-plane engine [default: the daemon's own choice]
    #[arg(long, value_enum)]
    engine: Option<Engine>,
    /// The daemons' worker threads [default: the daemon's own choice]
    #[arg(long)]
    workers: Option<u8>,
    /// The program to start as the daemon [default: this program]
    #[arg(long)]
    daemon: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct ExecArgs {
    #[command(flatten)]
    name: NameArg,
    /// Where: n1, n1p1 or u
    member: Member,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Args, Debug)]
struct StatusArgs {
    /// Print nothing, and fail if anything of any lab is there
    #[arg(long)]
    expect_none: bool,
}

#[derive(Args, Debug)]
struct DownArgs {
    #[command(flatten)]
    name: NameArg,
    /// Remove every lab that no running program holds
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

/// Runs `loden lab`.
///
/// # Errors
/// What [`crate::lab`] reports; for `exec`, that the command could not be started.
pub fn run(args: LabArgs) -> anyhow::Result<()> {
    match args.command {
        LabCommand::Up(args) => up(args),
        LabCommand::Exec(args) => exec(&args),
        LabCommand::Status(args) => status(&args),
        LabCommand::Down(args) => down(&args),
    }
}

fn up(args: UpArgs) -> anyhow::Result<()> {
    let daemon = match args.daemon {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("daemon {}", path.display()))?,
        None => std::env::current_exe().context("cannot tell which program this is")?,
    };
    let spec = Spec {
        pods: args.pods,
        wire: args.wire,
        backend: args.backend,
        store: args.store,
        engine: args.engine,
        workers: args.workers,
        traffic_rules: args.store == Store::Etcd,
        daemon: Some(daemon),
        ..Spec::new(args.name.name, args.nodes)
    };
    let interrupt = Interrupt::on_signals().context("cannot listen for signals")?;
    let started = Instant::now();
    let layout = Lab::build(spec, &interrupt).map_err(name_root)?.detach()?;
    let mut text = describe(&layout)?;
    let name = &layout.spec.name;
    writeln!(
        text,
        "up in {:.2} s; remove it with `loden lab down --name {name}`",
        started.elapsed().as_secs_f64()
    )?;
    print(&text)
}

/// Says who may do what the kernel forbids.
fn name_root(error: Error) -> anyhow::Error {
    if let Error::Io { source, .. } = &error
        && source.kind() == io::ErrorKind::PermissionDenied
    {
        return anyhow::anyhow!("{error}: labs are network namespaces: run this as root");
    }
    error.into()
}

fn exec(args: &ExecArgs) -> anyhow::Result<()> {
    let layout = Layout::load(&args.name.name)?;
    if !layout.spec.members().any(|member| member == args.member) {
        let thing = format!("{} in lab {}", args.member, args.name.name);
        return Err(Error::NotFound { thing }.into());
    }
    NetNs::named(args.name.name.namespace(args.member)).enter_for_good()?;
    let (program, rest) = args.command.split_first().context("no command given")?;
    let error = Command::new(program).args(rest).exec();
    Err(error).with_context(|| format!("cannot run {program}"))
}

fn status(args: &StatusArgs) -> anyhow::Result<()> {
    let names = teardown::names()?;
    if args.expect_none {
        let left: Vec<&str> = names.iter().map(LabName::as_str).collect();
        anyhow::ensure!(left.is_empty(), "labs are still there: {}", left.join(", "));
        return Ok(());
    }
    if names.is_empty() {
        return print("no lab is up\n");
    }
    let mut text = String::new();
    for name in names {
        match Layout::load(&name) {
            Ok(layout) => text.push_str(&describe(&layout)?),
            Err(error) => writeln!(
                text,
                "lab {name}: being built, or left unfinished ({error})"
            )?,
        }
        for process in teardown::processes_of(&name)? {
            writeln!(
                text,
                "  process {:<8} {}",
                process.pid,
                process.exe.display()
            )?;
        }
    }
    print(&text)
}

fn down(args: &DownArgs) -> anyhow::Result<()> {
    // A teardown is short, and half of one helps nobody: signals wait until it is done.
    let _signals = Interrupt::on_signals().context("cannot listen for signals")?;
    if !args.all {
        let removed = teardown::down(&args.name.name)?;
        return print(&format!(
            "lab {} removed: {} namespaces, {} processes\n",
            args.name.name,
            removed.namespaces.len(),
            removed.processes.len()
        ));
    }
    for name in teardown::names()? {
        match teardown::down(&name) {
            Ok(_) => print(&format!("lab {name} removed\n"))?,
            Err(Error::InUse { .. }) => {
                print(&format!("lab {name} belongs to a running program: left\n"))?
            }
            // It went by itself between being listed and being removed.
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn describe(layout: &Layout) -> anyhow::Result<String> {
    let spec = &layout.spec;
    let mut text = String::new();
    writeln!(
        text,
        "lab {}: {} nodes, {} wire, backend {}",
        spec.name,
        spec.nodes,
        cli_name(&spec.wire),
        cli_name(&spec.backend)
    )?;
    for pod in &layout.pods {
        writeln!(text, "  {:<8} {}", pod.member.to_string(), pod.addr)?;
    }
    for gap in &layout.wire_gaps {
        writeln!(text, "  the wire is not as asked for: {gap}")?;
    }
    Ok(text)
}

fn print(text: &str) -> anyhow::Result<()> {
    io::stdout()
        .lock()
        .write_all(text.as_bytes())
        .context("cannot write to standard output")
}
