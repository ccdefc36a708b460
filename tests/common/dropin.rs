//! Owns what tests of the program in flannel's place share: nodes in namespaces on one wire, with a real etcd behind
//! a router, and daemons called `flanneld`. Looks at them through other programs.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use loden::lab::{Interrupt, NetNs, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::etcd::{Etcd, PREFIX};

pub(crate) const LODEN: &str = env!("CARGO_BIN_EXE_loden");

/// What flannel 0.28 writes for a node of its udp backend.
pub(crate) const GOLDEN_VALUE: &str = r#"{"PublicIP":"198.51.100.77","PublicIPv6":null}"#;

/// Only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(60);

/// Nodes 198.51.100.1 and up on a bridge in etcd's namespace, which routes to 192.0.2.1, where etcd is.
pub(crate) struct Cluster {
    pub(crate) etcd: Etcd,
    nodes: Vec<String>,
    dir: TempDir,
}

/// A pod's namespace.
pub(crate) struct PodNs {
    pub(crate) name: String,
    pub(crate) addr: String,
}

impl Drop for PodNs {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

fn delete(namespace: &str) {
    let deleted = Command::new("ip")
        .args(["netns", "del", namespace])
        .status();
    assert!(
        std::thread::panicking() || deleted.is_ok_and(|status| status.success()),
        "namespace {namespace} stays behind"
    );
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn ip_in(namespace: &str, args: &str) -> String {
    let mut all = vec!["-n", namespace];
    all.extend(args.split(' '));
    run("ip", &all)
}

impl Cluster {
    pub(crate) fn new(nodes: u8, config: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let etcd = Etcd::start();
        let hub = etcd.netns().name().to_owned();
        ip_in(&hub, "link add br0 type bridge");
        ip_in(&hub, "addr add 198.51.100.254/24 dev br0");
        ip_in(&hub, "link set br0 up");
        let mut cluster = Self {
            etcd,
            nodes: Vec::new(),
            dir: tempfile::tempdir().unwrap(),
        };
        for node in 1..=nodes {
            let name = format!("loden-dropin-{}-{number}-n{node}", std::process::id());
            run("ip", &["netns", "add", &name]);
            cluster.nodes.push(name.clone());
            let ip = |args: &str| ip_in(&name, args);
            ip("link set lo up");
            ip(&format!(
                "link add eth0 type veth peer name n{node} netns {hub}"
            ));
            ip(&format!("addr add 198.51.100.{node}/24 dev eth0"));
            ip("link set eth0 up");
            ip("route add 192.0.2.0/24 via 198.51.100.254");
            ip_in(&hub, &format!("link set n{node} master br0 up"));
            NetNs::named(&name)
                .run(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap())
                .unwrap();
            fs::create_dir(cluster.node_dir(node)).unwrap();
        }
        symlink(LODEN, cluster.dir.path().join("flanneld")).unwrap();
        cluster.configure(config);
        cluster
    }

    pub(crate) fn configure(&self, config: &str) {
        self.etcd.ctl(&["put", &format!("{PREFIX}/config"), config]);
    }

    pub(crate) fn name(&self, node: u8) -> &str {
        &self.nodes[usize::from(node) - 1]
    }

    fn node_dir(&self, node: u8) -> PathBuf {
        self.dir.path().join(format!("n{node}"))
    }

    fn env_file(&self, node: u8) -> PathBuf {
        self.node_dir(node).join("subnet.env")
    }

    pub(crate) fn ip(&self, node: u8, args: &str) -> String {
        ip_in(self.name(node), args)
    }

    pub(crate) fn exec(&self, node: u8, program: &str, args: &[&str]) -> String {
        let mut all = vec!["netns", "exec", self.name(node), program];
        all.extend(args);
        run("ip", &all)
    }

    /// Runs a program that may well fail; words are separated by spaces.
    pub(crate) fn try_exec(&self, node: u8, program: &str, args: &str) {
        let status = Command::new("ip")
            .args(["netns", "exec", self.name(node), program])
            .args(args.split(' '))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(status.is_ok());
    }

    /// The command line of a flannel node on etcd.
    pub(crate) fn program(&self, node: u8, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", self.name(node)])
            .arg(program)
            .arg("-etcd-endpoints=http://192.0.2.1:2379")
            .arg("-subnet-file")
            .arg(self.env_file(node))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// As [`Self::command`], without a word about the interface.
    pub(crate) fn bare(&self, node: u8, args: &[&str]) -> Command {
        self.program(node, &self.dir.path().join("flanneld"), args)
    }

    pub(crate) fn command(&self, node: u8, args: &[&str]) -> Command {
        self.bare(node, &[&["-iface", "eth0"], args].concat())
    }

    pub(crate) fn spawn_command(&self, node: u8, mut command: Command) -> Daemon {
        let log = self.node_dir(node).join("log");
        let file = fs::File::create(&log).unwrap();
        let copy = file.try_clone().unwrap();
        let child = command.stderr(file).stdout(copy).spawn().unwrap();
        Daemon { child, log }
    }

    pub(crate) fn spawn(&self, node: u8, args: &[&str]) -> Daemon {
        self.spawn_command(node, self.command(node, args))
    }

    /// Starts a daemon and waits until it is ready.
    pub(crate) fn start(&self, node: u8, args: &[&str]) -> Daemon {
        let daemon = self.spawn(node, args);
        daemon.wait_for_log("written: ready");
        daemon
    }

    pub(crate) fn write_env(&self, node: u8, text: &str) {
        fs::write(self.env_file(node), text).unwrap();
    }

    /// As on a machine that never ran a daemon.
    pub(crate) fn forget_env(&self, node: u8) {
        let removed = fs::remove_file(self.env_file(node));
        assert!(removed.is_ok() || !self.env_file(node).exists());
    }

    pub(crate) fn read_env(&self, node: u8) -> String {
        fs::read_to_string(self.env_file(node)).unwrap()
    }

    pub(crate) fn env_value(&self, node: u8, key: &str) -> String {
        let env = self.read_env(node);
        let mut lines = env.lines().filter_map(|line| line.split_once('='));
        let (_, value) = lines.find(|(name, _)| *name == key).unwrap();
        value.to_owned()
    }

    /// A node's subnet as `subnet.env` has it: its first host's address, which is the bridge's.
    fn gateway(&self, node: u8) -> ipnet::Ipv4Net {
        self.env_value(node, "FLANNEL_SUBNET").parse().unwrap()
    }

    /// The address of a node's tunnel device.
    pub(crate) fn base(&self, node: u8) -> String {
        self.gateway(node).network().to_string()
    }

    /// A daemon that starts, or is busy, is asked again; null if none answers.
    pub(crate) fn status(&self, node: u8) -> Value {
        let answer = wait::until("a status", LIMIT, &Interrupt::default(), || {
            let output = self.loden(node, &["status", "--json"]);
            Ok(serde_json::from_slice(&output.stdout).ok())
        });
        answer.unwrap_or_default()
    }

    /// What a subcommand that asks a node's daemon prints.
    pub(crate) fn loden(&self, node: u8, args: &[&str]) -> Output {
        let mut command = Command::new(LODEN);
        command.args(args).arg("--subnet-file");
        command.arg(self.env_file(node)).output().unwrap()
    }

    /// Waits for a ping through the tunnel.
    pub(crate) fn reaches(&self, from: u8, to: u8) {
        let (source, target) = (self.base(from), self.base(to));
        let waited = wait::until("a ping", LIMIT, &Interrupt::default(), || {
            let status = Command::new("ip")
                .args([
                    "netns",
                    "exec",
                    self.name(from),
                    "ping",
                    "-n",
                    "-q",
                    "-c1",
                    "-W1",
                ])
                .args(["-I", &source, &target])
                .stdout(Stdio::null())
                .status()
                .unwrap();
            Ok(status.success().then_some(()))
        });
        let log = |node| fs::read_to_string(self.node_dir(node).join("log")).unwrap();
        assert!(
            waited.is_ok(),
            "no way from {from} to {to}; logs:\n{}\n{}",
            log(from),
            log(to)
        );
    }

    /// Pings a hundred times a second until asked for the result.
    pub(crate) fn ping_in_background(&self, from: u8, to: u8) -> Ping {
        let out = self.dir.path().join("ping");
        let child = Command::new("ip")
            .args(["netns", "exec", self.name(from), "ping", "-n", "-i", "0.01"])
            .args(["-I", &self.base(from), &self.base(to)])
            .stdout(fs::File::create(&out).unwrap())
            .spawn()
            .unwrap();
        Ping { child, out }
    }

    /// Sends TCP at a fifth of what a slow machine manages until asked for the result.
    pub(crate) fn iperf_in_background(&self, from: u8, to: u8) -> Iperf {
        let spawn = |node: u8, args: &[&str], out: Stdio| {
            let mut command = Command::new("ip");
            command
                .args(["netns", "exec", self.name(node), "iperf3"])
                .args(args)
                .stdout(out)
                .stderr(Stdio::null());
            Reaped(command.spawn().unwrap())
        };
        let (source, target) = (self.base(from), self.base(to));
        let server = spawn(to, &["-s", "-B", &target], Stdio::null());
        wait::until("the iperf3 server", LIMIT, &Interrupt::default(), || {
            let listens = self.exec(to, "ss", &["-Hltn", "sport", "=", "5201"]);
            Ok((!listens.is_empty()).then_some(()))
        })
        .unwrap();
        let out = self.dir.path().join("iperf3");
        let args = ["-c", &target, "-B", &source];
        let args = [&args[..], &["-J", "-t", "3600", "-b", "100M"]].concat();
        let client = spawn(from, &args, fs::File::create(&out).unwrap().into());
        Iperf {
            client,
            _server: server,
            out,
        }
    }

    /// A pod on a node, behind a veth pair.
    pub(crate) fn add_pod(&self, node: u8) -> PodNs {
        let name = format!("{}p", self.name(node));
        run("ip", &["netns", "add", &name]);
        let gateway = self.gateway(node);
        let addr = std::net::Ipv4Addr::from(u32::from(gateway.addr()) + 1).to_string();
        let pod = PodNs { name, addr };
        self.ip(
            node,
            &format!("link add pod type veth peer name eth0 netns {}", pod.name),
        );
        self.ip(node, &format!("addr add {gateway} dev pod"));
        self.ip(node, "link set pod up");
        let len = gateway.prefix_len();
        ip_in(&pod.name, &format!("addr add {}/{len} dev eth0", pod.addr));
        ip_in(&pod.name, "link set eth0 up");
        ip_in(
            &pod.name,
            &format!("route add default via {}", gateway.addr()),
        );
        pod
    }

    /// The source address that `to`, on a node or on the wire's far end, sees of a datagram from the pod.
    pub(crate) fn seen_source(&self, pod: &PodNs, on: Option<u8>, to: &str) -> String {
        let there = match on {
            Some(node) => NetNs::named(self.name(node)),
            None => NetNs::named(self.etcd.netns().name()),
        };
        let listener = there
            .run(|| std::net::UdpSocket::bind((to, 9999)).unwrap())
            .unwrap();
        listener
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let mut source = String::new();
        wait::until("a datagram", LIMIT, &Interrupt::default(), || {
            NetNs::named(&pod.name)
                .run(|| {
                    let socket = std::net::UdpSocket::bind((pod.addr.as_str(), 0)).unwrap();
                    // Refused while nothing is there to route it.
                    let _tried = socket.send_to(b"x", (to, 9999));
                })
                .unwrap();
            let mut buffer = [0; 8];
            Ok(listener.recv_from(&mut buffer).ok().map(|(_, from)| {
                source = from.ip().to_string();
            }))
        })
        .unwrap();
        source
    }

    /// Asks a node's health server: the code and the body.
    pub(crate) fn http(&self, node: u8, path: &str) -> (u16, String) {
        self.try_http(node, path).unwrap()
    }

    /// Likewise, of a server that may not be there yet.
    pub(crate) fn try_http(&self, node: u8, path: &str) -> std::io::Result<(u16, String)> {
        let ask = || {
            let mut socket = std::net::TcpStream::connect((format!("198.51.100.{node}"), 8080))?;
            write!(
                socket,
                "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            )?;
            let mut answer = String::new();
            socket.read_to_string(&mut answer)?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = NetNs::named(self.name(node)).run(ask).unwrap()?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        Ok((code, body.to_owned()))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.nodes.iter().for_each(|name| delete(name));
    }
}

/// A process that ends with its owner.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Ended already, if the test went well.
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A TCP connection in the background.
pub(crate) struct Iperf {
    client: Reaped,
    _server: Reaped,
    out: PathBuf,
}

impl Iperf {
    /// Ends it; how many bytes were sent in each second.
    pub(crate) fn bytes(mut self) -> Vec<u64> {
        let pid = Pid::from_raw(i32::try_from(self.client.0.id()).unwrap());
        kill(pid, Signal::SIGINT).unwrap();
        self.client.0.wait().unwrap();
        let text = fs::read_to_string(&self.out).unwrap();
        let report: Value = serde_json::from_str(&text).unwrap();
        let intervals = report["intervals"].as_array().unwrap();
        let bytes = |interval: &Value| interval["sum"]["bytes"].as_u64().unwrap();
        intervals.iter().map(bytes).collect()
    }
}

/// A ping in the background.
pub(crate) struct Ping {
    child: Child,
    out: PathBuf,
}

impl Ping {
    fn answers(&self) -> usize {
        let text = fs::read_to_string(&self.out).unwrap();
        text.lines()
            .filter(|line| line.contains("bytes from "))
            .count()
    }

    pub(crate) fn wait_for_answers(&self, count: usize) {
        let waited = wait::until("answers", LIMIT, &Interrupt::default(), || {
            Ok((self.answers() >= count).then_some(()))
        });
        assert!(waited.is_ok(), "{} answers", self.answers());
    }

    /// Lets so much time pass; whether answers came. On a slow machine a ping sends less than it is asked to.
    #[must_use]
    pub(crate) fn goes_on_for(&self, time: Duration) -> bool {
        let (begin, before) = (Instant::now(), self.answers());
        let least = usize::try_from(time.as_millis() / 50).unwrap();
        let waited = wait::until("answers", 2 * time + LIMIT, &Interrupt::default(), || {
            let enough = begin.elapsed() >= time && self.answers() >= before + least;
            Ok(enough.then_some(()))
        });
        waited.is_ok()
    }

    /// Ends it; how many packets were lost. The last one may still be on its way.
    pub(crate) fn lost(mut self) -> usize {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, Signal::SIGINT).unwrap();
        self.child.wait().unwrap();
        let text = fs::read_to_string(&self.out).unwrap();
        let seen: std::collections::BTreeSet<usize> = text
            .lines()
            .filter(|line| line.contains("bytes from "))
            .filter_map(|line| line.split_once("icmp_seq="))
            .map(|(_, rest)| rest.split(' ').next().unwrap().parse().unwrap())
            .collect();
        seen.last().unwrap() - seen.len()
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn wait_until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let waited = wait::until(what, LIMIT, &Interrupt::default(), || {
            Ok(condition().then_some(()))
        });
        assert!(waited.is_ok(), "no {what}; log:\n{}", self.log());
    }

    pub(crate) fn wait_for_log(&self, text: &str) {
        self.wait_until(text, || self.log().contains(text));
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// Asks it to end; its exit code.
    pub(crate) fn stop(mut self) -> i32 {
        self.signal(Signal::SIGTERM);
        let mut code = None;
        let child = &mut self.child;
        wait::until("the daemon to end", LIMIT, &Interrupt::default(), || {
            code = child.try_wait().unwrap();
            Ok(code.map(drop))
        })
        .unwrap();
        code.unwrap().code().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already reaped, if the test went well.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Checks the text as the OpenMetrics specification, version 1.0, asks: every sample belongs to a family that was
/// typed before, counters end in `_total`, names are of the allowed letters, values are numbers, the buckets of a
/// histogram add up to its count, `# EOF` ends it.
pub(crate) fn check_openmetrics(text: &str) {
    let mut kinds = std::collections::BTreeMap::new();
    let mut in_buckets = std::collections::BTreeMap::new();
    assert!(text.ends_with("# EOF\n"), "{text}");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(kinds.insert(name, kind).is_none(), "{name} twice");
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
        let name = series.split('{').next().unwrap();
        let family = ["_total", "_info", "_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|family| kinds.contains_key(family))
            .unwrap_or(name);
        let kind = kinds.get(family).unwrap_or(&"untyped");
        let suffix = &name[family.len()..];
        let expected = match *kind {
            "counter" => "_total",
            "info" => "_info",
            "gauge" => "",
            "histogram" => {
                let value: f64 = value.parse().unwrap();
                match suffix {
                    "_bucket" => {
                        let before = in_buckets.insert(family, value);
                        assert!(before.is_none_or(|before| before <= value), "{line}");
                        assert!(series.contains("le=\""), "{line}");
                    }
                    "_count" | "_sum" => assert!(value >= 0.0, "{line}"),
                    _ => unreachable!("{line}"),
                }
                suffix
            }
            other => unreachable!("{line}: {other}"),
        };
        assert_eq!(suffix, expected, "{line}");
        let letters = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        assert!(name.chars().all(letters), "{line}");
    }
    for (family, all) in in_buckets {
        for line in [
            format!("\n{family}_count {all}\n"),
            format!("\n{family}_bucket{{le=\"+Inf\"}} {all}\n"),
        ] {
            assert!(text.contains(&line), "{line}{text}");
        }
    }
}
