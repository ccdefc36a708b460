//! One look at the kernel, on the in-memory one: from the configuration's text and the leases' texts to entries
//! that are written out by hand, and a model that holds after whatever was done.

use std::collections::BTreeSet;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;
use crate::addr::{Mac, Mtu, Origin};
use crate::backend::ends::Ends;
use crate::backend::fake::{FakeKernel, State};
use crate::backend::kernel::{
    Forward, IpipLink, Neighbour, PROTOCOL_BOOT, PROTOCOL_LODEN, Route, TunnelLink,
};
use crate::backend::plan::Plan;
use crate::config::NetworkConfig;
use crate::iface::Choice;
use crate::lease::{Lease, LeaseAttrs, LeaseExtension, Subnets};

const EXTERNAL: u32 = 2;
const OWN: &str = "198.18.1.0-24&fd00:1:0:1::-64";

fn run<T>(future: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.build().unwrap().block_on(future)
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// Dual-stack, but for the backend that carries IPv4 only.
fn config(backend: &str) -> NetworkConfig {
    let v6 = match backend.contains("ipip") {
        true => "",
        false => r#""EnableIPv6":true,"IPv6Network":"fd00:1::/48","#,
    };
    let text = format!(r#"{{"Network":"198.18.0.0/16",{v6}"Backend":{backend}}}"#);
    NetworkConfig::parse(text.as_bytes()).unwrap()
}

fn ends(config: &NetworkConfig) -> Ends {
    ends_at(config, 1, 1500)
}

fn ends_at(config: &NetworkConfig, n: u8, mtu: u32) -> Ends {
    let choice = |ip: String| Choice {
        index: EXTERNAL,
        name: "eth0".to_owned(),
        mtu: Mtu::new(mtu).unwrap(),
        addr: ip.parse().unwrap(),
        public: ip.parse().unwrap(),
        reason: String::new(),
    };
    let v4 = choice(format!("192.0.2.{n}"));
    match config.ipv6 {
        Some(_) => Ends::both(v4, choice(format!("2001:db8::{n}"))),
        None => Ends::one(v4),
    }
}

/// Node `n` of the network: its lease as flannel writes it, dual-stack.
fn lease(n: u8, backend: &str) -> Lease {
    let data = match backend {
        "vxlan" => format!(
            r#","BackendData":{{"VNI":1,"VtepMAC":"{}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{}"}}"#,
            mac(4, n),
            mac(6, n)
        ),
        _ => String::new(),
    };
    let attrs = format!(
        r#"{{"PublicIP":"192.0.2.{n}","PublicIPv6":"2001:db8::{n}","BackendType":"{backend}"{data}}}"#
    );
    Lease {
        subnets: format!("198.18.{n}.0-24&fd00:1:0:{n}::-64")
            .parse()
            .unwrap(),
        attrs: LeaseAttrs::parse(attrs.as_bytes()).unwrap(),
        expires: None,
        extension: LeaseExtension::default(),
    }
}

fn mac(family: u8, n: u8) -> Mac {
    Mac::new([2, 0, 0, 0, family, n]).unwrap()
}

/// A node with its external interface up.
fn kernel() -> FakeKernel {
    let kernel = FakeKernel::default();
    up(&mut kernel.state());
    kernel
}

fn up(state: &mut State) {
    state.links.retain(|link| link.index != EXTERNAL);
    state.links.push(Link {
        index: EXTERNAL,
        name: "eth0".to_owned(),
        mtu: 1500,
        tx_queue_len: 1000,
        up: true,
        makes_ipv6_addresses: true,
        tx_dropped: 0,
        mac: None,
        tunnel: None,
    });
    state.routes.retain(|route| route.protocol != 2);
    for dst in ["192.0.2.0/24", "2001:db8::/64"] {
        state.routes.push(route(dst, EXTERNAL, None, 2));
    }
}

fn route(dst: &str, link: u32, gateway: Option<&str>, protocol: u8) -> Route {
    Route {
        net: net(dst),
        link,
        gateway: gateway.map(|ip| ip.parse().unwrap()),
        onlink: false,
        metric: None,
        protocol,
    }
}

fn desired(backend: &str, leases: &[Lease]) -> Desired {
    let config = config(backend);
    let plan = Plan::new(&config, ends(&config)).unwrap();
    let own: Subnets = OWN.parse().unwrap();
    let (mut desired, refused) = plan.desired(&config, &own, leases.iter());
    assert!(
        refused.iter().all(|it| it.why.contains("backend")),
        "{refused:?}"
    );
    desired.complete = true;
    desired.sweep_devices = true;
    desired
}

fn look(kernel: &FakeKernel, desired: &Desired) -> Report {
    let report = run(settle(kernel, desired)).unwrap();
    assert_eq!(report.failures, Vec::<String>::new());
    report
}

/// Everything in the kernel that concerns the overlay, with device numbers as names.
fn overlay(kernel: &FakeKernel) -> BTreeSet<String> {
    let state = kernel.state();
    let name = |index: u32| {
        let link = state.links.iter().find(|link| link.index == index);
        link.map_or_else(|| "?".to_owned(), |link| link.name.clone())
    };
    let inside = |ip: &IpAddr| net("198.18.0.0/16").contains(ip) || net("fd00:1::/48").contains(ip);
    let mut lines = BTreeSet::new();
    for link in state.links.iter().filter(|link| link.tunnel.is_some()) {
        let (mac, tunnel) = (link.mac, link.tunnel.unwrap());
        lines.insert(format!(
            "link {} {mac:?} {} {} {tunnel:?}",
            link.name, link.mtu, link.up
        ));
    }
    for (link, addr) in state.addrs.iter().filter(|(_, addr)| inside(&addr.addr())) {
        lines.insert(format!("addr {addr} {}", name(*link)));
    }
    for it in state
        .routes
        .iter()
        .filter(|route| inside(&route.net.addr()))
    {
        let (via, dev) = (it.gateway, name(it.link));
        lines.insert(format!(
            "route {} {via:?} {dev} {} {}",
            it.net, it.onlink, it.protocol
        ));
    }
    for it in &state.probe_routes {
        let (via, dev) = (it.gateway, name(it.link));
        lines.insert(format!("probes go to {} {via:?} {dev}", it.net));
    }
    for it in &state.neighbours {
        lines.insert(format!("neighbour {} {} {}", it.ip, it.mac, name(it.link)));
    }
    for it in &state.forwards {
        lines.insert(format!("forward {} {} {}", it.mac, it.to, name(it.link)));
    }
    lines
}

const VXLAN: &str = r#"{"Type":"vxlan"}"#;
const DIRECT: &str = r#"{"Type":"vxlan","DirectRouting":true}"#;
const HOST_GW: &str = r#"{"Type":"host-gw"}"#;
const AUTO: &str = r#"{"Type":"vxlan","Auto":true}"#;
const IPIP: &str = r#"{"Type":"ipip"}"#;
const IPIP_DIRECT: &str = r#"{"Type":"ipip","DirectRouting":true}"#;

#[test]
fn peers_over_vxlan_get_flannels_three_entries_each_and_a_second_look_finds_nothing() {
    let kernel = kernel();
    let desired = desired(VXLAN, &[lease(2, "vxlan")]);
    look(&kernel, &desired);
    let lines = overlay(&kernel);
    for line in [
        "addr 198.18.1.0/32 flannel.1",
        "addr fd00:1:0:1::/128 flannel-v6.1",
        "route 198.18.2.0/24 Some(198.18.2.0) flannel.1 true 108",
        "route fd00:1:0:2::/64 Some(fd00:1:0:2::) flannel-v6.1 true 108",
        "neighbour 198.18.2.0 02:00:00:00:04:02 flannel.1",
        "neighbour fd00:1:0:2:: 02:00:00:00:06:02 flannel-v6.1",
        "forward 02:00:00:00:04:02 192.0.2.2 flannel.1",
        "forward 02:00:00:00:06:02 2001:db8::2 flannel-v6.1",
    ] {
        assert!(lines.contains(line), "{line} is missing in {lines:#?}");
    }
    assert_eq!(lines.len(), 10, "{lines:#?}");
    let links = kernel.state().links.clone();
    let mtus: Vec<(&str, u32)> = links
        .iter()
        .map(|link| (link.name.as_str(), link.mtu))
        .collect();
    assert_eq!(
        mtus,
        [("eth0", 1500), ("flannel.1", 1450), ("flannel-v6.1", 1430)]
    );
    assert_eq!(look(&kernel, &desired).changed, Vec::<String>::new());
}

#[test]
fn direct_routing_takes_the_link_where_there_is_one_and_the_tunnel_where_not() {
    let kernel = kernel();
    let mut far = lease(3, "vxlan");
    far.attrs.public_ip = Some("203.0.113.3".parse().unwrap());
    let desired = desired(DIRECT, &[lease(2, "vxlan"), far]);
    let report = look(&kernel, &desired);
    assert!(
        report.direct.contains(&net("198.18.2.0/24"))
            && !report.direct.contains(&net("198.18.3.0/24"))
    );
    let lines = overlay(&kernel);
    assert!(
        lines.contains("route 198.18.2.0/24 Some(192.0.2.2) eth0 false 108"),
        "{lines:#?}"
    );
    assert!(lines.contains("route 198.18.3.0/24 Some(198.18.3.0) flannel.1 true 108"));
    assert!(
        !lines
            .iter()
            .any(|line| line.starts_with("neighbour 198.18.2.0"))
    );
    // The peer moves behind a router: the other form replaces the first without a trace.
    kernel
        .state()
        .routes
        .push(route("192.0.2.2/32", EXTERNAL, Some("192.0.2.254"), 4));
    look(&kernel, &desired);
    let lines = overlay(&kernel);
    assert!(
        lines.contains("route 198.18.2.0/24 Some(198.18.2.0) flannel.1 true 108"),
        "{lines:#?}"
    );
    assert!(lines.contains("forward 02:00:00:00:04:02 192.0.2.2 flannel.1"));
}

/// What flannel makes: a device for all that comes to the interface's address, and a route through each peer's.
#[test]
fn peers_over_ipip_get_flannels_route_each_and_a_second_look_finds_nothing() {
    let kernel = kernel();
    let mut far = lease(3, "ipip");
    far.attrs.public_ip = Some("203.0.113.3".parse().unwrap());
    let leases = [lease(2, "ipip"), far];
    let plain = desired(IPIP, &leases);
    look(&kernel, &plain);
    let device = "link flannel.ipip None 1480 true Ipip(IpipLink { local: Some(192.0.2.1), remote: None, extras: false })";
    let through = |n: u8, by: &str| match n {
        3 => format!("route 198.18.3.0/24 Some(203.0.113.3) {by} 108"),
        n => format!("route 198.18.{n}.0/24 Some(192.0.2.{n}) {by} 108"),
    };
    assert_eq!(
        overlay(&kernel).into_iter().collect::<Vec<_>>(),
        [
            "addr 198.18.1.0/32 flannel.ipip",
            device,
            &through(2, "flannel.ipip true"),
            &through(3, "flannel.ipip true"),
        ]
    );
    assert_eq!(look(&kernel, &plain).changed, Vec::<String>::new());
    // On the link by the link, and no further.
    let report = look(&kernel, &desired(IPIP_DIRECT, &leases));
    assert_eq!(report.direct, [net("198.18.2.0/24")].into());
    let lines = overlay(&kernel);
    assert!(
        lines.contains(&through(2, "eth0 false"))
            && lines.contains(&through(3, "flannel.ipip true")),
        "{lines:#?}"
    );
    // The original's form is taken over.
    let mut original = route("198.18.2.0/24", EXTERNAL, Some("192.0.2.2"), PROTOCOL_BOOT);
    original.onlink = true;
    kernel.state().routes.retain(|it| it.net != original.net);
    kernel.state().routes.push(original);
    look(&kernel, &desired(IPIP_DIRECT, &leases));
    assert_eq!(overlay(&kernel), lines);
    // The peers are gone, and then so is the backend.
    look(&kernel, &desired(IPIP, &[]));
    assert_eq!(overlay(&kernel).len(), 2);
    look(&kernel, &desired(HOST_GW, &[]));
    assert!(overlay(&kernel).is_empty());
}

#[test]
fn ipip_device_is_kept_made_anew_or_left_to_whom_it_belongs() {
    let foreign = |index, name: &str, ipip| Link {
        index,
        name: name.to_owned(),
        mtu: 1400,
        tx_queue_len: 1000,
        up: false,
        makes_ipv6_addresses: false,
        tx_dropped: 0,
        mac: None,
        tunnel: Some(TunnelLink::Ipip(ipip)),
    };
    let local = |ip: &str| IpipLink {
        local: Some(ip.parse().unwrap()),
        remote: None,
        extras: false,
    };
    let any = IpipLink {
        local: None,
        remote: None,
        extras: false,
    };
    let wanted = desired(IPIP, &[lease(2, "ipip")]);
    // The kernel's own stays, whatever it is used for.
    let tunl0 = foreign(8, "tunl0", any);
    let fresh = kernel();
    fresh.state().links.push(tunl0.clone());
    look(&fresh, &wanted);
    assert!(fresh.state().links.contains(&tunl0));
    let fresh_with = |wanted: &Desired| {
        let kernel = kernel();
        look(&kernel, wanted);
        kernel
    };
    for (there, kept) in [
        (local("192.0.2.1"), true),
        (local("192.0.2.9"), false),
        (any, false),
        (
            IpipLink {
                extras: true,
                ..local("192.0.2.1")
            },
            false,
        ),
    ] {
        let kernel = kernel();
        kernel.state().links.push(foreign(9, "flannel.ipip", there));
        look(&kernel, &wanted);
        let is_there = kernel.state().links.iter().any(|link| link.index == 9);
        assert_eq!(is_there, kept, "{there:?}");
        assert_eq!(overlay(&kernel), overlay(&fresh_with(&wanted)));
    }
    // Ours under another name, and somebody else's.
    let renamed = kernel();
    look(&renamed, &wanted);
    let settled = overlay(&renamed);
    let rename = |kernel: &FakeKernel| {
        let mut state = kernel.state();
        let mut links = state.links.iter_mut();
        let link = links.find(|link| link.tunnel.is_some()).unwrap();
        link.name = "tun7".to_owned();
        link.index
    };
    rename(&renamed);
    look(&renamed, &wanted);
    assert_eq!(overlay(&renamed), settled);
    let index = rename(&renamed);
    renamed.state().addrs.retain(|(at, _)| *at != index);
    let error = run(settle(&renamed, &wanted)).unwrap_err().to_string();
    assert!(error.contains("ip link del tun7"), "{error}");
    let lacking = kernel();
    lacking.state().no_tunnels = true;
    let error = run(settle(&lacking, &wanted)).unwrap_err().to_string();
    assert!(error.contains("modprobe ipip"), "{error}");
    assert!(overlay(&lacking).is_empty());
}

#[test]
fn host_gw_serves_whoever_is_on_the_link_and_refuses_the_others_by_name() {
    let kernel = kernel();
    let mut far = lease(3, "host-gw");
    far.attrs.public_ip = Some("203.0.113.3".parse().unwrap());
    let desired = desired(HOST_GW, &[lease(2, "host-gw"), far.clone()]);
    let report = look(&kernel, &desired);
    assert_eq!(
        overlay(&kernel).into_iter().collect::<Vec<_>>(),
        [
            "route 198.18.2.0/24 Some(192.0.2.2) eth0 false 108",
            "route fd00:1:0:2::/64 Some(2001:db8::2) eth0 false 108",
            "route fd00:1:0:3::/64 Some(2001:db8::3) eth0 false 108",
        ]
    );
    let [refused] = report.refused.as_slice() else {
        panic!("{:?}", report.refused)
    };
    assert_eq!(refused.lease, far.subnets);
    assert!(
        refused.why.contains("203.0.113.3 is not on the link"),
        "{}",
        refused.why
    );
}

#[test]
fn what_vanished_peers_and_the_original_left_is_swept_and_foreign_state_stays() {
    let kernel = kernel();
    let desired = desired(HOST_GW, &[lease(2, "host-gw")]);
    let foreign = [
        route("198.18.9.0/24", EXTERNAL, Some("192.0.2.99"), PROTOCOL_BOOT),
        route("198.18.10.0/24", EXTERNAL, Some("192.0.2.2"), 4),
        route("198.18.1.0/24", 7, None, 2),
        route(
            "198.51.100.0/24",
            EXTERNAL,
            Some("192.0.2.2"),
            PROTOCOL_LODEN,
        ),
    ];
    let stale = [
        route("198.18.7.0/24", EXTERNAL, Some("192.0.2.7"), PROTOCOL_LODEN),
        route("198.18.8.0/24", EXTERNAL, Some("192.0.2.2"), PROTOCOL_BOOT),
    ];
    // Adopted: the original's route to the same peer.
    let adopted = route("198.18.2.0/24", EXTERNAL, Some("192.0.2.2"), PROTOCOL_BOOT);
    kernel
        .state()
        .routes
        .extend(foreign.iter().chain(&stale).chain([&adopted]));
    look(&kernel, &desired);
    let routes = kernel.state().routes.clone();
    assert!(
        foreign.iter().all(|route| routes.contains(route)),
        "{routes:?}"
    );
    assert!(
        !stale.iter().any(|route| routes.contains(route)),
        "{routes:?}"
    );
    let to_peer: Vec<&Route> = routes
        .iter()
        .filter(|route| route.net == adopted.net)
        .collect();
    assert_eq!(
        to_peer,
        [&route(
            "198.18.2.0/24",
            EXTERNAL,
            Some("192.0.2.2"),
            PROTOCOL_LODEN
        )]
    );
}

#[test]
fn nothing_is_swept_before_the_peers_are_known() {
    let kernel = kernel();
    look(
        &kernel,
        &desired(VXLAN, &[lease(2, "vxlan"), lease(3, "vxlan")]),
    );
    let before = overlay(&kernel);
    let mut unknown = desired(VXLAN, &[]);
    unknown.complete = false;
    look(&kernel, &unknown);
    assert_eq!(overlay(&kernel), before);
}

#[test]
fn foreign_route_in_a_peers_place_is_named_and_kept_and_the_others_are_served() {
    let kernel = kernel();
    let foreign = route("198.18.2.0/24", EXTERNAL, Some("192.0.2.99"), 4);
    kernel.state().routes.push(foreign);
    let report = look(
        &kernel,
        &desired(VXLAN, &[lease(2, "vxlan"), lease(3, "vxlan")]),
    );
    assert!(
        report.refused[0].why.contains("ip route del 198.18.2.0/24"),
        "{report:?}"
    );
    assert!(kernel.state().routes.contains(&foreign));
    let lines = overlay(&kernel);
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("route 198.18.3.0/24"))
    );
    assert!(
        !lines
            .iter()
            .any(|line| line.starts_with("neighbour 198.18.2.0")),
        "{lines:#?}"
    );
}

#[test]
fn two_leases_with_one_mac_address_are_not_mixed_up() {
    let kernel = kernel();
    let mut twin = lease(3, "vxlan");
    twin.attrs.backend_data = lease(2, "vxlan").attrs.backend_data;
    let report = look(&kernel, &desired(VXLAN, &[lease(2, "vxlan"), twin.clone()]));
    assert_eq!(report.refused.len(), 1);
    assert_eq!(report.refused[0].lease, twin.subnets);
    assert!(
        report.refused[0].why.contains("198.18.2.0-24"),
        "{report:?}"
    );
    assert!(overlay(&kernel).contains("forward 02:00:00:00:04:02 192.0.2.2 flannel.1"));
}

#[test]
fn node_with_an_old_lease_beside_its_new_one_is_reached_by_both() {
    let kernel = kernel();
    let mut old = lease(2, "vxlan");
    old.subnets = "198.18.9.0-24".parse().unwrap();
    let report = look(&kernel, &desired(VXLAN, &[lease(2, "vxlan"), old]));
    assert_eq!(report.refused, []);
    let lines = overlay(&kernel);
    for net in ["198.18.2.0", "198.18.9.0"] {
        let neighbour = format!("neighbour {net} 02:00:00:00:04:02 flannel.1");
        assert!(lines.contains(&neighbour), "{lines:#?}");
    }
    assert_eq!(
        look(&kernel, &desired(VXLAN, &[lease(2, "vxlan")])).refused,
        []
    );
    assert!(overlay(&kernel).contains("forward 02:00:00:00:04:02 192.0.2.2 flannel.1"));
}

#[test]
fn what_the_kernel_refuses_for_one_peer_is_told_and_the_others_are_served() {
    let kernel = kernel();
    kernel.state().refuse = Some("add route 198.18.2.0/24");
    let desired = desired(VXLAN, &[lease(2, "vxlan"), lease(3, "vxlan")]);
    let report = run(settle(&kernel, &desired)).unwrap();
    assert_eq!(report.failed, 1);
    assert!(
        report.failures[0].contains("lease 198.18.2.0-24"),
        "{report:?}"
    );
    assert!(
        overlay(&kernel)
            .iter()
            .any(|line| line.starts_with("route 198.18.3.0/24"))
    );
    kernel.state().refuse = None;
    assert_eq!(look(&kernel, &desired).changed.len(), 1);
}

#[test]
fn device_that_cannot_be_had_is_named_with_the_remedy() {
    let desired = desired(VXLAN, &[]);
    let error = |kernel: &FakeKernel| run(settle(kernel, &desired)).unwrap_err().to_string();
    let none = kernel();
    none.state().no_tunnels = true;
    assert!(error(&none).contains("modprobe vxlan"));
    assert!(none.state().addrs.is_empty());

    let taken = kernel();
    look(&taken, &desired);
    let change = |state: &mut State| {
        let link = state
            .links
            .iter_mut()
            .find(|link| link.name == "flannel.1")
            .unwrap();
        link.name = "vx7".to_owned();
        link.mac = Some(mac(9, 9));
    };
    change(&mut taken.state());
    assert!(
        error(&taken).contains("ip link del vx7"),
        "{}",
        error(&taken)
    );

    let other = kernel();
    let eth0 = other.state().links[0].clone();
    other.state().links.push(Link {
        index: 9,
        name: "flannel.1".to_owned(),
        tunnel: None,
        ..eth0
    });
    assert!(
        error(&other).contains("is no VXLAN device"),
        "{}",
        error(&other)
    );
}

#[test]
fn device_is_adjusted_where_that_is_possible_and_made_anew_where_not() {
    let kernel = kernel();
    let plain = desired(VXLAN, &[lease(2, "vxlan")]);
    look(&kernel, &plain);
    let index = |kernel: &FakeKernel| {
        let state = kernel.state();
        let link = state
            .links
            .iter()
            .find(|link| link.name == "flannel.1")
            .unwrap();
        (link.index, link.mac, link.mtu)
    };
    let before = index(&kernel);
    let resized = desired(
        r#"{"Type":"vxlan","MTU":1400,"Learning":true}"#,
        &[lease(2, "vxlan")],
    );
    look(&kernel, &resized);
    assert_eq!(index(&kernel), (before.0, before.1, 1350));
    look(
        &kernel,
        &desired(r#"{"Type":"vxlan","GBP":true}"#, &[lease(2, "vxlan")]),
    );
    assert_ne!(index(&kernel).0, before.0);
    assert_eq!(index(&kernel).1, before.1);
    assert!(overlay(&kernel).contains("forward 02:00:00:00:04:02 192.0.2.2 flannel.1"));
}

#[test]
fn network_that_changes_its_backend_keeps_what_is_there_for_nodes_that_have_not_yet() {
    let kernel = kernel();
    look(
        &kernel,
        &desired(VXLAN, &[lease(2, "vxlan"), lease(3, "vxlan")]),
    );
    // This node is the first to change, then node 2, then node 3.
    look(
        &kernel,
        &desired(HOST_GW, &[lease(2, "vxlan"), lease(3, "vxlan")]),
    );
    assert!(overlay(&kernel).contains("route 198.18.2.0/24 Some(198.18.2.0) flannel.1 true 108"));
    look(
        &kernel,
        &desired(HOST_GW, &[lease(2, "host-gw"), lease(3, "vxlan")]),
    );
    let lines = overlay(&kernel);
    assert!(
        lines.contains("route 198.18.2.0/24 Some(192.0.2.2) eth0 false 108"),
        "{lines:#?}"
    );
    assert!(lines.contains("route 198.18.3.0/24 Some(198.18.3.0) flannel.1 true 108"));
    look(
        &kernel,
        &desired(HOST_GW, &[lease(2, "host-gw"), lease(3, "host-gw")]),
    );
    let lines = overlay(&kernel);
    assert!(
        lines
            .iter()
            .all(|line| line.starts_with("route") && line.contains("eth0")),
        "{lines:#?}"
    );
}

#[test]
fn senders_of_ipip_are_the_peers_those_that_still_use_another_backend_and_whom_other_tunnels_serve()
{
    let kernel = kernel();
    for (index, name, local, remote, up) in [
        (7, "any", None, Some("198.51.100.7"), true),
        (8, "same", Some("192.0.2.1"), Some("198.51.100.8"), true),
        // The kernel prefers none of these to ours.
        (9, "another", Some("192.0.2.99"), Some("198.51.100.9"), true),
        (10, "down", None, Some("198.51.100.10"), false),
        (11, "tunl0", None, None, true),
    ] {
        let link = Link {
            index,
            name: name.to_owned(),
            mtu: 1400,
            tx_queue_len: 1000,
            up,
            makes_ipv6_addresses: false,
            tx_dropped: 0,
            mac: None,
            tunnel: Some(TunnelLink::Ipip(IpipLink {
                local: local.map(|ip| ip.parse().unwrap()),
                remote: remote.map(|ip| ip.parse().unwrap()),
                extras: false,
            })),
        };
        kernel.state().links.push(link);
    }
    let report = look(
        &kernel,
        &desired(IPIP, &[lease(2, "ipip"), lease(3, "host-gw")]),
    );
    let ips = |texts: &[&str]| texts.iter().map(|ip| ip.parse().unwrap()).collect();
    let pair = |n: u8| {
        let from = IpAddr::from([192, 0, 2, n]);
        (Origin::Datagram(from), net(&format!("198.18.{n}.0/24")))
    };
    let wanted = Senders {
        outer: ips(&["192.0.2.2", "192.0.2.3"]),
        inner: [pair(2), pair(3)].into(),
        own: ips(&["192.0.2.1"]),
        others: ips(&["198.51.100.7", "198.51.100.8"]),
        shared: false,
    };
    assert_eq!(report.senders, Some(wanted));
}

#[test]
fn cleanup_removes_what_is_marked_as_ours_and_flannels_devices_and_nothing_else() {
    let kernel = kernel();
    let all = || {
        let state = kernel.state();
        (state.links.clone(), state.routes.clone())
    };
    let before = all();
    look(
        &kernel,
        &desired(DIRECT, &[lease(2, "vxlan"), lease(3, "vxlan")]),
    );
    let (removed, errors) = run(remove(&kernel));
    assert!(errors.is_empty(), "{errors:?}");
    assert!(
        removed.contains(&"device flannel.1".to_owned()),
        "{removed:?}"
    );
    assert!(
        removed.contains(&"route 198.18.2.0/24".to_owned()),
        "{removed:?}"
    );
    assert_eq!(all(), before);
    assert_eq!(run(remove(&kernel)).0, Vec::<String>::new());
}

#[derive(Clone, Debug)]
enum Event {
    Peers(BTreeSet<u8>),
    PeerMoves(u8),
    Down(bool),
    RemoveDevice,
    RenameDevice,
    Flush(u8),
    Rewrite(u8),
    StrayForward(u8),
    StrayRoute(u8),
    WrongRoute(u8),
    /// The addresses and the MTU of the external interface become others.
    UnderlayChanges(u8, u32),
    /// Somebody flushes the routes that only probes take.
    FlushProbes,
    /// Probes find these ways past the tunnel to hold, and no others.
    Proven(BTreeSet<u8>),
    Look,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        proptest::collection::btree_set(2_u8..8, 0..6).prop_map(Event::Peers),
        (2_u8..8).prop_map(Event::PeerMoves),
        any::<bool>().prop_map(Event::Down),
        Just(Event::RemoveDevice),
        Just(Event::RenameDevice),
        (0_u8..4).prop_map(Event::Flush),
        any::<u8>().prop_map(Event::Rewrite),
        (2_u8..8).prop_map(Event::StrayForward),
        (2_u8..8).prop_map(Event::StrayRoute),
        (2_u8..8).prop_map(Event::WrongRoute),
        (200_u8..203, 1400_u32..1500).prop_map(|(n, mtu)| Event::UnderlayChanges(n, mtu)),
        Just(Event::FlushProbes),
        proptest::collection::btree_set(2_u8..8, 0..6).prop_map(Event::Proven),
        Just(Event::Look),
    ]
}

/// What a model run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Vxlan,
    Direct,
    HostGw,
    Ipip,
    IpipDirect,
    /// The best proven way past the kernel's device.
    Auto,
    /// Likewise past our own tunnel.
    AutoInUserSpace,
    InUserSpace,
}

/// What everything that is wanted follows from.
#[derive(Clone, Debug)]
struct World {
    kind: Kind,
    leases: Vec<Lease>,
    /// The last number of its addresses, and its MTU.
    external: (u8, u32),
    proven: BTreeSet<u8>,
}

impl World {
    fn lease(&self, n: u8) -> Lease {
        match self.kind {
            Kind::HostGw => lease(n, "host-gw"),
            Kind::Ipip | Kind::IpipDirect => lease(n, "ipip"),
            Kind::Vxlan | Kind::Direct | Kind::InUserSpace => lease(n, "vxlan"),
            // One says nothing of itself, and one is not on the link.
            Kind::Auto | Kind::AutoInUserSpace => match n % 10 {
                2 => lease(n, "vxlan"),
                3 => able(n, &format!("203.0.113.{n}")),
                _ => able(n, &format!("192.0.2.{n}")),
            },
        }
    }

    fn desired(&self) -> Desired {
        let config = config(match self.kind {
            Kind::Vxlan | Kind::InUserSpace => VXLAN,
            Kind::Direct => DIRECT,
            Kind::HostGw => HOST_GW,
            Kind::Ipip => IPIP,
            Kind::IpipDirect => IPIP_DIRECT,
            Kind::Auto | Kind::AutoInUserSpace => AUTO,
        });
        let (n, mtu) = self.external;
        let mut plan = Plan::new(&config, ends_at(&config, n, mtu)).unwrap();
        if let Plan::Vxlan(vxlan) = &mut plan {
            vxlan.set_past(crate::backend::vxlan::Past {
                probe_port: Some(18285),
                obstacle: None,
            });
            if matches!(self.kind, Kind::InUserSpace | Kind::AutoInUserSpace) {
                vxlan.move_to_user_space("a test".to_owned()).unwrap();
            }
        }
        let own: Subnets = OWN.parse().unwrap();
        let (mut desired, _) = plan.desired(&config, &own, self.leases.iter());
        for peer in &mut desired.peers {
            let nets = |n: &u8| lease(*n, "").subnets == peer.lease;
            peer.way.prove(self.proven.iter().any(nets));
        }
        desired.complete = true;
        desired.sweep_devices = true;
        desired
    }

    /// Who may send through the kernel's device, from the leases alone.
    fn senders(&self) -> Senders {
        let mut senders = Senders::default();
        if matches!(self.kind, Kind::Ipip | Kind::IpipDirect) {
            let own = format!("192.0.2.{}", self.external.0);
            senders.own.insert(own.parse().unwrap());
            for lease in &self.leases {
                let public = lease.attrs.public_ip.map(IpAddr::V4).unwrap();
                let net = lease.subnets.v4().map(IpNet::V4).unwrap();
                senders.outer.insert(public);
                senders.inner.insert((Origin::Datagram(public), net));
            }
        }
        if !matches!(self.kind, Kind::Vxlan | Kind::Direct | Kind::Auto) {
            return senders;
        }
        for lease in &self.leases {
            let attrs = &lease.attrs;
            let v4 = attrs.public_ip.map(IpAddr::V4);
            senders.outer.extend(v4);
            senders.outer.extend(attrs.public_ipv6.map(IpAddr::V6));
            for (data, net) in [
                (&attrs.backend_data, lease.subnets.v4().map(IpNet::V4)),
                (&attrs.backend_v6_data, lease.subnets.v6().map(IpNet::V6)),
            ] {
                let data: serde_json::Value =
                    serde_json::from_str(data.as_ref().unwrap().get()).unwrap();
                let mac = data["VtepMAC"].as_str().unwrap().parse().unwrap();
                senders.inner.insert((Origin::Frame(mac), net.unwrap()));
            }
        }
        senders
    }
}

fn happen(event: Event, kernel: &FakeKernel, world: &mut World) {
    let mut state = kernel.state();
    let device = state
        .links
        .iter()
        .find(|link| link.tunnel.is_some())
        .map(|link| link.index);
    match (event, device) {
        (Event::Peers(nodes), _) => {
            world.leases = nodes.into_iter().map(|n| world.lease(n)).collect();
        }
        (Event::PeerMoves(n), _) => {
            // Another node with the same subnet: address and MAC change.
            let subnets = world.lease(n).subnets;
            let other = world.lease(n + 100);
            for held in world.leases.iter_mut().filter(|it| it.subnets == subnets) {
                *held = Lease {
                    subnets,
                    ..other.clone()
                };
            }
        }
        (Event::UnderlayChanges(n, mtu), _) => world.external = (n, mtu),
        (Event::Proven(nodes), _) => world.proven = nodes,
        (Event::FlushProbes, _) => {
            state.probe_routes.clear();
            state.steered = (false, false);
        }
        (Event::Down(true), _) => {
            state.set_down(EXTERNAL);
            up(&mut state);
        }
        (Event::Down(false), Some(index)) => state.set_down(index),
        (Event::RemoveDevice, Some(index)) => state.remove_link(index),
        (Event::RenameDevice, Some(index)) => {
            state.link_mut(index).unwrap().name = format!("renamed{index}");
        }
        (Event::Flush(0), _) => state.routes.retain(|route| route.protocol == 2),
        (Event::Flush(1), _) => state.neighbours.clear(),
        (Event::Flush(2), _) => state.forwards.clear(),
        (Event::Flush(_), Some(index)) => state.addrs.retain(|(at, _)| *at != index),
        (Event::Rewrite(n), Some(index)) => {
            let link = state.link_mut(index).unwrap();
            link.mac = link.mac.map(|_| mac(8, n));
            link.mtu = 600 + u32::from(n);
        }
        (Event::StrayForward(n), Some(link)) => {
            let to = "192.0.2.222".parse().unwrap();
            state.forwards.push(Forward {
                link,
                mac: mac(4, n),
                to,
            });
            let ip = format!("198.18.{n}.0").parse().unwrap();
            state.neighbours.retain(|it| it.ip != ip);
            state.neighbours.push(Neighbour {
                link,
                ip,
                mac: mac(7, n),
            });
        }
        (Event::StrayRoute(n), _) => {
            let stray = format!("198.18.{}.0/24", n + 20);
            state
                .routes
                .push(route(&stray, EXTERNAL, Some("192.0.2.9"), PROTOCOL_LODEN));
        }
        (Event::WrongRoute(n), _) => {
            for (dst, via) in [
                (format!("198.18.{n}.0/24"), "192.0.2.9"),
                (format!("fd00:1:0:{n}::/64"), "2001:db8::9"),
            ]
            .into_iter()
            .take(if matches!(world.kind, Kind::Ipip | Kind::IpipDirect) {
                1
            } else {
                2
            }) {
                state.routes.retain(|it| it.net != net(&dst));
                let wrong = route(&dst, EXTERNAL, Some(via), PROTOCOL_LODEN);
                state.routes.push(wrong);
            }
        }
        _ => {}
    }
}

proptest! {
    /// Whatever was done to the kernel and to the peers, at most two looks later it is as on a fresh node: the
    /// second puts right what a change of the first has taken along.
    #[test]
    fn state_after_any_events_is_that_of_a_fresh_start(
        kind in prop_oneof![
            Just(Kind::Vxlan), Just(Kind::Direct), Just(Kind::HostGw), Just(Kind::Ipip), Just(Kind::IpipDirect),
            Just(Kind::Auto), Just(Kind::AutoInUserSpace), Just(Kind::InUserSpace)
        ],
        events in proptest::collection::vec(event(), 0..24)
    ) {
        let used = kernel();
        let mut world = World { kind, leases: Vec::new(), external: (1, 1500), proven: BTreeSet::new() };
        for event in events {
            let looks = matches!(event, Event::Look);
            happen(event, &used, &mut world);
            if looks {
                // A renamed device whose address was rewritten too is nobody's, which is an error.
                let _named = run(settle(&used, &world.desired()));
            }
        }
        let wanted = world.desired();
        let known: Vec<Option<Mac>> = wanted.devices.iter().map(|it| it.mac).collect();
        let strangers = {
            let state = used.state();
            let has_our_addr = |link: &Link| state.addrs.contains(&(link.index, net("198.18.1.0/32")));
            let stranger = |link: &Link| link.name.starts_with("renamed") && match link.tunnel {
                Some(TunnelLink::Vxlan(_)) => !known.contains(&link.mac),
                // One that is in nobody's way, since the address has moved on, is not found by it.
                Some(TunnelLink::Ipip(is)) => !has_our_addr(link)
                    || wanted.devices.iter().all(|it| it.tunnel != TunnelLink::Ipip(is)),
                None => false,
            };
            state.links.iter().any(stranger)
        };
        prop_assume!(!strangers);
        look(&used, &wanted);
        look(&used, &wanted);
        let fresh = kernel();
        look(&fresh, &wanted);
        prop_assert_eq!(overlay(&used), overlay(&fresh));
        prop_assert_eq!(used.state().steered, fresh.state().steered);
        let last = look(&used, &wanted);
        prop_assert_eq!(last.changed, Vec::<String>::new());
        prop_assert_eq!(last.senders, Some(world.senders()));
    }
}

#[test]
fn adopted_device_of_the_original_keeps_its_address_and_loses_its_stale_entries() {
    let kernel = kernel();
    let own: Subnets = OWN.parse().unwrap();
    let config = config(VXLAN);
    let Plan::Vxlan(mut plan) = Plan::new(&config, ends(&config)).unwrap() else {
        panic!("not vxlan")
    };
    let link = Link {
        index: 3,
        name: "flannel.1".to_owned(),
        mtu: 1450,
        tx_queue_len: 1000,
        up: true,
        makes_ipv6_addresses: true,
        tx_dropped: 0,
        mac: Some(mac(5, 5)),
        tunnel: Some(plan.devices(Some(&own))[0].tunnel),
    };
    plan.adopt_mac("flannel.1", &link);
    kernel.state().links.push(link);
    let stale = Forward {
        link: 3,
        mac: mac(4, 77),
        to: "192.0.2.77".parse().unwrap(),
    };
    kernel.state().forwards.push(stale);
    let (mut desired, _) = Plan::Vxlan(plan).desired(&config, &own, [lease(2, "vxlan")].iter());
    desired.complete = true;
    look(&kernel, &desired);
    let state = kernel.state();
    assert_eq!(
        state.links.iter().find(|link| link.index == 3).unwrap().mac,
        Some(mac(5, 5))
    );
    assert!(!state.forwards.contains(&stale));
}

/// A lease of a node that says what it can do.
fn able(n: u8, public: &str) -> Lease {
    let says = r#""Loden":{"Transports":["route","vxlan"],"ProbePort":18285}"#;
    let data = |family| format!(r#"{{"VNI":1,"VtepMAC":"{}",{says}}}"#, mac(family, n));
    let text = format!(
        r#"{{"PublicIP":"{public}","PublicIPv6":"2001:db8::{n}","BackendType":"vxlan","BackendData":{},"BackendV6Data":{}}}"#,
        data(4),
        data(6)
    );
    Lease {
        attrs: LeaseAttrs::parse(text.as_bytes()).unwrap(),
        ..lease(n, "vxlan")
    }
}

/// What is wanted where peers are reached by the best proven way, with what is proven.
fn wanted_by_auto(leases: &[Lease], in_user_space: bool, proven: &[&str]) -> Desired {
    let config = config(AUTO);
    let mut plan = Plan::new(&config, ends(&config)).unwrap();
    if let Plan::Vxlan(vxlan) = &mut plan {
        vxlan.set_past(crate::backend::vxlan::Past {
            probe_port: Some(18285),
            obstacle: None,
        });
        if in_user_space {
            vxlan.move_to_user_space("a test".to_owned()).unwrap();
        }
        let attrs = vxlan.attrs();
        let data = attrs.backend_data.unwrap();
        assert!(data.get().contains(r#""Transports":["route","vxlan"]"#));
    }
    let own: Subnets = OWN.parse().unwrap();
    let (mut desired, refused) = plan.desired(&config, &own, leases.iter());
    assert_eq!(refused, []);
    for peer in &mut desired.peers {
        let found = proven.iter().any(|it| net(it) == peer.net);
        peer.way.prove(found);
    }
    desired.complete = true;
    desired
}

#[test]
fn way_past_the_tunnel_is_only_for_probes_until_it_is_proven_and_never_for_who_says_nothing() {
    for in_user_space in [false, true] {
        let kernel = kernel();
        let tunnel = |lines: &BTreeSet<String>, n: u8| {
            let v4 = format!("route 198.18.{n}.0/24 Some(198.18.{n}.0) flannel.1 true 108");
            let entry = format!("neighbour 198.18.{n}.0 {} flannel.1", mac(4, n));
            lines.contains(&v4) && lines.contains(&entry)
        };
        let direct = |lines: &BTreeSet<String>, n: u8| {
            lines.contains(&format!(
                "route 198.18.{n}.0/24 Some(192.0.2.{n}) eth0 false 108"
            ))
        };
        let leases = [
            able(2, "192.0.2.2"),
            able(3, "203.0.113.3"),
            lease(4, "vxlan"),
        ];
        let probed = |kernel: &FakeKernel| -> BTreeSet<IpNet> {
            kernel
                .state()
                .probe_routes
                .iter()
                .map(|route| route.net)
                .collect()
        };
        let on_link = ["198.18.2.0/24", "fd00:1:0:2::/64", "fd00:1:0:3::/64"];
        let all: BTreeSet<IpNet> = on_link.iter().map(|it| net(it)).collect();

        // Not before it is proven: whatever is proven of those who cannot be probed is nothing.
        let report = look(
            &kernel,
            &wanted_by_auto(&leases, in_user_space, &["198.18.4.0/24"]),
        );
        assert_eq!(report.candidates.len(), 3, "{:?}", report.candidates);
        assert_eq!(report.distant, [net("198.18.3.0/24")].into());
        assert_eq!(
            (probed(&kernel), kernel.state().steered),
            (all.clone(), (true, true))
        );
        let before = overlay(&kernel);
        for n in [2, 3, 4] {
            assert!(
                !direct(&before, n) && tunnel(&before, n) != in_user_space,
                "{before:#?}"
            );
        }

        // A way that is proven but leads nowhere any more is none.
        let proven = ["198.18.2.0/24", "198.18.3.0/24"];
        let wanted = wanted_by_auto(&leases, in_user_space, &proven);
        let report = look(&kernel, &wanted);
        assert_eq!(report.direct, [net("198.18.2.0/24")].into());
        let lines = overlay(&kernel);
        assert!(direct(&lines, 2) && !tunnel(&lines, 2), "{lines:#?}");
        assert!(!direct(&lines, 3) && tunnel(&lines, 3) != in_user_space);
        assert_eq!(look(&kernel, &wanted).changed, Vec::<String>::new());

        // And back, to the letter.
        look(&kernel, &wanted_by_auto(&leases, in_user_space, &[]));
        assert_eq!(overlay(&kernel), before);

        // Probes' routes are ours alone: what is wrong there is put right, what is left over goes.
        kernel.state().probe_routes.pop();
        let stray = route("198.18.9.0/24", EXTERNAL, Some("192.0.2.9"), PROTOCOL_BOOT);
        kernel.state().probe_routes.push(stray);
        look(&kernel, &wanted_by_auto(&leases, in_user_space, &[]));
        assert_eq!(probed(&kernel), all);
        look(&kernel, &desired(VXLAN, &leases));
        assert_eq!(
            (probed(&kernel), kernel.state().steered),
            (BTreeSet::new(), (false, false))
        );
        assert!(tunnel(&overlay(&kernel), 2));
    }
}
