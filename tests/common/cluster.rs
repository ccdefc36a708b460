//! Owns what tests of backends on whole nodes share: a cluster with a pod per node on a local store, its daemons, and
//! looks at it through iproute2, which shares no code with the program. Never asserts what is right.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use loden::lab::{Backend, Interrupt, Lab, Member, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::common::{LODEN, lab, spec};

/// Only a failing test waits this long.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A repair takes less, since it follows a notification and does not wait for the look every ten seconds.
pub(crate) const REPAIR_LIMIT: Duration = Duration::from_secs(6);

pub(crate) const V4: &str = r#""Network":"198.18.0.0/16""#;
pub(crate) const V6: &str = r#""EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:18::/48""#;
pub(crate) const DUAL: &str =
    r#""Network":"198.18.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:18::/48""#;
pub(crate) const VXLAN: &str = r#"{"Type":"vxlan"}"#;
pub(crate) const HOST_GW: &str = r#"{"Type":"host-gw"}"#;

/// Nodes with a pod each: 198.18.N.2 and fd00:18:0:N::2 on node N.
pub(crate) struct Cluster {
    // First, so that the daemons end before their namespaces.
    pub(crate) daemons: Vec<Option<Daemon>>,
    pub(crate) lab: Lab,
    pub(crate) network: &'static str,
}

pub(crate) struct Daemon(pub(crate) Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already reaped, if the test went well.
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Cluster {
    /// Daemons on all nodes.
    pub(crate) fn new(nodes: u8, network: &'static str, backend: &str) -> Self {
        let mut cluster = Self::idle(nodes, network, backend);
        for n in 1..=nodes {
            cluster.start(n);
        }
        for n in 1..=nodes {
            cluster.wait_until("a status with all peers", || {
                let peers = cluster.status(n)["peers"].as_array().map(Vec::len);
                peers == Some(usize::from(nodes) - 1)
            });
        }
        cluster
    }

    /// Nodes without daemons.
    pub(crate) fn idle(nodes: u8, network: &'static str, backend: &str) -> Self {
        let cluster = Self {
            daemons: (0..nodes).map(|_| None).collect(),
            lab: lab(spec(nodes, Backend::None)),
            network,
        };
        fs::create_dir_all(cluster.lab.dir().join("store/subnets")).unwrap();
        cluster.configure(backend);
        for n in 1..=nodes {
            fs::create_dir(cluster.file(n, "")).unwrap();
            let mut env = String::new();
            if network != V6 {
                env += &format!("FLANNEL_NETWORK=198.18.0.0/16\nFLANNEL_SUBNET=198.18.{n}.1/24\n");
            }
            if network != V4 {
                env += &format!(
                    "FLANNEL_IPV6_NETWORK=fd00:18::/48\nFLANNEL_IPV6_SUBNET=fd00:18:0:{n}::1/64\n"
                );
            }
            // As a run before would have left it.
            fs::write(cluster.file(n, "subnet.env"), env).unwrap();
            let node = cluster.lab.netns(Member::Node(n));
            node.set_sysctls(&[("ipv6/conf/all/forwarding", "1")])
                .unwrap();
            cluster.ip(
                Member::Node(n),
                "-6 addr add fd00:18:0:N::1/64 dev cni0 nodad",
                n,
            );
            cluster.ip(
                Member::Pod(n, 1),
                "-6 addr add fd00:18:0:N::2/64 dev eth0 nodad",
                n,
            );
            cluster.ip(
                Member::Pod(n, 1),
                "-6 route add default via fd00:18:0:N::1",
                n,
            );
        }
        cluster
    }

    pub(crate) fn configure(&self, backend: &str) {
        let text = format!("{{{},\"Backend\":{backend}}}", self.network);
        // By rename, so that no daemon reads half of it.
        let temporary = self.lab.dir().join("config");
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, self.lab.dir().join("store/config")).unwrap();
    }

    pub(crate) fn file(&self, n: u8, name: &str) -> PathBuf {
        self.lab.dir().join(format!("node{n}")).join(name)
    }

    pub(crate) fn start(&mut self, n: u8) {
        self.start_with(n, &[]);
    }

    /// A daemon with further flags.
    pub(crate) fn start_with(&mut self, n: u8, flags: &[&str]) {
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.file(n, "log"))
            .unwrap();
        let mut command = Command::new(LODEN);
        command.args(["daemon", "--iptables-forward-rules=false"]);
        if !flags.iter().any(|flag| flag.starts_with("--iface")) {
            command.arg("--iface=eth0");
        }
        command
            .arg("--local-store")
            .arg(self.lab.dir().join("store"))
            .arg("--subnet-file")
            .arg(self.file(n, "subnet.env"))
            .args(flags)
            .stdin(Stdio::null())
            .stderr(file);
        let child = self.lab.netns(Member::Node(n)).spawn(&mut command).unwrap();
        self.daemons[usize::from(n) - 1] = Some(Daemon(child));
    }

    pub(crate) fn end(&mut self, n: u8, signal: Signal) {
        let mut daemon = self.daemons[usize::from(n) - 1].take().unwrap();
        let pid = Pid::from_raw(i32::try_from(daemon.0.id()).unwrap());
        kill(pid, signal).unwrap();
        daemon.0.wait().unwrap();
    }

    pub(crate) fn log(&self, n: u8) -> String {
        fs::read_to_string(self.file(n, "log")).unwrap_or_default()
    }

    /// A daemon that starts, or is busy, is asked again; null if none answers.
    pub(crate) fn status(&self, n: u8) -> Value {
        let answer = wait::until("a status", LIMIT, &Interrupt::default(), || {
            let mut command = Command::new(LODEN);
            let output = command
                .args(["status", "--json", "--subnet-file"])
                .arg(self.file(n, "subnet.env"))
                .output();
            Ok(serde_json::from_slice(&output.unwrap().stdout).ok())
        });
        answer.unwrap_or_default()
    }

    pub(crate) fn wait_until(&self, what: &str, condition: impl FnMut() -> bool) {
        self.wait_for(what, LIMIT, condition);
    }

    pub(crate) fn wait_for(
        &self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut() -> bool,
    ) {
        let waited = wait::until(what, limit, &Interrupt::default(), || {
            Ok(condition().then_some(()))
        });
        let nodes = 1..=u8::try_from(self.daemons.len()).unwrap();
        let logs: Vec<String> = nodes.map(|n| self.log(n)).collect();
        assert!(
            waited.is_ok(),
            "no {what}; node 1 has {:#?}; logs:\n{}",
            self.state(1),
            logs.join("\n---\n")
        );
    }

    /// `ip ARGS` inside a member, with N for the node's number; must succeed.
    pub(crate) fn ip(&self, member: Member, args: &str, n: u8) {
        let args = args.replace('N', &n.to_string());
        self.run(member, "ip", &args);
    }

    pub(crate) fn run(&self, member: Member, program: &str, args: &str) -> String {
        let args: Vec<&str> = args.split(' ').collect();
        self.lab.run(member, program, &args).unwrap()
    }

    /// Moves node 3 behind a router.
    pub(crate) fn route_node_3(&self) {
        let nodes = u8::try_from(self.daemons.len()).unwrap();
        let underlay = Member::Underlay;
        let router = self.lab.netns(underlay);
        router
            .set_sysctls(&[
                ("ipv4/ip_forward", "1"),
                ("ipv4/conf/all/send_redirects", "0"),
                ("ipv4/conf/br0/send_redirects", "0"),
            ])
            .unwrap();
        self.ip(underlay, "addr add 192.0.2.254/24 dev br0", 0);
        self.ip(underlay, "addr add 198.51.100.254/24 dev br0", 0);
        for n in (1..=nodes).filter(|&n| n != 3) {
            self.ip(
                Member::Node(n),
                "route add 198.51.100.0/24 via 192.0.2.254",
                n,
            );
        }
        self.ip(Member::Node(3), "-4 addr flush dev eth0", 3);
        self.ip(Member::Node(3), "addr add 198.51.100.3/24 dev eth0", 3);
        self.ip(
            Member::Node(3),
            "route add 192.0.2.0/24 via 198.51.100.254",
            3,
        );
    }

    /// What `ip` or `bridge` shows; empty if there is nothing to show.
    pub(crate) fn shown(&self, n: u8, program: &str, args: &str) -> Vec<String> {
        let args: Vec<&str> = args.split(' ').collect();
        let output = self
            .lab
            .run(Member::Node(n), program, &args)
            .unwrap_or_default();
        let lines = output.lines().map(|line| line.trim().to_owned());
        lines.filter(|line| !line.is_empty()).collect()
    }

    /// All that a node's kernel holds for the overlay.
    pub(crate) fn state(&self, n: u8) -> Vec<String> {
        let mut state = self.shown(n, "ip", "-4 route show proto 108");
        state.extend(self.shown(n, "ip", "-6 route show proto 108"));
        for device in ["flannel.1", "flannel-v6.1"] {
            let link = self.shown(n, "ip", &format!("-o -d link show {device}"));
            // The number and what counts change when a device is made anew.
            let words: Vec<&str> = link.iter().flat_map(|line| line.split(' ')).collect();
            let after = |word| {
                let at = words.iter().position(|found| *found == word);
                at.map_or("-", |at| words[at + 1])
            };
            let facts = ["mtu", "link/ether", "id", "local", "dstport"].map(after);
            state.push(format!(
                "{device} {facts:?} {}",
                words.iter().any(|it| it.contains(",UP"))
            ));
            for family in ["-4", "-6"] {
                let addrs = self.shown(n, "ip", &format!("{family} -o addr show dev {device}"));
                let texts = addrs
                    .iter()
                    .filter_map(|line| line.split_whitespace().nth(3));
                state.extend(texts.map(|addr| format!("{device} has {addr}")));
            }
            let neighbours = self.shown(n, "ip", &format!("neigh show dev {device} nud permanent"));
            state.extend(
                neighbours
                    .iter()
                    .map(|line| format!("{device} neighbour {line}")),
            );
            let forwards = self.shown(n, "bridge", &format!("fdb show dev {device}"));
            state.extend(
                forwards
                    .iter()
                    .map(|line| format!("{device} forwards {line}")),
            );
        }
        state.sort();
        state
    }

    pub(crate) fn mac(&self, n: u8, device: &str) -> String {
        let link = self
            .shown(n, "ip", &format!("-o link show {device}"))
            .join(" ");
        let (_, rest) = link.split_once("link/ether ").unwrap();
        rest[..17].to_owned()
    }

    pub(crate) fn pings(&self, from: u8, to: &str) -> bool {
        let ping = ["-n", "-q", "-c1", "-W1", to];
        self.lab.run(Member::Pod(from, 1), "ping", &ping).is_ok()
    }

    /// Waits until a node has entries for all others: until its pod is answered by theirs.
    pub(crate) fn await_entries(&self, n: u8) {
        for other in (1..=u8::try_from(self.daemons.len()).unwrap()).filter(|&other| other != n) {
            if self.network != V6 {
                self.await_ping(n, &format!("198.18.{other}.2"));
            }
            if self.network != V4 {
                self.await_ping(n, &format!("fd00:18:0:{other}::2"));
            }
        }
    }

    pub(crate) fn await_ping(&self, from: u8, to: &str) {
        self.wait_until(&format!("answer from {to} to node {from}"), || {
            self.pings(from, to)
        });
    }

    /// A lease as another node would have it.
    pub(crate) fn put(&self, key: &str, value: &str) {
        let subnets = self.lab.dir().join("store/subnets");
        let temporary = self.lab.dir().join("lease");
        fs::write(&temporary, value).unwrap();
        fs::rename(temporary, subnets.join(key)).unwrap();
    }

    pub(crate) fn delete(&self, key: &str) {
        fs::remove_file(self.lab.dir().join("store/subnets").join(key)).unwrap();
    }

    /// A node's lease. A listing may miss one that is replaced meanwhile.
    pub(crate) fn lease(&self, n: u8) -> String {
        let subnets = self.lab.dir().join("store/subnets");
        let prefix = format!("198.18.{n}.0-24");
        let look = || {
            let mut entries = fs::read_dir(&subnets).unwrap().flatten();
            let of_node = |name: &str| name.starts_with(&prefix);
            let lease = entries.find(|entry| entry.file_name().to_str().is_some_and(of_node));
            fs::read_to_string(lease?.path()).ok()
        };
        wait::until("a lease", LIMIT, &Interrupt::default(), || Ok(look())).unwrap()
    }
}

/// TCP from the pod of node 1 to that of node 2.
pub(crate) fn transfers(cluster: &Cluster, to: &str) {
    let mut command = Command::new("iperf3");
    // For as many attempts as it takes.
    command.args(["-s", "-B", to]).stdout(Stdio::null());
    let server = cluster
        .lab
        .netns(Member::Pod(2, 1))
        .spawn(&mut command)
        .unwrap();
    let _ended = Daemon(server);
    cluster.wait_until("a TCP transfer of 20 megabytes", || {
        let args = ["-c", to, "-n", "20M"];
        cluster.lab.run(Member::Pod(1, 1), "iperf3", &args).is_ok()
    });
}

/// Numbered pings from a pod to another, for as long as it lives.
pub(crate) struct Pings {
    pub(crate) child: Daemon,
    pub(crate) output: PathBuf,
}

impl Pings {
    /// One in twenty milliseconds.
    pub(crate) fn start(cluster: &Cluster, from: u8, to: &str) -> Self {
        let output = cluster.lab.dir().join(format!("pings-{from}-{to}"));
        let file = fs::File::create(&output).unwrap();
        let mut command = Command::new("ping");
        command
            .args(["-n", "-i", "0.02", "-W", "1", to])
            .stdout(file);
        let pod = cluster.lab.netns(Member::Pod(from, 1));
        Self {
            child: Daemon(pod.spawn(&mut command).unwrap()),
            output,
        }
    }

    /// The numbers of the answers so far.
    pub(crate) fn answers(&self) -> Vec<u64> {
        let text = fs::read_to_string(&self.output).unwrap();
        let number = |line: &str| {
            let (_, rest) = line.split_once("icmp_seq=")?;
            let (number, rest) = rest.split_once(' ')?;
            rest.contains("time=").then(|| number.parse().unwrap())
        };
        text.lines().filter_map(number).collect()
    }

    /// The longest run of unanswered ones between two answers, as time.
    pub(crate) fn longest_gap(&self) -> Duration {
        let answers = self.answers();
        let gaps = answers
            .windows(2)
            .map(|pair| pair[1].saturating_sub(pair[0] + 1));
        let longest = gaps.max().unwrap_or(u64::MAX);
        Duration::from_millis(20).saturating_mul(u32::try_from(longest).unwrap_or(u32::MAX))
    }

    /// The longest gap so far is at most so long: what holds for a machine that does nothing else
    /// (`LODEN_ALONE`, which `scripts/soak gaps` sets): wherever a process may have to wait for a processor, it does not.
    pub(crate) fn assert_gap(&self, at_most: Duration, when: &str) {
        let gap = self.longest_gap();
        let is_alone = std::env::var_os("LODEN_ALONE").is_some();
        let to = self.output.display();
        assert!(!is_alone || gap <= at_most, "{to}: {gap:?} {when}");
    }

    /// Waits for answers to what is sent from now on.
    pub(crate) fn go_on(&self, cluster: &Cluster) {
        let seen = self.answers().len();
        cluster.wait_until("answers to pings", || self.answers().len() > seen + 5);
    }
}
