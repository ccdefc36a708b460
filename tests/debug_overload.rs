//! Looking on under overload: every packet that the data plane read is one that a capture shows or counts as lost, and
//! no counter goes backwards while readers come and go. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/captured.rs"]
mod captured;
#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::io::{BufRead as _, BufReader, Read};
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use captured::capture;
use cluster::{Cluster, V4};
use common::LODEN;
use loden::lab::{Interrupt, Member, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const UDP: &str = r#"{"Type":"udp"}"#;

/// Two nodes without probes, whose packets would be counted beside the test's own.
fn cluster() -> Cluster {
    let mut cluster = Cluster::idle(2, V4, UDP);
    for n in [1, 2] {
        cluster.start_with(n, &["--probe-port=0"]);
    }
    cluster.await_ping(1, "198.18.2.2");
    cluster
}

fn pod(cluster: &Cluster, n: u8, port: u16) -> UdpSocket {
    let at = format!("198.18.{n}.2:{port}");
    let netns = cluster.lab.netns(Member::Pod(n, 1));
    netns.run(|| UdpSocket::bind(at)).unwrap().unwrap()
}

/// Sends more than the tunnel takes, until it is dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    socket: UdpSocket,
}

impl Flood {
    fn start(cluster: &Cluster) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let socket = pod(cluster, 1, 4001);
        let (sender, stopped) = (socket.try_clone().unwrap(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // A full queue on the way is part of an overload.
                let _full = sender.send_to(&[7; 1200], "198.18.2.2:9");
            }
        });
        Self {
            stop,
            thread: Some(thread),
            socket,
        }
    }

    /// Ends it; what its socket sends then takes the same way, behind it.
    fn end(self) -> UdpSocket {
        self.socket.try_clone().unwrap()
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// A capture of node 1's that has written so many bytes. A daemon that is busy says so, and is asked again.
fn begun(cluster: &Cluster, args: &[&str], len: usize) -> Child {
    let mut begun = None;
    cluster.wait_until("a capture", || {
        let mut running = capture(&cluster.file(1, "subnet.sock"), args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = running.stdout.as_mut().unwrap();
        if stdout.read_exact(&mut vec![0; len]).is_ok() {
            begun = Some(running);
        } else {
            assert!(!running.wait().unwrap().success());
        }
        begun.is_some()
    });
    begun.unwrap()
}

fn encap(status: &Value) -> &Value {
    &status["datapath"]["total"]["encap"]
}

fn encap_read(cluster: &Cluster) -> u64 {
    let mut read = None;
    cluster.wait_until("a status", || {
        read = encap(&cluster.status(1))["read"].as_u64();
        read.is_some()
    });
    read.unwrap()
}

/// What the data plane has read when it reads nothing any more.
fn settled(cluster: &Cluster) -> u64 {
    let mut last = None;
    cluster.wait_until("an idle data plane", || {
        let now = encap_read(cluster);
        last.replace(now) == Some(now)
    });
    last.unwrap()
}

#[test]
fn every_packet_under_overload_is_shown_or_counted_as_lost() {
    let cluster = cluster();
    let _listener = pod(&cluster, 2, 9);
    let mut before = settled(&cluster);
    // Nobody reads the pipe, so that the client is stuck, then the daemon's task, then the rings are full.
    let mut running = loop {
        // The file's beginning says that the capture has begun.
        let mut running = begun(&cluster, &["encap", "-w", "-"], 4);
        let now = settled(&cluster);
        if now == before {
            break running;
        }
        // A packet of the system's own came in between, and nobody knows whether the capture saw it.
        before = now;
        running.kill().unwrap();
        running.wait().unwrap();
    };
    let flood = Flood::start(&cluster);
    cluster.wait_until("an overload", || encap_read(&cluster) > before + 60_000);
    let socket = flood.end();
    // What is in the rings comes out once somebody reads. When the last packet of all was shown, every other was shown
    // before it, or counted as lost.
    let shown = Arc::new(AtomicU64::new(0));
    let stdout = running.stdout.take().unwrap();
    let reader = {
        let shown = Arc::clone(&shown);
        std::thread::spawn(move || note_marks(stdout, &shown))
    };
    let mut mark = 0;
    cluster.wait_until("the last packet", || {
        mark += 1;
        let text = format!("{MARK}{mark:04}");
        socket.send_to(text.as_bytes(), "198.18.2.2:9").unwrap();
        let is_shown = || Ok((shown.load(Ordering::Relaxed) == mark).then_some(()));
        // It may be lost as any other, while the rings are full.
        wait::until(
            "it",
            Duration::from_secs(1),
            &Interrupt::default(),
            is_shown,
        )
        .is_ok()
    });
    let read = settled(&cluster) - before;
    let pid = Pid::from_raw(i32::try_from(running.id()).unwrap());
    kill(pid, Signal::SIGINT).unwrap();
    let mut said = String::new();
    running
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(running.wait().unwrap().success(), "{said}");
    reader.join().unwrap();
    let number = |after: &str, before: &str| -> u64 {
        let (left, _) = said.split_once(before).unwrap();
        left.rsplit(after).next().unwrap().parse().unwrap()
    };
    let shown = number("\n", " packets captured");
    let lost = number("(", " inner packets) lost");
    assert!(lost > 0 && shown > 0, "{said}");
    assert_eq!(shown + lost, read, "{said}");
    let status = cluster.status(1);
    let count = |name: &str| encap(&status)[name].as_u64().unwrap();
    let drops = encap(&status)["drops"].as_object().unwrap();
    let drops: u64 = drops.values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(
        count("sent") + count("answered") + count("queued") + drops,
        count("read"),
        "{status}"
    );
}

/// What the last packets begin with.
const MARK: &str = "mark of a last packet ";

/// Reads all there is, and keeps the number of the last mark.
fn note_marks(mut from: impl Read, shown: &AtomicU64) {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 1 << 16]);
    loop {
        let len = from.read(&mut buffer).unwrap();
        if len == 0 {
            return;
        }
        bytes.extend_from_slice(&buffer[..len]);
        let mut marks = bytes.windows(MARK.len() + 4);
        if let Some(mark) = marks.rfind(|window| window.starts_with(MARK.as_bytes())) {
            let number = String::from_utf8(mark[MARK.len()..].to_vec()).unwrap();
            shown.store(number.parse().unwrap(), Ordering::Relaxed);
        }
        // One may be cut in two.
        bytes.drain(..bytes.len().saturating_sub(MARK.len() + 3));
    }
}

/// Every counter of a document, by its place.
fn counters(at: &str, value: &Value, into: &mut Vec<(String, u64)>) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                counters(&format!("{at}.{name}"), value, into);
            }
        }
        Value::Array(items) => {
            for (number, value) in items.iter().enumerate() {
                counters(&format!("{at}.{number}"), value, into);
            }
        }
        // What is in hand at the moment is no counter.
        Value::Number(_) if at.ends_with(".queued") => {}
        Value::Number(number) => into.extend(number.as_u64().map(|it| (at.to_owned(), it))),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

#[test]
fn counters_never_go_backwards_while_readers_come_and_go() {
    let cluster = cluster();
    let _listener = pod(&cluster, 2, 9);
    let socket = cluster.file(1, "subnet.sock");
    let flood = Flood::start(&cluster);
    let mut last: Vec<(String, u64)> = Vec::new();
    let mut top = Command::new(LODEN)
        .args(["top", "--json", "--socket"])
        .arg(&socket)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    for round in 0..8 {
        let mut reader = begun(&cluster, &["-w", "-"], 1000);
        for _ in 0..3 {
            let mut status = Value::Null;
            cluster.wait_until("a status", || {
                status = cluster.status(1);
                status.is_object()
            });
            let mut now = Vec::new();
            counters("", &status["datapath"]["total"], &mut now);
            counters("workers", &status["datapath"]["workers"], &mut now);
            assert!(now.len() > 20, "{status}");
            if last.is_empty() {
                last.clone_from(&now);
            }
            assert_eq!(last.len(), now.len(), "{status}");
            for ((was_at, was), (at, is)) in last.iter().zip(&now) {
                assert_eq!(was_at, at);
                assert!(is >= was, "round {round}: {at} went from {was} to {is}");
            }
            last = now;
        }
        // As a reader that dies, and leaves its connection in the middle of a frame.
        reader.kill().unwrap();
        reader.wait().unwrap();
    }
    drop(flood);
    let mut out = BufReader::new(top.stdout.take().unwrap());
    let mut lines = String::new();
    // The first is of a second after its first look.
    out.read_line(&mut lines).unwrap();
    kill(
        Pid::from_raw(i32::try_from(top.id()).unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    out.read_to_string(&mut lines).unwrap();
    top.wait().unwrap();
    assert!(!lines.is_empty());
    assert!(!lines.contains(":-"), "a negative rate: {lines}");
}
