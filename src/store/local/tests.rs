use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;

use proptest::prelude::*;
use tempfile::TempDir;

use super::scan::MAX_ENTRIES;
use super::watch::Watcher;
use super::*;
use crate::lease::{LeaseAttrs, LeaseExtension, MAX_ATTRS_LEN, Subnets};
use crate::store::LEASE_TTL;

const HOUR: Duration = Duration::from_secs(3600);

/// 10.9.0.4/30 to 10.9.0.28/30: seven subnets.
const SMALL: &str = r#"{"Network":"10.9.0.0/27","SubnetLen":30,"Backend":{"Type":"udp"}}"#;

/// A directory and a clock that several nodes share.
struct Lab {
    dir: TempDir,
    clock: FakeClock,
}

#[derive(Clone)]
struct FakeClock(Arc<Mutex<(SystemTime, Duration)>>);

impl FakeClock {
    fn at(now: SystemTime) -> Self {
        Self(Arc::new(Mutex::new((now, Duration::ZERO))))
    }

    /// Lets time pass.
    fn pass(&self, by: Duration) {
        let mut clocks = self.0.lock().unwrap();
        *clocks = (clocks.0 + by, clocks.1 + by);
    }

    /// Sets the wall clock.
    fn set(&self, to: SystemTime) {
        self.0.lock().unwrap().0 = to;
    }
}

impl Clock for FakeClock {
    fn wall(&self) -> SystemTime {
        self.0.lock().unwrap().0
    }

    fn monotonic(&self) -> Duration {
        self.0.lock().unwrap().1
    }
}

impl Lab {
    fn new(config: &str) -> Self {
        // In memory where there is such a place: what is tested is what is written, not how fast a disk is.
        let dir = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        fs::write(dir.path().join(CONFIG), config).unwrap();
        let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(1_764_000_000);
        Self {
            dir,
            clock: FakeClock::at(noon),
        }
    }

    /// Another machine with its own copy of the directory, on the same time.
    fn copy(&self) -> Self {
        let other = Self {
            clock: self.clock.clone(),
            ..Self::new("")
        };
        fs::copy(self.path(CONFIG), other.path(CONFIG)).unwrap();
        other
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn store(&self) -> LocalStore {
        let rescan = Duration::from_secs(100 * 24 * 3600);
        LocalStore::with_clock(
            self.dir.path().to_owned(),
            Box::new(self.clock.clone()),
            rescan,
        )
    }

    fn lease_text(&self, key: &str) -> String {
        fs::read_to_string(self.path("subnets").join(key)).unwrap()
    }

    fn write(&self, kind: &str, key: &str, text: &str) {
        fs::create_dir_all(self.path(kind)).unwrap();
        fs::write(self.path(kind).join(key), text).unwrap();
    }

    /// A lease as another machine would have written it `ago`, to the second.
    fn write_lease(&self, key: &str, node: u8, ago: Duration) {
        let claimed = self.clock.wall() - ago;
        let sidecar = format!(
            r#"{{"Expires":{},"Claimed":{},"Owner":"192.0.2.{node}","Ecn":true}}"#,
            sidecar::unix(claimed + LEASE_TTL).as_secs(),
            sidecar::unix(claimed).as_nanos(),
        );
        self.write(EXPIRY, key, &sidecar);
        self.write(SUBNETS, key, &value(node));
    }

    fn keys(&self) -> Vec<String> {
        let names = fs::read_dir(self.path(SUBNETS)).unwrap();
        let mut keys: Vec<String> = names
            .map(|name| name.unwrap().file_name().into_string().unwrap())
            .collect();
        keys.sort();
        keys
    }

    /// Copies one key's files to another machine, or removes them there.
    fn synchronise(&self, to: &Self, key: &str) {
        for kind in [SUBNETS, EXPIRY] {
            match fs::read_to_string(self.path(kind).join(key)) {
                Ok(text) => to.write(kind, key, &text),
                Err(_) => fs::remove_file(to.path(kind).join(key)).unwrap(),
            }
        }
    }
}

fn value(node: u8) -> String {
    format!(r#"{{"PublicIP":"192.0.2.{node}","PublicIPv6":null}}"#)
}

fn request(node: u8) -> AcquireRequest {
    AcquireRequest {
        attrs: LeaseAttrs {
            public_ip: Some(Ipv4Addr::new(192, 0, 2, node)),
            ..LeaseAttrs::default()
        },
        previous: None,
        extension: LeaseExtension { ecn: true },
    }
}

fn asking(node: u8, key: &str) -> AcquireRequest {
    AcquireRequest {
        previous: Some(key.parse().unwrap()),
        ..request(node)
    }
}

fn node(n: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, n])
}

/// The keys and nodes of a snapshot, and its problems.
fn snapshot(news: &[StoreEvent]) -> (Vec<(String, IpAddr)>, Vec<String>) {
    let last = news.iter().rev().find_map(|event| match event {
        StoreEvent::Snapshot { leases, problems } => Some((leases, problems)),
        StoreEvent::Delta { .. } | StoreEvent::OwnLost { .. } => None,
    });
    let (leases, problems) = last.expect("a snapshot");
    let lease = |lease: &Lease| (lease.subnets.to_string(), lease.attrs.node().unwrap());
    (
        leases.iter().map(lease).collect(),
        problems.iter().map(ToString::to_string).collect(),
    )
}

fn lost(news: &[StoreEvent]) -> Option<LostTo> {
    news.iter().find_map(|event| match event {
        StoreEvent::OwnLost { to, .. } => Some(*to),
        StoreEvent::Delta { .. } | StoreEvent::Snapshot { .. } => None,
    })
}

#[tokio::test]
async fn a_lease_has_flannels_bytes_and_a_sidecar_of_its_own() {
    let lab = Lab::new(SMALL);
    let lease = lab.store().acquire(asking(1, "10.9.0.8-30")).await.unwrap();
    assert_eq!(lease.subnets.to_string(), "10.9.0.8-30");
    assert_eq!(lease.expires, Some(lab.clock.wall() + LEASE_TTL));
    assert_eq!(lab.lease_text("10.9.0.8-30"), value(1));
    assert_eq!(
        fs::read_to_string(lab.path("expiry/10.9.0.8-30")).unwrap(),
        r#"{"Expires":1764086400,"Claimed":1764000000000000000,"Owner":"192.0.2.1","Ecn":true}"#
    );
    assert_eq!(lab.keys(), ["10.9.0.8-30"], "nothing else stays behind");
}

#[tokio::test]
async fn a_missing_configuration_is_told_apart_and_may_come_later() {
    let lab = Lab::new(SMALL);
    fs::rename(lab.path(CONFIG), lab.path("aside")).unwrap();
    let store = lab.store();
    let missing = store.network_config().await.unwrap_err();
    assert!(
        matches!(missing, StoreError::ConfigMissing { .. }),
        "{missing}"
    );
    let missing = store.acquire(request(1)).await.unwrap_err();
    assert!(
        matches!(missing, StoreError::ConfigMissing { .. }),
        "{missing}"
    );
    assert!(
        !lab.path(SUBNETS).exists(),
        "nothing is made in what may be the wrong directory"
    );
    // Mounted configuration is a link.
    symlink(lab.path("aside"), lab.path(CONFIG)).unwrap();
    assert!(store.acquire(request(1)).await.is_ok());

    for (text, named) in [
        ("{", "not one JSON object"),
        ("{}", "please define Network"),
    ] {
        fs::write(lab.path("aside"), text).unwrap();
        let error = store.network_config().await.unwrap_err();
        assert!(matches!(error, StoreError::Config { .. }));
        assert!(error.to_string().contains(named), "{error}");
    }
    fs::write(lab.path("aside"), vec![b' '; MAX_CONFIG_LEN + 1]).unwrap();
    let error = store.network_config().await.unwrap_err().to_string();
    assert!(error.contains("larger than"), "{error}");
    fs::remove_file(lab.path(CONFIG)).unwrap();
    nix::unistd::mkfifo(&lab.path(CONFIG), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = store.network_config().await.unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}

#[tokio::test]
async fn a_restart_finds_its_lease_by_public_ip_and_writes_nothing() {
    let lab = Lab::new(SMALL);
    let first = lab.store().acquire(request(1)).await.unwrap();
    let key = first.subnets.to_string();
    let inodes = || {
        [SUBNETS, EXPIRY].map(|kind| {
            use std::os::unix::fs::MetadataExt;
            fs::metadata(lab.path(kind).join(&key)).unwrap().ino()
        })
    };
    let before = inodes();
    lab.clock.pass(HOUR);
    for previous in [
        None,
        Some(first.subnets),
        Some("10.9.0.28-30".parse().unwrap()),
    ] {
        let again = lab
            .store()
            .acquire(AcquireRequest {
                previous,
                ..request(1)
            })
            .await
            .unwrap();
        assert_eq!(again, first);
    }
    assert_eq!(inodes(), before);
    // Later in its life it is extended; other attributes are published.
    lab.clock.pass(12 * HOUR);
    let changed = AcquireRequest {
        attrs: LeaseAttrs {
            backend_type: "vxlan".into(),
            ..request(1).attrs
        },
        ..request(1)
    };
    let again = lab.store().acquire(changed).await.unwrap();
    assert_eq!(again.subnets, first.subnets);
    assert_eq!(again.expires, Some(lab.clock.wall() + LEASE_TTL));
    assert!(lab.lease_text(&key).contains(r#""BackendType":"vxlan""#));
    assert_eq!(lab.keys(), [key.as_str()]);
}

#[tokio::test]
async fn the_previous_subnets_are_taken_only_if_free_and_compatible() {
    let lab = Lab::new(SMALL);
    let mine = lab
        .store()
        .acquire(asking(1, "10.9.0.16-30"))
        .await
        .unwrap();
    assert_eq!(mine.subnets.to_string(), "10.9.0.16-30");
    // A cloned disk brings the same subnet.env to another node.
    let clone = lab
        .store()
        .acquire(asking(2, "10.9.0.16-30"))
        .await
        .unwrap();
    assert_ne!(clone.subnets, mine.subnets);
    for incompatible in ["10.9.0.0-30", "10.8.0.4-30", "10.9.0.24-29"] {
        let other = lab.store().acquire(asking(3, incompatible)).await.unwrap();
        assert_ne!(other.subnets.to_string(), incompatible);
    }
    // A lease that fits the network no longer is given back.
    fs::write(
        lab.path(CONFIG),
        r#"{"Network":"10.9.0.0/27","SubnetLen":30,"SubnetMax":"10.9.0.12"}"#,
    )
    .unwrap();
    let moved = lab
        .store()
        .acquire(asking(1, "10.9.0.16-30"))
        .await
        .unwrap();
    assert_ne!(moved.subnets, mine.subnets);
    assert!(!lab.path("subnets/10.9.0.16-30").exists());
}

#[tokio::test]
async fn a_reservation_is_kept_for_its_node_and_never_ends() {
    let lab = Lab::new(SMALL);
    lab.write(SUBNETS, "10.9.0.8-30", &value(1));
    for other in 2..=7 {
        let lease = lab
            .store()
            .acquire(asking(other, "10.9.0.8-30"))
            .await
            .unwrap();
        assert_ne!(lease.subnets.to_string(), "10.9.0.8-30");
    }
    let full = lab.store().acquire(request(8)).await.unwrap_err();
    assert!(matches!(full, StoreError::OutOfSubnets { .. }), "{full}");

    let store = lab.store();
    let lease = store.acquire(request(1)).await.unwrap();
    assert_eq!(
        (lease.subnets.to_string().as_str(), lease.expires),
        ("10.9.0.8-30", None)
    );
    lab.clock.pass(1000 * HOUR);
    assert_eq!(store.renew(&lease).await.unwrap(), lease);
    let again = lab.store().acquire(request(1)).await.unwrap();
    assert_eq!(
        again, lease,
        "also after a restart, with what else it publishes beside"
    );
    assert!(again.extension.ecn);
    assert_eq!(lab.lease_text("10.9.0.8-30"), value(1));

    // An operator's reservation goes before a lease the node has.
    let leased = lab
        .store()
        .acquire(asking(9, "10.9.0.12-30"))
        .await
        .unwrap();
    lab.write(SUBNETS, "10.9.0.16-30", &value(9));
    fs::remove_file(lab.path("expiry/10.9.0.16-30")).unwrap();
    let moved = lab
        .store()
        .acquire(asking(9, &leased.subnets.to_string()))
        .await
        .unwrap();
    assert_eq!(moved.subnets.to_string(), "10.9.0.16-30");
    assert!(!lab.path("subnets/10.9.0.12-30").exists());
}

#[tokio::test]
async fn what_has_expired_is_taken_over_last() {
    let lab = Lab::new(SMALL);
    lab.write_lease("10.9.0.4-30", 1, 25 * HOUR);
    lab.write_lease("10.9.0.8-30", 2, HOUR);
    lab.write("subnets", "10.9.0.24-29", "garbage covers two of them");
    for fresh in 3..=5 {
        let lease = lab.store().acquire(request(fresh)).await.unwrap();
        assert_ne!(lease.subnets.to_string(), "10.9.0.4-30");
    }
    let lease = lab.store().acquire(request(6)).await.unwrap();
    assert_eq!(lease.subnets.to_string(), "10.9.0.4-30");
    assert_eq!(lab.lease_text("10.9.0.4-30"), value(6));
    // Whoever had it comes back too late, and a node whose lease ran out comes back in time.
    let late = lab
        .store()
        .acquire(asking(1, "10.9.0.4-30"))
        .await
        .unwrap_err();
    assert!(matches!(late, StoreError::OutOfSubnets { .. }), "{late}");
    lab.clock.pass(30 * HOUR);
    let back = lab.store().acquire(request(2)).await.unwrap();
    assert_eq!(back.subnets.to_string(), "10.9.0.8-30");
    assert_eq!(back.expires, Some(lab.clock.wall() + LEASE_TTL));
}

#[tokio::test]
async fn dual_stack_leases_clear_both_families() {
    let lab = Lab::new(
        r#"{"Network":"10.9.0.0/28","SubnetMin":"10.9.0.0","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#,
    );
    lab.write_lease("10.9.0.0-30&fd00:0:0:1::-64", 1, 25 * HOUR);
    lab.write_lease("10.9.0.4-30&fd00:0:0:2::-64", 2, HOUR);
    let key = "10.9.0.0-30&fd00:0:0:3::-64";
    let lease = lab.store().acquire(asking(3, key)).await.unwrap();
    assert_eq!(lease.subnets.to_string(), key);
    assert_eq!(
        lab.keys(),
        [key, "10.9.0.4-30&fd00:0:0:2::-64"],
        "what it overlaps is gone"
    );
    let halves = lab
        .store()
        .acquire(asking(4, "10.9.0.8-30&fd00:0:0:2::-64"))
        .await
        .unwrap();
    assert_ne!(
        halves.subnets.v6(),
        Some("fd00:0:0:2::/64".parse().unwrap())
    );
}

#[tokio::test]
async fn a_family_that_comes_or_goes_leaves_the_other_as_it_was() {
    const SINGLE: &str = r#"{"Network":"10.9.0.0/16"}"#;
    const SIX: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
    const DUAL: &str = r#"{"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
    for (before, after) in [(SINGLE, DUAL), (DUAL, SINGLE), (SIX, DUAL), (DUAL, SIX)] {
        // With and without the file that says what the run before had.
        for told in [true, false] {
            let lab = Lab::new(before);
            let asking = |config: &str| {
                let mut request = request(3);
                let six = Some("2001:db8::3".parse().unwrap());
                request.attrs.public_ipv6 = six.filter(|_| config != SINGLE);
                request.attrs.public_ip = request.attrs.public_ip.filter(|_| config != SIX);
                request
            };
            let held = lab.store().acquire(asking(before)).await.unwrap().subnets;
            fs::write(lab.path(CONFIG), after).unwrap();
            let mut again = asking(after);
            again.previous = Some(held).filter(|_| told);
            // Without the file, only the first address tells.
            let same_node = asking(before).attrs.node() == again.attrs.node();
            let got = lab.store().acquire(again).await.unwrap().subnets;
            if told || same_node {
                for (was, is) in [
                    (
                        held.v4().map(ipnet::IpNet::V4),
                        got.v4().map(ipnet::IpNet::V4),
                    ),
                    (
                        held.v6().map(ipnet::IpNet::V6),
                        got.v6().map(ipnet::IpNet::V6),
                    ),
                ] {
                    assert!(
                        was.is_none() || is.is_none() || was == is,
                        "{held} then {got}"
                    );
                }
                assert_eq!(lab.keys(), [got.to_string()], "{before} then {after}");
            }
            assert_eq!(got.v6().is_some(), after != SINGLE);
            assert_eq!(got.v4().is_some(), after != SIX);
        }
    }
}

#[tokio::test]
async fn a_renewal_extends_only_what_is_still_ours() {
    let lab = Lab::new(SMALL);
    let store = lab.store();
    let lease = store.acquire(asking(5, "10.9.0.4-30")).await.unwrap();
    lab.clock.pass(23 * HOUR);
    let renewed = store.renew(&lease).await.unwrap();
    assert_eq!(
        renewed,
        Lease {
            expires: Some(lab.clock.wall() + LEASE_TTL),
            ..lease.clone()
        }
    );
    // By another value of the store, too: after a hand-over.
    lab.clock.pass(HOUR);
    assert!(lab.store().renew(&lease).await.unwrap().expires > renewed.expires);

    let to = |error: RenewError| match error {
        RenewError::Lost { to, .. } => to,
        RenewError::Store(e) => panic!("{e}"),
    };
    lab.write_lease("10.9.0.4-30", 6, 48 * HOUR + HOUR);
    assert!(
        store.renew(&lease).await.is_ok(),
        "an expired claim takes nothing away"
    );
    assert_eq!(lab.lease_text("10.9.0.4-30"), value(5));
    lab.write_lease("10.9.0.4-30", 6, Duration::ZERO);
    assert!(store.renew(&lease).await.is_ok(), "nor does a later one");
    lab.clock.pass(30 * HOUR);
    lab.write_lease("10.9.0.4-30", 6, HOUR);
    assert_eq!(
        to(store.renew(&lease).await.unwrap_err()),
        LostTo::Node(node(6))
    );
    assert_eq!(
        lab.lease_text("10.9.0.4-30"),
        value(6),
        "whoever took what had run out keeps it"
    );

    let other = store.acquire(asking(5, "10.9.0.8-30")).await.unwrap();
    fs::remove_file(lab.path("subnets/10.9.0.8-30")).unwrap();
    assert_eq!(to(store.renew(&other).await.unwrap_err()), LostTo::Nobody);
}

#[tokio::test]
async fn the_watch_follows_every_change_and_says_nothing_otherwise() {
    let lab = Lab::new(SMALL);
    let mut watcher = Watcher::new(lab.store().inner);
    assert_eq!(
        snapshot(&watcher.pass()),
        (vec![], vec![]),
        "no directory yet is no problem"
    );
    lab.write_lease("10.9.0.4-30", 1, HOUR);
    let key = || "10.9.0.4-30".to_owned();
    assert_eq!(snapshot(&watcher.pass()).0, [(key(), node(1))]);
    assert_eq!(watcher.pass(), []);
    lab.write_lease("10.9.0.4-30", 2, HOUR);
    lab.write_lease("10.9.0.8-30", 1, HOUR);
    lab.write(SUBNETS, ".10.9.0.12-30.Xyz", "half a fi");
    let moved = [(key(), node(2)), ("10.9.0.8-30".to_owned(), node(1))];
    assert_eq!(snapshot(&watcher.pass()), (moved.to_vec(), vec![]));
    fs::remove_file(lab.path("subnets/10.9.0.4-30")).unwrap();
    assert_eq!(
        snapshot(&watcher.pass()).0,
        [("10.9.0.8-30".to_owned(), node(1))]
    );
    lab.clock.pass(23 * HOUR);
    assert_eq!(snapshot(&watcher.pass()).0, [], "it has expired");
    assert_eq!(watcher.pass(), []);
    lab.write_lease("10.9.0.8-30", 1, HOUR);
    assert_eq!(snapshot(&watcher.pass()).0.len(), 1, "it is renewed late");
}

#[tokio::test]
async fn damaged_entries_are_named_once_and_withdraw_nobody() {
    let lab = Lab::new(SMALL);
    let mut watcher = Watcher::new(lab.store().inner);
    for (key, node) in [("10.9.0.4-30", 1), ("10.9.0.8-30", 2), ("10.9.0.12-30", 3)] {
        lab.write_lease(key, node, HOUR);
    }
    let healthy = snapshot(&watcher.pass()).0;
    assert_eq!(healthy.len(), 3);

    lab.write(SUBNETS, "10.9.0.4-30", r#"{"PublicIP":"192.0.2"}"#);
    lab.write(EXPIRY, "10.9.0.8-30", r#"{"Expires":"soon"}"#);
    fs::remove_file(lab.path("subnets/10.9.0.12-30")).unwrap();
    nix::unistd::mkfifo(
        &lab.path("subnets/10.9.0.12-30"),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    symlink("10.9.0.8-30", lab.path("subnets/10.9.0.16-30")).unwrap();
    fs::create_dir(lab.path("subnets/10.9.0.20-30")).unwrap();
    lab.write(SUBNETS, "10.9.0.24-30", &" ".repeat(MAX_ATTRS_LEN + 1));
    lab.write(SUBNETS, "10.9.0.25-30", &value(9));
    lab.write(SUBNETS, "README", "hello");
    let (leases, problems) = snapshot(&watcher.pass());
    assert_eq!(leases, healthy);
    for (file, what) in [
        ("10.9.0.4-30", "PublicIP: expected a unicast IPv4 address"),
        ("10.9.0.8-30", "Expires: expected seconds"),
        ("10.9.0.12-30", "not a regular file"),
        ("10.9.0.16-30", "not a regular file"),
        ("10.9.0.20-30", "not a regular file"),
        ("10.9.0.24-30", "larger than the 16384 bytes"),
        ("10.9.0.25-30", "use 10.9.0.24-30"),
        ("README", "the name is no lease key"),
    ] {
        let named = |problem: &&String| problem.contains(&format!("/{file}:"));
        let problem = problems
            .iter()
            .find(named)
            .unwrap_or_else(|| panic!("{file}"));
        assert!(problem.contains(what), "{problem}");
    }
    assert_eq!(problems.len(), 8);
    assert_eq!(watcher.pass(), [], "said once");

    lab.write(SUBNETS, "10.9.0.4-30", "{}");
    let (leases, problems) = snapshot(&watcher.pass());
    assert_eq!(
        (leases, problems.len()),
        (healthy, 1),
        "another damage is said again"
    );
    lab.write(SUBNETS, "10.9.0.4-30", &value(7));
    lab.write(
        EXPIRY,
        "10.9.0.4-30",
        &fs::read_to_string(lab.path("expiry/10.9.0.4-30"))
            .unwrap()
            .replace("2.1", "2.7"),
    );
    fs::remove_file(lab.path("subnets/10.9.0.12-30")).unwrap();
    let (leases, problems) = snapshot(&watcher.pass());
    for file in ["10.9.0.4-30", "10.9.0.12-30"] {
        let solved = |p: &String| p.contains(&format!("/{file}: in order again"));
        assert!(problems.iter().any(solved), "{problems:?}");
    }
    let now = [
        ("10.9.0.4-30".to_owned(), node(7)),
        ("10.9.0.8-30".to_owned(), node(2)),
    ];
    assert_eq!(leases, now, "repaired is taken over, removed is withdrawn");
    lab.clock.pass(24 * HOUR);
    assert_eq!(
        snapshot(&watcher.pass()).0,
        [],
        "and a damaged one ends when it would have"
    );
}

#[tokio::test]
async fn nothing_is_allocated_over_what_cannot_be_read() {
    let lab = Lab::new(SMALL);
    lab.write(SUBNETS, "10.9.0.0-28", "garbage");
    lab.write(SUBNETS, "10.9.0.16-29", "{}");
    let mut keys = Vec::new();
    for n in 1..=2 {
        keys.push(
            lab.store()
                .acquire(request(n))
                .await
                .unwrap()
                .subnets
                .to_string(),
        );
    }
    keys.sort();
    assert_eq!(keys, ["10.9.0.24-30", "10.9.0.28-30"]);
    assert!(lab.store().acquire(asking(3, "10.9.0.4-30")).await.is_err());
}

#[tokio::test]
async fn a_directory_that_goes_away_and_comes_back_costs_nobody_anything() {
    let lab = Lab::new(SMALL);
    let store = lab.store();
    store.acquire(asking(1, "10.9.0.4-30")).await.unwrap();
    lab.write_lease("10.9.0.8-30", 2, HOUR);
    let mut watcher = Watcher::new(Arc::clone(&store.inner));
    assert_eq!(snapshot(&watcher.pass()).0.len(), 2);

    let aside = lab.dir.path().with_extension("aside");
    fs::rename(lab.dir.path(), &aside).unwrap();
    let (leases, problems) = snapshot(&watcher.pass());
    assert_eq!(leases.len(), 2);
    assert!(
        problems[0].contains("known leases are kept"),
        "{problems:?}"
    );
    // A mount point without what belongs there.
    fs::create_dir_all(lab.path(SUBNETS)).unwrap();
    assert_eq!(watcher.pass(), []);
    fs::remove_dir_all(lab.dir.path()).unwrap();
    fs::rename(&aside, lab.dir.path()).unwrap();
    let (leases, problems) = snapshot(&watcher.pass());
    assert_eq!(leases.len(), 2, "as if nothing had been");
    assert!(problems[0].contains("in order again"), "{problems:?}");
    assert_eq!(watcher.pass(), []);
    lab.write_lease("10.9.0.12-30", 3, HOUR);
    assert_eq!(snapshot(&watcher.pass()).0.len(), 3);
    fs::rename(lab.dir.path(), &aside).unwrap();
    assert_eq!(
        snapshot(&watcher.pass()).1.len(),
        1,
        "gone again is said again"
    );
    lab.clock.pass(24 * HOUR);
    assert_eq!(
        snapshot(&watcher.pass()).0,
        [],
        "kept until it ends, not longer"
    );
    fs::rename(&aside, lab.dir.path()).unwrap();
}

#[tokio::test]
async fn what_a_directory_lacks_that_is_still_being_filled_is_not_taken_for_gone() {
    for _ in 0..20 {
        if is_kept_while_filling().await {
            return;
        }
    }
    panic!("the looks are never in time");
}

/// Whether the directory counted as being filled at each look: it does for a second after a change, by the kernel's clock.
async fn is_kept_while_filling() -> bool {
    let lab = Lab::new(SMALL);
    let store = lab.store();
    store.acquire(asking(1, "10.9.0.4-30")).await.unwrap();
    lab.write_lease("10.9.0.8-30", 2, HOUR);
    let mut watcher = Watcher::new(Arc::clone(&store.inner));
    assert_eq!(snapshot(&watcher.pass()).0.len(), 2);
    fs::rename(lab.path(SUBNETS), lab.path("old")).unwrap();
    let begun = Instant::now();
    fs::create_dir(lab.path(SUBNETS)).unwrap();
    let empty = watcher.pass();
    fs::copy(lab.path("old/10.9.0.4-30"), lab.path("subnets/10.9.0.4-30")).unwrap();
    let filling = watcher.pass();
    if begun.elapsed() >= Duration::from_secs(1) {
        return false;
    }
    assert_eq!((empty, filling), (Vec::new(), Vec::new()));
    // Nothing follows. The limit only turns a hang into a failure.
    let patience = Instant::now() + Duration::from_secs(60);
    let news = loop {
        let news = watcher.pass();
        if !news.is_empty() {
            break news;
        }
        assert!(Instant::now() < patience, "kept for ever");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(lost(&news), None);
    let (leases, _) = snapshot(&news);
    assert_eq!(leases.len(), 1, "the peer's lease is gone, and ours is not");
    true
}

#[tokio::test]
async fn a_deleted_lease_of_ours_is_reported_once_and_can_be_acquired_again() {
    let lab = Lab::new(SMALL);
    let store = lab.store();
    let lease = store.acquire(asking(1, "10.9.0.4-30")).await.unwrap();
    let mut watcher = Watcher::new(Arc::clone(&store.inner));
    watcher.pass();
    fs::remove_file(lab.path("subnets/10.9.0.4-30")).unwrap();
    assert_eq!(lost(&watcher.pass()), Some(LostTo::Nobody));
    assert_eq!(watcher.pass(), []);
    assert_eq!(
        store
            .acquire(asking(1, "10.9.0.4-30"))
            .await
            .unwrap()
            .subnets,
        lease.subnets
    );
    assert_eq!(lost(&watcher.pass()), None);
}

#[tokio::test]
async fn a_damaged_lease_of_ours_is_restored() {
    let lab = Lab::new(SMALL);
    let store = lab.store();
    store.acquire(asking(1, "10.9.0.4-30")).await.unwrap();
    let sidecar = fs::read_to_string(lab.path("expiry/10.9.0.4-30")).unwrap();
    let mut watcher = Watcher::new(Arc::clone(&store.inner));
    watcher.pass();
    for (kind, text) in [(SUBNETS, "garbage"), (EXPIRY, "garbage")] {
        lab.write(kind, "10.9.0.4-30", text);
        let news = watcher.pass();
        assert_eq!(lost(&news), None);
        let problems = snapshot(&news).1;
        assert!(
            problems.iter().any(|p| p.contains("is restored")),
            "{problems:?}"
        );
        assert_eq!(lab.lease_text("10.9.0.4-30"), value(1));
        assert_eq!(
            fs::read_to_string(lab.path("expiry/10.9.0.4-30")).unwrap(),
            sidecar
        );
        let problems = snapshot(&watcher.pass()).1;
        assert!(
            problems.iter().all(|p| p.contains("in order again")),
            "{problems:?}"
        );
        assert_eq!(watcher.pass(), []);
    }
    // After a crash as well: the sidecar tells whose the lease was.
    lab.write(SUBNETS, "10.9.0.4-30", "");
    let again = lab.store().acquire(request(1)).await.unwrap();
    assert_eq!(again.subnets.to_string(), "10.9.0.4-30");
    assert_eq!(lab.lease_text("10.9.0.4-30"), value(1));
}

/// Two machines that claimed the same key while apart, the first one earlier.
async fn split(first: u8, second: u8, apart: Duration) -> [(Lab, LocalStore, Watcher, Lease); 2] {
    let here = Lab::new(SMALL);
    let there = here.copy();
    let mut sides = Vec::new();
    for (lab, n) in [(here, first), (there, second)] {
        let store = lab.store();
        let lease = store.acquire(asking(n, "10.9.0.4-30")).await.unwrap();
        lab.clock.pass(apart);
        let mut watcher = Watcher::new(Arc::clone(&store.inner));
        watcher.pass();
        sides.push((lab, store, watcher, lease));
    }
    sides.try_into().unwrap_or_else(|_| unreachable!())
}

#[tokio::test]
async fn of_two_synchronised_claims_the_later_yields_and_the_earlier_is_restored() {
    let key = "10.9.0.4-30";
    // The earlier claim arrives at the later node.
    let [(here, .., lease), (there, store, mut watcher, theirs)] =
        split(9, 1, Duration::from_millis(3)).await;
    here.synchronise(&there, key);
    assert_eq!(lost(&watcher.pass()), Some(LostTo::Node(node(9))));
    assert_eq!(lost(&watcher.pass()), None);
    assert!(matches!(
        store.renew(&theirs).await,
        Err(RenewError::Lost { .. })
    ));
    assert_eq!(
        there.lease_text(key),
        value(9),
        "the winner's file is not touched"
    );
    let moved = store.acquire(asking(1, key)).await.unwrap();
    assert_ne!(moved.subnets, lease.subnets);

    // The later claim arrives at the earlier node, which renews or looks first.
    for renews in [false, true] {
        let [(here, store, mut watcher, lease), (there, ..)] =
            split(9, 1, Duration::from_millis(3)).await;
        there.synchronise(&here, key);
        if renews {
            store.renew(&lease).await.unwrap();
        } else {
            let news = watcher.pass();
            assert_eq!(lost(&news), None);
            assert!(snapshot(&news).1[0].contains("is restored"));
        }
        assert_eq!(here.lease_text(key), value(9));
        here.synchronise(&there, key);
    }

    // Claimed in the same nanosecond: the lower address.
    let [(here, _, mut loser, _), (there, _, mut winner, _)] = split(9, 1, Duration::ZERO).await;
    there.synchronise(&here, key);
    assert_eq!(lost(&loser.pass()), Some(LostTo::Node(node(1))));
    assert_eq!(lost(&winner.pass()), None);
}

#[tokio::test]
async fn overlapping_claims_under_different_keys_are_settled_alike() {
    let config = r#"{"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
    let here = Lab::new(config);
    let there = here.copy();
    let (first, second) = ("10.9.1.0-24&fd00:0:0:1::-64", "10.9.1.0-24&fd00:0:0:2::-64");
    let (one, two) = (here.store(), there.store());
    one.acquire(asking(9, first)).await.unwrap();
    here.clock.pass(Duration::from_millis(3));
    two.acquire(asking(1, second)).await.unwrap();
    let mut winner = Watcher::new(Arc::clone(&one.inner));
    let mut loser = Watcher::new(Arc::clone(&two.inner));
    here.synchronise(&there, first);
    there.synchronise(&here, second);
    assert_eq!(lost(&winner.pass()), None);
    assert_eq!(lost(&loser.pass()), Some(LostTo::Node(node(9))));
    assert_eq!(there.keys(), [first], "the loser takes its claim back");
    let moved = two.acquire(asking(1, second)).await.unwrap();
    assert_ne!(moved.subnets.v4(), Some("10.9.1.0/24".parse().unwrap()));
}

#[tokio::test]
async fn a_reservation_that_overlaps_a_held_lease_takes_it_only_when_its_node_comes() {
    let config = r#"{"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
    let lab = Lab::new(config);
    let holder = lab.store();
    let key = "10.9.3.0-24&fd00:0:0:3::-64";
    let lease = holder.acquire(asking(1, key)).await.unwrap();
    let mut watcher = Watcher::new(Arc::clone(&holder.inner));
    watcher.pass();
    for overlapping in [
        "10.9.3.128-25",
        "10.9.0.0-17",
        "10.9.3.0-24&fd00:0:0:9::-64",
    ] {
        lab.write(SUBNETS, overlapping, &value(9));
    }
    assert_eq!(lost(&watcher.pass()), None, "a file is not a node");
    holder.renew(&lease).await.unwrap();
    let again = lab.store().acquire(asking(1, key)).await.unwrap();
    assert_eq!(again.subnets, lease.subnets, "nor after a restart");
    let reserved = lab.store().acquire(request(9)).await.unwrap();
    assert_eq!(reserved.subnets.to_string(), "10.9.3.0-24&fd00:0:0:9::-64");
    assert_eq!(lost(&watcher.pass()), Some(LostTo::Node(node(9))));
}

#[tokio::test]
async fn a_lease_that_arrives_without_its_claim_is_waited_for() {
    let key = "10.9.0.4-30";
    let [(here, _, mut watcher, _), (there, ..)] = split(9, 1, Duration::from_millis(3)).await;
    here.write(SUBNETS, key, &there.lease_text(key));
    let news = watcher.pass();
    assert_eq!(lost(&news), None);
    assert!(snapshot(&news).1[0].contains("waiting for the rest to arrive"));
    there.synchronise(&here, key);
    assert_eq!(
        lost(&watcher.pass()),
        None,
        "the rest shows that ours is earlier"
    );
    assert_eq!(here.lease_text(key), value(9));

    // Nothing more arrives: it is what it looks like, a reservation.
    here.write(SUBNETS, key, &value(1));
    watcher.pass();
    here.clock.pass(Duration::from_secs(11));
    assert_eq!(lost(&watcher.pass()), None);
    here.clock.pass(Duration::from_secs(1));
    assert_eq!(lost(&watcher.pass()), Some(LostTo::Node(node(1))));

    // The claim arrives before its lease, and is earlier.
    let [(here, ..), (there, _, mut watcher, _)] = split(9, 1, Duration::from_millis(3)).await;
    there.write(
        EXPIRY,
        key,
        &fs::read_to_string(here.path(EXPIRY).join(key)).unwrap(),
    );
    assert_eq!(lost(&watcher.pass()), Some(LostTo::Node(node(9))));
}

#[tokio::test]
async fn a_claim_on_everything_locks_nobody_out_and_takes_nothing_away() {
    let lab = Lab::new(SMALL);
    let early = lab.store();
    let held = early.acquire(asking(1, "10.9.0.8-30")).await.unwrap();
    // Earlier than all, and a reservation of its kind.
    lab.write_lease("10.9.0.0-27", 9, HOUR);
    lab.write(SUBNETS, "10.9.0.0-28", &value(8));
    assert_eq!(lost(&Watcher::new(Arc::clone(&early.inner)).pass()), None);
    assert!(early.renew(&held).await.is_ok());
    let again = lab.store().acquire(request(1)).await.unwrap();
    assert_eq!(again.subnets, held.subnets);
    let late = lab.store().acquire(request(2)).await.unwrap();
    assert!(!late.subnets.overlaps(&held.subnets));
    let kept = lab.keys();
    assert!(kept.contains(&"10.9.0.0-27".to_owned()), "{kept:?}");
    assert_eq!(lab.lease_text("10.9.0.0-28"), value(8));
}

/// What node `to` wants a lease to say.
fn moved(lease: &Lease, to: u8) -> Lease {
    Lease {
        attrs: request(to).attrs,
        ..lease.clone()
    }
}

#[tokio::test]
async fn a_lease_that_is_ours_moves_to_another_public_ip_with_its_claim() {
    let lab = Lab::new(SMALL);
    let store = lab.store();
    let lease = store.acquire(asking(1, "10.9.0.8-30")).await.unwrap();
    let (mut ours, mut other) = (
        Watcher::new(Arc::clone(&store.inner)),
        Watcher::new(lab.store().inner),
    );
    snapshot(&ours.pass());
    snapshot(&other.pass());
    lab.clock.pass(HOUR);
    let lease = store.renew(&moved(&lease, 7)).await.unwrap();
    assert_eq!(lease.expires, Some(lab.clock.wall() + LEASE_TTL));
    assert_eq!(lab.lease_text("10.9.0.8-30"), value(7));
    assert_eq!(
        fs::read_to_string(lab.path("expiry/10.9.0.8-30")).unwrap(),
        r#"{"Expires":1764090000,"Claimed":1764000000000000000,"Owner":"192.0.2.7","Ecn":true}"#
    );
    // Everybody hears of it, and nobody, we included, takes it for a loss.
    for watcher in [&mut ours, &mut other] {
        let news = watcher.pass();
        assert_eq!(lost(&news), None);
        let expected = vec![("10.9.0.8-30".to_owned(), node(7))];
        assert_eq!(snapshot(&news), (expected, Vec::new()));
    }
    // It is found under the new address, and renewed as any other.
    assert_eq!(store.renew(&lease).await.unwrap().attrs, request(7).attrs);
    let again = lab.store().acquire(request(7)).await.unwrap();
    assert_eq!(again.subnets, lease.subnets);
    let other = lab.store().acquire(asking(1, "10.9.0.8-30")).await.unwrap();
    assert_ne!(other.subnets, lease.subnets, "the old address has no claim");
}

#[tokio::test]
async fn a_lease_that_is_no_longer_ours_does_not_move() {
    let lab = Lab::new(SMALL);
    let store = lab.store();
    let lease = store.acquire(asking(1, "10.9.0.8-30")).await.unwrap();
    lab.write_lease("10.9.0.8-30", 9, HOUR);
    let error = store.renew(&moved(&lease, 7)).await.unwrap_err();
    assert!(
        matches!(error, RenewError::Lost { to: LostTo::Node(other), .. } if other == node(9)),
        "{error}"
    );
    assert_eq!(lab.lease_text("10.9.0.8-30"), value(9));

    let lease = store.acquire(request(1)).await.unwrap();
    fs::remove_file(lab.path(SUBNETS).join(lease.subnets.to_string())).unwrap();
    let error = store.renew(&moved(&lease, 7)).await.unwrap_err();
    assert!(
        matches!(
            error,
            RenewError::Lost {
                to: LostTo::Nobody,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(lab.keys(), ["10.9.0.8-30"]);
}

#[tokio::test]
async fn a_move_that_a_crash_cut_short_is_finished_by_the_next_run() {
    let lab = Lab::new(SMALL);
    let lease = lab.store().acquire(asking(1, "10.9.0.8-30")).await.unwrap();
    let key = lease.subnets.to_string();
    let mut other = Watcher::new(lab.store().inner);
    snapshot(&other.pass());
    // Only the first of the two files was written.
    let sidecar = fs::read_to_string(lab.path(EXPIRY).join(&key)).unwrap();
    lab.write(EXPIRY, &key, &sidecar.replace("192.0.2.1", "192.0.2.7"));
    let (known, problems) = snapshot(&other.pass());
    assert_eq!(known, [(key.clone(), node(1))], "nobody is withdrawn");
    assert_eq!(problems.len(), 1, "{problems:?}");
    let again = lab.store().acquire(asking(7, &key)).await.unwrap();
    assert_eq!(again.subnets, lease.subnets);
    assert_eq!(lab.lease_text(&key), value(7));
    assert_eq!(snapshot(&other.pass()).0, [(key, node(7))]);
}

#[tokio::test]
async fn a_reservation_moves_and_stays_permanent() {
    let lab = Lab::new(SMALL);
    lab.write(SUBNETS, "10.9.0.12-30", &value(1));
    let store = lab.store();
    let lease = store.acquire(request(1)).await.unwrap();
    let lease = store.renew(&moved(&lease, 7)).await.unwrap();
    assert_eq!(
        (lease.subnets.to_string().as_str(), lease.expires),
        ("10.9.0.12-30", None)
    );
    assert_eq!(lab.lease_text("10.9.0.12-30"), value(7));
    let again = lab.store().acquire(request(7)).await.unwrap();
    assert_eq!((again.subnets, again.expires), (lease.subnets, None));
}

#[tokio::test]
async fn a_clock_that_is_set_ends_nobodys_lease() {
    let lab = Lab::new(SMALL);
    let mut watcher = Watcher::new(lab.store().inner);
    lab.write_lease("10.9.0.4-30", 1, HOUR);
    assert_eq!(snapshot(&watcher.pass()).0.len(), 1);
    let noon = lab.clock.wall();
    for wrong in [noon + 1000 * HOUR, SystemTime::UNIX_EPOCH, noon] {
        lab.clock.set(wrong);
        assert_eq!(watcher.pass(), []);
    }
    lab.clock.pass(22 * HOUR);
    assert_eq!(watcher.pass(), []);
    lab.clock.pass(HOUR);
    assert_eq!(snapshot(&watcher.pass()).0, []);
}

#[tokio::test]
async fn a_flood_of_files_is_cut_off_by_name() {
    let lab = Lab::new(r#"{"Network":"10.0.0.0/8"}"#);
    lab.write_lease("10.255.9.0-24", 1, HOUR);
    let mut watcher = Watcher::new(lab.store().inner);
    assert_eq!(snapshot(&watcher.pass()).0.len(), 1);
    for n in 0..=MAX_ENTRIES {
        fs::write(lab.path(SUBNETS).join(format!("junk-{n}")), "").unwrap();
    }
    let (leases, problems) = snapshot(&watcher.pass());
    assert_eq!(leases.len(), 1, "whoever is not reached any more is kept");
    assert!(
        problems
            .iter()
            .any(|p| p.contains("more than 20000 entries"))
    );
}

/// Waits for a snapshot with so many leases. The limit only turns a hang into a failure.
async fn wait_for(events: &mut mpsc::Receiver<StoreEvent>, count: usize) {
    let found = async {
        loop {
            match events.recv().await.expect("the watch goes on") {
                StoreEvent::Snapshot { leases, .. } if leases.len() == count => return,
                StoreEvent::Snapshot { .. } | StoreEvent::Delta { .. } => {}
                StoreEvent::OwnLost { .. } => panic!("nothing is lost"),
            }
        }
    };
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, found)
        .await
        .unwrap_or_else(|_| panic!("{count} leases in time"));
}

#[tokio::test]
async fn notification_reaches_the_receiver_without_a_rescan() {
    let lab = Lab::new(SMALL);
    fs::rename(lab.path(CONFIG), lab.path("aside")).unwrap();
    let store = lab.store();
    let mut events = store.watch();
    wait_for(&mut events, 0).await;
    fs::rename(lab.path("aside"), lab.path(CONFIG)).unwrap();
    store.acquire(asking(1, "10.9.0.4-30")).await.unwrap();
    wait_for(&mut events, 1).await;
    lab.write_lease("10.9.0.8-30", 2, HOUR);
    wait_for(&mut events, 2).await;
    // Another directory in the place of the first one.
    let another = lab.path("new");
    fs::create_dir(&another).unwrap();
    for key in ["10.9.0.4-30", "10.9.0.8-30"] {
        fs::copy(lab.path(SUBNETS).join(key), another.join(key)).unwrap();
    }
    fs::rename(lab.path(SUBNETS), lab.path("old")).unwrap();
    fs::rename(another, lab.path(SUBNETS)).unwrap();
    lab.write_lease("10.9.0.12-30", 3, HOUR);
    wait_for(&mut events, 3).await;
    fs::remove_file(lab.path("subnets/10.9.0.12-30")).unwrap();
    wait_for(&mut events, 2).await;
}

#[derive(Debug, Clone)]
enum Op {
    Acquire(u8, Option<u8>),
    Renew(u8),
    Pass(u8),
    Delete(u8),
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1u8..=9, proptest::option::of(0u8..9)).prop_map(|(n, prev)| Op::Acquire(n, prev)),
        6 => (1u8..=9).prop_map(Op::Renew),
        2 => (0u8..16).prop_map(Op::Pass),
        1 => (0u8..9).prop_map(Op::Delete),
    ]
}

/// What the directory should be: who holds which of the seven subnets, until when.
#[derive(Debug, Default)]
struct Model(BTreeMap<u8, (u8, SystemTime)>);

impl Model {
    fn key(index: u8) -> String {
        format!("10.9.0.{}-30", index * 4)
    }

    fn of(&self, node: u8) -> Option<u8> {
        self.0
            .iter()
            .find(|(_, held)| held.0 == node)
            .map(|(index, _)| *index)
    }

    /// The subnets that `node` may be given, best first; any of the first list that is not empty.
    fn eligible(&self, node: u8, previous: Option<u8>, now: SystemTime) -> Vec<u8> {
        let live = |index: &u8| self.0.get(index).is_some_and(|held| now < held.1);
        if let Some(mine) = self.of(node) {
            return vec![mine];
        }
        if let Some(previous) = previous.filter(|p| (1..=7).contains(p) && !live(p)) {
            return vec![previous];
        }
        let never: Vec<u8> = (1..=7)
            .filter(|index| !self.0.contains_key(index))
            .collect();
        if never.is_empty() {
            (1..=7).filter(|index| !live(index)).collect()
        } else {
            never
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_thousand_operations_leave_what_the_model_says(
        ops in proptest::collection::vec(any_op(), 1..=1000),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let lab = Lab::new(SMALL);
            let stores: Vec<LocalStore> = (0..=9).map(|_| lab.store()).collect();
            let mut leases: BTreeMap<u8, Lease> = BTreeMap::new();
            let mut model = Model::default();
            let mut watcher = Watcher::new(lab.store().inner);
            let mut seen = Vec::new();
            for op in ops {
                let now = lab.clock.wall();
                match op {
                    Op::Acquire(n, previous) => {
                        let eligible = model.eligible(n, previous, now);
                        let previous = previous.and_then(|p| Model::key(p).parse().ok());
                        let asked = AcquireRequest { previous, ..request(n) };
                        match stores[usize::from(n)].acquire(asked).await {
                            Ok(lease) => {
                                let index = lease.subnets.v4().unwrap().addr().octets()[3] / 4;
                                assert!(eligible.contains(&index), "{n} got {index} of {eligible:?}");
                                model.0.insert(index, (n, lease.expires.unwrap()));
                                assert!(now + LEASE_TTL / 2 < lease.expires.unwrap());
                                leases.insert(n, lease);
                            }
                            Err(StoreError::OutOfSubnets { .. }) => assert!(eligible.is_empty(), "{eligible:?}"),
                            Err(e) => panic!("{e}"),
                        }
                    }
                    Op::Renew(n) => {
                        let Some(lease) = leases.get(&n) else { continue };
                        let index = lease.subnets.v4().unwrap().addr().octets()[3] / 4;
                        let ours = model.0.get(&index).is_some_and(|held| held.0 == n);
                        match stores[usize::from(n)].renew(lease).await {
                            Ok(renewed) => {
                                assert!(ours);
                                assert_eq!(renewed.expires, Some(now + LEASE_TTL));
                                model.0.insert(index, (n, now + LEASE_TTL));
                            }
                            Err(RenewError::Lost { .. }) => {
                                assert!(!ours);
                                leases.remove(&n);
                            }
                            Err(RenewError::Store(e)) => panic!("{e}"),
                        }
                    }
                    Op::Pass(hours) => lab.clock.pass(u32::from(hours) * HOUR),
                    Op::Delete(index) => {
                        let there = fs::remove_file(lab.path(SUBNETS).join(Model::key(index)));
                        let held = model.0.remove(&index);
                        assert_eq!(there.is_ok(), held.is_some());
                        // Unnoticed, the claim would still be the earlier one.
                        if let Some((n, _)) = held {
                            let store = &stores[usize::from(n)];
                            let news = Watcher::new(Arc::clone(&store.inner)).pass();
                            assert_eq!(lost(&news), Some(LostTo::Nobody));
                        }
                    }
                }
                let now = lab.clock.wall();
                let mut live: Vec<(Subnets, IpAddr)> = model
                    .0
                    .iter()
                    .filter(|(_, held)| now < held.1)
                    .map(|(index, held)| (Model::key(*index).parse().unwrap(), node(held.0)))
                    .collect();
                live.sort();
                if let Some(StoreEvent::Snapshot { leases, problems }) = watcher.pass().pop() {
                    assert_eq!(problems, []);
                    seen = leases.iter().map(|l| (l.subnets, l.attrs.node().unwrap())).collect();
                }
                assert_eq!(seen, live);
            }
        });
    }
}
