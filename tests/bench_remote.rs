//! A benchmark between two machines, which are namespaces here: the server answers one client at a time that has the
//! token and comes from where it may, whatever else is sent to it, and leaves nothing. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{LODEN, lab, spec};
use loden::bench::medium::Medium;
use loden::bench::report::Report;
use loden::bench::scenario::{Metric, Scenario};
use loden::bench::system::System;
use loden::lab::process::Tracked;
use loden::lab::{Backend, Interrupt, Lab, Member, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const HERE: Member = Member::Node(1);
const THERE: Member = Member::Node(2);
/// The other machine's address on the wire.
const ADDR: &str = "192.0.2.2";
const LIMIT: Duration = Duration::from_secs(20);

/// Two nodes, a server on the second, and a token that both have.
struct Machines {
    lab: Lab,
    server: Tracked,
    dir: TempDir,
}

impl Machines {
    fn new(args: &[&str]) -> Self {
        let lab = lab(spec(2, Backend::Plain));
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        fs::write(&token, "a token of some length\n").unwrap();
        let mut command = Command::new(LODEN);
        command.args(["bench", "serve", "--token-file"]).arg(&token);
        command.args(args);
        let mut server = lab.spawn(THERE, "serve", &mut command).unwrap();
        wait::until_bound(&lab.netns(THERE), "tcp", 5300, lab.interrupt(), || {
            server.check_running()
        })
        .unwrap();
        Self { lab, server, dir }
    }

    fn token(&self) -> PathBuf {
        self.dir.path().join("token")
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("report")
    }

    /// `loden bench run` on the first machine, so many repetitions long.
    fn command(&self, reps: u32, token: &Path, args: &[&str]) -> Command {
        let netns = self.lab.netns(HERE);
        let mut command = Command::new("ip");
        command.args(["netns", "exec", netns.name(), LODEN, "bench", "run"]);
        command.args(["--seconds", "1", "--remote", ADDR, "--out"]);
        command.arg(self.out()).arg("--token-file").arg(token);
        command.args(["--reps", &reps.to_string()]).args(args);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// A client that goes on for minutes, once it is in the middle of something.
    fn long_client(&self) -> Child {
        let args = ["--scenarios", "request-idle"];
        let mut command = self.command(99, &self.token(), &args);
        let client = command.stderr(Stdio::null()).spawn().unwrap();
        wait::until("a program", LIMIT, &Interrupt::default(), || {
            Ok((!self.programs().is_empty()).then_some(()))
        })
        .unwrap();
        client
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(1, &self.token(), args).output().unwrap()
    }

    fn report(&self) -> Report {
        let text = fs::read_to_string(self.out().join("report.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Waits until the server has said `what`.
    fn await_log(&self, what: &str) {
        self.await_log_times(what, 1);
    }

    fn await_log_times(&self, what: &str, times: usize) {
        wait::until(what, LIMIT, &Interrupt::default(), || {
            let log = fs::read_to_string(self.server.log_path()).unwrap();
            Ok((log.matches(what).count() >= times).then_some(()))
        })
        .unwrap();
    }

    fn dial(&self) -> TcpStream {
        let dialled = self
            .lab
            .netns(HERE)
            .run(|| TcpStream::connect((ADDR, 5300)));
        let stream = dialled.unwrap().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// The traffic programs that run on the second machine.
    fn programs(&self) -> Vec<String> {
        let inode = fs::metadata(self.lab.netns(THERE).path()).unwrap();
        let same = |path: PathBuf| {
            use std::os::unix::fs::MetadataExt as _;
            fs::metadata(path).is_ok_and(|found| found.ino() == inode.ino())
        };
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            if same(entry.path().join("ns/net")) && !command.contains("serve --token-file") {
                found.push(command);
            }
        }
        found
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_run_between_two_machines_measures_every_path_between_them() {
    let mut machines = Machines::new(&["--allow", "192.0.2.0/24"]);
    let pod = machines.lab.node_addr(2).unwrap().to_string();
    let scenarios = "tcp-1,tcp-1-both,udp-64,udp-64-burst,request-half,connect-rate";
    let output = machines.run(&[
        "--path",
        "wire=192.0.2.2",
        "--path",
        &format!("overlay={pod}"),
        "--scenarios",
        scenarios,
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let report = machines.report();
    assert_eq!(report.notes, Vec::<String>::new());
    assert!(report.other_machine.is_some());
    for name in ["wire", "overlay"] {
        let system = System::Other(name.to_owned());
        for id in scenarios.split(',') {
            let scenario: Scenario = id.parse().unwrap();
            let at = (Medium::Machines, scenario);
            let (failed, _) = report.cells.failures(at.0, at.1, &system);
            assert_eq!(failed, Vec::<&str>::new(), "{id}, {name}");
            let figure = |metric| report.cells.summary(at.0, at.1, &system, metric);
            let headline = figure(scenario.load.headline()).unwrap();
            assert!(headline.median > 0.0, "{id}, {name}");
            assert!(figure(Metric::MachineSwitches).unwrap().median > 0.0);
            assert_eq!(figure(Metric::CpuPerGigabyte), None);
        }
    }
    let markdown = fs::read_to_string(machines.out().join("report.md")).unwrap();
    assert!(
        markdown.contains("## The network between the machines"),
        "{markdown}"
    );
    machines.await_log("left: it is done");
    assert_eq!(machines.programs(), Vec::<String>::new());
    machines.server.stop().unwrap();
}

#[test]
fn who_has_another_token_or_comes_from_elsewhere_gets_nothing() {
    let machines = Machines::new(&["--allow", "192.0.2.1/32"]);
    let other = machines.dir.path().join("other");
    fs::write(&other, "another token of some length").unwrap();
    let mut command = machines.command(1, &other, &["--scenarios", "tcp-1"]);
    let output = command.output().unwrap();
    assert!(!output.status.success());
    assert!(
        said(&output).contains("does not have the token"),
        "{}",
        said(&output)
    );

    let elsewhere = Machines::new(&["--allow", "198.51.100.0/24"]);
    let output = elsewhere.run(&["--scenarios", "tcp-1"]);
    assert!(!output.status.success());
    assert!(said(&output).contains("--allow"), "{}", said(&output));
    assert!(!elsewhere.out().exists(), "there is a report of nothing");
}

#[test]
fn whatever_is_sent_to_it_the_server_answers_the_next_client() {
    let machines = Machines::new(&[]);
    let long = vec![b'x'; 1 << 20];
    let bad: [&[u8]; 5] = [
        b"",
        b"\n",
        b"{\"answer\":7}\n",
        b"{\"answer\":\"00\"}\n\xff\xfe{\n",
        &long,
    ];
    for (number, bytes) in (1..).zip(bad) {
        let mut stream = machines.dial();
        let mut greeting = String::new();
        BufReader::new(&stream).read_line(&mut greeting).unwrap();
        assert!(greeting.contains("\"challenge\":\""), "{greeting}");
        // It may hang up before everything is written.
        let written = stream.write_all(bytes);
        drop(written);
        let shut = stream.shutdown(std::net::Shutdown::Write);
        drop(shut);
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        assert!(
            ended.is_err() || answer.is_empty() || answer.starts_with(b"{\"failed\""),
            "{}",
            String::from_utf8_lossy(&answer)
        );
        // Until then the next one is not answered.
        machines.await_log_times("left: ", number);
    }
    let output = machines.run(&["--scenarios", "request-idle"]);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn a_second_client_is_refused_and_a_killed_one_leaves_no_program() {
    let machines = Machines::new(&[]);
    let mut first = machines.long_client();
    let second = machines.run(&["--scenarios", "request-idle"]);
    assert!(!second.status.success());
    assert!(
        said(&second).contains("another benchmark is running"),
        "{}",
        said(&second)
    );

    // `ip netns exec` becomes the program that it is told to run.
    let pid = Pid::from_raw(i32::try_from(first.id()).unwrap());
    kill(pid, Signal::SIGKILL).unwrap();
    first.wait().unwrap();
    machines.await_log("left: ");
    assert_eq!(machines.programs(), Vec::<String>::new());
    let third = machines.run(&["--scenarios", "request-idle"]);
    assert!(third.status.success(), "{}", said(&third));
}

#[test]
fn a_server_that_is_told_to_end_takes_its_programs_along() {
    let mut machines = Machines::new(&[]);
    let mut client = machines.long_client();
    machines.server.stop().unwrap();
    assert_eq!(machines.programs(), Vec::<String>::new());
    // The client writes what it has, and says why there is no more: the traffic of a warming up may end first.
    assert!(!client.wait().unwrap().success());
    let report = machines.report();
    let mut reasons = report.notes.clone();
    reasons.extend(report.stopped);
    let says_why =
        |reason: &String| reason.contains("is lost") || reason.contains("not measured: ");
    assert!(reasons.iter().any(says_why), "{reasons:?}");
}

#[test]
fn what_two_machines_cannot_show_is_refused_before_anything_runs() {
    let machines = Machines::new(&[]);
    for id in ["latency-idle", "host-tcp-1", "jumbo-tcp-1"] {
        let output = machines.run(&["--scenarios", id]);
        assert!(!output.status.success());
        assert!(
            said(&output).contains("not for two machines"),
            "{}",
            said(&output)
        );
    }
}
