//! Owns the `udp` backend's decisions: from configuration, external interface and leases to what the data plane
//! and the device should be. Pure; never touches either. Flannel specification section 8.1.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use ipnet::IpNet;

use super::data_plane::DataPlane;
use super::reconcile::Desired;
use crate::addr::{Mtu, udp_overhead};
use crate::config::{NetworkConfig, SourceCheck, SourcePort, UdpBackend};
use crate::datapath::{self, Encapsulation, Local, PeerRoute};
use crate::iface::{Choice, Family, Stack, Wanted};
use crate::lease::{Lease, LeaseAttrs, LeaseExtension, Subnets};

/// Packets the kernel queues towards the TUN before it drops: covers the bursts of a pod that sends superpackets
/// while a worker copies one.
pub const TX_QUEUE_LEN: u32 = 1000;

/// What leases of this program would call it; the original's name no backend.
pub const TYPE: &str = "udp";

/// The template the original names its TUN by; the kernel puts the first free number in.
pub const DEVICE: &str = "flannel%d";

/// What peers that run this program may count on.
pub const EXTENSION: LeaseExtension = LeaseExtension { ecn: true };

/// Which families of the underlay to look at: those of the network, as the original does, and another one only
/// where the operator names an address of it.
#[must_use]
pub fn stack(config: &NetworkConfig, wanted: &Wanted) -> Stack {
    let names = |family| wanted.public(family).is_some() || wanted.names_address_of(family);
    let v4 = config.ipv4.is_some() || names(Family::V4);
    let v6 = config.ipv6.is_some() || names(Family::V6);
    match (v4, v6) {
        (true, true) => Stack::Either,
        (false, true) => Stack::V6,
        (_, false) => Stack::V4,
    }
}

/// The underlay of a node, as the backend uses it.
#[derive(Debug, Clone)]
pub struct Underlay {
    /// Where the tunnel is bound.
    pub bind: SocketAddr,
    /// What pods may send.
    pub mtu: Mtu,
    /// What the lease says about us: one address, of the family that the tunnel is bound to, and no backend type
    /// or data, as the original.
    pub attrs: LeaseAttrs,
    scope: u32,
}

/// The MTU leaves no room for packets.
#[derive(Debug, thiserror::Error)]
#[error(
    "an underlay MTU of {underlay} leaves less than {least} bytes after {overhead} bytes of encapsulation: raise it, or set Backend.MTU"
)]
pub struct MtuTooSmall {
    underlay: Mtu,
    least: Mtu,
    overhead: u16,
}

impl Underlay {
    /// Derives it from the chosen interface. An explicit `MTU` of the backend stands for the interface's.
    ///
    /// # Errors
    ///
    /// The MTU is too small for the families of the overlay.
    pub fn new(
        config: &NetworkConfig,
        backend: &UdpBackend,
        choice: &Choice,
    ) -> Result<Self, MtuTooSmall> {
        let underlay = backend.mtu.unwrap_or(choice.mtu);
        let overhead = udp_overhead(choice.addr);
        let least = match config.ipv6 {
            Some(_) => Mtu::MIN_V6,
            None => Mtu::MIN,
        };
        let mtu = underlay.less(overhead).filter(|&mtu| mtu >= least);
        let mut attrs = LeaseAttrs::default();
        match choice.public {
            IpAddr::V4(ip) => attrs.public_ip = Some(ip),
            IpAddr::V6(ip) => attrs.public_ipv6 = Some(ip),
        }
        Ok(Self {
            bind: endpoint(choice.addr, backend.port, choice.index),
            mtu: mtu.ok_or(MtuTooSmall {
                underlay,
                least,
                overhead,
            })?,
            attrs,
            scope: choice.index,
        })
    }

    /// Where the datagrams for a peer go; `None` if it has no address in the family that our tunnel is bound to.
    /// The port is our own: leases do not publish one.
    #[must_use]
    pub fn endpoint_of(&self, attrs: &LeaseAttrs) -> Option<SocketAddr> {
        let ip = match self.bind {
            SocketAddr::V4(_) => attrs.public_ip.map(IpAddr::V4),
            SocketAddr::V6(_) => attrs.public_ipv6.map(IpAddr::V6),
        };
        ip.map(|ip| endpoint(ip, self.bind.port(), self.scope))
    }

    /// The forwarding table for these peers, and the leases that cannot be reached.
    pub fn routes<'a>(
        &self,
        leases: impl Iterator<Item = &'a Lease>,
    ) -> (Vec<PeerRoute>, Vec<&'a Lease>) {
        let mut routes = Vec::with_capacity(leases.size_hint().0);
        let mut unreachable = Vec::new();
        for lease in leases {
            match self.endpoint_of(&lease.attrs) {
                Some(addr) => routes.extend(each_net(&lease.subnets).map(|net| PeerRoute {
                    net,
                    addr,
                    mac: None,
                    ecn: lease.extension.ecn,
                })),
                None => unreachable.push(lease),
            }
        }
        (routes, unreachable)
    }
}

/// Link-local addresses mean something on one link only.
#[must_use]
pub fn endpoint(ip: IpAddr, port: u16, scope: u32) -> SocketAddr {
    match ip {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            SocketAddrV6::new(v6, port, 0, scope).into()
        }
        IpAddr::V4(_) | IpAddr::V6(_) => SocketAddr::new(ip, port),
    }
}

/// The subnets of a lease in both families.
#[must_use]
pub fn nets(subnets: &Subnets) -> Vec<IpNet> {
    each_net(subnets).collect()
}

fn each_net(subnets: &Subnets) -> impl Iterator<Item = IpNet> + use<> {
    let v4 = subnets.v4().map(IpNet::V4);
    v4.into_iter().chain(subnets.v6().map(IpNet::V6))
}

/// The overlay networks of both families.
#[must_use]
pub fn networks(config: &NetworkConfig) -> Vec<IpNet> {
    let v4 = config.ipv4.as_ref().map(|pool| IpNet::V4(pool.network()));
    let v6 = config.ipv6.as_ref().map(|pool| IpNet::V6(pool.network()));
    v4.into_iter().chain(v6).collect()
}

/// What is local for the data plane: our subnets, and our own addresses on the underlay.
#[must_use]
pub fn local(subnets: &Subnets, choice: &Choice) -> Local {
    let mut addrs = vec![choice.addr];
    if choice.public != choice.addr {
        addrs.push(choice.public);
    }
    Local {
        nets: nets(subnets),
        addrs,
        icmp_v4: subnets.v4().map(|net| net.network()),
        icmp_v6: subnets.v6().map(|net| net.network()),
    }
}

/// What the TUN device should look like: `<lease base>` as a whole address per family, the network routed to it.
#[must_use]
pub fn device(config: &NetworkConfig, underlay: &Underlay, subnets: &Subnets) -> Desired {
    Desired {
        mtu: underlay.mtu,
        tx_queue_len: TX_QUEUE_LEN,
        mac: None,
        learning: None,
        addrs: nets(subnets)
            .into_iter()
            .map(|net| IpNet::from(net.network()))
            .collect(),
        networks: networks(config),
        routed: networks(config),
    }
}

/// What the backend asks of our own data plane.
#[must_use]
pub fn data_plane(
    config: &NetworkConfig,
    backend: &UdpBackend,
    underlay: &Underlay,
    subnets: &Subnets,
    choice: &Choice,
) -> DataPlane {
    DataPlane {
        encapsulation: Encapsulation::Plain,
        bind: underlay.bind,
        mtu: underlay.mtu,
        source_check: source_check(backend),
        source_port: source_port(backend.source_port),
        local: local(subnets, choice),
        device: device(config, underlay, subnets),
    }
}

/// `SourceCheck` for the data plane.
#[must_use]
pub const fn source_check(backend: &UdpBackend) -> datapath::SourceCheck {
    match backend.source_check {
        SourceCheck::Strict => datapath::SourceCheck::Strict,
        SourceCheck::Loose => datapath::SourceCheck::Loose,
    }
}

/// `SourcePort` for the data plane.
#[must_use]
pub const fn source_port(source_port: SourcePort) -> datapath::SourcePort {
    match source_port {
        SourcePort::Spread => datapath::SourcePort::Spread,
        SourcePort::Fixed => datapath::SourcePort::Fixed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text.as_bytes()).unwrap()
    }

    const V4: &str = r#"{"Network":"198.18.0.0/16"}"#;
    const V6: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:1::/48"}"#;
    const DUAL: &str =
        r#"{"Network":"198.18.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48"}"#;

    fn choice(addr: &str, public: &str, mtu: u32) -> Choice {
        Choice {
            index: 5,
            name: "eth0".to_owned(),
            mtu: Mtu::new(mtu).unwrap(),
            addr: addr.parse().unwrap(),
            public: public.parse().unwrap(),
            reason: String::new(),
        }
    }

    fn underlay(text: &str, choice: &Choice) -> Result<Underlay, MtuTooSmall> {
        let config = config(text);
        let crate::config::Backend::Udp(backend) = config.backend.clone() else {
            panic!("{text} is of another backend");
        };
        Underlay::new(&config, &backend, choice)
    }

    fn with_mtu(mtu: u32) -> String {
        format!(r#"{{"Network":"198.18.0.0/16","Backend":{{"Type":"udp","MTU":{mtu}}}}}"#)
    }

    #[test]
    fn mtu_is_the_underlays_less_the_outer_headers() {
        let v4 = choice("192.0.2.1", "192.0.2.1", 1500);
        let v6 = choice("2001:db8::1", "2001:db8::1", 1500);
        for (text, choice, expected) in [
            (V4.to_owned(), &v4, 1472),
            (V4.to_owned(), &v6, 1452),
            (with_mtu(9000), &v4, 8972),
            (with_mtu(1400), &v6, 1352),
        ] {
            let mtu = underlay(&text, choice).unwrap().mtu.get();
            assert_eq!(mtu, expected, "{text} {}", choice.addr);
        }
    }

    #[test]
    fn mtu_too_small_for_a_family_of_the_overlay_is_refused_with_the_numbers() {
        let small = choice("192.0.2.1", "192.0.2.1", 1300);
        assert_eq!(underlay(V4, &small).unwrap().mtu.get(), 1272);
        let error = underlay(DUAL, &small).unwrap_err().to_string();
        assert!(error.contains("1300") && error.contains("1280"), "{error}");
        assert!(underlay(V4, &choice("192.0.2.1", "192.0.2.1", 95)).is_err());
    }

    #[test]
    fn lease_is_byte_for_byte_the_originals_and_names_only_the_family_we_listen_on() {
        let nat = choice("192.0.2.1", "203.0.113.7", 1500);
        let underlay_v4 = underlay(DUAL, &nat).unwrap();
        assert_eq!(underlay_v4.bind.to_string(), "192.0.2.1:8285");
        assert_eq!(
            underlay_v4.attrs.to_json(),
            r#"{"PublicIP":"203.0.113.7","PublicIPv6":null}"#
        );
        let v6 = choice("2001:db8::1", "2001:db8::1", 1500);
        assert_eq!(
            underlay(V6, &v6).unwrap().attrs.to_json(),
            r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1"}"#
        );
    }

    #[test]
    fn link_local_underlay_carries_its_link() {
        let underlay = underlay(V6, &choice("fe80::1", "fe80::1", 1500)).unwrap();
        assert_eq!(underlay.bind.to_string(), "[fe80::1%5]:8285");
        let peer = LeaseAttrs {
            public_ipv6: Some("fe80::2".parse().unwrap()),
            ..LeaseAttrs::default()
        };
        let peer = underlay.endpoint_of(&peer).unwrap();
        assert_eq!(peer.to_string(), "[fe80::2%5]:8285");
    }

    #[test]
    fn peers_are_routed_by_both_subnets_to_our_port_and_unreachable_ones_are_told() {
        let text = r#"{"Network":"198.18.0.0/16","Backend":{"Type":"udp","Port":9000}}"#;
        let underlay = underlay(text, &choice("192.0.2.1", "192.0.2.1", 1500)).unwrap();
        let lease = |subnets: &str, attrs: &str, ecn| Lease {
            subnets: subnets.parse().unwrap(),
            attrs: LeaseAttrs::parse(attrs.as_bytes()).unwrap(),
            expires: None,
            extension: LeaseExtension { ecn },
        };
        let dual = lease(
            "198.18.4.0-24&fd00:1:0:4::-64",
            r#"{"PublicIP":"192.0.2.4","PublicIPv6":null}"#,
            true,
        );
        let v6_only = lease(
            "198.18.5.0-24",
            r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::5"}"#,
            false,
        );
        let (routes, unreachable) = underlay.routes([&dual, &v6_only].into_iter());
        let addr: SocketAddr = "192.0.2.4:9000".parse().unwrap();
        let route = |net: &str| PeerRoute {
            net: net.parse().unwrap(),
            addr,
            mac: None,
            ecn: true,
        };
        assert_eq!(routes, [route("198.18.4.0/24"), route("fd00:1:0:4::/64")]);
        assert_eq!(unreachable, [&v6_only]);
    }

    #[test]
    fn device_has_the_subnets_base_as_whole_addresses_and_the_networks_as_routes() {
        let underlay = underlay(DUAL, &choice("192.0.2.1", "192.0.2.1", 1500)).unwrap();
        let subnets = "198.18.3.0-24&fd00:1:0:3::-64".parse().unwrap();
        let device = device(&config(DUAL), &underlay, &subnets);
        let texts = |nets: &[IpNet]| -> Vec<String> { nets.iter().map(IpNet::to_string).collect() };
        assert_eq!(texts(&device.addrs), ["198.18.3.0/32", "fd00:1:0:3::/128"]);
        assert_eq!(texts(&device.networks), ["198.18.0.0/16", "fd00:1::/48"]);
        assert_eq!(device.routed, device.networks);
        assert_eq!(device.mtu.get(), 1472);
    }

    #[test]
    fn underlay_family_follows_the_network_unless_an_address_of_another_is_named() {
        let named = |ip: &str| Wanted {
            selectors: vec![crate::iface::Selector::parse(ip)],
            ..Wanted::default()
        };
        let public_v6 = Wanted {
            public_ipv6: Some("2001:db8::1".parse().unwrap()),
            ..Wanted::default()
        };
        for (text, wanted, expected) in [
            (V4, Wanted::default(), Stack::V4),
            (V6, Wanted::default(), Stack::V6),
            (DUAL, Wanted::default(), Stack::Either),
            (V4, named("eth0"), Stack::V4),
            (V4, named("192.0.2.1"), Stack::V4),
            (V4, named("2001:db8::1"), Stack::Either),
            (V6, named("192.0.2.1"), Stack::Either),
            (V4, public_v6, Stack::Either),
        ] {
            assert_eq!(stack(&config(text), &wanted), expected, "{text} {wanted:?}");
        }
    }
}
