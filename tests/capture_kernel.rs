//! `loden capture` where the kernel carries the packets: what its files say, read by tshark, is what was sent, what
//! tcpdump saw, and what the kernel counted. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/captured.rs"]
mod captured;
#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};

use captured::{Running, await_that, hex, packets_so_far, tshark};
use cluster::{Cluster, DUAL, Daemon, HOST_GW, V4, VXLAN};
use loden::lab::Member;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Bytes as tshark shows them, checked as far as it can.
const STRICT: [&str; 4] = [
    "-o",
    "ip.check_checksum:TRUE",
    "-o",
    "udp.check_checksum:TRUE",
];

fn begin(cluster: &Cluster, n: u8, name: &str, args: &[&str]) -> Running {
    let path = cluster.file(n, name);
    Running::begin(&cluster.file(n, "subnet.sock"), path, args)
}

fn udp(cluster: &Cluster, at: Member, addr: &str) -> UdpSocket {
    let addr: SocketAddr = addr.parse().unwrap();
    let socket = cluster.lab.netns(at).run(|| UdpSocket::bind(addr));
    let socket = socket.unwrap().unwrap();
    socket.set_read_timeout(Some(cluster::LIMIT)).unwrap();
    socket
}

/// Receives a datagram; its length. A wait with a time limit ends early when the process is stopped and goes on, or
/// handles a signal (signal(7)): it is taken up again.
fn recv(socket: &UdpSocket, bytes: &mut [u8]) -> usize {
    loop {
        match socket.recv(bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            received => return received.unwrap(),
        }
    }
}

/// Datagrams from one to the other, and an answer.
fn exchange(a: &UdpSocket, b: &UdpSocket) -> Vec<Vec<u8>> {
    let mut buffer = [0; 2000];
    let sent: Vec<Vec<u8>> = (0..8_u8)
        .map(|n| vec![n; 100 * usize::from(n) + 1])
        .collect();
    for payload in &sent {
        a.send_to(payload, b.local_addr().unwrap()).unwrap();
        let len = recv(b, &mut buffer);
        assert_eq!(&buffer[..len], payload);
    }
    b.send_to(b"answer", a.local_addr().unwrap()).unwrap();
    recv(a, &mut buffer);
    sent
}

/// Captures at both ends what passes between pod 1 and pod 2, and checks every field. `link` is what it passes, `via`
/// what the comment says of the other node, 1 or 2.
fn fields_are_what_was_sent(
    cluster: &Cluster,
    family: &str,
    link: &str,
    via: impl Fn(u8) -> String,
) {
    let (a, b) = match family {
        "ip" => ("198.18.1.2", "198.18.2.2"),
        _ => ("fd00:18:0:1::2", "fd00:18:0:2::2"),
    };
    let socket = |n, addr: &str, port| match family {
        "ip" => udp(cluster, Member::Pod(n, 1), &format!("{addr}:{port}")),
        _ => udp(cluster, Member::Pod(n, 1), &format!("[{addr}]:{port}")),
    };
    let (from, to) = (socket(1, a, 4001), socket(2, b, 4002));
    cluster.await_ping(1, b);
    let expression = format!("udp port 4001 and host {a}");
    let running = [1, 2].map(|n| {
        let name = format!("{family}-{link}.pcapng");
        begin(cluster, n, &name, &[&expression])
    });
    let sent = exchange(&from, &to);
    let (ttl, headers) = match family {
        "ip" => ("ip.ttl", 20 + 8),
        _ => ("ipv6.hlim", 40 + 8),
    };
    let fields = [
        "frame.interface_name".to_owned(),
        "frame.packet_flags_direction".to_owned(),
        format!("{family}.src"),
        "udp.srcport".to_owned(),
        format!("{family}.dst"),
        "udp.dstport".to_owned(),
        ttl.to_owned(),
        "frame.len".to_owned(),
        "frame.cap_len".to_owned(),
        "frame.comment".to_owned(),
        "data.data".to_owned(),
        "_ws.malformed".to_owned(),
    ];
    let fields: Vec<&str> = fields.iter().map(String::as_str).collect();
    for (n, running) in (1..).zip(running) {
        let (path, said) = running.end_saying("udp.port == 4001", sent.len() + 1);
        assert!(said.contains("reading packet sockets on "), "{said}");
        assert!(said.contains(link), "{said}");
        let packets = tshark(&path, &STRICT, &fields);
        assert_eq!(packets.len(), sent.len() + 1);
        let (name, flags, outcome) = if n == 1 {
            let outcome = format!("handed to the kernel, to {}", via(2));
            ("encap", "0x00000002", outcome)
        } else {
            let outcome = format!("arrived by the kernel, from {}", via(1));
            ("decap", "0x00000001", outcome)
        };
        let name = format!("{name} {link}");
        for (packet, payload) in packets.iter().zip(&sent) {
            let len = (headers + payload.len()).to_string();
            // One hop, the sender's node, has taken one.
            let expected = [
                &name, flags, a, "4001", b, "4002", "63", &len, &len, &outcome,
            ];
            assert_eq!(packet[..10], expected, "{packet:?}");
            assert_eq!(packet[10], hex(payload));
            assert_eq!(packet[11], "");
        }
        let answer = packets.last().unwrap();
        assert_eq!(answer[10], hex(b"answer"));
        assert_ne!(answer[0], name, "the answer goes the other way");
        assert!(answer[0].ends_with(link), "{answer:?}");
        let bad = ["-Y", "_ws.expert.severity >= 6291456"];
        let bad = [&STRICT[..], &bad].concat();
        let none = Vec::<Vec<String>>::new();
        assert_eq!(tshark(&path, &bad, &["_ws.expert.message"]), none);
    }
}

#[test]
fn packets_of_the_kernels_vxlan_are_what_was_sent_in_both_families() {
    let cluster = Cluster::new(2, DUAL, VXLAN);
    fields_are_what_was_sent(&cluster, "ip", "flannel.1", |n| {
        format!("192.0.2.{n}:8472 over vxlan")
    });
    fields_are_what_was_sent(&cluster, "ipv6", "flannel-v6.1", |n| {
        format!("[2001:db8::{n}]:8472 over vxlan")
    });
}

#[test]
fn routed_packets_are_what_was_sent_in_both_families_and_nothing_else_of_the_link_is_shown() {
    let cluster = Cluster::new(2, DUAL, HOST_GW);
    let all = begin(&cluster, 1, "all.pcapng", &[]);
    fields_are_what_was_sent(&cluster, "ip", "eth0", |n| {
        format!("192.0.2.{n} over route")
    });
    fields_are_what_was_sent(&cluster, "ipv6", "eth0", |n| {
        format!("2001:db8::{n} over route")
    });
    // Between nodes, nobody's pod; and from a node to a pod.
    cluster.run(Member::Node(1), "ping", "-n -q -c1 -W20 192.0.2.2");
    cluster.run(Member::Node(1), "ping", "-n -q -c1 -W20 198.18.2.2");
    let path = all.end("ip.addr == 192.0.2.1 && ip.addr == 198.18.2.2", 2);
    let nodes = ["-Y", "ip.addr == 192.0.2.1 && ip.addr == 192.0.2.2"];
    assert!(tshark(&path, &nodes, &["frame.number"]).is_empty());
    let own = ["-Y", "ip.addr == 192.0.2.1 && ip.addr == 198.18.2.2"];
    let own = tshark(&path, &own, &["ip.dst", "frame.comment"]);
    assert_eq!(
        own,
        [
            [
                "198.18.2.2",
                "handed to the kernel, to 192.0.2.2 over route"
            ],
            [
                "192.0.2.1",
                "arrived by the kernel, from 192.0.2.2 over route"
            ]
        ]
    );
}

/// The kernel's VXLAN datagrams of a file: outer and inner headers and what is in them. Checksums that are left to the
/// network card stand in our files as they are on the wire, and in tcpdump's as they are in memory.
fn datagrams(path: &Path) -> BTreeSet<Vec<String>> {
    let fields = [
        "ip.src",
        "ip.dst",
        "ip.id",
        "ip.ttl",
        "ip.len",
        "udp.srcport",
        "udp.dstport",
        "vxlan.vni",
        "data.data",
    ];
    let args = ["-d", "udp.port==8472,vxlan", "-Y", "udp.port == 4001"];
    tshark(path, &args, &fields).into_iter().collect()
}

#[test]
fn outer_datagrams_of_the_kernels_vxlan_are_those_that_tcpdump_sees() {
    let cluster = Cluster::new(2, V4, VXLAN);
    cluster.await_ping(1, "198.18.2.2");
    let wire = cluster.file(1, "wire.pcap");
    let mut tcpdump = Command::new("tcpdump");
    tcpdump
        .args(["-i", "eth0", "-U", "--immediate-mode", "-w"])
        .arg(&wire)
        .arg("udp port 8472")
        .stderr(Stdio::null());
    let tcpdump = cluster.lab.netns(Member::Node(1)).spawn(&mut tcpdump);
    let mut tcpdump = Daemon(tcpdump.unwrap());
    await_that("tcpdump's file", || {
        wire.metadata().is_ok_and(|meta| meta.len() >= 24)
    });
    let running = begin(&cluster, 1, "ours.pcapng", &["--outer", "port 4001"]);
    let short = begin(
        &cluster,
        1,
        "short.pcapng",
        &["--outer", "-s40", "port 4001"],
    );
    let (a, b) = (
        udp(&cluster, Member::Pod(1, 1), "198.18.1.2:4001"),
        udp(&cluster, Member::Pod(2, 1), "198.18.2.2:4002"),
    );
    let sent = exchange(&a, &b);
    await_that("the wire's last packet", || {
        packets_so_far(&wire, "frame contains \"answer\"") == Some(1)
    });
    let pid = i32::try_from(tcpdump.0.id()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGINT).unwrap();
    tcpdump.0.wait().unwrap();
    let path = running.end("udp.dstport == 8472", sent.len() + 1);
    let seen = datagrams(&path);
    assert_eq!(seen.len(), sent.len() + 1);
    assert_eq!(seen, datagrams(&wire));
    let bad = [
        "-d",
        "udp.port==8472,vxlan",
        "-Y",
        "_ws.expert.severity >= 6291456",
    ];
    let bad = [&STRICT[..], &bad].concat();
    let none = Vec::<Vec<String>>::new();
    assert_eq!(tshark(&path, &bad, &["_ws.expert.message"]), none);
    let verdicts = tshark(&path, &[], &["frame.interface_name", "frame.comment"]);
    let encap = [
        "encap eth0",
        "handed to the kernel, to 192.0.2.2:8472 over vxlan",
    ];
    assert_eq!(verdicts[..sent.len()], vec![encap; sent.len()]);
    assert_eq!(verdicts[sent.len()][0], "decap eth0");
    // The length kept is the inner packet's, the length told the datagram's.
    let lens = tshark(
        &short.end("udp.dstport == 8472", sent.len() + 1),
        &["-d", "udp.port==8472,data"],
        &["frame.cap_len", "frame.len"],
    );
    for (packet, payload) in lens.iter().zip(&sent) {
        let (outer, inner) = (50, 28 + payload.len());
        let expected = [outer + inner.min(40), outer + inner].map(|len| len.to_string());
        assert_eq!(packet[..], expected);
    }
}

#[test]
fn capture_goes_on_when_the_device_is_made_anew_and_ends_when_the_daemon_does() {
    let mut cluster = Cluster::new(2, V4, VXLAN);
    cluster.await_ping(1, "198.18.2.2");
    let mut running = begin(&cluster, 1, "kept.pcapng", &["icmp"]);
    let ping = |what: &str| {
        let so_far = packets_so_far(&running.path, "icmp").unwrap();
        await_that(what, || {
            cluster.pings(1, "198.18.2.2");
            packets_so_far(&running.path, "icmp").is_some_and(|count| count >= so_far + 2)
        });
    };
    ping("a captured ping");
    cluster.ip(Member::Node(1), "link set flannel.1 down", 1);
    cluster.await_ping(1, "198.18.2.2");
    ping("a captured ping after the device was down");
    cluster.ip(Member::Node(1), "link del flannel.1", 1);
    cluster.await_ping(1, "198.18.2.2");
    ping("a captured ping after the device was made anew");
    assert!(running.child.try_wait().unwrap().is_none());
    cluster.end(1, Signal::SIGTERM);
    let (mut said, mut stderr) = (String::new(), running.child.stderr.take().unwrap());
    std::io::Read::read_to_string(&mut stderr, &mut said).unwrap();
    assert_eq!(running.child.wait().unwrap().code(), Some(1));
    assert!(said.contains("the daemon ended the capture"), "{said}");
    assert!(!tshark(&running.path, &[], &["icmp.type"]).is_empty());
}

#[test]
fn mixed_network_shows_what_our_data_plane_sends_and_what_the_kernel_routes() {
    let mut cluster = Cluster::idle(3, V4, r#"{"Type":"vxlan","Auto":true}"#);
    cluster.route_node_3();
    cluster.start_with(1, &["--vxlan=user"]);
    cluster.start(2);
    cluster.start(3);
    cluster.wait_until("a route past the tunnel", || {
        let peers = cluster.status(1)["peers"].clone();
        let mut peers = peers.as_array().into_iter().flatten();
        peers.any(|peer| peer["transport"] == "route")
    });
    cluster.await_ping(1, "198.18.3.2");
    let running = begin(&cluster, 1, "mixed.pcapng", &["icmp and host 198.18.1.2"]);
    await_that("pings to both", || {
        if !cluster.pings(1, "198.18.2.2") || !cluster.pings(1, "198.18.3.2") {
            return false;
        }
        let both = ["198.18.2.2", "198.18.3.2"].map(|pod| {
            let answer = format!("icmp.type == 0 && ip.src == {pod}");
            packets_so_far(&running.path, &answer).is_some_and(|count| count > 0)
        });
        both == [true, true]
    });
    let (path, said) = running.end_saying("icmp", 4);
    assert!(said.contains("reading packet sockets on eth0:"), "{said}");
    let fields = ["ip.dst", "frame.interface_name", "frame.comment"];
    let requests = tshark(&path, &["-Y", "icmp.type == 8"], &fields);
    for packet in requests {
        let (name, comment) = match packet[0].as_str() {
            "198.18.2.2" => (
                "encap eth0",
                "handed to the kernel, to 192.0.2.2 over route",
            ),
            _ => ("encap", "sent, to 198.51.100.3:8472 over vxlan, worker "),
        };
        assert_eq!(packet[1], name);
        assert!(packet[2].starts_with(comment), "{packet:?}");
    }
}

#[test]
fn what_the_kernel_could_not_keep_is_counted_and_nothing_is_missing() {
    let mut cluster = Cluster::idle(2, V4, VXLAN);
    for n in [1, 2] {
        // No probes and no router solicitations, so that nothing else is lost.
        let node = cluster.lab.netns(Member::Node(n));
        node.set_sysctls(&[
            ("ipv6/conf/all/disable_ipv6", "1"),
            ("ipv6/conf/default/disable_ipv6", "1"),
        ])
        .unwrap();
        cluster.start_with(n, &["--probe-port=0"]);
    }
    cluster.await_ping(1, "198.18.2.2");
    // The datagrams with which the daemons test checksums are over.
    for n in [1, 2] {
        cluster.wait_until("right checksums", || {
            cluster.status(n)["checksums"][0]["finding"] == "right"
        });
    }
    // Somebody listens, so that no errors come back.
    let _listener = udp(&cluster, Member::Pod(2, 1), "198.18.2.2:9");
    // What the kernel forwards, counted by itself before a device has it.
    for rule in [
        "add table ip count",
        "add chain ip count c { type filter hook forward priority 0 ; }",
        "add counter ip count sent",
        "add rule ip count c oifname flannel.1 udp dport 9 counter name sent",
    ] {
        cluster.run(Member::Node(1), "nft", rule);
    }
    let sent = || -> u64 {
        let shown = cluster.run(Member::Node(1), "nft", "list counter ip count sent");
        let (_, rest) = shown.split_once("packets ").unwrap();
        rest.split(' ').next().unwrap().parse().unwrap()
    };
    let running = begin(&cluster, 1, "flood.pcapng", &["udp port 9", "-s", "100"]);
    // A daemon that does not come to look, and more than a socket holds meanwhile: the kernel goes on without it.
    let daemon = cluster.daemons[0].as_ref().unwrap().0.id();
    let daemon = Pid::from_raw(i32::try_from(daemon).unwrap());
    kill(daemon, Signal::SIGSTOP).unwrap();
    let pod = udp(&cluster, Member::Pod(1, 1), "198.18.1.2:4001");
    cluster.wait_until("40 000 packets", || {
        for _ in 0..1000 {
            // A full queue on the way is no matter here.
            let _full = pod.send_to(&[7; 1000], "198.18.2.2:9");
        }
        sent() >= 40_000
    });
    kill(daemon, Signal::SIGCONT).unwrap();
    // There is room again.
    running.await_packets("udp.dstport == 9", 1);
    pod.send_to(b"last", "198.18.2.2:9").unwrap();
    running.await_packets("frame contains \"last\"", 1);
    let (_, said) = running.interrupt();
    let number = |before: &str| -> u64 {
        let (left, _) = said.split_once(before).unwrap();
        left.rsplit([' ', '\n']).next().unwrap().parse().unwrap()
    };
    let (shown, lost) = (number(" packets captured"), number(" more ("));
    assert!(lost > 1000, "{said}");
    assert_eq!(shown + lost, sent(), "{said}");
}
