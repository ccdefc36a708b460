//! Owns the description of what the kernel should hold so that it carries the packets itself: devices, and a way
//! to every peer. Plain values; how they differ from what is there is [`super::diff`]'s to say.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::kernel::TunnelLink;
use crate::addr::{Mac, Mtu, Origin};
use crate::lease::Subnets;

/// All of it. Without devices and peers it still says what of ours is stale.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Desired {
    /// The overlay networks. Nothing outside of them is ever touched.
    pub networks: Vec<IpNet>,
    /// This node's subnets: never routed anywhere.
    pub own: Vec<IpNet>,
    /// The devices.
    pub devices: Vec<Device>,
    /// The peers, one entry per family.
    pub peers: Vec<Peer>,
    /// Leases of nodes that use another backend, as they do while a network changes from one to another: what is
    /// there for them stays.
    pub retained: Vec<Retained>,
    /// Ways past the tunnel are probed.
    pub probing: bool,
    /// `peers` and `retained` are all there are, so that what belongs to none of them is stale.
    pub complete: bool,
    /// Devices that a run before has left are stale too.
    pub sweep_devices: bool,
}

/// A tunnel device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its MAC address, which the lease publishes; none for a device without.
    pub mac: Option<Mac>,
    /// Its MTU.
    pub mtu: Mtu,
    /// What it does.
    pub tunnel: TunnelLink,
    /// Its address: the base of this node's subnet, as a whole address.
    pub addr: IpNet,
}

impl Device {
    /// The address whose every packet of its protocol it takes; none for a device that looks for a number of its own.
    #[must_use]
    pub const fn receives_all_to(&self) -> Option<Ipv4Addr> {
        match self.tunnel {
            TunnelLink::Ipip(ipip) => ipip.local,
            TunnelLink::Vxlan(_) => None,
        }
    }
}

/// A peer in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its lease, by which it is named.
    pub lease: Subnets,
    /// Its subnet.
    pub net: IpNet,
    /// Its address on the underlay.
    pub public: IpAddr,
    /// How it is reached.
    pub way: Way,
}

impl Peer {
    /// What the kernel is to know of a peer of our own data plane; none, if there is no way past it.
    #[must_use]
    pub const fn past_our_tunnel(self) -> Option<Self> {
        match self.way {
            Way::Vxlan {
                direct: direct @ Direct::Probed { .. },
                ..
            } => Some(Self {
                way: Way::Tunnel { direct },
                ..self
            }),
            Way::Vxlan { .. } | Way::Ipip { .. } | Way::Tunnel { .. } | Way::Gateway { .. } => None,
        }
    }
}

/// How a peer is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By a route through it; it has to be on the link of this number.
    Gateway {
        /// The external interface.
        link: u32,
    },
    /// Through a VXLAN device.
    Vxlan {
        /// Which of [`Desired::devices`].
        device: usize,
        /// The peer's device's MAC address.
        mac: Mac,
        /// By a route through the peer instead, or not.
        direct: Direct,
    },
    /// Through an IPIP device.
    Ipip {
        /// Which of [`Desired::devices`].
        device: usize,
        /// By a route through the peer instead, or not.
        direct: Direct,
    },
    /// Through our own data plane, which knows the peer itself.
    Tunnel {
        /// By a route through the peer instead, or not.
        direct: Direct,
    },
}

/// Whether a peer is reached by a route through it, past the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direct {
    /// Never.
    Never,
    /// If it is on a link.
    OnLink,
    /// If it is on a link and probes have proven the way, which they take by the table that is theirs.
    Probed {
        /// The UDP port on which it answers them.
        port: u16,
        /// They have.
        proven: bool,
    },
}

impl Way {
    /// What a way past the tunnel takes, where there is a tunnel.
    #[must_use]
    pub const fn direct(self) -> Option<Direct> {
        match self {
            Self::Vxlan { direct, .. } | Self::Ipip { direct, .. } | Self::Tunnel { direct } => {
                Some(direct)
            }
            Self::Gateway { .. } => None,
        }
    }

    /// Likewise, with what probes have found.
    pub const fn prove(&mut self, found: bool) {
        if let Self::Vxlan { direct, .. } | Self::Tunnel { direct } = self
            && let Direct::Probed { proven, .. } = direct
        {
            *proven = found;
        }
    }
}

/// A peer whose way past the tunnel can be probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Its subnet.
    pub net: IpNet,
    /// Its address on the underlay.
    pub public: IpAddr,
    /// The link that it is on.
    pub link: u32,
    /// The UDP port on which it answers probes.
    pub port: u16,
}

/// A lease of another backend, in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retained {
    /// Its subnet.
    pub net: IpNet,
    /// Its address on the underlay.
    pub public: Option<IpAddr>,
}

/// Who may send through the tunnel devices.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Senders {
    /// The nodes' addresses on the underlay.
    pub outer: BTreeSet<IpAddr>,
    /// Where inner packets come from, each with the subnet that they may be from.
    pub inner: BTreeSet<(Origin, IpNet)>,
    /// Where the devices receive, of those that take all that comes to an address.
    pub own: BTreeSet<IpAddr>,
    /// Whose packets the kernel gives to tunnels of other people, although they come to such an address.
    pub others: BTreeSet<IpAddr>,
    /// Tunnels of other people receive on the devices' port, too.
    pub shared: bool,
}

/// A peer that gets no way, or a wrong one, and why.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Refused {
    /// Its lease.
    pub lease: Subnets,
    /// Why, and what to do about it.
    pub why: String,
}
