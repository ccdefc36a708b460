//! Owns `subnet.env`: the bytes the CNI plugin and others read, written atomically, and what is left of the run
//! before. Never decides what a previous subnet is used for. Specification section 4.

mod dotenv;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

use crate::addr::{Mtu, OverlayPrefix};
use crate::lease::Subnets;
use dotenv::{NotAnAssignment, assignment};

/// The largest file read. A complete one takes about 200 bytes.
pub const MAX_ENV_LEN: usize = 64 * 1024;

const NETWORK: &str = "FLANNEL_NETWORK";
const SUBNET: &str = "FLANNEL_SUBNET";
const IPV6_NETWORK: &str = "FLANNEL_IPV6_NETWORK";
const IPV6_SUBNET: &str = "FLANNEL_IPV6_SUBNET";

/// What `subnet.env` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The IPv4 network, if the family is enabled.
    pub network: Option<Ipv4Net>,
    /// The IPv6 network, if the family is enabled.
    pub ipv6_network: Option<Ipv6Net>,
    /// What this node leases.
    pub subnets: Subnets,
    /// What pods may send.
    pub mtu: Mtu,
    /// Whether the daemon masquerades, so that the CNI plugin must not.
    pub ip_masq: bool,
}

/// Why `subnet.env` could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot {action}: {source}", path.display())]
pub struct EnvFileError {
    /// The file or directory.
    pub path: PathBuf,
    /// What was tried.
    pub action: &'static str,
    /// What the system says.
    pub source: io::Error,
}

impl SubnetEnv {
    /// The content of the file.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        family(
            &mut out,
            (NETWORK, self.network),
            (SUBNET, self.subnets.v4()),
        );
        family(
            &mut out,
            (IPV6_NETWORK, self.ipv6_network),
            (IPV6_SUBNET, self.subnets.v6()),
        );
        // Writing to a string cannot fail.
        let _infallible = writeln!(
            out,
            "FLANNEL_MTU={}\nFLANNEL_IPMASQ={}",
            self.mtu, self.ip_masq
        );
        out
    }

    /// Replaces the file at `path` in one step, so that a reader sees the old content or the new, also after a
    /// power failure. Makes the directory, mode 0755. The file gets mode 0644 whatever the umask, or keeps the
    /// permission bits of the regular file it replaces.
    ///
    /// # Errors
    ///
    /// The step that failed. The old file is then still there.
    pub fn write(&self, path: &Path) -> Result<(), EnvFileError> {
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let failed = |path: &Path, action| {
            let path = path.to_owned();
            move |source| EnvFileError {
                path,
                action,
                source,
            }
        };
        let Some(name) = path.file_name() else {
            let source = io::Error::from(io::ErrorKind::IsADirectory);
            return Err(failed(path, "write")(source));
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .map_err(failed(dir, "create the directory"))?;
        let mode = match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_file() => meta.permissions().mode() & 0o7777,
            _ => 0o644,
        };
        // One writer per process and file: the process id keeps writers apart, and what a killed one with the
        // same id left behind is overwritten.
        let temp = dir.join(format!(".{}{}", name.to_string_lossy(), std::process::id()));
        let written = write_temp(&temp, self.render().as_bytes(), mode)
            .map_err(failed(&temp, "write"))
            .and_then(|()| fs::rename(&temp, path).map_err(failed(path, "replace")));
        if written.is_err() {
            // The error that matters is the one above.
            let _leftover = fs::remove_file(&temp);
        }
        written?;
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(failed(dir, "sync"))
    }
}

/// Writes one family's two lines. The subnet is written as its first usable address.
fn family<N: OverlayPrefix>(
    out: &mut String,
    (network_key, network): (&str, Option<N>),
    (subnet_key, subnet): (&str, Option<N>),
) {
    let gateway = |subnet: N| GatewayText(subnet.first_bits() + 1, N::BITS, subnet.len_bits());
    // Writing to a string cannot fail.
    if let Some(network) = network {
        let _infallible = writeln!(out, "{network_key}={network}");
    }
    if let Some(subnet) = subnet {
        let _infallible = writeln!(out, "{subnet_key}={}", gateway(subnet));
    }
}

struct GatewayText(u128, u8, u8);

impl std::fmt::Display for GatewayText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(bits, width, len) = *self;
        match u32::try_from(bits) {
            Ok(v4) if width == 32 => write!(f, "{}/{len}", std::net::Ipv4Addr::from(v4)),
            _ => write!(f, "{}/{len}", std::net::Ipv6Addr::from(bits)),
        }
    }
}

fn write_temp(temp: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    match fs::remove_file(temp) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(temp)?;
    file.write_all(content)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

/// What an earlier `subnet.env` says, as far as it can be read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PreviousEnv {
    /// `FLANNEL_NETWORK`, host bits masked off.
    pub networks: Vec<Ipv4Net>,
    /// `FLANNEL_SUBNET`, host bits masked off.
    pub subnets: Vec<Ipv4Net>,
    /// `FLANNEL_IPV6_NETWORK`, host bits masked off.
    pub ipv6_networks: Vec<Ipv6Net>,
    /// `FLANNEL_IPV6_SUBNET`, host bits masked off.
    pub ipv6_subnets: Vec<Ipv6Net>,
    /// What was skipped, worth a warning each.
    pub skipped: Vec<Skipped>,
}

/// A part of `subnet.env` that is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Skipped {
    /// A line that is no assignment.
    #[error("line {line} is not KEY=VALUE")]
    Line {
        /// Counted from 1.
        line: usize,
    },
    /// An element of a value that is not a prefix.
    #[error("{key}: {element:?} is not a prefix like 10.1.74.0/24")]
    Element {
        /// The key.
        key: &'static str,
        /// The text.
        element: String,
    },
}

impl PreviousEnv {
    /// Reads the file at `path`. A missing file is an empty one.
    ///
    /// # Errors
    ///
    /// Anything but a regular file, one larger than [`MAX_ENV_LEN`], and what the system refuses.
    pub fn read(path: &Path) -> Result<Self, EnvFileError> {
        let failed = |source| EnvFileError {
            path: path.to_owned(),
            action: "read",
            source,
        };
        match read_bounded(path, MAX_ENV_LEN) {
            Ok(text) => Ok(Self::parse(&String::from_utf8_lossy(&text))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(failed(e)),
        }
    }

    /// Reads the content of a file by the rules of dotenv: `#` starts a comment, `export ` may precede a key,
    /// values may be quoted, `$KEY` and `${KEY}` stand for an earlier line's value unless in single quotes.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut env = Self::default();
        let mut values: BTreeMap<&str, String> = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            match assignment(line, &values) {
                Ok(None) => {}
                Ok(Some((key, value))) => {
                    values.insert(key, value);
                }
                Err(NotAnAssignment) => env.skipped.push(Skipped::Line { line: index + 1 }),
            }
        }
        let value = |key| values.get(key).map_or("", String::as_str);
        env.networks = prefixes(NETWORK, value(NETWORK), &mut env.skipped);
        env.subnets = prefixes(SUBNET, value(SUBNET), &mut env.skipped);
        env.ipv6_networks = prefixes(IPV6_NETWORK, value(IPV6_NETWORK), &mut env.skipped);
        env.ipv6_subnets = prefixes(IPV6_SUBNET, value(IPV6_SUBNET), &mut env.skipped);
        env
    }

    /// The subnets to ask for again; `None` unless each family names at most one, and some family one.
    #[must_use]
    pub fn previous(&self) -> Option<Subnets> {
        fn single<N: Copy>(list: &[N]) -> Option<N> {
            if let [one] = list { Some(*one) } else { None }
        }
        if self.subnets.len() > 1 || self.ipv6_subnets.len() > 1 {
            return None;
        }
        Subnets::new(single(&self.subnets), single(&self.ipv6_subnets))
    }
}

/// The content of a regular file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    // Without this a pipe in the place of the file would block the start for ever.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    let mut text = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut text)?;
    if text.len() > limit {
        let message = format!("larger than {limit} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(text)
}

fn prefixes<N: OverlayPrefix + FromStr>(
    key: &'static str,
    value: &str,
    skipped: &mut Vec<Skipped>,
) -> Vec<N> {
    let mut nets = Vec::new();
    for element in value.split(',').filter(|element| !element.is_empty()) {
        match element
            .parse::<N>()
            .ok()
            .and_then(|net| N::from_bits(net.first_bits(), net.len_bits()))
        {
            Some(net) => nets.push(net),
            None => skipped.push(Skipped::Element {
                key,
                element: element.chars().take(64).collect(),
            }),
        }
    }
    nets
}

#[cfg(test)]
mod tests;
