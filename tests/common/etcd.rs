//! Owns real etcd servers for tests: each in a network namespace of its own, with its data in a directory of its
//! own, gone with the test. Never touches a server that it did not start.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot prepare itself must fail, and say why"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::fs::File;
use std::future::Future;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use loden::config::NetworkConfig;
use loden::lab::wait;
use loden::lab::{Interrupt, NetNs};
use loden::lease::{Lease, LeaseAttrs, LeaseDelta, LeaseExtension, Subnets};
use loden::store::etcd::EtcdSettings;
use loden::store::{
    AcquireRequest, EtcdStore, LeaseStore as _, Problem, RenewError, StoreError, StoreEvent,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::mpsc;

/// Where everything of a test is, as flannel has it by default.
pub(crate) const PREFIX: &str = "/coreos.com/network";

/// Where clients look for etcd, and where not.
const PORT: u16 = 2379;
const HIDDEN: u16 = 2479;

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A namespace and the members of one cluster in it, at 192.0.2.1 and up.
pub(crate) struct Etcd {
    netns: NetNs,
    dir: tempfile::TempDir,
    members: Vec<Member>,
    cluster: String,
    arguments: Vec<String>,
    scheme: &'static str,
    port: u16,
    /// What etcdctl needs beside the endpoints.
    pub(crate) ctl: Vec<String>,
}

struct Member {
    name: String,
    addr: Ipv4Addr,
    process: Option<Child>,
}

impl Etcd {
    /// One server.
    pub(crate) fn start() -> Self {
        Self::cluster(1, "http", &[])
    }

    /// `count` members, with more arguments for each.
    pub(crate) fn cluster(count: u8, scheme: &'static str, arguments: &[String]) -> Self {
        Self::cluster_with_ctl(count, scheme, arguments, &[])
    }

    /// Likewise, with more arguments for etcdctl.
    pub(crate) fn cluster_with_ctl(
        count: u8,
        scheme: &'static str,
        arguments: &[String],
        ctl: &[String],
    ) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let netns = NetNs::named(format!("loden-etcd-{}-{number}", std::process::id()));
        ip(&["netns", "add", netns.name()]);
        let members: Vec<Member> = (1..=count)
            .map(|n| Member {
                name: format!("m{n}"),
                addr: Ipv4Addr::new(192, 0, 2, n),
                process: None,
            })
            .collect();
        let peers: Vec<String> = members
            .iter()
            .map(|m| format!("{}=http://{}:2380", m.name, m.addr))
            .collect();
        let mut etcd = Self {
            netns,
            dir: tempfile::tempdir().unwrap(),
            members,
            cluster: peers.join(","),
            arguments: arguments.to_vec(),
            scheme,
            port: PORT,
            ctl: ctl.to_vec(),
        };
        let name = etcd.netns.name().to_owned();
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        for member in &etcd.members {
            let addr = format!("{}/24", member.addr);
            ip(&["-n", &name, "addr", "add", &addr, "dev", "lo"]);
        }
        for n in 0..etcd.members.len() {
            etcd.spawn(n);
        }
        etcd.await_health();
        etcd
    }

    /// Starts a member again, with the data it has.
    pub(crate) fn spawn(&mut self, n: usize) {
        self.port = PORT;
        self.spawn_on_port(n);
    }

    /// Starts the only member where no store looks for it, and waits for it; etcdctl finds it there.
    pub(crate) fn spawn_hidden(&mut self, n: usize) {
        self.port = HIDDEN;
        self.spawn_on_port(n);
        self.await_health();
    }

    fn spawn_on_port(&mut self, n: usize) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(
                self.dir
                    .path()
                    .join(format!("{}.log", self.members[n].name)),
            )
            .unwrap();
        let member = &self.members[n];
        let client = format!("{}://{}:{}", self.scheme, member.addr, self.port);
        let peer = format!("http://{}:2380", member.addr);
        let mut command = Command::new("etcd");
        command
            .args(["--name", &member.name])
            .arg("--data-dir")
            .arg(self.data_dir(n))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.cluster])
            .args(["--initial-cluster-state", "new", "--unsafe-no-fsync"])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(&self.arguments)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let process = self.netns.spawn(&mut command).unwrap();
        self.members[n].process = Some(process);
    }

    fn log(&self, n: usize) -> String {
        let path = self
            .dir
            .path()
            .join(format!("{}.log", self.members[n].name));
        std::fs::read_to_string(path).unwrap_or_default()
    }

    fn data_dir(&self, n: usize) -> PathBuf {
        self.dir.path().join(&self.members[n].name)
    }

    /// Waits until a majority answers.
    pub(crate) fn await_health(&self) {
        let healthy = wait::until("etcd", PATIENCE, &Interrupt::default(), || {
            // Whoever may do nothing still gets an answer from a majority.
            let output = self.try_ctl(&["get", "health"], "3s");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let refused = ["permission denied", "user name is empty"];
            let answered = output.status.success() || refused.iter().any(|r| said.contains(r));
            Ok(answered.then_some(()))
        });
        assert!(healthy.is_ok(), "{}", self.log(0));
    }

    /// The URLs of all members, comma-separated.
    pub(crate) fn endpoints(&self) -> String {
        self.endpoints_on(PORT)
    }

    fn endpoints_on(&self, port: u16) -> String {
        let urls: Vec<String> = self
            .members
            .iter()
            .map(|m| format!("{}://{}:{port}", self.scheme, m.addr))
            .collect();
        urls.join(",")
    }

    /// With a limit for the command.
    pub(crate) fn try_ctl(&self, arguments: &[&str], limit: &str) -> Output {
        let mut command = Command::new("etcdctl");
        command
            .env_clear()
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoints_on(self.port)])
            .args(["--command-timeout", limit, "--dial-timeout", limit])
            .args(&self.ctl)
            .args(arguments);
        self.netns.run(|| command.output()).unwrap().unwrap()
    }

    /// Runs a transaction in the language of etcdctl.
    pub(crate) fn txn(&self, text: &str) {
        let mut command = Command::new("etcdctl");
        command
            .env_clear()
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoints_on(self.port), "txn"])
            .args(["--command-timeout", "60s", "--dial-timeout", "60s"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let mut child = self.netns.spawn(&mut command).unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(text.as_bytes()).unwrap();
        drop(input);
        assert!(child.wait().unwrap().success());
    }

    /// Runs etcdctl, a client that shares no code with ours.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        let output = self.try_ctl(arguments, "60s");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "etcdctl {arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Writes the network configuration.
    pub(crate) fn configure(&self, json: &str) {
        self.put("config", json);
    }

    /// Writes a key below the prefix; returns the revision.
    pub(crate) fn put(&self, key: &str, value: &str) -> i64 {
        let answer = self.ctl(&["put", &format!("{PREFIX}/{key}"), value, "-w", "json"]);
        revision(&answer)
    }

    /// Deletes a key below the prefix, or all that start with it.
    pub(crate) fn delete(&self, key: &str, prefix: bool) {
        let key = format!("{PREFIX}/{key}");
        let mut arguments = vec!["del", &key];
        if prefix {
            arguments.push("--prefix");
        }
        self.ctl(&arguments);
    }

    /// A key below the prefix: its value, and its etcd lease.
    pub(crate) fn get(&self, key: &str) -> Option<(String, i64)> {
        let answer = self.ctl(&["get", &format!("{PREFIX}/{key}"), "-w", "fields"]);
        let field = |name: &str| {
            let line = answer.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().to_owned())
        };
        let value: String = serde_json::from_str(&field("\"Value\" :")?).unwrap();
        Some((value, field("\"Lease\" :")?.parse().unwrap()))
    }

    /// The keys below the prefix that start with `start`, in order.
    pub(crate) fn keys(&self, start: &str) -> Vec<String> {
        let all = format!("{PREFIX}/{start}");
        let answer = self.ctl(&["get", &all, "--prefix", "--keys-only"]);
        let below = answer.lines().filter(|line| !line.is_empty());
        below
            .map(|key| key.strip_prefix(PREFIX).unwrap()[1..].to_owned())
            .collect()
    }

    /// Grants an etcd lease, for a key that a flannel node would have written; returns it as etcdctl takes it.
    pub(crate) fn grant(&self, seconds: u32) -> String {
        let answer = self.ctl(&["lease", "grant", &seconds.to_string()]);
        answer.split(' ').nth(1).unwrap().to_owned()
    }

    /// Sends a member a signal.
    pub(crate) fn signal(&self, n: usize, signal: Signal) {
        let process = self.members[n].process.as_ref().unwrap();
        let pid = Pid::from_raw(i32::try_from(process.id()).unwrap());
        kill(pid, signal).unwrap();
    }

    /// Kills a member; its data stays.
    pub(crate) fn kill(&mut self, n: usize) {
        if let Some(mut process) = self.members[n].process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Deletes what a member that does not run has stored.
    pub(crate) fn wipe(&self, n: usize) {
        std::fs::remove_dir_all(self.data_dir(n)).unwrap();
    }

    /// The member that leads.
    pub(crate) fn leader(&self) -> usize {
        let answer = self.ctl(&["endpoint", "status", "-w", "json"]);
        let status: serde_json::Value = serde_json::from_str(&answer).unwrap();
        let leads =
            |s: &serde_json::Value| s["Status"]["leader"] == s["Status"]["header"]["member_id"];
        status.as_array().unwrap().iter().position(leads).unwrap()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) const fn netns(&self) -> &NetNs {
        &self.netns
    }

    pub(crate) fn settings(&self) -> EtcdSettings {
        EtcdSettings {
            endpoints: self.endpoints(),
            prefix: PREFIX.to_owned(),
            ..EtcdSettings::default()
        }
    }

    pub(crate) fn store(&self) -> Patient {
        Patient::new(self.settings())
    }

    /// Runs what talks to etcd inside the namespace.
    pub(crate) fn run<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        run_in(&self.netns, work)
    }
}

/// A store that asks again when its own patience of three seconds was too short for a server on a busy machine. What it
/// asks for is the same the second time, if it was done already.
pub(crate) struct Patient(pub(crate) EtcdStore);

/// How often: for as long as [`PATIENCE`].
const ASKED: usize = 20;

impl Patient {
    pub(crate) fn new(settings: EtcdSettings) -> Self {
        Self(EtcdStore::new(settings).unwrap())
    }

    pub(crate) async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        patiently(is_late, async || self.0.network_config().await).await
    }

    pub(crate) async fn acquire(&self, request: AcquireRequest) -> Result<Lease, StoreError> {
        patiently(is_late, async || self.0.acquire(request.clone()).await).await
    }

    pub(crate) async fn renew(&self, lease: &Lease) -> Result<Lease, RenewError> {
        let is_late =
            |error: &RenewError| matches!(error, RenewError::Store(error) if is_late(error));
        patiently(is_late, async || self.0.renew(lease).await).await
    }

    pub(crate) fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        self.0.watch()
    }
}

fn is_late(error: &StoreError) -> bool {
    error.to_string().contains("no answer within")
}

async fn patiently<T, E>(
    is_late: impl Fn(&E) -> bool,
    ask: impl AsyncFn() -> Result<T, E>,
) -> Result<T, E> {
    for _ in 1..ASKED {
        match ask().await {
            Err(error) if is_late(&error) => {}
            answer => return answer,
        }
    }
    ask().await
}

/// Runs what uses sockets inside a namespace: on one thread, which all others are started from.
pub(crate) fn run_in<T: Send>(netns: &NetNs, work: impl AsyncFnOnce() -> T + Send) -> T {
    netns
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(work())
        })
        .unwrap()
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for n in 0..self.members.len() {
            if let Some(mut process) = self.members[n].process.take() {
                let ended = process.kill().and_then(|()| process.wait());
                if let Err(error) = ended {
                    eprintln!("an etcd could not be ended: {error}");
                }
            }
        }
        if std::thread::panicking() {
            let log = self.log(0);
            let tail: Vec<&str> = log.lines().rev().take(15).collect();
            eprintln!("etcd said last (newest first):\n{}", tail.join("\n"));
        }
        let deleted = Command::new("ip")
            .args(["netns", "del", self.netns.name()])
            .status();
        if let Err(error) = deleted {
            eprintln!("a namespace stays behind: {error}");
        }
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?}: root is needed");
}

fn revision(json: &str) -> i64 {
    let answer: serde_json::Value = serde_json::from_str(json).unwrap();
    answer["header"]["revision"].as_i64().unwrap()
}

/// The value of a flannel node that uses vxlan.
pub(crate) fn vxlan_value(node: u8) -> String {
    format!(
        r#"{{"PublicIP":"198.51.100.{node}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:{node:02x}"}}}}"#
    )
}

/// What node `node` asks for.
pub(crate) fn request(node: u8) -> AcquireRequest {
    AcquireRequest {
        attrs: LeaseAttrs {
            public_ip: Some(Ipv4Addr::new(198, 51, 100, node)),
            ..LeaseAttrs::default()
        },
        previous: None,
        extension: LeaseExtension::default(),
    }
}

pub(crate) fn subnets(key: &str) -> Subnets {
    key.parse().unwrap()
}

/// Waits for a future, not for ever.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_elapsed) => unreachable!("in vain: {what}"),
    }
}

/// A watch, and what it says when everything so far is put together.
pub(crate) struct Follower {
    events: mpsc::Receiver<StoreEvent>,
    pub(crate) leases: std::collections::BTreeMap<Subnets, Lease>,
    pub(crate) problems: Vec<Problem>,
    pub(crate) lost: Vec<StoreEvent>,
    pub(crate) snapshots: usize,
    /// The keys of leases that were withdrawn at any time.
    pub(crate) withdrawn: Vec<Subnets>,
}

impl Follower {
    pub(crate) const fn new(events: mpsc::Receiver<StoreEvent>) -> Self {
        Self {
            events,
            leases: std::collections::BTreeMap::new(),
            problems: Vec::new(),
            lost: Vec::new(),
            snapshots: 0,
            withdrawn: Vec::new(),
        }
    }

    /// Takes events until what is known fulfils the condition.
    pub(crate) async fn until(&mut self, what: &str, done: impl FnMut(&Self) -> bool) {
        self.until_within(what, PATIENCE, done).await;
    }

    /// Takes the events that are there.
    pub(crate) fn drain(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.take(event);
        }
    }

    /// As [`Self::until`], with this much time for each event.
    pub(crate) async fn until_within(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) {
        while !done(self) {
            let event = tokio::time::timeout(limit, self.events.recv()).await;
            let Ok(event) = event else {
                unreachable!(
                    "in vain: {what}; known: {:?}, {:?}, {:?}",
                    self.keys(),
                    self.problems,
                    self.lost
                );
            };
            self.take(event.unwrap());
        }
    }

    fn take(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::Snapshot { leases, problems } => {
                self.snapshots += 1;
                let new = leases.into_iter().map(|l| (l.subnets, l)).collect();
                let old = std::mem::replace(&mut self.leases, new);
                let gone = old.into_keys().filter(|key| !self.leases.contains_key(key));
                self.withdrawn.extend(gone);
                self.problems.extend(problems);
            }
            StoreEvent::Delta { deltas, problems } => {
                for delta in deltas {
                    match delta {
                        LeaseDelta::Put(lease) => {
                            self.leases.insert(lease.subnets, lease);
                        }
                        LeaseDelta::Delete(key) => {
                            self.withdrawn.extend(self.leases.remove(&key).map(|_| key));
                        }
                    }
                }
                self.problems.extend(problems);
            }
            lost @ StoreEvent::OwnLost { .. } => self.lost.push(lost),
        }
    }

    /// The keys of all leases, as text.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.leases.keys().map(Subnets::to_string).collect()
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.leases.contains_key(&subnets(key))
    }
}
