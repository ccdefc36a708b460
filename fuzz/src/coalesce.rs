//! Any burst: nothing is lost, doubled or overtaken, and every superpacket splits into what went in.

use loden::offload::coalesce::{Coalescer, HEAD_LEN, Limits, PacketRef, Write};
use loden::offload::split::{MAX_HEADER_LEN, Split};
use loden::offload::vnet_hdr::{VNET_HDR_LEN, VnetHdr};

use self::packet::{fix_checksums, fix_lengths, is_udp, is_v6, l4_at, naive_sum, payload_at};
use self::slow_coalesce::{may_share_flow, without_atomic_id};

#[path = "../../tests/offload_support/packet.rs"]
pub(crate) mod packet;
#[path = "../../tests/offload_support/slow_coalesce.rs"]
pub(crate) mod slow_coalesce;

/// Input: packets, each behind a byte of what to mend (bit 0 lengths, bit 1 checksums) and a length byte.
pub fn run(data: &[u8]) {
    let packets = packets(data);
    let (indices, written) = coalesce_burst(&packets);

    let mut all: Vec<usize> = indices.iter().flatten().copied().collect();
    for (at, later) in all.iter().enumerate() {
        for earlier in &all[at + 1..] {
            let overtakes = later > earlier && may_share_flow(&packets[*later], &packets[*earlier]);
            assert!(!overtakes, "packet {later} overtakes {earlier}");
        }
    }
    all.sort_unstable();
    assert!(all.into_iter().eq(0..packets.len()));

    for (indices, (vnet, packet)) in indices.iter().zip(&written) {
        if let [alone] = indices.as_slice() {
            assert_eq!((*vnet, packet), (VnetHdr::default(), &packets[*alone]));
            continue;
        }
        let back = split_written(vnet, packet);
        assert_eq!(back.len(), indices.len());
        for (back, &given) in back.iter().zip(indices) {
            assert_eq!(without_atomic_id(back), without_atomic_id(&packets[given]));
        }
    }
}

fn packets(mut data: &[u8]) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while let [mend, len, rest @ ..] = data {
        let (packet, rest) = rest.split_at(rest.len().min(usize::from(*len)));
        let mut packet = packet.to_vec();
        let ip_len = if packet.first().is_some_and(|byte| byte >> 4 == 6) {
            40
        } else {
            20
        };
        if packet.len() >= ip_len.max(20) + 20 && l4_at(&packet) + 20 <= packet.len() {
            let known = is_udp(&packet) || packet[if is_v6(&packet) { 6 } else { 9 }] == 6;
            if mend & 1 != 0 && known {
                fix_lengths(&mut packet);
            }
            if mend & 2 != 0 && known && payload_at(&packet) <= packet.len() {
                fix_checksums(&mut packet);
            }
        }
        packets.push(packet);
        data = rest;
    }
    packets
}

/// What the TUN would be given.
pub(crate) type Written = (VnetHdr, Vec<u8>);

/// Which packets each write holds, and what the TUN would be given for it.
pub(crate) fn coalesce_burst(packets: &[Vec<u8>]) -> (Vec<Vec<usize>>, Vec<Written>) {
    let refs = packets.iter().enumerate().map(|(i, packet)| PacketRef {
        buf: u16::try_from(i).expect("inputs are short"),
        off: 0,
        len: u32::try_from(packet.len()).expect("packets are short"),
    });
    let bytes_of = |at: PacketRef| {
        let (start, len) = (at.off as usize, at.len as usize);
        &packets[usize::from(at.buf)][start..start + len]
    };
    let capacity = u16::try_from(packets.len()).expect("inputs are short");
    let mut coalescer = Coalescer::new(Limits::default(), capacity, naive_sum);
    for packet in refs {
        let pushed = coalescer.push(packet, |at| packets[usize::from(at.buf)].as_slice());
        assert!(pushed.is_ok(), "capacity was chosen to fit");
    }
    let index = |packet: PacketRef| usize::from(packet.buf);
    coalescer
        .writes()
        .map(|write| match write {
            Write::Packet(packet) => (
                vec![index(packet)],
                (VnetHdr::default(), bytes_of(packet).to_vec()),
            ),
            Write::Superpacket(superpacket) => {
                let indices: Vec<usize> = superpacket.packets().map(index).collect();
                let mut head = [0; HEAD_LEN];
                let len = superpacket.write_head(&packets[indices[0]], &mut head);
                let vnet = VnetHdr::parse(&head).expect("we wrote it");
                let mut packet = head[VNET_HDR_LEN..len].to_vec();
                for payload in superpacket.payloads() {
                    packet.extend(bytes_of(payload));
                }
                (indices, (vnet, packet))
            }
        })
        .unzip()
}

/// The segments of a written superpacket.
pub(crate) fn split_written(vnet: &VnetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
    let split = Split::new(vnet, packet).expect("what we merged can be split");
    (0..split.count())
        .map(|i| {
            let mut header = [0; MAX_HEADER_LEN];
            let len = split.write_header(packet, i, naive_sum, &mut header);
            [&header[..len], &packet[split.payload(i)]].concat()
        })
        .collect()
}
