//! Owns the list of systems that are compared, and which lab each one needs. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::scenario::{Ends, Scenario};
use crate::lab::plan::{JUMBO_MTU, UNDERLAY_MTU};
use crate::lab::{Backend, Dialect, Engine, Error, Lab, Member, Spec, Store, Wire, plan};

/// What carries packets from end to end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum System {
    /// The wire itself, from node to node by their underlay addresses: no bridge, no forwarding, no overlay.
    Veth,
    /// Plain routing, as `host-gw` does it: what the machine can do from pod to pod without an overlay.
    Plain,
    /// The kernel's VXLAN, configured as flannel does.
    Vxlan,
    /// `loden daemon` with its `host-gw` backend: the kernel's routes.
    LodenHostGw,
    /// `loden daemon` with its `vxlan` backend and the kernel's device.
    LodenVxlan,
    /// `loden daemon` with its fast engine and so many workers; `None` is the daemon's own choice.
    Loden(Option<u8>),
    /// `loden daemon` with VXLAN in its own data plane.
    LodenUserVxlan,
    /// `loden daemon` with the portable engine: one packet per system call, as the original daemon works.
    Portable,
    /// `wireguard-go`: encrypted, and what people would otherwise run in user space.
    WireguardGo,
    /// Another program that takes flanneld's arguments, by the name that it was given; between two machines, what
    /// leads to an address of the other, by its name.
    Other(String),
}

/// What `loden status` of a system's daemons should say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The engine, whose counters then explain the figures; `None` where the kernel carries the packets.
    pub engine: Option<Engine>,
    /// How packets reach the other node.
    pub transport: &'static str,
}

/// Which files are run.
#[derive(Clone, Debug)]
pub struct Programs {
    /// What is measured as loden.
    pub loden: PathBuf,
    /// The file of [`System::WireguardGo`] and of every [`System::Other`].
    pub others: BTreeMap<System, PathBuf>,
    /// Where all daemons keep their leases: all in the same kind of store.
    pub store: Store,
}

impl System {
    /// The fast engine as it is by default.
    pub const LODEN: Self = Self::Loden(None);

    /// Whether packets pass through a process, whose processor time can be told.
    #[must_use]
    pub const fn has_daemon(&self) -> bool {
        match self {
            Self::Loden(_)
            | Self::LodenUserVxlan
            | Self::Portable
            | Self::WireguardGo
            | Self::Other(_) => true,
            Self::Veth | Self::Plain | Self::Vxlan | Self::LodenHostGw | Self::LodenVxlan => false,
        }
    }

    /// What its daemons should say of themselves; `None` where they say nothing that we understand.
    #[must_use]
    pub const fn expected(&self) -> Option<Expected> {
        let (engine, transport) = match self {
            Self::Loden(_) => (Some(Engine::Mmsg), "udp"),
            Self::Portable => (Some(Engine::Portable), "udp"),
            Self::LodenUserVxlan => (Some(Engine::Mmsg), "vxlan in user space"),
            Self::LodenVxlan => (None, "vxlan"),
            Self::LodenHostGw => (None, "route"),
            Self::Veth | Self::Plain | Self::Vxlan | Self::WireguardGo | Self::Other(_) => {
                return None;
            }
        };
        Some(Expected { engine, transport })
    }

    /// Whether it needs a file that somebody must name.
    #[must_use]
    pub const fn needs_program(&self) -> bool {
        matches!(self, Self::WireguardGo | Self::Other(_))
    }

    /// Whether the scenario says something about this system: the bare wire has no pods, and what is between the
    /// nodes by their underlay addresses is host to host already.
    #[must_use]
    pub const fn takes(&self, scenario: Scenario) -> bool {
        !matches!((self, scenario.ends), (Self::Veth, Ends::Hosts))
    }

    /// Two nodes with one pod each, joined by this system. `run` keeps the labs of two benchmarks apart.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `run` makes no valid name.
    pub fn spec(
        &self,
        run: u32,
        wire: Wire,
        jumbo: bool,
        programs: &Programs,
    ) -> Result<Spec, Error> {
        let name = format!("bench-{run}-{self}").parse()?;
        let mut spec = Spec {
            wire,
            underlay_mtu: if jumbo { JUMBO_MTU } else { UNDERLAY_MTU },
            engine: self.expected().and_then(|expected| expected.engine),
            backend: self.backend(),
            ..Spec::new(name, 2)
        };
        match self {
            Self::Veth | Self::Plain | Self::Vxlan => {}
            Self::WireguardGo => spec.daemon = programs.others.get(self).cloned(),
            Self::Other(_) => {
                spec.store = programs.store;
                spec.daemon = programs.others.get(self).cloned();
                spec.dialect = Dialect::Flanneld;
            }
            Self::LodenHostGw
            | Self::LodenVxlan
            | Self::Loden(_)
            | Self::LodenUserVxlan
            | Self::Portable => {
                spec.store = programs.store;
                spec.daemon = Some(programs.loden.clone());
            }
        }
        if let Self::Loden(workers) = self {
            spec.workers = *workers;
        }
        Ok(spec)
    }

    const fn backend(&self) -> Backend {
        match self {
            Self::Veth | Self::Plain => Backend::Plain,
            Self::Vxlan => Backend::ByHand,
            Self::LodenHostGw => Backend::HostGw,
            Self::LodenVxlan => Backend::Vxlan,
            Self::LodenUserVxlan => Backend::UserVxlan,
            Self::Loden(_) | Self::Portable | Self::Other(_) => Backend::Udp,
            Self::WireguardGo => Backend::WireguardGo,
        }
    }

    /// Who sends to whom in `lab`.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the lab lacks one of them.
    pub fn path(&self, lab: &Lab, ends: Ends) -> Result<Path, Error> {
        Ok(match (self, ends) {
            (Self::Veth, _) => Path {
                from: Member::Node(1),
                to: Member::Node(2),
                addr: plan::underlay_v4(2).into(),
            },
            (_, Ends::Pods) => Path::of_pods(lab, 1, 2)?,
            (_, Ends::Hosts) => Path {
                from: Member::Node(1),
                to: Member::Node(2),
                addr: lab.node_addr(2)?.into(),
            },
        })
    }
}

/// Where traffic starts and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Who sends.
    pub from: Member,
    /// Who receives.
    pub to: Member,
    /// The receiver's address.
    pub addr: IpAddr,
}

impl Path {
    /// From the first pod of node `from` to that of node `to`.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the lab lacks the latter.
    pub fn of_pods(lab: &Lab, from: u8, to: u8) -> Result<Self, Error> {
        Ok(Self {
            from: Member::Pod(from, 1),
            to: Member::Pod(to, 1),
            addr: lab.pod_addr(to, 1)?.into(),
        })
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Veth => f.pad("veth"),
            Self::Plain => f.pad("plain"),
            Self::Vxlan => f.pad("vxlan"),
            Self::LodenHostGw => f.pad("loden-host-gw"),
            Self::LodenVxlan => f.pad("loden-vxlan"),
            Self::LodenUserVxlan => f.pad("loden-user-vxlan"),
            Self::Loden(None) => f.pad("loden"),
            Self::Loden(Some(workers)) => f.pad(&format!("loden-{workers}w")),
            Self::Portable => f.pad("portable"),
            Self::WireguardGo => f.pad("wireguard-go"),
            Self::Other(name) => f.pad(name),
        }
    }
}

impl FromStr for System {
    type Err = String;

    /// Any name that is not one of ours is another program's.
    fn from_str(text: &str) -> Result<Self, String> {
        let workers = || {
            let digits = text.strip_prefix("loden-")?.strip_suffix('w')?;
            let workers: u8 = digits.parse().ok()?;
            (workers > 0 && workers.to_string() == digits).then_some(workers)
        };
        Ok(match text {
            "veth" => Self::Veth,
            "plain" => Self::Plain,
            "vxlan" => Self::Vxlan,
            "loden-host-gw" => Self::LodenHostGw,
            "loden-vxlan" => Self::LodenVxlan,
            "loden-user-vxlan" => Self::LodenUserVxlan,
            "loden" => Self::LODEN,
            "portable" => Self::Portable,
            "wireguard-go" => Self::WireguardGo,
            _ => match workers() {
                Some(workers) => Self::Loden(Some(workers)),
                None => Self::Other(other_name(text)?),
            },
        })
    }
}

/// Part of a lab's name, which divides its own parts by dashes and is at most 32 characters long.
fn other_name(text: &str) -> Result<String, String> {
    let plain = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
    let edges = text.starts_with('-') || text.ends_with('-');
    if text.is_empty() || text.len() > 14 || edges || !text.bytes().all(plain) {
        return Err(format!(
            "a system is called {text:?}, but must be 1 to 14 lower-case letters, digits and inner dashes"
        ));
    }
    Ok(text.to_owned())
}

impl TryFrom<String> for System {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<System> for String {
    fn from(system: System) -> Self {
        system.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_gives_back_its_system() {
        for name in [
            "veth",
            "plain",
            "vxlan",
            "loden",
            "loden-2w",
            "loden-host-gw",
            "loden-vxlan",
            "loden-user-vxlan",
            "portable",
            "wireguard-go",
            "flannel",
        ] {
            assert_eq!(name.parse::<System>().unwrap().to_string(), name);
        }
        assert_eq!("loden-2w".parse(), Ok(System::Loden(Some(2))));
        assert_eq!("loden-0w".parse(), Ok(System::Other("loden-0w".to_owned())));
    }

    #[test]
    fn a_name_that_could_not_name_a_lab_is_refused() {
        for name in [
            "",
            "A",
            "a/b",
            "-a",
            "a-",
            "v1.2",
            "a-name-that-is-too-long",
        ] {
            assert!(name.parse::<System>().is_err(), "{name}");
        }
    }

    #[test]
    fn every_daemon_of_a_run_keeps_its_leases_in_the_same_kind_of_store() {
        let other = System::Other("flannel".to_owned());
        let programs = Programs {
            loden: "/bin/loden".into(),
            others: BTreeMap::from([(other.clone(), "/bin/flanneld".into())]),
            store: Store::Etcd,
        };
        for (system, backend) in [
            (System::LODEN, Backend::Udp),
            (System::Portable, Backend::Udp),
            (other, Backend::Udp),
            (System::LodenVxlan, Backend::Vxlan),
            (System::LodenUserVxlan, Backend::UserVxlan),
            (System::LodenHostGw, Backend::HostGw),
        ] {
            // The largest process number that Linux gives.
            let spec = system.spec(4_194_304, Wire::Packet, false, &programs);
            let spec = spec.unwrap();
            spec.validate().unwrap();
            assert_eq!((spec.backend, spec.store), (backend, Store::Etcd));
        }
    }
}
