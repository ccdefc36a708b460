//! Owns the choice of the external interface, and the explanation of every candidate. Pure: works on a
//! [`Snapshot`] of the kernel's state that somebody else reads. Flannel specification section 3.

mod choose;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use regex::bytes::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use crate::addr::Mtu;

pub use choose::choose;

/// What the kernel knows about links, addresses and default routes, each in the kernel's order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// All links, by index.
    pub links: Vec<Link>,
    /// Unicast default routes of the main table, the preferred one of a family first; a multipath route is one
    /// entry per next hop.
    pub default_routes: Vec<DefaultRoute>,
    /// Where the addresses are reached that an operator asked about.
    pub reach: Vec<Reach>,
}

/// The kernel's answer to `ip route get`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// The destination.
    pub to: IpAddr,
    /// The link its packets leave by.
    pub link: u32,
    /// The address they leave from, if the kernel says.
    pub from: Option<IpAddr>,
    /// The next router; none for a destination on the link.
    pub via: Option<IpAddr>,
    /// The destination is an address of this node.
    pub is_local: bool,
    /// The longest packet that the route or what was learned of the path allows, where that is less than the link's.
    pub mtu: Option<u32>,
}

/// A network interface and its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses of both families.
    pub addrs: Vec<Address>,
}

/// An address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The address itself.
    pub ip: IpAddr,
    /// `IFA_F_PERMANENT`: not leased by DHCP or a router.
    pub permanent: bool,
    /// `IFA_F_TEMPORARY`: an IPv6 privacy address, gone tomorrow.
    pub temporary: bool,
    /// `IFA_F_DEPRECATED`: no longer for new connections.
    pub deprecated: bool,
    /// `IFA_F_TENTATIVE` or `IFA_F_DADFAILED`: cannot be bound, because another node may have it.
    pub unverified: bool,
}

/// A default route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultRoute {
    /// The family.
    pub family: Family,
    /// The link it leaves by; `None` if it names none.
    pub link: Option<u32>,
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Which address of the interface the tunnel needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stack {
    /// An IPv4 address; others are not looked at.
    V4,
    /// An IPv6 address; others are not looked at.
    V6,
    /// One of either family, IPv4 first: a tunnel of raw IP in UDP carries both families over either. The
    /// original, which has no such tunnel for IPv6, wants both.
    Either,
}

impl Stack {
    /// The families to look at, the preferred one first.
    #[must_use]
    pub const fn families(self) -> &'static [Family] {
        match self {
            Self::V4 => &[Family::V4],
            Self::V6 => &[Family::V6],
            Self::Either => &[Family::V4, Family::V6],
        }
    }
}

/// One thing an operator asked for.
#[derive(Debug, Clone)]
pub enum Selector {
    /// The interface that has this address.
    Address(IpAddr),
    /// The interface of this name.
    Name(String),
    /// The first interface with an address that matches, or else the first whose name does.
    Pattern(Pattern),
    /// The interface that packets to this address leave by.
    Reach(IpAddr),
    /// The interface of the default route, where nothing was asked for.
    DefaultRoute,
}

impl Selector {
    /// Reads the value of `--iface`: what does not parse as an address is a name.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        text.parse()
            .map_or_else(|_| Self::Name(text.to_owned()), Self::Address)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(ip) => write!(f, "address {ip}"),
            Self::Name(name) => write!(f, "name {name}"),
            Self::Pattern(pattern) => write!(f, "regular expression {pattern}"),
            Self::Reach(ip) => write!(f, "the way to {ip}"),
            Self::DefaultRoute => f.write_str("default route"),
        }
    }
}

/// A regular expression with Go's idea of `\d`, `\w` and `\s`: ASCII.
#[derive(Debug, Clone)]
pub struct Pattern(Regex);

impl Pattern {
    /// Compiles `text`, to match anywhere in a name or address.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn new(text: &str) -> Result<Self, regex::Error> {
        RegexBuilder::new(text).unicode(false).build().map(Self)
    }

    fn matches(&self, text: &str) -> bool {
        self.0.is_match(text.as_bytes())
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// All that an operator asked for.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Tried in this order; the first that fits decides.
    pub selectors: Vec<Selector>,
    /// `--public-ip`. Without selectors it is one.
    pub public_ip: Option<Ipv4Addr>,
    /// `--public-ipv6`. Without selectors and `--public-ip` it is one.
    pub public_ipv6: Option<Ipv6Addr>,
}

impl Wanted {
    /// `--public-ip` or `--public-ipv6`.
    #[must_use]
    pub fn public(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.public_ip.map(IpAddr::V4),
            Family::V6 => self.public_ipv6.map(IpAddr::V6),
        }
    }

    /// With the public IPs that an operator has set for this node in the store, which overrule those of the command
    /// line; specification section 3.1.
    #[must_use]
    pub fn with_public_ips(self, (v4, v6): (Option<Ipv4Addr>, Option<Ipv6Addr>)) -> Self {
        Self {
            public_ip: v4.or(self.public_ip),
            public_ipv6: v6.or(self.public_ipv6),
            ..self
        }
    }

    /// Whether an interface is asked for by an address of this family.
    #[must_use]
    pub fn names_address_of(&self, family: Family) -> bool {
        let mut selectors = self.selectors.iter();
        selectors
            .any(|selector| matches!(selector, Selector::Address(ip) if Family::of(*ip) == family))
    }
}

/// The external interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU.
    pub mtu: Mtu,
    /// Our address on it, the one the tunnel uses.
    pub addr: IpAddr,
    /// The address that other nodes use, of the same family; differs from `addr` only if the operator said so.
    pub public: IpAddr,
    /// Why this one, in one sentence.
    pub reason: String,
}

/// What became of the search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The interface, or why there is none.
    pub choice: Result<Choice, NoInterface>,
    /// Selectors that were tried before and found nothing, and why.
    pub failed: Vec<String>,
    /// Every link with the reason why it is or is not the one.
    pub candidates: Vec<Candidate>,
}

/// A link in the explanation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Its usable addresses, best first.
    pub addrs: Vec<IpAddr>,
    /// Whether it is the external interface.
    pub chosen: bool,
    /// Why, or why not.
    pub why: String,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.chosen { "chosen" } else { "not chosen" };
        write!(f, "interface {} {verdict}: {}", self.name, self.why)
    }
}

/// Nothing fits. Names what was asked for, what there is, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no external interface: {}; interfaces are {found}: give one with --iface", tried.join("; "))]
pub struct NoInterface {
    /// One sentence per selector.
    pub tried: Vec<String>,
    /// `lo [127.0.0.1], eth0 [192.0.2.1]`.
    pub found: String,
}

#[cfg(test)]
mod tests;
