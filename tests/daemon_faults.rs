//! What becomes of a daemon, and of what it forwards, when the clock jumps or a disk is full. Never touches this
//! machine's clock or disks: the clock is one process's own, the disks are a page of memory each. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/dropin.rs"]
mod dropin;
#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/node.rs"]
mod node;
#[path = "common/ns.rs"]
mod ns;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use dropin::Cluster;
use node::{CONFIG, Daemon, LODEN, Node, failed};
use serde_json::Value;

/// The wall clock of a process, by libfaketime; the monotonic one stays the machine's.
struct Clock {
    library: String,
    file: PathBuf,
}

impl Clock {
    fn new(dir: &Path) -> Self {
        let shown = Command::new("faketime")
            .args(["-f", "+0", "printenv", "LD_PRELOAD"])
            .output()
            .unwrap();
        assert!(shown.status.success(), "{shown:?}");
        let clock = Self {
            library: String::from_utf8(shown.stdout).unwrap().trim().to_owned(),
            file: dir.join("clock"),
        };
        clock.set_ahead(0);
        clock
    }

    /// Sets it to so many seconds after the true time.
    fn set_ahead(&self, seconds: i64) {
        let next = self.file.with_extension("next");
        fs::write(&next, format!("{seconds:+}\n")).unwrap();
        fs::rename(next, &self.file).unwrap();
    }

    fn give_to(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env("FAKETIME_TIMESTAMP_FILE", &self.file)
            .env("FAKETIME_CACHE_DURATION", "1")
            .env("DONT_FAKE_MONOTONIC", "1");
    }
}

#[test]
fn clock_that_jumps_costs_no_packet_and_the_renewal_follows_it() {
    const YEARS: i64 = 10 * 365 * 24 * 3600;
    let cluster = Cluster::new(2, r#"{"Network":"198.18.0.0/16","EnableNFTables":true}"#);
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::new(dir.path());
    let mut command = cluster.command(1, &[]);
    clock.give_to(&mut command);
    let one = cluster.spawn_command(1, command);
    one.wait_for_log("written: ready");
    let two = cluster.start(2, &[]);
    cluster.reaches(1, 2);
    let ping = cluster.ping_in_background(1, 2);
    ping.wait_for_answers(20);
    let granted = || cluster.etcd.ctl(&["lease", "list"]).lines().count();
    let before = granted();

    // Past the end of every lease there is, by this clock: ours is renewed, and nobody's ends.
    clock.set_ahead(YEARS);
    one.wait_for_log("renewed, for");
    assert_eq!(granted(), before + 1, "in etcd too");
    let peers = || cluster.status(1)["peers"].as_array().unwrap().len();
    assert_eq!(peers(), 1);
    // Back to long before the first: news is heard, and nothing is done in a hurry.
    clock.set_ahead(-YEARS);
    let key = "subnets/198.18.77.0-24";
    cluster.etcd.put(key, dropin::GOLDEN_VALUE);
    one.wait_until("the news", || peers() == 2);
    assert_eq!(cluster.status(1)["ready"], true);
    assert_eq!(one.log().matches("renewed, for").count(), 1);
    ping.wait_for_answers(100);
    assert_eq!(ping.lost(), 0);
    assert_eq!((one.stop(), two.stop()), (0, 0));
}

/// The daemon's command, after `script`, for which its directory `dir` is a disk of its own in memory: of so many
/// pages, empty, and nobody else's.
fn on_a_disk_of(pages: u32, node: &Node, dir: &str, script: &str, args: &[&str]) -> Command {
    let plain = node.command(Path::new(LODEN), args);
    let mut words = plain.get_args();
    let mut command = Command::new("ip");
    // `ip netns exec NAME` has mounts of its own.
    command.args(words.by_ref().take(3)).args(["sh", "-c"]);
    let disk = node.path(dir);
    let size = 4 * pages;
    command.arg(format!(
        "cd / && mount -t tmpfs -o size={size}k none {0} && cd {0} && {{ {script}; }} && exec \"$@\"",
        disk.display()
    ));
    command.arg("sh").args(words);
    command
}

/// A file as the daemon sees it, on a disk that nobody else does.
fn seen_by(daemon: &Daemon, path: &Path) -> PathBuf {
    let root = PathBuf::from(format!("/proc/{}/root", daemon.child.id()));
    root.join(path.strip_prefix("/").unwrap())
}

/// Leaves no room on the disk that `dir` is on.
fn fill(dir: &Path) {
    let mut filler = fs::File::create(dir.join(".filler")).unwrap();
    let full = loop {
        if let Err(error) = filler.write_all(&[0; 512]) {
            break error;
        }
    };
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
}

fn make_room(dir: &Path) {
    fs::remove_file(dir.join(".filler")).unwrap();
}

#[test]
fn full_disk_for_subnet_env_ends_the_start_by_name() {
    let node = Node::new(CONFIG);
    // One page for the lock file, or none.
    for pages in [1, 2] {
        let fill = "head -c 4096 /dev/zero > .filler";
        let command = on_a_disk_of(pages, &node, "run", fill, &["--iface", "eth0"]);
        let (code, error) = failed(command);
        assert_eq!(code, 1, "{error}");
        let expected = ["run/.subnet.env", "No space left", "--subnet-file"];
        assert!(expected.iter().all(|part| error.contains(part)), "{error}");
        node.assert_clean();
    }
}

#[test]
fn full_disk_under_a_running_daemon_leaves_subnet_env_as_it_was_until_there_is_room() {
    let node = Node::new(CONFIG);
    let daemon = node.spawn(on_a_disk_of(16, &node, "run", "true", &["--iface", "eth0"]));
    daemon.wait_for_log("written: ready");
    let run = seen_by(&daemon, &node.path("run"));
    let env = || fs::read_to_string(run.join("subnet.env")).unwrap();
    let status = || -> Value {
        let socket = run.join("subnet.sock");
        let output = Command::new(LODEN)
            .args(["status", "--json", "--socket"])
            .arg(socket)
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    };
    let before = env();
    fill(&run);
    node.ns.ip("link set eth0 mtu 1400");
    daemon.wait_until("the device to follow", || {
        node.ns.link("flannel0")["mtu"] == 1372
    });
    daemon.wait_until("status to tell", || {
        status()["conflicts"].to_string().contains("No space left")
    });
    assert_eq!(env(), before);
    make_room(&run);
    let expected = before.replace("MTU=1472", "MTU=1372");
    daemon.wait_until("subnet.env to follow", || env() == expected);
    daemon.wait_until("status to tell", || {
        status()["conflicts"] == Value::Array(Vec::new())
    });
    assert_eq!(daemon.log().matches("No space left").count(), 1);
    assert_eq!(daemon.stop(), 0);
}

#[test]
fn full_disk_of_the_local_store_makes_new_nodes_wait_and_harms_no_running_one() {
    let node = Node::new(CONFIG);
    let command = on_a_disk_of(16, &node, "store", "true", &["--iface", "eth0"]);
    let daemon = node.spawn(command);
    daemon.wait_for_log("no network configuration");
    let store = seen_by(&daemon, &node.path("store"));
    fs::write(store.join("next"), CONFIG).unwrap();
    // What needs no room beside the lease: its directories.
    for dir in ["subnets", "expiry"] {
        fs::create_dir(store.join(dir)).unwrap();
    }
    fill(&store);
    fs::rename(store.join("next"), store.join("config")).unwrap();
    daemon.wait_for_log("waiting for the lease: ");
    assert!(daemon.log().contains("No space left"), "{}", daemon.log());
    assert_eq!(node.env(), "", "no pod may come");
    make_room(&store);
    daemon.wait_for_log("written: ready");

    let key = node.env_value("FLANNEL_SUBNET").replace(".1/24", ".0-24");
    let lease = || fs::read_to_string(store.join("subnets").join(&key)).unwrap();
    let before = lease();
    fill(&store);
    node.ns.ip("addr add 198.51.100.5/24 dev eth0");
    node.ns.ip("addr del 192.0.2.1/24 dev eth0");
    daemon.wait_for_log("lease not updated, trying again");
    assert_eq!(
        (lease(), &node.status()["ready"]),
        (before, &Value::Bool(true))
    );
    make_room(&store);
    daemon.wait_until("the lease to say the new address", || {
        lease() == r#"{"PublicIP":"198.51.100.5","PublicIPv6":null}"#
    });
    let told = daemon.log().matches("lease not updated").count();
    assert_eq!(told, 1, "{}", daemon.log());
    let leases = fs::read_dir(store.join("subnets")).unwrap().count();
    assert_eq!(leases, 1, "nothing is left of what failed");
    assert_eq!(daemon.stop(), 0);
    node.assert_clean();
}
