//! Owns the statement of which traffic rules a node wants. Pure: knows no program and no kernel.

use std::fmt;

use ipnet::IpNet;

use super::Error;
use crate::addr::OverlayPrefix;

/// An address family of the overlay or the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order in which they are worked on.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Multicast destinations, which are never masqueraded.
    pub(super) const fn multicast(self) -> &'static str {
        match self {
            Self::V4 => "224.0.0.0/4",
            Self::V6 => "ff00::/8",
        }
    }

    const fn index(self) -> usize {
        match self {
            Self::V4 => 0,
            Self::V6 => 1,
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

/// How to masquerade what leaves the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masquerade<N> {
    /// Ask for random source ports where the program and the kernel can (`--random-fully`).
    pub fully_random: bool,
    /// Destinations outside the network that still see the pod's own address. Empty in flannel.
    pub exempt: Vec<N>,
}

/// What one address family wants. Made by [`FamilyRules::new`], so its prefixes are of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyRules {
    family: Family,
    network: IpNet,
    subnet: IpNet,
    masquerade: Option<Masquerade<IpNet>>,
    forward: bool,
}

impl FamilyRules {
    /// The rules for `network`, of which this node owns `subnet`: masquerading as flannel's `--ip-masq`,
    /// forwarding as its `--iptables-forward-rules`.
    ///
    /// # Errors
    /// [`Error::WholeInternet`] for a prefix of length 0, which a rule cannot tell from "any".
    pub fn new<N: OverlayPrefix + Into<IpNet>>(
        network: N,
        subnet: N,
        masquerade: Option<Masquerade<N>>,
        forward: bool,
    ) -> Result<Self, Error> {
        let prefix = |prefix: N| {
            let prefix: IpNet = prefix.into();
            if prefix.prefix_len() == 0 {
                return Err(Error::WholeInternet(prefix));
            }
            Ok(prefix.trunc())
        };
        let masquerade = masquerade
            .map(|wanted| {
                let exempt = wanted.exempt.into_iter().map(prefix);
                Ok(Masquerade {
                    fully_random: wanted.fully_random,
                    exempt: exempt.collect::<Result<_, _>>()?,
                })
            })
            .transpose()?;
        let network = prefix(network)?;
        Ok(Self {
            family: match network {
                IpNet::V4(_) => Family::V4,
                IpNet::V6(_) => Family::V6,
            },
            network,
            subnet: prefix(subnet)?,
            masquerade,
            forward,
        })
    }

    /// The family of all its prefixes.
    #[must_use]
    pub const fn family(&self) -> Family {
        self.family
    }

    pub(super) const fn network(&self) -> IpNet {
        self.network
    }

    pub(super) const fn subnet(&self) -> IpNet {
        self.subnet
    }

    pub(super) const fn masquerade(&self) -> Option<&Masquerade<IpNet>> {
        self.masquerade.as_ref()
    }

    pub(super) const fn forward(&self) -> bool {
        self.forward
    }
}

/// Which tunnel is exempt from connection tracking.
///
/// Covers datagrams to `port` that arrive for this node and that it sends, whatever their source port. An ICMP
/// error about such a datagram then belongs to no tracked connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notrack {
    /// The UDP port of the tunnel, here and at the peers.
    pub port: u16,
    /// Over which underlay families the tunnel runs.
    pub underlay: Underlay,
}

/// The families of an underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underlay {
    /// One of them.
    Only(Family),
    /// Both.
    Dual,
}

impl Underlay {
    pub(super) fn has(self, family: Family) -> bool {
        match self {
            Self::Only(only) => only == family,
            Self::Dual => true,
        }
    }
}

/// Everything that should be in place. What is not asked for is removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    families: [Option<FamilyRules>; 2],
    notrack: Option<Notrack>,
}

impl Rules {
    /// No rule at all.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds what one family wants, in place of what it wanted before.
    #[must_use]
    pub fn with(mut self, rules: FamilyRules) -> Self {
        let index = rules.family.index();
        self.families[index] = Some(rules);
        self
    }

    /// Exempts the tunnel from connection tracking.
    #[must_use]
    pub const fn with_notrack(mut self, notrack: Notrack) -> Self {
        self.notrack = Some(notrack);
        self
    }

    /// What `family` wants, if anything.
    #[must_use]
    pub const fn family(&self, family: Family) -> Option<&FamilyRules> {
        self.families[family.index()].as_ref()
    }

    /// The tunnel that is exempt from connection tracking.
    #[must_use]
    pub const fn notrack(&self) -> Option<Notrack> {
        self.notrack
    }
}
