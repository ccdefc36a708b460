//! The source check of IPIP, by real packets: forged IP in IP is written byte by byte, and a rule of the test's own behind the
//! check counts what it lets pass. No device that would unwrap it is needed. Needs root.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::process::Command;

use cluster::{Cluster, V4};
use etherparse::{IpFragOffset, IpNumber, Ipv4Header, PacketBuilder};
use ipnet::IpNet;
use loden::addr::Origin;
use loden::firewall::{SenderCheck, SenderScope, Senders, Tunnel, TunnelKind};
use loden::lab::Member;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

const NODE_1: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const NODE_2: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const NODE_3: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);
/// Another address of node 1.
const ALSO_NODE_1: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 101);
const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);
/// The other end of a tunnel that is none of ours.
const OTHER_TUNNEL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 78);

const PODS_2: Ipv4Addr = Ipv4Addr::new(198, 18, 2, 9);
const PODS_3: Ipv4Addr = Ipv4Addr::new(198, 18, 3, 9);

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Passed,
    UnknownPeer,
    SpoofedSource,
}

struct Bench {
    cluster: Cluster,
    runtime: tokio::runtime::Runtime,
    check: Option<SenderCheck>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.end();
    }
}

impl Bench {
    fn new(outer: bool) -> Self {
        let cluster = Cluster::idle(2, V4, r#"{"Type":"ipip"}"#);
        cluster.ip(Member::Node(1), "addr add 192.0.2.101/24 dev eth0", 1);
        cluster.run(
            Member::Node(1),
            "nft",
            "table inet seen { chain in { type filter hook input priority 0; ip protocol 4 counter; }; }",
        );
        let node = cluster.lab.netns(Member::Node(1));
        // Its threads stay in the namespace of the one that makes it.
        let (runtime, check) = node
            .run(|| {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .enable_all()
                    .build()
                    .unwrap();
                let programs = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into);
                let kind = TunnelKind::Ipip;
                let started = SenderCheck::start(programs.to_vec(), Tunnel { kind, outer });
                let check = runtime.block_on(started).unwrap();
                (runtime, check)
            })
            .unwrap();
        Self {
            cluster,
            runtime,
            check: Some(check),
        }
    }

    const fn check(&self) -> &SenderCheck {
        self.check.as_ref().unwrap()
    }

    /// Ends the check where its table is: it removes that in the namespace of the thread that drops it.
    fn end(&mut self) {
        let check = self.check.take();
        let node = self.cluster.lab.netns(Member::Node(1));
        node.run(|| drop(check)).unwrap();
    }

    fn nft(&self, words: &str) -> String {
        let mut command = Command::new("nft");
        command.args(words.split(' '));
        command.stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::null());
        let node = self.cluster.lab.netns(Member::Node(1));
        let output = node.spawn(&mut command).unwrap().wait_with_output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    }

    /// Waits until a set holds, or does not hold, this.
    fn await_element(&self, set: &str, text: &str, there: bool) {
        self.cluster.wait_until(text, || {
            let listing = self.nft(&format!("list set inet loden-ipip {set}"));
            !listing.is_empty() && listing.contains(text) == there
        });
    }

    /// How many of each fate there were.
    fn counts(&self) -> [u64; 3] {
        let status = self.runtime.block_on(self.check().status());
        let seen = self.nft("list chain inet seen in");
        let (_, packets) = seen.split_once("packets ").unwrap();
        let passed = packets.split(' ').next().unwrap().parse().unwrap();
        [passed, status.unknown_peer, status.spoofed_source]
    }

    /// Sends datagrams that make up one packet, and says what became of it.
    fn fate(&self, datagrams: &[Vec<u8>]) -> Fate {
        let before = self.counts();
        self.cluster
            .lab
            .netns(Member::Node(2))
            .run(|| {
                let raw = socket(
                    AddressFamily::Inet,
                    SockType::Raw,
                    SockFlag::SOCK_CLOEXEC,
                    SockProtocol::Raw,
                )
                .unwrap();
                for datagram in datagrams {
                    let to =
                        SockaddrIn::new(datagram[16], datagram[17], datagram[18], datagram[19], 0);
                    let sent = sendto(raw.as_raw_fd(), datagram, &to, MsgFlags::empty());
                    assert_eq!(sent, Ok(datagram.len()));
                }
            })
            .unwrap();
        let mut now = before;
        self.cluster.wait_until("the packet's fate", || {
            now = self.counts();
            now != before
        });
        let more: Vec<u64> = now.iter().zip(before).map(|(now, was)| now - was).collect();
        match more[..] {
            [1, 0, 0] => Fate::Passed,
            [0, 1, 0] => Fate::UnknownPeer,
            [0, 0, 1] => Fate::SpoofedSource,
            _ => panic!("{more:?}"),
        }
    }

    fn fate_of(&self, from: Ipv4Addr, inner: Ipv4Addr) -> Fate {
        self.fate(&[datagram(from, NODE_1, &packet(inner))])
    }
}

fn packet(from: Ipv4Addr) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(from.octets(), [198, 18, 1, 2], 64).udp(7, 9);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, b"inner").unwrap();
    bytes
}

fn header(from: Ipv4Addr, to: Ipv4Addr, len: usize) -> Ipv4Header {
    let len = u16::try_from(len).unwrap();
    Ipv4Header::new(len, 64, IpNumber(4), from.octets(), to.octets()).unwrap()
}

fn written(header: &Ipv4Header, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend(payload);
    bytes
}

fn datagram(from: Ipv4Addr, to: Ipv4Addr, inner: &[u8]) -> Vec<u8> {
    written(&header(from, to, inner.len()), inner)
}

/// The same in two fragments, the first of which ends before the inner source.
fn fragments(from: Ipv4Addr, inner: &[u8], number: u16) -> Vec<Vec<u8>> {
    let (first, rest) = inner.split_at(8);
    let fragment = |payload: &[u8], offset: u16, more| {
        let mut header = header(from, NODE_1, payload.len());
        header.identification = number;
        header.dont_fragment = false;
        header.more_fragments = more;
        header.fragment_offset = IpFragOffset::try_new(offset).unwrap();
        header.header_checksum = header.calc_header_checksum();
        written(&header, payload)
    };
    vec![fragment(first, 0, true), fragment(rest, 1, false)]
}

fn senders(peers: &[(Ipv4Addr, &str)]) -> Senders {
    let pair = |&(from, net): &(Ipv4Addr, &str)| {
        let net: IpNet = net.parse().unwrap();
        (Origin::Datagram(from.into()), net)
    };
    Senders {
        outer: peers.iter().map(|&(from, _)| from.into()).collect(),
        inner: peers.iter().map(pair).collect(),
        own: [NODE_1.into()].into(),
        others: [OTHER_TUNNEL.into()].into(),
        ..Senders::default()
    }
}

#[test]
fn ipip_of_no_peer_or_with_anothers_source_is_dropped_before_it_is_unwrapped_and_counted() {
    let mut bench = Bench::new(true);
    let scope = bench.check().last_status().scope;
    assert_eq!(
        (scope, bench.check().last_status().lacking),
        (
            SenderScope {
                outer: true,
                inner: true
            },
            None
        )
    );
    let two = [(NODE_2, "198.18.2.0/24"), (NODE_3, "198.18.3.9/32")];
    bench.check().want(senders(&two));
    bench.await_element("inner-v4", "192.0.2.3", true);

    assert_eq!(bench.fate_of(NODE_2, PODS_2), Fate::Passed);
    assert_eq!(bench.fate_of(NODE_3, PODS_3), Fate::Passed);
    let last = Ipv4Addr::new(198, 18, 2, 255);
    assert_eq!(bench.fate_of(NODE_2, last), Fate::Passed);
    for (from, inner) in [
        (NODE_2, PODS_3),
        (NODE_3, PODS_2),
        (NODE_3, Ipv4Addr::new(198, 18, 3, 10)),
        (NODE_2, Ipv4Addr::new(198, 18, 1, 2)),
        (NODE_2, Ipv4Addr::new(198, 18, 1, 255)),
        (NODE_2, Ipv4Addr::new(198, 18, 3, 0)),
        (NODE_2, STRANGER),
    ] {
        assert_eq!(
            bench.fate_of(from, inner),
            Fate::SpoofedSource,
            "{from} {inner}"
        );
    }
    assert_eq!(bench.fate_of(STRANGER, PODS_2), Fate::UnknownPeer);
    // What has no inner source.
    for len in [0, 15] {
        let stub = &packet(PODS_2)[..len];
        let fate = bench.fate(&[datagram(NODE_2, NODE_1, stub)]);
        assert_eq!(fate, Fate::SpoofedSource, "{len}");
        let fate = bench.fate(&[datagram(STRANGER, NODE_1, stub)]);
        assert_eq!(fate, Fate::UnknownPeer, "{len}");
    }
    // Fragments are put together first.
    let honest = fragments(NODE_2, &packet(PODS_2), 1);
    assert_eq!(bench.fate(&honest), Fate::Passed);
    let forged = fragments(NODE_2, &packet(PODS_3), 2);
    assert_eq!(bench.fate(&forged), Fate::SpoofedSource);
    // What the kernel gives to somebody else's device.
    assert_eq!(bench.fate_of(OTHER_TUNNEL, STRANGER), Fate::Passed);
    let elsewhere = datagram(STRANGER, ALSO_NODE_1, &packet(STRANGER));
    assert_eq!(bench.fate(&[elsewhere]), Fate::Passed);

    // A peer goes, and another comes in its place.
    bench.check().want(senders(&[
        (NODE_2, "198.18.2.0/24"),
        (STRANGER, "198.18.3.0/24"),
    ]));
    bench.await_element("inner-v4", "192.0.2.3", false);
    assert_eq!(bench.fate_of(NODE_3, PODS_3), Fate::UnknownPeer);
    assert_eq!(bench.fate_of(STRANGER, PODS_3), Fate::Passed);
    // The node moves to its other address.
    let mut moved = senders(&two);
    moved.own = [ALSO_NODE_1.into()].into();
    bench.check().want(moved);
    bench.await_element("own-v4", "192.0.2.101", true);
    assert_eq!(bench.fate_of(STRANGER, PODS_2), Fate::Passed);
    let there = datagram(STRANGER, ALSO_NODE_1, &packet(PODS_2));
    assert_eq!(bench.fate(&[there]), Fate::UnknownPeer);

    // Somebody empties a set, and somebody removes the table: it is made anew, and what was counted stays so.
    let [_, unknown, spoofed] = bench.counts();
    for words in [
        "flush set inet loden-ipip inner-v4",
        "delete table inet loden-ipip",
    ] {
        bench.nft(words);
        bench.await_element("inner-v4", "192.0.2.3", true);
    }
    let [_, still_unknown, still_spoofed] = bench.counts();
    assert_eq!((still_unknown, still_spoofed), (unknown, spoofed));

    // It goes with whoever keeps it.
    bench.end();
    let tables = bench.nft("list tables");
    assert!(!tables.contains("loden-ipip"), "{tables}");
}

#[test]
fn loose_check_of_ipip_asks_only_whether_somebody_has_the_inner_source() {
    let bench = Bench::new(false);
    bench.check().want(senders(&[
        (NODE_2, "198.18.2.0/24"),
        (NODE_3, "198.18.3.0/24"),
    ]));
    bench.await_element("inner-v4", "0xc6120300", true);
    assert_eq!(bench.fate_of(NODE_2, PODS_2), Fate::Passed);
    assert_eq!(bench.fate_of(NODE_2, PODS_3), Fate::Passed);
    assert_eq!(bench.fate_of(STRANGER, PODS_3), Fate::Passed);
    assert_eq!(
        bench.fate_of(NODE_2, Ipv4Addr::new(198, 18, 1, 2)),
        Fate::SpoofedSource
    );
    assert_eq!(bench.fate_of(OTHER_TUNNEL, STRANGER), Fate::Passed);
    let status = bench.check().last_status();
    assert_eq!((status.unknown_peer, status.repairs), (0, 0));
}
