//! The status socket of a real daemon against everybody who should get nothing from it: other users, garbage,
//! clients that say nothing, captures nobody reads. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{LODEN, await_ping, lab, spec};
use loden::lab::{Backend, Interrupt, Lab, Member, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(20);

const STATUS: &str = "{\"query\":\"status\"}\n";

fn up() -> Lab {
    let mut lab = lab(spec(2, Backend::Udp));
    lab.await_connected().unwrap();
    lab
}

/// Whether somebody who asks is answered. A daemon that is busy lets him in, and is asked again.
fn status_works(socket: &Path) -> bool {
    let mut works = false;
    wait::until("an answer", LIMIT, &Interrupt::default(), || {
        let mut command = Command::new(LODEN);
        let command = command.args(["status", "--json", "--socket"]).arg(socket);
        let output = command.output().unwrap();
        works = output.status.success();
        let said = String::from_utf8(output.stderr).unwrap();
        Ok((!said.contains("the daemon is busy")).then_some(()))
    })
    .unwrap();
    works
}

/// What a user gets for a question, or the complaint of the tool that asks.
fn answer_to(user: &str, socket: &Path) -> String {
    let mut child = Command::new("setpriv")
        .args(["--reuid", user, "--clear-groups", "socat", "-t5", "-"])
        .arg(format!("UNIX-CONNECT:{}", socket.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Refused already, perhaps.
    let _sent = child.stdin.take().unwrap().write_all(STATUS.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8(text).unwrap()
}

#[test]
fn other_users_are_refused_by_mode_and_where_that_was_opened_by_who_they_are() {
    let lab = up();
    let socket = lab.status_socket(1);
    assert_eq!(
        fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
        0o600
    );
    for dir in socket.ancestors().skip(1) {
        if dir.starts_with("/run/loden-lab") {
            fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
        }
    }
    let refused = answer_to("65534", &socket);
    assert!(refused.contains("Permission denied"), "{refused}");
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    let refused = answer_to("65534", &socket);
    assert!(
        !refused.contains("version") && !refused.contains("denied"),
        "{refused}"
    );
    let answered = answer_to("0", &socket);
    assert!(answered.contains("\"version\""), "{answered}");
}

/// What the program complains about, run by these words; not that the daemon is busy, which is asked again then.
fn complaint(words: &[&str], args: &[&str], socket: &Path, out: impl Fn() -> Stdio) -> String {
    let complained = wait::until("a complaint", LIMIT, &Interrupt::default(), || {
        let mut command = Command::new(words.first().unwrap_or(&LODEN));
        if let Some(rest) = words.get(1..) {
            command.args(rest).arg(LODEN);
        }
        let command = command.args(args).arg("--socket").arg(socket).stdout(out());
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        Ok((!said.contains("the daemon is busy")).then_some(said))
    });
    complained.unwrap()
}

#[test]
fn who_may_not_ask_and_what_cannot_be_written_is_told_by_name() {
    let lab = up();
    let socket = lab.status_socket(1);
    let full = || Stdio::from(fs::File::options().write(true).open("/dev/full").unwrap());
    for args in [
        &["status"][..],
        &["explain", "198.18.0.2", "198.18.0.3"],
        &["top", "--json", "--count=1"],
        &["capture", "-d1", "-w", "-"],
    ] {
        let said = complaint(&[], args, &socket, full);
        let expected = "cannot write standard output: No space left on device";
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    let args = ["capture", "-d1", "-w", "/dev/full"];
    let said = complaint(&[], &args, &socket, Stdio::null);
    assert!(
        said.contains("cannot write /dev/full: No space left on device"),
        "{said}"
    );
    assert!(said.contains("make room"), "{said}");
    // Somebody else's, and no capability to pass over that.
    chown(&socket, Some(65534), Some(65534)).unwrap();
    let words = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"];
    for command in ["status", "doctor", "capture"] {
        let said = complaint(&words, &[command], &socket, Stdio::null);
        let expected = "only root and the daemon's own user are answered: ask as one of them";
        assert!(said.contains(expected), "{command}: {said}");
    }
}

/// Ctrl-Z and `fg`, or a tracer.
#[test]
fn a_question_that_is_stopped_and_continued_is_answered() {
    let lab = up();
    let daemon = Pid::from_raw(lab.daemon_pids()[0]);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let mut command = Command::new(LODEN);
    let command = command.args(["status", "--json", "--socket"]);
    let asking = command.arg(lab.status_socket(1)).stdout(Stdio::null());
    let asking = asking.stderr(Stdio::piped()).spawn().unwrap();
    let client = Pid::from_raw(asking.id().cast_signed());
    let is_in = |state: char| {
        let what = format!("the state {state}");
        let found = wait::until(&what, LIMIT, &Interrupt::default(), || {
            let stat = fs::read_to_string(format!("/proc/{client}/stat")).unwrap();
            Ok(stat.contains(&format!(") {state} ")).then_some(()))
        });
        found.unwrap();
    };
    // At first it may wait for a file.
    for _ in 0..20 {
        is_in('S');
        kill(client, Signal::SIGSTOP).unwrap();
        is_in('T');
        kill(client, Signal::SIGCONT).unwrap();
    }
    kill(daemon, Signal::SIGCONT).unwrap();
    let output = asking.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// Resident memory of a process in KiB.
fn resident(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A capture that was answered and is not read; none where it was refused, or hung up on.
fn unread_capture(socket: &Path) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let ask = b"{\"query\":\"capture\",\"filter\":\"\",\"snap_len\":65536,\"segments\":false}\n";
    stream.write_all(ask).unwrap();
    let mut first = [0; 8];
    let read = stream.read_exact(&mut first);
    if let Err(error) = &read {
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }
    (read.is_ok() && &first != b"{\"error\"").then_some(stream)
}

#[test]
fn garbage_silence_and_unread_captures_cost_little_and_keep_nobody_out() {
    let lab = up();
    let socket = lab.status_socket(1);
    let daemon = lab.daemon_pids()[0];
    assert!(status_works(&socket));
    let before = resident(daemon);
    let mut held = Vec::new();
    for number in 0..100_usize {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        // Each may have been hung up on already.
        match number % 4 {
            0 => drop(stream.write_all(&vec![b'x'; 1 << 20])),
            1 => drop(
                stream.write_all(b"{\"query\":\"capture\",\"filter\":\"((((\",\"snap_len\":1}\n"),
            ),
            2 => drop(stream.shutdown(Shutdown::Write)),
            _ => {}
        }
        held.push(stream);
        if number % 25 == 0 {
            assert!(status_works(&socket), "with {number} others");
        }
    }
    assert!(status_works(&socket));
    // Captures that nobody reads: as many as are allowed, over and over, while traffic flows.
    for _ in 0..5 {
        let mut captures = Vec::new();
        // Those of the round before end when the daemon notices.
        let all = || {
            captures.extend(unread_capture(&socket));
            Ok((captures.len() == 4).then_some(()))
        };
        wait::until("four captures", LIMIT, &Interrupt::default(), all).unwrap();
        assert!(unread_capture(&socket).is_none(), "a fifth capture");
        await_ping(&lab, Member::Pod(1, 1), (2, 1));
        assert!(status_works(&socket), "beside four captures");
    }
    drop(held);
    let grown = resident(daemon).saturating_sub(before);
    assert!(grown < 16 << 10, "{grown} KiB more than before");
    await_ping(&lab, Member::Pod(1, 1), (2, 1));
}
