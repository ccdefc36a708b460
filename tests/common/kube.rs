//! Owns a real Kubernetes API server for tests: upstream's own, built by `scripts/setup --kube`, on the test's etcd
//! and in its namespace. Looks at it with kubectl, which shares no code with the program.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use loden::lab::{Interrupt, NetNs, wait};
use loden::store::KubeStore;
use loden::store::kube::{Identity, KubeSettings, WATCH};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::etcd::Etcd;

/// Where the API server is, in etcd's namespace.
pub(crate) const URL: &str = "https://192.0.2.1:6443";

/// Flannel's annotations.
pub(crate) const PREFIX: &str = "flannel.alpha.coreos.com";

/// The manifest that operators apply.
pub(crate) const MANIFEST: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/kubernetes/loden.yml");

const ADMIN: &str = "admin-of-a-test";

/// Only a failing test waits this long.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A program that `scripts/setup --kube` has built.
pub(crate) fn program(name: &str) -> PathBuf {
    let module = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/apiserver/go.mod");
    let module = fs::read_to_string(module).unwrap();
    let version = module
        .lines()
        .find_map(|line| line.strip_prefix("require k8s.io/kubernetes "))
        .unwrap();
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    let cache = set("LODEN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("loden")))
        .unwrap_or_else(|| set("HOME").unwrap().join(".cache/loden"));
    let path = cache.join(format!("kubernetes-{version}")).join(name);
    assert!(
        path.exists(),
        "{} is missing: run scripts/setup --kube",
        path.display()
    );
    path
}

/// An API server with the manifest applied: the daemons have the rights that it gives them, and no others.
pub(crate) struct ApiServer {
    netns: NetNs,
    dir: TempDir,
    process: Option<Child>,
    arguments: &'static [&'static str],
}

impl ApiServer {
    pub(crate) fn start(etcd: &Etcd) -> Self {
        Self::start_with(etcd, &[])
    }

    /// With more arguments.
    pub(crate) fn start_with(etcd: &Etcd, arguments: &'static [&'static str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        fs::write(dir.path().join("sa.key"), key.serialize_pem()).unwrap();
        fs::write(dir.path().join("sa.pub"), key.public_key_pem()).unwrap();
        fs::write(
            dir.path().join("tokens"),
            format!("{ADMIN},admin,admin,system:masters\n"),
        )
        .unwrap();
        let mut server = Self {
            netns: etcd.netns().clone(),
            dir,
            process: None,
            arguments,
        };
        server.spawn();
        server.write_kubeconfig("admin", ADMIN);
        server.await_ready();
        server.kubectl(&["apply", "-f", MANIFEST]);
        let token = server.kubectl(&["create", "token", "flannel", "-n", "kube-flannel"]);
        server.write_kubeconfig("daemon", token.trim());
        server
    }

    /// Starts it, again if it was stopped.
    pub(crate) fn spawn(&mut self) {
        let dir = self.dir.path();
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join("log"))
            .unwrap();
        let file = |name| dir.join(name).display().to_string();
        let mut command = Command::new(program("kube-apiserver"));
        command
            .args([
                "--etcd-servers=http://192.0.2.1:2379",
                "--bind-address=192.0.2.1",
            ])
            .args(["--advertise-address=192.0.2.1", "--secure-port=6443"])
            .arg(format!("--cert-dir={}", file("certs")))
            .arg(format!("--service-account-key-file={}", file("sa.pub")))
            .arg(format!(
                "--service-account-signing-key-file={}",
                file("sa.key")
            ))
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg("--authorization-mode=Node,RBAC")
            .arg(format!("--token-auth-file={}", file("tokens")))
            .args([
                "--service-cluster-ip-range=198.19.0.0/16",
                "--allow-privileged=true",
            ])
            // There is nobody who would make them.
            .arg("--disable-admission-plugins=ServiceAccount")
            .args(self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.process = Some(self.netns.spawn(&mut command).unwrap());
    }

    pub(crate) fn await_ready(&mut self) {
        let mut process = self.process.take().unwrap();
        let ready = wait::until("the API server", LIMIT, &Interrupt::default(), || {
            assert!(process.try_wait().unwrap().is_none(), "{}", self.log());
            let output = self.try_kubectl(&["get", "--raw", "/readyz"], "");
            Ok(output.status.success().then_some(()))
        });
        self.process = Some(process);
        assert!(ready.is_ok(), "{}", self.log());
    }

    /// Kills it; what it has stored stays.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(20).collect();
        lines.join("\n")
    }

    /// A kubeconfig of this name, for whoever has this token.
    pub(crate) fn write_kubeconfig(&self, name: &str, token: &str) {
        let certificate = self.dir.path().join("certs/apiserver.crt");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster":
                {"server": URL, "certificate-authority": certificate}}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        fs::write(self.kubeconfig(name), config.to_string()).unwrap();
    }

    pub(crate) fn kubeconfig(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn try_kubectl(&self, args: &[&str], stdin: &str) -> Output {
        self.try_kubectl_of("admin", args, stdin)
    }

    fn try_kubectl_of(&self, whose: &str, args: &[&str], stdin: &str) -> Output {
        let mut command = Command::new(program("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig(whose))
            .args(args)
            .env("HOME", self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.netns.spawn(&mut command).unwrap();
        let mut pipe = child.stdin.take().unwrap();
        pipe.write_all(stdin.as_bytes()).unwrap();
        drop(pipe);
        child.wait_with_output().unwrap()
    }

    fn check(&self, args: &[&str], output: Output) -> String {
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "kubectl {args:?}: {error}\n{}",
            self.log()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// kubectl as the cluster's administrator; must succeed.
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        self.check(args, self.try_kubectl(args, ""))
    }

    /// kubectl with the kubeconfig of this name: what it prints, or says when it fails.
    pub(crate) fn kubectl_of(&self, whose: &str, args: &[&str]) -> Result<String, String> {
        self.kubectl_of_with(whose, args, "")
    }

    /// Likewise, with something to read.
    pub(crate) fn kubectl_of_with(
        &self,
        whose: &str,
        args: &[&str],
        stdin: &str,
    ) -> Result<String, String> {
        let output = self.try_kubectl_of(whose, args, stdin);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        match output.status.success() {
            true => Ok(text(output.stdout)),
            false => Err(text(output.stderr)),
        }
    }

    /// What kubectl prints as the cluster's administrator, whether it succeeds or not.
    pub(crate) fn kubectl_or_not(&self, args: &[&str]) -> String {
        let output = self.try_kubectl(args, "");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Objects as the API server would take them; it must take them.
    pub(crate) fn dry_run(&self, yaml: &str) -> String {
        let args = ["apply", "--dry-run=server", "-o", "json", "-f", "-"];
        self.check(&args, self.try_kubectl(&args, yaml))
    }

    /// Creates an object, as the cluster's administrator.
    pub(crate) fn create(&self, object: &Value) {
        let args = ["create", "-f", "-"];
        self.check(&args, self.try_kubectl(&args, &object.to_string()));
    }

    /// A Node with this pod CIDR; none for the empty text.
    pub(crate) fn add_node(&self, name: &str, pod_cidr: &str, annotations: &Value) {
        let mut node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "annotations": annotations},
        });
        if !pod_cidr.is_empty() {
            node["spec"] = json!({"podCIDR": pod_cidr, "podCIDRs": [pod_cidr]});
        }
        self.create(&node);
    }

    /// A Node that another daemon has registered.
    pub(crate) fn add_peer(&self, name: &str, pod_cidr: &str, public_ip: &str) {
        self.add_node(name, pod_cidr, &peer(public_ip));
    }

    pub(crate) fn node(&self, name: &str) -> Value {
        serde_json::from_str(&self.kubectl(&["get", "node", name, "-o", "json"])).unwrap()
    }

    /// One of flannel's annotations; null if it is not there.
    pub(crate) fn annotation(&self, node: &str, suffix: &str) -> Value {
        self.node(node)["metadata"]["annotations"][format!("{PREFIX}/{suffix}")].clone()
    }

    pub(crate) fn annotate(&self, node: &str, change: &str) {
        let change = format!("{PREFIX}/{change}");
        self.kubectl(&["annotate", "--overwrite", "node", node, &change]);
    }

    /// The condition `NetworkUnavailable`; null if there is none.
    pub(crate) fn condition(&self, node: &str) -> Value {
        let node = self.node(node);
        let conditions = node["status"]["conditions"].as_array().cloned();
        conditions
            .unwrap_or_default()
            .into_iter()
            .find(|condition| condition["type"] == "NetworkUnavailable")
            .unwrap_or_default()
    }

    /// The Events about a Node: each reason with its message.
    pub(crate) fn events(&self, node: &str) -> Vec<(String, String)> {
        let of = format!("involvedObject.kind=Node,involvedObject.name={node}");
        let args = ["get", "events", "-o", "json", "--field-selector", &of];
        let events: Value = serde_json::from_str(&self.kubectl(&args)).unwrap();
        let text = |event: &Value, field: &str| event[field].as_str().unwrap().to_owned();
        let events = events["items"].as_array().unwrap().iter();
        events
            .map(|event| (text(event, "reason"), text(event, "message")))
            .collect()
    }

    /// The settings of a daemon on this node, with the rights of the manifest.
    pub(crate) fn settings(&self, node: &str) -> KubeSettings {
        let net_config = self.dir.path().join("net-conf.json");
        let config = r#"{"Network":"198.18.0.0/16","Backend":{"Type":"udp"}}"#;
        fs::write(&net_config, config).unwrap();
        KubeSettings {
            api_url: None,
            kubeconfig: Some(self.kubeconfig("daemon")),
            annotations: PREFIX.parse().unwrap(),
            net_config,
            report_condition: true,
            identity: Identity::Node(node.to_owned()),
            watch: WATCH,
        }
    }

    pub(crate) async fn store(&self, node: &str) -> KubeStore {
        KubeStore::new(self.settings(node)).await.unwrap()
    }
}

/// What flannel's udp backend writes.
pub(crate) fn peer(public_ip: &str) -> Value {
    json!({
        format!("{PREFIX}/kube-subnet-manager"): "true",
        format!("{PREFIX}/backend-type"): "",
        format!("{PREFIX}/backend-data"): "null",
        format!("{PREFIX}/public-ip"): public_ip,
    })
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _gone = process.kill();
            let _reaped = process.wait();
        }
    }
}
