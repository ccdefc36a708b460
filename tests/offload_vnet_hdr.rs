//! The vnet header against golden bytes and against itself.

use loden::offload::vnet_hdr::{Gso, VNET_HDR_LEN, VnetHdr, VnetHdrError};
use proptest::prelude::*;

/// What Linux 6.x puts in front of a 1448-byte-MSS TCP superpacket, byte by byte.
const fn tcp_v4_bytes() -> [u8; VNET_HDR_LEN] {
    let (hdr_len, gso_size) = (66_u16.to_ne_bytes(), 1448_u16.to_ne_bytes());
    let (start, offset) = (34_u16.to_ne_bytes(), 16_u16.to_ne_bytes());
    [
        1,
        1,
        hdr_len[0],
        hdr_len[1],
        gso_size[0],
        gso_size[1],
        start[0],
        start[1],
        offset[0],
        offset[1],
    ]
}

#[test]
fn the_fields_lie_where_the_kernel_puts_them() {
    let vnet = VnetHdr::parse(&tcp_v4_bytes()).unwrap();
    let expected = VnetHdr {
        needs_csum: true,
        data_valid: false,
        gso: Gso::TcpV4 { ecn: false },
        hdr_len: 66,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
    };
    assert_eq!(vnet, expected);
    assert_eq!(expected.encode(), tcp_v4_bytes());
}

#[test]
fn a_plain_packet_that_needs_nothing_has_an_all_zero_header() {
    assert_eq!(VnetHdr::default().encode(), [0; VNET_HDR_LEN]);
    assert_eq!(VnetHdr::parse(&[0; VNET_HDR_LEN]), Ok(VnetHdr::default()));
}

#[test]
fn each_gso_type_has_the_number_of_the_uapi_header() {
    let types = [
        (0x00, Gso::None),
        (0x01, Gso::TcpV4 { ecn: false }),
        (0x81, Gso::TcpV4 { ecn: true }),
        (0x04, Gso::TcpV6 { ecn: false }),
        (0x84, Gso::TcpV6 { ecn: true }),
        (0x05, Gso::UdpL4),
    ];
    for (number, gso) in types {
        let mut bytes = tcp_v4_bytes();
        bytes[1] = number;
        assert_eq!(
            VnetHdr::parse(&bytes).unwrap().gso,
            gso,
            "gso_type {number:#x}"
        );
    }
}

#[test]
fn what_was_not_negotiated_is_refused_by_name() {
    let with = |at: usize, value: u8| {
        let mut bytes = tcp_v4_bytes();
        bytes[at] = value;
        VnetHdr::parse(&bytes)
    };
    // UDP fragmentation offload; UDP tunnels; a bare ECN bit; the RSC flag.
    assert_eq!(with(1, 3), Err(VnetHdrError::UnknownGso { gso_type: 3 }));
    assert_eq!(
        with(1, 0x21),
        Err(VnetHdrError::UnknownGso { gso_type: 0x21 })
    );
    assert_eq!(
        with(1, 0x80),
        Err(VnetHdrError::EcnWithoutTcp { gso_type: 0x80 })
    );
    assert_eq!(
        with(1, 0x85),
        Err(VnetHdrError::EcnWithoutTcp { gso_type: 0x85 })
    );
    assert_eq!(with(0, 5), Err(VnetHdrError::UnknownFlags { flags: 5 }));
    let mut bytes = tcp_v4_bytes();
    bytes[4..6].fill(0);
    assert_eq!(VnetHdr::parse(&bytes), Err(VnetHdrError::GsoWithoutSize));
    assert_eq!(
        VnetHdr::parse(&bytes[..9]),
        Err(VnetHdrError::Truncated { len: 9 })
    );
}

proptest! {
    #[test]
    fn whatever_parses_encodes_to_the_same_bytes(bytes: [u8; VNET_HDR_LEN]) {
        if let Ok(vnet) = VnetHdr::parse(&bytes) {
            prop_assert_eq!(vnet.encode(), bytes);
        }
    }
}
