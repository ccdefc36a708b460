//! The benchmark's own instruments, on the real kernel: the packet generator accounts for every packet, and
//! a run yields every number that it promises. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{LODEN, lab, spec};
use loden::bench::medium::Medium;
use loden::bench::meter::Meter;
use loden::bench::report::Report;
use loden::bench::scenario::{Ends, Metric, Scenario};
use loden::bench::system::System;
use loden::bench::udp::{self, Traffic};
use loden::lab::{Backend, Interrupt, Member, teardown, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn the_generator_accounts_for_every_packet_in_bursts_and_singly() {
    let lab = lab(spec(2, Backend::Plain));
    let path = System::Plain.path(&lab, Ends::Pods).unwrap();
    for burst in [1, 32] {
        let traffic = Traffic {
            len: 64,
            rate: 2_000,
            burst,
            time: Duration::from_millis(300),
        };
        let result = udp::run(&lab, Path::new(LODEN), &path, &traffic, &Meter::default()).unwrap();
        let at_sink = result.at_sink;
        // 600 are due; bursts fill the last interval.
        assert_eq!(
            result.sent.sent,
            600_u64.next_multiple_of(burst.into()),
            "bursts of {burst}"
        );
        assert_eq!(
            (at_sink.received, at_sink.reordered, at_sink.duplicates),
            (result.sent.sent, 0, 0)
        );
        assert!(
            at_sink.p50_ns > 0 && at_sink.p50_ns <= at_sink.p99_ns,
            "{at_sink:?}"
        );
    }
}

#[test]
fn packets_that_the_network_drops_are_counted_as_lost() {
    let lab = lab(spec(2, Backend::Plain));
    let path = System::Plain.path(&lab, Ends::Pods).unwrap();
    let rules = "table ip t { chain c { type filter hook forward priority 0; \
                 udp dport 5301 numgen inc mod 4 == 0 drop; }; }";
    lab.run(Member::Node(2), "nft", &[rules]).unwrap();
    let traffic = Traffic {
        len: 64,
        rate: 2_000,
        burst: 1,
        time: Duration::from_millis(200),
    };
    let result = udp::run(&lab, Path::new(LODEN), &path, &traffic, &Meter::default()).unwrap();
    assert_eq!((result.sent.sent, result.lost()), (400, 100));
}

#[test]
fn a_quick_run_yields_every_number_of_every_repetition_as_json() {
    let output = Command::new(LODEN)
        .args(["bench", "quick", "--json", "--reps", "2", "--seconds", "1"])
        .args(["--systems", "plain,vxlan", "--wires", "packet-no-gro"])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["wire_gaps"].as_array().unwrap().len(), 0);
    let cells = report["cells"].as_array().unwrap();
    assert_eq!(
        cells.len(),
        2,
        "TCP with one stream is all that runs on this wire"
    );
    for cell in cells {
        let samples = cell["samples"].as_array().unwrap();
        assert_eq!(samples.len(), 2);
        assert!(
            samples
                .iter()
                .all(|sample| sample["throughput"].as_f64().unwrap() > 0.0),
            "{cell}"
        );
    }
}

/// The labs of a benchmark that ran as this process.
fn labs_of(pid: u32) -> Vec<String> {
    let prefix = format!("bench-{pid}-");
    let names = teardown::names().unwrap().into_iter();
    names
        .map(|name| name.to_string())
        .filter(|name| name.starts_with(&prefix))
        .collect()
}

fn report_in(dir: &Path) -> Report {
    let text = fs::read_to_string(dir.join("report.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// A run of `loden bench run --out DIR` with these arguments, as a process number and what it said.
fn bench_run(dir: &Path, args: &[&str]) -> (u32, std::process::Output) {
    let child = Command::new(LODEN)
        .args(["bench", "run", "--reps", "1", "--seconds", "1", "--out"])
        .arg(dir)
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (child.id(), child.wait_with_output().unwrap())
}

#[test]
fn a_run_writes_three_files_with_every_figure_and_leaves_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let scenarios = "tcp-1,tcp-1-both,udp-1400-burst,request-idle,connect-rate,host-tcp-1";
    let (pid, output) = bench_run(
        dir.path(),
        &[
            "--systems",
            "vxlan,loden",
            "--wires",
            "packet",
            "--scenarios",
            scenarios,
        ],
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert_eq!(labs_of(pid), Vec::<String>::new());
    assert!(said.contains("left)"), "{said}");

    let report = report_in(dir.path());
    assert_eq!(
        (report.stopped.as_deref(), &report.notes[..]),
        (None, &[][..])
    );
    assert!(
        report
            .command
            .starts_with("loden bench run --reps 1 --seconds 1 --out ")
    );
    let cells = &report.cells;
    assert_eq!(cells.scenarios_on(Medium::Packet).len(), 6);
    let figure = |scenario: &str, system: &System, metric| {
        let scenario = scenario.parse::<Scenario>().unwrap();
        let (failed, _) = cells.failures(Medium::Packet, scenario, system);
        assert_eq!(failed, Vec::<&str>::new(), "{scenario}, {system}");
        let summary = cells.summary(Medium::Packet, scenario, system, metric);
        summary.map(|summary| summary.median)
    };
    for system in [System::Vxlan, System::LODEN] {
        for scenario in scenarios.split(',') {
            let headline = scenario.parse::<Scenario>().unwrap().load.headline();
            let value = figure(scenario, &system, headline).unwrap();
            assert!(value > 0.0, "{scenario}, {system}: {value}");
        }
    }
    // Superpackets move many packets per call, and only loden tells.
    let calls = figure("tcp-1", &System::LODEN, Metric::PacketsPerCall).unwrap();
    assert!(calls > 1.0, "{calls}");
    assert_eq!(
        figure("tcp-1", &System::Vxlan, Metric::PacketsPerCall),
        None
    );
    assert!(figure("tcp-1", &System::LODEN, Metric::ContextSwitches).unwrap() > 0.0);
    let version = &report.programs[0].version;
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    let used = &report.programs[0].capabilities;
    assert!(
        used.iter().any(|one| one.name == "udp-gso" && one.used),
        "{used:?}"
    );
    // One repetition makes no ratio.
    assert!(report.ratios.iter().all(|ratio| ratio.ratio.is_none()));

    let html = fs::read_to_string(dir.path().join("report.html")).unwrap();
    let options = roxmltree::ParsingOptions {
        allow_dtd: true,
        ..roxmltree::ParsingOptions::default()
    };
    let body = html.replace("<meta charset=\"utf-8\">", "");
    let tree = roxmltree::Document::parse_with_options(&body, options).unwrap();
    let pictures = tree
        .descendants()
        .filter(|node| node.tag_name().name() == "svg");
    assert!(pictures.count() >= 3);
    for attribute in tree.descendants().flat_map(|node| node.attributes()) {
        assert!(
            !["href", "src", "srcset"].contains(&attribute.name()),
            "{attribute:?}"
        );
    }
    let markdown = fs::read_to_string(dir.path().join("report.md")).unwrap();
    assert!(markdown.contains("| tcp-1, Gb/s | "), "{markdown}");
    let picture = fs::read_to_string(dir.path().join("report.svg")).unwrap();
    roxmltree::Document::parse(&picture).unwrap();
    assert!(picture.contains("one TCP stream, packet wire"), "{picture}");

    let path = dir.path().join("report.json");
    let compared = Command::new(LODEN)
        .args(["bench", "compare"])
        .args([&path, &path])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&compared.stdout);
    assert!(
        compared.status.success() && text.contains("0 WORSE, 0 better"),
        "{text}"
    );
}

#[test]
fn on_a_terminal_a_bar_tells_how_much_time_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let command = format!(
        "{LODEN} bench run --reps 1 --seconds 1 --out {} --systems plain --wires superpacket --scenarios request-idle",
        dir.path().display()
    );
    // socat gives it a terminal, and passes on what it shows there. script(1) would stop when its child is stopped, and
    // wait for a shell to go on.
    let output = Command::new("socat")
        .arg("-u")
        .arg(format!("SYSTEM:{command}; echo ended with $?,pty,stderr"))
        .arg("STDOUT")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("ended with 0"), "{shown}");
    assert!(shown.contains("% ") || shown.contains("%, "), "{shown}");
    assert!(shown.contains("left: "), "{shown}");
    assert!(!shown.contains("(about"), "{shown}");
    // Which program ran is in the report, and what it did not have is not.
    let report = report_in(dir.path());
    assert_eq!(report.programs, []);
    assert_eq!(report.stopped, None);
}

#[test]
fn every_transport_of_loden_is_a_system_and_its_daemons_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let (pid, output) = bench_run(
        dir.path(),
        &[
            "--systems",
            "loden-host-gw,loden-vxlan,loden-user-vxlan,portable",
            "--wires",
            "packet",
            "--scenarios",
            "tcp-1,udp-1472-burst,request-idle",
        ],
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert_eq!(labs_of(pid), Vec::<String>::new());
    let report = report_in(dir.path());
    assert_eq!(report.notes, Vec::<String>::new());
    let cells = &report.cells;
    let systems = [
        System::LodenHostGw,
        System::LodenVxlan,
        System::LodenUserVxlan,
        System::Portable,
    ];
    assert_eq!(cells.systems(), systems);
    for scenario in cells.scenarios_on(Medium::Packet) {
        for system in &systems {
            let (failed, _) = cells.failures(Medium::Packet, scenario, system);
            assert_eq!(failed, Vec::<&str>::new(), "{scenario}, {system}");
            // Whatever is measured, these are.
            let figure = |metric| cells.summary(Medium::Packet, scenario, system, metric);
            assert!(figure(Metric::MachineSwitches).unwrap().median > 0.0);
            for metric in [Metric::ContextSwitches, Metric::CallsPerPacket] {
                let ours = matches!(system, System::LodenUserVxlan | System::Portable);
                assert_eq!(figure(metric).is_some(), ours, "{scenario}, {system}");
            }
        }
    }
    let engaged = |scenario: &str, system| {
        let scenario = scenario.parse::<Scenario>().unwrap();
        cells.engaged(Medium::Packet, scenario, system)
    };
    let ours = &System::LodenUserVxlan;
    assert_eq!(
        engaged("tcp-1", ours).unwrap(),
        ["tun-tso", "udp-gso", "udp-gro"]
    );
    // Fragments come singly, and leave in runs.
    assert!(
        !engaged("udp-1472-burst", ours)
            .unwrap()
            .contains(&"tun-uso")
    );
    assert_eq!(
        engaged("tcp-1", &System::Portable).unwrap(),
        Vec::<&str>::new()
    );
    assert_eq!(engaged("tcp-1", &System::LodenVxlan), None);
    let transports = report.verdicts.iter().filter(|one| one.goal == "transport");
    assert_eq!(transports.count(), 6);
    let markdown = fs::read_to_string(dir.path().join("report.md")).unwrap();
    assert!(
        markdown.contains("| Offloads that took part | loden-user-vxlan | portable |"),
        "{markdown}"
    );
}

#[test]
fn another_daemon_in_flannels_place_is_measured_on_the_same_store() {
    let dir = tempfile::tempdir().unwrap();
    // Called so, it takes flannel's arguments and no others.
    let flanneld = dir.path().join("flanneld");
    symlink(LODEN, &flanneld).unwrap();
    let (pid, output) = bench_run(
        dir.path(),
        &[
            "--against",
            &format!("other={}", flanneld.display()),
            "--systems",
            "loden,other",
            "--wires",
            "superpacket",
            "--scenarios",
            "request-idle",
        ],
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert_eq!(labs_of(pid), Vec::<String>::new());
    let report = report_in(dir.path());
    assert_eq!(report.notes, Vec::<String>::new());
    let other = System::Other("other".to_owned());
    assert_eq!(report.cells.systems(), [System::LODEN, other]);
}

#[test]
fn a_system_whose_program_does_not_work_is_named_and_the_others_are_measured() {
    let dir = tempfile::tempdir().unwrap();
    let (_, output) = bench_run(
        dir.path(),
        &[
            "--wireguard-go",
            "/bin/false",
            "--systems",
            "plain,wireguard-go",
            "--wires",
            "superpacket",
            "--scenarios",
            "latency-half,lossless-64",
        ],
    );
    assert!(output.status.success());
    let report = report_in(dir.path());
    assert_eq!(report.cells.systems(), [System::Plain]);
    for id in ["latency-half", "lossless-64"] {
        let scenario = id.parse::<Scenario>().unwrap();
        let at = (Medium::Superpacket, scenario, &System::Plain);
        assert_eq!(report.cells.failures(at.0, at.1, at.2), (Vec::new(), 1));
        let headline = report
            .cells
            .summary(at.0, at.1, at.2, scenario.load.headline());
        assert!(headline.unwrap().median > 0.0, "{id}");
    }
    assert_eq!(report.notes.len(), 1);
    assert!(
        report.notes[0].contains("wireguard-go"),
        "{:?}",
        report.notes
    );
}

#[test]
fn an_interrupted_run_leaves_nothing_and_writes_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut child = Command::new(LODEN)
        .args(["bench", "run", "--reps", "50", "--seconds", "1", "--out"])
        .arg(dir.path())
        .args(["--systems", "plain,loden", "--wires", "superpacket"])
        .args(["--scenarios", "request-idle,tcp-1"])
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let limit = Duration::from_secs(25);
    wait::until(
        "the second repetition",
        limit,
        &Interrupt::default(),
        || {
            let text = fs::read_to_string(&log).unwrap();
            Ok(text.contains("bench: 2/50: ").then_some(()))
        },
    )
    .unwrap();
    assert_eq!(labs_of(child.id()).len(), 2);
    kill(
        Pid::from_raw(i32::try_from(child.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    let status = child.wait().unwrap();
    assert!(
        !status.success(),
        "a part of a run was reported as the whole"
    );
    assert_eq!(labs_of(child.id()), Vec::<String>::new());
    let report = report_in(dir.path());
    let stopped = report.stopped.unwrap();
    assert!(stopped.contains("interrupted"), "{stopped}");
    assert_eq!(report.cells.systems(), [System::Plain, System::LODEN]);
    let html = fs::read_to_string(dir.path().join("report.html")).unwrap();
    assert!(html.contains("This run ended early"));
}
