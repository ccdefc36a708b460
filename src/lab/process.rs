//! Owns processes that outlive the call that started them: who they are, whether they are still the same,
//! and how they end. Never signals a process number that may have passed to another program.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::wait::{self, Interrupt};
use super::{Error, NetNs};

/// How long a process may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(3);

/// What makes a process itself: its number alone may be reused, the three together are not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The process number.
    pub pid: i32,
    /// When it started, in clock ticks since boot (proc(5), field 22 of `stat`).
    pub start_time: u64,
    /// The program it runs.
    pub exe: PathBuf,
}

impl Identity {
    /// Reads the identity of a live process; `None` if there is none, or only its zombie.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name, field 2, is in parentheses and may hold anything, even parentheses.
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?;
        // Field 3 was the state; field 22 is the nineteenth after it.
        let start_time = fields.nth(18)?.parse().ok()?;
        if matches!(state, "Z" | "X") {
            return None;
        }
        let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        Some(Self {
            pid,
            start_time,
            exe: without_deletion_mark(exe),
        })
    }

    /// Whether the very process still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Ends the process if it still is itself: SIGTERM, three seconds of grace, SIGKILL.
    ///
    /// # Errors
    /// [`Error::Io`] if it may not be signalled, [`Error::Timeout`] if it does not even die.
    pub fn stop(&self) -> Result<(), Error> {
        for number in [Signal::SIGTERM, Signal::SIGKILL] {
            if !self.is_alive() {
                return Ok(());
            }
            signal(self.pid, number).map_err(Error::io("signal", self.describe()))?;
            // Teardown must go on after a signal, so this wait has a token that is never set.
            let gone = wait::until("its end", GRACE, &Interrupt::default(), || {
                Ok((!self.is_alive()).then_some(()))
            });
            if gone.is_ok() {
                return Ok(());
            }
        }
        Err(Error::Timeout {
            what: format!("the end of {}", self.describe()),
            waited: GRACE,
            detail: String::new(),
        })
    }

    fn describe(&self) -> String {
        format!("process {} ({})", self.pid, self.exe.display())
    }
}

/// Sends a signal; a process that has just ended needs none.
fn signal(pid: i32, signal: Signal) -> io::Result<()> {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The kernel appends a mark to the name of a program whose file was replaced, as a rebuild does.
fn without_deletion_mark(exe: PathBuf) -> PathBuf {
    match exe
        .to_str()
        .and_then(|text| text.strip_suffix(" (deleted)"))
    {
        Some(text) => PathBuf::from(text),
        None => exe,
    }
}

/// A child inside a namespace, with a pid file beside its output; ended and reaped when dropped.
#[derive(Debug)]
pub struct Tracked {
    what: String,
    child: Option<Child>,
    identity: Option<Identity>,
    pid_file: PathBuf,
    log: PathBuf,
}

impl Tracked {
    /// Starts `command` in `netns`, standard output to `DIR/NAME.out`, standard error to `DIR/NAME.log`,
    /// in a process group of its own, and records it in `DIR/NAME.pid`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Missing`]; nothing runs then.
    pub fn spawn(
        netns: &NetNs,
        dir: &Path,
        name: &str,
        command: &mut Command,
    ) -> Result<Self, Error> {
        let create = |suffix: &str| {
            let path = dir.join(format!("{name}.{suffix}"));
            let file =
                File::create(&path).map_err(Error::io("create", path.display().to_string()))?;
            Ok::<_, Error>((path, file))
        };
        let (_, stdout) = create("out")?;
        let (log, stderr) = create("log")?;
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        let child = netns.spawn(command)?;
        // A child that has ended already has no identity, and needs none: it is this program's to reap.
        let identity = i32::try_from(child.id()).ok().and_then(Identity::of);
        let tracked = Self {
            what: format!("{name} in {}", netns.name()),
            child: Some(child),
            identity,
            pid_file: dir.join(format!("{name}.pid")),
            log,
        };
        if let Some(identity) = &tracked.identity {
            super::state::write_json(&tracked.pid_file, identity)?;
        }
        Ok(tracked)
    }

    /// The process number.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.identity.as_ref().map(|identity| identity.pid)
    }

    /// What it wrote to standard error so far.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// What it wrote to standard output so far.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read.
    pub fn stdout(&self) -> Result<String, Error> {
        let path = self.log.with_extension("out");
        fs::read_to_string(&path).map_err(Error::io("read", path.display().to_string()))
    }

    /// # Errors
    /// [`Error::Ended`], with the end of its log, once it has ended.
    pub fn check_running(&mut self) -> Result<(), Error> {
        match self.try_wait()? {
            None => Ok(()),
            Some(status) => Err(self.ended(status)),
        }
    }

    /// Waits for its own end and returns its standard output.
    ///
    /// # Errors
    /// [`Error::Ended`] if it failed, [`Error::Timeout`], [`Error::Interrupted`].
    pub fn finish(mut self, limit: Duration, interrupt: &Interrupt) -> Result<String, Error> {
        let what = format!("the end of {}", self.what);
        let status = wait::until(&what, limit, interrupt, || self.try_wait())?;
        if status.success() {
            self.stdout()
        } else {
            Err(self.ended(status))
        }
    }

    /// Leaves it running after this program; its pid file is then what ends it.
    pub fn detach(mut self) {
        self.child = None;
        self.identity = None;
    }

    fn try_wait(&mut self) -> Result<Option<ExitStatus>, Error> {
        match &mut self.child {
            None => Ok(None),
            Some(child) => child.try_wait().map_err(Error::io("wait for", &self.what)),
        }
    }

    fn ended(&self, status: ExitStatus) -> Error {
        Error::Ended {
            what: self.what.clone(),
            status: status.to_string(),
            log: self.log.clone(),
            log_tail: tail(&self.log, 15),
        }
    }

    /// Ends and reaps it; the pid file goes too.
    ///
    /// # Errors
    /// [`Error::Io`] if it may not be signalled or reaped.
    pub fn stop(&mut self) -> Result<(), Error> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        // Until it is reaped its number is its own, so no identity needs to be checked here.
        if let Ok(pid) = i32::try_from(child.id())
            && child.try_wait().is_ok_and(|ended| ended.is_none())
        {
            signal(pid, Signal::SIGTERM).map_err(Error::io("signal", &self.what))?;
            let ended = wait::until("its end", GRACE, &Interrupt::default(), || {
                child.try_wait().map_err(Error::io("wait for", &self.what))
            });
            if ended.is_err() {
                child.kill().map_err(Error::io("kill", &self.what))?;
            }
        }
        child.wait().map_err(Error::io("reap", &self.what))?;
        self.identity = None;
        remove_file(&self.pid_file)
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, process = self.what, "could not end a process of the lab");
        }
    }
}

/// Removes a file; one that is not there counts as removed.
fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path.display().to_string())(source))
        }
        _ => Ok(()),
    }
}

/// The last `count` lines of a file, for an error message.
fn tail(path: &Path, count: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_itself_and_no_longer_after_its_end() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let identity = Identity::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(identity.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!identity.is_alive());
    }

    #[test]
    fn a_reused_process_number_is_not_signalled() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let real = Identity::of(i32::try_from(child.id()).unwrap()).unwrap();
        let earlier = Identity {
            start_time: real.start_time - 1,
            ..real.clone()
        };
        let other = Identity {
            exe: PathBuf::from("/bin/other"),
            pid: real.pid,
            start_time: real.start_time,
        };
        earlier.stop().unwrap();
        other.stop().unwrap();
        assert!(real.is_alive());
        // The zombie counts as ended, so stopping needs no reaping by this thread first.
        real.stop().unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
