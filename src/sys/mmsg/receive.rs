//! Owns receiving bursts with `recvmmsg`. Never looks into a datagram.

#![expect(unsafe_code, reason = "recvmmsg over arrays that outlive many bursts")]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::abi::{
    CONTROL_LEN, Control, ControlMessages, NAME_LEN, NAME_SPACE, Name, empty_header, parse_name,
    read_int,
};
use crate::sys::iov::EMPTY;

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
    slab: Vec<u8>,
    names: Vec<Name>,
    controls: Vec<Control>,
    iovs: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
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
            slab: vec![0; entries * SLOT_STRIDE],
            names: vec![Name([0; NAME_LEN]); entries],
            controls: vec![Control([0; CONTROL_LEN]); entries],
            iovs: vec![EMPTY; entries],
            headers: vec![empty_header(); entries],
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
        let slots = self.slab.chunks_exact_mut(SLOT_STRIDE);
        let parts = self
            .names
            .iter_mut()
            .zip(&mut self.controls)
            .zip(&mut self.iovs);
        for ((slot, ((name, control), iov)), header) in
            slots.zip(parts).zip(&mut self.headers).take(ask)
        {
            *iov = libc::iovec {
                iov_base: slot.as_mut_ptr().cast(),
                iov_len: SLOT_LEN,
            };
            let msg = &mut header.msg_hdr;
            msg.msg_name = name.0.as_mut_ptr().cast();
            msg.msg_namelen = NAME_SPACE;
            msg.msg_iov = iov;
            msg.msg_iovlen = 1;
            msg.msg_control = control.0.as_mut_ptr().cast();
            msg.msg_controllen = CONTROL_LEN as _;
            msg.msg_flags = 0;
        }
        // SAFETY: the first `ask` headers were just filled with pointers into vectors of `self` that are
        // borrowed exclusively until the call returns, with their true lengths; `ask` is at most their
        // number; no timeout is passed; the descriptor is open by its type.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                libc::c_uint::try_from(ask).unwrap_or(1),
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).map_err(|_negative| io::Error::last_os_error())?;
        for ((header, name), control) in self
            .headers
            .iter()
            .zip(&self.names)
            .zip(&self.controls)
            .take(count)
        {
            self.received.push(describe(header, name, control));
        }
        let drained = count < ask;
        self.ask = if drained {
            (ask / 2).max(count + 1)
        } else {
            ask * 2
        }
        .min(self.fitting())
        .clamp(Self::MIN_ASK.min(self.headers.len()), self.headers.len());
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
            .zip(self.slab.chunks_exact_mut(SLOT_STRIDE))
            .map(|(&received, slot)| {
                let len = received.len.min(SLOT_LEN);
                (received, slot.get_mut(..len).unwrap_or_default())
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
        let (off, len) = (off as usize, len as usize);
        let start = usize::from(idx) * SLOT_STRIDE + off;
        if off + len > SLOT_LEN {
            return &[];
        }
        self.slab.get(start..start + len).unwrap_or_default()
    }
}

/// Reads what the kernel wrote beside the payload.
fn describe(header: &libc::mmsghdr, name: &Name, control: &Control) -> Received {
    let len = header.msg_len as usize;
    let mut received = Received {
        source: parse_name(&name.0),
        len,
        stride: len,
        tos: 0,
        truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
    };
    #[expect(clippy::unnecessary_cast, reason = "socklen_t on some libcs")]
    let used = (header.msg_hdr.msg_controllen as usize).min(CONTROL_LEN);
    for (level, kind, data) in ControlMessages(control.0.get(..used).unwrap_or_default()) {
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
