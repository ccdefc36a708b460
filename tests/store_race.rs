//! Daemons of one machine that start together: real processes race for the last subnets of a directory.
//!
//! Each contender is this test binary again, running the ignored test `contender`, which is told by its
//! environment whom it is to be.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot set up its contenders fails"
)]

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use loden::lease::{LeaseAttrs, LeaseExtension};
use loden::store::{AcquireRequest, LeaseStore, LocalStore, StoreError};

const DIR: &str = "STORE_RACE_DIR";
const NODE: &str = "STORE_RACE_NODE";

/// Marks the lines that a contender says to its parent, among those of the test harness.
const MARK: &str = "contender:";

#[test]
#[ignore = "not a test: the body of the processes that race"]
fn contender() {
    let dir = env::var_os(DIR).expect("started by a test");
    let node = env::var_os(NODE)
        .and_then(|n| n.to_str()?.parse::<u8>().ok())
        .expect("a number");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    println!("\n{MARK}ready");
    let request = AcquireRequest {
        attrs: LeaseAttrs {
            public_ip: Some(Ipv4Addr::new(192, 0, 2, node)),
            ..LeaseAttrs::default()
        },
        previous: None,
        extension: LeaseExtension::default(),
    };
    // The parent holds the lock until all contenders wait for it.
    match runtime.block_on(LocalStore::new(dir).acquire(request)) {
        Ok(lease) => println!("{MARK}{}", lease.subnets),
        Err(StoreError::OutOfSubnets { .. }) => println!("{MARK}out"),
        Err(e) => println!("{MARK}{e}"),
    }
}

struct Contender {
    process: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Contender {
    fn start(dir: &Path, node: u8) -> Self {
        let mut process = Command::new(env::current_exe().unwrap())
            .args(["--ignored", "--exact", "contender", "--nocapture"])
            .env(DIR, dir)
            .env(NODE, node.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(process.stdout.take().unwrap());
        Self { process, said }
    }

    fn next(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(
                self.said.read_line(&mut line).unwrap(),
                0,
                "it ended without a word"
            );
            if let Some(said) = line.trim().strip_prefix(MARK) {
                return said.to_owned();
            }
        }
    }
}

/// Lets so many processes race; returns what they said, in order.
fn race(dir: &Path, nodes: std::ops::RangeInclusive<u8>) -> Vec<String> {
    let lock = File::create(dir.join("lock")).unwrap();
    lock.lock().unwrap();
    let mut contenders: Vec<Contender> = nodes.map(|n| Contender::start(dir, n)).collect();
    for contender in &mut contenders {
        assert_eq!(contender.next(), "ready");
    }
    drop(lock);
    let mut said = Vec::new();
    for mut contender in contenders {
        said.push(contender.next());
        assert!(contender.process.wait().unwrap().success());
    }
    said.sort();
    said
}

fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"Network":"10.9.0.0/27","SubnetLen":30,"Backend":{"Type":"udp"}}"#;
    fs::write(dir.path().join("config"), config).unwrap();
    dir
}

#[test]
fn eight_processes_that_race_for_seven_subnets_get_one_each_and_one_gets_none() {
    for _ in 0..5 {
        let dir = directory();
        let said = race(dir.path(), 1..=8);
        let subnets: BTreeSet<String> = (1..=7).map(|n| format!("10.9.0.{}-30", n * 4)).collect();
        let mut expected: Vec<String> = subnets.iter().cloned().collect();
        expected.push("out".to_owned());
        expected.sort();
        assert_eq!(said, expected);
        for kind in ["subnets", "expiry"] {
            let names = fs::read_dir(dir.path().join(kind)).unwrap();
            let names: BTreeSet<String> = names
                .map(|name| name.unwrap().file_name().into_string().unwrap())
                .collect();
            assert_eq!(names, subnets, "{kind} holds the leases and nothing else");
        }
        // All start again at once, and each finds its own.
        let again = race(dir.path(), 1..=8);
        assert_eq!(again, expected);
    }
}

/// Here the lock alone keeps one from removing what another has just put in the place of an expired lease.
#[test]
fn eight_processes_that_race_for_seven_expired_leases_get_one_each() {
    for _ in 0..5 {
        let dir = directory();
        for kind in ["subnets", "expiry"] {
            fs::create_dir(dir.path().join(kind)).unwrap();
        }
        for n in 1..=7 {
            let (key, node) = (
                format!("10.9.0.{}-30", n * 4),
                format!("192.0.2.{}", 100 + n),
            );
            let lease = format!(r#"{{"PublicIP":"{node}","PublicIPv6":null}}"#);
            let sidecar = format!(r#"{{"Expires":1,"Claimed":1,"Owner":"{node}","Ecn":false}}"#);
            fs::write(dir.path().join("subnets").join(&key), lease).unwrap();
            fs::write(dir.path().join("expiry").join(&key), sidecar).unwrap();
        }
        let mut said = race(dir.path(), 1..=8);
        assert_eq!(said.pop().as_deref(), Some("out"));
        assert_eq!(said.iter().collect::<BTreeSet<_>>().len(), 7);
    }
}

#[test]
fn two_processes_never_share_the_last_subnet() {
    for _ in 0..10 {
        let dir = directory();
        let subnets = dir.path().join("subnets");
        fs::create_dir(&subnets).unwrap();
        for n in 1..=6 {
            let reservation = format!(r#"{{"PublicIP":"192.0.2.{}","PublicIPv6":null}}"#, 100 + n);
            fs::write(subnets.join(format!("10.9.0.{}-30", n * 4)), reservation).unwrap();
        }
        assert_eq!(race(dir.path(), 1..=2), ["10.9.0.28-30", "out"]);
    }
}

#[test]
fn threads_with_stores_of_their_own_exclude_each_other_as_processes_do() {
    let dir = directory();
    let start = std::sync::Barrier::new(8);
    let contend = |node: u8| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let request = AcquireRequest {
            attrs: LeaseAttrs {
                public_ip: Some(Ipv4Addr::new(192, 0, 2, node)),
                ..LeaseAttrs::default()
            },
            previous: None,
            extension: LeaseExtension::default(),
        };
        let store = LocalStore::new(dir.path());
        start.wait();
        runtime
            .block_on(store.acquire(request))
            .ok()
            .map(|lease| lease.subnets)
    };
    let got = std::thread::scope(|scope| {
        let contend = &contend;
        let threads: Vec<_> = (1..=8)
            .map(|node| scope.spawn(move || contend(node)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect::<Vec<_>>()
    });
    let subnets: BTreeSet<_> = got.iter().flatten().collect();
    assert_eq!(subnets.len(), 7);
    assert_eq!(got.iter().filter(|subnets| subnets.is_none()).count(), 1);
}
