//! Runs every file of the committed fuzz corpora through its target, so that what the fuzzer once found stays
//! fixed without the fuzzer.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests fail as tests do, which clippy sees in test functions only"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[expect(
    unreachable_pub,
    reason = "public in the fuzz crate, which shares the file"
)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

fn fuzz_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz")
        .join(name)
}

/// The names in a directory, without extensions.
fn stems(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let stem = |entry: std::io::Result<fs::DirEntry>| {
        entry
            .unwrap()
            .path()
            .file_stem()
            .unwrap()
            .to_string_lossy()
            .into_owned()
    };
    entries.map(stem).collect()
}

#[test]
fn every_target_has_a_binary_a_corpus_and_a_line_in_the_list() {
    let listed: BTreeSet<String> = targets::TARGETS
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .collect();
    assert_eq!(stems(&fuzz_dir("fuzz_targets")), listed);
    assert_eq!(stems(&fuzz_dir("corpus")), listed);
}

#[test]
fn every_corpus_file_passes_its_target() {
    for (name, target) in targets::TARGETS {
        let dir = fuzz_dir("corpus").join(name);
        let files = stems(&dir);
        assert!(!files.is_empty(), "{} is empty", dir.display());
        for file in files {
            let path = dir.join(file);
            let data = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            // Printed by the test harness only when the target panics.
            println!("{}", path.display());
            target(&data);
        }
    }
}
