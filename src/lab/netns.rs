//! Owns entering a network namespace from safe code: on a thread of its own, which ends afterwards, so no
//! other thread of the program ever changes namespace. Never creates or removes a namespace.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;

use nix::sched::{CloneFlags, setns};

use super::Error;

/// Where `ip netns` pins namespaces (ip-netns(8)).
pub const NETNS_DIR: &str = "/run/netns";

/// What the namespace that this program runs in is called here; no namespace of `ip netns` has a slash in its name.
const HERE: &str = "./this";

/// A named network namespace, or this program's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// A handle for the namespace called `name`, whether or not it exists yet.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// The one that this program runs in. Using it needs no privilege.
    #[must_use]
    pub fn here() -> Self {
        Self::named(HERE)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that pins it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// Runs `work` on a fresh thread inside the namespace and returns what it returned.
    ///
    /// Sockets made by `work` belong to the namespace wherever they are used later. Inside, read network
    /// state under `/proc/thread-self/net`: `/proc/net` shows the main thread's namespace.
    ///
    /// # Errors
    /// [`Error::Io`] if the namespace cannot be opened or entered.
    ///
    /// # Panics
    /// Passes on a panic of `work`.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
        if self.name == HERE {
            return Ok(work());
        }
        let file = self.open()?;
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
        .map_err(|errno: nix::Error| Error::io("enter namespace", &self.name)(errno.into()))
    }

    /// Starts `command` inside the namespace: a child inherits the namespace of the thread that forks it.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such program, [`Error::Io`] otherwise.
    pub fn spawn(&self, command: &mut Command) -> Result<Child, Error> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.run(|| command.spawn())?
            .map_err(|source| Error::start(program, source))
    }

    /// Moves the calling thread into the namespace for good: for a program that is about to become another.
    ///
    /// # Errors
    /// [`Error::Io`] if the namespace cannot be opened or entered.
    pub fn enter_for_good(&self) -> Result<(), Error> {
        let file = self.open()?;
        setns(&file, CloneFlags::CLONE_NEWNET)
            .map_err(|errno| Error::io("enter namespace", &self.name)(errno.into()))
    }

    /// Sets kernel parameters of this namespace: paths below `/proc/sys/net`, each with its value.
    ///
    /// # Errors
    /// [`Error::Io`] names the parameter that was refused.
    pub fn set_sysctls(&self, settings: &[(&str, &str)]) -> Result<(), Error> {
        self.run(|| {
            for (key, value) in settings {
                let path = format!("/proc/sys/net/{key}");
                fs::write(&path, value).map_err(Error::io("set", path))?;
            }
            Ok(())
        })?
    }

    fn open(&self) -> Result<File, Error> {
        File::open(self.path()).map_err(Error::io("open namespace", &self.name))
    }
}
