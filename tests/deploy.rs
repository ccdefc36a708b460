//! What operators install, looked at by the tools that will read it.

use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn systemd_finds_no_fault_with_the_units() {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd");
    let dir = tempfile::tempdir().unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    for entry in fs::read_dir(units).unwrap() {
        let entry = entry.unwrap();
        let text = fs::read_to_string(entry.path()).unwrap();
        // It looks for the program too.
        let text = text.replace("/usr/local/bin/loden", env!("CARGO_BIN_EXE_loden"));
        let copy = dir.path().join(entry.file_name());
        fs::write(&copy, text).unwrap();
        verify.arg(copy);
    }
    let output = verify.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    // Unknown settings are no failure to it, but it names them.
    assert!(output.status.success() && !said.contains("loden"), "{said}");
}
