//! Whole daemons on a real API server, with the rights of the manifest and no others: what they wait for, what they
//! say about their Nodes. Needs root, and what `scripts/setup --kube` builds: run by `scripts/test kube`.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/dropin.rs"]
mod dropin;
#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/kube.rs"]
mod kube_server;
#[path = "common/kube_proxy.rs"]
mod proxy;

use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;

use dropin::Cluster;
use kube_server::{ApiServer, MANIFEST, PREFIX};
use loden::lab::NetNs;
use proxy::{Fault, Kind, PROXY, Proxy};
use serde_json::json;

/// A daemon as the manifest starts it.
fn daemon(cluster: &Cluster, server: &ApiServer, node: u8, net_config: &Path) -> Command {
    let args = ["-kube-subnet-mgr", "-ip-masq", "-healthz-port=8080"];
    let mut command = match node {
        1 => cluster.command(node, &args),
        // Its Node says which of its addresses it is to use.
        _ => cluster.bare(node, &args),
    };
    command
        .arg("-kubeconfig-file")
        .arg(server.kubeconfig("daemon"))
        .arg("-net-config-path")
        .arg(net_config)
        .env("NODE_NAME", format!("n{node}"));
    command
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn daemons_with_the_rights_of_the_manifest_join_their_nodes() {
    let cluster = Cluster::new(2, "unused");
    let server = ApiServer::start(&cluster.etcd);
    let net_config = server.settings("n1").net_config;
    server.add_node("n1", "198.18.1.0/24", &json!({}));
    server.add_node("n2", "", &json!({}));
    cluster.ip(2, "addr add 198.51.100.77/24 dev eth0");
    server.annotate("n2", "node-public-ip=198.51.100.77");
    let start = |node| cluster.spawn_command(node, daemon(&cluster, &server, node, &net_config));
    let first = start(1);
    first.wait_for_log("written: ready");
    assert_eq!(cluster.env_value(1, "FLANNEL_SUBNET"), "198.18.1.1/24");
    assert_eq!(cluster.env_value(1, "FLANNEL_NETWORK"), "198.18.0.0/16");
    first.wait_until("the condition", || {
        server.condition("n1")["status"] == "False"
    });

    let second = start(2);
    second.wait_for_log("pod cidr not assigned");
    let (code, why) = cluster.http(2, "/readyz");
    assert_eq!(code, 503, "{why}");
    let down =
        "pod cidr not assigned: start kube-controller-manager with --allocate-node-cidrs=true";
    second.wait_until("the event", || told(&server, "n2", "FlannelIsDown", down));
    second.wait_until("the condition", || {
        let condition = server.condition("n2");
        condition["status"] == "True" && condition["message"].to_string().contains(down)
    });
    let assigned = r#"{"spec":{"podCIDR":"198.18.2.0/24","podCIDRs":["198.18.2.0/24"]}}"#;
    server.kubectl(&["patch", "node", "n2", "-p", assigned]);
    second.wait_for_log("written: ready");
    assert_eq!(server.annotation("n2", "public-ip"), "198.51.100.77");
    second.wait_until("the condition", || {
        server.condition("n2")["status"] == "False"
    });
    cluster.reaches(1, 2);
    cluster.reaches(2, 1);

    // A restart keeps subnet and annotations.
    let before = server.node("n1")["metadata"]["annotations"].clone();
    assert_eq!(first.stop(), 0);
    let first = start(1);
    first.wait_for_log("written: ready");
    assert_eq!(server.node("n1")["metadata"]["annotations"], before);
    cluster.reaches(1, 2);
    for daemon in [first, second] {
        assert!(!daemon.log().contains("panicked"));
        assert_eq!(daemon.stop(), 0);
    }
}

/// Whether an Event about a Node has this reason and says this.
fn told(server: &ApiServer, node: &str, reason: &str, text: &str) -> bool {
    let events = server.events(node);
    events
        .iter()
        .any(|(of, message)| of == reason && message.contains(text))
}

/// Takes the tunnel's device away, and then its port, before the daemon has it again.
fn break_tunnel(cluster: &Cluster, node: u8) -> Option<UdpSocket> {
    cluster.try_exec(node, "ip", "link del flannel0");
    let bind = || (0..50).find_map(|_| UdpSocket::bind("198.51.100.1:8285").ok());
    NetNs::named(cluster.name(node)).run(bind).unwrap()
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn a_tunnel_that_breaks_is_told_by_the_condition_until_it_is_back() {
    let cluster = Cluster::new(1, "unused");
    let server = ApiServer::start(&cluster.etcd);
    let proxy = Proxy::start(cluster.etcd.netns(), &server.kubeconfig("daemon"));
    let net_config = server.settings("n1").net_config;
    server.add_node("n1", "198.18.1.0/24", &json!({}));
    let mut command = daemon(&cluster, &server, 1, &net_config);
    command.arg(format!("-kube-api-url={PROXY}"));
    let one = cluster.spawn_command(1, command);
    one.wait_for_log("written: ready");
    one.wait_until("the condition", || {
        server.condition("n1")["status"] == "False"
    });
    // A healthy start is no event.
    assert_eq!(server.events("n1"), []);

    let many = usize::MAX;
    proxy.fail(Kind::Patch, many, Fault::Refused(500, "Internal", None));
    let mut port = None;
    one.wait_until("the port", || {
        port = break_tunnel(&cluster, 1);
        port.is_some()
    });
    one.wait_until("the event", || {
        told(&server, "n1", "FlannelIsDown", "the tunnel is down")
    });
    one.wait_for_log("NetworkUnavailable is not written, trying again");
    // In our words alone, which say what to do.
    assert!(!one.log().contains("failed with status"), "{}", one.log());
    one.wait_until("unreadiness", || cluster.http(1, "/readyz").0 == 503);
    assert_eq!(server.condition("n1")["status"], "False");
    // The retries are what writes it: nothing else happens now.
    let asked = proxy.count(Kind::Patch);
    one.wait_until("another attempt", || proxy.count(Kind::Patch) > asked);
    proxy.heal();
    one.wait_until("unavailable", || server.condition("n1")["status"] == "True");
    let condition = server.condition("n1");
    assert_eq!(condition["reason"], "FlannelIsDown");
    let message = condition["message"].as_str().unwrap();
    assert!(message.contains("the tunnel is down"), "{message}");

    drop(port);
    one.wait_until("available", || server.condition("n1")["status"] == "False");
    one.wait_until("the event", || {
        told(&server, "n1", "FlannelIsUp", "is running")
    });
    assert_eq!(server.condition("n1")["reason"], "FlannelIsUp");
    assert_eq!(one.stop(), 0);
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn what_is_missing_is_told_by_events_and_who_may_write_none_does_without() {
    let cluster = Cluster::new(2, "unused");
    let mut server = ApiServer::start(&cluster.etcd);
    let net_config = server.settings("n1").net_config;
    for node in 1..=2 {
        let subnet = format!("198.18.{node}.0/24");
        server.add_node(&format!("n{node}"), &subnet, &json!({}));
    }
    server.annotate("n2", "node-public-ip=198.51.100.2");
    let start = |server: &ApiServer, node| {
        let command = daemon(&cluster, server, node, &net_config);
        cluster.spawn_command(node, command)
    };
    // The API server is away.
    server.kill();
    let one = start(&server, 1);
    one.wait_for_log("Connection refused");
    server.spawn();
    server.await_ready();
    one.wait_for_log("written: ready");
    one.wait_until("the event", || {
        told(&server, "n1", "FlannelIsDown", "Connection refused")
            && told(&server, "n1", "FlannelIsUp", "is running")
    });

    // The annotations may not be written: neither may the condition, so the Event is all that there is.
    let rule = r#"[{"op":"remove","path":"/rules/1"}]"#;
    let patch = ["patch", "clusterrole", "flannel", "--type=json", "-p", rule];
    server.kubectl(&patch);
    let allowed = [
        "auth",
        "can-i",
        "patch",
        "nodes/status",
        "--as=system:serviceaccount:kube-flannel:flannel",
    ];
    one.wait_until("the refusal", || {
        server.kubectl_or_not(&allowed).starts_with("no")
    });
    assert_eq!(one.stop(), 0);
    let remedy = r#"resources: ["nodes/status"], verbs: ["patch"]"#;
    let two = start(&server, 2);
    two.wait_for_log(remedy);
    two.wait_until("the event", || told(&server, "n2", "FlannelIsDown", remedy));
    server.kubectl(&["apply", "-f", MANIFEST]);
    two.wait_for_log("written: ready");
    two.wait_until("the condition", || {
        server.condition("n2")["status"] == "False"
    });
    assert_eq!(two.stop(), 0);

    // A restart says nothing twice, and without the right to say anything all is well, too.
    let before = server.events("n2");
    let again = json!({format!("{PREFIX}/node-public-ip"): "198.51.100.2"});
    server.kubectl(&["delete", "role", "flannel-events"]);
    server.kubectl(&["delete", "node", "n2"]);
    let two = start(&server, 2);
    two.wait_for_log("an Event about our Node is not written");
    let log = two.log();
    assert!(
        log.contains(r#"resources: ["events"], verbs: ["create"]"#),
        "{log}"
    );
    server.add_node("n2", "198.18.2.0/24", &again);
    two.wait_for_log("written: ready");
    assert_eq!(server.events("n2"), before);
    assert_eq!(two.stop(), 0);
}
