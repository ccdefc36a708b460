//! The original daemon beside ours, over its own formats: a cluster of unmodified nodes of which one after the other
//! changes to this program, with the command line it had. `scripts/test others` builds the original and runs this;
//! nothing else does, because building needs Go. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;
#[path = "common/others.rs"]
mod others;

use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{LODEN, lab, pings, spec};
use loden::lab::spec::{Dialect, Store};
use loden::lab::{Backend, Interrupt, Lab, Member, Spec, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use others::program;

/// Only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);

const PAIRS: [(u8, u8); 6] = [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)];

/// A daemon of ours; ends with the test.
struct Ours(Child);

impl Drop for Ours {
    fn drop(&mut self) {
        // Already reaped, if the test went well.
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn until(lab: &Lab, what: &str, mut condition: impl FnMut() -> bool) {
    let waited = wait::until(what, LIMIT, &Interrupt::default(), || {
        Ok(condition().then_some(()))
    });
    let log =
        |n: u8| fs::read_to_string(lab.dir().join(format!("ours{n}.log"))).unwrap_or_default();
    let logs = [1, 2, 3].map(log).join("\n---\n");
    assert!(waited.is_ok(), "no {what}: {logs}");
}

fn connected(lab: &Lab) {
    for (from, to) in PAIRS {
        until(lab, &format!("answer from node {to} to {from}"), || {
            pings(lab, Member::Pod(from, 1), (to, 1))
        });
    }
}

/// Ends the original on a node and starts this program in its place, under its name and with its arguments.
fn replace(lab: &Lab, n: u8, flags: &[&str]) -> Ours {
    let pid = lab.daemon_pids()[usize::from(n) - 1];
    let words = words(lab, n);
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    until(lab, "end of the original", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
    let named = lab.dir().join("flanneld");
    if !named.exists() {
        symlink(LODEN, &named).unwrap();
    }
    let log = fs::File::create(lab.dir().join(format!("ours{n}.log"))).unwrap();
    let mut command = Command::new(named);
    command
        .args(&words[1..])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    let ours = Ours(lab.netns(Member::Node(n)).spawn(&mut command).unwrap());
    until(lab, "readiness of ours", || {
        let log = fs::read_to_string(lab.dir().join(format!("ours{n}.log"))).unwrap();
        log.contains("ready")
    });
    ours
}

/// A cluster of originals that changes node by node; `flags` are ours for the node that changes last.
fn changes_node_by_node(backend: Backend, flags: &[&str]) {
    let spec = Spec {
        daemon: Some(program("flannel")),
        dialect: Dialect::Flanneld,
        store: Store::Etcd,
        ..spec(3, backend)
    };
    let mut lab = lab(spec);
    lab.await_connected().unwrap();
    let nodes = [1, 2, 3];
    let addrs = nodes.map(|n| lab.pod_addr(n, 1).unwrap());
    let _second = replace(&lab, 2, &[]);
    connected(&lab);
    let _third = replace(&lab, 3, flags);
    connected(&lab);
    // More than pings: 20 megabytes between the original and each of ours, in both directions.
    for (from, to) in [(1, 2), (2, 1), (1, 3), (3, 1)] {
        let to_addr = addrs[usize::from(to) - 1].to_string();
        let mut command = Command::new("iperf3");
        command.args(["-s", "-1"]).stdout(Stdio::null());
        let _server = Ours(lab.netns(Member::Pod(to, 1)).spawn(&mut command).unwrap());
        until(&lab, "a TCP transfer", || {
            let args = ["-c", &to_addr, "-n", "20M"];
            lab.run(Member::Pod(from, 1), "iperf3", &args).is_ok()
        });
    }
}

/// The words of the command line that a node's daemon was started with.
fn words(lab: &Lab, n: u8) -> Vec<String> {
    let pid = lab.daemon_pids()[usize::from(n) - 1];
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let text = String::from_utf8(line).unwrap();
    text.trim_end_matches('\0')
        .split('\0')
        .map(str::to_owned)
        .collect()
}

#[test]
#[ignore = "needs the original daemon: scripts/test others"]
fn original_among_nodes_that_prove_better_ways_is_reached_as_always() {
    let spec = Spec {
        daemon: Some(program("flannel")),
        dialect: Dialect::Flanneld,
        store: Store::Etcd,
        ..spec(3, Backend::Vxlan)
    };
    let mut lab = lab(spec);
    lab.await_connected().unwrap();
    let all = words(&lab, 1);
    let at = all
        .iter()
        .position(|word| word == "--etcd-endpoints")
        .unwrap();
    let config = format!(
        r#"{{"Network":"{}","EnableNFTables":true,"Backend":{{"Type":"vxlan","Auto":true}}}}"#,
        loden::lab::plan::NETWORK
    );
    let etcdctl = ["ETCDCTL_API=3", "etcdctl", "--endpoints", &all[at + 1]];
    let put = ["put", "/coreos.com/network/config", &config];
    lab.run(Member::Node(1), "env", &[&etcdctl[..], &put].concat())
        .unwrap();
    let _second = replace(&lab, 2, &[]);
    let _third = replace(&lab, 3, &[]);
    connected(&lab);
    let nth = |n: u8| {
        let [a, b, c, _] = lab.pod_addr(n, 1).unwrap().octets();
        format!("{a}.{b}.{c}.0/24")
    };
    let shown = |n: u8, of: u8| {
        let args = ["-4", "route", "show", &nth(of)];
        lab.run(Member::Node(n), "ip", &args).unwrap()
    };
    until(&lab, "a way past the tunnel between ours", || {
        shown(2, 3).contains("dev eth0") && shown(3, 2).contains("dev eth0")
    });
    // The original reads what our leases say beside its own keys, and is told nothing else.
    for (from, to) in [(1, 2), (1, 3), (2, 1), (3, 1)] {
        assert!(
            shown(from, to).contains("dev flannel.1"),
            "{}",
            shown(from, to)
        );
    }
    connected(&lab);
}

#[test]
#[ignore = "needs the original daemon: scripts/test others"]
fn vxlan_cluster_of_originals_changes_node_by_node_and_stays_connected() {
    changes_node_by_node(Backend::Vxlan, &[]);
}

#[test]
#[ignore = "needs the original daemon: scripts/test others"]
fn node_without_vxlan_in_its_kernel_joins_a_cluster_of_originals() {
    changes_node_by_node(Backend::Vxlan, &["--vxlan=user"]);
}

#[test]
#[ignore = "needs the original daemon: scripts/test others"]
fn host_gw_cluster_of_originals_changes_node_by_node_and_stays_connected() {
    changes_node_by_node(Backend::HostGw, &[]);
}

#[test]
#[ignore = "needs the original daemon: scripts/test others"]
fn udp_cluster_of_originals_changes_node_by_node_and_stays_connected() {
    changes_node_by_node(Backend::Udp, &[]);
}
