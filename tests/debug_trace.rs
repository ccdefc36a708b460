//! `loden explain --trace` where the kernel carries the packets: what both nodes see of the probes, and where they are said
//! to get lost is where they are dropped. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/asked.rs"]
mod asked;
#[path = "common/captured.rs"]
mod captured;
#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::fs;
use std::net::UdpSocket;
use std::time::Duration;

use asked::{await_trace, await_trace_of, count, counted, open, trace, trace_between, wall};
use captured::Running;
use cluster::{Cluster, DUAL, HOST_GW, V4, VXLAN};
use loden::lab::Member;
use loden::wire::probe::{HEADER_LEN, Identity, Kind, Probe, Sights, Standing};

/// The links of a node with VXLAN devices of both families.
const DEVICES: &str = "flannel.1, eth0, flannel-v6.1";

/// How long an answer is waited for before the same is asked again.
const MOMENT: Duration = Duration::from_millis(500);

/// The least time that a line names, in milliseconds.
fn first_at(lines: &[String], beginning: &str) -> f64 {
    let line = lines.iter().find(|line| line.starts_with(beginning));
    let (least, _) = line.unwrap().rsplit_once(" to ").unwrap();
    least.rsplit(' ').next().unwrap().parse().unwrap()
}

/// How a node's kernel takes in what it has no route back for (ip-sysctl.rst, `rp_filter`).
fn filter_reverse_path(cluster: &Cluster, n: u8, link: &str, mode: &str) {
    let node = cluster.lab.netns(Member::Node(n));
    for link in ["all", link] {
        let setting = format!("ipv4/conf/{link}/rp_filter");
        node.set_sysctls(&[(setting.as_str(), mode)]).unwrap();
    }
}

#[test]
fn traced_probes_are_followed_on_both_nodes_links_to_where_they_get_lost() {
    let cluster = Cluster::new(3, DUAL, VXLAN);
    cluster.await_ping(1, "198.18.2.2");
    cluster.await_ping(1, "fd00:18:0:2::2");
    let seen = |device: &str, public: fn(u8) -> String| {
        let (here, there) = (public(1), public(2));
        [
            format!("this node: reading packet sockets on {DEVICES}: "),
            format!("this node: 3 on {device}: handed to the kernel, to {there}:8472 over vxlan, "),
            format!("this node: 3 wrapped on eth0: handed to the kernel, to {there}:8472 over vxlan, "),
            format!("192.0.2.2: reading packet sockets on {DEVICES}: "),
            format!("192.0.2.2: 3 wrapped on eth0: arrived by the kernel, from {here}:"),
            format!("192.0.2.2: 3 on {device}: arrived by the kernel, from {here}:8472 over vxlan, "),
            "192.0.2.2: its daemon saw 3 of them come in by kernel-tunnel, with a TTL of 64, 500 bytes long, and answered"
                .to_owned(),
            format!("back from 192.0.2.2: 3 on {device}: handed to the kernel, to {here}:8472 over vxlan, "),
            format!("back from 192.0.2.2: 3 wrapped on eth0: handed to the kernel, to {here}:8472 over vxlan, "),
            format!("back here: 3 wrapped on eth0: arrived by the kernel, from {there}:"),
            format!("back here: 3 on {device}: arrived by the kernel, from {there}:8472 over vxlan, "),
            "there and back in ".to_owned(),
        ]
    };
    let v6 = seen("flannel-v6.1", |n| format!("[2001:db8::{n}]"));
    let pods = ["fd00:18:0:1::2", "fd00:18:0:2::2"];
    let v6 = v6.each_ref().map(String::as_str);
    await_trace_of(|| trace_between(&cluster, pods), &v6, None);

    let v4 = seen("flannel.1", |n| format!("192.0.2.{n}"));
    let seen = v4.each_ref().map(String::as_str);
    let (here, there) = (Member::Node(1), Member::Node(2));
    count(
        &cluster,
        there,
        "prerouting",
        "udp dport 18285 ip length 500",
    );
    let lines = await_trace(&cluster, &seen, None);
    let probes = counted(&cluster, there);
    assert!(
        probes > 0 && probes.is_multiple_of(3),
        "{probes}: {lines:#?}"
    );
    assert!(
        first_at(&lines, seen[1]) <= first_at(&lines, seen[2]),
        "{lines:#?}"
    );

    let carries = "ip daddr 192.0.2.2 udp dport 8472";
    let (taken, not_taken) = (
        "192.0.2.2: its daemon took in 3 of them, and no answer came back",
        "192.0.2.2: its daemon took in none of them",
    );
    let none_there = format!("192.0.2.2: none of the probes was seen on {DEVICES}");
    let none_back = format!("back from 192.0.2.2: none was seen on {DEVICES}");
    let none_here = format!("back here: no answer was seen on {DEVICES}");
    let (none_there, none_back, none_here) = (&*none_there, &*none_back, &*none_here);
    // Where they are dropped, by what, what is then told, and what is concluded.
    let cases: [(Member, &str, &str, Vec<&str>, &str); 5] = [
        (
            here,
            "output",
            carries,
            [
                &seen[..2],
                &["this node: sight ends at flannel.1: nothing that wraps them was seen on eth0"],
                &[none_there, not_taken, none_back, none_here],
            ]
            .concat(),
            "on this node, before they leave it",
        ),
        (
            there,
            "prerouting",
            carries,
            [
                &seen[..5],
                &["192.0.2.2: sight ends at eth0: nothing unwrapped was seen on flannel.1"],
                &["192.0.2.2: 3 that came did not reach its daemon", not_taken],
                &[none_back, none_here],
            ]
            .concat(),
            "on 192.0.2.2, between its links and its daemon",
        ),
        (
            there,
            "input",
            "iifname flannel.1 udp dport 18285",
            [
                &seen[..6],
                &["192.0.2.2: 3 that came did not reach its daemon", not_taken],
                &[none_back, none_here],
            ]
            .concat(),
            "on 192.0.2.2, between its links and its daemon",
        ),
        (
            there,
            "output",
            "ip daddr 192.0.2.1 udp dport 8472",
            [
                &seen[..6],
                &[taken, seen[7]],
                &["back from 192.0.2.2: sight ends at flannel.1: nothing that wraps them"],
                &[none_here],
            ]
            .concat(),
            "on 192.0.2.2, which does not send its answers",
        ),
        (
            here,
            "input",
            "iifname flannel.1 udp sport 18285",
            [
                &seen[..6],
                &[taken],
                &seen[7..11],
                &["back here: 3 that came did not reach the daemon"],
            ]
            .concat(),
            "on this node, between its links and its daemon",
        ),
    ];
    for (member, hook, rule, told, conclusion) in cases {
        wall(&cluster, member, hook, rule);
        await_trace(&cluster, &told, Some(conclusion));
        open(&cluster, member);
    }

    // The switch between them, in each direction.
    for (to, told, conclusion) in [
        (
            2,
            [&seen[..4], &[none_there, not_taken, none_back, none_here]].concat(),
            "between this node and 192.0.2.2, on the way there",
        ),
        (
            1,
            [&seen[..6], &[taken], &seen[7..9], &[none_here]].concat(),
            "between 192.0.2.2 and this node, on the way back",
        ),
    ] {
        let table = format!(
            "table bridge wall {{ chain c {{ type filter hook forward priority 0; ip daddr 192.0.2.{to} udp dport 8472 drop; }}; }}"
        );
        cluster.lab.run(Member::Underlay, "nft", &[&table]).unwrap();
        await_trace(&cluster, &told, Some(conclusion));
        cluster.run(Member::Underlay, "nft", "delete table bridge wall");
    }

    // The other has no way back to us, and its kernel takes in what comes all the same.
    filter_reverse_path(&cluster, 2, "flannel.1", "0");
    cluster.ip(there, "route add throw 198.18.1.0/32", 2);
    let unsent = "back from 192.0.2.2: its kernel does not send them: Network is unreachable";
    await_trace(
        &cluster,
        &[&seen[..6], &[taken, unsent, none_back, none_here]].concat(),
        Some("on 192.0.2.2, which does not send its answers"),
    );
    cluster.ip(there, "route del throw 198.18.1.0/32", 2);
    await_trace(&cluster, &seen, None);
}

#[test]
fn traces_of_routed_probes_say_where_they_end_and_run_beside_captures() {
    let cluster = Cluster::new(2, V4, HOST_GW);
    cluster.await_ping(1, "198.18.2.2");
    let seen = [
        "this node: reading packet sockets on eth0: the kernel carries packets there",
        "this node: 3 on eth0: handed to the kernel, to 192.0.2.2 over route, ",
        "192.0.2.2: reading packet sockets on eth0: the kernel carries packets there",
        "192.0.2.2: 3 on eth0: arrived by the kernel, from 192.0.2.1 over route, ",
        "192.0.2.2: its daemon saw 3 of them come in by underlay, with a TTL of 64, 500 bytes long, and answered",
        "back from 192.0.2.2: 3 on eth0: handed to the kernel, to 192.0.2.1 over route, ",
        "back here: 3 on eth0: arrived by the kernel, from 192.0.2.2 over route, ",
        "there and back in ",
    ];
    let there = Member::Node(2);
    // As from a pod, so that its answers take the pods' way.
    let rule = "ip saddr 198.18.1.1 udp dport 18285 ip length 500";
    count(&cluster, there, "prerouting", rule);
    let lines = await_trace(&cluster, &seen, None);
    let probes = counted(&cluster, there);
    assert!(
        probes > 0 && probes.is_multiple_of(3),
        "{probes}: {lines:#?}"
    );

    let (not_taken, none_back) = (
        "192.0.2.2: its daemon took in none of them",
        "back from 192.0.2.2: none was seen on eth0",
    );
    let none_here = "back here: no answer was seen on eth0";
    wall(
        &cluster,
        there,
        "prerouting",
        "ip daddr 198.18.2.1 udp dport 18285",
    );
    await_trace(
        &cluster,
        &[&seen[..4], &[not_taken, none_back, none_here]].concat(),
        Some("on 192.0.2.2, between its links and its daemon"),
    );
    open(&cluster, there);
    wall(
        &cluster,
        Member::Node(1),
        "output",
        "ip daddr 198.18.2.1 udp dport 18285",
    );
    let none = "this node: none of the probes was seen on eth0";
    await_trace(
        &cluster,
        &[seen[0], none, not_taken, none_here],
        Some("on this node, before they leave it"),
    );
    open(&cluster, Member::Node(1));
    // The other has no way back to our pods.
    cluster.ip(there, "route add throw 198.18.1.0/30", 2);
    for (filter, told, conclusion) in [
        (
            "2",
            "192.0.2.2: 3 that came did not reach its daemon: ask its own firewall, its routes back",
            "on 192.0.2.2, between its links and its daemon",
        ),
        (
            "0",
            "back from 192.0.2.2: its kernel does not send them: Network is unreachable",
            "on 192.0.2.2, which does not send its answers",
        ),
    ] {
        filter_reverse_path(&cluster, 2, "eth0", filter);
        await_trace(
            &cluster,
            &[&seen[..4], &[told, none_back]].concat(),
            Some(conclusion),
        );
    }
    cluster.ip(there, "route del throw 198.18.1.0/30", 2);

    // The other's program knows nothing of watching: no order gets to it, which byte 5 of the payload tells.
    wall(&cluster, there, "prerouting", "udp dport 18285 @th,104,8 5");
    let behind = "this node: sight ends behind eth0";
    let unknown = "192.0.2.2: its links are not seen: an older loden does not watch them";
    await_trace(
        &cluster,
        &[seen[0], seen[1], behind, seen[4], unknown, seen[6], seen[7]],
        None,
    );
    open(&cluster, there);

    // Nothing at all gets to the other daemon, so that it does not look out either.
    wall(&cluster, there, "prerouting", "udp dport 18285");
    let silence = "192.0.2.2: sight ends here: no daemon answers probes";
    await_trace(
        &cluster,
        &[seen[0], seen[1], behind, silence, none_here],
        Some("between this node's links and this node's links, as answers"),
    );
    open(&cluster, there);

    // Each has ended its watch, so there is room for all captures that may run, and then for none.
    let mut running: Vec<Running> = Vec::new();
    for n in 0..4 {
        await_trace(&cluster, &seen, None);
        let path = cluster.file(1, &format!("{n}.pcapng"));
        running.push(Running::begin(
            &cluster.file(1, "subnet.sock"),
            path,
            &["udp port 9"],
        ));
    }
    let why = "this node: what the kernel carries is not watched: 4 captures run already: end one of them first";
    await_trace(&cluster, &[&[why], &seen[2..6], &seen[7..]].concat(), None);
    drop(running);
    cluster.wait_until("room for a trace", || {
        trace(&cluster).iter().any(|line| line.starts_with(seen[1]))
    });
    for n in [1, 2] {
        cluster.wait_until("no thread that watches", || !watches(&cluster, n));
    }
}

/// Whether a daemon has a thread that reads packet sockets.
fn watches(cluster: &Cluster, n: u8) -> bool {
    let daemon = cluster.daemons[usize::from(n) - 1].as_ref().unwrap().0.id();
    let threads = fs::read_dir(format!("/proc/{daemon}/task")).unwrap();
    let name = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("comm"));
    let mut names = threads.filter_map(|thread| name(thread.unwrap()).ok());
    names.any(|name| name == "watch\n")
}

/// What node 2 says to an order of node 1's for a trace, sent by hand, as far as it is heard.
fn ordered(cluster: &Cluster, nonce: u64, order: u8) -> Option<Sights> {
    let node = cluster.lab.netns(Member::Node(1));
    let socket = node
        .run(|| UdpSocket::bind("192.0.2.1:0"))
        .unwrap()
        .unwrap();
    socket.connect("192.0.2.2:18285").unwrap();
    socket.set_read_timeout(Some(MOMENT)).unwrap();
    let mut bytes = [0; 1000];
    Probe::request(Kind::Watch, 1, nonce, Identity::default()).write(&mut bytes);
    bytes[HEADER_LEN] = order;
    socket.send(&bytes).unwrap();
    let len = socket.recv(&mut bytes).ok()?;
    let said = Probe::parse(&bytes[..len]).unwrap();
    assert_eq!((said.kind, said.nonce), (Kind::Sights, nonce));
    Some(Sights::parse(&bytes[..len]).unwrap())
}

#[test]
fn peer_that_orders_without_end_has_one_trace_watched_and_not_for_long() {
    const BEGIN: u8 = 1;
    const TELL: u8 = 2;
    let cluster = Cluster::new(2, V4, HOST_GW);
    let standing = |nonce, order| ordered(&cluster, nonce, order).map(|said| said.standing);
    let daemon = cluster.daemons[1].as_ref().unwrap().0.id();
    let sockets = || {
        let shown = fs::read_to_string(format!("/proc/{daemon}/net/packet")).unwrap();
        shown.lines().count() - 1
    };
    cluster.wait_until("an answer for a trace that nobody watches", || {
        standing(1, TELL) == Some(Standing::Unwatched)
    });
    // Whatever takes longer than a trace is watched is tried again.
    let mut nonce = 1;
    cluster.wait_until("one trace that is watched, and no further one", || {
        nonce += 100;
        let begins = standing(nonce, BEGIN) == Some(Standing::Watches);
        let refused = (1..10).all(|more| standing(nonce + more, BEGIN) == Some(Standing::Busy));
        begins && refused && sockets() == 1 && standing(nonce, BEGIN) == Some(Standing::Watches)
    });
    // A client's captures have all their room beside it.
    let captures: Vec<Running> = (0..4)
        .map(|n| {
            let path = cluster.file(2, &format!("{n}.pcapng"));
            Running::begin(&cluster.file(2, "subnet.sock"), path, &["udp port 9"])
        })
        .collect();
    drop(captures);
    cluster.wait_until("what was seen, told twice", || {
        nonce += 100;
        let begins = standing(nonce, BEGIN) == Some(Standing::Watches);
        let told = ordered(&cluster, nonce, TELL);
        let again = ordered(&cluster, nonce, TELL);
        begins
            && told == again
            && told.is_some_and(|said| {
                said.standing == Standing::Told && (said.came, said.taken, said.left) == (0, 0, 0)
            })
    });
    // Nobody asks what was seen of the next, and an order that nobody knows is none.
    cluster.wait_until("one more trace that is watched", || {
        nonce += 100;
        standing(nonce, BEGIN) == Some(Standing::Watches)
    });
    assert_eq!(ordered(&cluster, nonce, 9), None);
    cluster.wait_until("an end of it", || !watches(&cluster, 2));
    cluster.wait_until("nothing that is remembered", || {
        standing(nonce, TELL) == Some(Standing::Unwatched)
    });
}
