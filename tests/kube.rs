//! The store in Kubernetes on a real API server: what is written, what is waited for, what others may do to it. Needs
//! root, and what `scripts/setup --kube` builds: run by `scripts/test kube`.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/dropin.rs"]
mod dropin;
#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/kube.rs"]
mod kube;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use dropin::Cluster;
use etcd::{Etcd, Follower, request, soon};
use kube::{ApiServer, PREFIX};
use loden::store::{Cause, LeaseStore as _, StoreError};
use serde_json::json;

/// Waits for a state that only kubectl can see.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..300 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    unreachable!("in vain: {what}");
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn a_node_gets_its_pod_cidr_and_says_what_flannel_says() {
    let etcd = Etcd::start();
    let server = ApiServer::start(&etcd);
    server.add_node("n1", "198.18.1.0/24", &json!(null));
    server.add_node("n2", "198.18.2.0/24", &json!({"other": "kept"}));
    etcd.run(async || {
        let store = server.store("n1").await;
        let lease = soon("a lease", store.acquire(request(1))).await.unwrap();
        assert_eq!(lease.subnets.to_string(), "198.18.1.0-24");
        assert_eq!(lease.expires, None);
        let annotations = &server.node("n1")["metadata"]["annotations"];
        assert_eq!(*annotations, kube::peer("198.51.100.1"));

        server.annotate("n2", "public-ip-overwrite=203.0.113.9");
        let second = server.store("n2").await;
        let lease = soon("a lease", second.acquire(request(2))).await.unwrap();
        // The node itself goes by the address that it has.
        assert_eq!(lease.attrs.public_ip, Some([198, 51, 100, 2].into()));
        assert_eq!(server.annotation("n2", "public-ip"), "203.0.113.9");
        assert_eq!(
            server.node("n2")["metadata"]["annotations"]["other"],
            "kept"
        );

        let mut first = Follower::new(store.watch());
        first.until("both", |f| f.leases.len() == 2).await;
        let peer = &first.leases[&"198.18.2.0-24".parse().unwrap()];
        assert_eq!(peer.attrs.public_ip, Some([203, 0, 113, 9].into()));
        assert!(first.problems.is_empty(), "{:?}", first.problems);
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn what_is_missing_is_named_with_its_remedy_and_waited_for() {
    let etcd = Etcd::start();
    let mut server = ApiServer::start(&etcd);
    etcd.run(async || {
        let store = server.store("n1").await;
        let ask = async |expected: &str| {
            let error = store.acquire(request(1)).await.unwrap_err();
            assert!(
                !matches!(error, StoreError::Config { .. } | StoreError::NoPublicIp),
                "{error:?} ends the daemon"
            );
            let text = error.to_string();
            assert!(text.contains(expected), "{text}");
        };
        ask(r#"nodes "n1" not found (404)"#).await;
        server.add_node("n1", "", &json!({}));
        ask("node n1: pod cidr not assigned: start kube-controller-manager with --allocate-node-cidrs=true and --cluster-cidr=198.18.0.0/16").await;
        server.kubectl(&["patch", "node", "n1", "-p", r#"{"spec":{"podCIDR":"198.20.1.0/24","podCIDRs":["198.20.1.0/24"]}}"#]);
        ask("subnet 198.18.0.0/16 specified in the flannel net config doesn't contain 198.20.1.0/24 PodCIDR").await;

        server.kubectl(&["delete", "node", "n1"]);
        server.add_node("n1", "198.18.1.0/24", &json!({}));
        server.kubectl(&["patch", "clusterrole", "flannel", "--type=json", "-p", r#"[{"op":"remove","path":"/rules/1"}]"#]);
        soon("a refusal", async {
            while let Ok(_lease) = store.acquire(request(1)).await {
                server.annotate("n1", "public-ip-");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }).await;
        ask(r#"resources: ["nodes/status"], verbs: ["patch"]"#).await;
        server.kubectl(&["apply", "-f", kube::MANIFEST]);
        soon("a lease", async {
            while store.acquire(request(1)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }).await;
    });
    server.kill();
    etcd.run(async || {
        let store = server.store("n1").await;
        let error = store.acquire(request(1)).await.unwrap_err().to_string();
        assert!(
            error.contains("the Kubernetes API at https://192.0.2.1:6443"),
            "{error}"
        );
        assert!(error.contains("refused"), "{error}");
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn others_come_change_and_go_and_hostile_ones_cost_only_themselves() {
    let etcd = Etcd::start();
    let server = ApiServer::start(&etcd);
    server.add_node("n1", "198.18.1.0/24", &json!({}));
    server.add_peer("n2", "198.18.2.0/24", "198.51.100.2");
    server.add_node("not-ours", "198.18.9.0/24", &json!({}));
    etcd.run(async || {
        let store = server.store("n1").await;
        soon("a lease", store.acquire(request(1))).await.unwrap();
        let mut follower = Follower::new(store.watch());
        follower.until("n2", |f| f.has("198.18.2.0-24")).await;
        assert_eq!(follower.leases.len(), 2);

        server.add_peer("n3", "198.18.3.0/24", "198.51.100.3");
        follower.until("n3", |f| f.has("198.18.3.0-24")).await;
        server.annotate("n3", "public-ip=198.51.100.33");
        follower
            .until("another address", |f| {
                let lease = f.leases.get(&"198.18.3.0-24".parse().unwrap());
                lease.is_some_and(|l| l.attrs.public_ip == Some([198, 51, 100, 33].into()))
            })
            .await;
        server.kubectl(&["delete", "node", "n3"]);
        follower.until("n3 gone", |f| !f.has("198.18.3.0-24")).await;

        // Older than who has it honestly, if it could choose; but the API server dates objects.
        server.add_peer("thief", "198.18.2.0/24", "198.51.100.66");
        server.add_peer("usurper", "198.18.1.0/24", "198.51.100.67");
        server.add_peer("nowhere", "198.20.1.0/24", "198.51.100.68");
        server.add_peer("nobody", "198.18.5.0/24", "not an address");
        server.add_peer("noise", "198.18.6.0/24", "198.51.100.69");
        server.annotate("noise", "backend-data={\"VNI\":");
        for (node, said) in [
            ("thief", "is that of node n2"),
            ("usurper", "is that of node n1"),
            ("nowhere", "doesn't contain 198.20.1.0/24"),
            (
                "nobody",
                "flannel.alpha.coreos.com/public-ip: \"not an address\"",
            ),
            ("noise", "flannel.alpha.coreos.com/backend-data: not JSON"),
        ] {
            follower
                .until(node, |f| {
                    f.problems.iter().any(|problem| {
                        let text = problem.to_string();
                        text.starts_with(&format!("node {node}: ")) && text.contains(said)
                    })
                })
                .await;
        }
        follower
            .until("noise gone", |f| !f.has("198.18.6.0-24"))
            .await;
        assert_eq!(follower.keys(), ["198.18.1.0-24", "198.18.2.0-24"]);
        let kept = &follower.leases[&"198.18.2.0-24".parse().unwrap()];
        assert_eq!(kept.attrs.public_ip, Some([198, 51, 100, 2].into()));
        assert!(follower.lost.is_empty());
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn what_we_say_is_restored_and_what_we_lose_is_told() {
    let etcd = Etcd::start();
    let server = ApiServer::start(&etcd);
    server.add_node("n1", "198.18.1.0/24", &json!({}));
    etcd.run(async || {
        let store = server.store("n1").await;
        soon("a lease", store.acquire(request(1))).await.unwrap();
        let mut follower = Follower::new(store.watch());
        follower.until("a listing", |f| f.snapshots == 1).await;

        server.kubectl(&["annotate", "node", "n1", &format!("{PREFIX}/kube-subnet-manager-"), &format!("{PREFIX}/public-ip-")]);
        follower
            .until("restored", |f| f.problems.iter().any(|p| p.cause == Cause::Restored))
            .await;
        assert_eq!(server.annotation("n1", "public-ip"), "198.51.100.1");

        // The condition follows what the daemon reports, also when somebody else has written it.
        store.report(&["the tunnel is down".to_owned()]);
        until("unavailable", || server.condition("n1")["status"] == "True").await;
        assert_eq!(server.condition("n1")["message"], "the tunnel is down");
        store.report(&[]);
        until("available", || server.condition("n1")["status"] == "False").await;
        assert_eq!(server.condition("n1")["reason"], "FlannelIsUp");
        assert_eq!(server.condition("n1")["message"], "Flannel is running on this node");
        server.kubectl(&["patch", "node", "n1", "--subresource=status", "-p",
            r#"{"status":{"conditions":[{"type":"NetworkUnavailable","status":"True","reason":"NoRouteCreated","message":"x"}]}}"#]);
        until("available again", || server.condition("n1")["reason"] == "FlannelIsUp").await;

        server.kubectl(&["delete", "node", "n1"]);
        follower.until("lost", |f| f.lost.len() == 1).await;
        assert!(store.acquire(request(1)).await.is_err());
        server.add_node("n1", "198.18.7.0/24", &json!({}));
        let lease = soon("a lease", store.acquire(request(1))).await.unwrap();
        assert_eq!(lease.subnets.to_string(), "198.18.7.0-24");
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn a_watch_survives_the_server_and_what_it_missed_while_history_was_compacted() {
    let etcd = Etcd::start();
    let mut server = ApiServer::start(&etcd);
    server.add_node("n1", "198.18.1.0/24", &json!({}));
    server.add_peer("n2", "198.18.2.0/24", "198.51.100.2");
    server.add_peer("n3", "198.18.3.0/24", "198.51.100.3");
    etcd.run(async || {
        let store = server.store("n1").await;
        soon("a lease", store.acquire(request(1))).await.unwrap();
        let mut follower = Follower::new(store.watch());
        follower.until("all", |f| f.leases.len() == 3).await;

        server.kill();
        follower
            .until("away", |f| {
                f.problems.iter().any(|p| matches!(p.cause, Cause::Away(_)))
            })
            .await;
        // Straight in the database, as if another API server had done it, and nobody can tell when any more.
        etcd.ctl(&["del", "/registry/minions/n3"]);
        let last = etcd.put("elsewhere", "");
        etcd.ctl(&["compact", &last.to_string(), "--physical"]);
        server.spawn();
        server.await_ready();
        follower.until("n3 gone", |f| !f.has("198.18.3.0-24")).await;
        follower
            .until("back", |f| {
                f.problems.last().is_some_and(|p| p.cause == Cause::Solved)
            })
            .await;
        assert!(follower.has("198.18.2.0-24"));
        server.add_peer("n4", "198.18.4.0/24", "198.51.100.4");
        follower.until("n4", |f| f.has("198.18.4.0-24")).await;
        assert_eq!(follower.withdrawn.len(), 1);
    });
}

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
    let assigned = r#"{"spec":{"podCIDR":"198.18.2.0/24","podCIDRs":["198.18.2.0/24"]}}"#;
    server.kubectl(&["patch", "node", "n2", "-p", assigned]);
    second.wait_for_log("written: ready");
    assert_eq!(server.annotation("n2", "public-ip"), "198.51.100.77");
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

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn the_manifest_grants_what_is_needed_and_nothing_else() {
    let etcd = Etcd::start();
    let server = ApiServer::start(&etcd);
    let account = "--as=system:serviceaccount:kube-flannel:flannel";
    let rights = server.kubectl(&["auth", "can-i", "--list", "--no-headers", account]);
    let rights: Vec<String> = rights
        .lines()
        .filter(|line| !line.starts_with(' ') && !line.contains("selfsubject"))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(
        rights,
        ["nodes [] [] [get list watch]", "nodes/status [] [] [patch]"]
    );
    let deploy = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy");
    for variant in ["kubernetes", "kubernetes-privileged"] {
        let path = format!("{deploy}/{variant}");
        let accepted = server.kubectl(&["apply", "--dry-run=server", "-o", "json", "-k", &path]);
        let privileged = accepted.contains(r#""privileged": true"#);
        assert_eq!(privileged, variant == "kubernetes-privileged");
    }
}

/// What helm makes of our chart with these settings.
fn helm(settings: &[&str]) -> Output {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/helm/loden");
    let mut command = Command::new(kube::program("helm"));
    command.args(["template", "flannel", chart, "--namespace", "default"]);
    for setting in settings {
        command.args(["--set", setting]);
    }
    command.output().unwrap()
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn the_chart_takes_flannels_values_and_the_server_takes_what_comes_out() {
    let etcd = Etcd::start();
    let server = ApiServer::start(&etcd);
    let common = r#""EnableNFTables":false"#;
    for (settings, net_conf) in [
        (
            vec![],
            format!(r#"{{"Backend":{{"Type":"udp"}},{common},"Network":"10.244.0.0/16"}}"#),
        ),
        (
            vec![
                "flannel.backend=vxlan",
                "flannel.backendPort=4789",
                "flannel.vni=7",
                "flannel.mtu=1400",
                "flannel.directRouting=true",
                "podCidrv6=fd00:10:244::/56",
            ],
            format!(
                r#"{{"Backend":{{"DirectRouting":true,"MTU":1400,"Port":4789,"Type":"vxlan","VNI":7}},"EnableIPv6":true,{common},"IPv6Network":"fd00:10:244::/56","Network":"10.244.0.0/16"}}"#
            ),
        ),
        (
            vec![
                "flannel.backend=wireguard",
                "flannel.backendPort=51820",
                "flannel.tunnelMode=separate",
                "podCidr=",
                "podCidrv6=fd00:10:244::/56",
            ],
            format!(
                r#"{{"Backend":{{"ListenPort":51820,"Mode":"separate","Type":"wireguard"}},"EnableIPv4":false,"EnableIPv6":true,{common},"IPv6Network":"fd00:10:244::/56"}}"#
            ),
        ),
    ] {
        let output = helm(&settings);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{settings:?}: {error}");
        let accepted = server.dry_run(&String::from_utf8(output.stdout).unwrap());
        let accepted: serde_json::Value = serde_json::from_str(&accepted).unwrap();
        let items = accepted["items"].as_array().unwrap();
        let config = items
            .iter()
            .find(|item| item["kind"] == "ConfigMap")
            .unwrap();
        let text = config["data"]["net-conf.json"].as_str().unwrap();
        let rendered: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(rendered.to_string(), net_conf);
    }

    let text = |settings: &[&str]| String::from_utf8(helm(settings).stdout).unwrap();
    let all = text(&[]);
    for expected in [
        "--healthz-port=8081",
        "livenessProbe",
        "name: install-cni\n",
    ] {
        assert!(all.contains(expected), "{all}");
    }
    let none = text(&[
        "flannel.healthz.port=0",
        "flannel.skipCNIConfigInstallation=true",
    ]);
    for unexpected in ["healthz", "Probe", "name: install-cni\n"] {
        assert!(!none.contains(unexpected), "{unexpected}");
    }
    assert!(text(&["flannel.privileged=true"]).contains("privileged: true"));
    let secret = text(&["global.imagePullSecrets[0].name=mine"]);
    assert!(secret.contains("imagePullSecrets:\n  - name: mine"));
    for wrong in [
        "flannel.backendPort=70000",
        "flannel.tunnelMode=odd",
        "podCidr=all",
        "netpol.enabled=true",
    ] {
        assert!(!helm(&[wrong]).status.success(), "{wrong}");
    }
}
