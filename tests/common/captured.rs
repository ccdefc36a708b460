//! Owns what tests of `loden capture` share: captures that run, and tshark, which shares no code with the program.
//! Never asserts what is in a file, but for what holds of every file.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use loden::lab::{Interrupt, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::LODEN;

/// Only a failing test waits this long.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) fn await_that(what: &str, mut done: impl FnMut() -> bool) {
    let done = || Ok(done().then_some(()));
    wait::until(what, LIMIT, &Interrupt::default(), done).unwrap();
}

/// A `loden capture` that writes a file.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) path: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already reaped, if the test went well.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Running {
    /// Begins a capture into a file: something that only this capture waits for was seen by it.
    pub(crate) fn begin(socket: &Path, path: PathBuf, args: &[&str]) -> Self {
        let begin = || {
            capture(socket, args)
                .arg("-w")
                .arg(&path)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut child = begin();
        // The file is created when the daemon has begun.
        await_that("the capture's file", || {
            if child.try_wait().unwrap().is_some() {
                let mut errors = String::new();
                let mut stderr = child.stderr.take().unwrap();
                stderr.read_to_string(&mut errors).unwrap();
                // Whoever says that is asked again.
                assert!(
                    errors.contains("the daemon is busy"),
                    "the capture ended: {errors}"
                );
                child = begin();
            }
            path.exists()
        });
        Self { child, path }
    }

    /// Waits until tshark finds `count` packets that match.
    pub(crate) fn await_packets(&self, what: &str, count: usize) {
        await_that(what, || {
            packets_so_far(&self.path, what).is_some_and(|n| n >= count)
        });
    }

    /// Waits for them, then ends the capture as a user does.
    pub(crate) fn end(self, what: &str, count: usize) -> PathBuf {
        self.end_saying(what, count).0
    }

    /// The same, with what the capture said on standard error.
    pub(crate) fn end_saying(self, what: &str, count: usize) -> (PathBuf, String) {
        self.await_packets(what, count);
        let (path, said) = self.interrupt();
        assert!(!said.contains("lost"), "{said}");
        (path, said)
    }

    /// Ends the capture as a user does. What it wrote is in the order of time.
    pub(crate) fn interrupt(mut self) -> (PathBuf, String) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGINT).unwrap();
        let mut said = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert!(self.child.wait().unwrap().success(), "{said}");
        assert!(said.contains("packets captured"), "{said}");
        assert!(is_in_order_of_time(&self.path), "{}", self.path.display());
        (self.path.clone(), said)
    }
}

/// A `loden capture` of the daemon with this socket.
pub(crate) fn capture(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(LODEN);
    command.args(["capture", "--socket"]).arg(socket).args(args);
    command
}

/// Whether no packet of a file is older than the one before.
pub(crate) fn is_in_order_of_time(path: &Path) -> bool {
    let times = tshark(path, &[], &["frame.time_epoch"]);
    let whole = |time: &str| -> (u64, u64) {
        let (seconds, fraction) = time.split_once('.').unwrap();
        assert_eq!(fraction.len(), 9, "{time}");
        (seconds.parse().unwrap(), fraction.parse().unwrap())
    };
    times.iter().map(|packet| whole(&packet[0])).is_sorted()
}

/// How many packets of a file that is still being written match.
pub(crate) fn packets_so_far(path: &Path, filter: &str) -> Option<usize> {
    let output = Command::new("tshark")
        .args([
            "-n",
            "-Y",
            filter,
            "-T",
            "fields",
            "-e",
            "frame.number",
            "-r",
        ])
        .arg(path)
        .output()
        .unwrap();
    Some(String::from_utf8(output.stdout).ok()?.lines().count())
}

/// One line of fields per packet, as tshark reads a file; it must have nothing to complain about.
pub(crate) fn tshark(path: &Path, args: &[&str], fields: &[&str]) -> Vec<Vec<String>> {
    let mut command = Command::new("tshark");
    // No configuration of whoever runs this, and no name service.
    command.env("HOME", "/nonexistent").args(["-n", "-r"]);
    command.arg(path).args(args).args(["-T", "fields"]);
    for field in fields {
        command.args(["-e", field]);
    }
    let output = command.output().unwrap();
    let complaints: Vec<String> = String::from_utf8(output.stderr)
        .unwrap()
        .lines()
        // It does not like root, which these tests need.
        .filter(|line| !line.starts_with("Running as user"))
        .map(str::to_owned)
        .collect();
    assert_eq!(complaints, Vec::<String>::new());
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| line.split('\t').map(str::to_owned).collect();
    text.lines().map(line).collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
