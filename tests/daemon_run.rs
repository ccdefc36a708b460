//! The real daemon in namespaces of its own: what it promises at start, while it runs and at its end, and how
//! it answers misuse. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/node.rs"]
mod node;
#[path = "common/ns.rs"]
mod ns;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::UdpSocket;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};
use std::time::Instant;

use etherparse::{SlicedPacket, TransportSlice};
use loden::bench::process_clock;
use nix::sys::signal::Signal;
use node::{CONFIG, Daemon, LIMIT, LODEN, Node, failed};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

#[test]
fn device_routes_lease_and_files_are_the_originals_and_only_the_lease_and_subnet_env_stay() {
    let node = Node::new(CONFIG);
    let daemon = node.start(&["--iface", "eth0"]);
    let env = node.env();
    let subnet = node.env_value("FLANNEL_SUBNET");
    let base = subnet.replace(".1/24", ".0");
    assert_eq!(
        env,
        format!(
            "FLANNEL_NETWORK=198.18.0.0/16\nFLANNEL_SUBNET={subnet}\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
        )
    );
    assert_eq!(node.ns.addrs("flannel0"), [format!("{base}/32")]);
    let links = node.ns.json("link show dev flannel0");
    assert_eq!(links[0]["mtu"], 1472);
    assert_eq!(links[0]["txqlen"], 1000);
    assert_eq!(links[0]["inet6_addr_gen_mode"], "none");
    let routes = node.ns.json("-4 route show 198.18.0.0/16");
    assert_eq!(routes[0]["dev"], "flannel0");
    assert_eq!(routes[0]["scope"], "global");
    assert_eq!(routes[0]["protocol"], "boot");
    let lease = node.path("store/subnets").join(format!("{base}-24"));
    assert_eq!(
        fs::read_to_string(&lease).unwrap().trim_end(),
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#
    );
    assert_eq!(daemon.stop(), 0);
    node.assert_clean();
    assert_eq!(node.env(), env);
    assert!(lease.exists());

    let again = node.start(&["--iface", "eth0"]);
    assert_eq!(node.env(), env, "a restart keeps the subnet");
    assert_eq!(again.stop(), 0);
}

#[test]
fn dual_stack_network_over_an_ipv6_underlay_has_both_families_and_the_smaller_mtu() {
    let node = Node::new(
        r#"{"Network":"198.18.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"udp"}}"#,
    );
    let daemon = node.start(&["--iface", "2001:db8::1"]);
    assert_eq!(node.env_value("FLANNEL_MTU"), "1452");
    let addrs = node.ns.addrs("flannel0");
    assert_eq!(addrs.len(), 2, "{addrs:?}");
    assert!(
        addrs[0].ends_with(".0/32") && addrs[1].ends_with("::/128"),
        "{addrs:?}"
    );
    let routes = node.ns.json("-6 route show fd00:1::/48");
    assert_eq!(routes[0]["dev"], "flannel0");
    assert_eq!(node.status()["bind"], "[2001:db8::1]:8285");
    assert_eq!(daemon.stop(), 0);
    node.assert_clean();
}

#[test]
fn called_as_flanneld_it_takes_gos_flags_and_flannels_environment() {
    let node = Node::new(CONFIG);
    let flanneld = node.path("flanneld");
    symlink(LODEN, &flanneld).unwrap();
    let mut command = node.command(&flanneld, &["-v=1", "-iface-regex", "^eth"]);
    command.env("FLANNELD_PUBLIC_IP", "203.0.113.7");
    let daemon = node.spawn(command);
    daemon.wait_for_log("written: ready");
    assert_eq!(node.status()["lease"]["public"], "203.0.113.7");
    assert!(daemon.log().contains("DEBUG"), "-v=1 logs more");
    assert_eq!(daemon.stop(), 0);
}

#[test]
fn whatever_is_done_to_the_device_is_repaired_and_a_deleted_one_comes_back() {
    let node = Node::new(CONFIG);
    let daemon = node.start(&["--iface", "eth0"]);
    let picture = || {
        let links = node.ns.json("link show dev flannel0");
        let up = links[0]["flags"].as_array().unwrap().contains(&"UP".into());
        let routes = node.ns.json("-4 route show 198.18.0.0/16 dev flannel0");
        let (mtu, queue) = (&links[0]["mtu"], &links[0]["txqlen"]);
        format!(
            "{mtu} {queue} {up} {routes:?} {:?}",
            node.ns.addrs("flannel0")
        )
    };
    let healthy = picture();
    for deed in [
        "addr flush dev flannel0",
        "route flush dev flannel0",
        "link set flannel0 mtu 1300",
        "link set flannel0 txqueuelen 7",
        "link set flannel0 down",
        "addr add 198.18.60.1/24 dev flannel0",
    ] {
        node.ns.ip(deed);
        daemon.wait_until(deed, || picture() == healthy);
    }
    assert_eq!(node.status()["reopened"], 0);
    node.ns.ip("link del flannel0");
    daemon.wait_until("the device to come back", || {
        node.ns.try_ip("link show flannel0").status.success() && picture() == healthy
    });
    daemon.wait_until("status to tell", || node.status()["reopened"] == 1);
    assert_eq!(daemon.stop(), 0);
    node.assert_clean();
}

#[test]
fn missing_configuration_is_waited_for_with_one_line_and_a_signal_ends_the_wait() {
    let node = Node::new(CONFIG);
    fs::remove_file(node.path("store/config")).unwrap();
    let daemon = node.spawn(node.loden(&["--iface", "eth0"]));
    daemon.wait_for_log("no network configuration");
    assert_eq!(node.env(), "");
    // Whoever asks is told what is waited for.
    for command in ["status", "doctor"] {
        daemon.wait_until(command, || {
            let asked = Command::new(LODEN)
                .args([command, "--subnet-file"])
                .arg(node.path("run/subnet.env"))
                .output()
                .unwrap();
            assert_eq!(asked.status.code(), Some(1));
            let said = String::from_utf8_lossy(&asked.stderr);
            let expected = "the daemon runs, and is not ready: no lease yet: waiting for the network configuration: ";
            said.contains(expected)
        });
    }
    let checks = node.preflight(&[], &[]);
    let checks = String::from_utf8_lossy(&checks.stdout);
    assert!(checks.contains("one answers at "), "{checks}");
    node.configure(CONFIG);
    daemon.wait_for_log("written: ready");
    node.status();
    assert_eq!(daemon.log().matches("no network configuration").count(), 1);
    assert_eq!(daemon.stop(), 0);

    fs::remove_file(node.path("store/config")).unwrap();
    let waiting = node.spawn(node.loden(&["--iface", "eth0"]));
    waiting.wait_for_log("no network configuration");
    assert_eq!(waiting.stop(), 0);
    node.assert_clean();
}

#[test]
fn lost_lease_is_replaced_by_another_without_an_exit() {
    let node = Node::new(CONFIG);
    let daemon = node.start(&["--iface", "eth0"]);
    let before = node.env_value("FLANNEL_SUBNET");
    let key = before.replace(".1/24", ".0-24");
    // Another node takes it, as after a restored backup of the store.
    let lease = node.path("store/subnets").join(&key);
    let sidecar = node.path("store/expiry").join(&key);
    let _gone = fs::remove_file(&sidecar);
    // In one step: a file seen half-written is damage, and the daemon repairs what is its own.
    let restored = node.path("restored");
    fs::write(&restored, r#"{"PublicIP":"192.0.2.99","PublicIPv6":null}"#).unwrap();
    fs::rename(&restored, &lease).unwrap();
    daemon.wait_until("another subnet", || {
        node.env_value("FLANNEL_SUBNET") != before
    });
    let base = node.env_value("FLANNEL_SUBNET").replace(".1/24", ".0/32");
    daemon.wait_until("the device to follow", || {
        node.ns.addrs("flannel0") == [base.clone()]
    });
    assert!(daemon.log().contains("is lost"), "{}", daemon.log());
    assert_eq!(daemon.stop(), 0);
    node.assert_clean();
}

#[test]
fn status_tells_every_reason_for_a_drop_with_its_remedy_and_why_this_interface() {
    let node = Node::new(CONFIG);
    fs::create_dir_all(node.path("store/subnets")).unwrap();
    let put = |key: &str, value: &str| {
        fs::write(node.path("store/subnets").join(key), value).unwrap();
    };
    put(
        "198.18.7.0-24",
        r#"{"PublicIP":"192.0.2.7","PublicIPv6":null}"#,
    );
    put(
        "203.0.113.0-24",
        r#"{"PublicIP":"192.0.2.8","PublicIPv6":null}"#,
    );
    put("198.18.9.0-24", "no json");
    let daemon = node.start(&["--iface", "eth9", "--iface", "eth0", "--engine", "portable"]);
    // Ready before the store has listed any, if that takes long.
    daemon.wait_until("the peer", || {
        node.status()["peers"] != Value::Array(Vec::new())
    });
    let status = node.status();
    assert_eq!(status["ready"], true);
    assert_eq!(status["interface"]["name"], "eth0");
    let candidates = status["candidates"].as_array().unwrap().iter();
    let candidates = candidates.map(|one| one["name"].as_str().unwrap());
    // The device itself is among them where addresses have changed since it was made.
    let others = candidates.filter(|&name| name != "flannel0");
    let all = BTreeSet::from(["lo", "eth0", "far"]);
    assert_eq!(others.collect::<BTreeSet<_>>(), all);
    assert_eq!(status["datapath"]["engine"], "portable");
    assert_eq!(status["devices"][0]["tx_dropped"], 0);
    let peers = status["peers"].as_array().unwrap();
    assert_eq!(peers.len(), 1, "{peers:?}");
    assert_eq!(peers[0]["endpoint"], "192.0.2.7:8285");
    let refused = status["refused"].to_string();
    assert!(
        refused.contains("203.0.113.0") && refused.contains("198.18.9.0-24"),
        "{refused}"
    );
    let drops = status["drops"].as_array().unwrap();
    assert_eq!(drops.len(), loden::datapath::DropReason::COUNT);
    assert!(
        drops
            .iter()
            .all(|drop| !drop["remedy"].as_str().unwrap().is_empty())
    );

    let mut text = String::new();
    daemon.wait_until("an answer at the socket", || {
        let mut command = Command::new(LODEN);
        command.args(["status", "--socket"]);
        let output = command.arg(node.path("run/subnet.sock")).output().unwrap();
        text = String::from_utf8(output.stdout).unwrap();
        output.status.success()
    });
    assert!(
        text.contains("198.18.7.0/24") && text.contains("not lo:"),
        "{text}"
    );
    assert!(
        text.lines().all(|line| line.chars().count() <= 100),
        "{text}"
    );
    assert_eq!(daemon.stop(), 0);
}

#[test]
fn second_daemon_on_the_same_subnet_file_is_refused_by_name_and_the_first_unharmed() {
    let node = Node::new(CONFIG);
    let first = node.start(&["--iface", "eth0"]);
    let env = node.env();
    let (code, error) = node.fails(&["--iface", "eth0"]);
    assert_eq!(code, 1);
    assert!(error.contains("another daemon (pid"), "{error}");
    assert!(error.contains("subnet.env"), "{error}");
    assert_eq!(node.env(), env);
    assert_eq!(node.status()["ready"], true);
    assert_eq!(first.stop(), 0);
    node.assert_clean();
}

#[test]
fn second_daemon_on_the_same_network_or_port_is_refused_before_it_writes_anything() {
    let node = Node::new(CONFIG);
    let first = node.start(&["--iface", "eth0"]);
    // The network first, for that is what two daemons on one node share by default.
    let other = node.path("run/other.env");
    let other_env = ["--iface", "eth0", "--subnet-file", other.to_str().unwrap()];
    // As another node, too, it would take a lease that nobody serves.
    node.ns.ip("addr add 192.0.2.77/24 dev eth0");
    let other_node = [&other_env[..], &["--public-ip", "192.0.2.77"]].concat();
    for args in [&other_env[..], &other_node] {
        let (code, error) = node.fails(args);
        assert_eq!(code, 1);
        assert!(error.contains("198.18.0.0/16 on flannel0"), "{error}");
        let leases = fs::read_dir(node.path("store/subnets")).unwrap().count();
        assert_eq!(leases, 1, "{args:?}");
    }

    let store = node.path("other-store");
    fs::create_dir(&store).unwrap();
    fs::write(store.join("config"), CONFIG.replace("198.18", "198.19")).unwrap();
    let other_store = ["--local-store", store.to_str().unwrap()];
    let (code, error) = node.fails(&[&other_env[..], &other_store].concat());
    assert_eq!(code, 1);
    assert!(error.contains("192.0.2.1:8285"), "{error}");
    assert!(!other.exists());
    assert_eq!(first.stop(), 0);
}

#[test]
fn second_daemon_with_another_network_leaves_the_traffic_rules_to_the_first() {
    let nft = |network: &str, port: u16| {
        format!(
            r#"{{"Network":"{network}","EnableNFTables":true,"Backend":{{"Type":"udp","Port":{port}}}}}"#
        )
    };
    let node = Node::new(&nft("198.18.0.0/16", 8285));
    let rules = || {
        let list = ["netns", "exec", node.ns.name(), "nft", "list", "ruleset"];
        let output = Command::new("ip").args(list).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let first = node.start(&["--iface", "eth0", "--ip-masq"]);
    let before = rules();
    assert!(before.contains("198.18.0.0/16 ip daddr"), "{before}");

    let store = node.path("other-store");
    fs::create_dir(&store).unwrap();
    fs::write(store.join("config"), nft("198.19.0.0/16", 8286)).unwrap();
    let env = node.path("run/other.env");
    let [store, env] = [&store, &env].map(|path| path.to_str().unwrap());
    let other = [
        "--iface",
        "eth0",
        "--local-store",
        store,
        "--subnet-file",
        env,
    ];
    let (code, error) = node.fails(&[&other[..], &["--ip-masq"]].concat());
    assert_eq!(code, 1);
    let pid = format!("another daemon (pid {})", first.child.id());
    for part in [pid.as_str(), "traffic rules", "--ip-masq=false"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // Without rules of its own it runs, and neither touches what the other has.
    for args in [&[][..], &["--iptables-forward-rules=false"]] {
        let log = node.path("other-log");
        let mut command = node.loden(&[&other[..], args].concat());
        let child = command.stderr(fs::File::create(&log).unwrap()).spawn();
        let second = Daemon {
            child: child.unwrap(),
            log,
        };
        second.wait_for_log("written: ready");
        assert_eq!(second.log().contains("no forward rules"), args.is_empty());
        assert_eq!(node.ns.addrs("flannel1").len(), 1);
        assert_eq!(rules(), before);
        assert_eq!(second.stop(), 0);
    }
    assert_eq!(rules(), before);
    assert!(!first.log().contains("repaired"), "{}", first.log());
    assert_eq!(first.stop(), 0);

    // What nobody keeps any more, it takes over.
    let second = node.spawn(node.loden(&[&other[..], &["--ip-masq"]].concat()));
    second.wait_for_log("written: ready");
    assert_eq!(rules().matches("198.18.0.0/16").count(), 0);
    assert!(rules().contains("198.19.0.0/16 ip daddr"));
    assert_eq!(second.stop(), 0);
}

#[test]
fn what_a_killed_daemon_leaves_behind_does_not_hinder_the_next() {
    let node = Node::new(CONFIG);
    let mut killed = node.start(&["--iface", "eth0"]);
    let env = node.env();
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    assert!(node.path("run/subnet.sock").exists() && node.path("run/.subnet.env.lock").exists());
    let daemon = node.start(&["--iface", "eth0"]);
    assert_eq!(node.status()["ready"], true);
    assert_eq!(node.env(), env);
    assert_eq!(daemon.stop(), 0);
    node.assert_clean();
}

#[test]
fn second_signal_ends_the_daemon_at_once() {
    let node = Node::new(CONFIG);
    // Unless something lets it run in between, both are pending when it runs again, and it gets no time to end by the first.
    let ends_at_once = || {
        let mut daemon = node.start(&["--iface", "eth0"]);
        for signal in [
            Signal::SIGSTOP,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGCONT,
        ] {
            daemon.signal(signal);
        }
        let status = daemon.exit_status();
        assert!(status.success() || status.signal().is_some(), "{status}");
        status.signal().is_some()
    };
    assert!((0..10).any(|_| ends_at_once()));
}

#[test]
fn missing_tun_device_is_named_with_the_module_that_brings_it() {
    let node = Node::new(CONFIG);
    let hide = "mount -t tmpfs none /dev/net && exec \"$@\"";
    let inner = node.loden(&["--iface", "eth0"]);
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", hide, "sh"]);
    command.arg(inner.get_program()).args(inner.get_args());
    let (code, error) = failed(command);
    assert_eq!(code, 1, "{error}");
    assert!(
        error.contains("/dev/net/tun") && error.contains("modprobe tun"),
        "{error}"
    );
    assert_eq!(node.env(), "");
    node.assert_clean();
}

#[test]
fn misuse_ends_with_one_line_that_names_the_thing_and_leaves_nothing() {
    let other_port = r#"{"Network":"198.18.0.0/16","Backend":{"Type":"udp","Port":70000}}"#;
    for (config, args, names) in [
        (CONFIG, &["--iface", "eth9"][..], "eth9"),
        (CONFIG, &["--public-ip", "203.0.113.9"], "203.0.113.9"),
        (CONFIG, &[], "default route"),
        (
            r#"{"Network":"198.18.0.0/33"}"#,
            &["--iface", "eth0"],
            "Network",
        ),
        (r#"{"Network":"#, &["--iface", "eth0"], "config"),
        (other_port, &["--iface", "eth0"], "Port"),
        (
            r#"{"Network":"198.18.0.0/16","Backend":{"Type":"ipsec"}}"#,
            &["--iface", "eth0"],
            "ipsec",
        ),
        (
            r#"{"Network":"192.0.0.0/16"}"#,
            &["--iface", "eth0"],
            "192.0.2.1",
        ),
    ] {
        let node = Node::new(config);
        let (code, error) = node.fails(args);
        assert_eq!(code, 1, "{args:?} {config}: {error}");
        assert!(
            error.starts_with("loden: ") && error.contains(names),
            "{names}: {error}"
        );
        assert_eq!(node.env(), "");
        assert!(!node.path("store/subnets").exists(), "no lease was taken");
        node.assert_clean();
    }
}

#[test]
fn every_wrong_value_of_the_configuration_is_named_by_its_key() {
    let udp = |option: &str| {
        format!(r#"{{"Network":"198.18.0.0/16","Backend":{{"Type":"udp",{option}}}}}"#)
    };
    let top = |option: &str| format!(r#"{{"Network":"198.18.0.0/16",{option}}}"#);
    let node = Node::new(CONFIG);
    for (config, key) in [
        (udp(r#""Port":"x""#), "Backend.Port"),
        (udp(r#""Port":0.5"#), "Backend.Port"),
        (udp(r#""MTU":7"#), "Backend.MTU"),
        (udp(r#""SourcePort":"any""#), "Backend.SourcePort"),
        (udp(r#""SourceCheck":1"#), "Backend.SourceCheck"),
        (top(r#""SubnetLen":31"#), "SubnetLen"),
        (top(r#""SubnetLen":"24""#), "SubnetLen"),
        (top(r#""SubnetMin":"198.19.0.0""#), "SubnetMin"),
        (top(r#""SubnetMax":"198.19.0.0""#), "SubnetMax"),
        (top(r#""EnableIPv6":true"#), "IPv6Network"),
        (top(r#""EnableIPv4":false"#), "EnableIPv4"),
        (top(r#""Backend":{"Type":"warp"}"#), "Backend.Type"),
        (top(r#""Backend":7"#), "Backend"),
    ] {
        node.configure(&config);
        let (code, error) = node.fails(&["--iface", "eth0"]);
        assert_eq!(code, 1, "{config}: {error}");
        assert!(error.contains(key), "{config}: {error}");
        assert!(error.contains("store/config"), "{config}: {error}");
    }
    assert_eq!(node.env(), "");
    node.assert_clean();
}

#[test]
fn idle_daemon_uses_less_than_two_percent_of_a_processor() {
    let node = Node::new(CONFIG);
    for engine in ["mmsg", "portable"] {
        let daemon = node.start(&["--iface", "eth0", "--engine", engine]);
        let pid = [i32::try_from(daemon.child.id()).unwrap()];
        let used = || process_clock::total(&pid).unwrap();
        let (begun, before) = (Instant::now(), used());
        // Long enough for a look at the store and most of the way to one at the device.
        let slept = Command::new("sleep").arg("6").status().unwrap();
        assert!(slept.success());
        let (spent, span) = (used() - before, begun.elapsed());
        assert!(spent * 50 < span, "{engine}: {spent:?} in {span:?}");
        assert_eq!(daemon.stop(), 0);
    }
}

#[test]
fn verbosity_adds_reasons_and_neither_level_tells_of_others_packets_or_panics() {
    let node = Node::new(CONFIG);
    let mut before = 0;
    for v in ["0", "1", "2"] {
        let daemon = node.start(&["--iface", "eth0", "-v", v]);
        node.status();
        let log = daemon.log.clone();
        assert_eq!(daemon.stop(), 0);
        let log = fs::read_to_string(log).unwrap();
        assert!(!log.contains("panicked"), "{log}");
        assert_eq!(log.contains(" DEBUG "), v != "0", "{log}");
        let foreign = log.lines().find(|line| {
            let target = line.split_whitespace().nth(2).unwrap_or_default();
            v != "0" && !target.starts_with("loden::")
        });
        assert_eq!(foreign, None, "only our own modules speak");
        // What comes later depends on how long it ran.
        let (start, _) = log.split_once("written: ready").unwrap();
        let reasons = start.matches(" DEBUG ").count() + start.matches(" TRACE ").count();
        assert!(reasons >= before, "{log}");
        before = reasons;
    }
}

#[test]
fn route_in_the_way_is_named_with_the_command_that_removes_it() {
    let node = Node::new(CONFIG);
    node.ns.ip("route add 198.18.0.0/16 dev far");
    let (code, error) = node.fails(&["--iface", "eth0"]);
    assert_eq!(code, 1, "{error}");
    assert!(
        error.contains("ip route del 198.18.0.0/16 dev far"),
        "{error}"
    );
    assert_eq!(node.env(), "");
    node.ns.ip("route del 198.18.0.0/16 dev far");
    node.assert_clean();

    node.ns.ip("route add 198.18.77.0/24 dev far");
    let daemon = node.start(&["--iface", "eth0"]);
    assert!(
        node.status()["conflicts"]
            .to_string()
            .contains("198.18.77.0/24 on far")
    );
    assert_eq!(daemon.stop(), 0);
}

#[test]
fn address_that_leaves_the_external_interface_is_told_and_so_is_its_return() {
    let node = Node::new(CONFIG);
    let daemon = node.start(&["--iface", "eth0"]);
    node.ns.ip("addr flush dev eth0");
    daemon.wait_for_log("192.0.2.1 is gone");
    assert!(
        node.status()["conflicts"]
            .to_string()
            .contains("192.0.2.1 is gone")
    );
    node.ns.ip("addr add 192.0.2.1/24 dev eth0");
    daemon.wait_for_log("is back");
    assert_eq!(node.status()["conflicts"], Value::Array(Vec::new()));
    assert_eq!(daemon.stop(), 0);
}

#[test]
fn address_that_changes_moves_the_lease_in_the_local_store_too() {
    let node = Node::new(CONFIG);
    let daemon = node.start(&["--iface", "eth0"]);
    let env = node.env();
    let key = node.env_value("FLANNEL_SUBNET").replace(".1/24", ".0-24");
    let lease = node.path("store/subnets").join(&key);
    node.ns.ip("addr add 198.51.100.5/24 dev eth0");
    node.ns.ip("addr del 192.0.2.1/24 dev eth0");
    daemon.wait_until("the lease to name the new address", || {
        fs::read_to_string(&lease)
            .is_ok_and(|text| text == r#"{"PublicIP":"198.51.100.5","PublicIPv6":null}"#)
    });
    daemon.wait_until("the tunnel to follow", || {
        let status = node.status();
        status["ready"] == true && status["bind"] == "198.51.100.5:8285"
    });
    assert_eq!(node.env(), env, "the subnet stays");
    daemon.wait_until("calm", || {
        node.status()["conflicts"] == Value::Array(Vec::new())
    });
    assert_eq!(daemon.stop(), 0);
    // The next run finds it under the new address.
    let again = node.start(&["--iface", "eth0"]);
    assert_eq!(node.env(), env);
    assert_eq!(fs::read_dir(node.path("store/subnets")).unwrap().count(), 1);
    assert_eq!(again.stop(), 0);
    node.assert_clean();
}

#[test]
fn external_interface_that_gets_another_name_is_followed() {
    let node = Node::new(CONFIG);
    node.ns.ip("route add default via 192.0.2.254 dev eth0");
    let daemon = node.start(&[]);
    let env = node.env();
    for deed in [
        "link set eth0 down",
        "link set eth0 name uplink",
        "link set uplink up",
        "route replace default via 192.0.2.254 dev uplink",
    ] {
        node.ns.ip(deed);
    }
    daemon.wait_until("the new name", || {
        let status = node.status();
        status["interface"]["name"] == "uplink" && status["ready"] == true
    });
    assert_eq!(node.env(), env);
    let conflicts = || node.status()["conflicts"].clone();
    daemon.wait_until("calm", || conflicts() == Value::Array(Vec::new()));
    assert_eq!(daemon.stop(), 0);
    node.assert_clean();
}

#[test]
fn mtu_of_the_external_interface_that_changes_is_followed_by_subnet_env_and_the_device() {
    let node = Node::new(CONFIG);
    let daemon = node.start(&["--iface", "eth0"]);
    let before = node.env();
    let mtu = || node.ns.link("flannel0")["mtu"].as_u64();
    assert_eq!(mtu(), Some(1472));
    for (underlay, overlay) in [(1400, 1372), (9000, 8972), (1500, 1472)] {
        node.ns.ip(&format!("link set eth0 mtu {underlay}"));
        let expected = before.replace("MTU=1472", &format!("MTU={overlay}"));
        daemon.wait_until("subnet.env to follow", || node.env() == expected);
        daemon.wait_until("the device to follow", || mtu() == Some(overlay));
        daemon.wait_until("readiness", || node.status()["ready"] == true);
    }
    // One that leaves no room is told, and changes nothing.
    node.ns.ip("link set eth0 mtu 80");
    daemon.wait_for_log("an underlay MTU of 80");
    assert_eq!((node.env(), mtu()), (before, Some(1472)));
    assert_eq!(daemon.stop(), 0);
    node.assert_clean();
}

/// The source ports of the tunnel's datagrams on the wire, for 40 inner flows of 3 packets each.
fn source_ports(node: &Node, daemon: &Daemon) -> BTreeSet<u16> {
    const FLOWS: usize = 40;
    let far = node.ns.link("far")["address"].as_str().unwrap().to_owned();
    node.ns
        .ip(&format!("neigh replace 192.0.2.7 lladdr {far} dev eth0"));
    daemon.wait_until("the peer", || {
        node.status()["peers"][0]["endpoint"] == "192.0.2.7:8285"
    });
    let base = node.env_value("FLANNEL_SUBNET").replace(".1/24", ".0");
    node.ns.run(|| {
        // Sees what arrives at the wire's other end, from the IP header on.
        let ipv4 = Protocol::from(i32::from(0x0800_u16.to_be()));
        let mut wire = Socket::new(Domain::PACKET, Type::DGRAM, Some(ipv4)).unwrap();
        wire.set_read_timeout(Some(LIMIT)).unwrap();
        let flows: Vec<UdpSocket> = (0..FLOWS)
            .map(|_| UdpSocket::bind((base.as_str(), 0)).unwrap())
            .collect();
        let mut outer = BTreeSet::new();
        let mut inner = BTreeMap::new();
        for _ in 0..3 {
            for flow in &flows {
                flow.send_to(b"who", "198.18.7.2:9").unwrap();
                let (udp, inside) = loop {
                    let mut packet = [0; 2048];
                    let len = match wire.read(&mut packet) {
                        Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                        len => len.unwrap(),
                    };
                    let sliced = SlicedPacket::from_ip(&packet[..len]).unwrap();
                    // The daemon probes its peers, too.
                    if let Some(TransportSlice::Udp(udp)) = sliced.transport
                        && udp.destination_port() == 8285
                        && let Some(TransportSlice::Udp(inside)) =
                            SlicedPacket::from_ip(udp.payload()).unwrap().transport
                        && inside.destination_port() == 9
                    {
                        break (udp.source_port(), inside.source_port());
                    }
                };
                outer.insert(udp);
                assert_eq!(
                    *inner.entry(inside).or_insert(udp),
                    udp,
                    "one flow, one port"
                );
            }
        }
        assert_eq!(inner.len(), FLOWS);
        outer
    })
}

#[test]
fn source_port_fixed_uses_the_tunnels_own_and_spread_uses_several() {
    let config = |choice| CONFIG.replace(r#""udp""#, &format!(r#""udp","SourcePort":"{choice}""#));
    let node = Node::new(&config("fixed"));
    fs::create_dir_all(node.path("store/subnets")).unwrap();
    let peer = node.path("store/subnets/198.18.7.0-24");
    fs::write(peer, r#"{"PublicIP":"192.0.2.7","PublicIPv6":null}"#).unwrap();
    for engine in ["mmsg", "portable"] {
        let args = ["--iface", "eth0", "--workers", "2", "--engine", engine];
        let daemon = node.start(&args);
        assert_eq!(source_ports(&node, &daemon), [8285].into(), "{engine}");
        assert_eq!(daemon.stop(), 0);
    }
    node.configure(&config("spread"));
    let daemon = node.start(&["--iface", "eth0", "--workers", "2"]);
    let spread = source_ports(&node, &daemon);
    assert!(spread.len() >= 4, "{spread:?}");
    assert_eq!(daemon.stop(), 0);
    node.assert_clean();
}

#[test]
fn port_that_is_taken_is_named_with_its_remedy() {
    let node = Node::new(CONFIG);
    let held = node.ns.run(|| UdpSocket::bind("192.0.2.1:8285").unwrap());
    let (code, error) = node.fails(&["--iface", "eth0"]);
    drop(held);
    assert_eq!(code, 1, "{error}");
    assert!(
        error.contains("192.0.2.1:8285") && error.contains("ss -ulnp"),
        "{error}"
    );
    assert_eq!(node.env(), "");
    node.assert_clean();
}

#[test]
fn place_for_the_subnet_file_that_cannot_be_written_is_named_before_anything_happens() {
    let node = Node::new(CONFIG);
    fs::remove_dir(node.path("run")).unwrap();
    fs::File::create(node.path("run"))
        .unwrap()
        .write_all(b"x")
        .unwrap();
    let (code, error) = node.fails(&["--iface", "eth0"]);
    assert_eq!(code, 1, "{error}");
    assert!(
        error.contains("run") && error.contains("--subnet-file"),
        "{error}"
    );
    assert!(!node.path("store/subnets").exists(), "no lease was taken");
}

#[test]
fn usage_errors_end_with_2_and_the_nearest_flag_and_help_with_0() {
    let run = |args: &[&str]| -> Output { Command::new(LODEN).args(args).output().unwrap() };
    let unknown = run(&["daemon", "--subnet-fiel", "x"]);
    assert_eq!(unknown.status.code(), Some(2));
    let text = String::from_utf8_lossy(&unknown.stderr);
    assert!(text.contains("--subnet-file"), "{text}");
    for args in [
        &["--help"][..],
        &["daemon", "--help"],
        &["status", "--help"],
    ] {
        let help = run(args);
        assert_eq!(help.status.code(), Some(0), "{args:?}");
        assert!(help.stdout.starts_with(b"") && !help.stdout.is_empty());
    }
    let none = run(&["status", "--socket", "/nonexistent/subnet.sock"]);
    assert_eq!(none.status.code(), Some(1));
    let text = String::from_utf8_lossy(&none.stderr);
    assert!(text.contains("/nonexistent/subnet.sock"), "{text}");
}
