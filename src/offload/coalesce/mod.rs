//! Owns merging a burst of decapsulated packets into superpackets for the TUN. Never copies payload, never
//! changes the bytes it is shown, never changes the order of a flow.
//!
//! One pass, one call of [`Coalescer::push`] per packet, then [`Coalescer::writes`]:
//!
//! 1. `header` finds family, transport and payload; what is not a whole TCP or UDP packet passes as it is.
//! 2. `rules::Candidate` decides whether the packet can merge with anything at all.
//! 3. The open item of its flow is looked up: first the last one used, then the table.
//! 4. `rules::join` compares the packet with the first packet of that item, and the checksums are verified,
//!    the first packet's only now: a packet that stays alone costs no sum.
//! 5. The packet is appended, or opens an item of its own.
//!
//! Order: *a packet may only merge into the most recent item of its flow*. Whatever else arrives on a flow
//! closes that item. Packets whose flow cannot be told (fragments, IPv6 extension headers) close every open
//! item between their two addresses.
//!
//! The coalescer holds handles, not bytes; it looks back through the caller's resolver.

mod fence;
mod rules;
mod write;

use thiserror::Error;

use self::fence::Fences;
use self::rules::Candidate;
pub use self::rules::{Limits, Mismatch, Unmergeable};
pub use self::write::{HEAD_LEN, Superpacket, Write};
use super::header::{Family, Headers, Transport, addresses};
use super::table::{Table, finish, mix};
use crate::wire::checksum::SumFn;

/// The end of a chain of links.
const NIL: u16 = u16::MAX;

/// The caller's handle for one packet of the burst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketRef {
    /// Which receive buffer.
    pub buf: u16,
    /// Byte offset of the packet in it.
    pub off: u32,
    /// Bytes of the packet.
    pub len: u32,
}

/// What became of a pushed packet. Each is in exactly one write, whatever this says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// First of its flow, or after a closed item: it heads a new item.
    Opened,
    /// Appended to the open item of its flow.
    Merged,
    /// It could not join the open item of its flow and heads a new one.
    Reopened(Mismatch),
    /// It can merge with nothing, and passes unchanged.
    Passed(Unmergeable),
}

/// The burst is full: write it out, [`Coalescer::clear`], push again.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("coalescer holds as many packets as it was made for: write the burst out and clear it")]
pub struct Full;

/// One packet of an item's chain.
#[derive(Clone, Copy, Debug)]
struct Link {
    packet: PacketRef,
    /// The next packet of the same item, or [`NIL`].
    next: u16,
}

/// One future write: a packet alone, or a superpacket in the making.
#[derive(Clone, Copy, Debug)]
struct Item {
    first: u16,
    last: u16,
    count: u16,
    /// Payload bytes of the first packet, hence of all but the last.
    gso_size: u16,
    /// Payload bytes of the whole chain.
    payload_len: u32,
    /// Meaningless while the item is a packet alone.
    headers: Headers,
    /// Folded pseudo-header sum without the length; set when the first packet is verified.
    pseudo: u16,
    /// More may be appended.
    open: bool,
    /// The first packet's checksums have been verified.
    verified: bool,
    /// The last packet carries PSH, which the superpacket then does too.
    push: bool,
}

/// Merges the packets of one burst after another, in memory fixed at construction.
#[derive(Debug)]
pub struct Coalescer {
    limits: Limits,
    sum: SumFn,
    /// Packets per burst: neither vector ever grows beyond.
    capacity: usize,
    links: Vec<Link>,
    items: Vec<Item>,
    table: Table,
    /// The item last opened or appended to: most packets follow one of their own flow.
    latest: u16,
    fences: Fences,
}

impl Coalescer {
    /// A coalescer for bursts of up to `capacity` packets (65534 at most: indices are 16 bits, one is taken).
    #[must_use]
    pub fn new(limits: Limits, capacity: u16, sum: SumFn) -> Self {
        let capacity = usize::from(capacity.min(NIL - 1));
        Self {
            limits,
            sum,
            capacity,
            links: Vec::with_capacity(capacity),
            items: Vec::with_capacity(capacity),
            table: Table::new(capacity),
            latest: NIL,
            fences: Fences::new(),
        }
    }

    /// What may be merged from the next push on.
    pub const fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Packets pushed since the last [`Coalescer::clear`].
    #[must_use]
    pub const fn len(&self) -> usize {
        self.links.len()
    }

    /// Whether nothing was pushed since the last [`Coalescer::clear`].
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Forgets the burst; the buffers behind it may be reused.
    pub fn clear(&mut self) {
        self.links.clear();
        self.items.clear();
        self.table.clear();
        self.latest = NIL;
        self.fences.clear();
    }

    /// Adds a packet, final in every byte (TTL included), behind all packets pushed before.
    ///
    /// `bytes_of` resolves this handle and all earlier ones of the burst, always to the same bytes.
    ///
    /// # Errors
    /// [`Full`] when the burst holds its capacity; the packet is not taken then.
    #[inline]
    pub fn push<'b>(
        &mut self,
        packet: PacketRef,
        bytes_of: impl Fn(PacketRef) -> &'b [u8],
    ) -> Result<Pushed, Full> {
        if self.links.len() == self.capacity {
            return Err(Full);
        }
        let bytes = bytes_of(packet);
        let headers = match Headers::parse(bytes) {
            Ok(headers) => headers,
            Err(error) => {
                self.fences.raise(bytes, error, self.items.len());
                return Ok(self.pass(packet, None, Unmergeable::Header(error)));
            }
        };
        let (hash, found) = self.find(bytes, headers, &bytes_of);
        let candidate = match Candidate::new(bytes, headers, &self.limits) {
            Ok(candidate) => candidate,
            Err(reason) => return Ok(self.pass(packet, found.map(|found| found.at), reason)),
        };
        let mut outcome = Pushed::Opened;
        if let Some(found) = found {
            match self.append(found, packet, bytes, &candidate) {
                Ok(()) => return Ok(Pushed::Merged),
                Err(Refusal::Packet(reason)) => {
                    return Ok(self.pass(packet, Some(found.at), reason));
                }
                Err(Refusal::Item(mismatch)) => outcome = Pushed::Reopened(mismatch),
            }
            self.close(found.at);
        }
        let hash = hash.unwrap_or_else(|| flow_hash(bytes, headers));
        self.open(packet, headers, &candidate, hash);
        Ok(outcome)
    }

    /// The burst's writes, in order.
    pub fn writes(&self) -> impl ExactSizeIterator<Item = Write<'_>> + Clone {
        self.items.iter().map(|item| {
            if item.count > 1 {
                Write::Superpacket(Superpacket::new(item, &self.links))
            } else {
                Write::Packet(
                    self.links
                        .get(usize::from(item.first))
                        .map_or_else(PacketRef::default, |link| link.packet),
                )
            }
        })
    }

    /// The open item of the packet's flow, and the flow's hash if it had to be computed.
    #[inline]
    fn find<'b>(
        &self,
        bytes: &[u8],
        headers: Headers,
        bytes_of: &impl Fn(PacketRef) -> &'b [u8],
    ) -> (Option<u32>, Option<Found<'b>>) {
        let fence = self.fences.before(bytes, headers.family);
        let open_item = |at: u16| {
            let item = self
                .items
                .get(usize::from(at))
                .filter(|item| item.open && at >= fence)?;
            let first = bytes_of(self.links.get(usize::from(item.first))?.packet);
            rules::same_flow((first, item.headers), (bytes, headers)).then_some(Found { at, first })
        };
        let latest = open_item(self.latest);
        if latest.is_some() {
            return (None, latest);
        }
        let hash = flow_hash(bytes, headers);
        (Some(hash), self.table.find(hash, open_item))
    }

    /// Appends to an open item of the same flow, if every rule and checksum allows.
    #[inline]
    fn append(
        &mut self,
        Found { at, first }: Found<'_>,
        packet: PacketRef,
        bytes: &[u8],
        candidate: &Candidate,
    ) -> Result<(), Refusal> {
        let index = self.next_index();
        let Some(item) = self.items.get_mut(usize::from(at)) else {
            return Err(Refusal::Item(Mismatch::Segments));
        };
        rules::join(item, first, bytes, candidate, &self.limits).map_err(Refusal::Item)?;
        if !item.verified {
            item.pseudo = rules::pseudo(first, item.headers);
            if !rules::checksums_hold(first, item.headers, item.pseudo, self.sum) {
                return Err(Refusal::Item(Mismatch::FirstChecksum));
            }
            item.verified = true;
        }
        if !rules::checksums_hold(bytes, item.headers, item.pseudo, self.sum) {
            return Err(Refusal::Packet(Unmergeable::Checksum));
        }
        item.count += 1;
        item.payload_len += u32::from(candidate.payload_len);
        item.push = candidate.push;
        // Nothing can follow a short segment, nor one that the sender wants delivered.
        item.open = candidate.payload_len == item.gso_size && !candidate.push;
        let last = std::mem::replace(&mut item.last, index);
        if let Some(link) = self.links.get_mut(usize::from(last)) {
            link.next = index;
        }
        self.links.push(Link { packet, next: NIL });
        self.latest = at;
        Ok(())
    }

    /// Starts an item that later packets of the flow may join.
    #[inline]
    fn open(&mut self, packet: PacketRef, headers: Headers, candidate: &Candidate, hash: u32) {
        let at = self.push_item(packet, headers);
        if candidate.push {
            return;
        }
        if let Some(item) = self.items.get_mut(usize::from(at)) {
            item.gso_size = candidate.payload_len;
            item.payload_len = u32::from(candidate.payload_len);
            item.open = true;
        }
        let Self { table, items, .. } = self;
        let is_closed = |at: u16| items.get(usize::from(at)).is_none_or(|item| !item.open);
        if let Some(evicted) = table.insert(hash, at, is_closed) {
            self.close(evicted);
        }
        self.latest = at;
    }

    /// Adds a packet that nothing joins, behind the open item of its flow.
    fn pass(&mut self, packet: PacketRef, found: Option<u16>, reason: Unmergeable) -> Pushed {
        const NONE: Headers = Headers {
            family: Family::V4,
            transport: Transport::Udp,
            l3_len: 0,
            l4_len: 0,
        };
        if let Some(at) = found {
            self.close(at);
        }
        self.push_item(packet, NONE);
        Pushed::Passed(reason)
    }

    #[inline]
    fn push_item(&mut self, packet: PacketRef, headers: Headers) -> u16 {
        let index = self.next_index();
        let at = u16::try_from(self.items.len()).unwrap_or(NIL);
        self.links.push(Link { packet, next: NIL });
        self.items.push(Item {
            first: index,
            last: index,
            count: 1,
            gso_size: 0,
            payload_len: 0,
            headers,
            pseudo: 0,
            open: false,
            verified: false,
            push: false,
        });
        at
    }

    fn next_index(&self) -> u16 {
        u16::try_from(self.links.len()).unwrap_or(NIL)
    }

    fn close(&mut self, at: u16) {
        if let Some(item) = self.items.get_mut(usize::from(at)) {
            item.open = false;
        }
    }
}

/// An open item and its first packet.
#[derive(Clone, Copy)]
struct Found<'b> {
    at: u16,
    first: &'b [u8],
}

/// Why an open item did not take a packet: who of the two is at fault.
enum Refusal {
    Packet(Unmergeable),
    Item(Mismatch),
}

/// Hash of addresses and ports.
#[inline]
fn flow_hash(bytes: &[u8], headers: Headers) -> u32 {
    let ports = bytes
        .get(usize::from(headers.l3_len)..)
        .and_then(<[u8]>::first_chunk::<4>);
    let ports = u64::from(u32::from_be_bytes(ports.copied().unwrap_or_default()));
    finish(address_hash(
        ports | u64::from(headers.transport.protocol()) << 32,
        addresses(bytes, headers.family),
    ))
}

/// Hash of an address pair.
#[inline]
fn address_hash(seed: u64, addresses: &[u8]) -> u64 {
    let (words, _) = addresses.as_chunks::<8>();
    words
        .iter()
        .fold(seed, |hash, &word| mix(hash, u64::from_ne_bytes(word)))
}
