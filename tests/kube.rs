//! The store in Kubernetes on a real API server: what is written, what is waited for, what others may do to it. Needs
//! root, and what `scripts/setup --kube` builds: run by `scripts/test kube`.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/kube.rs"]
mod kube;

use std::process::{Command, Output};
use std::time::Duration;

use etcd::{Etcd, Follower, request, soon};
use kube::{ApiServer, PREFIX};
use loden::store::{Cause, LeaseStore as _, StoreError};
use serde_json::{Value, json};

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

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn the_manifest_grants_what_is_needed_and_nothing_else() {
    let etcd = Etcd::start();
    let server = ApiServer::start(&etcd);
    let rights = |namespace: &str| -> Vec<String> {
        let args = ["auth", "can-i", "--list", "--no-headers", "-n", namespace];
        let rights = server.kubectl_of("daemon", &args).unwrap();
        rights
            .lines()
            .filter(|line| !line.starts_with(' ') && !line.contains("selfsubject"))
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    };
    let everywhere = [
        "nodes [] [] [get list watch]",
        "pods [] [] [get]",
        "nodes/status [] [] [patch]",
    ];
    assert_eq!(rights("kube-flannel"), everywhere);
    assert_eq!(rights("kube-system"), everywhere);
    let [nodes, pods, status] = everywhere;
    assert_eq!(
        rights("default"),
        ["events [] [] [create]", nodes, pods, status]
    );

    // Not only what the server says of it, but what it does: with the token of the service account. That the status
    // may be patched is what every lease here shows.
    server.add_node("n1", "198.18.1.0/24", &json!({}));
    for (args, allowed) in [
        (&["get", "nodes"][..], true),
        (&["create", "event"], true),
        (&["annotate", "node", "n1", "a.b/c=d"], false),
        (&["taint", "node", "n1", "a=b:NoSchedule"], false),
        (&["delete", "node", "n1"], false),
        (&["create", "node"], false),
        (&["get", "pods", "-A"], false),
        (&["get", "pod", "--ignore-not-found", "web-1"], true),
        (&["delete", "pod", "web-1"], false),
        (&["get", "secrets", "-n", "kube-flannel"], false),
        (&["get", "configmaps", "-n", "kube-flannel"], false),
        (&["create", "token", "flannel", "-n", "kube-flannel"], false),
        (&["get", "events"], false),
        (&["get", "daemonsets", "-A"], false),
        (&["get", "clusterroles"], false),
        (&["get", "namespaces"], false),
    ] {
        let object = match args {
            ["create", "event"] => {
                r#"{"apiVersion":"v1","kind":"Event","metadata":{"name":"e","namespace":"default"},"involvedObject":{"kind":"Node","name":"n1"}}"#
            }
            ["create", "node"] => r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n2"}}"#,
            _ => "",
        };
        let done = match object {
            "" => server.kubectl_of("daemon", args),
            object => server.kubectl_of_with("daemon", &["create", "-f", "-"], object),
        };
        match done {
            Ok(_) => assert!(allowed, "{args:?} is allowed"),
            Err(why) => assert!(!allowed && why.contains("forbidden"), "{args:?}: {why}"),
        }
    }
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
            // A file of values for flannel's chart may leave its default out.
            format!(r#"{{"Backend":{{"Type":"vxlan"}},{common},"Network":"10.244.0.0/16"}}"#),
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
        let accepted: Value = serde_json::from_str(&accepted).unwrap();
        let items = accepted["items"].as_array().unwrap();
        let config = items
            .iter()
            .find(|item| item["kind"] == "ConfigMap")
            .unwrap();
        let text = config["data"]["net-conf.json"].as_str().unwrap();
        let rendered: Value = serde_json::from_str(text).unwrap();
        assert_eq!(rendered.to_string(), net_conf);
    }

    every_value_of_flannels_has_its_effect(&server);

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

/// Renders the chart with a file that sets every value of flannel's, and looks for each in what the server takes.
fn every_value_of_flannels_has_its_effect(server: &ApiServer) {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/helm/loden");
    let values = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/chart/flannel-values.yaml"
    );
    let mut command = Command::new(kube::program("helm"));
    command.args(["template", "flannel", chart, "-n", "default", "-f", values]);
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let accepted = server.dry_run(&String::from_utf8(output.stdout).unwrap());
    let accepted: Value = serde_json::from_str(&accepted).unwrap();
    let of = |kind: &str| {
        let items = accepted["items"].as_array().unwrap();
        items.iter().find(|item| item["kind"] == kind).unwrap()
    };
    let config = &of("ConfigMap")["data"];
    let net_conf: Value = serde_json::from_str(config["net-conf.json"].as_str().unwrap()).unwrap();
    assert_eq!(
        net_conf,
        json!({
            "Network": "198.18.0.0/16", "IPv6Network": "fd00:18::/48", "EnableIPv6": true, "EnableNFTables": true,
            "Backend": {"Type": "vxlan", "Port": 0, "MTU": 1400, "VNI": 7, "GBP": true, "DirectRouting": true,
                "MacPrefix": "0E-2B", "ListenPortV6": 51821, "PSK": 0, "Mode": "separate",
                "PersistentKeepaliveInterval": 25},
        })
    );
    assert!(config["cni-conf.json"].as_str().unwrap().contains("mine"));
    assert_eq!(
        of("ServiceAccount")["imagePullSecrets"],
        json!([{"name": "the-secret"}])
    );
    let pod = &of("DaemonSet")["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(
        container["command"],
        json!([
            "/opt/bin/flanneld",
            "--ip-masq",
            "--kube-subnet-mgr",
            "--iface=eth1",
            "--healthz-port=9081"
        ])
    );
    for (found, expected) in [
        (&container["image"], json!("registry.example.org/loden:7")),
        (
            &pod["initContainers"][0]["image"],
            json!("registry.example.org/loden-cni:v8"),
        ),
        (
            &pod["initContainers"][1]["image"],
            json!("registry.example.org/loden:7"),
        ),
        (
            &container["resources"],
            // Values are merged into ours, which are flannel's.
            json!({"limits": {"memory": "200Mi"}, "requests": {"cpu": "100m", "memory": "50Mi"}}),
        ),
        (
            &container["livenessProbe"]["initialDelaySeconds"],
            json!(11),
        ),
        (&container["livenessProbe"]["periodSeconds"], json!(31)),
        (
            &container["readinessProbe"]["initialDelaySeconds"],
            json!(6),
        ),
        (&container["readinessProbe"]["periodSeconds"], json!(12)),
        (&container["ports"][0]["containerPort"], json!(9081)),
        (
            &pod["tolerations"],
            json!([{"key": "only", "operator": "Exists"}]),
        ),
        (&pod["nodeSelector"], json!({"disk": "ssd"})),
    ] {
        assert_eq!(*found, expected);
    }
    let volumes = pod["volumes"].to_string();
    assert!(volumes.contains("/usr/libexec/cni") && volumes.contains("/etc/cni/elsewhere"));
}
