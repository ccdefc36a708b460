//! Owns what tests of `loden explain` on whole nodes share: asking a daemon, what a trace says, and rules that count or drop
//! packets. Never asserts what is right, but that a trace comes to say it.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::process::Command;

use loden::lab::Member;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::common::LODEN;

/// Traces until one says what it should: on a machine that stands still for a moment, probes and answers come too late.
const ATTEMPTS: u32 = 12;

pub(crate) fn loden(cluster: &Cluster, n: u8, args: &[&str]) -> Value {
    let mut command = Command::new(LODEN);
    command.args(args).args(["--json", "--subnet-file"]);
    let output = command.arg(cluster.file(n, "subnet.env")).output().unwrap();
    // Nothing, as long as there is no daemon.
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// What node 1 says of probes of 500 bytes to node 2.
pub(crate) fn trace(cluster: &Cluster) -> Vec<String> {
    trace_between(cluster, ["198.18.1.2", "198.18.2.2"])
}

pub(crate) fn trace_between(cluster: &Cluster, [from, to]: [&str; 2]) -> Vec<String> {
    let said = loden(cluster, 1, &["explain", from, to, "--len=500", "--trace"]);
    let lines = said["trace"].as_array().into_iter().flatten();
    lines
        .map(|line| line.as_str().unwrap().to_owned())
        .collect()
}

/// Traces until every one of these begins a line, in this order, and this is concluded, or nothing is lost.
pub(crate) fn await_trace(
    cluster: &Cluster,
    parts: &[&str],
    conclusion: Option<&str>,
) -> Vec<String> {
    await_trace_of(|| trace(cluster), parts, conclusion)
}

pub(crate) fn await_trace_of(
    trace: impl Fn() -> Vec<String>,
    parts: &[&str],
    conclusion: Option<&str>,
) -> Vec<String> {
    let mut lines = Vec::new();
    let says = (0..ATTEMPTS).any(|_| {
        lines = trace();
        let mut rest = lines.iter();
        let mut lost = lines.iter().filter(|line| line.contains("get lost"));
        let concluded = match conclusion {
            Some(words) => lost.next().is_some_and(|line| line.contains(words)),
            None => true,
        };
        concluded
            && lost.next().is_none()
            && parts
                .iter()
                .all(|part| rest.any(|line| line.starts_with(part)))
    });
    assert!(says, "{parts:#?} and {conclusion:?}: {lines:#?}");
    lines
}

/// Counts a rule's packets from now on: by `hook` of a member.
pub(crate) fn count(cluster: &Cluster, member: Member, hook: &str, rule: &str) {
    let table = format!(
        "table ip seen {{ chain c {{ type filter hook {hook} priority -400; {rule} counter; }}; }}"
    );
    let netns = cluster.lab.netns(member);
    // Only what comes from now on counts.
    let _was_not_there = cluster.lab.run(member, "nft", &["delete table ip seen"]);
    drop(netns);
    cluster.lab.run(member, "nft", &[&table]).unwrap();
}

pub(crate) fn counted(cluster: &Cluster, member: Member) -> u64 {
    let listed = cluster.run(member, "nft", "list table ip seen");
    let (_, rest) = listed.split_once("counter packets ").unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}

/// Has a member drop this, until the next rule.
pub(crate) fn wall(cluster: &Cluster, member: Member, hook: &str, rule: &str) {
    let table = format!(
        "table ip wall {{ chain c {{ type filter hook {hook} priority -500; {rule} drop; }}; }}"
    );
    cluster.lab.run(member, "nft", &[&table]).unwrap();
}

pub(crate) fn open(cluster: &Cluster, member: Member) {
    cluster.run(member, "nft", "delete table ip wall");
}
