//! The backends that leave the packets to others: a lease and no more, and commands of the operator's. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cluster::{Cluster, V4, VXLAN};
use loden::lab::Member;
use nix::sys::signal::Signal;

/// A script that writes down how it was called. Another process writes it: whatever this one has open for writing, a process
/// that another test is about to start has open, too, and nobody can execute it. By rename, so that nobody runs half of it.
fn script(dir: &Path, name: &str, body: &str) -> PathBuf {
    let path = dir.join(name);
    let write = r#"cat >"$1.new" && chmod 755 "$1.new" && mv "$1.new" "$1""#;
    let mut command = Command::new("sh");
    command.args(["-c", write, "sh"]).arg(&path);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input
        .write_all(format!("#!/bin/sh\n{body}\n").as_bytes())
        .unwrap();
    drop(input);
    assert!(child.wait().unwrap().success());
    path
}

#[test]
fn alloc_leases_a_subnet_and_leaves_the_packets_to_others() {
    let mut cluster = Cluster::new(2, V4, VXLAN);
    cluster.await_ping(1, "198.18.2.2");
    cluster.configure(r#"{"Type":"alloc"}"#);
    for n in [1, 2] {
        cluster.end(n, Signal::SIGTERM);
        cluster.start(n);
        cluster.wait_until("a status", || cluster.status(n)["backend"] == "alloc");
    }
    assert_eq!(
        cluster.lease(1),
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#
    );
    let env = fs::read_to_string(cluster.file(1, "subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_MTU=1500\n"), "{env}");
    // What the backend before had made is in nobody's way, once nobody uses that any more.
    cluster.wait_until("no routes and devices of ours", || {
        cluster.shown(1, "ip", "route show proto 108").is_empty()
            && cluster.shown(1, "ip", "link show flannel.1").is_empty()
    });
    // Somebody else's routes stay, and carry the packets.
    for (n, other) in [(1, 2), (2, 1)] {
        let route = format!("route add 198.18.{other}.0/24 via 192.0.2.{other}");
        cluster.ip(Member::Node(n), &route, n);
    }
    cluster.await_ping(1, "198.18.2.2");
}

#[test]
fn extension_commands_make_the_network_and_follow_the_peers() {
    let mut cluster = Cluster::idle(2, V4, VXLAN);
    let dir = cluster.lab.dir().to_owned();
    let pre = script(
        &dir,
        "pre",
        "cat >/dev/null; echo \"  said by $(hostname -I 2>/dev/null | wc -w)  \"",
    );
    let post = script(
        &dir,
        "post",
        &format!(
            "env | grep -E '^(NETWORK|SUBNET|IPV6SUBNET|PUBLIC_IP)' | sort >>{}/post.$PUBLIC_IP",
            dir.display()
        ),
    );
    // Each node's in a file of its own, named by the node's address.
    let peers_file = format!(
        "{}/peers.$(ip -o -4 address show eth0 | grep -o '192[0-9.]*' | head -n 1)",
        dir.display()
    );
    let add = script(
        &dir,
        "add",
        &format!(
            "echo add $1 $SUBNET $PUBLIC_IP \"$(cat)\" >>{peers_file}; ip route replace $SUBNET via $PUBLIC_IP"
        ),
    );
    let remove = script(
        &dir,
        "remove",
        &format!("echo remove $SUBNET $PUBLIC_IP >>{peers_file}; ip route del $SUBNET"),
    );
    let backend = format!(
        r#"{{"Type":"extension","PreStartupCommand":"{}","PostStartupCommand":["{}"],"SubnetAddCommand":["{}","two words; and more"],"SubnetRemoveCommand":"{}"}}"#,
        pre.display(),
        post.display(),
        add.display(),
        remove.display()
    );
    cluster.configure(&backend);
    for n in [1, 2] {
        cluster.start(n);
    }
    cluster.await_ping(1, "198.18.2.2");
    cluster.await_ping(2, "198.18.1.2");
    let lease = cluster.lease(2);
    assert!(
        lease.contains(r#""BackendType":"extension","BackendData":"said by "#),
        "{lease}"
    );
    let said = fs::read_to_string(dir.join("post.192.0.2.1")).unwrap();
    for line in [
        "NETWORK=198.18.0.0/16",
        "SUBNET=198.18.1.0/24",
        "IPV6SUBNET=::/0",
        "PUBLIC_IPV6=<nil>",
    ] {
        assert!(said.lines().any(|it| it == line), "{line} in {said}");
    }
    let peers_file = dir.join("peers.192.0.2.1");
    let peers = || fs::read_to_string(&peers_file).unwrap_or_default();
    cluster.wait_until("the command for the peer", || {
        peers().contains("add two words; and more 198.18.2.0/24 192.0.2.2 said by")
    });
    // One that comes, changes and goes.
    let lease = |n: u8| {
        format!(
            r#"{{"PublicIP":"192.0.2.{n}","PublicIPv6":null,"BackendType":"extension","BackendData":"x"}}"#
        )
    };
    cluster.put("198.18.9.0-24", &lease(9));
    cluster.wait_until("the peer", || peers().contains("198.18.9.0/24 192.0.2.9 x"));
    cluster.put("198.18.9.0-24", &lease(8));
    cluster.wait_until("the changed peer", || {
        let peers = peers();
        peers.contains("remove 198.18.9.0/24 192.0.2.9")
            && peers.contains("198.18.9.0/24 192.0.2.8 x")
    });
    cluster.delete("198.18.9.0-24");
    cluster.wait_until("no peer", || {
        peers().contains("remove 198.18.9.0/24 192.0.2.8")
    });
    // Peers that leave and change while the daemon is down; whoever stays is not removed. A line that makes no sense costs
    // nothing.
    cluster.put("198.18.9.0-24", &lease(9));
    cluster.put("198.18.8.0-24", &lease(8));
    cluster.wait_until("two peers", || {
        // The second for the second time.
        peers().contains("198.18.8.0/24 192.0.2.8 x")
            && peers().matches("198.18.9.0/24 192.0.2.9 x").count() == 2
    });
    cluster.end(2, Signal::SIGTERM);
    cluster.end(1, Signal::SIGKILL);
    let remembered = cluster.file(1, "subnet.peers");
    let mut text = fs::read_to_string(&remembered).unwrap();
    assert!(text.contains("198.18.2.0-24 {"), "{text}");
    text.push_str("198.18.5.0-24 nonsense\n");
    fs::write(&remembered, text).unwrap();
    fs::remove_file(&peers_file).unwrap();
    cluster.delete("198.18.9.0-24");
    cluster.put("198.18.8.0-24", &lease(7));
    cluster.start(1);
    cluster.wait_until("the peers of now", || {
        let peers = peers();
        let has = |line: &str| peers.lines().any(|it| it == line);
        has("remove 198.18.9.0/24 192.0.2.9")
            && has("remove 198.18.8.0/24 192.0.2.8")
            && peers.contains("198.18.8.0/24 192.0.2.7 x")
            && peers.contains("198.18.2.0/24 192.0.2.2 said by")
    });
    assert!(!peers().contains("remove 198.18.2.0/24"), "{}", peers());
    assert!(
        cluster.log(1).contains("subnet.peers: line 4: "),
        "{}",
        cluster.log(1)
    );
    // Once, and not by the next run again, from when it has been remembered.
    cluster.wait_until("the file of now", || {
        let text = fs::read_to_string(&remembered).unwrap_or_default();
        text.contains("192.0.2.7") && !text.contains("198.18.9.0-24 {")
    });
    cluster.end(1, Signal::SIGKILL);
    fs::remove_file(&peers_file).unwrap();
    cluster.start(1);
    cluster.wait_until("the peer that changed", || {
        peers().contains("198.18.8.0/24 192.0.2.7 x")
    });
    assert!(!peers().contains("remove"), "{}", peers());
    cluster.delete("198.18.8.0-24");
    cluster.start(2);
    // A command that fails for a peer is told, and costs nobody else anything.
    script(&dir, "remove", "exit 3");
    let body = "case $SUBNET in 198.18.7.*) echo no way; exit 7;; esac";
    script(&dir, "add", body);
    cluster.put("198.18.7.0-24", &lease(7));
    cluster.wait_until("a failure in the status", || {
        let refused = cluster.status(1)["refused"].to_string();
        refused.contains("SubnetAddCommand failed (exit status: 7): no way")
    });
    cluster.await_ping(1, "198.18.2.2");
    // What was set up stays when the daemon stops.
    cluster.end(1, Signal::SIGTERM);
    assert!(cluster.shown(1, "ip", "route show 198.18.2.0/24").len() == 1);
    // A first command that fails is fatal, before anything is leased.
    let broken = r#"{"Type":"extension","PreStartupCommand":"/bin/false"}"#;
    cluster.configure(broken);
    cluster.start(1);
    cluster.wait_until("the end", || {
        cluster.log(1).contains("Backend.PreStartupCommand failed")
    });
}
