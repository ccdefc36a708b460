//! Owns the description of a lab: its name, size, wire and backend, and how its members are named.
//! Pure: never looks at the system.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Error;
use super::plan::UNDERLAY_MTU;

/// The prefix of every namespace a lab makes.
pub const NAMESPACE_PREFIX: &str = "loden-";

/// The least that IPv6 asks of a link (RFC 8200, section 5).
const MIN_UNDERLAY_MTU: u16 = 1280;
/// What a veth pair can have.
const MAX_UNDERLAY_MTU: u16 = 65535;

/// The name that keeps labs apart: 1 to 32 of `a-z 0-9 -`, neither first nor last a dash.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The namespace of a member: `loden-<name>-<member>`.
    #[must_use]
    pub fn namespace(&self, member: Member) -> String {
        format!("{NAMESPACE_PREFIX}{}-{member}", self.0)
    }

    /// Takes a namespace's name apart; `None` if no lab would have made it.
    ///
    /// A member's name holds no dash, so the last dash always divides the two.
    #[must_use]
    pub fn of_namespace(namespace: &str) -> Option<(Self, Member)> {
        let (name, member) = namespace.strip_prefix(NAMESPACE_PREFIX)?.rsplit_once('-')?;
        Some((name.parse().ok()?, member.parse().ok()?))
    }
}

impl FromStr for LabName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let plain = text
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        let edges = text.starts_with('-') || text.ends_with('-');
        if text.is_empty() || text.len() > 32 || !plain || edges {
            return Err(Error::Invalid {
                what: "the lab's name",
                given: text.to_owned(),
                rule: "1 to 32 lower-case letters, digits and inner dashes",
            });
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for LabName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One namespace of a lab. Numbers count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Member {
    /// The bridge between the nodes of a lab of three or more: `u`.
    Underlay,
    /// A node: `n1`.
    Node(u8),
    /// A pod of a node: `n1p2`.
    Pod(u8, u8),
}

impl Member {
    /// The node that this member is, or is on.
    #[must_use]
    pub const fn node(self) -> Option<u8> {
        match self {
            Self::Underlay => None,
            Self::Node(node) | Self::Pod(node, _) => Some(node),
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Underlay => f.write_str("u"),
            Self::Node(node) => write!(f, "n{node}"),
            Self::Pod(node, pod) => write!(f, "n{node}p{pod}"),
        }
    }
}

impl FromStr for Member {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parse = || -> Option<Self> {
            if text == "u" {
                return Some(Self::Underlay);
            }
            let digits = text.strip_prefix('n')?;
            match digits.split_once('p') {
                Some((node, pod)) => Some(Self::Pod(ordinal(node)?, ordinal(pod)?)),
                None => Some(Self::Node(ordinal(digits)?)),
            }
        };
        parse().ok_or_else(|| Error::Invalid {
            what: "the member",
            given: text.to_owned(),
            rule: "a node (n1), a pod (n1p1) or the underlay (u)",
        })
    }
}

/// A number written the one way [`Member`] prints it, so that names and members map one to one.
fn ordinal(text: &str) -> Option<u8> {
    let number: u8 = text.parse().ok()?;
    (number > 0 && number.to_string() == text).then_some(number)
}

impl TryFrom<String> for Member {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Member> for String {
    fn from(member: Member) -> Self {
        member.to_string()
    }
}

/// How the veth pairs between the nodes behave.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Wire {
    /// A plain veth pair: GSO superpackets cross it whole, so the copies dominate.
    Superpacket,
    /// Segmentation off and GRO on at both ends, as a physical NIC behaves: the per-packet cost dominates.
    Packet,
    /// As `packet`, but with GRO off: only the program's own batching helps.
    PacketNoGro,
}

/// What carries packets between the pods of different nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Nothing: pods reach only their own node.
    None,
    /// Plain routes over the underlay: the upper bound, as `host-gw` does it.
    Plain,
    /// The kernel's VXLAN without a daemon, configured by hand exactly as flannel does.
    ByHand,
    /// One `loden daemon` per node, on one shared store, with raw IP in UDP.
    Udp,
    /// Likewise, with the kernel's VXLAN.
    Vxlan,
    /// Likewise, with VXLAN carried by the daemon itself.
    UserVxlan,
    /// Likewise, with routes.
    HostGw,
    /// Likewise, with the kernel's IP in IP.
    Ipip,
    /// One `wireguard-go` per node; two nodes at most.
    WireguardGo,
}

impl Backend {
    /// The backend's type in the network configuration, where daemons make it.
    #[must_use]
    pub const fn daemons(self) -> Option<&'static str> {
        match self {
            Self::None | Self::Plain | Self::ByHand | Self::WireguardGo => None,
            Self::Udp => Some("udp"),
            Self::Vxlan | Self::UserVxlan => Some("vxlan"),
            Self::HostGw => Some("host-gw"),
            Self::Ipip => Some("ipip"),
        }
    }
}

/// Where the daemons keep their leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Store {
    /// In a directory that all of them share.
    #[default]
    Local,
    /// In an etcd on the underlay, as flannel keeps them.
    Etcd,
}

/// The data-plane engine that daemons with the `udp` backend are told to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// Bursts, superpackets, `sendmmsg` and `UDP_SEGMENT`.
    Mmsg,
    /// One packet per system call, no offloads: the oracle.
    Portable,
}

/// Whose arguments a daemon understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// `loden daemon`.
    #[default]
    Loden,
    /// `flanneld`: no subcommand, and only what flannel has, so an etcd is needed.
    Flanneld,
}

/// The text that `value` has on the command line.
#[must_use]
pub fn cli_name(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |v| v.get_name().to_owned())
}

/// Everything that decides what a lab looks like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Keeps this lab apart from others.
    pub name: LabName,
    /// How many nodes, 1 to [`Spec::MAX_NODES`].
    pub nodes: u8,
    /// How many pods on each node, up to [`Spec::MAX_PODS`].
    pub pods: u8,
    /// How the underlay behaves.
    pub wire: Wire,
    /// The underlay's MTU in bytes.
    pub underlay_mtu: u16,
    /// What joins the pods.
    pub backend: Backend,
    /// Where the daemons keep their leases.
    #[serde(default)]
    pub store: Store,
    /// The daemons' engine; `None` leaves the choice to the daemon.
    pub engine: Option<Engine>,
    /// The daemons' worker threads; `None` leaves the choice to the daemon.
    pub workers: Option<u8>,
    /// The program to start as the daemon, for the backends that have one.
    pub daemon: Option<PathBuf>,
    /// Whose arguments it understands.
    #[serde(default)]
    pub dialect: Dialect,
    /// Whether the daemons set the forward rules that they set by default. Backends without a daemon have none,
    /// so what is compared with them has none either.
    #[serde(default)]
    pub traffic_rules: bool,
}

impl Spec {
    /// Node N has the address 192.0.2.N, and 192.0.2.255 is the broadcast address.
    pub const MAX_NODES: u8 = 250;
    /// A /24 holds the gateway at .1 and pods from .2 on.
    pub const MAX_PODS: u8 = 250;

    /// A lab of `nodes` nodes with one pod each, on the superpacket wire, without a backend.
    #[must_use]
    pub const fn new(name: LabName, nodes: u8) -> Self {
        Self {
            name,
            nodes,
            pods: 1,
            wire: Wire::Superpacket,
            underlay_mtu: UNDERLAY_MTU,
            backend: Backend::None,
            store: Store::Local,
            engine: None,
            workers: None,
            daemon: None,
            dialect: Dialect::Loden,
            traffic_rules: false,
        }
    }

    /// Checks the numbers, and that a lab of daemons knows their program.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the field.
    pub fn validate(&self) -> Result<(), Error> {
        let invalid = |what, given: String, rule| Err(Error::Invalid { what, given, rule });
        if self.nodes == 0 || self.nodes > Self::MAX_NODES {
            return invalid("the number of nodes", self.nodes.to_string(), "1 to 250");
        }
        if self.pods > Self::MAX_PODS {
            return invalid(
                "the number of pods per node",
                self.pods.to_string(),
                "0 to 250",
            );
        }
        let daemons = self.backend.daemons().is_some();
        let wireguard = self.backend == Backend::WireguardGo;
        if (daemons || wireguard) && self.daemon.is_none() {
            return invalid(
                "the daemon's program",
                String::new(),
                "given when the backend is one of daemons",
            );
        }
        if wireguard && self.nodes > 2 {
            return invalid(
                "the number of nodes",
                self.nodes.to_string(),
                "1 or 2 with wireguard-go",
            );
        }
        let etcd = self.store == Store::Etcd;
        if etcd && !daemons {
            return invalid(
                "the store",
                "etcd".to_owned(),
                "local, unless the backend is one of daemons",
            );
        }
        if self.dialect == Dialect::Flanneld && !etcd {
            return invalid(
                "the store",
                "local".to_owned(),
                "etcd: flanneld knows no other",
            );
        }
        if !(MIN_UNDERLAY_MTU..=MAX_UNDERLAY_MTU).contains(&self.underlay_mtu) {
            return invalid(
                "the underlay's MTU",
                self.underlay_mtu.to_string(),
                "1280 to 65535",
            );
        }
        Ok(())
    }

    /// The underlay bridge's namespace exists only where one veth pair cannot join all nodes.
    #[must_use]
    pub const fn has_underlay_bridge(&self) -> bool {
        self.nodes > 2
    }

    /// Every node, in order.
    pub fn node_members(&self) -> impl Iterator<Item = Member> {
        (1..=self.nodes).map(Member::Node)
    }

    /// Every pod, node by node.
    pub fn pod_members(&self) -> impl Iterator<Item = Member> {
        let pods = self.pods;
        (1..=self.nodes).flat_map(move |node| (1..=pods).map(move |pod| Member::Pod(node, pod)))
    }

    /// Every namespace of the lab.
    pub fn members(&self) -> impl Iterator<Item = Member> {
        let bridge = self.has_underlay_bridge().then_some(Member::Underlay);
        bridge
            .into_iter()
            .chain(self.node_members())
            .chain(self.pod_members())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_name_gives_back_the_lab_and_the_member() {
        let name: LabName = "a-n1".parse().unwrap();
        for member in [Member::Underlay, Member::Node(2), Member::Pod(250, 13)] {
            let namespace = name.namespace(member);
            assert_eq!(
                LabName::of_namespace(&namespace),
                Some((name.clone(), member))
            );
        }
    }

    #[test]
    fn foreign_namespaces_belong_to_no_lab() {
        for foreign in [
            "cni-1234",
            "loden-",
            "loden-x",
            "loden-x-",
            "loden-x-n0",
            "loden-x-n01",
            "loden-x-n1p",
        ] {
            assert_eq!(LabName::of_namespace(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn names_that_could_leave_their_directory_or_collide_are_refused() {
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a b", &"x".repeat(33)] {
            assert!(bad.parse::<LabName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_lab_of_three_has_the_bridge_its_nodes_and_its_pods() {
        let mut spec = Spec::new("x".parse().unwrap(), 3);
        spec.pods = 2;
        let names: Vec<String> = spec.members().map(String::from).collect();
        assert_eq!(
            names,
            [
                "u", "n1", "n2", "n3", "n1p1", "n1p2", "n2p1", "n2p2", "n3p1", "n3p2"
            ]
        );
    }
}
