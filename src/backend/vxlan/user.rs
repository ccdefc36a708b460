//! Owns VXLAN as our own data plane carries it, in the place of the kernel's devices. Pure.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::super::data_plane::DataPlane;
use super::super::desired::{Peer, Way};
use super::super::plan::PlanError;
use super::super::{reconcile, udp};
use super::{NewDevice, Vxlan};
use crate::addr::Vni;
use crate::config::{NetworkConfig, SourceCheck, SourcePort};
use crate::datapath::{self, Encapsulation, PeerRoute};
use crate::iface::Family;
use crate::lease::Subnets;

impl Vxlan {
    /// Has our own data plane do what the kernel's devices would, because of `why`.
    ///
    /// # Errors
    ///
    /// The configuration asks for what only the kernel can do.
    pub fn move_to_user_space(&mut self, why: String) -> Result<(), PlanError> {
        if self.backend.gbp {
            return Err(PlanError::NeedsKernel { key: "GBP", why });
        }
        self.in_user_space = Some(why);
        Ok(())
    }

    /// The configuration asks for plain routes to peers on a link, which our own data plane does without: it
    /// reaches every peer through the tunnel.
    #[must_use]
    pub const fn leaves_direct_routing(&self) -> bool {
        self.backend.direct_routing && self.in_user_space.is_some()
    }

    /// Why our own data plane carries the packets; `None` where the kernel does.
    #[must_use]
    pub fn in_user_space(&self) -> Option<&str> {
        self.in_user_space.as_deref()
    }

    /// Which ports datagrams are sent from, where that is ours to say.
    pub const fn source_port_mut(&mut self) -> Option<&mut SourcePort> {
        match self.in_user_space {
            Some(_) => Some(&mut self.source_port),
            None => None,
        }
    }

    /// The tunnels of our own data plane, one in the place of each device; none where the kernel carries the
    /// packets.
    #[must_use]
    pub fn data_planes(&self, config: &NetworkConfig, subnets: &Subnets) -> Vec<DataPlane> {
        let tunnel = |(family, device): &(Family, NewDevice)| {
            let choice = self
                .ends
                .iter()
                .find(|choice| Family::of(choice.addr) == *family)?;
            let of_family = |net: &IpNet| Family::of(net.addr()) == *family;
            let mut local = udp::local(subnets, choice);
            local.nets.retain(of_family);
            let networks: Vec<IpNet> = udp::networks(config)
                .into_iter()
                .filter(of_family)
                .collect();
            Some(DataPlane {
                encapsulation: Encapsulation::Vxlan {
                    vni: Vni::new(self.backend.vni)?,
                    mac: device.mac,
                },
                bind: self.endpoint(choice.addr),
                mtu: device.mtu,
                // Our own data plane knows no "off": a peer is recognised by something.
                source_check: match self.backend.source_check {
                    Some(SourceCheck::Strict) => datapath::SourceCheck::Strict,
                    Some(SourceCheck::Loose) | None => datapath::SourceCheck::Loose,
                },
                source_port: udp::source_port(self.source_port),
                device: reconcile::Desired {
                    mtu: device.mtu,
                    tx_queue_len: udp::TX_QUEUE_LEN,
                    mac: None,
                    learning: None,
                    addrs: local
                        .nets
                        .iter()
                        .map(|net| IpNet::from(net.network()))
                        .collect(),
                    networks: networks.clone(),
                    routed: networks,
                },
                local,
            })
        };
        match self.in_user_space {
            Some(_) => self.devices.iter().filter_map(tunnel).collect(),
            None => Vec::new(),
        }
    }

    /// A peer's way, as our own data plane goes it. Whoever terminates VXLAN combines the ECN fields as RFC 6040 says:
    /// the kernel's device (`vxlan_ecn_decapsulate` in drivers/net/vxlan) as our own data plane does.
    #[must_use]
    pub fn route(&self, peer: &Peer) -> Option<PeerRoute> {
        let Way::Vxlan { mac, .. } = peer.way else {
            return None;
        };
        Some(PeerRoute {
            net: peer.net,
            addr: self.endpoint(peer.public),
            mac: Some(mac),
            ecn: true,
        })
    }

    fn endpoint(&self, ip: IpAddr) -> SocketAddr {
        udp::endpoint(ip, self.backend.port, self.ends.primary().index)
    }
}
