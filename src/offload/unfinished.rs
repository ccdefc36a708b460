//! Owns recognising packets whose sender left work to a device that was never there. A kernel's VXLAN device on
//! the same machine, in another namespace and joined by a veth pair, hands over what no wire would carry: inner
//! packets whose checksum field holds only the pseudo-header sum, and whole superpackets (`udp_unexpected_gso`,
//! include/linux/udp.h, lets tunnelled ones through to any socket). Never changes a packet.

use super::header::{Family, Headers, Transport, fold, pseudo_sum};
use super::vnet_hdr::{Gso, VnetHdr};

/// What is left to do to a packet that fills the slice, in the terms of the header that the sender's device would
/// have been given: [`super::split`] does it, or a TUN device. `None` for a packet that is finished.
///
/// A packet longer than `max_len` is a superpacket. How long its segments were meant to be is lost unless
/// `segment_len` is known. TCP is a stream: the most that fits is as good. Of UDP `None` is returned then.
///
/// A finished packet whose checksum equals its pseudo-header sum by chance is described, too; finishing it
/// changes nothing.
#[inline]
#[must_use]
pub fn describe(packet: &[u8], max_len: usize, segment_len: Option<u16>) -> Option<VnetHdr> {
    let headers = Headers::parse(packet).ok()?;
    let Headers {
        family,
        transport,
        l3_len,
        ..
    } = headers;
    let l4 = packet.get(usize::from(l3_len)..)?;
    let field = l4
        .get(usize::from(transport.csum_offset())..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .map(u16::from_be_bytes)?;
    let l4_len = u32::try_from(l4.len()).ok()?;
    let is_none = transport == Transport::Udp && field == 0;
    if is_none || field != fold(pseudo_sum(packet, family, transport) + l4_len) {
        return None;
    }
    let mut vnet = VnetHdr {
        needs_csum: true,
        hdr_len: u16::try_from(headers.len()).ok()?,
        csum_start: u16::from(l3_len),
        csum_offset: transport.csum_offset(),
        ..VnetHdr::default()
    };
    if packet.len() > max_len {
        vnet.gso = gso(l4, family, transport);
        vnet.gso_size = match transport {
            Transport::Tcp => {
                let most = u16::try_from(max_len.saturating_sub(headers.len())).ok()?;
                segment_len.map_or(most, |len| len.min(most))
            }
            Transport::Udp => segment_len?,
        };
    }
    (packet.len() <= max_len || vnet.gso_size > 0).then_some(vnet)
}

fn gso(l4: &[u8], family: Family, transport: Transport) -> Gso {
    const CWR: u8 = 0x80;
    let ecn = l4.get(13).is_some_and(|flags| flags & CWR != 0);
    match (transport, family) {
        (Transport::Tcp, Family::V4) => Gso::TcpV4 { ecn },
        (Transport::Tcp, Family::V6) => Gso::TcpV6 { ecn },
        (Transport::Udp, _) => Gso::UdpL4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::split::{Split, finish_checksum};
    use crate::wire::checksum;
    use etherparse::{NetHeaders, PacketBuilder, PacketHeaders};

    const SRC: [u8; 4] = [198, 18, 1, 2];
    const DST: [u8; 4] = [198, 18, 2, 2];

    /// Finished packets of both transports and families with their checksum fields' offsets.
    fn packets(payload: &[u8]) -> Vec<(Vec<u8>, usize)> {
        let v4 = || PacketBuilder::ipv4(SRC, DST, 64);
        let v6 = || PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 64);
        let mut made = vec![
            (Vec::new(), 36),
            (Vec::new(), 26),
            (Vec::new(), 56),
            (Vec::new(), 46),
        ];
        v4().tcp(1, 2, 3, 4).write(&mut made[0].0, payload).unwrap();
        v4().udp(1, 2).write(&mut made[1].0, payload).unwrap();
        v6().tcp(1, 2, 3, 4).write(&mut made[2].0, payload).unwrap();
        v6().udp(1, 2).write(&mut made[3].0, payload).unwrap();
        made
    }

    /// Puts the sum of the pseudo-header where the checksum was.
    fn undo(packet: &mut [u8], at: usize) {
        let l3_len = if packet[0] >> 4 == 4 { 20 } else { 40 };
        let addresses = if l3_len == 20 { 12..20 } else { 8..40 };
        let protocol = if l3_len == 20 { packet[9] } else { packet[6] };
        let words = packet[addresses].chunks(2);
        let mut sum: usize = words
            .map(|w| usize::from(w[0]) << 8 | usize::from(w[1]))
            .sum();
        sum += usize::from(protocol) + packet.len() - l3_len;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        packet[at..at + 2].copy_from_slice(&u16::try_from(sum).unwrap().to_be_bytes());
    }

    #[test]
    fn a_finished_packet_is_left_alone_and_an_unfinished_one_is_finished() {
        for payload_len in [0, 1, 8, 1000] {
            for (finished, at) in packets(&vec![7; payload_len]) {
                assert_eq!(describe(&finished, 1450, None), None);
                let mut packet = finished.clone();
                undo(&mut packet, at);
                let vnet = describe(&packet, 1450, None).unwrap();
                assert!(!vnet.is_superpacket());
                finish_checksum(&vnet, &mut packet, checksum::sum_scalar).unwrap();
                assert_eq!(packet, finished);
            }
        }
    }

    #[test]
    fn a_superpacket_is_cut_into_what_fits_and_udp_only_where_its_sender_cut() {
        for (mut packet, at) in packets(&[7; 5000]) {
            undo(&mut packet, at);
            let is_tcp = at == 36 || at == 56;
            assert_eq!(describe(&packet, 1450, None).is_some(), is_tcp);
            let vnet = describe(&packet, 1450, Some(1000)).unwrap();
            assert_eq!(Split::new(&vnet, &packet).unwrap().count(), 5);
            let most = describe(&packet, 1450, is_tcp.then_some(60_000).or(Some(1000))).unwrap();
            let split = Split::new(&most, &packet).unwrap();
            assert!(split.segment_len(0) <= 1450);
            let mut segment = vec![0; 200];
            let header_len = split.write_header(&packet, 0, checksum::sum_scalar, &mut segment);
            segment.truncate(header_len);
            segment.extend_from_slice(&packet[split.payload(0)]);
            let headers = PacketHeaders::from_ip_slice(&segment).unwrap();
            let (Some(ip), Some(transport)) = (headers.net, headers.transport) else {
                panic!("{segment:?}")
            };
            let payload = &segment[header_len..];
            let mut should = transport.clone();
            match ip {
                NetHeaders::Ipv4(ip, _) => should.update_checksum_ipv4(&ip, payload).unwrap(),
                NetHeaders::Ipv6(ip, _) => should.update_checksum_ipv6(&ip, payload).unwrap(),
                NetHeaders::Arp(_) => panic!("not IP"),
            }
            assert_eq!(transport, should);
        }
    }

    #[test]
    fn what_carries_no_checksum_has_nothing_left_to_do() {
        for (mut packet, at) in packets(b"x") {
            packet[at..at + 2].fill(0);
            assert_eq!(describe(&packet, 1450, None), None);
            assert_eq!(describe(&packet[..19], 1450, None), None);
        }
    }
}
