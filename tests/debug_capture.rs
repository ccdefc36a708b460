//! `loden capture` against real daemons: what its files say, read by tshark, is what was sent and what the wire
//! carried. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/captured.rs"]
mod captured;
mod common;

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use captured::{LIMIT, Running, await_that, capture, hex, packets_so_far, tshark};
use common::{await_ping, lab, pings, spec};
use loden::lab::{Backend, Engine, Lab, Member, Spec, Wire};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Two nodes with a pod each, and a place for files.
struct Cluster {
    lab: Lab,
    dir: TempDir,
}

impl Cluster {
    fn new(engine: Engine, wire: Wire) -> Self {
        Self::of(Backend::Udp, engine, wire)
    }

    fn of(backend: Backend, engine: Engine, wire: Wire) -> Self {
        let spec = Spec {
            engine: Some(engine),
            wire,
            ..spec(2, backend)
        };
        let mut lab = lab(spec);
        lab.await_connected().unwrap();
        Self {
            lab,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pod(&self, node: u8) -> Ipv4Addr {
        self.lab.pod_addr(node, 1).unwrap()
    }

    /// A socket of a node's pod.
    fn udp(&self, node: u8, port: u16) -> UdpSocket {
        let at = SocketAddr::new(self.pod(node).into(), port);
        let netns = self.lab.netns(Member::Pod(node, 1));
        let socket = netns.run(|| UdpSocket::bind(at)).unwrap().unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket
    }

    fn capture(&self, node: u8, args: &[&str]) -> Command {
        capture(&self.lab.status_socket(node), args)
    }

    fn begin(&self, node: u8, name: &str, args: &[&str]) -> Running {
        Running::begin(&self.lab.status_socket(node), self.path(name), args)
    }
}

/// Datagrams from pod 1 to pod 2 of lengths that tell them apart, and one of the answers.
fn exchange(cluster: &Cluster, count: u8) -> Vec<Vec<u8>> {
    let (a, b) = (cluster.udp(1, 4001), cluster.udp(2, 4002));
    let mut sent = Vec::new();
    let mut buffer = [0; 2000];
    for number in 0..count {
        let payload = vec![number; 100 + usize::from(number)];
        a.send_to(&payload, b.local_addr().unwrap()).unwrap();
        let (len, from) = receive(&b, &mut buffer);
        assert_eq!(
            (&buffer[..len], from),
            (&payload[..], a.local_addr().unwrap())
        );
        sent.push(payload);
    }
    b.send_to(b"answer", a.local_addr().unwrap()).unwrap();
    receive(&a, &mut buffer);
    sent
}

/// The next datagram. Whoever is stopped and goes on is told so where a wait has a limit (signal(7)).
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> (usize, SocketAddr) {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => return received.unwrap(),
        }
    }
}

fn fields_are_what_was_sent(engine: Engine) {
    let cluster = Cluster::new(engine, Wire::Packet);
    let at_sender = cluster.begin(1, "sender.pcapng", &["udp port 4001"]);
    let at_receiver = cluster.begin(2, "receiver.pcapng", &["udp", "and", "port", "4001"]);
    let sent = exchange(&cluster, 10);
    let (a, b) = (cluster.pod(1).to_string(), cluster.pod(2).to_string());
    let fields = [
        "frame.interface_name",
        "frame.packet_flags_direction",
        "ip.src",
        "udp.srcport",
        "ip.dst",
        "udp.dstport",
        "ip.ttl",
        "ip.len",
        "frame.len",
        "frame.cap_len",
        "data.data",
        "frame.comment",
        "_ws.malformed",
    ];
    let strict = [
        "-o",
        "ip.check_checksum:TRUE",
        "-o",
        "udp.check_checksum:TRUE",
    ];
    // Node 1 sent it, with the TTL that two hops, its kernel and its daemon, leave; node 2's daemon took another.
    for (file, direction, flags, ttl, outcome) in [
        (
            at_sender,
            "encap",
            "0x00000002",
            "62",
            "sent, to 192.0.2.2:8285 over udp",
        ),
        (
            at_receiver,
            "decap",
            "0x00000001",
            "61",
            "delivered, from 192.0.2.1:",
        ),
    ] {
        let path = file.end("udp.port == 4001", sent.len() + 1);
        let packets = tshark(&path, &strict, &fields);
        assert_eq!(packets.len(), sent.len() + 1);
        for (packet, payload) in packets.iter().zip(&sent) {
            let len = (20 + 8 + payload.len()).to_string();
            let expected = [
                direction, flags, &a, "4001", &b, "4002", ttl, &len, &len, &len,
            ];
            assert_eq!(packet[..10], expected, "{packet:?}");
            assert_eq!(packet[10], hex(payload));
            assert!(packet[11].starts_with(outcome), "{packet:?}");
            assert_eq!(packet[12], "");
        }
        let answer = packets.last().unwrap();
        assert_ne!(
            answer[0], direction,
            "the answer goes the other way: {answer:?}"
        );
        assert_eq!(answer[10], hex(b"answer"));
        let bad = tshark(
            &path,
            &[&strict[..], &["-Y", "_ws.expert.severity >= 6291456"]].concat(),
            &["frame.number", "_ws.expert.message"],
        );
        assert_eq!(bad, Vec::<Vec<String>>::new(), "warnings or errors");
    }
}

#[test]
fn fields_are_what_was_sent_by_the_fast_engine() {
    fields_are_what_was_sent(Engine::Mmsg);
}

#[test]
fn fields_are_what_was_sent_by_the_portable_engine() {
    fields_are_what_was_sent(Engine::Portable);
}

/// What tells one datagram on the wire from another: of an outer and an inner header where there are two.
const OUTER: [&str; 11] = [
    "ip.src",
    "ip.dst",
    "udp.srcport",
    "udp.dstport",
    "ip.dsfield",
    "ip.flags.df",
    "ip.len",
    "ip.id",
    "ip.ttl",
    "udp.length",
    "data.data",
];

/// What stands between them in VXLAN. A wire has an Ethernet header in front that a file of ours has not.
const VXLAN: [&str; 5] = ["vxlan.flags", "vxlan.vni", "eth.dst", "eth.src", "eth.type"];

/// The datagrams to `port` of a file as tshark reads them. Of fields that both headers have, the outer one's value comes
/// first; identification and TTL of the outer header are the kernel's and not compared.
fn wire_view(path: &Path, port: u16) -> BTreeSet<Vec<String>> {
    let lua = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/loden.lua");
    let lua = format!("lua_script:{}", lua.display());
    let filter = format!("udp.port == {port} && udp.port == 4002");
    let (args, fields) = if port == 8285 {
        (["-X", &lua, "-Y", &filter], OUTER.to_vec())
    } else {
        let decode = ["-d", "udp.port==8472,vxlan", "-Y", &filter];
        (decode, [&OUTER[..], &VXLAN].concat())
    };
    let inner_only = |(field, value): (&&str, String)| match *field {
        "ip.id" | "ip.ttl" => value.split(',').nth(1).unwrap().to_owned(),
        _ if field.starts_with("eth.") => value.rsplit(',').next().unwrap().to_owned(),
        _ => value,
    };
    tshark(path, &args, &fields)
        .into_iter()
        .map(|packet| fields.iter().zip(packet).map(inner_only).collect())
        .collect()
}

fn outer_headers_are_those_on_the_wire(backend: Backend, port: u16) {
    let cluster = Cluster::of(backend, Engine::Mmsg, Wire::PacketNoGro);
    let wire = cluster.path("wire.pcap");
    let datagrams = format!("udp.port == {port}");
    let mut tcpdump = Command::new("tcpdump");
    let tcpdump = cluster.lab.netns(Member::Node(2)).spawn(
        tcpdump
            .args(["-i", "eth0", "-U", "--immediate-mode", "-w"])
            .arg(&wire)
            .arg(format!("udp port {port}"))
            .stderr(Stdio::null()),
    );
    let mut tcpdump = tcpdump.unwrap();
    await_that("tcpdump's file", || {
        wire.metadata().is_ok_and(|meta| meta.len() >= 24)
    });
    let ours = [1, 2].map(|node| {
        let name = format!("ours{node}.pcapng");
        cluster.begin(node, &name, &["port 4002", "--outer"])
    });
    let sent = exchange(&cluster, 10);
    await_that("the wire's packets", || {
        // The last one.
        packets_so_far(&wire, "frame contains \"answer\"") == Some(1)
    });
    kill(
        Pid::from_raw(i32::try_from(tcpdump.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    tcpdump.wait().unwrap();
    let on_the_wire = wire_view(&wire, port);
    assert_eq!(on_the_wire.len(), sent.len() + 1);
    for (node, running) in (1..).zip(ours) {
        let path = running.end(&datagrams, sent.len() + 1);
        // What a node received went through its daemon, which took one from the inner TTL.
        let sender = format!("192.0.2.{node},");
        let ttl = OUTER.iter().position(|field| *field == "ip.ttl").unwrap();
        let seen: BTreeSet<Vec<String>> = wire_view(&path, port)
            .into_iter()
            .map(|mut packet| {
                if !packet[0].starts_with(&sender) {
                    let inner: u8 = packet[ttl].parse().unwrap();
                    packet[ttl] = (inner + 1).to_string();
                }
                packet
            })
            .collect();
        assert_eq!(seen, on_the_wire, "node {node}");
    }
}

#[test]
fn outer_headers_of_plain_datagrams_are_those_on_the_wire() {
    outer_headers_are_those_on_the_wire(Backend::Udp, 8285);
}

#[test]
fn outer_headers_of_vxlan_in_user_space_are_those_on_the_wire() {
    outer_headers_are_those_on_the_wire(Backend::UserVxlan, 8472);
}

#[test]
fn documented_decode_as_line_shows_the_inner_packets_without_the_dissector() {
    let cluster = Cluster::new(Engine::Mmsg, Wire::Packet);
    let running = cluster.begin(1, "outer.pcapng", &["--outer", "dst port 4002"]);
    let sent = exchange(&cluster, 3);
    let path = running.end("udp.port == 8285", sent.len());
    let packets = tshark(&path, &["-d", "udp.port==8285,ip"], &["udp.dstport"]);
    assert_eq!(packets, vec![vec!["8285,4002"]; sent.len()]);
}

/// Sends `len` bytes over TCP from pod 1 to pod 2.
fn transfer(cluster: &Cluster, len: usize) {
    let at = SocketAddr::new(cluster.pod(2).into(), 5001);
    let netns = cluster.lab.netns(Member::Pod(2, 1));
    let listener = netns
        .run(|| std::net::TcpListener::bind(at))
        .unwrap()
        .unwrap();
    let reader = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap()
    });
    let netns = cluster.lab.netns(Member::Pod(1, 1));
    let stream = netns.run(|| std::net::TcpStream::connect_timeout(&at, LIMIT));
    stream.unwrap().unwrap().write_all(&vec![7; len]).unwrap();
    assert_eq!(reader.join().unwrap(), len as u64);
}

#[test]
fn superpackets_are_shown_whole_or_as_segments_and_no_byte_is_missing() {
    const LEN: usize = 3_000_000;
    let cluster = Cluster::new(Engine::Mmsg, Wire::Superpacket);
    for node in [1, 2] {
        let direction = if node == 1 { "encap" } else { "decap" };
        let expression = format!("{direction} and tcp dst port 5001");
        let whole = cluster.begin(node, "whole.pcapng", &[&expression, "-s", "100"]);
        let segments = cluster.begin(node, "segments.pcapng", &[&expression, "--segments"]);
        transfer(&cluster, LEN);
        let fin = "tcp.flags.fin == 1";
        let (whole, segments) = (whole.end(fin, 1), segments.end(fin, 1));
        let lens = |path: &Path| -> Vec<usize> {
            // Each byte counts once, however often TCP sent it.
            let packets = tshark(path, &[], &["tcp.seq", "tcp.len"]);
            let mut end = 1;
            let mut lens = Vec::new();
            for packet in packets {
                let (seq, len): (usize, usize) =
                    (packet[0].parse().unwrap(), packet[1].parse().unwrap());
                if len > 0 {
                    assert!(seq <= end, "bytes before {seq} were not seen");
                    lens.push(len);
                    end = end.max(seq + len);
                }
            }
            assert_eq!(end - 1, LEN);
            lens
        };
        let (whole, segments) = (lens(&whole), lens(&segments));
        let (longest, cut) = (whole.iter().max().unwrap(), segments.iter().max().unwrap());
        assert!(
            *longest > 20_000,
            "node {node}: nothing was whole: {longest}"
        );
        assert!(*cut <= 1472 - 40, "node {node}: not cut: {cut}");
        std::fs::remove_file(cluster.path("whole.pcapng")).unwrap();
        std::fs::remove_file(cluster.path("segments.pcapng")).unwrap();
    }
}

#[test]
fn what_is_dropped_or_answered_is_shown_with_its_reason_and_nothing_else_is() {
    let cluster = Cluster::new(Engine::Mmsg, Wire::Packet);
    let dropped = cluster.begin(1, "dropped.pcapng", &["--dropped-only"]);
    let answered = cluster.begin(1, "answered.pcapng", &["answered"]);
    await_ping(&cluster.lab, Member::Pod(1, 1), (2, 1));
    // Nobody's subnet; and a TTL that ends at the daemon.
    let pod = cluster.lab.netns(Member::Pod(1, 1));
    let ping = |args: &[&str]| {
        let output = pod.run(|| Command::new("ping").args(args).output());
        assert!(!output.unwrap().unwrap().status.success(), "{args:?}");
    };
    ping(&["-n", "-c1", "-W1", "198.18.250.1"]);
    // Another worker may have the next one.
    answered.await_packets("ip", 1);
    let peer = cluster.pod(2).to_string();
    ping(&["-n", "-c1", "-W1", "-t2", &peer]);
    // A stranger on the underlay, and a peer that forges a source.
    let node = cluster.lab.netns(Member::Node(2));
    let stranger: SocketAddr = "192.0.2.200:8285".parse().unwrap();
    cluster
        .lab
        .run(
            Member::Node(2),
            "ip",
            &["addr", "add", "192.0.2.200/24", "dev", "eth0"],
        )
        .unwrap();
    let mut forged = Vec::new();
    etherparse::PacketBuilder::ipv4([198, 18, 77, 1], cluster.pod(1).octets(), 9)
        .udp(7, 9)
        .write(&mut forged, b"forged")
        .unwrap();
    let own = SocketAddr::new(IpAddr::from([192, 0, 2, 2]), 0);
    for (from, count) in [(stranger, 1), (own, 2)] {
        let socket = node.run(|| UdpSocket::bind(SocketAddr::new(from.ip(), 0)));
        socket
            .unwrap()
            .unwrap()
            .send_to(&forged, "192.0.2.1:8285")
            .unwrap();
        dropped.await_packets("ip", count);
    }
    let fields = ["frame.interface_name", "ip.src", "frame.comment"];
    let dropped = tshark(&dropped.end("ip", 2), &[], &fields);
    let reasons: Vec<&str> = dropped
        .iter()
        .map(|packet| {
            assert_eq!(packet[..2], ["decap", "198.18.77.1"]);
            packet[2].split(", ").next().unwrap()
        })
        .collect();
    assert_eq!(
        reasons,
        ["dropped: unknown_peer", "dropped: spoofed_source"]
    );
    assert!(dropped[0][2].contains("from 192.0.2.200:"), "{dropped:?}");
    let answered = tshark(&answered.end("ip", 2), &[], &fields);
    let own = cluster.pod(1).to_string();
    let reasons: Vec<&str> = answered
        .iter()
        .map(|packet| {
            assert_eq!(packet[..2], ["encap", &own]);
            packet[2].split(", ").next().unwrap()
        })
        .collect();
    assert_eq!(reasons, ["answered: no_route", "answered: ttl_expired"]);
}

#[test]
fn pipe_count_limits_and_text_work_as_documented() {
    let cluster = Cluster::new(Engine::Mmsg, Wire::Packet);
    // `loden capture -w - | tshark -r -`, which reads until the count is reached.
    let mut capture = cluster
        .capture(1, &["-c", "4", "icmp", "-w", "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let reader = Command::new("tshark")
        .args(["-n", "-r", "-", "-T", "fields", "-e", "icmp.type"])
        .stdin(capture.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    await_that("the pipe's four packets", || {
        // However long its answer takes, the next one comes after it.
        let peer = cluster.pod(2).to_string();
        let ping = ["-n", "-q", "-c1", "-W20", &peer];
        cluster.lab.run(Member::Pod(1, 1), "ping", &ping).unwrap();
        capture.try_wait().unwrap().is_some()
    });
    assert!(capture.wait().unwrap().success());
    let output = reader.wait_with_output().unwrap();
    // One ping at a time, each answered before the next, by different workers. It may begin with an answer.
    let output = String::from_utf8(output.stdout).unwrap();
    let types: Vec<&str> = output.lines().collect();
    assert!(
        types == ["8", "0", "8", "0"] || types == ["0", "8", "0", "8"],
        "{types:?}"
    );

    // Text, ended by its duration; a filter that matches nothing prints nothing.
    let text = |args: &[&str]| {
        let output = cluster.capture(1, args).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap(),
            errors,
        )
    };
    let (ok, none, errors) = text(&["-d", "1", "port 1"]);
    assert!(ok, "{errors}");
    assert_eq!(
        (none.as_str(), errors.as_str()),
        ("", "0 packets captured\n")
    );
    let (ok, _, errors) = text(&["port", "http"]);
    assert!(
        !ok && errors.contains("\"http\" is not a port's number"),
        "{errors}"
    );

    // A ring of two files of 1 MiB, through which more than three pass.
    let ring = cluster.path("ring");
    let running = cluster
        .capture(1, &["encap and tcp", "-C", "1", "-W", "2", "-w"])
        .arg(&ring)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    await_that("the ring's first file", || cluster.path("ring0").exists());
    transfer(&cluster, 3_600_000);
    let running = Running {
        child: running,
        path: cluster.path("ring1"),
    };
    // Which file is the last depends on how often TCP sent what.
    let files = ["ring0", "ring1"].map(|file| cluster.path(file));
    await_that("the connection's end", || {
        let mut ends = files
            .iter()
            .map(|path| packets_so_far(path, "tcp.flags.fin == 1"));
        ends.any(|count| count.is_some_and(|count| count > 0))
    });
    let (_, said) = running.interrupt();
    assert!(!said.contains("lost"), "{said}");
    for path in files {
        let file = path.display();
        let len = path.metadata().unwrap().len();
        assert!((1..(1 << 20) + (1 << 17)).contains(&len), "{file}: {len}");
        assert!(!tshark(&path, &[], &["frame.number"]).is_empty());
    }
    assert!(!cluster.path("ring2").exists());
}

#[test]
fn capture_says_so_when_the_daemon_goes_and_keeps_what_it_has() {
    let cluster = Cluster::new(Engine::Mmsg, Wire::Packet);
    let mut running = cluster.begin(1, "kept.pcapng", &["icmp"]);
    await_that("a captured ping", || {
        pings(&cluster.lab, Member::Pod(1, 1), (2, 1));
        packets_so_far(&running.path, "icmp").is_some_and(|count| count > 0)
    });
    let daemon = cluster.lab.daemon_pids()[0];
    kill(Pid::from_raw(daemon), Signal::SIGTERM).unwrap();
    let mut errors = String::new();
    let mut stderr = running.child.stderr.take().unwrap();
    stderr.read_to_string(&mut errors).unwrap();
    assert_eq!(running.child.wait().unwrap().code(), Some(1));
    assert!(errors.contains("the daemon ended the capture"), "{errors}");
    assert!(!tshark(&running.path, &[], &["icmp.type"]).is_empty());
}
