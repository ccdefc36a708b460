//! Congestion marks cross the tunnel as RFC 6040 says: nft marks and counts the outer and the inner ECN fields,
//! the data plane copies, combines and drops. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use std::net::SocketAddr;

use loden::datapath::EngineKind;
use loden::lab::{NetNs, Wire, command};
use net::{
    Node, Shape, VXLAN_PORT, adds_up, kernel_vtep, lab, pair, run, tun_v4, udp_at, wait_for,
};

/// The four codepoints as nft names them, in the order of their values.
const NAMES: [&str; 4] = ["not-ect", "ect1", "ect0", "ce"];
const NOT_ECT: usize = 0;
const CE: usize = 3;
/// Of each codepoint in one go.
const SOME: u64 = 10;

/// Counts by codepoint, in an nft table of the receiving node.
struct Counters<'a> {
    netns: &'a NetNs,
    table: &'static str,
}

impl<'a> Counters<'a> {
    /// Counts what matches `what` when it enters.
    fn new(netns: &'a NetNs, table: &'static str, what: &str) -> Self {
        let mut lines = vec![
            format!("add table ip {table}"),
            format!("add chain ip {table} c {{ type filter hook input priority 0 ; }}"),
        ];
        for name in NAMES {
            lines.push(format!("add counter ip {table} {name}"));
            lines.push(format!(
                "add rule ip {table} c {what} ip ecn {name} counter name {name}"
            ));
        }
        for line in lines {
            let args: Vec<&str> = line.split(' ').collect();
            command::run(Some(netns), "nft", &args).unwrap();
        }
        Self { netns, table }
    }

    /// What is counted so far.
    fn total(&self) -> u64 {
        let count = |name| {
            let text = run(
                self.netns,
                "nft",
                &format!("list counter ip {} {name}", self.table),
            );
            let (_, rest) = text.split_once("packets ").unwrap();
            rest.split_once(' ').unwrap().0.parse::<u64>().unwrap()
        };
        NAMES.map(count).iter().sum()
    }

    /// Waits until so many are counted: what the data plane has handed over, the kernel may still have in hand.
    fn wait(&self, count: u64) {
        wait_for("what was handed over", || self.total() >= count);
    }

    /// What was counted since the last look.
    fn take(&self) -> [u64; 4] {
        NAMES.map(|name| {
            let text = run(
                self.netns,
                "nft",
                &format!("reset counter ip {} {name}", self.table),
            );
            let (_, rest) = text.split_once("packets ").unwrap();
            rest.split_once(' ').unwrap().0.parse().unwrap()
        })
    }
}

/// Sends [`SOME`] packets of each codepoint, each a flow of its own, so that nothing is merged.
fn send_each(from: &NetNs, n: u8, to: SocketAddr) {
    for tos in 0..4 {
        for _ in 0..SOME {
            let socket = udp_at(from, (tun_v4(n), 0).into());
            socket2::SockRef::from(&socket).set_tos_v4(tos).unwrap();
            socket.send_to(b"x", to).unwrap();
        }
    }
}

/// Has a router mark every outer header on its way in.
fn mark_all(netns: &NetNs, port: u16) {
    run(netns, "nft", "add table ip router");
    run(
        netns,
        "nft",
        "add chain ip router c { type filter hook prerouting priority -150 ; }",
    );
    let rule = format!("add rule ip router c udp dport {port} ip ecn set ce");
    run(netns, "nft", &rule);
}

/// What a router between the nodes, the inner receiver and the drop counter see of [`send_each`], unmarked and
/// with every outer header marked CE on the way.
fn crosses(shape: &Shape, outer: [u64; 4], marked_inner: [u64; 4], marked_drops: u64) {
    let lab = lab(2, 0, Wire::PacketNoGro);
    let (a, b) = pair(&lab, shape);
    let port = b.addr.port();
    let sink = b.udp();
    let to = sink.local_addr().unwrap();
    assert_eq!(to.ip(), tun_v4(2));
    let on_the_wire = Counters::new(&b.netns, "outer", &format!("udp dport {port}"));
    let delivered = Counters::new(
        &b.netns,
        "inner",
        &format!("iifname {} udp dport {}", b.device(), to.port()),
    );
    let drops = |status: &loden::datapath::Status| status.total.decap.drops["ecn_invalid"];

    send_each(&a.netns, 1, to);
    b.wait_status("all", |status| status.total.decap.read == 4 * SOME);
    assert_eq!(on_the_wire.take(), outer);
    delivered.wait(4 * SOME);
    assert_eq!(delivered.take(), [SOME; 4], "unmarked, nothing changes");

    mark_all(&b.netns, port);
    send_each(&a.netns, 1, to);
    let status = b.wait_status("all", |status| status.total.decap.read == 8 * SOME);
    assert_eq!(on_the_wire.take(), [0, 0, 0, 4 * SOME]);
    delivered.wait(marked_inner.iter().sum());
    assert_eq!(delivered.take(), marked_inner);
    assert_eq!(drops(&status), marked_drops);
    adds_up(&status);
    adds_up(&a.status());
}

#[test]
fn between_peers_that_know_ecn_marks_arrive_and_not_ect_is_dropped() {
    let mut marked = [0; 4];
    marked[CE] = 3 * SOME;
    for shape in [Shape::default(), Shape::vxlan(EngineKind::Mmsg, false)] {
        let shape = Shape { ecn: true, ..shape };
        crosses(&shape, [SOME; 4], marked, SOME);
    }
}

#[test]
fn towards_others_the_outer_header_is_never_ect() {
    let mut outer = [0; 4];
    outer[NOT_ECT] = 4 * SOME;
    // Whoever marks such a packet breaks the rules; what an ECN-capable sender sent may still carry the mark.
    let mut marked = [0; 4];
    marked[CE] = 3 * SOME;
    crosses(&Shape::default(), outer, marked, SOME);
}

#[test]
fn marks_arrive_between_us_and_the_kernels_vxlan_in_both_directions() {
    let lab = lab(2, 0, Wire::PacketNoGro);
    let shape = Shape {
        ecn: true,
        ..Shape::vxlan(EngineKind::Mmsg, false)
    };
    let there = kernel_vtep(&lab, &shape, 2, &[1]);
    let node = Node::start(&lab, 1, &shape, &[1, 2]);
    let mut marked = [0; 4];
    marked[CE] = 3 * SOME;

    let sink = udp_at(&there, (tun_v4(2), 0).into());
    let to = sink.local_addr().unwrap();
    let outer = Counters::new(&there, "outer", &format!("udp dport {VXLAN_PORT}"));
    let inner = format!("iifname flannel.1 udp dport {}", to.port());
    let inner = Counters::new(&there, "inner", &inner);
    let refused = || {
        let link = command::run(
            Some(&there),
            "ip",
            &["-j", "-s", "link", "show", "flannel.1"],
        );
        let link: serde_json::Value = serde_json::from_str(&link.unwrap()).unwrap();
        link[0]["stats64"]["rx"]["errors"].as_u64().unwrap()
    };
    send_each(&node.netns, 1, to);
    wait_for("all", || inner.total() == 4 * SOME);
    assert_eq!((outer.take(), inner.take()), ([SOME; 4], [SOME; 4]));
    mark_all(&there, VXLAN_PORT);
    send_each(&node.netns, 1, to);
    // The device drops what cannot hear of the congestion.
    wait_for("all", || inner.total() + refused() == 4 * SOME);
    assert_eq!(
        (outer.take(), inner.take(), refused()),
        ([0, 0, 0, 4 * SOME], marked, SOME)
    );

    let sink = node.udp();
    let to = sink.local_addr().unwrap();
    let inner = format!("iifname {} udp dport {}", node.device(), to.port());
    let inner = Counters::new(&node.netns, "inner", &inner);
    send_each(&there, 2, to);
    node.wait_status("all", |status| status.total.decap.read == 4 * SOME);
    inner.wait(4 * SOME);
    assert_eq!(inner.take(), [SOME; 4]);
    mark_all(&node.netns, VXLAN_PORT);
    send_each(&there, 2, to);
    let status = node.wait_status("all", |status| status.total.decap.read == 8 * SOME);
    inner.wait(3 * SOME);
    assert_eq!(inner.take(), marked);
    assert_eq!(status.total.decap.drops["ecn_invalid"], SOME);
    adds_up(&status);
}
