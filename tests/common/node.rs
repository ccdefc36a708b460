//! Owns what tests of one daemon on the local store share: its namespace, its files, its command line, and waiting
//! for what it does.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use loden::lab::{Interrupt, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::ns::Ns;

pub(crate) const LODEN: &str = env!("CARGO_BIN_EXE_loden");

/// Only a failing test waits this long. Several times what the daemon lets pass before it looks again by itself.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Its own subnets leave room for those that tests give to others.
pub(crate) const CONFIG: &str =
    r#"{"Network":"198.18.0.0/16","SubnetMin":"198.18.128.0","Backend":{"Type":"udp"}}"#;

/// A namespace and a directory for one daemon's files.
pub(crate) struct Node {
    pub(crate) ns: Ns,
    dir: TempDir,
}

impl Node {
    pub(crate) fn new(config: &str) -> Self {
        let node = Self {
            ns: Ns::new(),
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(node.path("run")).unwrap();
        node.configure(config);
        node
    }

    pub(crate) fn configure(&self, config: &str) {
        fs::create_dir_all(self.path("store")).unwrap();
        // By rename, so that a waiting daemon never reads half of it.
        fs::write(self.path("config"), config).unwrap();
        fs::rename(self.path("config"), self.path("store/config")).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn env(&self) -> String {
        fs::read_to_string(self.path("run/subnet.env")).unwrap_or_default()
    }

    /// The value of a line of `subnet.env`.
    pub(crate) fn env_value(&self, key: &str) -> String {
        let env = self.env();
        let mut lines = env.lines().filter_map(|line| line.split_once('='));
        let (_, value) = lines.find(|(name, _)| *name == key).unwrap();
        value.to_owned()
    }

    /// The daemon's command, in the namespace; `args` last, so that they win.
    pub(crate) fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", self.ns.name()])
            .arg(program)
            .args(program.ends_with("loden").then_some("daemon"))
            .arg("--local-store")
            .arg(self.path("store"))
            .arg("--subnet-file")
            .arg(self.path("run/subnet.env"))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn loden(&self, args: &[&str]) -> Command {
        self.command(Path::new(LODEN), args)
    }

    /// Starts a daemon; does not wait.
    pub(crate) fn spawn(&self, mut command: Command) -> Daemon {
        let log = self.path("log");
        let file = fs::File::create(&log).unwrap();
        let child = command.stderr(file).spawn().unwrap();
        Daemon { child, log }
    }

    /// Starts a daemon and waits for `subnet.env` to be written by this run, and for the status socket.
    pub(crate) fn start(&self, args: &[&str]) -> Daemon {
        let daemon = self.spawn(self.loden(args));
        daemon.wait_for_log("written: ready");
        daemon.wait_until("the status socket", || {
            self.path("run/subnet.sock").exists()
        });
        daemon
    }

    /// What `loden doctor --preflight` says of a daemon that would be started here; `flags` are its own.
    pub(crate) fn preflight(&self, flags: &[&str], args: &[&str]) -> Output {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", self.ns.name(), LODEN])
            .args(["doctor", "--preflight"])
            .args(flags)
            .args(["--", "--iface", "eth0", "--local-store"])
            .arg(self.path("store"))
            .arg("--subnet-file")
            .arg(self.path("run/subnet.env"))
            .args(args);
        command.output().unwrap()
    }

    /// Runs a daemon that must end by itself.
    pub(crate) fn fails(&self, args: &[&str]) -> (i32, String) {
        failed(self.loden(args))
    }

    /// What an ended daemon may leave: nothing.
    pub(crate) fn assert_clean(&self) {
        let links = self.ns.json("link show");
        let names = links.iter().map(|link| link["ifname"].as_str().unwrap());
        let names: Vec<&str> = names.collect();
        assert!(
            !names.iter().any(|name| name.starts_with("flannel")),
            "{names:?}"
        );
        assert!(self.ns.json("-4 route show 198.18.0.0/16").is_empty());
        let mut left: Vec<String> = fs::read_dir(self.path("run"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.retain(|name| name != "subnet.env");
        assert_eq!(left, Vec::<String>::new());
    }

    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.told(&["status", "--json"])).unwrap()
    }

    /// What a subcommand that asks the daemon prints. A daemon that is busy says so, and is asked again.
    pub(crate) fn told(&self, args: &[&str]) -> String {
        let mut error = String::new();
        let told = wait::until("an answer", LIMIT, &Interrupt::default(), || {
            let mut command = Command::new(LODEN);
            command.args(args).arg("--subnet-file");
            let output = command.arg(self.path("run/subnet.env")).output().unwrap();
            error = String::from_utf8_lossy(&output.stderr).into_owned();
            let answered = output.status.success();
            Ok(answered.then(|| String::from_utf8(output.stdout).unwrap()))
        });
        told.unwrap_or_else(|_| unreachable!("{args:?}: {error}"))
    }
}

/// Runs a command that must end by itself; its exit status, and its last line on stderr.
pub(crate) fn failed(mut command: Command) -> (i32, String) {
    let child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn();
    let mut daemon = Daemon {
        child: child.unwrap(),
        log: PathBuf::new(),
    };
    let code = daemon.exit_code();
    let mut text = String::new();
    let mut stderr = daemon.child.stderr.take().unwrap();
    stderr.read_to_string(&mut text).unwrap();
    let errors: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("loden: "))
        .collect();
    assert!(errors.len() <= 1, "more than one line of error: {text}");
    (
        code,
        errors
            .first()
            .map_or(text.clone(), |line| (*line).to_owned()),
    )
}

pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) log: PathBuf,
}

impl Daemon {
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn wait_until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let waited = wait::until(what, LIMIT, &Interrupt::default(), || {
            Ok(condition().then_some(()))
        });
        assert!(waited.is_ok(), "no {what}; log:\n{}", self.log());
    }

    pub(crate) fn wait_for_log(&self, text: &str) {
        self.wait_until(text, || self.log().contains(text));
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    pub(crate) fn exit_code(&mut self) -> i32 {
        self.exit_status().code().unwrap()
    }

    pub(crate) fn exit_status(&mut self) -> ExitStatus {
        let mut code = None;
        let child = &mut self.child;
        wait::until("the daemon to end", LIMIT, &Interrupt::default(), || {
            code = child.try_wait().unwrap();
            Ok(code.map(drop))
        })
        .unwrap();
        code.unwrap()
    }

    pub(crate) fn stop(mut self) -> i32 {
        self.signal(Signal::SIGTERM);
        self.exit_code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already reaped, if the test went well.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
