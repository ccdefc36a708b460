//! Owns receiving bursts with `recvmmsg`. Never looks into a datagram.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use super::abi::{ControlMessages, parse_name, read_int};
use super::slots::{Filled, Slots};

/// The largest UDP payload either family carries, and so the largest GRO buffer, rounded up.
const SLOT_LEN: usize = 1 << 16;
/// Slots start this far apart: not a power of two, so that their first lines, which hold all headers, do not
/// compete for one cache set.
const SLOT_STRIDE: usize = SLOT_LEN + 17 * 64;

/// About as many bytes as one call brings, where entries are large: what was received is still in the cache when it
/// is handed on, and the slots behind it need no memory.
const BURST_BYTES: usize = 8 << 16;

/// What is known of one received entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Who sent it.
    pub source: SocketAddr,
    /// Bytes in the entry.
    pub len: usize,
    /// Size of each datagram in the entry but the last, which may be shorter; `len` for a single one.
    pub stride: usize,
    /// The outer TOS byte or traffic class.
    pub tos: u8,
    /// The datagram was longer than the slot (`MSG_TRUNC`).
    pub truncated: bool,
}

/// Arrays for receiving up to a fixed number of entries with one system call.
pub struct RecvBatch {
    slots: Slots<SLOT_LEN, SLOT_STRIDE>,
    received: Vec<Received>,
    /// How many entries the next call asks for: grows while calls come back full, so that an idle socket's
    /// single packets do not pay for preparing them all, up to [`BURST_BYTES`].
    ask: usize,
}

impl RecvBatch {
    /// The fewest entries one call asks for.
    const MIN_ASK: usize = 4;

    /// Allocates `entries` slots of 64 KiB; pages become resident when first filled.
    #[must_use]
    pub fn new(entries: usize) -> Self {
        Self {
            slots: Slots::new(entries),
            received: Vec::with_capacity(entries),
            ask: entries.min(Self::MIN_ASK),
        }
    }

    /// Receives what is there without waiting. Returns the number of entries and whether the socket was
    /// drained: fewer came than were asked for.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when nothing is there. A pending socket error (an ICMP answer) comes out
    /// here once, too.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<(usize, bool)> {
        self.received.clear();
        let ask = self.ask;
        let count = self.slots.receive(socket, ask)?;
        let filled = self.slots.iter_mut().take(count);
        self.received.extend(filled.map(|filled| describe(&filled)));
        let drained = count < ask;
        self.ask = if drained {
            (ask / 2).max(count + 1)
        } else {
            ask * 2
        }
        .min(self.fitting())
        .clamp(Self::MIN_ASK.min(self.slots.len()), self.slots.len());
        Ok((count, drained))
    }

    /// How many entries as large as the last ones make [`BURST_BYTES`].
    fn fitting(&self) -> usize {
        let bytes: usize = self.received.iter().map(|received| received.len).sum();
        (self.received.len() * BURST_BYTES)
            .checked_div(bytes)
            .unwrap_or(usize::MAX)
    }

    /// The entries of the last [`RecvBatch::receive`]: what is known of each, and its bytes.
    pub fn entries(&mut self) -> impl Iterator<Item = (Received, &mut [u8])> {
        self.received
            .iter()
            .zip(self.slots.iter_mut())
            .map(|(&received, filled)| {
                let len = received.len.min(SLOT_LEN);
                (received, filled.slot.get_mut(..len).unwrap_or_default())
            })
    }

    /// What is known of entry `idx` of the last [`RecvBatch::receive`], if it has one.
    #[must_use]
    pub fn entry(&self, idx: u16) -> Option<&Received> {
        self.received.get(usize::from(idx))
    }

    /// `len` bytes at `off` of entry `idx`; empty when that is not within the entry's slot.
    #[inline]
    #[must_use]
    pub fn slice(&self, idx: u16, off: u32, len: u32) -> &[u8] {
        self.slots
            .slice(usize::from(idx), off as usize, len as usize)
    }
}

/// Reads what the kernel wrote beside the payload.
fn describe(filled: &Filled<'_>) -> Received {
    let Filled { header, name, .. } = filled;
    let len = header.msg_len as usize;
    let mut received = Received {
        source: parse_name(name),
        len,
        stride: len,
        tos: 0,
        truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
    };
    for (level, kind, data) in ControlMessages(filled.control()) {
        match (level, kind) {
            (libc::SOL_UDP, libc::UDP_GRO) => {
                let stride = read_int(data).and_then(|stride| usize::try_from(stride).ok());
                received.stride = stride.filter(|&s| s > 0).unwrap_or(len);
            }
            // IPv4 delivers one byte, IPv6 an int.
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                received.tos = data.first().copied().unwrap_or(0);
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                let class = read_int(data).and_then(|class| u8::try_from(class).ok());
                received.tos = class.unwrap_or(0);
            }
            _ => {}
        }
    }
    received
}
