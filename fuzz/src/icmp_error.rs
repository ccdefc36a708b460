//! An ICMP error is a right packet, and never about another ICMP error.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use loden::addr::Mtu;
use loden::sys::simd;
use loden::wire::icmp_error::{self, IcmpError};
use loden::wire::ip::{self, Version, protocol};

use super::checksum::naive;

const V4_FROM: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
const V6_FROM: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);

/// The first byte chooses the error, the rest is the packet it is about.
pub fn run(data: &[u8]) {
    let Some((&kind, packet)) = data.split_first() else {
        return;
    };
    let Ok(meta) = ip::parse(packet) else { return };
    let error = match (kind % 3, Mtu::new(1280 + u32::from(kind))) {
        (0, Some(mtu)) => IcmpError::PacketTooBig { mtu },
        (1, _) => IcmpError::NetUnreachable,
        _ => IcmpError::TimeExceeded,
    };
    let (from, max_len, fixed) = match meta.version() {
        Version::V4 => (IpAddr::V4(V4_FROM), 576, 28),
        Version::V6 => (IpAddr::V6(V6_FROM), 1280, 48),
    };
    let mut out = [0xa5; icmp_error::MAX_LEN];
    let Ok(len) = icmp_error::build(error, &meta, packet, from, simd::sum(), &mut out) else {
        return;
    };

    assert!(!is_icmp_error(packet), "an ICMP error was answered");
    assert_eq!(len, (fixed + meta.total_len()).min(max_len));
    let answer = &out[..len];
    let read = ip::parse(answer).expect("the answer parses");
    assert_eq!((read.src(), read.dst()), (from, meta.src()));
    assert_eq!((read.total_len(), read.ttl()), (len, 64));
    assert_eq!(answer[fixed..], packet[..len - fixed]);
    let covered = match read.version() {
        Version::V4 => {
            assert_eq!(naive(&answer[..20]), 0xffff);
            answer[20..].to_vec()
        }
        Version::V6 => {
            // RFC 8200 section 8.1: addresses, length, zeros, next header.
            let upper_len = u32::try_from(len - 40).expect("at most 1240");
            [
                &answer[8..40],
                &upper_len.to_be_bytes(),
                &[0, 0, 0, 58],
                &answer[40..],
            ]
            .concat()
        }
    };
    assert_eq!(naive(&covered), 0xffff);

    let meta = ip::parse(answer).expect("parsed above");
    let again = icmp_error::build(error, &meta, answer, from, simd::sum(), &mut [0; 1280]);
    assert!(again.is_err(), "our own error was answered");
}

/// The error messages that RFC 792 and RFC 4443 define, in a packet that is not a later fragment.
fn is_icmp_error(packet: &[u8]) -> bool {
    let meta = ip::parse(packet).expect("parsed by the caller");
    let kind = meta.transport(packet).first();
    match (meta.protocol(), meta.version()) {
        (protocol::ICMP, Version::V4) => matches!(kind, Some(3 | 4 | 5 | 11 | 12) | None),
        (protocol::ICMPV6, Version::V6) => matches!(kind, Some(0..=127 | 137) | None),
        _ => false,
    }
}
