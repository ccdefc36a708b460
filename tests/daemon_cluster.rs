//! Daemons of several nodes, with a pod behind each: what their traffic survives, and what a store that others
//! write to may do to it. Counts packets, never time. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{LODEN, lab, pings, spec};
use loden::lab::{Backend, Interrupt, Lab, Member, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Only a failing test waits this long. Longer than the store waits for the rest of a half-synchronised claim.
const LIMIT: Duration = Duration::from_secs(60);

/// Nodes with a pod each, in the subnet 198.18.N.0/24 that the daemon of node N is made to ask for.
struct Cluster {
    // First, so that the daemons end before their namespaces.
    daemons: Vec<Option<Daemon>>,
    lab: Lab,
}

struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already reaped, if the test went well.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Daemon {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }
}

impl Cluster {
    /// Nodes whose stores are the directories named, each started with its own extra arguments.
    fn new(nodes: &[(&str, &[&str])]) -> Self {
        let count = u8::try_from(nodes.len()).unwrap();
        let mut cluster = Self {
            daemons: Vec::new(),
            lab: lab(spec(count, Backend::None)),
        };
        for (n, (store, _)) in (1..).zip(nodes) {
            cluster.make_store(store);
            fs::create_dir(cluster.file(n, "")).unwrap();
            // As a run before would have left it.
            let env = format!("FLANNEL_NETWORK=198.18.0.0/16\nFLANNEL_SUBNET=198.18.{n}.1/24\n");
            fs::write(cluster.file(n, "subnet.env"), env).unwrap();
        }
        for (n, (store, args)) in (1..).zip(nodes) {
            let daemon = cluster.start(n, store, args);
            cluster.daemons.push(Some(daemon));
        }
        cluster
    }

    fn make_store(&self, name: &str) {
        let dir = self.store(name);
        fs::create_dir_all(dir.join("subnets")).unwrap();
        let config = r#"{"Network":"198.18.0.0/16","Backend":{"Type":"udp"}}"#;
        fs::write(dir.join("config"), config).unwrap();
    }

    fn store(&self, name: &str) -> PathBuf {
        self.lab.dir().join(name)
    }

    fn file(&self, n: u8, name: &str) -> PathBuf {
        self.lab.dir().join(format!("node{n}")).join(name)
    }

    fn start(&self, n: u8, store: &str, args: &[&str]) -> Daemon {
        let log = self.file(n, "log");
        let file = fs::File::create(&log).unwrap();
        let mut command = Command::new(LODEN);
        command
            .args(["daemon", "--iface", "eth0", "--local-store"])
            .arg(self.store(store))
            .arg("--subnet-file")
            .arg(self.file(n, "subnet.env"))
            .args(args)
            .stdin(Stdio::null())
            .stderr(file);
        let netns = self.lab.netns(Member::Node(n));
        let child = netns.spawn(&mut command).unwrap();
        Daemon { child, log }
    }

    fn daemon(&self, n: u8) -> &Daemon {
        self.daemons[usize::from(n) - 1].as_ref().unwrap()
    }

    /// Takes the daemon of a node out, to be ended by the test.
    fn take(&mut self, n: u8) -> Daemon {
        self.daemons[usize::from(n) - 1].take().unwrap()
    }

    fn put(&mut self, n: u8, daemon: Daemon) {
        self.daemons[usize::from(n) - 1] = Some(daemon);
    }

    fn wait_until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let waited = wait::until(what, LIMIT, &Interrupt::default(), || {
            Ok(condition().then_some(()))
        });
        let logs: Vec<String> = self.daemons.iter().flatten().map(Daemon::log).collect();
        assert!(waited.is_ok(), "no {what}; logs:\n{}", logs.join("\n---\n"));
    }

    fn wait_for_traffic(&self) {
        self.wait_until("traffic between the pods", || {
            pings(&self.lab, Member::Pod(1, 1), (2, 1))
                && pings(&self.lab, Member::Pod(2, 1), (1, 1))
        });
    }

    /// What `loden status` prints for a node.
    fn told(&self, n: u8, args: &[&str]) -> String {
        let told = wait::until("an answer", LIMIT, &Interrupt::default(), || {
            let mut command = Command::new(LODEN);
            command.arg("status").args(args).arg("--subnet-file");
            let output = command.arg(self.file(n, "subnet.env")).output().unwrap();
            let answered = output.status.success();
            Ok(answered.then(|| String::from_utf8(output.stdout).unwrap()))
        });
        told.unwrap_or_default()
    }

    /// The JSON of `loden status`. A daemon that starts, or is busy, is asked again; null if none answers.
    fn status(&self, n: u8) -> Value {
        serde_json::from_str(&self.told(n, &["--json"])).unwrap_or_default()
    }

    /// Packets that node `n` took in from the other nodes since its tunnel was opened.
    fn received(&self, n: u8) -> u64 {
        self.status(n)["datapath"]["total"]["decap"]["sent"]
            .as_u64()
            .unwrap_or(0)
    }

    fn subnet(&self, n: u8) -> String {
        let env = fs::read_to_string(self.file(n, "subnet.env")).unwrap_or_default();
        let mut lines = env.lines();
        lines
            .find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))
            .unwrap_or_default()
            .to_owned()
    }

    /// A ping from pod to pod, 100 packets a second.
    fn flow(&self) -> Flow {
        let to = self.lab.pod_addr(2, 1).unwrap().to_string();
        let out = self.lab.dir().join("ping");
        let mut command = Command::new("ping");
        command
            .args(["-n", "-i", "0.01", to.as_str()])
            .stdin(Stdio::null())
            .stdout(fs::File::create(&out).unwrap());
        let netns = self.lab.netns(Member::Pod(1, 1));
        let child = netns.spawn(&mut command).unwrap();
        Flow { child, out }
    }

    /// Waits until a packet behind the first `count` ones is answered, and ends the flow; how many of those were. They
    /// do not overtake each other, so no other answer is still to come.
    fn answered(&self, flow: Flow, count: usize) -> usize {
        self.wait_until("packets of the flow", || {
            flow.answered().last().is_some_and(|&last| last > count)
        });
        flow.answered().range(..=count).count()
    }

    fn ip(&self, n: u8, args: &str) {
        let args: Vec<&str> = args.split(' ').collect();
        self.lab.run(Member::Node(n), "ip", &args).unwrap();
    }

    /// Every daemon ends by SIGTERM with 0, and nothing of it stays but `subnet.env` and its log, which tells
    /// of no panic.
    fn end(mut self) {
        for daemon in self.daemons.iter().flatten() {
            daemon.signal(Signal::SIGTERM);
        }
        for daemon in self.daemons.iter_mut().flatten() {
            assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
            let log = daemon.log();
            assert!(!log.contains("panicked"), "{log}");
        }
        for (n, _) in (1_u8..).zip(&self.daemons) {
            let node = Member::Node(n);
            let links = self.lab.run(node, "ip", &["-o", "link"]).unwrap();
            assert!(!links.contains("flannel"), "{links}");
            let routes = self.lab.run(node, "ip", &["route"]).unwrap();
            assert!(!routes.contains("198.18.0.0/16"), "{routes}");
            let mut left: Vec<_> = fs::read_dir(self.file(n, ""))
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            left.sort();
            assert_eq!(left, ["log", "subnet.env"]);
        }
    }
}

/// A running ping.
struct Flow {
    child: Child,
    out: PathBuf,
}

impl Flow {
    /// The numbers of the packets that were answered so far, counted from 1.
    fn answered(&self) -> BTreeSet<usize> {
        let text = fs::read_to_string(&self.out).unwrap();
        // Not those of errors.
        let number = |line: &str| {
            let (_, rest) = line.split_once("bytes from ")?.1.split_once("icmp_seq=")?;
            rest.split(' ').next()?.parse().ok()
        };
        text.lines().filter_map(number).collect()
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn put(dir: &Path, name: &str, text: &str) {
    fs::write(dir.join(name), text).unwrap();
}

const SHARED: (&str, &[&str]) = ("store", &[]);

#[test]
fn a_restart_under_traffic_keeps_the_subnet_and_the_flow_goes_on_without_loss_when_it_is_ready() {
    let mut cluster = Cluster::new(&[SHARED, SHARED]);
    cluster.wait_for_traffic();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let lost = restart_under_flow(&mut cluster, signal);
        println!("{signal}: {lost} packets lost");
        cluster.wait_until("the new daemon to be ready, and to know its peer", || {
            let is_ready = cluster.daemon(2).log().contains("written: ready");
            let peers = cluster.status(2)["datapath"]["peers"]
                .as_array()
                .map(Vec::len);
            is_ready && peers == Some(1)
        });
        assert_eq!(cluster.subnet(2), "198.18.2.1/24");
        assert_eq!(cluster.answered(cluster.flow(), 50), 50);
    }
    cluster.end();
}

/// In the median of five: how many that are depends on how soon the new process gets a processor.
#[ignore = "for a machine with nothing else to do: scripts/soak restart"]
#[test]
fn a_restart_under_traffic_loses_at_most_five_packets_of_a_hundred_a_second() {
    let mut cluster = Cluster::new(&[SHARED, SHARED]);
    cluster.wait_for_traffic();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut all: Vec<usize> = (0..5)
            .map(|_| restart_under_flow(&mut cluster, signal))
            .collect();
        println!("{signal}: lost {all:?}");
        all.sort_unstable();
        assert!(all[2] <= 5, "{signal}: {all:?}");
    }
    cluster.end();
}

/// Ends the second daemon under a flow of 100 packets a second, and starts it again. Returns how many of the first 300
/// went unanswered.
fn restart_under_flow(cluster: &mut Cluster, signal: Signal) -> usize {
    let before = cluster.received(2);
    let flow = cluster.flow();
    cluster.wait_until("the flow", || cluster.received(2) >= before + 50);
    let mut old = cluster.take(2);
    old.signal(signal);
    let status = old.child.wait().unwrap();
    let new = cluster.start(2, SHARED.0, SHARED.1);
    assert_eq!(status.success(), signal == Signal::SIGTERM);
    cluster.put(2, new);
    let lost = 300 - cluster.answered(flow, 300);
    assert!(cluster.received(2) > 0, "the new daemon carried some");
    lost
}

#[test]
fn traffic_resumes_without_a_restart_after_the_underlay_or_the_device_was_away() {
    let cluster = Cluster::new(&[SHARED, SHARED]);
    cluster.wait_for_traffic();
    for n in [1, 2] {
        cluster.ip(n, "link set eth0 down");
        assert!(!pings(&cluster.lab, Member::Pod(1, 1), (2, 1)));
        cluster.ip(n, "link set eth0 up");
        cluster.wait_for_traffic();
        let reopened = || cluster.status(n)["reopened"].as_u64().unwrap();
        let before = reopened();
        cluster.ip(n, "link del flannel0");
        cluster.wait_until("the device", || reopened() > before);
        cluster.wait_for_traffic();
    }
    cluster.end();
}

#[test]
fn engines_of_both_kinds_carry_traffic_between_them() {
    let cluster = Cluster::new(&[
        ("store", &["--engine", "mmsg"]),
        ("store", &["--engine", "portable"]),
    ]);
    cluster.wait_for_traffic();
    assert_eq!(cluster.answered(cluster.flow(), 100), 100);
    for (n, engine) in [(1, "mmsg"), (2, "portable")] {
        assert_eq!(cluster.status(n)["datapath"]["engine"], engine);
    }
    cluster.end();
}

#[test]
fn hostile_files_in_the_store_cost_no_packet() {
    let cluster = Cluster::new(&[SHARED, SHARED]);
    cluster.wait_for_traffic();
    let flow = cluster.flow();
    let subnets = cluster.store("store/subnets");
    let other = r#"{"PublicIP":"192.0.2.66","PublicIPv6":null}"#;
    put(&subnets, "198.18.30.0-24", "no json");
    put(&subnets, "198.18.31.0-24", &" ".repeat(1 << 20));
    put(&subnets, "203.0.113.0-24", other);
    put(&subnets, "198.18.2.128-25", other);
    put(&subnets, "198.18.0.0-17", other);
    put(&subnets, "README", "hello");
    nix::unistd::mkfifo(
        &subnets.join("198.18.32.0-24"),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    symlink("/dev/zero", subnets.join("198.18.33.0-24")).unwrap();
    fs::create_dir(subnets.join("198.18.34.0-24")).unwrap();
    // The healthy ones themselves.
    put(&subnets, "198.18.1.0-24", "");
    put(&subnets, "198.18.2.0-24", "{");
    let named = [
        "198.18.30.0-24",
        "198.18.31.0-24",
        "203.0.113.0-24",
        "198.18.2.128-25",
        "198.18.0.0-17",
        "README",
        "198.18.32.0-24",
        "198.18.33.0-24",
        "198.18.34.0-24",
    ];
    for n in [1, 2] {
        for name in named {
            cluster.wait_until(&format!("word of {name}"), || {
                cluster.status(n)["refused"].to_string().contains(name)
            });
            assert!(cluster.daemon(n).log().contains(name), "{name}");
        }
        let own = subnets.join(format!("198.18.{n}.0-24"));
        let value = format!(r#"{{"PublicIP":"192.0.2.{n}","PublicIPv6":null}}"#);
        cluster.wait_until("the restored lease", || {
            fs::read_to_string(&own).is_ok_and(|text| text == value)
        });
    }
    assert_eq!(cluster.answered(flow, 300), 300);
    fs::remove_file(subnets.join("README")).unwrap();
    cluster.wait_until("README to be forgotten", || {
        !cluster.status(1)["refused"].to_string().contains("README")
    });
    cluster.end();
}

/// Copies what is newer from one store to the other and back, as a synchronisation tool does, by rename.
fn synchronise(one: &Path, other: &Path) {
    for (from, to) in [(one, other), (other, one)] {
        for part in ["subnets", "expiry"] {
            for entry in fs::read_dir(from.join(part)).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name();
                if name.as_encoded_bytes().starts_with(b".") {
                    continue;
                }
                // Whatever vanishes meanwhile is copied, or not, the next time; and of what is replaced meanwhile, the time
                // belongs to the content.
                let read = fs::File::open(entry.path()).and_then(|mut file| {
                    let mut content = Vec::new();
                    file.read_to_end(&mut content)?;
                    Ok((content, file.metadata()?.modified()?))
                });
                let Ok((content, changed)) = read else {
                    continue;
                };
                let target = to.join(part).join(&name);
                let there = fs::metadata(&target).and_then(|meta| meta.modified());
                if there.is_ok_and(|there| there >= changed) {
                    continue;
                }
                let temp = to.join(part).join(".synchronising");
                fs::write(&temp, content).unwrap();
                let file = fs::File::options().write(true).open(&temp).unwrap();
                file.set_modified(changed).unwrap();
                fs::rename(&temp, &target).unwrap();
            }
        }
    }
}

#[test]
fn of_two_nodes_that_claimed_one_subnet_apart_the_later_moves_and_traffic_resumes() {
    let mut cluster = Cluster::new(&[("one", &[]), ("two", &[])]);
    cluster.wait_until("both leases", || {
        (1..=2).all(|n| cluster.status(n)["ready"] == true)
    });
    // Node 2 again, with the claim of a subnet that node 1 has had for longer.
    let mut old = cluster.take(2);
    old.signal(Signal::SIGTERM);
    old.child.wait().unwrap();
    for part in ["subnets", "expiry"] {
        fs::remove_file(cluster.store("two").join(part).join("198.18.2.0-24")).unwrap();
    }
    let env = "FLANNEL_NETWORK=198.18.0.0/16\nFLANNEL_SUBNET=198.18.1.1/24\n";
    fs::write(cluster.file(2, "subnet.env"), env).unwrap();
    let new = cluster.start(2, "two", &[]);
    cluster.put(2, new);
    cluster.wait_until("the second claim", || {
        cluster.status(2)["lease"]["subnets"][0] == "198.18.1.0/24"
    });

    let (one, two) = (cluster.store("one"), cluster.store("two"));
    cluster.wait_until("node 2 to move", || {
        synchronise(&one, &two);
        cluster.subnet(2) != "198.18.1.1/24"
    });
    let moved = cluster.subnet(2).replace(".1/24", ".0");
    cluster.wait_until("traffic to the new subnet", || {
        synchronise(&one, &two);
        let args = ["-n", "-q", "-c1", "-W1", &moved];
        cluster.lab.run(Member::Pod(1, 1), "ping", &args).is_ok()
    });
    assert_eq!(cluster.subnet(1), "198.18.1.1/24");
    assert!(!cluster.daemon(1).log().contains("is lost"));
    let log = cluster.daemon(2).log();
    assert_eq!(log.matches("is lost").count(), 1, "{log}");
    cluster.end();
}

#[test]
fn first_drop_from_a_stranger_is_logged_once_with_its_remedy_and_every_reason_is_shown() {
    let cluster = Cluster::new(&[SHARED, SHARED]);
    cluster.wait_for_traffic();
    let unknown = || -> Value {
        let drops = cluster.status(2)["drops"].clone();
        let mut all = drops.as_array().unwrap().iter();
        all.find(|drop| drop["reason"] == "unknown_peer")
            .unwrap()
            .clone()
    };
    let drops = || unknown()["decap"].as_u64().unwrap();
    // Node 1 may have probed node 2 before that knew of its lease.
    let before = drops();
    let netns = cluster.lab.netns(Member::Node(1));
    let stranger = netns
        .run(|| {
            cluster.ip(1, "addr add 192.0.2.77/24 dev eth0");
            std::net::UdpSocket::bind("192.0.2.77:0").unwrap()
        })
        .unwrap();
    // A packet of node 1's pod, from an address that no lease names.
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ipv4([198, 18, 1, 2], [198, 18, 2, 2], 64)
        .udp(9, 9)
        .write(&mut packet, b"forged")
        .unwrap();
    for _ in 0..20 {
        stranger.send_to(&packet, "192.0.2.2:8285").unwrap();
    }
    cluster.wait_until("the drops", || drops() == before + 20);
    cluster.wait_until("word of them", || {
        cluster.daemon(2).log().contains("192.0.2.77")
    });
    let log = cluster.daemon(2).log();
    assert_eq!(log.matches("192.0.2.77").count(), 1, "{log}");
    let status = cluster.status(2);
    let all = status["drops"].as_array().unwrap();
    let unknown = unknown();
    let remedy = unknown["remedy"].as_str().unwrap();
    assert!(log.contains(remedy), "{remedy}: {log}");
    let text = cluster.told(2, &[]);
    for reason in all {
        let name = reason["reason"].as_str().unwrap();
        assert!(text.contains(name), "{name}: {text}");
    }
    for one in status["datapath"]["capabilities"].as_array().unwrap() {
        assert!(text.contains(one["name"].as_str().unwrap()), "{text}");
        assert!(one["used"] == true || one["reason"].is_string(), "{one}");
    }
    cluster.end();
}
