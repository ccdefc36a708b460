//! Owns the outer headers of datagrams that our own data plane sends and receives, written again for files: workers show
//! the inner packet only. Never guesses what the kernel chose.

use std::net::{IpAddr, SocketAddr};

use etherparse::{IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, UdpHeader};

use super::{End, Origin};
use crate::datapath::tap::{Direction, Record};
use crate::wire::ip;
use crate::wire::vxlan::{self, Vxlan};

/// Time to live of the outer headers that are written; the kernel's is not seen.
const OUTER_TTL: u8 = 64;

/// Appends the outer headers of a datagram as they are on the wire, but for what the kernel chooses: the
/// identification and the time to live. Returns their length.
pub(super) fn outer_headers(
    record: &Record,
    origin: &Origin,
    outer: SocketAddr,
    inner: &[u8],
    out: &mut Vec<u8>,
) -> usize {
    let mut ends = origin.ends.iter();
    let Some(end) = ends.find(|end| end.bind.is_ipv4() == outer.is_ipv4()) else {
        return 0;
    };
    let own = SocketAddr::new(end.bind.ip(), record.local_port);
    let vxlan = vxlan_header(record, origin, end, outer.ip(), inner);
    let (from, to) = match record.direction {
        Direction::Encap => (own, outer),
        Direction::Decap => (outer, own),
    };
    let payload_len = u16::try_from(record.len as usize + vxlan.len())
        .unwrap_or(u16::MAX)
        .min(u16::MAX - 8 - 20);
    let mut udp = UdpHeader {
        source_port: from.port(),
        destination_port: to.port(),
        length: payload_len + 8,
        checksum: 0,
    };
    let begin = out.len();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut ip = Ipv4Header {
                total_len: udp.length + 20,
                dont_fragment: true,
                time_to_live: OUTER_TTL,
                protocol: IpNumber::UDP,
                source: from.octets(),
                destination: to.octets(),
                dscp: etherparse::IpDscp::try_new(record.tos >> 2).unwrap_or_default(),
                ecn: etherparse::IpEcn::try_new(record.tos & 3).unwrap_or_default(),
                ..Ipv4Header::default()
            };
            ip.header_checksum = ip.calc_header_checksum();
            out.extend_from_slice(&ip.to_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let ip = Ipv6Header {
                traffic_class: record.tos,
                flow_label: Ipv6FlowLabel::default(),
                payload_length: udp.length,
                next_header: IpNumber::UDP,
                hop_limit: OUTER_TTL,
                source: from.octets(),
                destination: to.octets(),
            };
            // IPv6 knows no absent checksum. Of a packet that was cut short nobody can know it.
            let payload = [&vxlan, inner].concat();
            if let Ok(checksum) = udp.calc_checksum_ipv6(&ip, &payload) {
                udp.checksum = checksum;
            }
            out.extend_from_slice(&ip.to_bytes());
        }
        _ => return 0,
    }
    out.extend_from_slice(&udp.to_bytes());
    out.extend_from_slice(&vxlan);
    out.len() - begin
}

/// The headers that stand between UDP's and the packet; none where VXLAN is not spoken. The MAC address of a peer
/// that is not known is all zeros.
fn vxlan_header(
    record: &Record,
    origin: &Origin,
    end: &End,
    outer: IpAddr,
    inner: &[u8],
) -> Vec<u8> {
    let (Some((vni, own)), Ok(version)) = (end.vxlan(), ip::version(inner)) else {
        return Vec::new();
    };
    let peer = origin.macs.get(&outer).copied();
    let (to, from) = match record.direction {
        Direction::Encap => (peer, Some(own)),
        Direction::Decap => (Some(own), peer),
    };
    let mut bytes = vec![0; vxlan::HEADER_LEN];
    Vxlan::new_unchecked(bytes.as_mut_slice()).write(
        vni,
        to.unwrap_or(own),
        from.unwrap_or(own),
        version,
    );
    for (mac, at) in [(to, 8), (from, 14)] {
        if let (None, Some(place)) = (mac, bytes.get_mut(at..at + 6)) {
            place.fill(0);
        }
    }
    bytes
}
