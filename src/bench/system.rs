//! Owns the list of systems that are compared, and which lab each one needs. Pure.

use std::fmt;
use std::path::Path;

use clap::ValueEnum;
use serde::Serialize;

use crate::lab::spec::cli_name;
use crate::lab::{Backend, Engine, Error, Spec, Wire};

/// What carries packets from pod to pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    /// Plain routing: what the machine can do without any overlay.
    Plain,
    /// The kernel's VXLAN, configured as flannel does.
    Vxlan,
    /// `loden daemon` with its fast engine.
    Loden,
    /// `loden daemon` with the portable engine: one packet per system call, as the original daemon works.
    Portable,
}

impl System {
    /// Whether packets pass through a process, whose processor time can be told.
    #[must_use]
    pub const fn has_daemon(self) -> bool {
        matches!(self, Self::Loden | Self::Portable)
    }

    /// Two nodes with one pod each on `wire`, joined by this system. `run` keeps the labs of two
    /// benchmarks apart.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `run` makes no valid name.
    pub fn spec(self, run: u32, wire: Wire, daemon: &Path) -> Result<Spec, Error> {
        let name = format!("bench-{run}-{self}").parse()?;
        let (backend, engine) = match self {
            Self::Plain => (Backend::Plain, None),
            Self::Vxlan => (Backend::ByHand, None),
            Self::Loden => (Backend::Udp, Some(Engine::Mmsg)),
            Self::Portable => (Backend::Udp, Some(Engine::Portable)),
        };
        let daemon = self.has_daemon().then(|| daemon.to_owned());
        Ok(Spec {
            wire,
            backend,
            engine,
            daemon,
            ..Spec::new(name, 2)
        })
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&cli_name(self))
    }
}
