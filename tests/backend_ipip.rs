//! The `ipip` backend on the kernel that runs the tests: pods reach each other by it, or its module is named as missing and
//! nothing is changed. `scripts/e2e-kernel ipip` has the rest, on a kernel that has it. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/cluster.rs"]
mod cluster;
mod common;
#[path = "common/node.rs"]
mod node;
#[path = "common/ns.rs"]
mod ns;

use std::process::Command;

use cluster::{Cluster, V4};
use node::Node;

const CONFIG: &str = r#"{"Network":"198.18.0.0/16","Backend":{"Type":"ipip"}}"#;

#[test]
fn ipip_carries_pods_packets_or_its_module_is_named_and_nothing_is_changed() {
    let node = Node::new(CONFIG);
    let made = node.ns.try_ip("link add probe type ipip local 192.0.2.1");
    if made.status.success() {
        node.ns.ip("link del probe");
        carries();
    } else {
        is_named(&node);
    }
}

fn carries() {
    let cluster = Cluster::new(2, V4, r#"{"Type":"ipip"}"#);
    cluster.await_ping(1, "198.18.2.2");
    cluster.await_ping(2, "198.18.1.2");
    assert_eq!(cluster.status(1)["peers"][0]["transport"], "ipip");
    let routes = cluster.shown(1, "ip", "route show proto 108");
    assert_eq!(
        routes,
        ["198.18.2.0/24 via 192.0.2.2 dev flannel.ipip onlink"]
    );
}

fn is_named(node: &Node) {
    let links = || String::from_utf8(node.ns.ip("-o link").stdout).unwrap();
    let before = links();
    let (code, error) = node.fails(&["--iface", "eth0"]);
    assert_eq!(code, 1, "{error}");
    assert!(
        error.contains("this kernel makes no IPIP devices") && error.contains("modprobe ipip"),
        "{error}"
    );
    assert_eq!((node.env(), links()), (String::new(), before));
    assert!(!node.path("store/subnets").exists());
    node.assert_clean();
    // And before a daemon is started.
    let output = node.preflight(&[], &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        !output.status.success() && text.contains("modprobe ipip"),
        "{text}"
    );
}

#[test]
fn firewall_that_does_not_admit_ip_in_ip_is_named_before_a_daemon_is_started() {
    let node = Node::new(CONFIG);
    let nft = |rules: &str| {
        let status = Command::new("ip")
            .args(["netns", "exec", node.ns.name(), "nft", rules])
            .status();
        assert!(status.unwrap().success(), "{rules}");
    };
    let firewall = || {
        let output = node.preflight(&[], &[]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find(|line| line.contains("protocol 4"));
        line.unwrap_or_else(|| unreachable!("{text}")).to_owned()
    };
    assert!(
        firewall().contains("it admits IP protocol 4"),
        "{}",
        firewall()
    );
    nft(
        "table inet host { chain in { type filter hook input priority 0; policy drop; udp dport 8472 accept; }; }",
    );
    assert!(firewall().contains("does not admit"), "{}", firewall());
    nft("add rule inet host in ip protocol 4 accept");
    assert!(
        firewall().contains("it admits IP protocol 4"),
        "{}",
        firewall()
    );
}
