//! The program in the place of flannel's helpers, by their names: `mk-docker-opts.sh` and `install-conf`. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/ns.rs"]
mod ns;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output};

use ns::Ns;
use tempfile::TempDir;

/// A directory in which the program is called by these names.
fn helpers() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["mk-docker-opts.sh", "install-conf"] {
        symlink(env!("CARGO_BIN_EXE_loden"), dir.path().join(name)).unwrap();
    }
    dir
}

fn run(ns: &Ns, dir: &Path, name: &str, args: &[&str]) -> Output {
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", ns.name()])
        .arg(dir.join(name))
        .args(args)
        .current_dir(dir);
    command.output().unwrap()
}

#[test]
fn dockers_options_are_written_as_the_script_writes_them() {
    let (ns, dir) = (Ns::new(), helpers());
    let dir = dir.path();
    let options = |args: &[&str]| run(&ns, dir, "mk-docker-opts.sh", args);
    fs::write(
        dir.join("subnet.env"),
        "FLANNEL_NETWORK=198.18.0.0/16\nFLANNEL_SUBNET=198.18.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n\
         $(touch pwned)\n",
    )
    .unwrap();
    let combined = "DOCKER_OPTS=\" --bip=198.18.74.1/24 --ip-masq=true --mtu=1472\"\n";
    let output = options(&["-f", "subnet.env", "-d", "out", "-c"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read_to_string(dir.join("out")).unwrap(), combined);
    // The script runs what is in the file.
    assert!(!dir.join("pwned").exists());
    let output = options(&["-f", "subnet.env", "-d", "/dev/stdout", "-c"]);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), combined);

    let usage = options(&["-h"]);
    assert_eq!(usage.status.code(), Some(1));
    assert!(String::from_utf8(usage.stderr).unwrap().contains("usage:"));

    ns.ip("route add 198.18.74.0/24 via 192.0.2.9");
    let refused = options(&["-f", "subnet.env", "-d", "out"]);
    assert_eq!(refused.status.code(), Some(1));
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(error.contains("198.18.74.0/24 via 192.0.2.9"), "{error}");
}

#[test]
fn a_configuration_is_installed_in_one_step_with_its_mode() {
    let (ns, dir) = (Ns::new(), helpers());
    let dir = dir.path();
    let install = |args: &[&str]| run(&ns, dir, "install-conf", args);
    fs::write(dir.join("source"), "new").unwrap();
    fs::set_permissions(dir.join("source"), Permissions::from_mode(0o640)).unwrap();
    fs::write(dir.join("target"), "old").unwrap();
    let output = install(&["source", "target"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read_to_string(dir.join("target")).unwrap(), "new");
    let mode = fs::metadata(dir.join("target")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o7777, 0o640);

    for (args, said) in [
        (vec!["source"], "usage: install-conf SRC DEST"),
        (vec!["a", "b", "c"], "usage: install-conf SRC DEST"),
        (vec!["none", "target"], "cannot read none"),
        (vec![".", "target"], "not a regular file"),
    ] {
        let output = install(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(said), "{args:?}: {error}");
    }
    // Nothing but what was there, and no temporary file.
    assert_eq!(fs::read_dir(dir).unwrap().count(), 4);
    assert_eq!(fs::read_to_string(dir.join("target")).unwrap(), "new");
}
