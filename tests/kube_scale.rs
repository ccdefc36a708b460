//! Thousands of Node objects in a real API server, hundreds of changes a second, and what that costs a daemon. The
//! long form, `scripts/soak kube-scale`, holds the figures against the goals; `scripts/test kube` runs a short one.
//! Every figure is taken from outside: from packets, processes, the API server's own counters and the writer's clock.
//!
//! Nodes are written straight into the API server's etcd, as another API server of the same cluster would do it:
//! with two processors this one would be busy with writing alone. It decodes, caches and sends each change itself.
//! Needs root, and what `scripts/setup --kube` builds.

#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot prepare itself must fail"
)]

#[path = "common/dropin.rs"]
mod dropin;
#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/kube.rs"]
mod kube_server;
#[path = "common/lease_load.rs"]
mod lease_load;
#[path = "common/scorecard.rs"]
mod scorecard;
#[path = "common/usage.rs"]
mod usage;

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use dropin::{Cluster, Daemon};
use kube_server::{ApiServer, PREFIX};
use lease_load::{Arrivals, CONFIG, Form, Leases};
use loden::lab::{NetNs, wait};
use scorecard::{Scorecard, mib, seconds};
use serde_json::{Value, json};
use usage::{Cpu, memory};

/// Only a failing run waits this long.
const LIMIT: Duration = Duration::from_secs(120);

/// A Node as large as those of real clusters: mostly images and who wrote what when.
const NODE: Form = Form {
    key: |key| format!("/registry/minions/node-{key}"),
    value: node,
};

fn node(key: &str, addr: Ipv4Addr) -> String {
    let subnet = key.replace('-', "/");
    let images: Vec<Value> = (0..40)
        .map(|n| {
            let name = format!("registry.example.org/team-{n}/application-{n}:v1.{n}.7");
            let digest = format!("registry.example.org/team-{n}/application-{n}@sha256:{n:064x}");
            json!({"names": [digest, name], "sizeBytes": 100_000_000 + n})
        })
        .collect();
    let conditions: Vec<Value> = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"]
        .into_iter()
        .map(|kind| {
            json!({"type": kind, "status": "False", "reason": format!("KubeletHas{kind}"),
                "message": format!("kubelet has sufficient room for {kind}"),
                "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z"})
        })
        .collect();
    let fields: BTreeMap<String, Value> = (0..60)
        .map(|n| (format!("f:annotation.example.org/number-{n}"), json!({})))
        .collect();
    let mut node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": format!("node-{key}"), "uid": format!("00000000-0000-0000-0000-{:012x}", u32::from(addr)),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": key},
            "annotations": kube_server::peer(&addr.to_string()),
            "managedFields": [{"manager": "kubelet", "operation": "Update", "apiVersion": "v1",
                "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1",
                "fieldsV1": {"f:metadata": {"f:annotations": fields}}, "subresource": "status"}],
        },
        "spec": {"podCIDR": subnet, "podCIDRs": [subnet]},
        "status": {"conditions": conditions, "images": images,
            "addresses": [{"type": "InternalIP", "address": addr}],
            "capacity": {"cpu": "64", "memory": "263867892Ki", "pods": "110"}},
    });
    let alive = format!("{PREFIX}/public-ip");
    assert_eq!(
        node["metadata"]["annotations"][&alive],
        addr.to_string(),
        "who takes part says where it is"
    );
    node["status"]["nodeInfo"] = json!({"kernelVersion": "6.12.0", "osImage": "Linux",
        "containerRuntimeVersion": "containerd://2.1.0", "kubeletVersion": "v1.34.3", "machineID": key});
    node.to_string()
}

/// How much of everything.
struct Size {
    nodes: u32,
    /// Changes a second, and for how long.
    rate: u32,
    time: Duration,
}

/// What was measured.
#[derive(Default)]
struct Figures {
    /// Bytes of one Node, as it is in etcd.
    node_len: usize,
    /// From the daemon's start, with the API server there, to readiness.
    ready: Duration,
    /// Likewise, until every peer is in the data plane.
    complete: Duration,
    changes_per_second: f64,
    /// Of every tenth of a second's probe.
    lags: Vec<Option<Duration>>,
    /// Of one processor, during the changes: the daemon without its workers.
    control: f64,
    /// KiB: after the first listing, in the end, and the most ever.
    listed: u64,
    settled: u64,
    peak: u64,
    /// Listings of all nodes that the daemon asked for: pages, at the start; during the changes; after the API
    /// server was killed and started again.
    lists: [u64; 3],
    /// Watches that it opened during the changes.
    watches: u64,
    /// From the API server's return until a change after it has arrived.
    again: Duration,
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn every_change_of_hundreds_of_nodes_arrives() {
    let figures = measure(&Size {
        nodes: 300,
        rate: 100,
        time: Duration::from_secs(3),
    });
    print!("{}", scorecard(&figures));
    assert!(figures.changes_per_second > 0.0);
    assert_eq!(figures.lists[1], 0, "a watch that flows needs no listing");
}

#[ignore = "takes minutes of a quiet machine and a release build: scripts/soak kube-scale"]
#[test]
fn goals_for_five_thousand_nodes_are_met() {
    let figures = measure(&Size {
        nodes: 5000,
        rate: 500,
        time: Duration::from_secs(30),
    });
    let card = scorecard(&figures);
    print!("{card}");
    assert_eq!(card.missed(), 0, "goals are missed");
}

fn measure(size: &Size) -> Figures {
    let mut figures = Figures {
        node_len: node("198.18.0.8-29", Ipv4Addr::new(198, 19, 0, 1)).len(),
        ..Figures::default()
    };
    let cluster = Cluster::new(1, "unused");
    let hub = cluster.etcd.netns().clone();
    for addr in Arrivals::addrs() {
        let addr = format!("{addr}/32");
        let args = ["-n", hub.name(), "addr", "add", &addr, "dev", "br0"];
        assert!(Command::new("ip").args(args).status().unwrap().success());
    }
    let mut leases = Leases::write(&cluster.etcd, NODE, size.nodes);
    let arguments = &["--storage-media-type=application/json"];
    let mut server = ApiServer::start_with(&cluster.etcd, arguments);
    // Behind those of all the others.
    server.add_node("n1", "198.18.255.248/29", &json!({}));
    let net_config = server.dir().join("scale.json");
    fs::write(&net_config, CONFIG).unwrap();

    let before = asked(&server);
    let begun = Instant::now();
    let args = ["-kube-subnet-mgr", "-ip-masq", "-healthz-port=8080"];
    let mut command = cluster.command(1, &args);
    command
        .arg("-kubeconfig-file")
        .arg(server.kubeconfig("daemon"))
        .arg("-net-config-path")
        .arg(&net_config)
        .env("NODE_NAME", "n1");
    let one = cluster.spawn_command(1, command);
    await_soon("readiness", &one, || {
        matches!(cluster.try_http(1, "/readyz"), Ok((200, _)))
    });
    figures.ready = begun.elapsed();
    let expected = leases.expected();
    await_soon("every peer", &one, || {
        peers(&cluster.status(1)).len() == expected.len()
    });
    figures.complete = begun.elapsed();
    await_settled(&cluster, &one, &leases);
    figures.listed = memory(one.pid()).0;
    let listed = asked(&server);
    figures.lists[0] = listed.lists - before.lists;

    let arrivals = Arrivals::default();
    thread::scope(|scope| {
        let first = NetNs::named(cluster.name(1));
        let probe = &arrivals;
        let wire = hub.clone();
        scope.spawn(move || wire.run(|| probe.listen()).unwrap());
        scope.spawn(move || first.run(|| probe.send()).unwrap());
        // Also if something below panics, the threads must end for that to be seen.
        let _stop = Stop(&arrivals);
        await_soon("packet of the probe", &one, || arrivals.any());
        let used = Cpu::of(one.pid());
        // A little faster than asked for, because the writer is a little late.
        let written = leases.change(&cluster.etcd, size.rate + size.rate / 50, size.time);
        let used = Cpu::of(one.pid()).since(used);
        figures.changes_per_second = written.changes as f64 / written.took.as_secs_f64();
        figures.control = used.rest.as_secs_f64() / written.took.as_secs_f64();
        await_settled(&cluster, &one, &leases);
        arrivals.stop();
        figures.lags = arrivals.lags(&written);
    });
    let changed = asked(&server);
    figures.lists[1] = changed.lists - listed.lists;
    figures.watches = changed.watches - listed.watches;

    server.kill();
    leases.change(&cluster.etcd, size.rate, Duration::from_secs(1));
    server.spawn();
    server.await_ready();
    let back = Instant::now();
    await_settled(&cluster, &one, &leases);
    figures.again = back.elapsed();
    // The server lists all nodes for itself, too, each time that it starts.
    figures.lists[2] = asked(&server).lists.saturating_sub(before.lists);
    (figures.settled, figures.peak) = memory(one.pid());
    assert_eq!(one.stop(), 0);
    figures
}

struct Stop<'a>(&'a Arrivals);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Looks often.
fn await_soon(what: &str, daemon: &Daemon, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < LIMIT, "no {what}; log:\n{}", daemon.log());
        wait::pause(Duration::from_millis(10));
    }
}

/// Waits until the daemon has exactly the nodes that were written.
fn await_settled(cluster: &Cluster, daemon: &Daemon, leases: &Leases) {
    let expected = leases.expected();
    await_soon("agreement with what was written", daemon, || {
        wait::pause(Duration::from_millis(100));
        peers(&cluster.status(1)) == expected
    });
}

/// Subnet and underlay address of every peer, as the data plane has them.
fn peers(status: &Value) -> BTreeMap<String, String> {
    let peers = status["datapath"]["peers"].as_array();
    peers
        .into_iter()
        .flatten()
        .flat_map(|peer| {
            let addr: std::net::SocketAddr = peer["addr"].as_str().unwrap().parse().unwrap();
            let nets = peer["nets"].as_array().unwrap().iter();
            nets.map(move |net| (net.as_str().unwrap().to_owned(), addr.ip().to_string()))
        })
        .collect()
}

/// Requests for all nodes that the API server has counted, of anybody: nobody else asks for them.
struct Asked {
    lists: u64,
    watches: u64,
}

fn asked(server: &ApiServer) -> Asked {
    let metrics = server.kubectl(&["get", "--raw", "/metrics"]);
    let count = |name: &str, verb: &str, code: &str| {
        let of = metrics.lines().filter(|line| {
            line.starts_with(name)
                && line.contains(r#"resource="nodes""#)
                && line.contains(r#"scope="cluster""#)
                && line.contains(&format!(r#"verb="{verb}""#))
                && line.contains(code)
        });
        let counts = of.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap());
        counts.sum::<u64>()
    };
    // A watch is counted when it ends, and while it lasts. A server that has just started refuses some.
    Asked {
        lists: count("apiserver_request_total{", "LIST", r#"code="200""#),
        watches: count("apiserver_request_total{", "WATCH", r#"code="200""#)
            + count("apiserver_longrunning_requests{", "WATCH", ""),
    }
}

/// The figures for people.
fn scorecard(figures: &Figures) -> Scorecard {
    let mut card = Scorecard::default();
    let eight = Duration::from_secs(8);
    card.note("bytes of a Node", figures.node_len.to_string());
    card.at_most("start to ready", eight, figures.ready);
    card.at_most(
        "start to every peer in the data plane",
        eight,
        figures.complete,
    );
    card.changes(figures.changes_per_second, &figures.lags);
    card.note(
        "  control plane's processor time meanwhile",
        format!("{:.1} %", figures.control * 100.0),
    );
    let [start, busy, again] = figures.lists;
    card.note("pages listed at the start", start.to_string());
    card.goal(
        "pages listed while nodes change",
        "0",
        busy.to_string(),
        busy == 0,
    );
    card.note("watches opened meanwhile", figures.watches.to_string());
    card.goal(
        "pages listed after a restart of the API server",
        "one listing",
        again.to_string(),
        again <= start,
    );
    card.note("  its return to agreement", seconds(figures.again));
    card.memory(100, figures.peak);
    card.note(
        "  after the listing, and in the end",
        format!("{}, {}", mib(figures.listed), mib(figures.settled)),
    );
    card
}
