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
use serde_json::{Value, json};

/// What is promised.
const REPORTED: Duration = Duration::from_secs(30);

/// Only a failing test waits this long: a node that stands still answers late, and the last eight visits count.
const LIMIT: Duration = Duration::from_secs(120);

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
    // A daemon that is busy says so, and is asked again.
    let answer = wait::until("an answer", LIMIT, lab.interrupt(), || {
        let mut command = Command::new(LODEN);
        let command = command.args(args).arg("--socket");
        let output = command.arg(lab.status_socket(node)).output().unwrap();
        Ok(output.status.success().then_some(output.stdout))
    });
    String::from_utf8(answer.unwrap()).unwrap()
}

/// What a node says of its one peer.
fn probe(lab: &Lab, node: u8) -> Value {
    let status: Value = serde_json::from_str(&loden(lab, node, &["status", "--json"])).unwrap();
    status["peers"][0]["probe"].clone()
}

/// Waits until a node says all of this of its peer at once.
fn says(lab: &Lab, node: u8, limit: Duration, what: &Value) -> Value {
    let mut last = Value::Null;
    let waited = wait::until(&what.to_string(), limit, &Interrupt::default(), || {
        last = probe(lab, node);
        let mut all = what.as_object().unwrap().iter();
        Ok(all.all(|(key, value)| last[key] == *value).then_some(()))
    });
    assert!(waited.is_ok(), "{what}: {last}");
    last
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
    let healthy = json!({"reach": "answers", "degraded": false, "heard_by": "tunnel"});
    let healthy = says(&lab, 1, LIMIT, &healthy);
    assert!(healthy["rtt_us"].as_u64().unwrap() > 0, "{healthy}");
    // Nobody was probed who did not know us yet.
    for node in [1, 2] {
        let log = fs::read_to_string(lab.daemon_log(node)).unwrap();
        assert!(!log.contains("unknown_peer"), "{log}");
    }
    // One way only: the second node still hears the first, and is not heard.
    input(&lab, 1, "udp dport 8285 drop");
    says(&lab, 1, REPORTED, &json!({"reach": "silent"}));
    says(&lab, 2, REPORTED, &json!({"reach": "silent"}));
    wait::until("who hears the other", LIMIT, lab.interrupt(), || {
        let heard = |node| probe(&lab, node)["heard_seconds_ago"].as_u64();
        Ok((heard(2) < heard(1)).then_some(()))
    })
    .unwrap();
    let text = loden(&lab, 1, &["status"]);
    assert!(text.contains("nothing comes back"), "{text}");
    mended(&lab, 1);
    says(&lab, 1, LIMIT, &json!({"degraded": false}));
    let log = fs::read_to_string(lab.daemon_log(1)).unwrap();
    assert!(log.contains("WARN peer 198.18."), "{log}");
    assert!(log.contains("is reached again"), "{log}");
}

#[test]
fn path_that_loses_long_packets_is_reported_as_narrow() {
    let lab = up(Backend::Udp);
    says(&lab, 1, LIMIT, &json!({"reach": "answers"}));
    input(&lab, 2, "udp dport 8285 meta length > 1400 drop");
    says(&lab, 1, LIMIT, &json!({"narrow": true, "reach": "answers"}));
}

#[test]
fn peer_without_the_program_is_asked_with_echoes_on_every_transport() {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        let lab = up(backend);
        says(&lab, 1, LIMIT, &json!({"reach": "answers"}));
        // The kernel goes on without the daemon.
        let pid = lab.daemon_pids()[1].to_string();
        lab.run(Member::Node(2), "kill", &["-9", &pid]).unwrap();
        let gone = json!({"reach": "echoes", "degraded": false});
        says(&lab, 1, LIMIT, &gone);
    }
}
