//! Owns encap: from the TUN to the underlay. Never blocks, allocates or logs.
//!
//! One burst of one worker:
//! 1. *Read* superpackets from the TUN queue, each into its own slot, until it is drained or the burst is full.
//! 2. *Validate* the virtio-net header and the IP header.
//! 3. *Decide* (`forward`): peer by longest-prefix match, TTL, path MTU; or an answer; or a drop.
//! 4. *Describe* segments: one header each in the outbox, behind the encapsulation's, payload by reference into the slot.
//! 5. *Group* segments into runs of one source socket, next hop, size and outer TOS (`offload::gso`).
//! 6. *Send* the runs, one `sendmmsg` per source socket (`outbox`).
//!
//! Everything belongs to one worker; the table is read-only for the burst.

use super::drop::DropReason;
use super::forward::EncapVerdict;
use super::outbox::Outbox;
use super::pending::{Destination, Slots};
use super::shared::Shared;
use super::stats::Counts;
use super::table::Peer;
use super::tap::{Direction, Form, Seen};
use super::worker::{Context, Progress, after_tun_read};
use crate::addr::Mtu;
use crate::offload::split::{MAX_HEADER_LEN, Split, finish_checksum};
use crate::offload::vnet_hdr::{VNET_HDR_LEN, VnetHdr};
use crate::wire::flow::flow_hash;
use crate::wire::ip::{self, IpMeta};

/// Packets in one burst: enough for runs of small packets, few enough that the other direction is served soon.
const BURST: usize = 64;
/// Bytes in one burst: four superpackets, so that what was read is still in the cache when it is sent.
const BURST_BYTES: usize = 4 << 16;
/// A first packet below this leaves at once; above, it is a superpacket, and its last segments can share a run
/// with the next one's.
const SMALL: usize = 2048;
/// The largest superpacket and its virtio-net header.
const SLOT_LEN: usize = VNET_HDR_LEN + (1 << 16);
/// Slots start this far apart: not a power of two, as for the receive slots.
const SLOT_STRIDE: usize = (SLOT_LEN + 17 * 64).next_multiple_of(64);

/// The buffers of a burst.
struct ReadSlots {
    slab: Vec<u8>,
    header_len: usize,
}

impl ReadSlots {
    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        let start = slot * SLOT_STRIDE;
        self.slab
            .get_mut(start..start + SLOT_LEN)
            .unwrap_or_default()
    }
}

impl Slots for ReadSlots {
    fn slot(&self, slot: usize) -> &[u8] {
        self.slab
            .get(slot * SLOT_STRIDE + self.header_len..)
            .unwrap_or_default()
    }
}

/// One worker's encap. Memory is fixed at construction.
pub struct Encap {
    slots: ReadSlots,
    /// A segment in one piece, for the slow path.
    scratch: Vec<u8>,
}

impl Encap {
    /// Allocates the slots; pages become resident when first filled.
    #[must_use]
    pub fn new(shared: &Shared) -> Self {
        let header_len = shared.tun_caps.header_len();
        Self {
            slots: ReadSlots {
                slab: vec![0; BURST * SLOT_STRIDE],
                header_len,
            },
            scratch: Vec::with_capacity(1 << 16),
        }
    }

    /// Runs one burst to completion.
    pub fn burst(
        &mut self,
        cx: &Context<'_>,
        outbox: &mut Outbox,
        counts: &mut Counts,
    ) -> Progress {
        let mut progress = Progress::More;
        let mut bytes = 0;
        for slot in 0..BURST {
            counts.read_calls += 1;
            match cx.queue.read(self.slots.buffer(slot)) {
                // A device never gives an empty packet; only something that ended does.
                Ok(0) => progress = Progress::Gone,
                Ok(len) => {
                    cx.tap.stamp();
                    bytes += len;
                    self.packet(cx, outbox, counts, slot, len);
                    // A lone packet does not wait for the look whether another follows.
                    if slot == 0 && len < SMALL {
                        outbox.flush(cx, &self.slots, counts);
                    }
                }
                Err(error) => progress = after_tun_read(&error, counts),
            }
            if progress != Progress::More || bytes >= BURST_BYTES {
                break;
            }
        }
        outbox.flush(cx, &self.slots, counts);
        progress
    }

    /// Steps 2 to 4 for one read.
    fn packet(
        &mut self,
        cx: &Context<'_>,
        outbox: &mut Outbox,
        counts: &mut Counts,
        slot: usize,
        len: usize,
    ) {
        let header_len = self.slots.header_len;
        let read = self.slots.buffer(slot).get_mut(..len).unwrap_or_default();
        let Some((header, packet)) = read.split_at_mut_checked(header_len) else {
            counts.read += 1;
            return refuse(cx, counts, DropReason::BadVnetHeader, 1, &[]);
        };
        let described = if header.is_empty() {
            Split::new(&VnetHdr::default(), packet)
                .map(|split| (VnetHdr::default(), split))
                .ok()
        } else {
            VnetHdr::parse(header)
                .ok()
                .and_then(|vnet| Split::new(&vnet, packet).ok().map(|split| (vnet, split)))
        };
        let Some((vnet, split)) = described else {
            counts.read += 1;
            return refuse(cx, counts, DropReason::BadVnetHeader, 1, packet);
        };
        let packets = split.count() as u64;
        counts.read += packets;
        counts.read_bytes += packet.len() as u64;
        counts.read_superpackets += u64::from(packets > 1);
        let Ok(meta) = ip::parse(packet) else {
            return refuse(cx, counts, DropReason::Malformed, packets, packet);
        };
        let whole = packet.len().min(meta.total_len());
        let longest = if vnet.is_superpacket() {
            split.segment_len(0)
        } else {
            whole
        };
        match cx.rules.encap(cx.table, packet, &meta, longest) {
            EncapVerdict::Send { hop, peer, tos } => {
                let to = destination(cx, &meta, packet, (hop, peer), tos);
                if vnet.is_superpacket() {
                    // Described again: its sums were over the header before the TTL changed.
                    let Ok(split) = Split::new(&vnet, packet) else {
                        return refuse(cx, counts, DropReason::BadVnetHeader, packets, packet);
                    };
                    outbox.push_split(cx, &self.slots, counts, to, (slot, &split));
                } else if finish_checksum(&vnet, packet, cx.shared.sum).is_ok() {
                    outbox.push_whole(cx, &self.slots, counts, to, (slot, whole));
                } else {
                    refuse(cx, counts, DropReason::BadVnetHeader, 1, packet);
                }
            }
            EncapVerdict::Fragment { hop, peer, max_len } => {
                let to = destination(cx, &meta, packet, (hop, peer), 0);
                if !vnet.is_superpacket() && finish_checksum(&vnet, packet, cx.shared.sum).is_err()
                {
                    return refuse(cx, counts, DropReason::BadVnetHeader, 1, packet);
                }
                // What is collected may be of the same flow: it goes first.
                outbox.flush(cx, &self.slots, counts);
                self.fragment(cx, outbox, counts, (to, max_len), (slot, len, &vnet));
            }
            EncapVerdict::Answer(kind, reason) => {
                outbox
                    .slow
                    .answer_locally(cx, counts, (kind, reason), packet, &meta, packets);
            }
            EncapVerdict::Drop(reason) => refuse(cx, counts, reason, packets, packet),
        }
    }

    /// Sends each segment of one read as fragments.
    fn fragment(
        &mut self,
        cx: &Context<'_>,
        outbox: &mut Outbox,
        counts: &mut Counts,
        (to, max_len): (Destination<'_>, Mtu),
        (slot, len, vnet): (usize, usize, &VnetHdr),
    ) {
        let packet = self
            .slots
            .slot(slot)
            .get(..len - self.slots.header_len)
            .unwrap_or_default();
        let Ok(split) = Split::new(vnet, packet) else {
            return refuse(cx, counts, DropReason::BadVnetHeader, 1, packet);
        };
        if !vnet.is_superpacket() {
            return outbox.slow.fragment(cx, counts, to, packet, max_len);
        }
        for i in 0..split.count() {
            let mut header = [0; MAX_HEADER_LEN];
            let header_len = split.write_header(packet, i, cx.shared.sum, &mut header);
            self.scratch.clear();
            self.scratch
                .extend_from_slice(header.get(..header_len).unwrap_or_default());
            self.scratch
                .extend_from_slice(packet.get(split.payload(i)).unwrap_or_default());
            outbox.slow.fragment(cx, counts, to, &self.scratch, max_len);
        }
    }
}

/// Drops what was read as one.
fn refuse(cx: &Context<'_>, counts: &mut Counts, reason: DropReason, packets: u64, packet: &[u8]) {
    counts.drop(reason, packets);
    cx.tap.note(Form::Any, || {
        (Seen::dropped(Direction::Encap, reason, packets), [packet])
    });
}

/// Completes the verdict with what the flow and the peer say.
fn destination<'t>(
    cx: &Context<'_>,
    meta: &IpMeta,
    packet: &[u8],
    (hop, peer): (u32, &'t Peer),
    tos: u8,
) -> Destination<'t> {
    Destination {
        peer,
        hop,
        tos,
        gso: cx.shared.may_send_runs(peer),
        socket: cx.shared.socket_idx(flow_hash(meta, packet)),
    }
}
