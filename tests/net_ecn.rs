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
use net::{Node, Shape, adds_up, lab, pair, run, tun_v4};

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
fn send_each(a: &Node, to: SocketAddr) {
    for tos in 0..4 {
        for _ in 0..SOME {
            let socket = a.udp();
            socket2::SockRef::from(&socket).set_tos_v4(tos).unwrap();
            socket.send_to(b"x", to).unwrap();
        }
    }
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

    send_each(&a, to);
    b.wait_status("all", |status| status.total.decap.read == 4 * SOME);
    assert_eq!(on_the_wire.take(), outer);
    assert_eq!(delivered.take(), [SOME; 4], "unmarked, nothing changes");

    run(&b.netns, "nft", "add table ip router");
    run(
        &b.netns,
        "nft",
        "add chain ip router c { type filter hook prerouting priority -150 ; }",
    );
    run(
        &b.netns,
        "nft",
        &format!("add rule ip router c udp dport {port} ip ecn set ce"),
    );
    send_each(&a, to);
    let status = b.wait_status("all", |status| status.total.decap.read == 8 * SOME);
    assert_eq!(on_the_wire.take(), [0, 0, 0, 4 * SOME]);
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
