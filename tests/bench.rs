//! The benchmark's own instruments, on the real kernel: the packet generator accounts for every packet, and
//! a run yields every number that it promises. Needs root.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{LODEN, lab, spec};
use loden::bench::udp::{self, Traffic};
use loden::lab::{Backend, Member};

#[test]
fn the_generator_accounts_for_every_packet_in_bursts_and_singly() {
    let lab = lab(spec(2, Backend::Plain));
    for burst in [1, 32] {
        let traffic = Traffic {
            rate: 2_000,
            burst,
            time: Duration::from_millis(300),
        };
        let result = udp::run(&lab, Path::new(LODEN), &traffic).unwrap();
        let at_sink = result.at_sink;
        // 600 are due; bursts fill the last interval.
        assert_eq!(
            result.sent,
            600_u64.next_multiple_of(burst.into()),
            "bursts of {burst}"
        );
        assert_eq!(
            (at_sink.received, at_sink.reordered, at_sink.duplicates),
            (result.sent, 0, 0)
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
    let rules = "table ip t { chain c { type filter hook forward priority 0; \
                 udp dport 5301 numgen inc mod 4 == 0 drop; }; }";
    lab.run(Member::Node(2), "nft", &[rules]).unwrap();
    let traffic = Traffic {
        rate: 2_000,
        burst: 1,
        time: Duration::from_millis(200),
    };
    let result = udp::run(&lab, Path::new(LODEN), &traffic).unwrap();
    assert_eq!((result.sent, result.lost()), (400, 100));
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
