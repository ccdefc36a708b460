//! Owns what is looked at on the machine itself: capabilities, files, processes, other people's configurations. Below
//! a root that tests replace. Never changes anything.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use super::Checks;
use crate::daemon::{Options, StoreOptions};
use crate::debug::socket::{self, Request, SocketError};

/// What the daemon needs the capability for, and its number (capability.h).
const CAPABILITIES: [(&str, u32, &str); 2] = [
    ("CAP_NET_ADMIN", 12, "devices, routes and the tunnel"),
    ("CAP_NET_RAW", 13, "ICMP echoes to peers without loden"),
];

/// Files that are searched for a name, at most so many bytes of each.
const MAX_FILE: u64 = 1 << 20;

pub(super) fn capabilities(checks: &mut Checks, root: &Path) {
    let status = fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| {
        let mask = line.strip_prefix("CapEff:")?.trim();
        u64::from_str_radix(mask, 16).ok()
    });
    let mask = mask.unwrap_or(0);
    for (name, bit, purpose) in CAPABILITIES {
        if mask >> bit & 1 == 1 {
            checks.good("capability", name);
        } else if bit == 12 {
            checks.fail(
                "capability",
                format!("{name} is missing, for {purpose}: run as root, or grant it"),
            );
        } else {
            checks.warn("capability", format!("{name} is missing, for {purpose}"));
        }
    }
}

/// The places that the daemon writes to.
pub(super) fn files(checks: &mut Checks, options: &Options) {
    let mut places: Vec<(&str, &Path)> = vec![
        ("subnet file", &options.subnet_file),
        ("status socket", &options.status_socket),
    ];
    if let StoreOptions::Local(dir) = &options.store {
        places.push(("store", dir));
    }
    for (what, path) in places {
        // The nearest directory that is there is where the others would be made.
        let there = path.ancestors().skip(1).find(|dir| dir.is_dir());
        let Some(there) = there else {
            continue;
        };
        match access(there, AccessFlags::W_OK) {
            Ok(()) => checks.good("files", format!("{what} {}", path.display())),
            Err(error) => checks.fail(
                "files",
                format!(
                    "{what} {}: {} cannot be written: {error}",
                    path.display(),
                    there.display()
                ),
            ),
        }
    }
}

/// Other daemons of this network namespace, ours or the original's.
pub(super) fn others(checks: &mut Checks, options: &Options, root: &Path) {
    let answer = socket::ask(&options.status_socket, &Request::Status);
    if matches!(answer, Ok(_) | Err(SocketError::Refused(_))) {
        checks.fail(
            "other daemons",
            format!(
                "one answers at {}: stop it first",
                options.status_socket.display()
            ),
        );
    }
    let namespace = |process: &Path| fs::read_link(process.join("ns/net")).ok();
    let own = namespace(&root.join("proc/self"));
    let mut found = Vec::new();
    for (pid, process) in processes(root) {
        let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
        let mut arguments = arguments.split(|&byte| byte == 0);
        let program = arguments.next().unwrap_or_default();
        let program = String::from_utf8_lossy(program).into_owned();
        let name = Path::new(&program).file_name().unwrap_or_default();
        let is_one = name == "flanneld"
            || (name == "loden" && arguments.next() == Some(b"daemon".as_slice()));
        if is_one && namespace(&process) == own {
            found.push(format!("{program} (pid {pid})"));
        }
    }
    match found.as_slice() {
        [] => checks.good("other daemons", "none in this network namespace"),
        found => checks.fail(
            "other daemons",
            format!(
                "{} runs in this network namespace: stop it first",
                found.join(", ")
            ),
        ),
    }
}

fn processes(root: &Path) -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir(root.join("proc")).into_iter().flatten();
    entries.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, entry.path()))
    })
}

/// Programs that take devices of others for their own.
pub(super) fn managers(checks: &mut Checks, root: &Path) {
    const NETWORK_MANAGER: &[&str] = &[
        "etc/NetworkManager/conf.d",
        "run/NetworkManager/conf.d",
        "usr/lib/NetworkManager/conf.d",
    ];
    const NETWORKD: &[&str] = &[
        "etc/systemd/network",
        "run/systemd/network",
        "usr/lib/systemd/network",
    ];
    let running: Vec<String> = processes(root)
        .filter_map(|(_, process)| fs::read_to_string(process.join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    for (comm, name, dirs, cure) in [
        (
            "NetworkManager",
            "NetworkManager",
            NETWORK_MANAGER,
            "a file in /etc/NetworkManager/conf.d with: [keyfile] unmanaged-devices=interface-name:flannel*;interface-name:cni*",
        ),
        // The kernel keeps fifteen characters of a name.
        (
            "systemd-network",
            "systemd-networkd",
            NETWORKD,
            "a file in /etc/systemd/network with: [Match] Name=flannel* cni* and [Link] Unmanaged=yes",
        ),
    ] {
        if !running.iter().any(|running| running == comm) {
            continue;
        }
        if dirs.iter().any(|dir| mentions(&root.join(dir), "flannel")) {
            checks.good(
                "managers",
                format!("{name} runs, and is told of flannel's devices"),
            );
        } else {
            checks.warn(
                "managers",
                format!("{name} runs, and may change flannel's devices: tell it to leave them alone, by {cure}"),
            );
        }
    }
}

/// Whether a file in a directory has this word.
fn mentions(dir: &Path, word: &str) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            entry
                .metadata()
                .is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_FILE)
        })
        .any(|entry| fs::read_to_string(entry.path()).is_ok_and(|text| text.contains(word)))
}

/// Configurations of other pod networks.
pub(super) fn cni(checks: &mut Checks, dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<(String, bool)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let is_conf = [".conf", ".conflist", ".json"]
                .iter()
                .any(|end| name.ends_with(end));
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            is_conf.then(|| (name, text.contains("\"flannel\"")))
        })
        .collect();
    names.sort();
    match names.first() {
        None => checks.good("cni", format!("no configuration in {} yet", dir.display())),
        Some((first, true)) => checks.good("cni", format!("{}/{first} is flannel's", dir.display())),
        Some((first, false)) => checks.warn(
            "cni",
            format!(
                "{}/{first} is of another network and comes first in the alphabet, so that pods get it: remove it",
                dir.display()
            ),
        ),
    }
}

/// Whether one of the kernel's modules is loaded, built in, or there to be loaded.
pub(super) fn has_module(root: &Path, module: &str) -> bool {
    if root.join("sys/module").join(module).exists() {
        return true;
    }
    let release = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let dir = root.join("lib/modules").join(release.trim());
    let file = format!("/{module}.ko");
    ["modules.builtin", "modules.dep"]
        .iter()
        .any(|list| fs::read_to_string(dir.join(list)).is_ok_and(|text| text.contains(&file)))
}

/// Who has a UDP port bound, if it is a process that can be seen: by the inode of its socket (proc(5)).
pub(super) fn holder(root: &Path, port: u16) -> Option<String> {
    let tables = ["udp", "udp6"].map(|table| {
        fs::read_to_string(root.join("proc/thread-self/net").join(table)).unwrap_or_default()
    });
    let suffix = format!(":{port:04X}");
    let inode = tables
        .iter()
        .flat_map(|table| table.lines().skip(1))
        .find_map(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            let is_it = columns.get(1).is_some_and(|local| local.ends_with(&suffix));
            is_it.then(|| columns.get(9).map(|inode| format!("socket:[{inode}]")))?
        })?;
    processes(root).find_map(|(pid, process)| {
        let mut files = fs::read_dir(process.join("fd")).ok()?.flatten();
        let has_it = files.any(|file| {
            fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == inode.as_str())
        });
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        has_it.then(|| format!("{} (pid {pid})", name.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::preflight::Grade;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn found(look: impl FnOnce(&mut Checks)) -> Vec<(Grade, String)> {
        let mut checks = Checks::default();
        look(&mut checks);
        checks
            .0
            .into_iter()
            .map(|check| (check.grade, check.found))
            .collect()
    }

    #[test]
    fn managers_of_devices_are_named_unless_they_are_told_to_keep_off() {
        let comm = ("proc/17/comm", "NetworkManager\n");
        let quiet = root(&[("proc/17/comm", "sshd\n")]);
        assert_eq!(found(|checks| managers(checks, quiet.path())), []);
        let meddling = root(&[comm, ("proc/18/comm", "systemd-network\n")]);
        let warnings = found(|checks| managers(checks, meddling.path()));
        assert_eq!(warnings.len(), 2);
        assert!(warnings.iter().all(|(grade, _)| *grade == Grade::Warning));
        assert!(
            warnings[0]
                .1
                .contains("unmanaged-devices=interface-name:flannel*")
        );
        let told = root(&[
            comm,
            (
                "etc/NetworkManager/conf.d/x.conf",
                "[keyfile]\nunmanaged-devices=interface-name:flannel*\n",
            ),
        ]);
        assert_eq!(
            found(|checks| managers(checks, told.path()))[0].0,
            Grade::Good
        );
    }

    #[test]
    fn configuration_of_another_network_that_comes_first_is_named() {
        let ours = (
            "net.d/10-flannel.conflist",
            r#"{"plugins":[{"type":"flannel"}]}"#,
        );
        let other = |name| (name, r#"{"type":"calico"}"#);
        let first = |files: &[(&str, &str)]| {
            let root = root(files);
            found(|checks| cni(checks, &root.path().join("net.d"))).remove(0)
        };
        assert_eq!(first(&[]).0, Grade::Good);
        assert_eq!(first(&[ours, other("net.d/20-calico.conf")]).0, Grade::Good);
        assert_eq!(first(&[ours, other("net.d/00-notes.txt")]).0, Grade::Good);
        let (grade, text) = first(&[ours, other("net.d/05-calico.conf")]);
        assert_eq!(grade, Grade::Warning);
        assert!(text.contains("05-calico.conf"));
    }

    #[test]
    fn missing_capability_is_named_with_what_it_is_for() {
        let all = root(&[("proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n")]);
        let all = found(|checks| capabilities(checks, all.path()));
        assert!(
            all.iter().all(|(grade, _)| *grade == Grade::Good),
            "{all:?}"
        );
        let admin = root(&[("proc/self/status", "CapEff:\t0000000000001000\n")]);
        let admin = found(|checks| capabilities(checks, admin.path()));
        assert_eq!((admin[0].0, admin[1].0), (Grade::Good, Grade::Warning));
        let none = root(&[("proc/self/status", "CapEff:\t0000000000000000\n")]);
        let none = found(|checks| capabilities(checks, none.path()));
        assert_eq!(none[0].0, Grade::Failure);
    }

    #[test]
    fn module_counts_where_it_is_loaded_built_in_or_a_file() {
        let has_vxlan = |root: &Path| has_module(root, "vxlan");
        assert!(!has_vxlan(root(&[]).path()));
        assert!(has_vxlan(root(&[("sys/module/vxlan/refcnt", "0")]).path()));
        let release = ("proc/sys/kernel/osrelease", "6.1.0-x\n");
        for list in ["modules.builtin", "modules.dep"] {
            let path = format!("lib/modules/6.1.0-x/{list}");
            let has = root(&[release, (&path, "kernel/drivers/net/vxlan/vxlan.ko:\n")]);
            assert!(has_vxlan(has.path()), "{list}");
            let lacks = root(&[release, (&path, "kernel/drivers/net/veth.ko:\n")]);
            assert!(!has_vxlan(lacks.path()));
        }
    }
}
