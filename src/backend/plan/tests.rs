//! What a backend is on a node, from the configuration's text and interfaces to the lease's bytes.

use super::*;
use crate::backend::ends::search;
use crate::backend::kernel::TunnelLink;
use crate::iface::{Address, DefaultRoute, Link, Selector, Snapshot, Wanted};
use crate::lease::LeaseExtension;

const DUAL: &str = r#""Network":"198.18.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48""#;
const V4: &str = r#""Network":"198.18.0.0/16""#;
const V6: &str = r#""EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:1::/48""#;

fn config(network: &str, backend: &str) -> NetworkConfig {
    let text = format!(r#"{{{network},"Backend":{backend}}}"#);
    NetworkConfig::parse(text.as_bytes()).unwrap()
}

/// eth0 with both families and the default route; eth1 with IPv4 only.
fn snapshot() -> Snapshot {
    let link = |index, name: &str, ips: &[&str]| Link {
        index,
        name: name.to_owned(),
        mtu: 1500,
        addrs: ips
            .iter()
            .map(|ip| Address {
                ip: ip.parse().unwrap(),
                permanent: true,
                temporary: false,
                deprecated: false,
                unverified: false,
            })
            .collect(),
    };
    Snapshot {
        links: vec![
            link(2, "eth0", &["192.0.2.1", "2001:db8::1", "2001:db8::2"]),
            link(3, "eth1", &["198.51.100.1"]),
        ],
        default_routes: vec![DefaultRoute {
            family: Family::V4,
            link: Some(2),
        }],
        reach: Vec::new(),
    }
}

fn wanted(interface: Option<&str>) -> Wanted {
    Wanted {
        selectors: interface.map(Selector::parse).into_iter().collect(),
        ..Wanted::default()
    }
}

fn addrs(wanted: &Wanted, config: &NetworkConfig) -> Result<Vec<String>, NoInterface> {
    let ends = search(&snapshot(), wanted, config).ends?;
    Ok(ends.iter().map(|end| end.addr.to_string()).collect())
}

#[test]
fn ends_are_one_per_family_of_the_overlay_on_one_interface() {
    let vxlan = r#"{"Type":"vxlan"}"#;
    for (network, interface, expected) in [
        (V4, None, vec!["192.0.2.1"]),
        (V6, Some("eth0"), vec!["2001:db8::1"]),
        (DUAL, None, vec!["192.0.2.1", "2001:db8::1"]),
        (DUAL, Some("eth0"), vec!["192.0.2.1", "2001:db8::1"]),
        // An address of either family names the interface for both.
        (DUAL, Some("2001:db8::2"), vec!["192.0.2.1", "2001:db8::2"]),
        (DUAL, Some("192.0.2.1"), vec!["192.0.2.1", "2001:db8::1"]),
    ] {
        let found = addrs(&wanted(interface), &config(network, vxlan)).unwrap();
        assert_eq!(found, expected, "{network} {interface:?}");
    }
    let error = addrs(&wanted(Some("eth1")), &config(DUAL, vxlan)).unwrap_err();
    assert!(error.to_string().contains("IPv6"), "{error}");
    let udp = config(DUAL, r#"{"Type":"udp"}"#);
    assert_eq!(
        addrs(&wanted(Some("eth1")), &udp).unwrap(),
        ["198.51.100.1"]
    );
}

fn plan(network: &str, backend: &str, wanted: &Wanted) -> Result<Plan, PlanError> {
    let config = config(network, backend);
    Plan::new(&config, search(&snapshot(), wanted, &config).ends.unwrap())
}

#[test]
fn mtu_is_what_the_outer_headers_of_every_family_leave() {
    for (network, backend, expected) in [
        (V4, r#"{"Type":"vxlan"}"#, 1450),
        (V6, r#"{"Type":"vxlan"}"#, 1430),
        (DUAL, r#"{"Type":"vxlan"}"#, 1430),
        (V4, r#"{"Type":"vxlan","MTU":1400}"#, 1350),
        (V4, r#"{"Type":"vxlan","MTU":9000}"#, 1450),
        (DUAL, r#"{"Type":"host-gw"}"#, 1500),
    ] {
        let plan = plan(network, backend, &wanted(Some("eth0"))).unwrap();
        assert_eq!(plan.mtu().get(), expected, "{network} {backend}");
    }
    let small = plan(DUAL, r#"{"Type":"vxlan","MTU":1300}"#, &wanted(None)).unwrap_err();
    assert!(small.to_string().contains("1280"), "{small}");
}

#[test]
fn leases_are_the_originals_to_the_byte_and_a_mac_address_lasts() {
    let attrs = |network, backend| {
        plan(network, backend, &wanted(Some("eth0")))
            .unwrap()
            .attrs()
    };
    assert_eq!(
        attrs(DUAL, r#"{"Type":"host-gw"}"#).to_json(),
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"host-gw"}"#
    );
    let vxlan = attrs(DUAL, r#"{"Type":"vxlan","VNI":7}"#);
    let mac = |data: &Option<crate::lease::BackendData>| {
        let text = data.as_ref().unwrap().get().to_owned();
        let mac = text.strip_prefix(r#"{"VNI":7,"VtepMAC":""#).unwrap();
        mac.strip_suffix(r#""}"#).unwrap().to_owned()
    };
    let macs = [mac(&vxlan.backend_data), mac(&vxlan.backend_v6_data)];
    assert_ne!(macs[0], macs[1]);
    assert!(
        macs.iter()
            .all(|mac| mac.parse::<crate::addr::Mac>().is_ok())
    );
    assert_eq!(attrs(DUAL, r#"{"Type":"vxlan","VNI":7}"#), vxlan);
    let elsewhere = plan(V4, r#"{"Type":"vxlan","VNI":7}"#, &wanted(Some("eth1"))).unwrap();
    assert_ne!(mac(&elsewhere.attrs().backend_data), macs[0]);
}

#[test]
fn host_gw_behind_nat_is_refused_with_both_addresses() {
    let nat = Wanted {
        public_ip: Some("203.0.113.7".parse().unwrap()),
        ..wanted(Some("eth0"))
    };
    let error = plan(V4, r#"{"Type":"host-gw"}"#, &nat)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("203.0.113.7") && error.contains("192.0.2.1"),
        "{error}"
    );
    // The device sends from what the interface has.
    let Plan::Vxlan(vxlan) = plan(V4, r#"{"Type":"vxlan"}"#, &nat).unwrap() else {
        panic!("not vxlan")
    };
    let TunnelLink::Vxlan(device) = vxlan.devices(None)[0].tunnel else {
        panic!("not vxlan")
    };
    assert_eq!(device.local, Some("192.0.2.1".parse().unwrap()));
    let Plan::Ipip(ipip) = plan(V4, r#"{"Type":"ipip"}"#, &nat).unwrap() else {
        panic!("not ipip")
    };
    let TunnelLink::Ipip(device) = ipip.device(None).tunnel else {
        panic!("not ipip")
    };
    assert_eq!(device.local, Some("192.0.2.1".parse().unwrap()));
    assert_eq!(
        ipip.attrs().to_json(),
        r#"{"PublicIP":"203.0.113.7","PublicIPv6":null,"BackendType":"ipip"}"#
    );
    assert_eq!(vxlan.attrs().public_ip, nat.public_ip);
}

#[test]
fn leases_that_lack_something_are_refused_by_what_they_lack() {
    let Ok(plan) = plan(V4, r#"{"Type":"vxlan"}"#, &wanted(None)) else {
        panic!("no plan")
    };
    let own = "198.18.1.0-24".parse().unwrap();
    let why = |attrs: &str| {
        let lease = Lease {
            subnets: "198.18.2.0-24".parse().unwrap(),
            attrs: LeaseAttrs::parse(attrs.as_bytes()).unwrap(),
            expires: None,
            extension: LeaseExtension::default(),
        };
        let config = config(V4, r#"{"Type":"vxlan"}"#);
        let (desired, refused) = plan.desired(&config, &own, [lease].iter());
        assert!(desired.peers.is_empty(), "{attrs}");
        refused[0].why.clone()
    };
    for (attrs, named) in [
        (
            r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan"}"#,
            "no BackendData",
        ),
        (
            r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":7}"#,
            "BackendData:",
        ),
        (
            r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1}}"#,
            "no VtepMAC",
        ),
        (
            r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VtepMAC":"01:00:5e:00:00:01"}}"#,
            "VtepMAC",
        ),
        (
            r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::9","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:01"}}"#,
            "no IPv4 address",
        ),
        (
            r#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#,
            "uses the host-gw backend",
        ),
        (
            r#"{"PublicIP":"192.0.2.2","BackendType":"ipip"}"#,
            "what the kernel has for it stays",
        ),
        (r#"{"PublicIP":"192.0.2.2"}"#, "uses the udp backend"),
        (r#"{"PublicIP":"192.0.2.2"}"#, "there is no way to it"),
    ] {
        let why = why(attrs);
        assert!(why.contains(named), "{attrs}: {why}");
    }
}

#[test]
fn leases_of_another_backend_are_told_and_get_no_route_of_ours() {
    let own = "198.18.1.0-24".parse().unwrap();
    let lease = |backend: &str| {
        let attrs = format!(r#"{{"PublicIP":"192.0.2.2","BackendType":"{backend}"}}"#);
        Lease {
            subnets: "198.18.2.0-24".parse().unwrap(),
            attrs: LeaseAttrs::parse(attrs.as_bytes()).unwrap(),
            expires: None,
            extension: LeaseExtension::default(),
        }
    };
    let told = |ours: &str, theirs: &str| {
        let text = format!(r#"{{"Type":"{ours}"}}"#);
        let plan = plan(V4, &text, &wanted(None)).unwrap();
        let leases = [lease(theirs)];
        let (_, refused) = plan.desired(&config(V4, &text), &own, leases.iter());
        let (routes, _) = plan.routes(leases.iter());
        (refused.first().map(|it| it.why.clone()), routes.len())
    };
    let (why, routes) = told("udp", "vxlan");
    let why = why.unwrap();
    assert!(
        why.contains("it uses the vxlan backend and this node udp: there is no way to it"),
        "{why}"
    );
    assert_eq!(routes, 0);
    assert_eq!(told("udp", ""), (None, 1));
    for theirs in ["udp", "vxlan", ""] {
        assert_eq!(told("alloc", theirs), (None, 0));
    }
    let (why, _) = told("extension", "ipip");
    assert!(why.unwrap().contains("there is no way to it"));
    let (why, _) = told("ipip", "host-gw");
    assert!(why.unwrap().contains("what the kernel has for it stays"));
}
