//! Replays the committed fuzz corpora of the offloads, and random inputs, through the fuzz bodies, so that
//! what they assert holds on every run of the tests.

#![expect(
    clippy::expect_used,
    unreachable_pub,
    reason = "the bodies are written for the fuzz crate, and a test may panic"
)]

#[path = "../fuzz/src/coalesce.rs"]
mod coalesce;
#[path = "../fuzz/src/gso_plan.rs"]
mod gso_plan;
#[path = "../fuzz/src/round_trip.rs"]
mod round_trip;
#[path = "../fuzz/src/split.rs"]
mod split;
#[path = "../fuzz/src/vnet_hdr.rs"]
mod vnet_hdr;

use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;

type Body = fn(&[u8]);

const BODIES: [(&str, Body); 5] = [
    ("coalesce", coalesce::run),
    ("gso_plan", gso_plan::run),
    ("round_trip", round_trip::run),
    ("split", split::run),
    ("vnet_hdr", vnet_hdr::run),
];

#[test]
fn every_committed_input_passes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, body) in BODIES {
        let entries = std::fs::read_dir(corpus.join(name)).unwrap();
        let inputs: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        assert!(!inputs.is_empty(), "no corpus for {name}");
        for input in inputs {
            body(&std::fs::read(input).unwrap());
        }
    }
}

proptest! {
    #[test]
    fn random_inputs_pass(data in vec(any::<u8>(), 0..400)) {
        for (_, body) in BODIES {
            body(&data);
        }
    }
}
