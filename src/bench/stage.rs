//! Owns where the two ends of the traffic run: in a lab, or here and on another machine. The traffic itself does not
//! know which.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Error;
use super::meter::{self, Machine};
use super::remote::client::There;
use super::service::Order;
use super::system::Path as Route;
use crate::lab::process::Tracked;
use crate::lab::{Interrupt, Lab, NetNs, wait};

/// Where traffic runs.
pub trait Stage {
    /// Starts a program at the sending end; it ends when dropped.
    ///
    /// # Errors
    /// [`Error::Lab`] if it does not start.
    fn spawn(&self, route: &Route, label: &str, command: &mut Command) -> Result<Tracked, Error>;

    /// Starts a program at the receiving end, and waits until it listens. `program` is this program.
    ///
    /// # Errors
    /// [`Error::Lab`] or [`Error::Remote`] if it does not start.
    fn serve(&self, route: &Route, program: &Path, order: Order) -> Result<Served, Error>;

    /// The sending end's namespace.
    fn near(&self, route: &Route) -> NetNs;

    /// The processors of all ends.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Remote`].
    fn machine(&self) -> Result<Machine, Error>;

    /// The process numbers of the daemons that carry the packets.
    fn daemon_pids(&self) -> Vec<i32>;

    /// The sockets on which they answer `loden status`, if they are loden's.
    fn status_sockets(&self) -> Vec<PathBuf>;

    /// The token that ends waits.
    fn interrupt(&self) -> &Interrupt;
}

/// A program at the receiving end; it ends when dropped.
#[derive(Debug)]
pub enum Served {
    /// In a lab.
    Here(Tracked),
    /// On the other machine.
    There(There),
}

impl Served {
    /// Waits for its own end and returns what it printed.
    ///
    /// # Errors
    /// [`Error::Lab`] or [`Error::Remote`] if it failed or does not end.
    pub fn finish(self, limit: Duration, interrupt: &Interrupt) -> Result<String, Error> {
        match self {
            Self::Here(process) => Ok(process.finish(limit, interrupt)?),
            Self::There(there) => there.finish(limit),
        }
    }
}

impl Stage for Lab {
    fn spawn(&self, route: &Route, label: &str, command: &mut Command) -> Result<Tracked, Error> {
        Ok(Self::spawn(self, route.from, label, command)?)
    }

    fn serve(&self, route: &Route, program: &Path, order: Order) -> Result<Served, Error> {
        let netns = self.netns(route.to);
        start(&netns, self.dir(), program, order, Self::interrupt(self)).map(Served::Here)
    }

    fn near(&self, route: &Route) -> NetNs {
        self.netns(route.from)
    }

    fn machine(&self) -> Result<Machine, Error> {
        Machine::read()
    }

    fn daemon_pids(&self) -> Vec<i32> {
        Self::daemon_pids(self)
    }

    fn status_sockets(&self) -> Vec<PathBuf> {
        let nodes = self.spec().node_members().filter_map(|one| one.node());
        nodes.map(|node| self.status_socket(node)).collect()
    }

    fn interrupt(&self) -> &Interrupt {
        Self::interrupt(self)
    }
}

/// Starts `order` in `netns`, with its files in `dir`, and waits until it listens.
///
/// # Errors
/// [`Error::Lab`] if it does not.
pub(super) fn start(
    netns: &NetNs,
    dir: &Path,
    program: &Path,
    order: Order,
    interrupt: &Interrupt,
) -> Result<Tracked, Error> {
    let mut command = order.command(program);
    let mut process = Tracked::spawn(netns, dir, &order.label(), &mut command)?;
    let port = order.socket().port();
    wait::until_bound(netns, order.protocol(), port, interrupt, || {
        process.check_running()
    })?;
    Ok(process)
}

/// How often the sending end's kernel has found its TCP segments reordered.
///
/// # Errors
/// [`Error::Io`] if its counters cannot be read.
pub(super) fn reorderings(stage: &dyn Stage, route: &Route) -> Result<u64, Error> {
    let text = stage
        .near(route)
        .run(|| fs::read_to_string("/proc/thread-self/net/netstat"))?
        .map_err(Error::io("read the TCP counters of the sender"))?;
    Ok(meter::reorderings_in(&text))
}
