//! `loden doctor --preflight` on a node: names what stands in the way, and changes nothing. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/node.rs"]
mod node;
#[path = "common/ns.rs"]
mod ns;

use std::net::UdpSocket;
use std::process::Command;

use loden::lab::{Interrupt, wait};
use node::{CONFIG, LIMIT, Node};
use serde_json::Value;

/// What is found, as (what, grade, text), and whether all is well by the exit status.
fn preflight(node: &Node, args: &[&str]) -> (Vec<(String, String, String)>, bool) {
    let output = node.preflight(&["--json"], args);
    let checks: Vec<Value> =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| unreachable!("{output:?}"));
    let text = |check: &Value, key: &str| check[key].as_str().unwrap().to_owned();
    let checks: Vec<(String, String, String)> = checks
        .iter()
        .map(|check| {
            (
                text(check, "what"),
                text(check, "grade"),
                text(check, "found"),
            )
        })
        .collect();
    let fails = checks.iter().any(|(_, grade, _)| grade == "failure");
    assert_eq!(output.status.success(), !fails, "{checks:?}");
    (checks, output.status.success())
}

/// Asserts that one check of this kind has this grade and these words.
fn finds(node: &Node, what: &str, grade: &str, words: &[&str]) {
    let (checks, _) = preflight(node, &[]);
    let found = checks.iter().any(|check| {
        check.0 == what && check.1 == grade && words.iter().all(|word| check.2.contains(word))
    });
    assert!(found, "{what} {grade} {words:?}: {checks:#?}");
}

/// Everything that a look might have changed.
fn state(node: &Node) -> String {
    let ip = |args: &str| String::from_utf8(node.ns.ip(args).stdout).unwrap();
    let mut nft = Command::new("ip");
    nft.args(["netns", "exec", node.ns.name(), "nft", "list", "ruleset"]);
    let nft = String::from_utf8(nft.output().unwrap().stdout).unwrap();
    format!(
        "{}{}{}{nft}",
        ip("link"),
        ip("addr"),
        ip("route show table all")
    )
}

/// Waits until the kernel changes nothing more by itself: each link has a link-local address, and nobody else has any.
fn settled(node: &Node) {
    let mut last = String::new();
    wait::until("settled addresses", LIMIT, &Interrupt::default(), || {
        let now = state(node);
        let has = now.matches("inet6 fe80:").count() == 2 && !now.contains("tentative");
        let settled = has && now == last;
        last = now;
        Ok(settled.then_some(()))
    })
    .unwrap();
}

fn run(node: &Node, args: &str) {
    let status = Command::new("ip")
        .args(["netns", "exec", node.ns.name()])
        .args(args.split(' '))
        .status();
    assert!(status.unwrap().success(), "{args}");
}

fn node() -> Node {
    let node = Node::new(CONFIG);
    run(&node, "sysctl -qw net.ipv4.ip_forward=1");
    node
}

#[test]
fn clean_node_is_found_clean_and_left_so() {
    let node = node();
    settled(&node);
    let before = state(&node);
    let (checks, ok) = preflight(&node, &[]);
    assert!(ok, "{checks:#?}");
    let warned: Vec<_> = checks.iter().filter(|check| check.1 != "good").collect();
    assert!(warned.is_empty(), "{warned:#?}");
    assert_eq!(state(&node), before);
    assert!(!node.path("run/subnet.env").exists());
    assert!(!node.path("run/subnet.sock").exists());
}

#[test]
fn each_thing_in_the_way_is_named() {
    let node = node();
    let taken = node.ns.run(|| UdpSocket::bind("192.0.2.1:8285").unwrap());
    let own = format!("pid {}", std::process::id());
    finds(
        &node,
        "ports",
        "failure",
        &["192.0.2.1:8285", "tunnel", &own],
    );
    drop(taken);
    node.ns.ip("route add 198.18.0.0/16 dev far");
    finds(&node, "networks", "failure", &["198.18.0.0/16 on far"]);
    node.ns.ip("route del 198.18.0.0/16 dev far");
    node.ns.ip("addr add 198.19.0.1/15 dev far");
    finds(
        &node,
        "networks",
        "warning",
        &["inside 198.18.0.0/15", "on far"],
    );
    node.ns.ip("addr del 198.19.0.1/15 dev far");
    run(&node, "sysctl -qw net.ipv4.ip_forward=0");
    finds(&node, "settings", "warning", &["net.ipv4.ip_forward is 0"]);
    run(&node, "sysctl -qw net.ipv4.ip_forward=1");
    let rule =
        "table inet host { chain in { type filter hook input priority 0; udp dport 8285 drop; }; }";
    let nft = Command::new("ip")
        .args(["netns", "exec", node.ns.name(), "nft", rule])
        .status();
    assert!(nft.unwrap().success());
    finds(&node, "firewall", "failure", &["8285 drop"]);
    run(&node, "nft flush ruleset");
    node.ns.ip("tuntap add flannel0 mode tun");
    finds(
        &node,
        "devices",
        "warning",
        &["flannel0", "ip link del flannel0"],
    );
    node.ns.ip("link del flannel0");
    node.ns.ip("addr flush dev eth0");
    finds(&node, "interface", "failure", &["eth0"]);
    node.configure("{");
    finds(&node, "configuration", "failure", &["config"]);
}

#[test]
fn daemon_that_runs_is_named_with_its_process() {
    let node = node();
    let daemon = node.start(&["--iface", "eth0"]);
    let pid = format!("pid {}", daemon.child.id());
    finds(&node, "other daemons", "failure", &[&pid, "stop it first"]);
    finds(&node, "ports", "failure", &["192.0.2.1:8285", &pid]);
    assert_eq!(daemon.stop(), 0);
    let (checks, ok) = preflight(&node, &[]);
    assert!(ok, "{checks:#?}");
}
