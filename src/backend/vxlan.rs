//! Owns the `vxlan` backend's decisions: from configuration, external interface and leases to devices and ways, or,
//! where the kernel makes no such devices, to what our own data plane does in their place. Pure. Flannel
//! specification section 8.2.
//!
//! Each family of the overlay crosses the same family of the underlay, through a device of its own, as the
//! original has it.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::abilities::Abilities;
use super::data_plane::DataPlane;
use super::desired::{Device, Direct, Peer, Way};
use super::device::{NAME_V4, NAME_V6};
use super::ends::Ends;
use super::kernel::{Link, TunnelLink, VxlanLink};
use super::plan::PlanError;
use super::{reconcile, udp};
use crate::addr::{Mac, Mtu, Vni};
use crate::config::{NetworkConfig, Object, SourceCheck, SourcePort, VxlanBackend};
use crate::datapath::{self, Encapsulation, PeerRoute};
use crate::iface::{Choice, Family};
use crate::lease::{BackendData, Lease, LeaseAttrs, Subnets};

/// What the lease calls it.
pub const TYPE: &str = "vxlan";

/// What the backend needs on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    backend: VxlanBackend,
    ends: Ends,
    devices: Vec<(Family, NewDevice)>,
    /// Why our own data plane does the devices' work, if it does.
    in_user_space: Option<String>,
    /// Which ports our own data plane sends from.
    source_port: SourcePort,
    /// What this node takes and says beside the tunnel, where peers are reached by the best way that is proven.
    past: Past,
}

/// What a node does about ways past the tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    /// Where it answers probes, if it does.
    pub probe_port: Option<u16>,
    /// Why it can use none itself, if it cannot.
    pub obstacle: Option<String>,
}

/// A device before it is known which subnet it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NewDevice {
    name: String,
    mac: Mac,
    mtu: Mtu,
    vxlan: VxlanLink,
}

/// Bytes of outer headers in front of the inner packet: Ethernet (14), VXLAN (8; RFC 7348 section 5), UDP (8), and
/// IPv4 (20) or IPv6 (40).
const fn overhead(underlay: IpAddr) -> u16 {
    match underlay {
        IpAddr::V4(_) => 50,
        IpAddr::V6(_) => 70,
    }
}

impl Vxlan {
    /// Derives it from the configuration and the external interface. An `MTU` beyond the interface's counts as
    /// the interface's, since the kernel's device goes no further.
    ///
    /// # Errors
    ///
    /// The MTU is too small.
    pub fn new(backend: &VxlanBackend, ends: Ends) -> Result<Self, PlanError> {
        let mut devices = Vec::new();
        for choice in ends.iter() {
            let family = Family::of(choice.addr);
            let (prefix, least) = match family {
                Family::V4 => (NAME_V4, Mtu::MIN),
                Family::V6 => (NAME_V6, Mtu::MIN_V6),
            };
            let underlay = backend.mtu.map_or(choice.mtu, |mtu| mtu.min(choice.mtu));
            let overhead = overhead(choice.addr);
            let mtu = underlay.less(overhead).filter(|&mtu| mtu >= least);
            let name = format!("{prefix}{}", backend.vni);
            devices.push((
                family,
                NewDevice {
                    mac: lasting_mac(&name, choice.public),
                    name,
                    mtu: mtu.ok_or(PlanError::MtuTooSmall {
                        underlay,
                        least,
                        overhead,
                    })?,
                    vxlan: VxlanLink {
                        vni: backend.vni,
                        port: backend.port,
                        link: choice.index,
                        local: Some(choice.addr),
                        learning: backend.learning,
                        gbp: backend.gbp,
                        extras: false,
                    },
                },
            ));
        }
        Ok(Self {
            backend: backend.clone(),
            ends,
            devices,
            in_user_space: None,
            source_port: SourcePort::Spread,
            past: Past {
                probe_port: None,
                obstacle: Some("it has not been looked for".to_owned()),
            },
        })
    }

    /// What pods may send: what fits through every device.
    #[must_use]
    pub fn mtu(&self) -> Mtu {
        let mtus = self.devices.iter().map(|(_, device)| device.mtu);
        mtus.min().unwrap_or(Mtu::MIN)
    }

    /// What the lease says about us.
    #[must_use]
    pub fn attrs(&self) -> LeaseAttrs {
        let mut attrs = self.ends.attrs(TYPE);
        for (family, device) in &self.devices {
            let data = data(self.backend.vni, device.mac, self.abilities().as_ref());
            match family {
                Family::V4 => attrs.backend_data = data,
                Family::V6 => attrs.backend_v6_data = data,
            }
        }
        attrs
    }

    /// The UDP port of the tunnel.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.backend.port
    }

    /// Which packets are accepted from the underlay; `None`: all.
    #[must_use]
    pub const fn source_check(&self) -> Option<SourceCheck> {
        self.backend.source_check
    }

    /// The network identifier.
    #[must_use]
    pub const fn vni(&self) -> u32 {
        self.backend.vni
    }

    /// The address of this node that the status shows.
    #[must_use]
    pub const fn addr(&self) -> IpAddr {
        self.ends.primary().addr
    }

    /// The names of the devices.
    pub fn device_names(&self) -> impl Iterator<Item = &str> {
        self.devices.iter().map(|(_, device)| device.name.as_str())
    }

    /// Takes over the MAC address that a device has, or had: what peers know stays right.
    fn keep_mac(&mut self, name: &str, mac: Mac) {
        for (_, device) in &mut self.devices {
            if device.name == name {
                device.mac = mac;
            }
        }
    }

    /// Likewise from a device that a run before, or the original, has left. After a move to another address the
    /// lease is another one, too, and two leases must not name one MAC address.
    pub fn adopt_mac(&mut self, name: &str, link: &Link) {
        let (Some(mac), Some(vxlan)) = (link.mac, link.vxlan()) else {
            return;
        };
        // The original sends from the public address.
        let ours = |end: &Choice| vxlan.local == Some(end.addr) || vxlan.local == Some(end.public);
        if self.ends.iter().any(ours) {
            self.keep_mac(name, mac);
        }
    }

    /// Likewise, those of the plan before.
    pub fn keep_macs_of(&mut self, before: &Self) {
        for (_, device) in &before.devices {
            self.keep_mac(&device.name, device.mac);
        }
    }

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

    /// Takes over from the plan before who carries the packets.
    pub fn keep_place_of(&mut self, before: &Self) {
        self.in_user_space.clone_from(&before.in_user_space);
        self.past = before.past.clone();
        self.source_port = before.source_port;
    }

    /// Whether peers are reached by the best way that is proven.
    #[must_use]
    pub const fn is_auto(&self) -> bool {
        self.backend.auto
    }

    /// Whether there may be peers that are reached by a route through them.
    #[must_use]
    pub const fn goes_past(&self) -> bool {
        self.backend.auto || (self.backend.direct_routing && self.in_user_space.is_none())
    }

    /// Says what this node can do past the tunnel.
    pub fn set_past(&mut self, past: Past) {
        self.past = past;
    }

    /// The external interface's names and those of the devices, by which packets of the overlay come in.
    pub fn links(&self) -> impl Iterator<Item = &str> {
        let ends = self.ends.iter().map(|end| end.name.as_str());
        ends.chain(self.device_names())
    }

    /// What the lease says of us beside flannel's data.
    fn abilities(&self) -> Option<Abilities> {
        self.backend.auto.then(|| Abilities {
            route: self.past.obstacle.is_none() && self.past.probe_port.is_some(),
            in_user_space: self.in_user_space.is_some(),
            port: self.backend.port,
            probe_port: self.past.probe_port,
        })
    }

    /// The port at which the way past the tunnel to a peer is probed; none where nobody asks for such ways.
    ///
    /// # Errors
    ///
    /// Why there is none to this peer, whatever the links are.
    pub fn past_to(&self, lease: &Lease, family: Family) -> Result<Option<u16>, String> {
        if !self.backend.auto {
            return Ok(None);
        }
        if let Some(obstacle) = &self.past.obstacle {
            return Err(format!("this node uses none: {obstacle}"));
        }
        let data = match family {
            Family::V4 => lease.attrs.backend_data.as_ref(),
            Family::V6 => lease.attrs.backend_v6_data.as_ref(),
        };
        let said = data.map(Abilities::parse).transpose()?.flatten();
        let said = said
            .ok_or("its lease does not say that it takes any, as that of an unmodified flannel")?;
        if !said.route {
            return Err(
                "its lease says that it takes none: its own `loden status` says why".to_owned(),
            );
        }
        let port = said
            .probe_port
            .ok_or("it answers no probes (--probe-port)")?;
        Ok(Some(port))
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

    /// The devices, with addresses of these subnets. Before a lease is there, the addresses are unspecified.
    #[must_use]
    pub fn devices(&self, subnets: Option<&Subnets>) -> Vec<Device> {
        let device = |(family, device): &(Family, NewDevice)| {
            let base = match family {
                Family::V4 => subnets
                    .and_then(|it| it.v4())
                    .map(|net| IpAddr::V4(net.network())),
                Family::V6 => subnets
                    .and_then(|it| it.v6())
                    .map(|net| IpAddr::V6(net.network())),
            };
            let unspecified = match family {
                Family::V4 => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
                Family::V6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
            };
            Device {
                name: device.name.clone(),
                mac: Some(device.mac),
                mtu: device.mtu,
                tunnel: TunnelLink::Vxlan(device.vxlan),
                addr: IpNet::from(base.unwrap_or(unspecified)),
            }
        };
        self.devices.iter().map(device).collect()
    }

    /// The way to a peer in one family.
    ///
    /// # Errors
    ///
    /// What the lease lacks.
    pub fn peer(&self, lease: &Lease, family: Family) -> Result<Option<Peer>, String> {
        let Some((net, public)) = self.ends.reach(lease, family)? else {
            return Ok(None);
        };
        let mut devices = self.devices.iter();
        let Some(device) = devices.position(|(of, _)| *of == family) else {
            return Ok(None);
        };
        let (key, data) = match family {
            Family::V4 => ("BackendData", &lease.attrs.backend_data),
            Family::V6 => ("BackendV6Data", &lease.attrs.backend_v6_data),
        };
        let data = data
            .as_ref()
            .ok_or_else(|| format!("it publishes no {key}"))?;
        let mac = vtep_mac(data).map_err(|why| format!("its {key}: {why}"))?;
        if self.devices.iter().any(|(_, own)| own.mac == mac) {
            return Err(format!(
                "its VtepMAC {mac} is also this node's: give the nodes different ones"
            ));
        }
        let direct = match self.past_to(lease, family) {
            Ok(Some(port)) => Direct::Probed {
                port,
                proven: false,
            },
            Ok(None) | Err(_) if self.backend.direct_routing => Direct::OnLink,
            Ok(None) | Err(_) => Direct::Never,
        };
        Ok(Some(Peer {
            lease: lease.subnets,
            net,
            public,
            way: Way::Vxlan {
                device,
                mac,
                direct,
            },
        }))
    }
}

/// What a lease publishes about a device, byte for byte as the original; what it knows nothing of comes after that.
fn data(vni: u32, mac: Mac, abilities: Option<&Abilities>) -> Option<BackendData> {
    let more = abilities.map(|it| format!(",{}", it.to_member()));
    let more = more.unwrap_or_default();
    BackendData::new(&format!(r#"{{"VNI":{vni},"VtepMAC":"{mac}"{more}}}"#))
}

/// The device's MAC address in what a lease publishes. The VNI beside it is never looked at, as in the original.
fn vtep_mac(data: &BackendData) -> Result<Mac, String> {
    const EXPECTED: &str = "the MAC address of one station, like 02:00:5e:10:00:01";
    let object = Object::parse(data.get().as_bytes(), "").map_err(|error| error.to_string())?;
    let mac = object
        .text("VtepMAC", EXPECTED, crate::config::Null::Refused, |text| {
            text.parse::<Mac>().ok()
        })
        .map_err(|error| error.to_string())?;
    mac.ok_or_else(|| format!("there is no VtepMAC: expected {EXPECTED}"))
}

/// The MAC address of a device of ours: the same after a reboot, without keeping it anywhere, and different on
/// nodes with different public addresses, as all nodes of a network have. FNV-1a with MurmurHash3's finaliser,
/// which spreads well enough for 46 bits of which nothing but being different is asked.
fn lasting_mac(name: &str, public: IpAddr) -> Mac {
    let public = public.to_string();
    let text = ["loden vtep", name, &public].join("\0");
    let mut hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    for multiplier in [0xff51_afd7_ed55_8ccd, 0xc4ce_b9fe_1a85_ec53] {
        hash = (hash ^ (hash >> 33)).wrapping_mul(multiplier);
    }
    Mac::local(hash ^ (hash >> 33))
}
