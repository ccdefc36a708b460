//! Owns `loden bench serve`, and the directory that programs of a run between machines write to.

use std::fs::{self, DirBuilder};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use ipnet::IpNet;

use crate::bench::remote::server::{self, Settings};
use crate::bench::remote::{PORT, Token};
use crate::lab::Interrupt;

#[derive(Args, Debug)]
pub(super) struct ServeArgs {
    /// Where to wait for a client; the traffic then comes to ports 5201, 5301, 5302 and 5401
    #[arg(long, value_name = "ADDR:PORT", default_value_t = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), PORT))]
    listen: SocketAddr,
    /// A file with a secret of 16 bytes or more that the client must have, too
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// The client must come from one of these prefixes, separated by commas [default: from anywhere]
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    allow: Vec<IpNet>,
}

pub(super) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let scratch = Scratch::create()?;
    let settings = Settings {
        token: Token::read(&args.token_file)?,
        allow: args.allow,
        program: std::env::current_exe().context("cannot tell which program this is")?,
        dir: scratch.path().to_owned(),
    };
    let interrupt = Interrupt::on_signals().context("cannot listen for signals")?;
    let listener = TcpListener::bind(args.listen)
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let here = listener.local_addr().unwrap_or(args.listen);
    say(&format!("waiting for a client on {here}"));
    server::run(&listener, &settings, &interrupt, &mut say)?;
    Ok(())
}

fn say(line: &str) {
    // Nobody may be reading it.
    if let Err(error) = writeln!(io::stderr().lock(), "bench: {line}") {
        tracing::trace!(%error, "a line was not shown");
    }
}

/// A directory that is there as long as this is, and that nobody else can write to.
#[derive(Debug)]
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn create() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("loden-bench-{}", std::process::id()));
        // One that exists is somebody else's.
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, dir = %self.0.display(), "a directory was not removed");
        }
    }
}
