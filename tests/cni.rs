//! The CNI plugin in its place: Debian's bridge, host-local and portmap behind it, pods and nodes as namespaces, and
//! the program's own daemons between the nodes. The test plays the runtime. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use loden::lab::{Interrupt, NetNs, wait};
use serde_json::{Value, json};
use tempfile::TempDir;

const LODEN: &str = env!("CARGO_BIN_EXE_loden");
const PLUGIN: &str = env!("CARGO_BIN_EXE_loden-cni");

/// Where Debian keeps the standard plugins.
const STANDARD: &str = "/usr/lib/cni";

/// Only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(20);

/// Every version that Debian's plugins speak.
const VERSIONS: [&str; 6] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"];

/// A network namespace, gone with the value.
struct Ns(NetNs);

impl Ns {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("loden-cni-{}-{number}", std::process::id());
        run("ip", &["netns", "add", &name]);
        let ns = Self(NetNs::named(name));
        ns.ip("link set lo up");
        ns
    }

    fn path(&self) -> String {
        self.0.path().display().to_string()
    }

    fn ip(&self, args: &str) -> String {
        let mut all = vec!["-n", self.0.name()];
        all.extend(args.split(' '));
        run("ip", &all)
    }

    fn json(&self, args: &str) -> Vec<Value> {
        serde_json::from_str(&self.ip(&format!("-j {args}"))).unwrap_or_default()
    }

    fn links(&self) -> BTreeSet<String> {
        let links = self.json("link show");
        links
            .iter()
            .map(|link| link["ifname"].as_str().unwrap().to_owned())
            .collect()
    }
}

impl Drop for Ns {
    fn drop(&mut self) {
        let deleted = Command::new("ip")
            .args(["netns", "del", self.0.name()])
            .status();
        assert!(
            std::thread::panicking() || deleted.is_ok_and(|status| status.success()),
            "namespace {} stays behind",
            self.0.name()
        );
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// A node with the plugin installed, and what a runtime keeps for it.
struct Node {
    ns: Ns,
    dir: TempDir,
}

/// What a plugin answered.
struct Answer {
    success: bool,
    stdout: Value,
    stderr: String,
}

impl Answer {
    fn ok(self, what: &str) -> Value {
        assert!(self.success, "{what}: {} {}", self.stdout, self.stderr);
        self.stdout
    }
}

impl Node {
    fn new() -> Self {
        assert!(
            Path::new(STANDARD).join("bridge").exists(),
            "the standard CNI plugins are missing: run scripts/setup"
        );
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        symlink(PLUGIN, dir.path().join("bin/flannel")).unwrap();
        Self { ns: Ns::new(), dir }
    }

    /// A node that a daemon has written a file for.
    fn with_env() -> Self {
        let node = Self::new();
        fs::write(
            node.file("subnet.env"),
            "FLANNEL_NETWORK=198.18.0.0/16\nFLANNEL_SUBNET=198.18.1.1/24\n\
             FLANNEL_IPV6_NETWORK=fd00:18::/48\nFLANNEL_IPV6_SUBNET=fd00:18:0:1::1/64\n\
             FLANNEL_MTU=1400\nFLANNEL_IPMASQ=true\n",
        )
        .unwrap();
        node
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The network configuration of the original's manifest, with every file in the test's directory.
    fn conf(&self, version: &str) -> Value {
        json!({
            "name": "cbr0", "cniVersion": version, "type": "flannel",
            "subnetFile": self.file("subnet.env"), "dataDir": self.file("state"),
            "ipam": {"dataDir": self.file("ipam")},
            "delegate": {"hairpinMode": true, "isDefaultGateway": true},
        })
    }

    /// Calls a plugin as a runtime does.
    fn call(&self, plugin: &Path, variables: &[(&str, &str)], conf: &Value) -> Answer {
        let mut command = Command::new(plugin);
        let path = format!("{}:{STANDARD}", self.file("bin").display());
        command
            .env("CNI_PATH", path)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.ns.0.spawn(&mut command).unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(conf.to_string().as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        Answer {
            success: output.status.success(),
            stdout: serde_json::from_slice(&output.stdout).unwrap_or_default(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn flannel(&self, command: &str, id: &str, netns: &str, conf: &Value) -> Answer {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", "eth0"),
        ];
        self.call(&self.file("bin/flannel"), &variables, conf)
    }

    /// Files that remember an interface or an address.
    fn remembered(&self) -> Vec<String> {
        let list = |dir: PathBuf| {
            let entries = fs::read_dir(dir).into_iter().flatten();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap())
        };
        let addresses = list(self.file("ipam/cbr0"))
            .filter(|name| name != "lock" && !name.starts_with("last_reserved_ip"));
        list(self.file("state")).chain(addresses).collect()
    }
}

/// The addresses in a result, of whatever version, without their lengths.
fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().cloned().unwrap_or_default();
    let new = ips.iter().map(|ip| &ip["address"]);
    let old = ["ip4", "ip6"]
        .into_iter()
        .map(|family| &result[family]["ip"]);
    let texts = new.chain(old).filter_map(Value::as_str);
    texts
        .map(|text| text.split('/').next().unwrap().to_owned())
        .collect()
}

#[test]
fn every_version_gives_a_pod_its_addresses_and_takes_everything_back() {
    let node = Node::with_env();
    for version in VERSIONS {
        let conf = node.conf(version);
        let pod = Ns::new();
        let result = node.flannel("ADD", "c1", &pod.path(), &conf).ok(version);
        assert_eq!(result["cniVersion"], version);
        let addresses = addresses(&result);
        let [v4, v6] = addresses.as_slice() else {
            unreachable!("{result}");
        };
        assert!(v4.starts_with("198.18.1."), "{result}");
        assert!(v6.starts_with("fd00:18:0:1::"), "{result}");
        let seen = pod.json("addr show dev eth0");
        assert_eq!(seen[0]["mtu"], 1400);
        let infos = seen[0]["addr_info"].as_array().unwrap();
        for addr in [v4, v6] {
            assert!(infos.iter().any(|info| info["local"] == **addr), "{seen:?}");
        }
        let routes = pod.ip("route show");
        assert!(routes.contains("198.18.0.0/16 via 198.18.1.1"), "{routes}");
        assert!(routes.contains("default via 198.18.1.1"), "{routes}");
        for _twice in 0..2 {
            node.flannel("DEL", "c1", &pod.path(), &conf).ok(version);
        }
        assert!(node.remembered().is_empty(), "{:?}", node.remembered());
        assert!(!pod.links().contains("eth0"));
    }
    assert_eq!(
        node.ns.links(),
        BTreeSet::from(["cni0".into(), "lo".into()])
    );
}

#[test]
fn pods_that_come_at_the_same_time_get_addresses_of_their_own() {
    const PODS: usize = 8;
    let node = Node::with_env();
    let conf = node.conf("1.0.0");
    let pods: Vec<Ns> = (0..PODS).map(|_| Ns::new()).collect();
    let each = |command: &str| {
        std::thread::scope(|scope| {
            let calls: Vec<_> = (0..PODS)
                .map(|n| {
                    let (node, conf, pod) = (&node, &conf, &pods[n]);
                    scope.spawn(move || {
                        let id = format!("c{n}");
                        node.flannel(command, &id, &pod.path(), conf).ok(&id)
                    })
                })
                .collect();
            let results = calls.into_iter().map(|call| call.join().unwrap());
            results.collect::<Vec<Value>>()
        })
    };
    let results = each("ADD");
    let distinct: BTreeSet<String> = results.iter().flat_map(addresses).collect();
    assert_eq!(distinct.len(), 2 * PODS, "{results:?}");
    each("DEL");
    assert!(node.remembered().is_empty(), "{:?}", node.remembered());
}

/// The long form is `scripts/soak cni`.
#[test]
fn cycles_of_add_and_del_leak_nothing() {
    let cycles = std::env::var_os("LODEN_CNI_CYCLES");
    let cycles = cycles.map_or(10, |text| text.to_str().unwrap().parse().unwrap());
    let node = Node::with_env();
    let conf = node.conf("0.3.1");
    for cycle in 0..cycles {
        let (pod, id) = (Ns::new(), format!("c{cycle}"));
        node.flannel("ADD", &id, &pod.path(), &conf).ok(&id);
        node.flannel("DEL", &id, &pod.path(), &conf).ok(&id);
    }
    assert!(node.remembered().is_empty(), "{:?}", node.remembered());
    assert_eq!(
        node.ns.links(),
        BTreeSet::from(["cni0".into(), "lo".into()])
    );
}

#[test]
fn a_del_that_the_delegate_refuses_can_be_repeated() {
    let node = Node::with_env();
    let conf = node.conf("1.0.0");
    let pod = Ns::new();
    node.flannel("ADD", "c1", &pod.path(), &conf).ok("ADD");
    let before = node.remembered();
    script(
        &node.file("bin/bridge"),
        r#"printf '{"cniVersion":"1.0.0","code":11,"msg":"busy","details":"come back"}'; exit 1"#,
    );
    let refused = node.flannel("DEL", "c1", &pod.path(), &conf);
    assert!(!refused.success);
    assert_eq!(
        refused.stdout,
        json!({"cniVersion": "1.0.0", "code": 11, "msg": "busy", "details": "come back"})
    );
    assert_eq!(node.remembered(), before);
    fs::remove_file(node.file("bin/bridge")).unwrap();
    // Nor does it need the namespace, or the daemon's file, any more.
    fs::remove_file(node.file("subnet.env")).unwrap();
    node.flannel("DEL", "c1", "", &conf).ok("DEL");
    assert!(node.remembered().is_empty(), "{:?}", node.remembered());
}

#[test]
fn what_the_original_added_is_taken_back() {
    let node = Node::with_env();
    let conf = node.conf("0.3.1");
    let pod = Ns::new();
    node.flannel("ADD", "c1", &pod.path(), &conf).ok("ADD");
    // The original knows only the file that is named after the container.
    fs::remove_file(node.file("state/c1:eth0")).unwrap();
    node.flannel("DEL", "c1", &pod.path(), &conf).ok("DEL");
    assert!(node.remembered().is_empty(), "{:?}", node.remembered());
    assert!(!pod.links().contains("eth0"));
}

#[test]
fn check_finds_no_fault_with_a_healthy_pod() {
    let node = Node::with_env();
    let mut conf = node.conf("1.0.0");
    let pod = Ns::new();
    let result = node.flannel("ADD", "c1", &pod.path(), &conf).ok("ADD");
    conf["prevResult"] = result;
    node.flannel("CHECK", "c1", &pod.path(), &conf).ok("CHECK");
    node.flannel("DEL", "c1", &pod.path(), &conf).ok("DEL");
}

/// Debian's plugins do not speak 1.1.0, so a script writes down what it is asked.
#[test]
fn the_commands_of_1_1_0_reach_the_delegate() {
    let node = Node::with_env();
    let log = node.file("asked");
    script(
        &node.file("bin/bridge"),
        &format!(
            r#"printf '%s %s %s ' "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_IFNAME" >> {0}
            cat >> {0}; echo >> {0}; echo '{{"cniVersion":"1.1.0"}}'"#,
            log.display()
        ),
    );
    let asked = || {
        let text = fs::read_to_string(&log).unwrap();
        fs::write(&log, "").unwrap();
        text.lines().map(str::to_owned).collect::<Vec<String>>()
    };
    let mut conf = node.conf("1.1.0");
    let pod = Ns::new();
    node.flannel("STATUS", "", "", &conf).ok("STATUS");
    let status = asked();
    assert!(
        status[0].starts_with("STATUS  eth0 {\"cniVersion\":\"1.1.0\""),
        "{status:?}"
    );
    let result = node.flannel("ADD", "c1", &pod.path(), &conf).ok("ADD");
    assert_eq!(result, json!({"cniVersion": "1.1.0"}));
    node.flannel("ADD", "c2", &pod.path(), &conf).ok("ADD");
    let saved = fs::read_to_string(node.file("state/c2:eth0")).unwrap();
    assert_eq!(asked()[1], format!("ADD c2 eth0 {saved}"));

    conf["cni.dev/valid-attachments"] = json!([{"containerID": "c1", "ifname": "eth0"}]);
    node.flannel("GC", "", "", &conf).ok("GC");
    assert_eq!(asked(), [format!("DEL c2 eth0 {saved}")]);
    let mut left = node.remembered();
    left.sort();
    assert_eq!(left, ["c1", "c1:eth0"]);
    // Another network's interfaces are not ours to judge.
    conf["name"] = "other".into();
    conf["cni.dev/valid-attachments"] = json!([]);
    node.flannel("GC", "", "", &conf).ok("GC");
    assert!(asked().is_empty());

    fs::remove_file(node.file("subnet.env")).unwrap();
    let status = node.flannel("STATUS", "", "", &conf);
    assert_eq!(status.stdout["code"], 50, "{}", status.stdout);
}

fn script(path: &Path, body: &str) {
    fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A daemon of the program, ended with the value.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Answers one connection after the other with the address that it comes from.
fn serve(pod: &Ns, port: u16) {
    let listener = pod
        .0
        .run(|| TcpListener::bind(("0.0.0.0", port)).unwrap())
        .unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip().to_string();
            // A client that does not wait for the answer fails by itself.
            let _sent = stream.write_all(peer.as_bytes());
        }
    });
}

/// Waits until `to` answers; what it answered.
fn ask(from: &Ns, to: &str, port: u16) -> String {
    let mut answer = String::new();
    let target = format!("{to}:{port}").parse().unwrap();
    let waited = wait::until(to, LIMIT, &Interrupt::default(), || {
        let connected = from
            .0
            .run(|| TcpStream::connect_timeout(&target, Duration::from_secs(1)))
            .unwrap();
        answer.clear();
        Ok(connected.ok().and_then(|mut stream| {
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.read_to_string(&mut answer).ok().map(drop)
        }))
    });
    assert!(waited.is_ok(), "{} does not reach {target}", from.0.name());
    answer
}

#[test]
fn pods_of_two_nodes_reach_each_other_and_a_node_port_reaches_its_pod() {
    const PORT: u16 = 80;
    let store = tempfile::tempdir().unwrap();
    fs::create_dir(store.path().join("subnets")).unwrap();
    fs::write(
        store.path().join("config"),
        r#"{"Network":"198.18.0.0/16","Backend":{"Type":"udp"}}"#,
    )
    .unwrap();
    let nodes = [Node::new(), Node::new()];
    let [first, second] = &nodes;
    let peer = second.ns.0.name();
    first.ns.ip(&format!(
        "link add eth0 type veth peer name eth0 netns {peer}"
    ));
    let mut daemons = Vec::new();
    for (node, number) in nodes.iter().zip(1..) {
        node.ns
            .ip(&format!("addr add 192.0.2.{number}/24 dev eth0"));
        node.ns.ip("link set eth0 up");
        node.ns.0.set_sysctls(&[("ipv4/ip_forward", "1")]).unwrap();
        let mut command = Command::new(LODEN);
        command
            .args(["daemon", "--iface", "eth0", "--ip-masq", "--local-store"])
            .arg(store.path())
            .arg("--subnet-file")
            .arg(node.file("subnet.env"))
            .stderr(fs::File::create(node.file("log")).unwrap());
        daemons.push(Daemon(node.ns.0.spawn(&mut command).unwrap()));
    }
    let mut pods = BTreeMap::new();
    for (node, id) in nodes.iter().zip(["c1", "c2"]) {
        let waited = wait::until("subnet.env", LIMIT, &Interrupt::default(), || {
            Ok(node.file("subnet.env").exists().then_some(()))
        });
        let log = fs::read_to_string(node.file("log")).unwrap();
        assert!(waited.is_ok(), "{log}");
        let pod = Ns::new();
        let result = node
            .flannel("ADD", id, &pod.path(), &node.conf("0.3.1"))
            .ok(id);
        serve(&pod, PORT);
        pods.insert(id, (pod, addresses(&result).remove(0), result));
    }
    let [(one, addr_one, result), (two, addr_two, _)] = [&pods["c1"], &pods["c2"]];
    // Both ways, with the pods' own addresses: nothing masquerades within the network.
    assert_eq!(ask(one, addr_two, PORT), *addr_one);
    assert_eq!(ask(two, addr_one, PORT), *addr_two);

    // What the runtime calls next for a pod with a host port.
    let port_map = json!({
        "name": "cbr0", "cniVersion": "0.3.1", "type": "portmap", "prevResult": result,
        "runtimeConfig": {"portMappings":
            [{"hostPort": 8080, "containerPort": PORT, "protocol": "tcp"}]},
    });
    let pod_path = one.path();
    let chained = |command| {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", pod_path.as_str()),
            ("CNI_IFNAME", "eth0"),
        ];
        let program = Path::new(STANDARD).join("portmap");
        first.call(&program, &variables, &port_map).ok("portmap")
    };
    chained("ADD");
    assert_eq!(ask(&second.ns, "192.0.2.1", 8080), "192.0.2.2");
    // Hairpin: a pod that reaches itself by its node's port.
    ask(one, "192.0.2.1", 8080);
    let ports = run("bridge", &["-n", first.ns.0.name(), "-d", "-j", "link"]);
    let ports: Vec<Value> = serde_json::from_str(&ports).unwrap();
    assert!(
        ports
            .iter()
            .any(|port| port["master"] == "cni0" && port["hairpin"] == true),
        "{ports:?}"
    );
    chained("DEL");
    for (node, id) in nodes.iter().zip(["c1", "c2"]) {
        for _twice in 0..2 {
            let netns = pods[id].0.path();
            node.flannel("DEL", id, &netns, &node.conf("0.3.1")).ok(id);
        }
        assert!(node.remembered().is_empty(), "{:?}", node.remembered());
    }
}
