//! Owns the causes that there are, with their names and remedies. Never finds one.

use serde::Serialize;

/// Why a peer is not reached as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// This node makes no way to the peer.
    NotServed,
    /// The peer's node is not reached at all.
    UnderlayDown,
    /// A host's own firewall drops the tunnel.
    FirewallDrop,
    /// Several nodes publish one address.
    DuplicatePublicIp,
    /// Whoever answers there has other subnets than the lease says.
    WrongLease,
    /// Nobody listens where the peer's tunnel should be.
    PeerDaemonGone,
    /// The peer's daemon runs, and its tunnel is down.
    PeerTunnelDown,
    /// Datagrams arrive with wrong checksums.
    ChecksumCorruption,
    /// Something on the way drops the tunnel's datagrams.
    PortFiltered,
    /// Something on the way drops long packets, and nobody is told.
    MtuBlackHole,
    /// The peer does not pass packets on to its pods.
    PeerNotForwarding,
    /// Packets come back by another way than they go.
    AsymmetricPath,
    /// The peer's clock is far off.
    ClockOff,
    /// Packets get lost.
    Loss,
}

impl Cause {
    /// Every one.
    pub const ALL: [Self; 14] = [
        Self::NotServed,
        Self::UnderlayDown,
        Self::FirewallDrop,
        Self::DuplicatePublicIp,
        Self::WrongLease,
        Self::PeerDaemonGone,
        Self::PeerTunnelDown,
        Self::ChecksumCorruption,
        Self::PortFiltered,
        Self::MtuBlackHole,
        Self::PeerNotForwarding,
        Self::AsymmetricPath,
        Self::ClockOff,
        Self::Loss,
    ];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotServed => "not_served",
            Self::UnderlayDown => "underlay_down",
            Self::FirewallDrop => "firewall_drop",
            Self::DuplicatePublicIp => "duplicate_public_ip",
            Self::WrongLease => "wrong_lease",
            Self::PeerDaemonGone => "peer_daemon_gone",
            Self::PeerTunnelDown => "peer_tunnel_down",
            Self::ChecksumCorruption => "checksum_corruption",
            Self::PortFiltered => "port_filtered",
            Self::MtuBlackHole => "mtu_black_hole",
            Self::PeerNotForwarding => "peer_not_forwarding",
            Self::AsymmetricPath => "asymmetric_path",
            Self::ClockOff => "clock_off",
            Self::Loss => "loss",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::NotServed => {
                "have what is named fit on both nodes: one backend, a complete lease, one link"
            }
            Self::UnderlayDown => {
                "check the node, its link and the routes between (ip route get, ping its public IP)"
            }
            Self::FirewallDrop => {
                "accept the tunnel's UDP port, or IP protocol 4 for ipip, in that host's firewall"
            }
            Self::DuplicatePublicIp => {
                "give each node its own --public-ip, or remove the lease of the node that is gone"
            }
            Self::WrongLease => {
                "the node there serves another store or network: start it with this cluster's, or remove the lease"
            }
            Self::PeerDaemonGone => "start loden on that node; its log says why it ended",
            Self::PeerTunnelDown => "loden status on that node says why",
            Self::ChecksumCorruption => {
                "switch checksum offload off on the underlay devices (ethtool -K DEVICE tx off rx off), or mend the path"
            }
            Self::PortFiltered => {
                "accept the tunnel's UDP port, or IP protocol 4 for ipip, in whatever filters between the nodes: security groups, switches, bridges"
            }
            Self::MtuBlackHole => {
                "lower Backend.MTU to what passes, or let the path's ICMP errors through"
            }
            Self::PeerNotForwarding => "set net.ipv4.ip_forward (and IPv6's) to 1 on that node",
            Self::AsymmetricPath => {
                "look for a route on either node that takes the other's subnet elsewhere (ip route get)"
            }
            Self::ClockOff => "synchronise the clocks (chrony, ntpd)",
            Self::Loss => {
                "look for a full queue or a bad link: loden status counts ours, ip -s link the devices'"
            }
        }
    }
}
