use proptest::prelude::*;

use super::*;
use crate::addr::Mtu;

fn parse(text: &str) -> NetworkConfig {
    NetworkConfig::parse(text.as_bytes()).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn refusal(text: &str) -> String {
    match NetworkConfig::parse(text.as_bytes()) {
        Ok(config) => panic!("{text} is accepted as {config:?}"),
        Err(error) => error.to_string(),
    }
}

/// `network first last` of the IPv4 pool.
fn v4(text: &str) -> String {
    let pool = parse(text).ipv4.unwrap();
    format!("{} {} {}", pool.network(), pool.first(), pool.last())
}

fn v6(text: &str) -> String {
    let pool = parse(text).ipv6.unwrap();
    format!("{} {} {}", pool.network(), pool.first(), pool.last())
}

#[test]
fn the_examples_of_the_specification_come_out_as_written_there() {
    assert_eq!(
        v4(r#"{"network":"10.3.0.0/16"}"#),
        "10.3.0.0/16 10.3.1.0/24 10.3.255.0/24"
    );
    let only_v6 = r#"{"enableIPv6":true,"ipv6Network":"fc00::/48","enableIPv4":false}"#;
    assert_eq!(v6(only_v6), "fc00::/48 fc00:0:0:1::/64 fc00:0:0:ffff::/64");
    assert_eq!(parse(only_v6).ipv4, None);
}

#[test]
fn lengths_and_bounds_are_derived_as_flannel_does() {
    for (text, expected) in [
        // At most 22: 24. Longer: plus 2. Host bits are masked off.
        (
            r#"{"Network":"10.0.0.0/8"}"#,
            "10.0.0.0/8 10.0.1.0/24 10.255.255.0/24",
        ),
        (
            r#"{"Network":"10.9.5.7/22"}"#,
            "10.9.4.0/22 10.9.5.0/24 10.9.7.0/24",
        ),
        (
            r#"{"Network":"10.9.4.0/23"}"#,
            "10.9.4.0/23 10.9.4.128/25 10.9.5.128/25",
        ),
        (
            r#"{"Network":"10.9.4.0/28"}"#,
            "10.9.4.0/28 10.9.4.4/30 10.9.4.12/30",
        ),
        (
            r#"{"Network":"10.9.4.0/24","SubnetLen":26}"#,
            "10.9.4.0/24 10.9.4.64/26 10.9.4.192/26",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetMin":"10.9.0.0","SubnetMax":"10.9.4.0"}"#,
            "10.9.0.0/16 10.9.0.0/24 10.9.4.0/24",
        ),
        // Zero values and null mean "not given".
        (
            r#"{"Network":"10.9.0.0/16","SubnetMin":"0.0.0.0","SubnetLen":0,"EnableIPv4":null}"#,
            "10.9.0.0/16 10.9.1.0/24 10.9.255.0/24",
        ),
        // The last of several wins, whatever the case.
        (
            r#"{"NETWORK":"10.1.0.0/16","Network":"10.2.0.0/16","network":"10.3.0.0/16"}"#,
            "10.3.0.0/16 10.3.1.0/24 10.3.255.0/24",
        ),
        (
            r#"{"Network":"255.255.0.0/16"}"#,
            "255.255.0.0/16 255.255.1.0/24 255.255.255.0/24",
        ),
    ] {
        assert_eq!(v4(text), expected, "{text}");
    }
    for (text, expected) in [
        (
            r#""IPv6Network":"fd00::/62""#,
            "fd00::/62 fd00:0:0:1::/64 fd00:0:0:3::/64",
        ),
        (
            r#""IPv6Network":"fd00::/63""#,
            "fd00::/63 fd00::8000:0:0:0/65 fd00:0:0:1:8000::/65",
        ),
        (
            r#""IPv6Network":"fd00::5/124""#,
            "fd00::/124 fd00::4/126 fd00::c/126",
        ),
        (
            r#""IPv6Network":"fd00::/48","IPv6SubnetMin":null,"IPv6SubnetMax":"fd00:0:0:9::""#,
            "fd00::/48 fd00:0:0:1::/64 fd00:0:0:9::/64",
        ),
        (
            r#""IPv6Network":"fd00::/48","IPv6SubnetMin":"::","IPv6SubnetLen":56"#,
            "fd00::/48 fd00:0:0:100::/56 fd00:0:0:ff00::/56",
        ),
    ] {
        let text = format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,{text}}}"#);
        assert_eq!(v6(&text), expected, "{text}");
    }
}

#[test]
fn what_is_wrong_is_refused_by_the_name_of_its_key() {
    for (text, named) in [
        ("{}", "please define Network"),
        (r#"{"Network":"0.0.0.0/0"}"#, "please define Network"),
        (r#"{"Network":null}"#, "Network: expected an IPv4 network"),
        (
            r#"{"Network":"fd00::/48"}"#,
            "Network: expected an IPv4 network",
        ),
        (
            r#"{"Network":"10.9.0.0"}"#,
            "Network: expected an IPv4 network",
        ),
        (
            r#"{"Network":"10.9.0.0/33"}"#,
            "Network: expected an IPv4 network",
        ),
        (r#"{"Network":10}"#, "Network: expected an IPv4 network"),
        (
            r#"{"Network":"10.9.0.0/29"}"#,
            "Network 10.9.0.0/29 is too small",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetLen":31}"#,
            "SubnetLen 31 does not fit",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetLen":17}"#,
            "use 18 to 30",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetLen":4294967320}"#,
            "SubnetLen 4294967320",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetLen":-1}"#,
            "SubnetLen: expected",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetLen":24.0}"#,
            "SubnetLen: expected",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetMin":"10.8.0.0"}"#,
            "SubnetMin 10.8.0.0 is not in",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetMax":"10.10.0.0"}"#,
            "SubnetMax 10.10.0.0 is not in",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetMin":"10.9.1.4"}"#,
            "use 10.9.1.0",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetMax":"10.9.1.4"}"#,
            "SubnetMax 10.9.1.4 is not on",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetMin":"fd00::"}"#,
            "SubnetMin: expected",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetMin":null}"#,
            "SubnetMin: expected",
        ),
        (
            r#"{"Network":"10.9.0.0/16","SubnetMin":"10.9.9.0","SubnetMax":"10.9.8.0"}"#,
            "SubnetMin 10.9.9.0 is above SubnetMax 10.9.8.0",
        ),
        // Above the derived maximum, too.
        (
            r#"{"Network":"10.9.0.0/16","SubnetMax":"10.9.0.0"}"#,
            "SubnetMin 10.9.1.0 is above",
        ),
        (
            r#"{"EnableIPv4":false}"#,
            "EnableIPv4 and EnableIPv6 are both false",
        ),
        (
            r#"{"EnableIPv4":"false"}"#,
            "EnableIPv4: expected true or false",
        ),
        (
            r#"{"Network":"10.9.0.0/16","EnableIPv6":true}"#,
            "please define IPv6Network",
        ),
        // Even of a family that is off.
        (
            r#"{"Network":"10.9.0.0/16","IPv6Network":"::ffff:10.9.0.0/112"}"#,
            "IPv6Network: expected",
        ),
        (
            r#"{"Network":"10.9.0.0/16","IPv6Network":"10.8.0.0/16"}"#,
            "IPv6Network: expected",
        ),
        (
            r#"{"Network":"10.9.0.0/16","EnableNFTables":1}"#,
            "EnableNFTables: expected",
        ),
        (r#"{"Network":"10.9.0.0/16"}x"#, "not one JSON object"),
        ("null", "not one JSON object"),
        ("", "not one JSON object"),
    ] {
        let error = refusal(text);
        assert!(error.contains(named), "{text}: {error}");
    }
    let long = format!(
        "{{\"Network\":\"10.9.0.0/16\"}}{}",
        " ".repeat(MAX_CONFIG_LEN)
    );
    assert!(refusal(&long).contains("at most 65536"));
}

#[test]
fn no_backend_is_flannels_udp_and_says_so() {
    let config = parse(r#"{"Network":"10.9.0.0/16"}"#);
    assert!(config.backend_defaulted);
    let udp = UdpBackend {
        port: 8285,
        mtu: None,
        source_port: SourcePort::Spread,
        source_check: SourceCheck::Strict,
    };
    assert_eq!(config.backend, Backend::Udp(udp));
}

#[test]
fn vxlan_and_host_gw_are_read_with_flannels_defaults_and_unknown_keys_are_told() {
    let read = |backend: &str| {
        parse(&format!(
            r#"{{"Network":"10.9.0.0/16","Backend":{backend}}}"#
        ))
    };
    let defaults = VxlanBackend {
        vni: 1,
        port: 8472,
        mtu: None,
        gbp: false,
        learning: false,
        direct_routing: false,
        source_check: Some(SourceCheck::Strict),
        auto: false,
    };
    for text in [
        r#"{"Type":"VXLAN"}"#,
        r#"{"type":"vxlan","PORT":0,"Mtu":0,"gbp":false}"#,
    ] {
        assert_eq!(
            read(text).backend,
            Backend::Vxlan(defaults.clone()),
            "{text}"
        );
    }
    let all = read(
        r#"{"Type":"vxlan","vni":9999999,"Port":4789,"MTU":1400,"GBP":true,"Learning":true,"DirectRouting":true,"SourceCheck":"off","Auto":true,"MacPrefix":"0E-2A","Name":"n","SourcePort":"x"}"#,
    );
    let expected = VxlanBackend {
        vni: 9_999_999,
        port: 4789,
        mtu: Mtu::new(1400),
        gbp: true,
        learning: true,
        direct_routing: true,
        source_check: None,
        auto: true,
    };
    assert_eq!(all.backend, Backend::Vxlan(expected));
    assert_eq!(all.unknown_keys, ["Backend.SourcePort"]);
    let auto = VxlanBackend {
        auto: true,
        ..defaults
    };
    for text in [
        r#"{"Type":"auto"}"#,
        r#"{"Type":"Auto","Auto":false}"#,
        r#"{"Type":"vxlan","auto":true}"#,
    ] {
        assert_eq!(read(text).backend, Backend::Vxlan(auto.clone()), "{text}");
    }
    for name in ["udp", "host-gw"] {
        let text =
            format!(r#"{{"Network":"10.9.0.0/16","Backend":{{"Type":"{name}","Auto":true}}}}"#);
        let refused = refusal(&text);
        assert!(
            refused.contains("Backend.Auto: expected false"),
            "{refused}"
        );
    }
    let host_gw = read(r#"{"Type":"host-gw","VNI":1}"#);
    assert_eq!(host_gw.backend, Backend::HostGw);
    assert_eq!(host_gw.unknown_keys, ["Backend.VNI"]);
    let ipip = read(r#"{"type":"IPIP","directrouting":true,"Port":1}"#);
    let strict = IpipBackend {
        direct_routing: true,
        source_check: Some(SourceCheck::Strict),
    };
    assert_eq!(ipip.backend, Backend::Ipip(strict));
    for (text, source_check) in [("loose", Some(SourceCheck::Loose)), ("off", None)] {
        let text = format!(r#"{{"Type":"ipip","DirectRouting":true,"SourceCheck":"{text}"}}"#);
        let wanted = IpipBackend {
            source_check,
            ..strict
        };
        assert_eq!(read(&text).backend, Backend::Ipip(wanted));
    }
    assert_eq!(ipip.unknown_keys, ["Backend.Port"]);
    for v4 in ["true", "false"] {
        let v6 = format!(
            r#"{{"EnableIPv4":{v4},"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{{"Type":"ipip"}}}}"#
        );
        let why = refusal(&v6);
        assert!(
            why.contains("EnableIPv6 is true") && why.contains("\"ipip\" carries IPv4 only"),
            "{why}"
        );
    }
    let v6 = r#"{"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan","VNI":10000}}"#;
    assert!(refusal(v6).contains("Backend.VNI 10000"), "{}", refusal(v6));
}

#[test]
fn backends_are_read_typed_or_refused_by_name() {
    let backend = |text: &str| format!(r#"{{"Network":"10.9.0.0/16","backend":{text}}}"#);
    let config = parse(&backend(
        r#"{"type":"UDP","port":7,"mtu":1400,"SourcePort":"fixed","SourceCheck":"loose"}"#,
    ));
    assert!(!config.backend_defaulted);
    let udp = UdpBackend {
        port: 7,
        mtu: Mtu::new(1400),
        source_port: SourcePort::Fixed,
        source_check: SourceCheck::Loose,
    };
    assert_eq!(config.backend, Backend::Udp(udp));
    for (text, named) in [
        ("null", "unknown backend type \"\""),
        ("{}", "unknown backend type \"\""),
        (r#"{"Type":null}"#, "unknown backend type \"\""),
        (
            r#"{"Type":"quic"}"#,
            "use one of udp, vxlan, host-gw, ipip, auto, alloc, extension, wireguard",
        ),
        (r#"{"Type":"VXLAN","VNI":-1}"#, "Backend.VNI: expected"),
        (r#"{"Type":"vxlan","VNI":16777215}"#, "from 0 to 9999999"),
        (r#"{"Type":"vxlan","Port":65536}"#, "Backend.Port: expected"),
        (r#"{"Type":"vxlan","GBP":1}"#, "Backend.GBP: expected"),
        (r#"{"Type":"vxlan","Learning":"yes"}"#, "Backend.Learning:"),
        (
            r#"{"Type":"vxlan","DirectRouting":0}"#,
            "Backend.DirectRouting:",
        ),
        (r#"{"Type":"vxlan","MTU":-1}"#, "Backend.MTU: expected"),
        (
            r#"{"Type":"ipip","DirectRouting":1}"#,
            "Backend.DirectRouting:",
        ),
        (r#"{"Type":"ipip","Auto":true}"#, "Backend.Auto:"),
        (r#"{"Type":"IPsec"}"#, "\"ipsec\" is not available yet"),
        (
            r#"{"Type":"tencent-vpc"}"#,
            "\"tencent-vpc\" is not available yet",
        ),
        (r#"{"Type":7}"#, "Backend.Type: expected"),
        (r#""udp""#, "Backend."),
        (
            r#"{"Type":"udp","Port":0}"#,
            "Backend.Port: expected a UDP port",
        ),
        (r#"{"Type":"udp","Port":65536}"#, "found 65536"),
        (r#"{"Type":"udp","Port":-1}"#, "found -1"),
        (r#"{"Type":"udp","Port":"8285"}"#, "Backend.Port: expected"),
        (r#"{"Type":"udp","MTU":67}"#, "Backend.MTU: expected"),
        (
            r#"{"Type":"udp","SourcePort":"random"}"#,
            "Backend.SourcePort: expected \"spread\"",
        ),
        (
            r#"{"Type":"udp","SourceCheck":"off"}"#,
            "Backend.SourceCheck: expected \"strict\"",
        ),
    ] {
        let error = refusal(&backend(text));
        assert!(error.contains(named), "{text}: {error}");
    }
}

#[test]
fn unknown_keys_are_collected_once_each() {
    let config = parse(
        r#"{"Network":"10.9.0.0/16","Subnetlen":24,"SubnetLength":24,"SubnetLength":25,
            "Backend":{"Type":"udp","VNI":1}}"#,
    );
    assert_eq!(config.unknown_keys, ["SubnetLength", "Backend.VNI"]);
}

/// The derivation written down once more, as loops over bits rather than as arithmetic on sizes.
fn oracle_bounds(base: u32, network_len: u8, subnet_len: u8) -> (u32, u32) {
    let (mut first, mut last) = (base, base);
    for bit in network_len..subnet_len {
        last |= 1 << (31 - bit);
    }
    first |= 1 << (32 - subnet_len);
    (first, last)
}

proptest! {
    #[test]
    fn derived_bounds_are_the_second_and_the_last_subnet(
        addr in any::<u32>(), network_len in 1u8..=28, extra in proptest::option::of(2u8..20),
    ) {
        let network = Ipv4Net::new(addr.into(), network_len).unwrap();
        let given = extra.map(|extra| network_len + extra).filter(|&len| len <= 30);
        let text = given.map_or_else(
            || format!(r#"{{"Network":"{network}"}}"#),
            |len| format!(r#"{{"Network":"{network}","SubnetLen":{len}}}"#),
        );
        let pool = parse(&text).ipv4.unwrap();
        let len = given.unwrap_or(if network_len <= 22 { 24 } else { network_len + 2 });
        let (first, last) = oracle_bounds(network.network().into(), network_len, len);
        prop_assert_eq!(pool.first(), Ipv4Net::new(first.into(), len).unwrap());
        prop_assert_eq!(pool.last(), Ipv4Net::new(last.into(), len).unwrap());
    }

    #[test]
    fn ipv6_bounds_lie_in_the_network_and_are_aligned(
        addr in any::<u128>(), network_len in 1u8..=124, extra in proptest::option::of(2u8..70),
    ) {
        let network = Ipv6Net::new(addr.into(), network_len).unwrap();
        let given = extra.map(|extra| network_len.saturating_add(extra)).filter(|&len| len <= 126);
        let len = given.map_or_else(String::new, |len| format!(r#","IPv6SubnetLen":{len}"#));
        let text = format!(
            r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}"{len}}}"#
        );
        let pool = parse(&text).ipv6.unwrap();
        for bound in [pool.first(), pool.last()] {
            prop_assert!(network.trunc().contains(&bound), "{} {}", network, bound);
            prop_assert_eq!(bound.trunc(), bound);
            prop_assert_eq!(bound.prefix_len(), pool.subnet_len());
        }
        prop_assert!(pool.first() < pool.last());
        prop_assert!(pool.contains(&pool.first()) && pool.contains(&pool.last()));
    }

    #[test]
    fn no_document_panics(text in ".{0,200}") {
        let _outcome = NetworkConfig::parse(text.as_bytes());
    }
}
