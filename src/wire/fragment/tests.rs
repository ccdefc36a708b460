use etherparse::{IpFragOffset, IpNumber, Ipv4Header};
use proptest::prelude::*;

use super::*;

const HEADER_BUF: [u8; ipv4::MAX_HEADER_LEN] = [0xa5; ipv4::MAX_HEADER_LEN];

fn mtu(bytes: u32) -> Mtu {
    Mtu::new(bytes).unwrap()
}

/// Where a test packet stands in its datagram: offset in bytes, more fragments, don't fragment.
#[derive(Clone, Copy, Default)]
struct Place {
    off: u16,
    more: bool,
    dont: bool,
}

fn packet(options: &[u8], payload_len: usize, place: Place) -> Vec<u8> {
    let mut header = Ipv4Header::new(
        u16::try_from(payload_len).unwrap(),
        64,
        IpNumber::UDP,
        [198, 18, 0, 1],
        [198, 19, 0, 2],
    )
    .unwrap();
    header.options = options.try_into().unwrap();
    header.total_len += u16::try_from(options.len()).unwrap();
    header.identification = 0x1234;
    header.fragment_offset = IpFragOffset::try_new(place.off / 8).unwrap();
    (header.more_fragments, header.dont_fragment) = (place.more, place.dont);
    header.header_checksum = header.calc_header_checksum();
    let payload = (0..payload_len).map(|i| i.to_be_bytes()[7] ^ i.to_be_bytes()[6]);
    header.to_bytes().into_iter().chain(payload).collect()
}

/// Every piece as the packet a receiver sees.
fn pieces(packet: &[u8], mtu: Mtu) -> Result<Vec<Vec<u8>>, FragmentError> {
    let plan = Fragments::plan(packet, mtu)?;
    let mut header = HEADER_BUF;
    assert_eq!(plan.piece(plan.count(), &mut header), None);
    let piece = |index| {
        let mut header = HEADER_BUF;
        let piece = plan.piece(index, &mut header).unwrap();
        [&header[..piece.header_len], &packet[piece.payload]].concat()
    };
    Ok((0..plan.count()).map(piece).collect())
}

/// Writes each piece's payload at its offset, as RFC 791's reassembly does; checks all else on the
/// way.
fn reassemble(original: &[u8], mtu: usize, pieces: &[Vec<u8>]) -> Vec<u8> {
    let (whole, _) = Ipv4Header::from_slice(original).unwrap();
    let mut payload = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        let (header, body) = Ipv4Header::from_slice(piece).unwrap();
        assert!(
            piece.len() <= mtu,
            "piece {index} has {} bytes",
            piece.len()
        );
        assert_eq!(usize::from(header.total_len), piece.len());
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        let off = usize::from(header.fragment_offset.value() - whole.fragment_offset.value()) * 8;
        assert_eq!(
            off,
            payload.len(),
            "piece {index} begins where the one before ends"
        );
        let is_last = index + 1 == pieces.len();
        assert_eq!(header.more_fragments, whole.more_fragments || !is_last);
        assert!(is_last || body.len() % 8 == 0, "piece {index}");
        // Whatever fragmentation does not name is repeated.
        let repeated = |h: &Ipv4Header| {
            (
                h.dscp,
                h.ecn,
                h.identification,
                h.time_to_live,
                h.protocol,
                h.source,
                h.destination,
            )
        };
        assert_eq!(repeated(&header), repeated(&whole));
        payload.extend_from_slice(body);
    }
    payload
}

#[test]
fn a_datagram_is_cut_at_multiples_of_eight_bytes() {
    let original = packet(&[], 3980, Place::default());
    let cut = pieces(&original, mtu(1500)).unwrap();
    let read = |piece: &Vec<u8>| {
        let header = Ipv4Header::from_slice(piece).unwrap().0;
        (
            header.total_len,
            header.fragment_offset.value(),
            header.more_fragments,
        )
    };
    let expected = [(1500, 0, true), (1500, 185, true), (1040, 370, false)];
    assert_eq!(cut.iter().map(read).collect::<Vec<_>>(), expected);
}

#[test]
fn the_last_piece_may_use_the_whole_mtu() {
    // 1005 has room for 985 bytes: 984 in a piece that others follow.
    let cut = pieces(&packet(&[], 984 + 985, Place::default()), mtu(1005)).unwrap();
    assert_eq!(cut.iter().map(Vec::len).collect::<Vec<_>>(), [1004, 1005]);
    let cut = pieces(&packet(&[], 984 + 986, Place::default()), mtu(1005)).unwrap();
    assert_eq!(
        cut.iter().map(Vec::len).collect::<Vec<_>>(),
        [1004, 1004, 22]
    );
}

#[test]
fn a_packet_that_fits_is_one_piece_and_stays_as_it_is() {
    for place in [
        Place::default(),
        Place {
            off: 80,
            more: true,
            dont: false,
        },
    ] {
        let original = packet(&[7, 7, 4, 0, 0, 0, 0, 0], 100, place);
        assert_eq!(pieces(&original, mtu(128)).unwrap(), [original]);
    }
    let dont = packet(
        &[],
        100,
        Place {
            dont: true,
            ..Place::default()
        },
    );
    assert_eq!(pieces(&dont, mtu(120)).unwrap(), [dont]);
}

#[test]
fn options_follow_their_copied_flag() {
    // No operation, record route (first piece only), router alert (copied), timestamp (first only),
    // padding.
    let record_route = [7, 7, 4, 0, 0, 0, 0];
    let router_alert = [148, 4, 0, 0];
    let timestamp = [68, 8, 5, 0, 0, 0, 0, 0];
    let options = [&[1][..], &record_route, &router_alert, &timestamp].concat();
    let original = packet(&options, 300, Place::default());
    let cut = pieces(&original, mtu(120)).unwrap();

    let options_of = |piece: &[u8]| Ipv4Header::from_slice(piece).unwrap().0.options.to_vec();
    assert_eq!(options_of(&cut[0]), options);
    assert_eq!(cut[0].len(), 20 + 20 + 80);
    for later in &cut[1..] {
        assert_eq!(options_of(later), router_alert);
    }
    // The shorter header leaves room for more payload.
    assert_eq!(cut[1].len(), 24 + 96);
    assert_eq!(reassemble(&original, 120, &cut), original[40..]);
}

#[test]
fn a_copied_option_is_padded_to_whole_words() {
    let strict_route = [137, 7, 4, 198, 18, 0, 9];
    let original = packet(&[&strict_route[..], &[0]].concat(), 200, Place::default());
    let cut = pieces(&original, mtu(100)).unwrap();
    assert_eq!(cut[1][20..28], [137, 7, 4, 198, 18, 0, 9, 0]);
}

#[test]
fn a_fragment_is_cut_further_in_its_place() {
    let place = Place {
        off: 1480,
        more: true,
        dont: false,
    };
    let original = packet(&[], 1480, place);
    let cut = pieces(&original, mtu(700)).unwrap();
    let places: Vec<_> = cut
        .iter()
        .map(|piece| Ipv4Header::from_slice(piece).unwrap().0)
        .map(|header| (header.fragment_offset.value() * 8, header.more_fragments))
        .collect();
    assert_eq!(places, [(1480, true), (2160, true), (2840, true)]);
}

#[test]
fn each_refusal_has_its_name() {
    let big = |options: &[u8], place| packet(options, 1400, place);
    let refused = |packet: &[u8], bytes| Fragments::plan(packet, mtu(bytes)).unwrap_err();
    let whole = Place::default();

    let dont = Place {
        dont: true,
        ..whole
    };
    assert_eq!(refused(&big(&[], dont), 1419), FragmentError::DontFragment);

    for options in [[7, 0, 0, 0], [7, 1, 0, 0], [7, 5, 0, 0], [1, 1, 1, 7]] {
        let at = if options[0] == 1 { 23 } else { 20 };
        assert_eq!(
            refused(&big(&options, whole), 700),
            FragmentError::BadOption { at }
        );
    }

    let far = Place {
        off: 65_528,
        more: false,
        dont: false,
    };
    assert_eq!(
        refused(&big(&[], far), 700),
        FragmentError::BeyondDatagram { end: 66_928 }
    );

    assert_eq!(
        refused(&[0x45; 8], 700),
        IpError::TooShort { need: 20, have: 8 }.into()
    );

    let mut v6 = vec![0; 1500];
    (v6[0], v6[4], v6[5], v6[6]) = (0x60, 0x05, 0xb4, 17);
    assert_eq!(refused(&v6, 1400), FragmentError::NotIpv4);
}

proptest! {
    #[test]
    fn the_pieces_of_any_packet_reassemble_to_it(
        payload_len in 0usize..9000,
        mtu_len in 68u32..9000,
        words in proptest::collection::vec(
            prop_oneof![Just([148, 4, 0, 0]), Just([68, 4, 5, 0]), Just([1, 1, 1, 1]), Just([0; 4])],
            0..=10,
        ),
        off in (0u16..1000).prop_map(|units| units * 8),
        more in any::<bool>(),
        padding in 0usize..9,
    ) {
        let original = packet(&words.concat(), payload_len, Place { off, more, dont: false });
        let padded = [&original[..], &vec![0xee; padding]].concat();
        let cut = pieces(&padded, mtu(mtu_len)).unwrap();
        prop_assert_eq!(cut.len() == 1, original.len() <= mtu_len as usize);
        let header_len = 20 + words.len() * 4;
        prop_assert_eq!(
            reassemble(&original, mtu_len as usize, &cut),
            &original[header_len..]
        );
    }
}
