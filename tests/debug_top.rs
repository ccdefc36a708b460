//! `loden top` against a real daemon: in a real terminal, 80 by 24, and as lines of JSON that agree with what
//! was sent. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::{LODEN, await_ping, lab, spec};
use loden::lab::{Backend, Interrupt, Lab, Member, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);

/// Only a failing test reads so many lines, five of which come in a second.
const LINES: u32 = 150;

fn up() -> Lab {
    let mut lab = lab(spec(2, Backend::Udp));
    lab.await_connected().unwrap();
    lab
}

/// A tmux server of its own with one window of 80 by 24 in which a command runs.
struct Terminal {
    name: String,
}

impl Terminal {
    fn run(lab: &Lab, command: &str) -> Self {
        let terminal = Self {
            name: lab.spec().name.to_string(),
        };
        // A shell stays behind, so that what the program leaves of the terminal can be seen.
        let line = format!("{command}; echo ended with $?; stty -a; cat");
        terminal.tmux(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x80",
            "-y24",
            &line,
        ]);
        terminal
    }

    fn tmux(&self, args: &[&str]) -> String {
        let mut command = Command::new("tmux");
        let command = command.args(["-L", &self.name]).args(args);
        // No terminal and no server of whoever runs this.
        let output = command
            .env_remove("TMUX")
            .env("TERM", "screen")
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null())
            .output();
        let output = output.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn press(&self, keys: &str) {
        self.tmux(&["send-keys", "-l", keys]);
    }

    fn await_screen(&self, what: &str, shows: impl Fn(&str) -> bool) -> String {
        let mut last = String::new();
        let seen = wait::until(what, LIMIT, &Interrupt::default(), || {
            last = self.screen();
            Ok(shows(&last).then_some(()))
        });
        assert!(seen.is_ok(), "waited in vain for {what}:\n{last}");
        last
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Gone already, perhaps.
        let mut command = Command::new("tmux");
        let _ended = command.args(["-L", &self.name, "kill-server"]).output();
    }
}

/// The number of packets per second in a line of the screen.
fn rate(screen: &str, row: &str) -> String {
    let line = screen.lines().find(|line| line.starts_with(row)).unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}

#[test]
fn terminal_shows_traffic_obeys_keys_and_is_left_as_it_was() {
    let lab = up();
    let socket = lab.status_socket(1).display().to_string();
    let terminal = Terminal::run(&lab, &format!("{LODEN} top -i 0.2 --socket {socket}"));
    let addr = lab.pod_addr(2, 1).unwrap().to_string();
    let screen = terminal.await_screen("the first screen", |screen| screen.contains("q quit"));
    assert_eq!(screen.lines().count(), 24, "{screen}");
    for fact in [
        "flannel0",
        "mmsg",
        "192.0.2.2:8285",
        "peers by traffic",
        "uses ",
        "drops",
    ] {
        assert!(screen.contains(fact), "{fact:?} is missing in:\n{screen}");
    }
    // Fifty packets a second, for as long as the test looks.
    let mut ping = Command::new("ping");
    let ping = ping.args(["-n", "-q", "-i0.02", "-c2000", &addr]);
    let _pinging = lab.spawn(Member::Pod(1, 1), "pings", ping).unwrap();
    terminal.await_screen("the pings", |screen| {
        let tens = |row| {
            rate(screen, row)
                .parse()
                .is_ok_and(|rate: f64| (10.0..200.0).contains(&rate))
        };
        tens("encap") && tens("decap")
    });
    terminal.press("s");
    terminal.await_screen("another order", |screen| screen.contains("peers by sent"));
    terminal.press("/203.0.113.");
    terminal.await_screen("a filter being typed", |screen| {
        screen.contains("contain: 203.0.113._")
    });
    terminal.tmux(&["send-keys", "Enter"]);
    terminal.await_screen("no peer", |screen| !screen.contains("192.0.2.2:8285"));
    terminal.tmux(&["send-keys", "Escape"]);
    terminal.await_screen("the peer again", |screen| screen.contains("192.0.2.2:8285"));
    terminal.press(" ");
    terminal.await_screen("frozen", |screen| screen.contains("frozen"));
    terminal.press("q");
    let after = terminal.await_screen("the shell", |screen| screen.contains("icanon"));
    assert!(after.contains("ended with 0"), "{after}");
    for setting in ["icanon", "echo", "isig"] {
        assert!(after.contains(setting), "{setting:?} is not back:\n{after}");
    }
    assert!(
        !after.contains("peers by"),
        "the screen of before is back:\n{after}"
    );
}

#[test]
fn terminal_is_given_back_on_a_signal_and_a_daemon_that_goes_is_shown_as_gone() {
    let lab = up();
    let socket = lab.status_socket(1).display().to_string();
    let terminal = Terminal::run(&lab, &format!("{LODEN} top -i 0.2 --socket {socket}"));
    terminal.await_screen("the first screen", |screen| screen.contains("q quit"));
    kill(Pid::from_raw(lab.daemon_pids()[0]), Signal::SIGTERM).unwrap();
    terminal.await_screen("the daemon's end", |screen| {
        screen.contains("no daemon answers")
    });
    let shell: i32 = terminal
        .tmux(&["display-message", "-p", "#{pane_pid}"])
        .trim()
        .parse()
        .unwrap();
    let children = format!("/proc/{shell}/task/{shell}/children");
    let children = std::fs::read_to_string(children).unwrap();
    let top = children.split_whitespace().next().unwrap().parse().unwrap();
    kill(Pid::from_raw(top), Signal::SIGTERM).unwrap();
    let after = terminal.await_screen("the shell", |screen| screen.contains("icanon"));
    assert!(
        after.contains("ended with 0") && !after.contains("-icanon"),
        "{after}"
    );
}

#[test]
fn lines_of_json_add_up_to_what_was_sent() {
    let lab = up();
    let mut top = Command::new(LODEN);
    let top = top
        .args(["top", "--json", "-i", "0.2", "--socket"])
        .arg(lab.status_socket(1))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let addr = lab.pod_addr(2, 1).unwrap().to_string();
    // Not a packet of which `top` could miss the beginning: it has looked once when it prints.
    let mut top = top;
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(top.stdout.take().unwrap()));
    let mut next =
        move || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    next();
    let args = ["-n", "-q", "-i0.01", "-c100", "-W5", &addr];
    lab.run(Member::Pod(1, 1), "ping", &args).unwrap();
    let (mut sent, mut received, mut to_peer) = (0.0, 0.0, 0.0);
    for _ in 0..LINES {
        if sent >= 99.5 && received >= 99.5 {
            break;
        }
        let line = next();
        // The daemon was busy: the next line has that time, too.
        if line["error"].is_string() {
            continue;
        }
        let seconds = line["interval_seconds"].as_f64().unwrap();
        let per_second = |value: &Value| value.as_f64().unwrap() * seconds;
        sent += per_second(&line["encap"]["packets_per_second"]);
        received += per_second(&line["decap"]["packets_per_second"]);
        to_peer += per_second(&line["peers"][0]["sent_per_second"]);
        assert_eq!(line["device"], "flannel0");
        assert!(line["time"].as_f64().unwrap() > 1.6e9);
    }
    for count in [sent, received, to_peer] {
        // The kernel may have sent a few of its own, IPv6's neighbours first of all.
        assert!(
            (99.5..120.0).contains(&count),
            "{sent} {received} {to_peer}"
        );
    }
    top.kill().unwrap();
    top.wait().unwrap();

    let mut counted = Command::new(LODEN);
    let counted = counted
        .args(["top", "--json", "-i", "0.1", "-c", "3", "--socket"])
        .arg(lab.status_socket(1));
    let output = counted.output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), 3);
    await_ping(&lab, Member::Pod(1, 1), (2, 1));
}

#[test]
fn without_a_daemon_or_a_terminal_the_error_names_the_remedy() {
    let run = |args: &[&str]| {
        let mut command = Command::new(LODEN);
        let command = command.arg("top").args(args).stdin(Stdio::null());
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let error = run(&["--socket", "/nonexistent/subnet.sock"]);
    assert!(
        error.contains("no daemon answers at /nonexistent/subnet.sock"),
        "{error}"
    );
}
