//! Parsing and rewriting never panic, and a hop's rewrites keep a checksum right or wrong as it was.

use loden::wire::ecn::Ecn;
use loden::wire::flow::flow_hash;
use loden::wire::ip::{self, TtlError};

/// The bytes are a packet.
pub fn run(data: &[u8]) {
    let parsed = ip::parse(data);
    let checksum_ok = ip::ipv4_header_checksum_ok(data);
    let mut packet = data.to_vec();

    for ecn in [Ecn::Ce, Ecn::NotEct, Ecn::Ect1, Ecn::Ect0] {
        let result = ip::set_ecn(&mut packet, ecn);
        assert_eq!(ip::ipv4_header_checksum_ok(&packet), checksum_ok);
        if parsed.is_ok() {
            assert_eq!(result, Ok(()));
            assert_eq!(ip::parse(&packet).map(|meta| meta.ecn()), Ok(ecn));
        }
    }
    for by in [0, 1, 2, 255] {
        let before = packet.clone();
        let result = ip::decrement_ttl(&mut packet, by);
        assert_eq!(ip::ipv4_header_checksum_ok(&packet), checksum_ok);
        if result.is_err() {
            assert_eq!(packet, before);
        }
        if let (Ok(_), Ok(meta)) = (parsed, ip::parse(&before)) {
            let left = meta.ttl().checked_sub(by).filter(|&left| left > 0);
            assert_eq!(result, left.map(|_| ()).ok_or(TtlError::Expired));
        }
    }

    let Ok(meta) = parsed else { return };
    assert!(meta.header_len() <= meta.total_len() && meta.total_len() <= data.len());
    assert_eq!(
        meta.transport(data).len(),
        meta.total_len() - meta.header_len()
    );
    // A hop may rewrite what it likes of the header's rest: the flow stays.
    let after = ip::parse(&packet).expect("a rewritten packet still parses");
    assert_eq!(flow_hash(&after, &packet), flow_hash(&meta, data));
}
