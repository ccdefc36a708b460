use std::io::Write as _;
use std::process::{Command, Stdio};

use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::super::record::Transport;
use super::*;

fn record(direction: Direction, verdict: Verdict, len: usize) -> Record {
    Record {
        time_ns: 0,
        direction,
        verdict,
        outer: Some("192.0.2.7:8285".parse().unwrap()),
        local_port: 1,
        tos: 0,
        worker: 0,
        transport: Transport::Udp,
        inner_at: 0,
        packets: 1,
        len: u32::try_from(len).unwrap(),
    }
}

fn matches(filter: &str, record: &Record, packet: &[u8]) -> bool {
    let filter: Filter = filter.parse().unwrap();
    filter.matches(&Facts::of(record, packet))
}

/// Packets of every kind the filter tells apart.
fn packets() -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let mut add = |packet: Vec<u8>| packets.push(packet);
    for (from, to) in [
        ([198, 18, 1, 2], [198, 18, 2, 3]),
        ([198, 19, 0, 1], [198, 18, 1, 2]),
    ] {
        for (src, dst) in [(80, 40_000), (40_000, 80), (443, 53), (8080, 8081)] {
            let v4 = || PacketBuilder::ipv4(from, to, 9);
            let build = |len: usize| {
                let mut udp = Vec::new();
                v4().udp(src, dst).write(&mut udp, &vec![0; len]).unwrap();
                udp
            };
            add(build(10));
            add(build(1000));
            let mut tcp = Vec::new();
            v4().tcp(src, dst, 1, 2).write(&mut tcp, b"x").unwrap();
            add(tcp.clone());
            // A later fragment: its first bytes are no ports.
            tcp[6] = 0;
            tcp[7] = 8;
            add(tcp);
            let (mut from6, mut to6) = ([0; 16], [0; 16]);
            from6[..2].copy_from_slice(&[0xfd, 0]);
            to6[..2].copy_from_slice(&[0xfd, 1]);
            from6[15] = from[3];
            to6[15] = to[3];
            let mut v6 = Vec::new();
            PacketBuilder::ipv6(from6, to6, 9)
                .udp(src, dst)
                .write(&mut v6, b"six")
                .unwrap();
            add(v6);
        }
        let mut icmp = Vec::new();
        PacketBuilder::ipv4(from, to, 9)
            .icmpv4_echo_request(1, 2)
            .write(&mut icmp, b"ping")
            .unwrap();
        add(icmp);
    }
    packets
}

/// The packets as a pcap file of raw IP packets (link type 101), numbered by their time.
fn pcap(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 101] {
        file.extend(word.to_le_bytes());
    }
    for (number, packet) in (0_u32..).zip(packets) {
        let len = u32::try_from(packet.len()).unwrap();
        for word in [number, 0, len, len] {
            file.extend(word.to_le_bytes());
        }
        file.extend(packet);
    }
    file
}

/// Which packets tcpdump selects, by number.
fn tcpdump(file: &[u8], filter: &str) -> Vec<usize> {
    let mut child = Command::new("tcpdump")
        .args(["-r", "-", "-n", "-tt", "-q", filter])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(file).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{filter}: {errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    let number = |line: &str| line.split('.').next().unwrap().parse().ok();
    text.lines().filter_map(number).collect()
}

#[test]
fn expressions_select_what_tcpdump_selects() {
    let packets = packets();
    let file = pcap(&packets);
    for filter in [
        "tcp",
        "udp",
        "icmp",
        "ip",
        "ip6",
        "ip proto 17 or ip6 proto 17",
        "host 198.18.1.2",
        "src host 198.18.1.2",
        "src 198.18.1.2",
        "dst 198.18.1.2",
        "host fd00::1",
        "net 198.18.0.0/16",
        "src net 198.19.0.0/16",
        "dst net fd01::/16",
        "port 80",
        "src port 80",
        "dst port 80",
        "tcp port 80",
        "udp src port 443",
        "tcp dst port 53 or 80",
        "port 80 or 443 and udp",
        "udp and (port 80 or 443)",
        "not tcp",
        "! ( tcp || udp )",
        "not port 80 and not icmp",
        "not (port 80 and tcp) or icmp",
        "portrange 8000-8100",
        "udp dst portrange 53-80",
        "less 100",
        "greater 100",
        "host 198.18.1.2 or 198.18.2.3 and tcp",
        "host 198.18.1.2&&port 80",
    ] {
        // Its own words for what we write shorter.
        let ours = filter.replace("ip proto 17 or ip6 proto 17", "proto 17");
        let ours: Vec<usize> = packets
            .iter()
            .enumerate()
            .filter(|(_, packet)| {
                let record = record(Direction::Encap, Verdict::Sent, packet.len());
                matches(&ours, &record, packet)
            })
            .map(|(number, _)| number)
            .collect();
        let theirs = tcpdump(&file, filter);
        assert_eq!(ours, theirs, "{filter}");
        assert!(!ours.is_empty(), "{filter} selects nothing");
        assert!(ours.len() < packets.len(), "{filter} selects everything");
    }
}

#[test]
fn verdict_direction_and_peer_are_told_apart() {
    let packet = &packets()[0];
    let no_route = Verdict::Dropped(DropReason::NoRoute);
    let answered = Verdict::Answered(DropReason::TtlExpired);
    let cases = [
        ("encap", Direction::Encap, Verdict::Sent, true),
        ("encap", Direction::Decap, Verdict::Sent, false),
        ("decap", Direction::Decap, Verdict::Delivered, true),
        ("sent", Direction::Encap, Verdict::Fragmented, true),
        ("sent", Direction::Encap, no_route, false),
        ("delivered", Direction::Decap, Verdict::Delivered, true),
        ("dropped", Direction::Encap, no_route, true),
        ("dropped", Direction::Encap, answered, false),
        ("answered", Direction::Encap, answered, true),
        ("reason ttl_expired", Direction::Encap, answered, true),
        ("reason no_route", Direction::Encap, no_route, true),
        ("reason malformed", Direction::Encap, no_route, false),
        ("peer 192.0.2.7", Direction::Encap, Verdict::Sent, true),
        ("peer 192.0.2.8", Direction::Encap, Verdict::Sent, false),
        ("dropped and not encap", Direction::Encap, no_route, false),
    ];
    for (filter, direction, verdict, expected) in cases {
        let record = record(direction, verdict, packet.len());
        assert_eq!(matches(filter, &record, packet), expected, "{filter}");
    }
}

#[test]
fn packet_that_is_none_matches_by_verdict_only() {
    let record = record(Direction::Decap, Verdict::Dropped(DropReason::TooShort), 3);
    for (filter, expected) in [
        ("", true),
        ("dropped", true),
        ("ip or ip6", false),
        ("port 80", false),
        ("net 0.0.0.0/0", false),
        ("not host 198.18.0.1", true),
    ] {
        assert_eq!(matches(filter, &record, b"\x45\0\0"), expected, "{filter}");
    }
}

#[test]
fn headers_alone_suffice() {
    let packet = &packets()[1];
    let record = record(Direction::Encap, Verdict::Sent, packet.len());
    assert!(matches("udp src port 80", &record, &packet[..28]));
}

#[test]
fn nonsense_is_refused_with_the_word() {
    for (text, part) in [
        ("port", "a port's number is missing"),
        ("port 65536", "\"65536\""),
        ("port +80", "\"+80\""),
        ("host example.org", "\"example.org\""),
        ("net 198.18.0.0/33", "\"198.18.0.0/33\""),
        ("tcp src 80", "\"80\""),
        ("(tcp", "`)` is missing"),
        ("tcp)", "\")\""),
        ("tcp udp", "`and` or `or`"),
        ("tcp &udp", "\"&\""),
        ("tcp and", "a primitive is missing"),
        ("reason bored", "\"bored\""),
        ("not", "missing"),
        ("\u{e9}t\u{e9}", "\u{e9}t\u{e9}"),
    ] {
        let error = text.parse::<Filter>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    for text in [
        "not ".repeat(200) + "tcp",
        "(".repeat(200) + "tcp" + &")".repeat(200),
        vec!["tcp"; 200].join(" or "),
        "tcp or ".repeat(1000) + "tcp",
    ] {
        let error = text.parse::<Filter>().unwrap_err();
        assert_eq!(error, FilterError::TooLong);
    }
}

#[test]
fn deepest_expression_that_parses_is_matched_without_losing_a_value() {
    let packet = &packets()[0];
    let record = record(Direction::Encap, Verdict::Sent, packet.len());
    let deep = "encap and (".repeat(31) + "udp port 80" + &")".repeat(31);
    assert!(matches(&deep, &record, packet));
    let wrong = deep.replacen("encap", "decap", 1);
    assert!(!matches(&wrong, &record, packet));
}

/// A random expression, and whether it holds for a packet that is `encap`, `sent` and UDP.
fn expression() -> impl Strategy<Value = (String, bool)> {
    let leaf = prop_oneof![
        Just(("encap".to_owned(), true)),
        Just(("decap".to_owned(), false)),
        Just(("sent".to_owned(), true)),
        Just(("dropped".to_owned(), false)),
        Just(("udp".to_owned(), true)),
        Just(("tcp".to_owned(), false)),
    ];
    leaf.prop_recursive(6, 40, 2, |inner| {
        prop_oneof![
            inner
                .clone()
                .prop_map(|(text, is)| (format!("not ({text})"), !is)),
            (inner.clone(), inner.clone())
                .prop_map(|((a, x), (b, y))| (format!("({a}) and ({b})"), x && y)),
            (inner.clone(), inner).prop_map(|((a, x), (b, y))| (format!("({a}) or ({b})"), x || y)),
        ]
    })
}

proptest! {
    #[test]
    fn connectives_mean_what_they_say((text, expected) in expression()) {
        let packet = &packets()[0];
        let record = record(Direction::Encap, Verdict::Sent, packet.len());
        prop_assert_eq!(matches(&text, &record, packet), expected);
        let filter: Filter = text.parse().unwrap();
        prop_assert_eq!(filter.to_string().parse::<Filter>().unwrap(), filter);
    }
}
