//! Owns what the coalescer hands out: each write's packets, payloads and rewritten headers. Never copies
//! payload; the packets' own bytes stay as they arrived, so a refused superpacket can be replayed packet by
//! packet.

use super::super::header::{
    Family, Headers, IPV4_LEN, IPV6_LEN, TCP_LEN, Transport, UDP_LEN, fold, put16, sum_words,
};
use super::super::vnet_hdr::{Gso, VNET_HDR_LEN, VnetHdr};
use super::{Item, Link, PacketRef, rules};

/// Room for what precedes a superpacket's first payload: its vnet header and its headers.
/// What is merged has neither IPv4 options nor IPv6 extension headers; TCP with all options has 60 bytes.
pub const HEAD_LEN: usize = VNET_HDR_LEN + IPV6_LEN + 60;

/// One write to the TUN.
#[derive(Clone, Copy, Debug)]
pub enum Write<'a> {
    /// One packet, unchanged, behind an all-zero vnet header.
    Packet(PacketRef),
    /// Several packets as one.
    Superpacket(Superpacket<'a>),
}

/// Two or more packets of one flow, to be written as: head, then every payload.
#[derive(Clone, Copy, Debug)]
pub struct Superpacket<'a> {
    item: &'a Item,
    links: &'a [Link],
}

impl<'a> Superpacket<'a> {
    pub(super) const fn new(item: &'a Item, links: &'a [Link]) -> Self {
        Self { item, links }
    }

    /// How many packets were merged.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.item.count as usize
    }

    /// Bytes of the IP packet that results: headers and all payloads, without the vnet header.
    #[must_use]
    pub const fn packet_len(&self) -> usize {
        self.item.headers.len() + self.item.payload_len as usize
    }

    /// The merged packets as they arrived, in order: the first is the one [`Superpacket::write_head`] wants,
    /// all of them are what to write should the TUN refuse the superpacket.
    pub fn packets(&self) -> impl Iterator<Item = PacketRef> + Clone + use<'a> {
        let links = self.links;
        let start = links.get(usize::from(self.item.first));
        std::iter::successors(start, |link| links.get(usize::from(link.next)))
            .map(|link| link.packet)
    }

    /// Where the payloads lie, in order.
    pub fn payloads(&self) -> impl Iterator<Item = PacketRef> + Clone + use<'a> {
        let header_len = u32::from(self.item.headers.l3_len) + u32::from(self.item.headers.l4_len);
        self.packets()
            .map(move |PacketRef { buf, off, len }| PacketRef {
                buf,
                off: off.saturating_add(header_len),
                len: len.saturating_sub(header_len),
            })
    }

    /// The vnet header of the superpacket.
    #[must_use]
    pub fn vnet_hdr(&self) -> VnetHdr {
        let Headers {
            family,
            transport,
            l3_len,
            l4_len,
        } = self.item.headers;
        VnetHdr {
            needs_csum: true,
            data_valid: false,
            gso: match (transport, family) {
                (Transport::Tcp, Family::V4) => Gso::TcpV4 { ecn: false },
                (Transport::Tcp, Family::V6) => Gso::TcpV6 { ecn: false },
                (Transport::Udp, _) => Gso::UdpL4,
            },
            hdr_len: u16::from(l3_len) + u16::from(l4_len),
            gso_size: self.item.gso_size,
            csum_start: u16::from(l3_len),
            csum_offset: transport.csum_offset(),
        }
    }

    /// Writes the vnet header and behind it the superpacket's headers, made from those of its first packet,
    /// and returns how many bytes that is. The transport checksum is partial: the folded pseudo-header sum.
    ///
    /// Returns 0, having written nothing of use, if `first` is not the first of [`Superpacket::packets`].
    pub fn write_head(&self, first: &[u8], out: &mut [u8; HEAD_LEN]) -> usize {
        let Headers {
            family,
            transport,
            l3_len,
            ..
        } = self.item.headers;
        let header_len = self.item.headers.len();
        let (vnet, rest) = out.split_at_mut(VNET_HDR_LEN);
        vnet.copy_from_slice(&self.vnet_hdr().encode());
        let (Some(header), Some(first)) = (rest.get_mut(..header_len), first.get(..header_len))
        else {
            return 0;
        };
        header.copy_from_slice(first);
        let Some((ip, l4)) = header.split_at_mut_checked(usize::from(l3_len)) else {
            return 0;
        };
        let total_len = u16::try_from(self.packet_len()).unwrap_or(u16::MAX);
        let l4_len = total_len.saturating_sub(u16::from(l3_len));
        match family {
            Family::V4 => {
                let Some(ip) = ip.first_chunk_mut::<IPV4_LEN>() else {
                    return 0;
                };
                put16(ip, 2, total_len);
                put16(ip, 10, 0);
                let checksum = !fold(sum_words(ip));
                put16(ip, 10, checksum);
            }
            Family::V6 => {
                let Some(ip) = ip.first_chunk_mut::<IPV6_LEN>() else {
                    return 0;
                };
                put16(ip, 4, l4_len);
            }
        }
        let partial = fold(u32::from(self.item.pseudo) + u32::from(l4_len));
        match transport {
            Transport::Tcp => {
                let Some(tcp) = l4.first_chunk_mut::<TCP_LEN>() else {
                    return 0;
                };
                if self.item.push {
                    tcp[13] |= rules::TCP_PSH;
                }
                put16(tcp, 16, partial);
            }
            Transport::Udp => {
                let Some(udp) = l4.first_chunk_mut::<UDP_LEN>() else {
                    return 0;
                };
                put16(udp, 4, l4_len);
                put16(udp, 6, partial);
            }
        }
        VNET_HDR_LEN + header_len
    }
}
