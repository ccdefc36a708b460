//! Any superpacket: what splits, splits as the slow splitter does, into packets with right checksums.

use loden::offload::split::{MAX_HEADER_LEN, MAX_SEGMENTS, Split, finish_checksum};
use loden::offload::vnet_hdr::{VNET_HDR_LEN, VnetHdr};

use super::coalesce::packet::{checksums_hold, naive_sum, split_slowly};

/// Input: a vnet header and a packet.
pub fn run(data: &[u8]) {
    let Ok(vnet) = VnetHdr::parse(data) else {
        return;
    };
    let packet = &data[VNET_HDR_LEN..];

    let mut finished = packet.to_vec();
    match finish_checksum(&vnet, &mut finished, naive_sum) {
        Ok(()) => {
            let changed = finished.iter().zip(packet).filter(|(a, b)| a != b).count();
            assert!(changed <= 2 && finished.len() == packet.len());
        }
        Err(_) => assert_eq!(finished, packet),
    }

    let Ok(split) = Split::new(&vnet, packet) else {
        return;
    };
    assert!((1..=MAX_SEGMENTS).contains(&split.count()));
    let segments: Vec<Vec<u8>> = (0..split.count())
        .map(|i| {
            let mut header = [0; MAX_HEADER_LEN];
            let len = split.write_header(packet, i, naive_sum, &mut header);
            assert_eq!(len, split.header_len());
            [&header[..len], &packet[split.payload(i)]].concat()
        })
        .collect();
    if vnet.is_superpacket() {
        assert!(segments.iter().all(|segment| checksums_hold(segment)));
        assert_eq!(segments, split_slowly(packet, split.gso_size()));
    } else {
        assert_eq!(segments, [packet]);
    }
    let beyond = split.write_header(packet, split.count(), naive_sum, &mut [0; MAX_HEADER_LEN]);
    assert_eq!(beyond, 0);
}
