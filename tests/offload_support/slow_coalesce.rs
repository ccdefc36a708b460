//! Owns a slow coalescer that asks the slow splitter what may be merged. Shares no code with what it judges.

#![expect(unreachable_pub, reason = "compiled into several crates")]

use super::packet::{
    ACK, PSH, checksums_hold, fix_checksums, fix_lengths, is_udp, is_v6, l4_at, naive_sum,
    payload_at, split_slowly,
};

/// One packet with the payloads of all, the header of the first, and PSH if the last has it.
pub fn merge_slowly(packets: &[&[u8]]) -> Vec<u8> {
    let mut merged = packets[0].to_vec();
    for packet in &packets[1..] {
        merged.extend(&packet[payload_at(packet)..]);
    }
    fix_lengths(&mut merged);
    let last = packets[packets.len() - 1];
    if !is_udp(last) {
        let l4 = l4_at(&merged);
        merged[l4 + 13] |= last[l4_at(last) + 13] & PSH.to_be_bytes()[1];
    }
    fix_checksums(&mut merged);
    merged
}

/// Clears what RFC 6864 says nobody may look at: the identification of an atomic datagram, with the header
/// checksum that covers it (if it was right).
pub fn without_atomic_id(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let is_atomic = !is_v6(&packet) && packet[6] & 0x7f == 0x40 && packet[7] == 0;
    if is_atomic && naive_sum(&packet[..l4_at(&packet)]) == 0xffff {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// How far the slow coalescer merges.
#[derive(Clone, Copy, Debug)]
pub struct SlowLimits {
    pub tcp_segments: usize,
    pub udp_segments: usize,
    pub max_bytes: usize,
}

/// Which packets belong into one write, in order, by index.
///
/// States no rule that follows from a simpler one: two packets may share a superpacket if splitting it gives
/// them back. Only what splitting cannot know is spelled out.
pub fn coalesce_slowly(packets: &[Vec<u8>], limits: SlowLimits) -> Vec<Vec<usize>> {
    let mut writes: Vec<Vec<usize>> = Vec::new();
    for (i, packet) in packets.iter().enumerate() {
        // The most recent write with a packet of this flow, or one that might be of this flow.
        let most_recent = writes.iter().rposition(|write| {
            write
                .iter()
                .any(|&other| may_share_flow(&packets[other], packet))
        });
        if let Some(at) = most_recent {
            let mut together = writes[at].clone();
            together.push(i);
            let bytes: Vec<&[u8]> = together.iter().map(|&k| packets[k].as_slice()).collect();
            if may_merge(&bytes, limits) {
                writes[at] = together;
                continue;
            }
        }
        writes.push(vec![i]);
    }
    writes
}

/// Addresses, and protocol and ports where they can be told.
type Flow = (Vec<u8>, Option<(u8, Vec<u8>)>);

fn flow(packet: &[u8]) -> Option<Flow> {
    let (addresses, protocol, is_fragment) = match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            let is_fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0;
            (packet[12..20].to_vec(), packet[9], is_fragment)
        }
        6 if packet.len() >= 40 => (packet[8..40].to_vec(), packet[6], false),
        _ => return None,
    };
    if protocol == 6 || protocol == 17 {
        if is_fragment || !is_whole(packet) {
            return Some((addresses, None));
        }
        let l4 = l4_at(packet);
        return Some((addresses, Some((protocol, packet[l4..l4 + 4].to_vec()))));
    }
    // Behind an IPv6 extension header there may be TCP; behind any other protocol there is not.
    (is_v6(packet) && protocol != 58).then_some((addresses, None))
}

/// Whether two packets are of one flow, as far as can be told.
pub fn may_share_flow(a: &[u8], b: &[u8]) -> bool {
    match (flow(a), flow(b)) {
        (Some((a, a_ports)), Some((b, b_ports))) => {
            a == b && (a_ports.is_none() || b_ports.is_none() || a_ports == b_ports)
        }
        _ => false,
    }
}

/// Whether every length in the packet agrees with its size.
fn is_whole(packet: &[u8]) -> bool {
    let l4 = l4_at(packet);
    let says = if is_v6(packet) {
        usize::from(u16::from_be_bytes([packet[4], packet[5]])) + 40
    } else {
        usize::from(u16::from_be_bytes([packet[2], packet[3]]))
    };
    if says != packet.len() || l4 < 20 {
        return false;
    }
    if is_udp(packet) {
        packet.len() >= l4 + 8
            && usize::from(u16::from_be_bytes([packet[l4 + 4], packet[l4 + 5]]))
                == packet.len() - l4
    } else {
        packet.len() >= l4 + 20 && packet[l4 + 12] >> 4 >= 5 && payload_at(packet) <= packet.len()
    }
}

fn may_merge(packets: &[&[u8]], limits: SlowLimits) -> bool {
    let alone = packets.iter().all(|packet| {
        let is_identified = matches!(flow(packet), Some((_, Some(_))));
        is_identified && payload_at(packet) < packet.len() && may_merge_with_any(packet)
    });
    if !alone {
        return false;
    }
    let most = if is_udp(packets[0]) {
        limits.udp_segments
    } else {
        limits.tcp_segments
    };
    let payload: usize = packets
        .iter()
        .map(|packet| packet.len() - payload_at(packet))
        .sum();
    if packets.len() > most || payload_at(packets[0]) + payload > limits.max_bytes {
        return false;
    }
    let merged = merge_slowly(packets);
    let segments = split_slowly(&merged, packets[0].len() - payload_at(packets[0]));
    segments.len() == packets.len()
        && segments
            .iter()
            .zip(packets)
            .all(|(segment, packet)| without_atomic_id(segment) == without_atomic_id(packet))
}

/// What splitting cannot know: headers that mark one packet, and damage.
fn may_merge_with_any(packet: &[u8]) -> bool {
    let l4 = l4_at(packet);
    let plain_ip = is_v6(packet) || (l4 == 20 && packet[6] & !0x40 == 0 && packet[7] == 0);
    let plain_l4 = if is_udp(packet) {
        packet[l4 + 6..l4 + 8] != [0, 0]
    } else {
        let flags = u16::from_be_bytes([packet[l4 + 12], packet[l4 + 13]]) & 0x0fff;
        flags == ACK || flags == ACK | PSH
    };
    plain_ip && plain_l4 && checksums_hold(packet)
}
