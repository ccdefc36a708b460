//! The pieces of a packet, put where their headers say, are the packet.

use loden::addr::Mtu;
use loden::wire::fragment::Fragments;
use loden::wire::ip;
use loden::wire::ipv4;

/// The first two bytes are the MTU, the rest is the packet.
pub fn run(data: &[u8]) {
    let Some((mtu, packet)) = data.split_first_chunk() else {
        return;
    };
    let Some(mtu) = Mtu::new(u32::from(u16::from_be_bytes(*mtu))) else {
        return;
    };
    let Ok(plan) = Fragments::plan(packet, mtu) else {
        return;
    };
    let whole = ip::parse(packet).expect("what is cut parses");
    let payload = whole.transport(packet);
    assert_eq!(
        plan.count() == 1,
        whole.total_len() <= usize::from(mtu.get())
    );

    let mut holes = vec![None; payload.len()];
    for index in 0..plan.count() {
        let mut header = [0xa5; ipv4::MAX_HEADER_LEN];
        let piece = plan
            .piece(index, &mut header)
            .expect("a piece below the count");
        let bytes = [&header[..piece.header_len], &packet[piece.payload]].concat();
        assert!(bytes.len() <= usize::from(mtu.get()));
        assert!(ip::ipv4_header_checksum_ok(&bytes));
        let meta = ip::parse(&bytes).expect("a piece parses");
        assert_eq!(meta.total_len(), bytes.len());
        let same = |meta: &ip::IpMeta| {
            (
                meta.src(),
                meta.dst(),
                meta.id(),
                meta.protocol(),
                meta.ttl(),
                meta.tos(),
            )
        };
        assert_eq!(same(&meta), same(&whole));
        let is_last = index + 1 == plan.count();
        assert_eq!(meta.more_fragments(), whole.more_fragments() || !is_last);

        let body = meta.transport(&bytes);
        assert!(is_last || body.len().is_multiple_of(8));
        let at = usize::from(meta.fragment_off() - whole.fragment_off());
        for (hole, &byte) in holes[at..at + body.len()].iter_mut().zip(body) {
            assert_eq!(hole.replace(byte), None, "pieces overlap");
        }
    }
    assert!(
        plan.piece(plan.count(), &mut [0; ipv4::MAX_HEADER_LEN])
            .is_none()
    );
    let filled: Option<Vec<u8>> = holes.into_iter().collect();
    assert_eq!(filled.as_deref(), Some(payload));
}
