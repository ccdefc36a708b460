//! The program in the place of `flanneld`, on a real etcd, in namespaces: two nodes that reach each other, what
//! outages of the store and deleted leases do to them, traffic rules, and what is answered about health. Needs
//! root.

#[path = "common/dropin.rs"]
mod dropin;
#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/seeded.rs"]
mod seeded;

use std::time::{Duration, Instant};

use dropin::{Cluster, GOLDEN_VALUE};
use nix::sys::signal::Signal;

/// Nodes' own subnets leave room for those that tests give to others.
const NFT: &str = r#"{"Network":"198.18.0.0/16","SubnetMin":"198.18.128.0","EnableNFTables":true,"Backend":{"Type":"udp"}}"#;

#[test]
fn two_nodes_lease_in_etcd_as_flannel_does_and_reach_each_other() {
    let cluster = Cluster::new(2, NFT);
    let (one, two) = (cluster.start(1, &[]), cluster.start(2, &[]));
    cluster.reaches(1, 2);
    cluster.reaches(2, 1);
    for node in [1, 2] {
        let subnet = cluster.env_value(node, "FLANNEL_SUBNET");
        let key = subnet.replace(".1/24", ".0-24");
        let value = cluster.etcd.ctl(&[
            "get",
            &format!("/coreos.com/network/subnets/{key}"),
            "--print-value-only",
        ]);
        assert_eq!(
            value.trim(),
            format!(r#"{{"PublicIP":"198.51.100.{node}","PublicIPv6":null}}"#)
        );
    }
    assert_eq!((one.stop(), two.stop()), (0, 0));
}

#[test]
fn values_that_the_original_wrote_are_routed_to() {
    let cluster = Cluster::new(1, NFT);
    let lease = cluster.etcd.grant(3600);
    cluster.etcd.ctl(&[
        "put",
        "/coreos.com/network/subnets/198.18.77.0-24",
        GOLDEN_VALUE,
        &format!("--lease={lease}"),
    ]);
    let one = cluster.start(1, &[]);
    one.wait_until("the peer", || {
        let status = cluster.status(1);
        status["peers"][0]["endpoint"] == "198.51.100.77:8285"
    });
    assert_eq!(one.stop(), 0);
}

#[test]
fn restarted_node_keeps_its_subnet() {
    let cluster = Cluster::new(1, NFT);
    let one = cluster.start(1, &[]);
    let before = cluster.env_value(1, "FLANNEL_SUBNET");
    assert_eq!(one.stop(), 0);
    let again = cluster.start(1, &[]);
    assert_eq!(cluster.env_value(1, "FLANNEL_SUBNET"), before);
    assert_eq!(again.stop(), 0);
    // Also from subnet.env alone.
    cluster
        .etcd
        .ctl(&["del", "/coreos.com/network/subnets", "--prefix"]);
    let third = cluster.start(1, &[]);
    assert_eq!(cluster.env_value(1, "FLANNEL_SUBNET"), before);
    assert_eq!(third.stop(), 0);
}

/// `LODEN_OUTAGE_SECONDS` decides how long etcd is away, each time.
#[test]
fn outage_of_etcd_costs_no_packet() {
    let given = std::env::var_os("LODEN_OUTAGE_SECONDS");
    let seconds: u16 = given
        .as_ref()
        .map_or(2, |n| n.to_str().unwrap().parse().unwrap());
    // Beside other tests, etcd and iperf3 take their time.
    let is_alone = given.is_some();
    let begun = Instant::now();
    let mut cluster = Cluster::new(2, NFT);
    let (one, two) = (cluster.start(1, &[]), cluster.start(2, &[]));
    cluster.reaches(1, 2);
    let iperf = cluster.iperf_in_background(1, 2);
    let ping = cluster.ping_in_background(1, 2);
    ping.wait_for_answers(100);
    // Leased by chance, these would be taken from a node of ours.
    let taken = [1, 2].map(|node| cluster.env_value(node, "FLANNEL_SUBNET"));
    let is_free = |subnet: &u8| {
        let prefix = format!("198.18.{subnet}.");
        !taken.iter().any(|own| own.starts_with(&prefix))
    };
    let free = (77_u8..).filter(is_free);
    for (outage, subnet) in [Outage::Frozen, Outage::Killed].into_iter().zip(free) {
        match outage {
            Outage::Frozen => cluster.etcd.signal(0, Signal::SIGSTOP),
            Outage::Killed => cluster.etcd.kill(0),
        }
        assert!(
            ping.goes_on_for(Duration::from_secs(seconds.into())),
            "{outage:?}: no answers; node 1: {}\n{:#}\nnode 2: {}\n{:#}",
            one.log(),
            cluster.status(1),
            two.log(),
            cluster.status(2)
        );
        match outage {
            Outage::Frozen => cluster.etcd.signal(0, Signal::SIGCONT),
            Outage::Killed => cluster.etcd.spawn(0),
        }
        cluster.etcd.await_health();
        let key = format!("/coreos.com/network/subnets/198.18.{subnet}.0-24");
        cluster.etcd.ctl(&["put", &key, GOLDEN_VALUE]);
        let put = Instant::now();
        let net = format!("198.18.{subnet}.0/24");
        for node in [1, 2] {
            one.wait_until("the first change after the outage", || {
                cluster.status(node)["peers"].to_string().contains(&net)
            });
        }
        let seen = put.elapsed();
        println!("{outage:?} for {seconds} s: the first change is seen after {seen:?}");
        assert!(
            !is_alone || seen < Duration::from_secs(2),
            "{outage:?}: {seen:?}"
        );
    }
    assert_eq!(ping.lost(), 0);
    let bytes = iperf.bytes();
    let is_whole = bytes.len() >= usize::from(2 * seconds) && !bytes.contains(&0);
    assert!(!is_alone || is_whole, "a stall: {bytes:?}");
    assert!(bytes.iter().any(|&bytes| bytes > 0), "{bytes:?}");
    let complaints = one.log().matches("the store cannot be read").count();
    let minutes = begun.elapsed().as_secs() / 60;
    assert!(
        complaints <= usize::try_from(2 + minutes).unwrap(),
        "{}",
        one.log()
    );
    assert_eq!((one.stop(), two.stop()), (0, 0));
}

#[derive(Debug, Clone, Copy)]
enum Outage {
    Frozen,
    Killed,
}

#[test]
fn all_keys_deleted_are_registered_again_and_no_packet_is_lost() {
    let cluster = Cluster::new(2, NFT);
    let (one, two) = (cluster.start(1, &[]), cluster.start(2, &[]));
    cluster.reaches(1, 2);
    let mut before = cluster.etcd.keys("subnets/");
    before.sort();
    let ping = cluster.ping_in_background(1, 2);
    ping.wait_for_answers(20);
    cluster
        .etcd
        .ctl(&["del", "/coreos.com/network/subnets", "--prefix"]);
    one.wait_until("the same leases", || {
        cluster.etcd.keys("subnets/") == before
    });
    ping.wait_for_answers(100);
    assert_eq!(ping.lost(), 0);
    one.wait_for_log("registered again");
    assert_eq!((one.stop(), two.stop()), (0, 0));
}

#[test]
fn revoked_lease_is_acquired_again_and_nobody_exits() {
    let cluster = Cluster::new(1, NFT);
    let one = cluster.start(1, &[]);
    let before = cluster.etcd.keys("subnets/");
    let leases = cluster.etcd.ctl(&["lease", "list"]);
    for lease in leases.lines().filter(|line| !line.starts_with("found")) {
        cluster.etcd.ctl(&["lease", "revoke", lease.trim()]);
    }
    one.wait_for_log("registered again");
    assert_eq!(cluster.etcd.keys("subnets/"), before);
    assert_eq!(one.stop(), 0);
}

#[test]
fn two_nodes_with_one_public_ip_are_told_by_the_address() {
    let cluster = Cluster::new(2, NFT);
    let one = cluster.start(1, &[]);
    // As on cloned machines, where every node has the same address behind its own NAT.
    let two = cluster.start(2, &["-public-ip=198.51.100.1"]);
    one.wait_for_log("public IP 198.51.100.1");
    one.wait_for_log("another daemon");
    assert_eq!((one.stop(), two.stop()), (0, 0));
}

#[test]
fn interface_is_found_by_what_it_reaches_and_our_subnet_is_a_blackhole_if_asked_for() {
    let cluster = Cluster::new(1, NFT);
    cluster.ip(1, "link add other type veth peer name far");
    cluster.ip(1, "addr add 203.0.113.1/24 dev other");
    cluster.ip(1, "link set other up");
    let args = [
        "-iface-can-reach=192.0.2.1",
        "-ip-blackhole-route",
        "-iptables-resync=1",
    ];
    let one = cluster.spawn_command(1, cluster.bare(1, &args));
    one.wait_for_log("written: ready");
    assert_eq!(cluster.status(1)["interface"]["name"], "eth0");
    let route = format!("blackhole {}/24", cluster.base(1));
    one.wait_until("the blackhole route", || {
        cluster.ip(1, "route show type blackhole").contains(&route)
    });
    cluster.ip(1, &format!("route del {route}"));
    one.wait_until("the blackhole route again", || {
        cluster.ip(1, "route show type blackhole").contains(&route)
    });
    assert_eq!(one.stop(), 0);
}

#[test]
fn subnet_that_another_node_claimed_is_given_up_for_another() {
    let cluster = Cluster::new(1, NFT);
    let one = cluster.start(1, &[]);
    let key = cluster.etcd.keys("subnets/").remove(0);
    let before = cluster.env_value(1, "FLANNEL_SUBNET");
    cluster
        .etcd
        .ctl(&["put", &format!("/coreos.com/network/{key}"), GOLDEN_VALUE]);
    one.wait_until("another subnet", || {
        cluster.env_value(1, "FLANNEL_SUBNET") != before
    });
    assert_eq!(one.stop(), 0);
}

#[test]
fn deleted_lease_of_a_dead_node_is_withdrawn_after_the_hold() {
    let cluster = Cluster::new(2, NFT);
    let (one, two) = (cluster.start(1, &[]), cluster.start(2, &[]));
    cluster.reaches(1, 2);
    two.signal(Signal::SIGKILL);
    drop(two);
    let key = cluster.base(2) + "-24";
    cluster.etcd.delete(&format!("subnets/{key}"), false);
    let peers = || cluster.status(1)["peers"].as_array().unwrap().len();
    one.wait_until("the peer to be withdrawn", || peers() == 0);
    assert_eq!(one.stop(), 0);
}

#[test]
fn host_that_left_while_the_daemon_was_down_gets_no_traffic_after_its_start() {
    let cluster = Cluster::new(2, NFT);
    let (one, two) = (cluster.start(1, &[]), cluster.start(2, &[]));
    cluster.reaches(1, 2);
    let target = cluster.base(2);
    one.signal(Signal::SIGKILL);
    drop(one);
    assert_eq!(two.stop(), 0);
    let key = cluster.base(2) + "-24";
    cluster.etcd.delete(&format!("subnets/{key}"), false);
    let one = cluster.start(1, &[]);
    assert_eq!(cluster.status(1)["peers"], serde_json::json!([]));
    let source = cluster.base(1);
    let ping = format!("-n -q -c3 -i0.2 -W1 -I {source} {target}");
    cluster.try_exec(1, "ping", &ping);
    let encap = |what: &str| {
        let status = cluster.status(1);
        status["datapath"]["total"]["encap"][what].as_u64()
    };
    one.wait_until("the packets to be looked at", || encap("read") >= Some(3));
    assert_eq!(encap("sent"), Some(0));
    assert_eq!(one.stop(), 0);
}

/// `LODEN_ROUNDS` decides how often.
#[test]
fn daemons_that_race_for_the_last_free_subnet_never_share_it() {
    let one_free = r#"{"Network":"198.18.0.0/28","SubnetLen":30,"SubnetMax":"198.18.0.4",
"Backend":{"Type":"udp"}}"#;
    let cluster = Cluster::new(2, one_free);
    let rounds = seeded::seeds(3);
    for round in rounds.clone() {
        for node in [1, 2] {
            cluster.forget_env(node);
        }
        cluster.etcd.delete("subnets/", true);
        let daemons = [1, 2].map(|node| cluster.spawn(node, &[]));
        let ready = || {
            daemons
                .each_ref()
                .map(|d| d.log().contains("written: ready"))
        };
        let refused = || {
            daemons
                .each_ref()
                .map(|d| d.log().contains("out of subnets"))
        };
        daemons[0].wait_until("one to have it and one not", || {
            ready() == refused().map(|refused| !refused)
        });
        let keys = cluster.etcd.keys("subnets/");
        assert_eq!(keys, ["subnets/198.18.0.4-30"], "round {round}");
        let (value, _) = cluster.etcd.get(&keys[0]).unwrap();
        let winner = if ready()[0] { 1 } else { 2 };
        assert!(
            value.contains(&format!("198.51.100.{winner}\"")),
            "round {round}: {value}"
        );
        for daemon in daemons {
            daemon.signal(Signal::SIGKILL);
        }
    }
    println!("{} rounds: one winner each", rounds.count());
}

#[test]
fn killed_daemon_is_followed_by_one_that_takes_everything_over() {
    let cluster = Cluster::new(2, NFT);
    let (one, two) = (cluster.start(1, &[]), cluster.start(2, &[]));
    cluster.reaches(1, 2);
    let before = cluster.env_value(1, "FLANNEL_SUBNET");
    one.signal(Signal::SIGKILL);
    drop(one);
    let one = cluster.start(1, &[]);
    assert_eq!(cluster.env_value(1, "FLANNEL_SUBNET"), before);
    cluster.reaches(1, 2);
    assert_eq!((one.stop(), two.stop()), (0, 0));
}

#[test]
fn service_manager_is_told_when_pods_may_come() {
    let cluster = Cluster::new(1, NFT);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut command = cluster.command(1, &[]);
    command.env("NOTIFY_SOCKET", &path);
    let one = cluster.spawn_command(1, command);
    let mut told = [0; 64];
    one.wait_until("READY=1", || {
        socket
            .recv(&mut told)
            .is_ok_and(|len| told[..len].starts_with(b"READY=1"))
    });
    assert!(!cluster.env_value(1, "FLANNEL_SUBNET").is_empty());
    assert_eq!(one.stop(), 0);
}

#[test]
fn iptables_rules_are_the_originals_and_come_back_after_a_flush() {
    let cluster = Cluster::new(1, r#"{"Network":"198.18.0.0/16"}"#);
    let one = cluster.start(1, &["-ip-masq", "-iptables-resync=1"]);
    let subnet = cluster.base(1) + "/24";
    let expected = [
        "-N FLANNEL-POSTRTG".to_owned(),
        r#"-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN"#.to_owned(),
        format!(r#"-A FLANNEL-POSTRTG -s {subnet} -d 198.18.0.0/16 -m comment --comment "flanneld masq" -j RETURN"#),
        format!(r#"-A FLANNEL-POSTRTG -s 198.18.0.0/16 -d {subnet} -m comment --comment "flanneld masq" -j RETURN"#),
        format!(r#"-A FLANNEL-POSTRTG ! -s 198.18.0.0/16 -d {subnet} -m comment --comment "flanneld masq" -j RETURN"#),
        r#"-A FLANNEL-POSTRTG -s 198.18.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully"#.to_owned(),
        r#"-A FLANNEL-POSTRTG ! -s 198.18.0.0/16 -d 198.18.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully"#.to_owned(),
    ];
    let rules = || cluster.exec(1, "iptables", &["-t", "nat", "-S", "FLANNEL-POSTRTG"]);
    assert_eq!(rules().lines().collect::<Vec<_>>(), expected);
    cluster.exec(1, "iptables", &["-t", "nat", "-F"]);
    one.wait_until("the rules are repaired", || {
        rules().lines().collect::<Vec<_>>() == expected
    });
    assert_eq!(one.stop(), 0);
}

/// The whole program in the place of the specification's example node.
#[test]
fn everything_a_node_writes_is_the_golden_files_to_the_byte() {
    let env = include_str!("golden/store/subnet-dual.env");
    let values = include_str!("golden/store/lease-values.jsonl");
    let config = |nftables: bool| {
        // 28 bytes of encapsulation leave 1450.
        format!(
            r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"2001:cafe:42::/56",
"EnableNFTables":{nftables},"Backend":{{"Type":"udp","MTU":1478}}}}"#
        )
    };
    // The golden rules are of another IPv6 network.
    let networks = |golden: &str| golden.replace("fd00:10:244:", "2001:cafe:42:");
    let cluster = Cluster::new(1, &config(false));
    // The subnet of the run before is asked for, as after a reboot.
    cluster.write_env(1, env);
    let args = ["-ip-masq", "-public-ip=1.2.3.4"];
    let one = cluster.start(1, &args);
    assert_eq!(cluster.read_env(1), env);
    let key = "subnets/10.244.1.0-24&2001:cafe:42:1::-64";
    assert_eq!(cluster.etcd.keys("subnets/"), [key]);
    let (value, lease) = cluster.etcd.get(key).unwrap();
    assert_eq!(Some(value.as_str()), values.lines().next());
    assert_ne!(lease, 0);
    for (program, golden) in [
        (
            "iptables",
            include_str!("golden/firewall/list-iptables-v4.txt"),
        ),
        (
            "ip6tables",
            include_str!("golden/firewall/list-iptables-v6.txt"),
        ),
    ] {
        let listing = [
            ("nat", "POSTROUTING", "FLANNEL-POSTRTG"),
            ("filter", "FORWARD", "FLANNEL-FWD"),
        ]
        .map(|(table, hook, chain)| {
            let list = |chain| cluster.exec(1, program, &["-t", table, "-S", chain]);
            let jumps = list(hook);
            let jumps = jumps.lines().filter(|line| line.starts_with("-A"));
            let jumps: String = jumps.map(|line| format!("{line}\n")).collect();
            jumps + &list(chain)
        });
        assert_eq!(listing.concat(), networks(golden), "{program}");
    }
    assert_eq!(one.stop(), 0);

    cluster.configure(&config(true));
    let one = cluster.start(1, &args);
    assert_eq!(cluster.read_env(1), env);
    for (table, golden) in [
        (
            "ip flannel-ipv4",
            include_str!("golden/firewall/nft-list-v4.txt"),
        ),
        (
            "ip6 flannel-ipv6",
            include_str!("golden/firewall/nft-list-v6.txt"),
        ),
    ] {
        let listing = cluster.exec(1, "nft", &[&format!("list table {table}")]);
        assert_eq!(listing, networks(golden));
    }
    assert_eq!(one.stop(), 0);
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused_before_anything_is_changed() {
    let cluster = Cluster::new(1, NFT);
    let output = cluster.command(1, &["-kube-subnet-mgr"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("POD_NAME and POD_NAMESPACE must be set"),
        "{text}"
    );
    assert!(cluster.etcd.keys("subnets/").is_empty());
    let unknown = cluster.command(1, &["-etcd-endpoint=x"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    let text = String::from_utf8_lossy(&unknown.stderr);
    assert!(text.contains("--etcd-endpoints"), "{text}");
    let version = cluster.command(1, &["-version"]).output().unwrap();
    assert_eq!(version.status.code(), Some(0));
    assert_eq!(
        version.stderr,
        concat!(env!("CARGO_PKG_VERSION"), "\n").as_bytes()
    );
}

#[test]
fn address_that_changes_under_a_running_daemon_moves_the_lease_and_keeps_the_subnet() {
    let cluster = Cluster::new(2, NFT);
    let (one, two) = (cluster.start(1, &[]), cluster.start(2, &[]));
    cluster.reaches(1, 2);
    let before = cluster.etcd.keys("subnets/");
    cluster.ip(1, "addr del 198.51.100.1/24 dev eth0");
    cluster.ip(1, "addr add 198.51.100.101/24 dev eth0");
    // The deletion took the route to etcd with it.
    cluster.ip(1, "route replace 192.0.2.0/24 via 198.51.100.254");
    one.wait_until("the lease to name the new address", || {
        let all = cluster
            .etcd
            .ctl(&["get", "/coreos.com/network/subnets", "--prefix"]);
        all.contains("198.51.100.101")
    });
    assert_eq!(cluster.etcd.keys("subnets/"), before);
    cluster.reaches(1, 2);
    cluster.reaches(2, 1);
    assert_eq!((one.stop(), two.stop()), (0, 0));
}

#[test]
fn masquerading_hides_pods_from_the_outside_and_not_from_other_nodes() {
    let cluster = Cluster::new(2, NFT);
    let masq = ["--ip-masq", "--iptables-resync=1"];
    let (one, two) = (cluster.start(1, &masq), cluster.start(2, &masq));
    assert_eq!(cluster.env_value(1, "FLANNEL_IPMASQ"), "true");
    let pod = cluster.add_pod(1);
    cluster.reaches(1, 2);
    let outside = "198.51.100.254".to_owned();
    assert_eq!(
        cluster.seen_source(&pod, None, &outside),
        "198.51.100.1",
        "the outside sees the node"
    );
    let inside = cluster.base(2);
    assert_eq!(
        cluster.seen_source(&pod, Some(2), &inside),
        pod.addr,
        "another node sees the pod"
    );
    cluster.exec(1, "nft", &["flush", "ruleset"]);
    one.wait_until("the rules are repaired", || {
        let rules = cluster.exec(1, "nft", &["list", "ruleset"]);
        rules.contains("chain postrtg") && rules.contains("masquerade")
    });
    assert_eq!((one.stop(), two.stop()), (0, 0));
    let rules = cluster.exec(1, "nft", &["list", "ruleset"]);
    assert!(
        rules.contains("flannel-ipv4"),
        "rules stay when the daemon ends"
    );
    cluster.exec(1, "nft", &["add", "table", "ip", "foreign"]);
    cluster.exec(1, dropin::LODEN, &["cleanup"]);
    let rules = cluster.exec(1, "nft", &["list", "ruleset"]);
    assert_eq!(rules.trim(), "table ip foreign {\n}");
}

#[test]
fn health_is_told_in_flannels_words_and_metrics_are_openmetrics() {
    let cluster = Cluster::new(1, NFT);
    cluster.etcd.ctl(&["del", "/coreos.com/network/config"]);
    let waiting = cluster.spawn(1, &["-healthz-port=8080", "-healthz-ip", "198.51.100.1"]);
    waiting.wait_for_log("no network configuration");
    let get = |path: &str| cluster.http(1, path);
    assert_eq!(get("/healthz"), (200, "flanneld is running".to_owned()));
    waiting.wait_until("the reason", || {
        let (code, body) = get("/readyz");
        assert_eq!(code, 503);
        assert_eq!(body.lines().next(), Some("flanneld is not ready yet"));
        body.contains("waiting for the network configuration: no network configuration at")
    });
    assert_eq!(get("/other").0, 404);
    let no_figures = "the daemon has no lease yet, so there are no figures";
    assert_eq!(get("/metrics"), (503, no_figures.to_owned()));
    cluster.configure(NFT);
    waiting.wait_for_log("written: ready");
    waiting.wait_until("readiness", || get("/readyz").0 == 200);
    assert_eq!(get("/readyz").1, "flanneld is ready");
    let (code, text) = get("/metrics");
    assert_eq!(code, 200);
    dropin::check_openmetrics(&text);
    for name in [
        "loden_ready 1",
        r#"loden_packets_dropped_total{direction="encap",reason="no_route"} 0"#,
        "loden_lease_expires_seconds 86",
        "loden_peers 0",
    ] {
        assert!(text.contains(name), "{name}: {text}");
    }
    assert_eq!(waiting.stop(), 0);
}

#[test]
fn print_config_says_where_each_setting_comes_from_and_changes_nothing() {
    let cluster = Cluster::new(1, NFT);
    let mut command = cluster.command(1, &["--print-config", "-ip-masq", "-v=0x1"]);
    command.env("FLANNELD_ETCD_PASSWORD", "hunter2");
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    for line in [
        "--ip-masq=true  # flag",
        "--etcd-password=***  # environment FLANNELD_ETCD_PASSWORD",
        "--iptables-resync=5  # default",
        "Network: 198.18.0.0/16, subnets of /24 from 198.18.128.0/24 to 198.18.255.0/24  # store",
    ] {
        assert!(text.contains(line), "{line}:\n{text}");
    }
    assert!(!text.contains("hunter2"), "{text}");
    assert!(cluster.etcd.keys("subnets/").is_empty());
}
