//! Both address families, alone and together, pod to pod, over either family of the underlay. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use cluster::{Cluster, DUAL, V6, VXLAN};

const UDP: &str = r#"{"Type":"udp"}"#;

/// Two nodes with these flags, N being the node's number, whose pods reach each other in every family of the network.
fn reach_each_other(network: &'static str, backend: &str, flags: &[&str], bind: &str) {
    let mut cluster = Cluster::idle(2, network, backend);
    for n in [1, 2] {
        let flags: Vec<String> = flags
            .iter()
            .map(|flag| flag.replace('N', &n.to_string()))
            .collect();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        cluster.start_with(n, &flags);
    }
    for (from, to) in [(1, 2), (2, 1)] {
        if network != V6 {
            cluster.await_ping(from, &format!("198.18.{to}.2"));
        }
        cluster.await_ping(from, &format!("fd00:18:0:{to}::2"));
    }
    let bound = cluster.status(1)["bind"].clone();
    let bound = bound.as_str().unwrap().to_owned();
    assert!(bound.starts_with(bind), "{backend} {flags:?}: {bound}");
    if network != V6 {
        cluster::transfers(&cluster, "198.18.2.2");
    }
    cluster::transfers(&cluster, "fd00:18:0:2::2");
}

#[test]
fn our_own_tunnel_carries_both_families_over_an_ipv4_underlay() {
    reach_each_other(DUAL, UDP, &["--iface=192.0.2.N"], "192.0.2.1:");
    reach_each_other(V6, UDP, &["--iface=192.0.2.N"], "192.0.2.1:");
}

#[test]
fn our_own_tunnel_carries_both_families_over_an_ipv6_underlay() {
    reach_each_other(DUAL, UDP, &["--iface=2001:db8::N"], "[2001:db8::1]:");
    reach_each_other(V6, UDP, &["--iface=eth0"], "[2001:db8::1]:");
}

#[test]
fn vxlan_in_user_space_carries_each_family_over_its_own() {
    reach_each_other(DUAL, VXLAN, &["--vxlan=user"], "192.0.2.1:");
    reach_each_other(V6, VXLAN, &["--vxlan=user"], "[2001:db8::1]:");
}

#[test]
fn change_of_a_peer_in_one_family_alone_is_noticed_there_and_only_there() {
    let cluster = Cluster::new(1, DUAL, VXLAN);
    let lease = |v4: u8, v6: u8| {
        format!(
            r#"{{"PublicIP":"192.0.2.9","PublicIPv6":"2001:db8::9","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:04:{v4:02x}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"02:00:00:00:06:{v6:02x}"}}}}"#
        )
    };
    let entries = |v4: u8, v6: u8| {
        let state = cluster.state(1).join("\n");
        state.contains(&format!(
            "neighbour 198.18.9.0 lladdr 02:00:00:00:04:{v4:02x}"
        )) && state.contains(&format!(
            "neighbour fd00:18:0:9:: lladdr 02:00:00:00:06:{v6:02x}"
        )) && state.contains(&format!("forwards 02:00:00:00:06:{v6:02x} dst 2001:db8::9"))
            && state.matches(" forwards ").count() == 2
    };
    for (v4, v6) in [(1, 1), (1, 2), (2, 2)] {
        cluster.put("198.18.9.0-24&fd00:18:0:9::-64", &lease(v4, v6));
        cluster.wait_until("entries of the new lease", || entries(v4, v6));
    }
}
