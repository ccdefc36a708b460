//! What background probes say of peers, in the status, the log and the metrics, as paths break and mend. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::fs;
use std::process::Command;
use std::time::Duration;

use common::{LODEN, lab, spec};
use loden::lab::{Backend, Interrupt, Lab, Member, Spec, Wire, wait};
use serde_json::Value;

/// What is promised.
const REPORTED: Duration = Duration::from_secs(30);

fn up(backend: Backend) -> Lab {
    let spec = Spec {
        wire: Wire::PacketNoGro,
        ..spec(2, backend)
    };
    let mut lab = lab(spec);
    lab.await_connected().unwrap();
    lab
}

fn loden(lab: &Lab, node: u8, args: &[&str]) -> String {
    let mut command = Command::new(LODEN);
    let command = command.args(args).arg("--socket");
    let output = command.arg(lab.status_socket(node)).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a node says of its one peer.
fn probe(lab: &Lab, node: u8) -> Value {
    let status: Value = serde_json::from_str(&loden(lab, node, &["status", "--json"])).unwrap();
    status["peers"][0]["probe"].clone()
}

/// Waits until a node says this of its peer.
fn says(lab: &Lab, node: u8, key: &str, value: impl Into<Value>) {
    let value = value.into();
    let mut last = Value::Null;
    let what = format!("{key} {value}");
    let waited = wait::until(&what, REPORTED, &Interrupt::default(), || {
        last = probe(lab, node);
        Ok((last[key] == value).then_some(()))
    });
    assert!(waited.is_ok(), "{what}: {last}");
}

fn input(lab: &Lab, node: u8, rule: &str) {
    let rule =
        format!("table inet t {{ chain c {{ type filter hook input priority 0; {rule}; }}; }}");
    lab.run(Member::Node(node), "nft", &[&rule]).unwrap();
}

fn mended(lab: &Lab, node: u8) {
    lab.run(Member::Node(node), "nft", &["delete table inet t"])
        .unwrap();
}

#[test]
fn path_that_breaks_is_reported_within_half_a_minute_and_so_is_its_return() {
    let lab = up(Backend::Udp);
    says(&lab, 1, "reach", "answers");
    let healthy = probe(&lab, 1);
    assert_eq!(healthy["degraded"], false);
    assert_eq!(healthy["heard_by"], "tunnel");
    assert!(healthy["rtt_us"].as_u64().unwrap() > 0, "{healthy}");
    // Nobody was probed who did not know us yet.
    for node in [1, 2] {
        let log = fs::read_to_string(lab.daemon_log(node)).unwrap();
        assert!(!log.contains("unknown_peer"), "{log}");
    }
    // One way only: the second node still hears the first, and is not heard.
    input(&lab, 1, "udp dport 8285 drop");
    says(&lab, 1, "reach", "silent");
    says(&lab, 2, "reach", "silent");
    let (first, second) = (probe(&lab, 1), probe(&lab, 2));
    assert!(second["heard_seconds_ago"].as_u64() < first["heard_seconds_ago"].as_u64());
    let text = loden(&lab, 1, &["status"]);
    assert!(text.contains("nothing comes back"), "{text}");
    mended(&lab, 1);
    says(&lab, 1, "degraded", false);
    let log = fs::read_to_string(lab.daemon_log(1)).unwrap();
    assert!(log.contains("WARN peer 198.18."), "{log}");
    assert!(log.contains("is reached again"), "{log}");
}

#[test]
fn path_that_loses_long_packets_is_reported_as_narrow() {
    let lab = up(Backend::Udp);
    says(&lab, 1, "reach", "answers");
    input(&lab, 2, "udp dport 8285 meta length > 1400 drop");
    says(&lab, 1, "narrow", true);
    assert_eq!(probe(&lab, 1)["reach"], "answers");
}

#[test]
fn peer_without_the_program_is_asked_with_echoes_on_every_transport() {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        let lab = up(backend);
        says(&lab, 1, "reach", "answers");
        // The kernel goes on without the daemon.
        let pid = lab.daemon_pids()[1].to_string();
        lab.run(Member::Node(2), "kill", &["-9", &pid]).unwrap();
        says(&lab, 1, "reach", "echoes");
        assert_eq!(probe(&lab, 1)["degraded"], false, "{backend:?}");
    }
}
