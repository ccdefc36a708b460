//! Two daemons do not share a port or a device by accident, and a node that lacks something is told what. Needs
//! root.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use loden::datapath::{Datapath, EngineKind, OpenError, Settings};
use loden::lab::{Lab, Member, NetNs, Wire};
use net::{Shape, ip, lab, nothing_left, wait_for};

const ENGINES: [EngineKind; 2] = [EngineKind::Mmsg, EngineKind::Portable];

fn settings(engine: EngineKind, n: u8, device: &str) -> Settings {
    Settings {
        device: device.to_owned(),
        ..Shape::of(engine).settings(n, &Arc::default())
    }
}

/// Opens in `netns`. What this process has just closed may be open for a moment longer in a child that another
/// test has forked and that is about to become a program: that is waited for.
fn open(netns: &NetNs, settings: Settings) -> Result<Datapath, OpenError> {
    let me = i32::try_from(std::process::id()).unwrap();
    let mut result = None;
    wait_for("forked children", || {
        let opened = netns.run(|| Datapath::open(settings.clone())).unwrap();
        let held_by_me = matches!(opened, Err(OpenError::Locked { pid, .. }) if pid == me);
        result = Some(opened);
        !held_by_me
    });
    result.unwrap()
}

fn refused(netns: &NetNs, settings: Settings) -> OpenError {
    match open(netns, settings) {
        Err(error) => error,
        Ok(_) => panic!("it was opened"),
    }
}

/// A namespace with the addresses of nodes 1 and 2.
fn one_node() -> (Lab, NetNs) {
    let lab = lab(1, 0, Wire::Superpacket);
    let netns = lab.netns(Member::Node(1));
    ip(&netns, "addr add 192.0.2.2/24 dev eth0");
    (lab, netns)
}

const HOLD_IN: &str = "EXCLUSIVE_HOLD_IN";
const HELD: &str = "holding";

#[test]
#[ignore = "not a test: the body of the other daemon"]
fn holder() {
    let netns = std::env::var_os(HOLD_IN).expect("started by a test");
    let netns = NetNs::named(netns.into_string().unwrap());
    let _held = open(&netns, settings(EngineKind::Mmsg, 1, "flannel7")).unwrap();
    println!("\n{HELD}");
    // Until the test ends it, or closes the pipe.
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Another process that has a data plane open in `netns`.
struct Holder(Child);

impl Holder {
    fn start(netns: &NetNs) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "holder"])
            .env(HOLD_IN, netns.name())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let holder = Self(child);
        assert!(
            said.lines().any(|line| line.unwrap() == HELD),
            "the other daemon ended early"
        );
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_second_daemon_is_told_what_is_held_and_by_whom() {
    for engine in ENGINES {
        let (_lab, netns) = one_node();
        let holder = Holder::start(&netns);
        let holder_pid = i32::try_from(holder.0.id()).unwrap();
        let same_port = refused(&netns, settings(engine, 1, "flannel%d"));
        assert!(
            matches!(&same_port, OpenError::Locked { what, pid }
                if what == "port 192.0.2.1:8285" && *pid == holder_pid),
            "{same_port}"
        );
        let same_device = refused(&netns, settings(engine, 2, "flannel7"));
        assert!(
            matches!(&same_device, OpenError::Locked { what, pid }
                if what == "device flannel7" && *pid == holder_pid),
            "{same_device}"
        );
        // Another address and another device do not meet it.
        let other = open(&netns, settings(engine, 2, "flannel%d")).unwrap();
        assert_eq!(other.device(), "flannel0");
        drop(holder);
        // What it held ended with it, however it ended.
        open(&netns, settings(engine, 1, "flannel7")).unwrap();
    }
}

#[test]
fn daemons_in_different_namespaces_do_not_meet() {
    let (_first_lab, first) = one_node();
    let (_second_lab, second) = one_node();
    let _first = open(&first, settings(EngineKind::Mmsg, 1, "flannel0")).unwrap();
    let _second = open(&second, settings(EngineKind::Mmsg, 1, "flannel0")).unwrap();
}

#[test]
fn an_unrelated_holder_of_the_port_is_a_bind_error() {
    let (_lab, netns) = one_node();
    let at: SocketAddr = "192.0.2.1:8285".parse().unwrap();
    let unrelated = netns.run(|| UdpSocket::bind(at)).unwrap().unwrap();
    for engine in ENGINES {
        let error = refused(&netns, settings(engine, 1, "flannel%d"));
        assert!(
            matches!(&error, OpenError::Bind { bind, source }
                if *bind == at && source.kind() == std::io::ErrorKind::AddrInUse),
            "{error}"
        );
    }
    drop(unrelated);
    for engine in ENGINES {
        nothing_left(&netns);
        open(&netns, settings(engine, 1, "flannel%d")).unwrap();
    }
}

#[test]
fn an_address_that_this_node_does_not_have_is_a_bind_error() {
    let (_lab, netns) = one_node();
    for engine in ENGINES {
        let error = refused(&netns, settings(engine, 9, "flannel%d"));
        assert!(
            matches!(&error, OpenError::Bind { source, .. }
                if source.kind() == std::io::ErrorKind::AddrNotAvailable),
            "{error}"
        );
        let said = error.to_string();
        assert!(
            said.contains("--iface") && !said.contains("ss -ulnp"),
            "{said}"
        );
    }
    nothing_left(&netns);
}

/// A device has 256 queues at most (`MAX_TAP_QUEUES`, drivers/net/tun.c), of which a worker takes two.
#[test]
fn more_workers_than_a_device_has_queues_for_are_as_many_as_it_has() {
    let (_lab, netns) = one_node();
    let many = Settings {
        workers: 130,
        ..settings(EngineKind::Mmsg, 1, "flannel%d")
    };
    let opened = open(&netns, many).unwrap();
    let status = opened.status();
    assert_eq!(status.workers.len(), 128);
    let detached = |c: &&loden::datapath::status::Capability| c.name == "tun-detached-writes";
    let capability = status.capabilities.iter().find(detached).unwrap();
    assert!(capability.used, "every worker has its own to write through");
    let sockets = || std::fs::read_to_string("/proc/thread-self/net/udp");
    let lines = netns.run(sockets).unwrap().unwrap();
    let on_the_port = lines.lines().filter(|line| line.contains(":205D ")).count();
    assert_eq!(on_the_port, 128, "nothing arrives where nobody reads");
    drop(opened);
    nothing_left(&netns);
}

const LACKING_IN: &str = "EXCLUSIVE_LACKING_IN";

#[test]
#[ignore = "not a test: the body of a process that lacks something"]
fn lacking() {
    // Already inside the namespace, and not allowed to enter one again.
    std::env::var_os(LACKING_IN).expect("started by a test");
    for engine in ENGINES {
        let said = match Datapath::open(settings(engine, 1, "flannel%d")) {
            Ok(_) => "opened".to_owned(),
            Err(OpenError::NoTun(error)) => format!("NoTun {error}"),
            Err(OpenError::Device { device, source }) => format!("Device {device} {source}"),
            Err(other) => format!("other: {other}"),
        };
        println!("\n{engine:?}: {said}");
    }
}

/// Runs [`lacking`] behind `wrapper`, a program that takes something away and starts what follows.
fn without(netns: &NetNs, wrapper: &[&str]) -> String {
    let exe = std::env::current_exe().unwrap();
    let mut command = Command::new(wrapper[0]);
    command
        .args(&wrapper[1..])
        .arg(exe)
        .args(["--ignored", "--exact", "--nocapture", "lacking"])
        .env(LACKING_IN, netns.name())
        .stdout(Stdio::piped());
    let output = netns
        .spawn(&mut command)
        .unwrap()
        .wait_with_output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    said
}

#[test]
fn without_the_clone_device_the_error_says_so_and_nothing_is_left() {
    let (_lab, netns) = one_node();
    let said = without(
        &netns,
        &[
            "unshare",
            "--mount",
            "sh",
            "-c",
            "mount -t tmpfs none /dev/net && exec \"$@\"",
            "sh",
        ],
    );
    for engine in ENGINES {
        assert!(
            said.contains(&format!("{engine:?}: NoTun No such file")),
            "{said}"
        );
    }
    nothing_left(&netns);
}

#[test]
fn without_the_right_to_make_devices_the_error_says_so_and_nothing_is_left() {
    let (_lab, netns) = one_node();
    let said = without(
        &netns,
        &[
            "setpriv",
            "--bounding-set=-net_admin",
            "--inh-caps=-net_admin",
        ],
    );
    for engine in ENGINES {
        assert!(
            said.contains(&format!(
                "{engine:?}: Device flannel%d Operation not permitted"
            )),
            "{said}"
        );
    }
    nothing_left(&netns);
}
