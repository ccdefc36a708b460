//! Nodes whose backends do not reach each other, as while a network changes between `udp` and another: each end says so,
//! wherever one would look. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::process::Command;

use cluster::{Cluster, V4, VXLAN};
use common::LODEN;
use nix::sys::signal::Signal;

/// What a subcommand that talks to a node's daemon prints.
fn said(cluster: &Cluster, n: u8, words: &[&str]) -> String {
    let mut command = Command::new(LODEN);
    command.args(&words[..1]).arg("--subnet-file");
    command.arg(cluster.file(n, "subnet.env")).args(&words[1..]);
    // Without the breaks of lines.
    let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn peer_of_another_backend_is_named_with_both_wherever_one_looks() {
    let mut cluster = Cluster::idle(2, V4, r#"{"Type":"udp"}"#);
    cluster.start(1);
    cluster.wait_until("a status", || cluster.status(1)["backend"] == "udp");
    cluster.configure(VXLAN);
    cluster.start(2);
    cluster.wait_until("both to know of each other", || {
        [1, 2].map(|n| cluster.status(n)["peers"].as_array().map(Vec::len)) == [Some(1); 2]
    });
    for (n, other, ours, theirs) in [(1, 2, "udp", "vxlan"), (2, 1, "vxlan", "udp")] {
        let why =
            format!("it uses the {theirs} backend and this node {ours}: there is no way to it");
        cluster.wait_until("word of it in the status", || {
            let status = cluster.status(n);
            status["refused"].to_string().contains(&why)
                && status["peers"][0]["transport"].is_null()
        });
        cluster.wait_until("word of it in the log", || cluster.log(n).contains(&why));
        let (from, to) = (format!("198.18.{n}.2"), format!("198.18.{other}.2"));
        cluster.wait_until("word of it in an explanation", || {
            said(&cluster, n, &["explain", &from, &to]).contains(&why)
        });
        cluster.wait_until("word of it in an examination", || {
            let found = said(&cluster, n, &["doctor"]);
            found.contains("not_served") && found.contains("one backend")
        });
        assert!(!cluster.pings(n, &to));
    }
    // Until both use one.
    cluster.end(1, Signal::SIGTERM);
    cluster.start(1);
    cluster.await_ping(1, "198.18.2.2");
    cluster.wait_until("nobody who is not served", || {
        [1, 2].map(|n| cluster.status(n)["refused"].to_string()) == ["[]", "[]"]
    });
}
