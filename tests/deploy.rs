//! What operators install, looked at by the tools that will read it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
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
        if entry
            .path()
            .extension()
            .is_none_or(|kind| kind != "service")
        {
            continue;
        }
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

/// Without it, iptables-legacy ends: it makes the file where there is none, and the unit may not.
#[test]
fn lock_of_iptables_is_there_before_the_unit_that_may_not_make_it() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd");
    let unit = fs::read_to_string(deploy.join("loden.service")).unwrap();
    assert!(unit.contains("\nProtectSystem=strict\n"));
    assert!(unit.contains("\nReadWritePaths=-/run/xtables.lock\n"));
    let root = tempfile::tempdir().unwrap();
    let output = Command::new("systemd-tmpfiles")
        .arg("--create")
        .arg(format!("--root={}", root.path().display()))
        .arg(deploy.join("loden.conf"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let lock = fs::metadata(root.path().join("run/xtables.lock")).unwrap();
    assert!(lock.is_file() && lock.permissions().mode() & 0o777 == 0o600);
}
