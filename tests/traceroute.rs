//! What a traceroute through the overlay sees, from a pod, over the whole program. Needs root.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::net::IpAddr;
use std::process::Command;

use common::{lab, spec};
use loden::lab::{Backend, Lab, Member, NetNs};

/// How often a ping is sent whose answer may be late.
const ATTEMPTS: u32 = 8;

/// Who answers a ping from pod 1.1 to pod 2.1 whose TTL ends after `ttl` hops.
fn hop(lab: &Lab, ttl: u8) -> IpAddr {
    let addr = lab.pod_addr(2, 1).unwrap().to_string();
    let ttl = ttl.to_string();
    let args = ["-n", "-c1", "-W2", "-t", &ttl, &addr];
    // ping fails when nothing but errors came; what it printed is what counts.
    let namespace = NetNs::named(lab.spec().name.namespace(Member::Pod(1, 1)));
    let from = (0..ATTEMPTS).find_map(|_| {
        let ping = namespace.run(|| Command::new("ping").args(args).output());
        let output = String::from_utf8(ping.unwrap().unwrap().stdout).unwrap();
        let mut lines = output.lines();
        let line = lines.find(|line| line.contains("Time to live exceeded"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    });
    from.unwrap_or_else(|| panic!("no answer to a ping with TTL {ttl}"))
}

/// The first address of a node's subnet, which is its daemon's on the overlay.
fn daemon_addr(lab: &Lab, node: u8) -> IpAddr {
    let IpAddr::V4(pod) = lab.pod_addr(node, 1).unwrap().into() else {
        panic!("the lab's overlay is IPv4")
    };
    let [a, b, c, _] = pod.octets();
    [a, b, c, 0].into()
}

#[test]
fn every_hop_of_the_overlay_names_the_node_that_it_is() {
    let mut lab = lab(spec(2, Backend::Udp));
    lab.await_connected().unwrap();
    // 1: the node's kernel, from its bridge. 2: its daemon. 3: the other daemon, through the tunnel.
    assert_eq!(hop(&lab, 2), daemon_addr(&lab, 1));
    assert_eq!(hop(&lab, 3), daemon_addr(&lab, 2));
}
