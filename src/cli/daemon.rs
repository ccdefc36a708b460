//! Owns the flags of `loden daemon`, named as flannel names them (specification section 1.2), and turns them
//! into [`Options`]. Never starts anything by itself.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread::available_parallelism;

use clap::Args;
use clap::builder::RangedU64ValueParser;

use crate::addr::UnderlayAddr;
use crate::daemon::{self, Options};
use crate::datapath::EngineKind;
use crate::debug::socket;
use crate::iface::{Pattern, Selector, Wanted};

/// Where the original writes `subnet.env`.
pub(super) const SUBNET_FILE: &str = "/run/flannel/subnet.env";

/// Flags of the agent.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct DaemonArgs {
    /// External interface, by name or address; may be repeated, the first that fits is used
    /// [env: FLANNELD_IFACE] [default: that of the default route]
    #[arg(long, value_name = "NAME|IP")]
    iface: Vec<String>,

    /// External interface, by a regular expression on its addresses or name; may be repeated, tried after
    /// --iface [env: FLANNELD_IFACE_REGEX]
    #[arg(long, value_name = "REGEX", value_parser = pattern)]
    iface_regex: Vec<Option<Pattern>>,

    /// IPv4 address that other nodes use; without --iface it also selects the interface
    /// [env: FLANNELD_PUBLIC_IP] [default: the address of the external interface]
    #[arg(long, value_name = "IP", value_parser = public_ip::<Ipv4Addr>)]
    public_ip: Option<PublicIp<Ipv4Addr>>,

    /// IPv6 address that other nodes use, likewise [env: FLANNELD_PUBLIC_IPV6]
    #[arg(long, value_name = "IP", value_parser = public_ip::<Ipv6Addr>)]
    public_ipv6: Option<PublicIp<Ipv6Addr>>,

    /// File to write for the CNI plugin [env: FLANNELD_SUBNET_FILE]
    #[arg(long, value_name = "FILE", default_value = SUBNET_FILE, value_parser = file_path)]
    subnet_file: PathBuf,

    /// Directory with the network configuration (file `config`) and the leases of all nodes
    #[arg(long, value_name = "DIR", default_value = "/var/lib/loden")]
    local_store: PathBuf,

    /// Number of workers [default: the CPUs this process may use, by affinity and cgroup quota]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    workers: Option<usize>,

    /// Pin each worker to one CPU
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", value_parser = go_bool)]
    pin: bool,

    /// Implementation of the packet path
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t = EngineKind::Mmsg)]
    engine: EngineKind,

    /// Socket that `loden status` asks [default: beside the subnet file, subnet.sock for subnet.env]
    #[arg(long, value_name = "PATH", value_parser = socket_path)]
    status_socket: Option<PathBuf>,

    /// Log verbosity: 0 info, 1 debug, 2 and more trace [env: FLANNELD_V]
    #[arg(long = "v", short = 'v', value_name = "N", default_value_t = 0)]
    pub(super) verbosity: u8,
}

/// An address, or nothing for the empty text that templates leave behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PublicIp<A>(Option<A>);

fn public_ip<A: FromStr<Err: fmt::Display> + Copy + Into<IpAddr>>(
    text: &str,
) -> Result<PublicIp<A>, String> {
    if text.is_empty() {
        return Ok(PublicIp(None));
    }
    let addr: A = text.parse().map_err(|e: A::Err| e.to_string())?;
    UnderlayAddr::new(addr.into())
        .ok_or("not an address other nodes can send to: give a unicast address")?;
    Ok(PublicIp(Some(addr)))
}

fn pattern(text: &str) -> Result<Option<Pattern>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    Pattern::new(text).map(Some).map_err(|e| e.to_string())
}

/// The texts Go takes for a boolean, section 1.1.
fn go_bool(text: &str) -> Result<bool, &'static str> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("use true or false"),
    }
}

fn file_path(text: &str) -> Result<PathBuf, &'static str> {
    let path = Path::new(text);
    if path.file_name().is_none() || text.ends_with('/') {
        return Err("name a file, not a directory");
    }
    Ok(path.to_owned())
}

pub(super) fn socket_path(text: &str) -> Result<PathBuf, String> {
    let path = file_path(text)?;
    socket::check_path(&path).map_err(|e| e.to_string())?;
    Ok(path)
}

impl DaemonArgs {
    fn into_options(self) -> anyhow::Result<Options> {
        let named = self.iface.iter().filter(|text| !text.is_empty());
        let selectors = named
            .map(|text| Selector::parse(text))
            .chain(
                self.iface_regex
                    .into_iter()
                    .flatten()
                    .map(Selector::Pattern),
            )
            .collect();
        let status_socket = match self.status_socket {
            Some(path) => path,
            None => socket::beside(&self.subnet_file),
        };
        socket::check_path(&status_socket)?;
        Ok(Options {
            wanted: Wanted {
                selectors,
                public_ip: self.public_ip.and_then(|given| given.0),
                public_ipv6: self.public_ipv6.and_then(|given| given.0),
            },
            subnet_file: self.subnet_file,
            status_socket,
            local_store: self.local_store,
            // Affinity and cgroup quota are both in it; unreadable ones count as one CPU.
            workers: self
                .workers
                .unwrap_or_else(|| available_parallelism().map_or(1, std::num::NonZero::get)),
            pin: self.pin,
            engine: self.engine,
        })
    }
}

pub(super) fn run(args: DaemonArgs) -> anyhow::Result<()> {
    Ok(daemon::run(args.into_options()?)?)
}
