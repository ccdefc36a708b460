//! What the daemon reads from and writes to the real kernel over netlink, checked against iproute2. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/ns.rs"]
mod ns;

use std::net::UdpSocket;
use std::time::Duration;

use ipnet::IpNet;
use loden::addr::Mtu;
use loden::backend::kernel::{Change, Kernel, LinkChange, PROTOCOL_BOOT, Route};
use loden::backend::reconcile::{Desired, Outcome, reconcile};
use loden::iface::{Family, Selector, Stack, Wanted, choose};
use loden::lab::{Interrupt, wait};
use loden::netlink::Netlink;
use ns::Ns;

/// Only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(60);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn route(dst: &str, link: u32) -> Route {
    Route {
        net: net(dst),
        link,
        gateway: None,
        onlink: false,
        metric: None,
        protocol: PROTOCOL_BOOT,
    }
}

#[test]
fn links_addresses_and_default_routes_are_read_as_iproute2_shows_them() {
    let ns = Ns::new();
    ns.ip("addr add 192.0.2.2/24 dev eth0");
    ns.ip("addr add 198.51.100.1 peer 198.51.100.2/32 dev far");
    ns.ip("addr add 2001:db8::2/64 dev eth0 nodad preferred_lft 0");
    ns.ip("addr add 2001:db8::3/64 dev eth0 nodad valid_lft 1000 preferred_lft 500");
    ns.ip("link set far mtu 1400");
    ns.ip("route add default via 192.0.2.254 metric 100");
    ns.ip("route add default dev far metric 50");
    ns.ip("-6 route add default via 2001:db8::fe");
    ns.ip("route add default dev eth0 table 77");
    ns.ip("route add unreachable default metric 1");
    // Link-local addresses come, and are verified, in their own time: compared with what was shown before and after.
    let shown = || {
        let mut shown = ns.json("addr show");
        let infos = shown
            .iter_mut()
            .filter_map(|link| link["addr_info"].as_array_mut());
        for info in infos.flatten() {
            for passing in ["valid_life_time", "preferred_life_time"] {
                info[passing].take();
            }
        }
        shown
    };
    let (snapshot, shown) = wait::until("a moment of rest", LIMIT, &Interrupt::default(), || {
        let before = shown();
        let snapshot =
            ns.block_on(|| async { Netlink::connect().unwrap().snapshot().await.unwrap() });
        Ok((shown() == before).then_some((snapshot, before)))
    })
    .unwrap();
    assert_eq!(snapshot.links.len(), shown.len());
    for (link, shown) in snapshot.links.iter().zip(&shown) {
        assert_eq!(link.name, shown["ifname"].as_str().unwrap());
        assert_eq!(u64::from(link.index), shown["ifindex"].as_u64().unwrap());
        assert_eq!(u64::from(link.mtu), shown["mtu"].as_u64().unwrap());
        let infos = shown["addr_info"].as_array().unwrap();
        assert_eq!(link.addrs.len(), infos.len(), "{}", link.name);
        for (addr, info) in link.addrs.iter().zip(infos) {
            assert_eq!(addr.ip.to_string(), info["local"].as_str().unwrap());
            let flag = |name: &str| info[name] == true;
            assert_eq!(addr.deprecated, flag("deprecated"), "{}", addr.ip);
            assert_eq!(addr.permanent, !flag("dynamic"), "{}", addr.ip);
            assert_eq!(addr.unverified, flag("tentative"), "{}", addr.ip);
        }
    }
    let of = |family| {
        let routes = snapshot.default_routes.iter();
        let links = routes.filter(move |route| route.family == family);
        links.map(|route| route.link).collect::<Vec<_>>()
    };
    let (eth0, far) = (ns.index("eth0"), ns.index("far"));
    assert_eq!(of(Family::V4), [Some(far), Some(eth0)]);
    assert_eq!(of(Family::V6), [Some(eth0)]);

    let wanted = Wanted {
        selectors: vec![Selector::parse("eth0")],
        ..Wanted::default()
    };
    let choice = choose(&snapshot, &wanted, Stack::V6).choice.unwrap();
    assert_eq!(choice.addr.to_string(), "2001:db8::1");
    let by_route = choose(&snapshot, &Wanted::default(), Stack::V4)
        .choice
        .unwrap();
    assert_eq!((&*by_route.name, by_route.mtu.get()), ("far", 1400));
}

#[test]
fn next_hops_of_a_multipath_default_route_count_in_order() {
    let ns = Ns::new();
    ns.ip("addr add 198.51.100.1/24 dev far");
    ns.ip("route add default nexthop via 198.51.100.254 nexthop via 192.0.2.254");
    let choice = ns.block_on(|| async {
        let snapshot = Netlink::connect().unwrap().snapshot().await.unwrap();
        choose(&snapshot, &Wanted::default(), Stack::V4).choice
    });
    assert_eq!(choice.unwrap().name, "far");
}

#[test]
fn link_is_found_by_name_and_number_and_absence_is_no_error() {
    let ns = Ns::new();
    let index = ns.index("eth0");
    let (by_name, by_index, absent) = ns.block_on(|| async {
        let kernel = Netlink::connect().unwrap();
        (
            kernel.link("eth0").await.unwrap(),
            kernel.link_at(index).await.unwrap(),
            [
                kernel.link("eth9").await.unwrap(),
                kernel.link("a-name-that-is-too-long").await.unwrap(),
                kernel.link_at(9999).await.unwrap(),
            ],
        )
    });
    assert_eq!(by_name, by_index);
    let link = by_name.unwrap();
    assert!(link.up && link.makes_ipv6_addresses);
    let shown = ns.link("eth0");
    assert_eq!(
        u64::from(link.tx_queue_len),
        shown["txqlen"].as_u64().unwrap()
    );
    assert_eq!(absent, [None, None, None]);
}

#[test]
fn what_is_set_is_what_iproute2_shows_and_may_be_set_twice() {
    let ns = Ns::new();
    ns.ip("link set eth0 down");
    let index = ns.index("eth0");
    ns.block_on(|| async {
        let kernel = Netlink::connect().unwrap();
        for _ in 0..2 {
            let change = LinkChange {
                mtu: Mtu::new(1400),
                tx_queue_len: Some(77),
                up: true,
                ..LinkChange::default()
            };
            kernel.set_link(index, change).await.unwrap();
            for addr in ["198.18.3.0/32", "fd00:1:0:3::/128"] {
                kernel.add_address(index, net(addr)).await.unwrap();
            }
            for dst in ["198.18.0.0/16", "fd00:1::/48"] {
                kernel.add_route(route(dst, index)).await.unwrap();
            }
        }
    });
    let shown = ns.link("eth0");
    assert_eq!(
        (&shown["mtu"], &shown["txqlen"]),
        (&1400.into(), &77.into())
    );
    let flags = shown["flags"].as_array().unwrap();
    assert!(flags.contains(&"UP".into()));
    let addrs = ns.addrs("eth0");
    assert!(addrs.contains(&"198.18.3.0/32".to_owned()), "{addrs:?}");
    assert!(addrs.contains(&"fd00:1:0:3::/128".to_owned()), "{addrs:?}");
    for (family, dst) in [("-4", "198.18.0.0/16"), ("-6", "fd00:1::/48")] {
        let routes = ns.json(&format!("{family} route show {dst} dev eth0"));
        assert_eq!(routes.len(), 1, "{dst}");
        assert_eq!(routes[0]["protocol"], "boot");
        assert_eq!(routes[0]["scope"], "global");
    }

    ns.block_on(|| async {
        let kernel = Netlink::connect().unwrap();
        let routes = kernel.routes().await.unwrap();
        for dst in ["198.18.0.0/16", "fd00:1::/48"] {
            let ours = routes.iter().find(|route| route.net == net(dst)).unwrap();
            assert_eq!((ours.link, ours.gateway), (index, None));
        }
        for _ in 0..2 {
            for addr in ["198.18.3.0/32", "fd00:1:0:3::/128"] {
                kernel.delete_address(index, net(addr)).await.unwrap();
            }
            for dst in ["198.18.0.0/16", "fd00:1::/48"] {
                kernel.delete_route(route(dst, index)).await.unwrap();
            }
        }
    });
    assert_eq!(ns.addrs("eth0"), ["192.0.2.1/24"]);
    assert!(ns.json("-4 route show 198.18.0.0/16").is_empty());
    assert!(ns.json("-6 route show fd00:1::/48").is_empty());
}

#[test]
fn same_destination_elsewhere_is_refused_by_add_and_taken_over_by_replace() {
    let ns = Ns::new();
    ns.ip("route add 198.18.0.0/16 dev far");
    let index = ns.index("eth0");
    let refused = ns.block_on(|| async {
        let kernel = Netlink::connect().unwrap();
        let refused = kernel.add_route(route("198.18.0.0/16", index)).await;
        kernel
            .replace_route(route("198.18.0.0/16", index))
            .await
            .unwrap();
        refused.unwrap_err()
    });
    assert!(refused.to_string().contains("198.18.0.0/16"), "{refused}");
    let routes = ns.json("-4 route show 198.18.0.0/16");
    assert_eq!(routes.len(), 1);
    assert_eq!(routes[0]["dev"], "eth0");
}

#[test]
fn routes_of_other_tables_and_types_are_not_listed_and_gateways_are() {
    let ns = Ns::new();
    ns.ip("route add 198.51.100.0/24 via 192.0.2.9 proto 99 metric 7");
    ns.ip("route add blackhole 203.0.113.0/24");
    ns.ip("route add 203.0.113.0/25 dev eth0 table 88");
    let routes = ns.block_on(|| async { Netlink::connect().unwrap().routes().await.unwrap() });
    let expected = Route {
        net: net("198.51.100.0/24"),
        link: ns.index("eth0"),
        gateway: Some("192.0.2.9".parse().unwrap()),
        metric: Some(7),
        onlink: false,
        protocol: 99,
    };
    assert!(routes.contains(&expected), "{routes:?}");
    let hidden = net("203.0.113.0/24");
    assert!(
        !routes.iter().any(|route| hidden.contains(&route.net)),
        "{routes:?}"
    );
}

#[test]
fn address_of_a_lease_can_be_used_as_soon_as_it_is_added() {
    let ns = Ns::new();
    let index = ns.index("eth0");
    for address in ["198.18.1.0/32", "fd00:18:0:1::/128"] {
        let address = net(address);
        let bound = ns.block_on(|| async {
            let kernel = Netlink::connect().unwrap();
            kernel.add_address(index, address).await.unwrap();
            UdpSocket::bind((address.addr(), 0)).map(drop)
        });
        assert!(bound.is_ok(), "{address}: {bound:?}");
    }
}

#[test]
fn every_kind_of_change_is_reported() {
    let ns = Ns::new();
    let index = ns.index("eth0");
    for (command, expected) in [
        ("link set eth0 mtu 1400", Change::Link(index)),
        ("addr add 198.51.100.1/32 dev eth0", Change::Address(index)),
        (
            "addr add 2001:db8::9/128 dev eth0 nodad",
            Change::Address(index),
        ),
        (
            "route add 198.18.0.0/16 dev eth0",
            Change::Route(net("198.18.0.0/16")),
        ),
        (
            "route del 198.18.0.0/16 dev eth0",
            Change::Route(net("198.18.0.0/16")),
        ),
        (
            "-6 route add fd00:1::/48 dev eth0",
            Change::Route(net("fd00:1::/48")),
        ),
        ("link del eth0", Change::Link(index)),
    ] {
        ns.block_on(|| async {
            let mut changes = Netlink::connect().unwrap().monitor().unwrap();
            ns.ip(command);
            let seen = async {
                while let Some(change) = changes.recv().await {
                    if change == expected {
                        return true;
                    }
                }
                false
            };
            let seen = tokio::time::timeout(LIMIT, seen).await;
            assert_eq!(seen, Ok(true), "{command}: no {expected:?}");
        });
    }
}

fn desired() -> Desired {
    Desired {
        mtu: Mtu::new(1400).unwrap(),
        tx_queue_len: 1000,
        mac: None,
        learning: None,
        addrs: vec![net("198.18.3.0/32"), net("fd00:1:0:3::/128")],
        networks: vec![net("198.18.0.0/16"), net("fd00:1::/48")],
        routed: vec![net("198.18.0.0/16"), net("fd00:1::/48")],
    }
}

fn settle(ns: &Ns, index: u32) -> Outcome {
    ns.block_on(|| async {
        let kernel = Netlink::connect().unwrap();
        reconcile(&kernel, index, &desired()).await.unwrap()
    })
}

/// All that iproute2 can tell apart about the device's configuration.
fn picture(ns: &Ns) -> String {
    let links = ns.json("link show dev eth0");
    let link = &links[0];
    let up = link["flags"].as_array().unwrap().contains(&"UP".into());
    let routes = |family| {
        let mut routes = ns.json(&format!("{family} route show dev eth0 proto boot"));
        routes.sort_by_key(ToString::to_string);
        routes
    };
    let mut addrs = ns.addrs("eth0");
    addrs.sort();
    format!(
        "mtu {} queue {} up {up} ipv6 {} {addrs:?} {:?} {:?}",
        link["mtu"],
        link["txqlen"],
        link["inet6_addr_gen_mode"],
        routes("-4"),
        routes("-6"),
    )
}

#[test]
fn device_is_brought_back_by_one_look_whatever_was_done_to_it() {
    let ns = Ns::new();
    ns.ip("addr flush dev eth0");
    ns.ip("link set eth0 down");
    let index = ns.index("eth0");
    settle(&ns, index);
    let settled = picture(&ns);
    for part in [
        "mtu 1400 queue 1000 up true ipv6 \"none\"",
        "198.18.3.0/32",
        "fd00:1:0:3::/128",
    ] {
        assert!(settled.contains(part), "{part} is missing in {settled}");
    }
    assert!(!settled.contains("fe80"), "{settled}");
    for deeds in [
        &["link set eth0 down"][..],
        &["link set eth0 mtu 9000"],
        &["link set eth0 txqueuelen 10"],
        &["addr flush dev eth0"],
        &["route flush dev eth0"],
        &["-6 route flush dev eth0"],
        &["addr add 198.18.200.1/24 dev eth0"],
        &["addr add fd00:1:0:9::1/64 dev eth0 nodad"],
        &[
            "addr flush dev eth0",
            "link set eth0 down",
            "link set eth0 mtu 1300",
        ],
    ] {
        for deed in deeds {
            ns.ip(deed);
        }
        assert_ne!(picture(&ns), settled, "{deeds:?} changes nothing");
        settle(&ns, index);
        assert_eq!(picture(&ns), settled, "after {deeds:?}");
    }
    // Idempotent: nothing is done to what is as it should be.
    assert!(matches!(settle(&ns, index), Outcome::Done(actions) if actions.is_empty()));
    ns.ip("link del eth0");
    assert!(matches!(settle(&ns, index), Outcome::Gone));
}

#[test]
fn unprivileged_caller_is_told_what_it_lacks() {
    let ns = Ns::new();
    let index = ns.index("eth0");
    // A child in the same namespace without the capability; the test process keeps its own.
    let mut command = std::process::Command::new("setpriv");
    command.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]);
    command.args([env!("CARGO_BIN_EXE_loden"), "daemon", "--iface", "eth0"]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config"), r#"{"Network":"198.18.0.0/16"}"#).unwrap();
    command.arg("--local-store").arg(dir.path());
    command
        .arg("--subnet-file")
        .arg(dir.path().join("subnet.env"));
    let output = ns.run(|| command.output().unwrap());
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let last = text.lines().last().unwrap();
    assert!(
        last.starts_with("loden: ") && last.contains("CAP_NET_ADMIN"),
        "{text}"
    );
    assert!(index > 0 && !dir.path().join("subnet.env").exists());
}
