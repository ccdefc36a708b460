//! Owns what a frame of a packet socket means: which way it goes, whose it is, how long the packet in it was. Never
//! changes more of it than a checksum that was left for later.

use std::net::SocketAddr;

use etherparse::LaxIpSlice;

use super::scene::{Kind, Place, Scene, Tunnel};
use crate::addr::Vni;
use crate::datapath::DropReason;
use crate::datapath::tap::{Cut, Direction, Form, LOOK_LEN, Seen, Tap, Verdict, Wanted};
use crate::offload::split::{MAX_HEADER_LEN, Split, finish_checksum};
use crate::offload::vnet_hdr::{Gso, VNET_HDR_LEN, VnetHdr};
use crate::sys::packet::{Frame, Way};
use crate::sys::simd;
use crate::wire::checksum::SumFn;
use crate::wire::udp::{self, Udp};
use crate::wire::vxlan::{self, Vxlan};

/// Bytes in front of an inner packet: of the link, with a tag, and of IPv6, UDP and VXLAN.
const MAX_IN_FRONT: usize = 18 + 40 + 8 + vxlan::HEADER_LEN;

/// More than any frame has: all of it.
const ALL: u32 = 1 << 20;

/// How much of a frame a capture needs. What is to be cut into segments has to be whole.
pub(super) fn keep(wanted: &Wanted) -> u32 {
    let len = wanted.snap_len.max(LOOK_LEN) + MAX_IN_FRONT;
    match wanted.segments {
        true => ALL,
        false => u32::try_from(len).unwrap_or(ALL),
    }
}

/// Shows frames to a tap.
pub(super) struct Shower {
    scene: Scene,
    segments: bool,
    sum: SumFn,
}

/// What stands around an inner packet.
struct Outer {
    inner_at: u8,
    from: SocketAddr,
    to: SocketAddr,
    tos: u8,
}

impl Shower {
    pub(super) fn new(scene: Scene, segments: bool) -> Self {
        Self {
            scene,
            segments,
            sum: simd::sum(),
        }
    }

    pub(super) fn take(&mut self, scene: Scene) {
        self.scene = scene;
    }

    /// Shows one frame, of which `bytes` were copied with the vnet header in front. What is no packet of the overlay
    /// is passed over.
    pub(super) fn show(&self, tap: &Tap, place: &Place, frame: &Frame, bytes: &mut [u8]) {
        let Some((vnet, link)) = bytes.split_at_mut_checked(VNET_HDR_LEN) else {
            return;
        };
        let mut vnet = VnetHdr::parse(vnet).unwrap_or_default();
        let Some(packet) = link.get_mut(frame.network_at..) else {
            return;
        };
        let (direction, verdict) = match (frame.way, &place.kind) {
            (Way::Leaves, _) => (Direction::Encap, Verdict::Handed),
            (Way::Arrives, _) => (Direction::Decap, Verdict::Arrived),
            // `ip_rcv_core` and `ip6_rcv_core` in the kernel drop what is for another link address.
            (Way::Strays, Kind::Inner(Tunnel::Vxlan { .. })) => {
                (Direction::Decap, Verdict::Dropped(DropReason::WrongMac))
            }
            (Way::Strays | Way::Loops, _) => return,
        };
        let is_superpacket = vnet.is_superpacket();
        let mut len = frame.len.saturating_sub(frame.network_at);
        if !is_superpacket {
            // A short frame is padded.
            len = total_len(packet).map_or(len, |total| total.min(len));
        }
        let copied = packet.len().min(len);
        let packet = packet.get_mut(..copied).unwrap_or_default();
        let offset = u16::try_from(frame.network_at).unwrap_or(u16::MAX);
        vnet.csum_start = vnet.csum_start.saturating_sub(offset);
        if copied == len && !is_superpacket {
            // Where that cannot be done the packet is shown as it is.
            let _as_it_is = finish_checksum(&vnet, packet, self.sum);
        }
        let packet = &*packet;
        let packets = if is_superpacket {
            count(&vnet, packet, len)
        } else {
            1
        };
        let seen = Seen {
            direction,
            verdict,
            outer: None,
            local_port: 0,
            tos: 0,
            packets,
        };
        tap.set_time(frame.time_ns);
        match place.kind {
            Kind::Outer(tunnel) => self.show_outer(tap, tunnel, seen, (packet, len)),
            Kind::Inner(tunnel) => self.show_inner(tap, tunnel.port(), seen, &vnet, (packet, len)),
            Kind::Past { .. } => self.show_inner(tap, 0, seen, &vnet, (packet, len)),
        }
    }

    /// Shows a packet that carries an inner one.
    fn show_outer(&self, tap: &Tap, tunnel: Tunnel, seen: Seen, (packet, len): (&[u8], usize)) {
        let Some(outer) = open(packet, tunnel) else {
            return;
        };
        let (ours, theirs) = match seen.direction {
            Direction::Encap => (outer.from, outer.to),
            Direction::Decap => (outer.to, outer.from),
        };
        // Other tunnels of the node look alike.
        if tunnel == Tunnel::Ipip && self.scene.peers.of(theirs.ip()).is_none() {
            return;
        }
        let seen = Seen {
            outer: Some(theirs),
            local_port: ours.port(),
            tos: outer.tos,
            ..seen
        };
        let cut = Cut {
            inner_at: outer.inner_at,
            len: Some(len.saturating_sub(usize::from(outer.inner_at))),
        };
        tap.note_cut(Form::Any, cut, || (seen, [packet]));
    }

    /// Shows a packet that is not wrapped, to or from a peer that answers at `port`.
    fn show_inner(
        &self,
        tap: &Tap,
        port: u16,
        seen: Seen,
        vnet: &VnetHdr,
        (packet, len): (&[u8], usize),
    ) {
        let ends = LaxIpSlice::from_slice(packet).ok();
        let far = ends.map(|(ip, _)| match seen.direction {
            Direction::Encap => ip.destination_addr(),
            Direction::Decap => ip.source_addr(),
        });
        let peer = far.and_then(|far| self.scene.peers.of(far));
        let seen = Seen {
            outer: peer.map(|peer| SocketAddr::new(peer, port)),
            ..seen
        };
        let split = match self.segments && vnet.is_superpacket() {
            true => Split::new(vnet, packet).ok(),
            false => None,
        };
        let Some(split) = split else {
            let cut = Cut {
                inner_at: 0,
                len: Some(len),
            };
            return tap.note_cut(Form::Any, cut, || (seen, [packet]));
        };
        let one = Seen { packets: 1, ..seen };
        let mut header = [0; MAX_HEADER_LEN];
        for i in 0..split.count() {
            let header_len = split.write_header(packet, i, self.sum, &mut header);
            let header = header.get(..header_len).unwrap_or_default();
            let payload = packet.get(split.payload(i)).unwrap_or_default();
            tap.note(Form::Any, || (one, [header, payload]));
        }
    }
}

/// Bytes of a packet as its header counts them; none where it does not.
fn total_len(packet: &[u8]) -> Option<usize> {
    let half = |at: usize| {
        let bytes = packet.get(at..)?.first_chunk::<2>()?;
        Some(usize::from(u16::from_be_bytes(*bytes)))
    };
    match packet.first()? >> 4 {
        4 => half(2).filter(|&len| len > 0),
        6 => half(4).filter(|&len| len > 0).map(|len| len + 40),
        _ => None,
    }
}

/// Packets in a superpacket of `len` bytes.
fn count(vnet: &VnetHdr, packet: &[u8], len: usize) -> u64 {
    let transport_at = usize::from(vnet.csum_start);
    let header_len = match (vnet.needs_csum, vnet.gso) {
        (false, _) | (_, Gso::None) => 0,
        (true, Gso::UdpL4) => transport_at + 8,
        (true, Gso::TcpV4 { .. } | Gso::TcpV6 { .. }) => {
            let offset = packet.get(transport_at + 12).copied().unwrap_or(0);
            transport_at + usize::from(offset >> 4) * 4
        }
    };
    let payload_len = len.saturating_sub(header_len);
    let segment_len = usize::from(vnet.gso_size).max(1);
    payload_len.div_ceil(segment_len).max(1) as u64
}

/// Opens a packet that carries an inner one.
fn open(packet: &[u8], tunnel: Tunnel) -> Option<Outer> {
    let (first, second) = (*packet.first()?, *packet.get(1)?);
    let (header_len, tos) = match first >> 4 {
        4 => (usize::from(first & 0xf) * 4, second),
        6 => (40, first << 4 | second >> 4),
        _ => return None,
    };
    let (ip, _) = LaxIpSlice::from_slice(packet).ok()?;
    let behind = packet.get(header_len..)?;
    let (headers_len, ports) = match tunnel {
        Tunnel::Ipip => (header_len, (0, 0)),
        Tunnel::Vxlan { vni, .. } => {
            let udp = Udp::new(behind).ok()?;
            let vxlan = Vxlan::new(behind.get(udp::HEADER_LEN..)?).ok()?;
            vxlan.version()?;
            if vxlan.vni().map(Vni::get) != Some(vni) {
                return None;
            }
            let len = header_len + udp::HEADER_LEN + vxlan::HEADER_LEN;
            (len, (udp.src_port(), udp.dst_port()))
        }
    };
    Some(Outer {
        inner_at: u8::try_from(headers_len).ok()?,
        from: SocketAddr::new(ip.source_addr(), ports.0),
        to: SocketAddr::new(ip.destination_addr(), ports.1),
        tos,
    })
}

#[cfg(test)]
mod tests;
