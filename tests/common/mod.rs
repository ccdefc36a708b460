//! Owns what namespace tests share: labs with names of their own, and looks at the system from outside.
//! Never asserts anything about the program under test.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use loden::lab::{Backend, Interrupt, Lab, LabName, Member, Spec, wait};

/// The program under test.
pub(crate) const LODEN: &str = env!("CARGO_BIN_EXE_loden");

/// Only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);

/// A lab's name that no other test, in this process or another, uses at the same time.
pub(crate) fn unique_name() -> LabName {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("test-{}-{number}", std::process::id())
        .parse()
        .unwrap()
}

/// A description to start from: `nodes` nodes with one pod each and the program under test as the daemon.
pub(crate) fn spec(nodes: u8, backend: Backend) -> Spec {
    Spec {
        backend,
        daemon: Some(PathBuf::from(LODEN)),
        ..Spec::new(unique_name(), nodes)
    }
}

/// Builds a lab; it goes when the test ends, also by a panic.
///
/// Fails, and does not skip, without root: a namespace test that did not run has shown nothing.
pub(crate) fn lab(spec: Spec) -> Lab {
    Lab::build(spec, &Interrupt::default()).unwrap()
}

/// Whether one ping from a pod to another is answered within a second.
pub(crate) fn pings(lab: &Lab, from: Member, to: (u8, u8)) -> bool {
    let addr = lab.pod_addr(to.0, to.1).unwrap().to_string();
    lab.run(from, "ping", &["-n", "-q", "-c1", "-W1", &addr])
        .is_ok()
}

/// Waits until a ping from a pod to another is answered.
pub(crate) fn await_ping(lab: &Lab, from: Member, to: (u8, u8)) {
    let what = format!("an answer to a ping from {from} to pod {}.{}", to.0, to.1);
    wait::until(&what, LIMIT, lab.interrupt(), || {
        Ok(pings(lab, from, to).then_some(()))
    })
    .unwrap();
}

/// Everything in the system that carries the lab's name: namespaces, its directory, and processes whose
/// command line names the directory.
pub(crate) fn traces(name: &LabName) -> Vec<String> {
    let list = Command::new("ip").args(["netns", "list"]).output().unwrap();
    let prefix = format!("loden-{name}-");
    let namespaces = String::from_utf8_lossy(&list.stdout).into_owned();
    let mut found: Vec<String> = namespaces
        .lines()
        .filter(|line| line.starts_with(&prefix))
        .map(str::to_owned)
        .collect();
    let dir = format!("/run/loden-lab/{name}");
    if fs::exists(&dir).unwrap() {
        found.push(dir.clone());
    }
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let command_line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command_line = String::from_utf8_lossy(&command_line).replace('\0', " ");
        if command_line.contains(&format!("{dir}/")) {
            found.push(command_line);
        }
    }
    found
}
