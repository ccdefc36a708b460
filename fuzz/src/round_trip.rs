//! Streams with everything that may happen to them: coalesced exactly as the slow coalescer does, and split
//! back into the same packets.

use super::coalesce::packet::{ACK, CWR, DF, FIN, Fields, PSH, checksum_at, l4_at};
use super::coalesce::slow_coalesce::{SlowLimits, coalesce_slowly, without_atomic_id};
use super::coalesce::{coalesce_burst, split_written};

/// The limits `coalesce_burst` uses: the defaults.
const LIMITS: SlowLimits = SlowLimits {
    tcp_segments: 1023,
    udp_segments: 64,
    max_bytes: 65535,
};

/// More would make the quadratic oracle the bottleneck.
const MAX_PACKETS: usize = 200;

/// Input: three bytes per packet: which flow and what happens, how many payload bytes, an argument.
pub fn run(data: &[u8]) {
    let mut flows = flows();
    let (steps, _) = data.as_chunks::<3>();
    let packets: Vec<Vec<u8>> = steps
        .iter()
        .take(MAX_PACKETS)
        .map(|step| take(&mut flows, *step))
        .collect();
    let (indices, written) = coalesce_burst(&packets);
    assert_eq!(indices, coalesce_slowly(&packets, LIMITS));
    for (indices, (vnet, packet)) in indices.iter().zip(&written) {
        if indices.len() == 1 {
            continue;
        }
        let back: Vec<_> = split_written(vnet, packet)
            .iter()
            .map(|p| without_atomic_id(p))
            .collect();
        let given: Vec<_> = indices
            .iter()
            .map(|&i| without_atomic_id(&packets[i]))
            .collect();
        assert_eq!(back, given);
    }
}

/// TCP and UDP over either family, with and without DF.
fn flows() -> [Fields; 8] {
    std::array::from_fn(|i| Fields {
        v6: i & 1 != 0,
        udp: i & 2 != 0,
        frag: if i & 4 == 0 { DF } else { 0 },
        src_port: if i & 4 == 0 { 4000 } else { 4001 },
        seq: u32::MAX - 300,
        id: u16::MAX - 3,
        ..Fields::default()
    })
}

fn take(flows: &mut [Fields; 8], [what, len, arg]: [u8; 3]) -> Vec<u8> {
    let flow = &mut flows[usize::from(what & 7)];
    let what = what >> 3;
    match what {
        1 => flow.ack += 1,
        2 => flow.window ^= u16::from(arg),
        3 => flow.tcp_options = vec![arg; usize::from(arg & 3) * 4],
        4 => flow.seq = flow.seq.wrapping_add(u32::from(arg)),
        5 => flow.id = flow.id.wrapping_add(u16::from(arg)),
        6 => flow.ttl ^= arg & 1,
        7 => flow.tos ^= arg & 3,
        8 => flow.flow_label ^= u32::from(arg & 1),
        _ => {}
    }
    let mut fields = flow.clone();
    fields.payload = vec![arg; usize::from(len)];
    match what {
        9 => fields.flags = ACK | PSH,
        10 => fields.flags = u16::from(arg) | if arg & 1 == 0 { CWR } else { FIN },
        11 => fields.ip_options = vec![1; 4],
        12 => fields.frag |= 0x2000,
        13 => fields.frag |= 0x8000,
        14 => fields.urgent = u16::from(arg & 1),
        _ => {}
    }
    flow.seq = flow.seq.wrapping_add(u32::from(len));
    flow.id = flow.id.wrapping_add(1);
    let mut packet = fields.build();
    match what {
        15 => {
            let at = l4_at(&packet) + 4 + usize::from(arg) % (packet.len() - l4_at(&packet) - 4);
            packet[at] ^= 0x10;
        }
        16 if !fields.v6 => packet[11] ^= 1,
        17 if fields.udp => {
            let at = checksum_at(&packet);
            packet[at..at + 2].fill(0);
        }
        18 => packet.push(arg),
        19 => packet.truncate(usize::from(arg)),
        _ => {}
    }
    packet
}
