//! `loden doctor`: every cause is made for real, and named; nothing is named where nothing is wrong. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;
#[path = "common/relay.rs"]
mod relay;
#[path = "common/seeded.rs"]
mod seeded;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{LODEN, lab, spec};
use loden::lab::process::Tracked;
use loden::lab::{Backend, Interrupt, Lab, Member, Spec, Wire, wait};
use relay::{Fault, Relay};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

/// How often a doctor is asked until it names what is there and nothing else: a daemon that stands still for longer than
/// answers are waited for is no better to it than a faulty wire. Once where nobody else works (`LODEN_ALONE`, which
/// `scripts/soak doctor` sets).
fn attempts() -> u32 {
    match std::env::var_os("LODEN_ALONE") {
        Some(_) => 1,
        None => 4,
    }
}

/// Nodes on a wire that segments and does not merge, so that a rule sees the datagrams that a switch would.
fn up(nodes: u8, backend: Backend) -> Lab {
    let spec = Spec {
        wire: Wire::PacketNoGro,
        ..spec(nodes, backend)
    };
    let mut lab = lab(spec);
    lab.await_connected().unwrap();
    for node in lab.spec().node_members() {
        lab.run(node, "sysctl", &["-qw", "net.ipv4.ip_forward=1"])
            .unwrap();
    }
    // Everybody has probed everybody.
    for node in 1..=nodes {
        wait::until("probes", LIMIT, &Interrupt::default(), || {
            let peers = status(&lab, node)["peers"].as_array().cloned();
            let peers = peers.unwrap_or_default();
            let answers = |peer: &Value| {
                let reach = &peer["probe"]["reach"];
                // Some were late.
                reach == "answers" || reach == "loses"
            };
            let all = peers.iter().all(answers);
            Ok((all && peers.len() + 1 == usize::from(nodes)).then_some(()))
        })
        .unwrap();
    }
    lab
}

fn status(lab: &Lab, node: u8) -> Value {
    let mut command = Command::new(LODEN);
    command
        .args(["status", "--json", "--socket"])
        .arg(lab.status_socket(node));
    serde_json::from_slice(&command.output().unwrap().stdout).unwrap_or_default()
}

/// What a node's doctor says, and whether all is well by its exit status.
fn doctor(lab: &Lab, node: u8, args: &[&str]) -> (Value, bool) {
    let mut errors = String::new();
    // A daemon that is busy says so, and is asked again.
    let asked = wait::until("an answer", LIMIT, &Interrupt::default(), || {
        let mut command = Command::new(LODEN);
        command
            .args(["doctor", "--json", "--socket"])
            .arg(lab.status_socket(node))
            .args(args);
        let output = command.output().unwrap();
        errors = String::from_utf8(output.stderr).unwrap();
        let answer: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        Ok(answer.map(|answer| (answer, output.status.success())))
    });
    let (answer, ok) = asked.unwrap_or_else(|_| unreachable!("{args:?}: {errors}"));
    assert_eq!(answer["healthy"], ok, "{answer}");
    (answer, ok)
}

/// Asks a node's doctor until it says what it should.
fn says(lab: &Lab, node: u8, args: &[&str], what: &str, is_said: impl Fn(&Value, bool) -> bool) {
    let mut last = Value::Null;
    let said = (0..attempts()).any(|_| {
        let (answer, ok) = doctor(lab, node, args);
        let said = is_said(&answer, ok);
        last = answer;
        said
    });
    assert!(said, "{what}: {last:#}");
}

fn is_healthy(lab: &Lab, node: u8) {
    says(lab, node, &[], "healthy", |_, ok| ok);
}

/// The causes that a node names, of all its peers.
fn causes(answer: &Value) -> BTreeSet<String> {
    let peers = answer["peers"].as_array().unwrap().iter();
    let findings = peers.flat_map(|peer| peer["findings"].as_array().unwrap());
    findings
        .map(|finding| finding["cause"].as_str().unwrap().to_owned())
        .collect()
}

/// Asserts that a node names this cause and no other, with these words in what speaks for it.
fn names(lab: &Lab, node: u8, cause: &str, words: &str) {
    let what = format!("{cause}, by {words:?}");
    says(lab, node, &[], &what, |answer, _| {
        // Whoever waits has the answer in ten seconds, and may have to wait for a processor, too.
        let took = answer["took_ms"].as_u64().unwrap();
        assert!(took < LIMIT.as_millis().try_into().unwrap(), "{answer:#}");
        let text = answer["peers"].to_string();
        causes(answer) == BTreeSet::from([cause.to_owned()]) && text.contains(words)
    });
}

fn run(lab: &Lab, node: u8, line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    lab.run(Member::Node(node), words[0], &words[1..]).unwrap();
}

/// Drops on the way: before the node's own firewall, which therefore knows nothing of it.
fn on_the_way(lab: &Lab, node: u8, rule: &str) {
    let rule = format!(
        "table netdev way {{ chain c {{ type filter hook ingress device eth0 priority 0; {rule}; }}; }}"
    );
    lab.run(Member::Node(node), "nft", &[&rule]).unwrap();
}

fn no_longer_on_the_way(lab: &Lab, node: u8) {
    run(lab, node, "nft delete table netdev way");
}

fn kill(lab: &Lab, node: u8) {
    let pid = lab.daemon_pids()[usize::from(node) - 1].to_string();
    run(lab, node, &format!("kill -9 {pid}"));
    wait::until("its end", LIMIT, &Interrupt::default(), || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // All of its threads, which hold its files.
        let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        Ok((threads <= 1 && (stat.is_empty() || stat.contains(") Z "))).then_some(()))
    })
    .unwrap();
}

/// Starts a daemon in the place of the killed one, with its subnet.
fn start(lab: &Lab, node: u8, args: &[&str], env: &[(&str, &str)]) -> Tracked {
    let dir = lab.status_socket(node).parent().unwrap().to_path_buf();
    let mut command = Command::new(LODEN);
    command
        .args([
            "daemon",
            "--iface",
            "eth0",
            "--iptables-forward-rules=false",
            "--local-store",
        ])
        .arg(lab.dir().join("store"))
        .arg("--subnet-file")
        .arg(dir.join("subnet.env"))
        .arg("--status-socket")
        .arg(lab.status_socket(node))
        .args(args)
        .envs(env.iter().copied())
        .stdin(Stdio::null());
    lab.spawn(Member::Node(node), &format!("second-{node}"), &mut command)
        .unwrap()
}

/// What a node's daemons said, for a test that fails.
fn log(lab: &Lab, node: u8) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(lab.dir()).unwrap().flatten() {
        if entry.path().extension().is_some_and(|ext| ext == "log") {
            text += &fs::read_to_string(entry.path()).unwrap_or_default();
        }
    }
    text + &fs::read_to_string(lab.daemon_log(node)).unwrap()
}

fn wait_ready(lab: &Lab, node: u8) {
    wait::until("the daemon", LIMIT, &Interrupt::default(), || {
        Ok((status(lab, node)["ready"] == true).then_some(()))
    })
    .unwrap_or_else(|error| unreachable!("{error}: {}", log(lab, node)));
}

fn healthy(rounds: usize, attempts: u32) {
    for backend in [Backend::Udp, Backend::Vxlan, Backend::HostGw] {
        let lab = up(3, backend);
        healthy_on(&lab, &format!("{backend:?}"), rounds, attempts);
        if backend == Backend::Vxlan {
            let _daemons = change_to_proven_ways(&lab);
            healthy_on(&lab, "auto", rounds, attempts);
        }
    }
}

fn healthy_on(lab: &Lab, transport: &str, rounds: usize, attempts: u32) {
    for round in 0..rounds {
        let mut last = Value::Null;
        let healthy = (0..attempts).any(|_| {
            let (answer, ok) = doctor(lab, 1, &["--mesh"]);
            assert_eq!(answer["peers"].as_array().unwrap().len(), 2);
            assert_eq!(answer["mesh"].as_array().unwrap().len(), 3);
            let healthy = ok || attempts > 1 && is_late_at_most(&answer);
            last = answer;
            healthy
        });
        assert!(healthy, "{transport}, round {round}: {last:#}");
    }
}

/// Nothing is named, and if nodes see losses, then in the last eight background probes, some of which were late.
fn is_late_at_most(answer: &Value) -> bool {
    let rows = answer["mesh"].as_array().unwrap();
    let is_well = |cell: &Value| cell["reach"] == "answers" || cell["reach"] == "loses";
    let all_well = |row: &Value| {
        let cells = row["cells"].as_array().unwrap();
        row["silent"].is_null() && cells.iter().all(is_well)
    };
    causes(answer).is_empty()
        && answer["node"].as_array().unwrap().is_empty()
        && rows.iter().all(all_well)
}

/// Has the nodes, which are on one link, prove the way past the tunnel to each other.
fn change_to_proven_ways(lab: &Lab) -> Vec<Tracked> {
    let nodes = lab.spec().nodes;
    let config = r#"{"Network":"198.18.0.0/16","Backend":{"Type":"vxlan","Auto":true}}"#;
    fs::write(lab.dir().join("store/config"), config).unwrap();
    let change = |node| {
        kill(lab, node);
        start(lab, node, &["--vxlan=kernel"], &[])
    };
    let daemons = (1..=nodes).map(change).collect();
    for node in 1..=nodes {
        wait::until("proven ways", LIMIT, &Interrupt::default(), || {
            let peers = status(lab, node)["peers"].as_array().cloned();
            let peers = peers.unwrap_or_default();
            let is_direct = |peer: &Value| {
                let reach = &peer["probe"]["reach"];
                peer["transport"] == "route" && (reach == "answers" || reach == "loses")
            };
            let all = peers.iter().all(is_direct);
            Ok((all && peers.len() + 1 == usize::from(nodes)).then_some(()))
        })
        .unwrap_or_else(|error| unreachable!("{error}: {}", log(lab, node)));
    }
    daemons
}

#[test]
fn nothing_is_named_where_nothing_is_wrong() {
    healthy(2, attempts());
}

/// The long form, for scripts/soak.
#[test]
#[ignore = "a hundred rounds of each transport take minutes"]
fn nothing_is_named_in_many_rounds_where_nothing_is_wrong() {
    healthy(seeded::seeds(100).count(), 1);
}

#[test]
fn underlay_that_is_down_is_named_from_both_ends() {
    let lab = up(2, Backend::Udp);
    run(&lab, 2, "ip link set eth0 down");
    // The wire's other end has no carrier then, and the kernel no way.
    names(&lab, 1, "underlay_down", "192.0.2.2");
    run(&lab, 2, "ip link set eth0 up");
    run(&lab, 2, "ip addr flush dev eth0");
    names(&lab, 1, "underlay_down", "neither probes nor echoes");
}

#[test]
fn port_that_is_filtered_on_the_way_is_named_with_the_direction() {
    let lab = up(2, Backend::Udp);
    on_the_way(&lab, 2, "udp dport 8285 drop");
    names(&lab, 1, "port_filtered", "from us to it: we hear it");
    names(&lab, 2, "port_filtered", "from it to us: it hears us");
    on_the_way(&lab, 1, "udp dport 8285 drop");
    names(&lab, 1, "port_filtered", "both ways");
    no_longer_on_the_way(&lab, 1);
    no_longer_on_the_way(&lab, 2);
    is_healthy(&lab, 1);
}

#[test]
fn firewall_that_drops_the_tunnel_is_named_with_its_node() {
    let lab = up(2, Backend::Udp);
    let rule =
        "table inet host { chain in { type filter hook input priority 0; udp dport 8285 drop; }; }";
    lab.run(Member::Node(2), "nft", &[rule]).unwrap();
    names(&lab, 1, "firewall_drop", "on that node");
    // On the node itself, the rule is quoted.
    let cause = BTreeSet::from(["firewall_drop".to_owned()]);
    says(&lab, 2, &[], "its own firewall", |answer, _| {
        answer["node"].to_string().contains("8285 drop") && causes(answer) == cause
    });
}

#[test]
fn hole_for_long_packets_is_named_with_the_size_that_passes() {
    let lab = up(2, Backend::Udp);
    on_the_way(&lab, 2, "udp dport 8285 meta length > 1428 drop");
    names(&lab, 1, "mtu_black_hole", "up to 1400 get there");
}

#[test]
fn wrong_checksums_are_named() {
    let lab = up(2, Backend::Udp);
    // What an offload that does not finish its work leaves behind.
    run(&lab, 1, "ethtool -K eth0 tx off");
    on_the_way(&lab, 2, "udp dport 8285 udp checksum set 0x1234");
    names(&lab, 1, "checksum_corruption", "wrong checksum");
}

/// Leads what node 2 gets through a wire with a fault.
fn faulty_wire(lab: &Lab, fault: Fault) -> Relay {
    // What a device would still compute, nobody on that wire does.
    for node in [1, 2, 3] {
        run(lab, node, "ethtool -K eth0 tx off");
    }
    for line in [
        "link add r0 type veth peer name r1",
        "link set r0 master br0 up",
        "link set r1 up",
        "link set n2 nomaster",
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        lab.run(Member::Underlay, "ip", &words).unwrap();
    }
    Relay::start(&lab.netns(Member::Underlay), ["r1", "n2"], 8285, fault)
}

fn healed_wire(lab: &Lab, wire: Relay) {
    drop(wire);
    for line in ["link del r0", "link set n2 master br0"] {
        let words: Vec<&str> = line.split(' ').collect();
        lab.run(Member::Underlay, "ip", &words).unwrap();
    }
}

#[test]
fn bits_that_flip_on_the_wire_are_named_also_when_only_some_do() {
    let lab = up(3, Backend::Udp);
    let wire = faulty_wire(&lab, Fault::Corrupt(3));
    names(&lab, 1, "checksum_corruption", "its kernel dropped ");
    // From the other end it is our own kernel that sees them.
    let cause = BTreeSet::from(["checksum_corruption".to_owned()]);
    let of_first = ["--peer", "192.0.2.1"];
    says(&lab, 2, &of_first, "wrong checksums", |answer, _| {
        causes(answer) == cause
    });
    healed_wire(&lab, wire);
    let wire = faulty_wire(&lab, Fault::Corrupt(1));
    names(
        &lab,
        1,
        "checksum_corruption",
        "datagrams for a wrong checksum",
    );
    healed_wire(&lab, wire);
    is_healthy(&lab, 1);
}

#[test]
fn packets_that_overtake_each_other_are_counted_and_no_fault() {
    let lab = up(3, Backend::Udp);
    let _wire = faulty_wire(&lab, Fault::Reorder(3));
    let reordered = |answer: &Value| answer["peers"][0]["overlay"]["reordered"].as_u64();
    let of_second = ["--peer", "192.0.2.2"];
    says(&lab, 1, &of_second, "some reordered", |answer, ok| {
        ok && reordered(answer) > Some(0)
    });
    let of_third = ["--peer", "192.0.2.3"];
    says(&lab, 1, &of_third, "none reordered", |answer, _| {
        reordered(answer) == Some(0)
    });
    let mut text = String::new();
    let told = (0..attempts()).any(|_| {
        let mut command = Command::new(LODEN);
        command
            .args(["doctor", "--peer", "192.0.2.2", "--socket"])
            .arg(lab.status_socket(1));
        text = String::from_utf8(command.output().unwrap().stdout).unwrap();
        text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        text.contains(" reordered")
    });
    assert!(told, "{text}");
}

#[test]
fn peer_whose_daemon_is_gone_is_named_also_where_the_kernel_goes_on() {
    for (backend, words) in [
        (Backend::Udp, "nobody listens at the tunnel's port"),
        (Backend::Vxlan, "its kernel carries packets on"),
    ] {
        let lab = up(2, backend);
        kill(&lab, 2);
        names(&lab, 1, "peer_daemon_gone", words);
    }
}

#[test]
fn peer_that_does_not_forward_is_named_and_knows_it() {
    let lab = up(2, Backend::Udp);
    run(&lab, 2, "sysctl -qw net.ipv4.ip_forward=0");
    names(&lab, 1, "peer_not_forwarding", "does not forward");
    let (answer, ok) = doctor(&lab, 2, &[]);
    let text = answer["node"].to_string();
    assert!(
        !ok && text.contains("net.ipv4.ip_forward is 0"),
        "{answer:#}"
    );
}

#[test]
fn address_that_two_nodes_publish_is_named() {
    let lab = up(3, Backend::Udp);
    kill(&lab, 3);
    // The store gives it the lease of the node that has the address; its own of before stays until it expires.
    let _third = start(&lab, 3, &["--public-ip", "192.0.2.2"], &[]);
    wait_ready(&lab, 3);
    names(
        &lab,
        1,
        "duplicate_public_ip",
        "192.0.2.3 publishes 192.0.2.2",
    );
}

#[test]
fn lease_that_names_the_wrong_node_is_named() {
    let lab = up(2, Backend::Udp);
    kill(&lab, 2);
    // The second node moves to a copy of the store, and to another subnet there; in the first one, its lease stays.
    let (store, other) = (lab.dir().join("store"), lab.dir().join("other"));
    run(
        &lab,
        2,
        &format!("cp -r {} {}", store.display(), other.display()),
    );
    let subnet = lab.node_addr(2).unwrap().to_string();
    let (subnet, _) = subnet.rsplit_once('.').unwrap();
    for entry in fs::read_dir(other.join("subnets")).unwrap().flatten() {
        if entry.file_name().to_string_lossy().contains(subnet) {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    fs::remove_file(lab.status_socket(2).with_file_name("subnet.env")).unwrap();
    let other = other.display().to_string();
    let _second = start(&lab, 2, &["--local-store", &other], &[]);
    wait_ready(&lab, 2);
    names(&lab, 1, "wrong_lease", "the node there has 198.18.");
}

#[test]
fn answers_that_come_by_another_way_are_named() {
    let lab = up(2, Backend::Udp);
    let gateway = lab.node_addr(1).unwrap();
    let base = std::net::Ipv4Addr::from(u32::from(gateway) - 1);
    for node in [1, 2] {
        for device in ["all", "eth0"] {
            run(
                &lab,
                node,
                &format!("sysctl -qw net.ipv4.conf.{device}.rp_filter=0"),
            );
        }
    }
    run(&lab, 2, &format!("ip route add {base}/32 via 192.0.2.1"));
    names(&lab, 1, "asymmetric_path", "underlay");
}

/// A library that moves the wall clock of whoever loads it.
fn clock(lab: &Lab, seconds: i64) -> PathBuf {
    let (source, library) = (lab.dir().join("clock.c"), lab.dir().join("clock.so"));
    let code = format!(
        "#define _GNU_SOURCE\n#include <sys/syscall.h>\n#include <time.h>\n#include <unistd.h>\n\
         int clock_gettime(clockid_t id, struct timespec *t) {{\n\
         long r = syscall(SYS_clock_gettime, id, t);\n\
         if (r == 0 && id == CLOCK_REALTIME) t->tv_sec += {seconds};\nreturn r; }}\n"
    );
    fs::write(&source, code).unwrap();
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&source)
        .status();
    assert!(built.unwrap().success());
    library
}

#[test]
fn clock_that_is_far_off_is_named() {
    let lab = up(2, Backend::Udp);
    kill(&lab, 2);
    let library = clock(&lab, 3600);
    let _second = start(
        &lab,
        2,
        &[],
        &[("LD_PRELOAD", &library.display().to_string())],
    );
    wait_ready(&lab, 2);
    names(&lab, 1, "clock_off", "seconds ahead of ours");
}

#[test]
fn support_bundle_has_what_is_needed_and_none_of_the_planted_secrets() {
    let lab = up(2, Backend::Udp);
    // In the command line of the daemon, and in rules' comments.
    kill(&lab, 1);
    let _first = start(
        &lab,
        1,
        &["--kube-api-url", "https://user:planted-one@192.0.2.9"],
        &[],
    );
    wait_ready(&lab, 1);
    for comment in [
        "password=planted-two",
        "token: planted-three",
        "Bearer planted-four",
    ] {
        let rule = format!(
            "table inet host {{ chain c {{ type filter hook input priority 0; accept comment \"{comment}\"; }}; }}"
        );
        lab.run(Member::Node(1), "nft", &[&rule]).unwrap();
    }
    let path = lab.dir().join("bundle.tar");
    let mut command = Command::new(LODEN);
    command
        .args(["doctor", "--support-bundle"])
        .arg(&path)
        .arg("--socket")
        .arg(lab.status_socket(1));
    let output = lab
        .netns(Member::Node(1))
        .run(|| command.output())
        .unwrap()
        .unwrap();
    let list = Command::new("tar").arg("-tf").arg(&path).output().unwrap();
    let names = String::from_utf8(list.stdout).unwrap();
    for name in [
        "status.json",
        "doctor.json",
        "daemon/cmdline",
        "commands/ip_addr.txt",
        "commands/nft_list_ruleset.txt",
    ] {
        assert!(
            names.contains(&format!("loden-support/{name}\n")),
            "{name}: {names} {output:?}"
        );
    }
    let archive = fs::read(&path).unwrap();
    let text = String::from_utf8_lossy(&archive);
    assert!(text.contains("@192.0.2.9") && text.contains("accept comment"));
    assert!(!text.contains("planted"), "a secret is in the archive");
    // Never over a file that is there.
    let again = lab
        .netns(Member::Node(1))
        .run(|| command.output())
        .unwrap()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&again.stderr).contains("not there yet"),
        "{again:?}"
    );
}

#[test]
fn one_peer_can_be_asked_about_and_nobody_is_refused() {
    let lab = up(3, Backend::Udp);
    let (answer, _) = doctor(&lab, 1, &["--peer", "192.0.2.3"]);
    assert_eq!(answer["peers"].as_array().unwrap().len(), 1);
    assert_eq!(answer["peers"][0]["public"], "192.0.2.3");
    assert_eq!(answer["peers_in_all"], 2);
    let prints = |args: &[&str], is_right: fn(&str, bool) -> bool| {
        let mut last = String::new();
        let printed = (0..attempts()).any(|_| {
            let mut command = Command::new(LODEN);
            command.arg("doctor").args(args).arg("--socket");
            let output = command.arg(lab.status_socket(1)).output().unwrap();
            last = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            is_right(&last, output.status.success())
        });
        assert!(printed, "{args:?}: {last}");
    };
    prints(&["--peer", "203.0.113.9"], |text, ok| {
        !ok && text.contains("203.0.113.9 is nobody's")
    });
    // The matrix, as people see it; a few probes may have been late.
    prints(&["--mesh"], |text, _| {
        let text = text.replace('%', "+");
        [". + +", "+ . +", "+ + ."]
            .iter()
            .all(|row| text.contains(row))
    });
}
