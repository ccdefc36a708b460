//! Decap of VXLAN datagrams: whatever arrives, the first thing that is wrong with its frame names the drop, only
//! what a known VTEP may send is delivered, and nothing of it changes but TTL, ECN and an unfinished checksum.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, LazyLock};

use etherparse::{EtherType, Ethernet2Header};
use loden::addr::{Mac, Mtu, Vni};
use loden::datapath::encapsulation::Inner;
use loden::datapath::forward::{DecapVerdict, Outer, Rules};
use loden::datapath::table::{Clock, Table};
use loden::datapath::{
    DropReason, Encapsulation, EngineKind, Local, PeerRoute, Settings, SourceCheck, SourcePort,
};
use loden::wire::{checksum, ip};

const OURS: [u8; 6] = [2, 0, 0, 0, 0, 2];
const THEIRS: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 9));
const HEADER_LEN: usize = 22;

struct Node {
    settings: Settings,
    rules: Rules,
    table: Table,
}

/// Node 2, which knows node 1.
static NODE: LazyLock<Node> = LazyLock::new(|| {
    let settings = Settings {
        engine: EngineKind::Portable,
        workers: 1,
        pin: false,
        device: String::new(),
        encapsulation: Encapsulation::Vxlan {
            vni: Vni::new(1).unwrap(),
            mac: Mac::new(OURS).unwrap(),
        },
        bind: SocketAddr::from(([192, 0, 2, 2], 8472)),
        mtu: Mtu::new(1450).unwrap(),
        source_check: SourceCheck::Strict,
        source_port: SourcePort::Spread,
        local: Local {
            nets: vec![
                "198.18.2.0/24".parse().unwrap(),
                "fd00:18:0:2::/64".parse().unwrap(),
            ],
            addrs: vec![[192, 0, 2, 2].into()],
            icmp_v4: None,
            icmp_v6: None,
        },
        on_event: Arc::new(drop),
    };
    let routes = ["198.18.1.0/24", "fd00:18:0:1::/64"].map(|net| PeerRoute {
        net: net.parse().unwrap(),
        addr: SocketAddr::new(PEER, 8472),
        mac: Mac::new(THEIRS),
        ecn: false,
    });
    let table = Table::build(&routes, settings.encapsulation, &Table::default());
    let rules = Rules::new(&settings, Clock::start());
    Node {
        settings,
        rules,
        table,
    }
});

/// Input: who sends (even: the peer), the outer TOS byte, then the datagram.
pub fn run(data: &[u8]) {
    let Some(([who, tos], datagram)) = data.split_first_chunk() else {
        return;
    };
    let Node {
        settings,
        rules,
        table,
    } = &*NODE;
    let encapsulation = settings.encapsulation;
    for stride in [datagram.len() / 2, datagram.len()] {
        let is_one = encapsulation.is_one(datagram, stride);
        assert!(!is_one || datagram.len() > HEADER_LEN);
    }

    let mut bytes = datagram.to_vec();
    let wrong = wrong_frame(datagram);
    let inner = match encapsulation.open(&mut bytes) {
        Ok(inner) => inner,
        Err(reason) => {
            assert_eq!(wrong, Some(reason));
            assert_eq!(bytes, datagram, "what is dropped is not changed");
            return;
        }
    };
    assert_eq!(wrong, None);
    let parsed = ip::parse(inner.packet).ok();
    let meta = parsed.filter(|meta| inner.may_be(meta.version()));
    assert_eq!(meta.is_none(), ip_is_wrong(datagram, inner.packet));
    let Some(meta) = meta else { return };
    let Inner { packet, sender, .. } = inner;
    let before = packet.to_vec();
    let is_peer = who % 2 == 0;
    let outer = Outer {
        addr: if is_peer { PEER } else { STRANGER },
        tos: *tos,
        mac: sender,
    };
    let is_theirs = sender == Mac::new(THEIRS) && is_peer;
    match rules.decap(table, packet, &meta, outer) {
        DecapVerdict::Deliver(peer) | DecapVerdict::Answer(peer, _, _) => {
            assert!(is_theirs, "only the peer's VTEP may send");
            assert_eq!(peer.mac, sender);
        }
        DecapVerdict::Drop(reason) => {
            assert_eq!(packet, before);
            assert!(reason != DropReason::SpoofedMac || !is_theirs);
            return;
        }
    }
    // TTL, ECN and the IPv4 checksum over them.
    let header_len = if before[0] >> 4 == 4 { 20 } else { 8 };
    assert_eq!(packet[header_len..], before[header_len..]);

    let packet = packet.get_mut(..meta.total_len()).unwrap();
    let before = packet.to_vec();
    encapsulation.finish(packet, settings.mtu, checksum::sum_scalar);
    let changed = before.iter().zip(packet.iter()).filter(|(a, b)| a != b);
    assert!(changed.count() <= 2, "a checksum has two bytes");
    for segment_len in [None, Some(u16::from(*tos))] {
        let cut = encapsulation.superpacket(packet, settings.mtu, segment_len);
        let Some((_, split)) = cut else { continue };
        assert!(packet.len() > usize::from(settings.mtu.get()));
        let payload: usize = (0..split.count()).map(|i| split.payload(i).len()).sum();
        assert_eq!(split.header_len() + payload, packet.len());
    }
}

/// Whether one station can have this address.
fn is_station(mac: [u8; 6]) -> bool {
    mac != [0; 6] && mac[0].is_multiple_of(2)
}

/// The first thing that is wrong with a frame, read field by field.
fn wrong_frame(datagram: &[u8]) -> Option<DropReason> {
    let Some((vxlan, frame)) = datagram.split_first_chunk::<8>() else {
        return Some(DropReason::TooShort);
    };
    let Ok((ethernet, _)) = Ethernet2Header::from_slice(frame) else {
        return Some(DropReason::TooShort);
    };
    let is_ip = [EtherType::IPV4, EtherType::IPV6].contains(&ethernet.ether_type);
    [
        (vxlan[0] & 8 != 0, DropReason::NotVxlan),
        (vxlan[4..7] == [0, 0, 1], DropReason::WrongVni),
        (is_ip, DropReason::NotIp),
        (ethernet.destination == OURS, DropReason::WrongMac),
        (is_station(ethernet.source), DropReason::SpoofedMac),
    ]
    .into_iter()
    .find_map(|(is_right, reason)| (!is_right).then_some(reason))
}

/// Whether what a right frame holds is no IP packet of the family that its EtherType says.
fn ip_is_wrong(datagram: &[u8], packet: &[u8]) -> bool {
    let version = if datagram[20..22] == [8, 0] { 4 } else { 6 };
    ip::parse(packet).is_err() || packet[0] >> 4 != version
}
