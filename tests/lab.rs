//! The lab itself, on the real kernel: what it builds carries packets as its description says, and nothing
//! of it stays behind, however it ends. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::{LODEN, lab, pings, spec, traces, unique_name};
use loden::lab::{Backend, Error, Interrupt, Lab, Member, Wire, teardown, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(20);

/// Whether one ping from a pod to another is answered, however long a busy machine takes for it.
fn reaches(lab: &Lab, from: Member, to: (u8, u8)) -> bool {
    let addr = lab.pod_addr(to.0, to.1).unwrap().to_string();
    lab.run(from, "ping", &["-n", "-q", "-c1", "-W20", &addr])
        .is_ok()
}

/// Whether `tcpdump` on node 2's underlay device sees a packet that matches `filter` while pods ping.
fn underlay_sees(lab: &Lab, filter: &str) -> bool {
    let mut capture = Command::new("tcpdump");
    capture.args(["-i", "eth0", "-n", "-c1", "--immediate-mode", filter]);
    let mut capture = lab.spawn(Member::Node(2), "capture", &mut capture).unwrap();
    wait::until("tcpdump to listen", LIMIT, &Interrupt::default(), || {
        let log = std::fs::read_to_string(capture.log_path()).unwrap();
        if log.contains("listening on") {
            return Ok(Some(()));
        }
        capture.check_running()?;
        Ok(None)
    })
    .unwrap();
    assert!(reaches(lab, Member::Pod(1, 1), (2, 1)));
    capture.finish(LIMIT, &Interrupt::default()).is_ok()
}

#[test]
fn pods_of_a_plain_lab_reach_each_other_bare_and_nothing_stays() {
    let mut spec = spec(3, Backend::Plain);
    spec.pods = 2;
    let lab = lab(spec);
    let name = lab.spec().name.clone();
    for from in lab.spec().pod_members() {
        for to in [(1, 1), (2, 2), (3, 1)] {
            assert!(reaches(&lab, from, to), "{from} to {to:?}");
        }
    }
    assert!(underlay_sees(&lab, "icmp and src 198.18.1.2"));
    assert!(!traces(&name).is_empty());
    lab.down().unwrap();
    assert_eq!(traces(&name), Vec::<String>::new());
}

#[test]
fn pods_of_a_vxlan_lab_reach_each_other_through_the_tunnel() {
    let lab = lab(spec(2, Backend::ByHand));
    assert!(reaches(&lab, Member::Pod(2, 1), (1, 1)));
    // IPv4 with ICMP in it: devices say things of their own, too.
    let ping = "udp port 8472 and udp[28:2] = 0x0800 and udp[39] = 1";
    assert!(underlay_sees(&lab, ping));
}

#[test]
fn pods_of_a_lab_without_a_backend_reach_only_their_own_node() {
    let mut spec = spec(2, Backend::None);
    spec.pods = 2;
    let lab = lab(spec);
    assert!(reaches(&lab, Member::Pod(1, 1), (1, 2)));
    assert!(!pings(&lab, Member::Pod(1, 1), (2, 1)));
}

#[test]
fn a_packet_wire_has_its_offloads_off_and_a_superpacket_wire_has_them_on() {
    let features = |wire| {
        let mut spec = spec(2, Backend::None);
        spec.wire = wire;
        let lab = lab(spec);
        let shown = lab
            .run(Member::Node(1), "ethtool", &["-k", "eth0"])
            .unwrap();
        let gaps = lab.layout().wire_gaps.clone();
        let is_on = |name: &str| shown.contains(&format!("{name}: on"));
        let segmentation = is_on("tcp-segmentation-offload") || is_on("tx-udp-segmentation");
        (segmentation, is_on("generic-receive-offload"), gaps)
    };
    assert!(features(Wire::Superpacket).0);
    assert_eq!(features(Wire::Packet), (false, true, Vec::new()));
    assert_eq!(features(Wire::PacketNoGro), (false, false, Vec::new()));
}

#[test]
fn a_lab_goes_when_its_owner_panics() {
    let spec = spec(2, Backend::Plain);
    let name = spec.name.clone();
    let owner = std::thread::spawn(move || {
        let _lab = lab(spec);
        panic!("the owner gives up");
    });
    assert!(owner.join().is_err());
    assert_eq!(traces(&name), Vec::<String>::new());
}

#[test]
fn a_lab_that_is_in_use_can_neither_be_built_again_nor_taken_down_by_another() {
    let mine = lab(spec(1, Backend::None));
    let name = mine.spec().name.clone();
    let again = Lab::build(mine.spec().clone(), &Interrupt::default());
    assert!(matches!(again, Err(Error::InUse { .. })), "{again:?}");
    let taken = teardown::down(&name);
    assert!(matches!(taken, Err(Error::InUse { .. })), "{taken:?}");
    assert!(mine.run(Member::Node(1), "true", &[]).is_ok());
}

#[test]
fn the_command_line_builds_enters_shows_and_removes_a_lab() {
    let name = unique_name();
    let loden = |args: &[&str]| {
        let mut command = Command::new(LODEN);
        command.args(["lab", args[0], "--name", name.as_str()]);
        command.args(&args[1..]).output().unwrap()
    };
    let up = loden(&["up", "--backend", "plain"]);
    assert!(
        up.status.success(),
        "{}",
        String::from_utf8_lossy(&up.stderr)
    );
    let again = loden(&["up", "--backend", "plain"]);
    assert!(
        !again.status.success(),
        "a second lab took the name of the first"
    );

    let ping = loden(&["exec", "n1p1", "--", "ping", "-c1", "-W20", "198.18.2.2"]);
    assert!(
        ping.status.success(),
        "{}",
        String::from_utf8_lossy(&ping.stdout)
    );
    let status = Command::new(LODEN)
        .args(["lab", "status"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&status.stdout).contains(name.as_str()));

    assert!(loden(&["down"]).status.success());
    assert_eq!(traces(&name), Vec::<String>::new());
    assert!(
        !loden(&["down"]).status.success(),
        "removing nothing was reported as a success"
    );
}

/// A stand-in for a daemon that starts and never gets a lease: the lab waits for it. It starts nothing, which would
/// outlive it for a moment, and outlives whoever started it: the kernel hangs up on stopped orphans.
fn daemon_without_a_lease(dir: &std::path::Path) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = dir.join("daemon");
    std::fs::write(&path, "#!/usr/bin/perl\n$SIG{HUP} = 'IGNORE';\nsleep;\n").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn an_interrupted_build_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let name = unique_name();
        let dir = tempfile::tempdir().unwrap();
        let daemon = daemon_without_a_lease(dir.path());
        let mut up = Command::new(LODEN)
            .args([
                "lab",
                "up",
                "--backend",
                "udp",
                "--name",
                name.as_str(),
                "--daemon",
            ])
            .arg(&daemon)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Both daemons have been started once the second has its pid file.
        let pid_file = format!("/run/loden-lab/{name}/n2/daemon.pid");
        wait::until("the second daemon", LIMIT, &Interrupt::default(), || {
            Ok(std::fs::exists(&pid_file).unwrap().then_some(()))
        })
        .unwrap();
        kill(Pid::from_raw(i32::try_from(up.id()).unwrap()), signal).unwrap();
        assert!(
            !up.wait().unwrap().success(),
            "an interrupted build was reported as a success"
        );
        assert_eq!(traces(&name), Vec::<String>::new(), "after {signal}");
    }
}

#[test]
fn what_a_killed_builder_left_is_removed_by_name() {
    let name = unique_name();
    let dir = tempfile::tempdir().unwrap();
    let daemon = daemon_without_a_lease(dir.path());
    let mut up = Command::new(LODEN)
        .args([
            "lab",
            "up",
            "--backend",
            "udp",
            "--name",
            name.as_str(),
            "--daemon",
        ])
        .arg(&daemon)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid_file = format!("/run/loden-lab/{name}/n2/daemon.pid");
    wait::until("the second daemon", LIMIT, &Interrupt::default(), || {
        Ok(std::fs::read_to_string(&pid_file)
            .is_ok_and(|text| text.ends_with('}'))
            .then_some(()))
    })
    .unwrap();
    up.kill().unwrap();
    up.wait().unwrap();
    assert!(traces(&name).len() > 4, "{:?}", traces(&name));
    let removed = teardown::down(&name).unwrap();
    assert_eq!((removed.namespaces.len(), removed.processes.len()), (4, 2));
    assert_eq!(traces(&name), Vec::<String>::new());
}

#[test]
fn a_daemon_that_gives_up_is_reported_with_the_end_of_its_log() {
    let mut spec = spec(2, Backend::Udp);
    let name = spec.name.clone();
    spec.daemon = Some("/bin/false".into());
    let text = Lab::build(spec, &Interrupt::default())
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("ended by itself") && text.contains("daemon.log"),
        "{text}"
    );
    assert_eq!(traces(&name), Vec::<String>::new());
}
