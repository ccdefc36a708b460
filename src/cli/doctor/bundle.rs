//! Owns the support bundle: a tar archive of what somebody needs who is not there. Nothing enters it but by
//! [`redact`], and nothing of the node is changed.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde_json::Value;
use tar::{Builder, Header};

use super::redact::redact;
use crate::cli::daemon::search_path;
use crate::debug::socket::{self, Request};

/// Bytes that are kept of each file.
const MAX_FILE: u64 = 4 << 20;

/// The directory in the archive.
const TOP: &str = "loden-support";

/// Files of the node, as they are.
const FILES: &[&str] = &[
    "/proc/version",
    "/proc/cmdline",
    "/proc/net/dev",
    "/proc/net/route",
    "/proc/net/arp",
    "/proc/net/snmp",
    "/proc/net/snmp6",
    "/proc/net/netstat",
    "/proc/net/udp",
    "/proc/net/udp6",
    "/proc/net/softnet_stat",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/ipv6/conf/all/forwarding",
    "/proc/sys/net/ipv4/conf/all/rp_filter",
    "/proc/sys/net/bridge/bridge-nf-call-iptables",
    "/proc/sys/net/core/rmem_max",
    "/proc/sys/net/core/wmem_max",
    "/etc/os-release",
];

/// What the node's tools say.
const COMMANDS: &[&[&str]] = &[
    &["ip", "-d", "-s", "link"],
    &["ip", "addr"],
    &["ip", "rule"],
    &["ip", "-6", "rule"],
    &["ip", "route", "show", "table", "all"],
    &["ip", "-6", "route", "show", "table", "all"],
    &["ip", "neigh"],
    &["bridge", "fdb"],
    &["nft", "list", "ruleset"],
    &["iptables-save"],
    &["ip6tables-save"],
    &["ss", "-uanp"],
];

/// Writes the archive to a new file that only its owner reads; `doctor` is what the daemon said, or why it did not.
pub(super) fn write(
    path: &Path,
    socket: &Path,
    subnet_file: &Path,
    doctor: &Result<Value, String>,
) -> anyhow::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = file.with_context(|| {
        format!(
            "{}: cannot be made: name a file that is not there yet",
            path.display()
        )
    })?;
    let status = socket::ask(socket, &Request::Status).map_err(|error| error.to_string());
    let written = fill(file, &status, doctor, subnet_file);
    written.with_context(|| format!("{}: cannot be written", path.display()))
}

fn fill(
    file: File,
    status: &Result<Value, String>,
    doctor: &Result<Value, String>,
    subnet_file: &Path,
) -> io::Result<()> {
    let mut archive = Archive {
        tar: Builder::new(file),
        now: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
    };
    let document = |said: &Result<Value, String>| match said {
        Ok(value) => serde_json::to_vec_pretty(value).unwrap_or_default(),
        Err(why) => why.clone().into_bytes(),
    };
    archive.add(
        "version.txt",
        concat!("loden ", env!("CARGO_PKG_VERSION"), "\n").as_bytes(),
    )?;
    archive.add("status.json", &document(status))?;
    archive.add("doctor.json", &document(doctor))?;
    archive.add("subnet.env", &contents(subnet_file))?;
    let pid = status
        .as_ref()
        .ok()
        .and_then(|status| status["pid"].as_u64());
    if let Some(pid) = pid {
        let process = PathBuf::from(format!("/proc/{pid}"));
        for name in ["cmdline", "status", "limits"] {
            archive.add(&format!("daemon/{name}"), &contents(&process.join(name)))?;
        }
    }
    for path in FILES {
        let contents = contents(Path::new(path));
        archive.add(&format!("files{path}"), &contents)?;
    }
    let programs = search_path();
    for command in COMMANDS {
        let name = command.join("_").replace('/', "_");
        archive.add(&format!("commands/{name}.txt"), &output(&programs, command))?;
    }
    archive.tar.into_inner()?.sync_all()
}

/// An archive, with the time that its files bear.
struct Archive {
    tar: Builder<File>,
    now: u64,
}

impl Archive {
    fn add(&mut self, name: &str, contents: &[u8]) -> io::Result<()> {
        let contents = redact(contents);
        let mut header = Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.now);
        self.tar
            .append_data(&mut header, format!("{TOP}/{name}"), contents.as_ref())
    }
}

/// A file, or why it cannot be read.
fn contents(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
    match read {
        Ok(_) => bytes,
        Err(error) => format!("{}: {error}\n", path.display()).into_bytes(),
    }
}

/// What a program says, or why it says nothing.
fn output(programs: &[PathBuf], command: &[&str]) -> Vec<u8> {
    let [program, args @ ..] = command else {
        return Vec::new();
    };
    let found = programs.iter().map(|dir| dir.join(program));
    let Some(path) = found
        .into_iter()
        .find(|path| fs::metadata(path).is_ok_and(|meta| meta.is_file()))
    else {
        return format!("{program} is not installed\n").into_bytes();
    };
    let output = Command::new(path)
        .args(args.iter().map(OsStr::new))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) => {
            let mut text = output.stdout;
            text.truncate(usize::try_from(MAX_FILE).unwrap_or(usize::MAX));
            text.extend(output.stderr);
            text
        }
        Err(error) => format!("{program}: {error}\n").into_bytes(),
    }
}
