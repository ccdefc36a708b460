//! Other people's programs beside ours in one benchmark: wireguard-go, and the original daemon. `scripts/test others`
//! builds them and runs these tests; nothing else does, because building needs Go. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/others.rs"]
mod others;

use std::fs;
use std::process::Command;

use loden::bench::medium::Medium;
use loden::bench::report::Report;
use loden::bench::scenario::{Metric, Scenario};
use loden::bench::system::System;
use others::program;

/// Measures loden and `other`, which `flag` introduces as `named`, on the packet wire.
fn run(flag: &str, named: &str, other: &System) -> Report {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_loden"))
        .args(["bench", "run", "--reps", "1", "--seconds", "1", "--out"])
        .arg(dir.path())
        .args([flag, named, "--systems", &format!("loden,{other}")])
        .args(["--wires", "packet"])
        .args([
            "--scenarios",
            "tcp-1,udp-64-burst,udp-1472-burst,request-idle",
        ])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = fs::read_to_string(dir.path().join("report.json")).unwrap();
    let report: Report = serde_json::from_str(&text).unwrap();
    assert_eq!(report.notes, Vec::<String>::new());
    assert_eq!(report.cells.systems(), [System::LODEN, other.clone()]);
    report
}

fn assert_measured(report: &Report, other: &System) {
    for scenario in report.cells.scenarios_on(Medium::Packet) {
        let (failed, of) = report.cells.failures(Medium::Packet, scenario, other);
        assert_eq!((failed, of), (Vec::new(), 1), "{scenario}");
        let figure = |metric| {
            let summary = report
                .cells
                .summary(Medium::Packet, scenario, other, metric);
            summary.map(|summary| summary.median)
        };
        assert!(
            figure(scenario.load.headline()).unwrap() > 0.0,
            "{scenario}"
        );
        // Its processes did it.
        assert!(figure(Metric::ContextSwitches).unwrap() > 0.0, "{scenario}");
        assert_eq!(figure(Metric::CallsPerPacket), None);
    }
    let cpu = (Medium::Packet, Scenario::tcp(1), Metric::CpuPerGigabyte);
    let used = report.cells.summary(cpu.0, cpu.1, other, cpu.2).unwrap();
    assert!(used.median > 0.0, "{used:?}");
}

#[test]
#[ignore = "needs wireguard-go: scripts/test others"]
fn wireguard_go_is_measured_beside_ours() {
    let program = program("wireguard").display().to_string();
    let report = run("--wireguard-go", &program, &System::WireguardGo);
    assert_measured(&report, &System::WireguardGo);
}

#[test]
#[ignore = "needs the original daemon: scripts/test others"]
fn the_original_daemon_is_measured_on_the_same_store_and_is_what_goals_speak_of() {
    let other = System::Other("flannel".to_owned());
    let named = format!("flannel={}", program("flannel").display());
    let report = run("--against", &named, &other);
    assert_measured(&report, &other);
    let goals = report
        .verdicts
        .iter()
        .filter(|one| one.what.ends_with("loden / flannel"));
    assert!(goals.count() > 0, "{:?}", report.verdicts);
}
