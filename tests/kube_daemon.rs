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
use serde_json::{Value, json};

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

    // What the node says overrules the flag.
    let mut command = daemon(&cluster, &server, 2, &net_config);
    command.arg("-public-ip=198.51.100.2");
    let second = cluster.spawn_command(2, command);
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

/// What `loden explain` says, or why it does not.
fn explain(cluster: &Cluster, node: u8, args: &[&str]) -> Result<Value, String> {
    let output = cluster.loden(node, &[&["explain", "--json"], args].concat());
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

/// A pod as its scheduler and its kubelet would leave it.
fn add_pod(server: &ApiServer, name: &str, spec: Value, status: &Value) {
    let (namespace, name) = name.split_once('/').unwrap();
    let mut spec = spec;
    spec["containers"] = json!([{"name": "c", "image": "none"}]);
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec});
    server.create(&pod);
    let status = json!({ "status": status }).to_string();
    server.kubectl(&[
        "patch",
        "pod",
        "-n",
        namespace,
        name,
        "--subresource=status",
        "-p",
        &status,
    ]);
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn pods_are_explained_by_their_names_and_what_is_missing_for_that_is_named() {
    let cluster = Cluster::new(2, "unused");
    let mut server = ApiServer::start(&cluster.etcd);
    let net_config = server.settings("n1").net_config;
    for node in 1..=2 {
        let subnet = format!("198.18.{node}.0/24");
        server.add_node(&format!("n{node}"), &subnet, &json!({}));
    }
    server.annotate("n2", "node-public-ip=198.51.100.2");
    let start = |node| cluster.spawn_command(node, daemon(&cluster, &server, node, &net_config));
    let daemons = [start(1), start(2)];
    for one in &daemons {
        one.wait_for_log("written: ready");
    }
    cluster.reaches(1, 2);
    let (a, b) = (cluster.add_pod(1), cluster.add_pod(2));
    server.kubectl(&["create", "namespace", "shop"]);
    let runs = |ips: &[&str]| {
        let all: Vec<Value> = ips.iter().map(|ip| json!({ "ip": ip })).collect();
        json!({"phase": "Running", "podIP": ips[0], "podIPs": all})
    };
    let on = |node: &str| json!({ "nodeName": node });
    add_pod(
        &server,
        "default/web-1",
        on("n1"),
        &runs(&[&a.addr, "fd00:1::2"]),
    );
    add_pod(
        &server,
        "shop/db-0",
        on("n2"),
        &runs(&["fd00:2::2", &b.addr]),
    );
    let host = |node: &str| json!({"nodeName": node, "hostNetwork": true});
    add_pod(
        &server,
        "default/agent",
        host("n1"),
        &runs(&["198.51.100.1"]),
    );
    add_pod(
        &server,
        "default/peer",
        host("n2"),
        &runs(&["198.51.100.2"]),
    );
    add_pod(
        &server,
        "default/late",
        on("n2"),
        &json!({"phase": "Pending"}),
    );
    add_pod(&server, "default/six", on("n2"), &runs(&["fd00:2::9"]));
    add_pod(
        &server,
        "default/done",
        on("n2"),
        &json!({"phase": "Succeeded", "podIP": b.addr}),
    );

    // By name or by address, it is the same packet.
    let named = explain(&cluster, 1, &["web-1", "shop/db-0"]).unwrap();
    assert_eq!(named["outcome"], "sent", "{named}");
    let steps = named["steps"].to_string();
    for part in [
        format!("pod default/web-1 of node n1: {} is on this node", a.addr),
        format!(
            "pod shop/db-0 of node n2: {} is in lease 198.18.2.0-24",
            b.addr
        ),
    ] {
        assert!(steps.contains(&part), "{part}: {steps}");
    }
    for (from, to) in [
        ("default/web-1", &*b.addr),
        (&a.addr, "shop/db-0"),
        (&a.addr, &b.addr),
    ] {
        let mixed = explain(&cluster, 1, &[from, to]).unwrap();
        assert_eq!(mixed["verdict"], named["verdict"], "{mixed}");
        assert_eq!(mixed["counters"], named["counters"], "{mixed}");
    }
    let there = explain(&cluster, 2, &["web-1", "shop/db-0", "-4"]).unwrap();
    assert_eq!(there["outcome"], "delivered", "{there}");
    let six = explain(&cluster, 1, &["web-1", "shop/db-0", "-6"]).unwrap();
    assert!(
        six["steps"]
            .to_string()
            .contains("fd00:2::2 is outside the overlay"),
        "{six}"
    );
    // What it says is what then happens.
    let ping = [
        "netns", "exec", &a.name, "ping", "-n", "-q", "-c1", "-W2", &b.addr,
    ];
    assert!(
        Command::new("ip")
            .args(ping)
            .output()
            .unwrap()
            .status
            .success()
    );
    let traced = explain(&cluster, 1, &["web-1", "shop/db-0", "--trace"]).unwrap();
    assert!(
        traced["trace"]
            .to_string()
            .contains("its daemon saw 3 of them"),
        "{traced}"
    );

    // Pods in their nodes' networks: what such a one sends comes from the tunnel's own address.
    let agent = explain(&cluster, 1, &["agent", "shop/db-0"]).unwrap();
    let seen = cluster.exec(1, "ip", &["-o", "route", "get", &b.addr]);
    assert!(seen.contains("src 198.18.1.0 "), "{seen}");
    assert!(agent["steps"].to_string().contains("in its node's network: 198.51.100.1 is on this node; what it sends there comes from 198.18.1.0"), "{agent}");
    assert_eq!(agent["outcome"], "sent", "{agent}");
    // The manifest has --ip-masq.
    let past = explain(&cluster, 1, &["web-1", "peer"]).unwrap();
    let verdict = past["verdict"].as_str().unwrap();
    assert!(
        verdict.contains("the node's own address") && verdict.contains("by eth0"),
        "{past}"
    );
    assert!(
        verdict.contains("this node's address in the place of the pod's"),
        "{past}"
    );
    assert_eq!(
        cluster.seen_source(&a, Some(2), "198.51.100.2"),
        "198.51.100.1"
    );

    // What cannot be told says why.
    for (args, words) in [
        (
            &["web-1", "late"][..],
            "pod default/late has no address now: it is Pending on node n2",
        ),
        (&["web-1", "done"], "has no address now: it is Succeeded"),
        (
            &["web-1", "db-0"],
            "there is no pod default/db-0: kubectl get pods -A",
        ),
        (
            &["nowhere/web-1", "shop/db-0"],
            "there is no pod nowhere/web-1",
        ),
        (&["six", &b.addr], "are of different families"),
        (&["web-1", "six", "-4"], "have no IPv4 addresses"),
    ] {
        let why = explain(&cluster, 1, args).unwrap_err();
        assert!(why.contains(words), "{args:?}: {why}");
    }
    let elsewhere = explain(&cluster, 2, &["web-1", "192.0.2.9"]).unwrap();
    assert_eq!(
        elsewhere["verdict"].as_str().unwrap(),
        "neither end is on this node: ask on the node that has the source, 198.51.100.1"
    );

    // Without the right, with the rule that grants it.
    let rule = r#"[{"op":"remove","path":"/rules/2"}]"#;
    server.kubectl(&["patch", "clusterrole", "flannel", "--type=json", "-p", rule]);
    daemons[0].wait_until("the refusal", || {
        explain(&cluster, 1, &["web-1", "shop/db-0"]).is_err()
    });
    let why = explain(&cluster, 1, &["web-1", "shop/db-0"]).unwrap_err();
    assert!(
        why.contains(r#"resources: ["pods"], verbs: ["get"]"#),
        "{why}"
    );
    assert!(why.contains("default/web-1"), "{why}");
    // Without an API server, and addresses need none.
    server.kill();
    let why = explain(&cluster, 1, &["web-1", "shop/db-0"]).unwrap_err();
    assert!(why.contains("Connection refused"), "{why}");
    let said = explain(&cluster, 1, &[&a.addr, &b.addr]).unwrap();
    assert_eq!(said["verdict"], named["verdict"]);
    for one in daemons {
        assert_eq!(one.stop(), 0);
    }
}
