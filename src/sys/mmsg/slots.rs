//! Owns the arrays that `recvmmsg` fills, and the call. Never looks into what was received.

#![expect(unsafe_code, reason = "recvmmsg over arrays that outlive many bursts")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;

use super::abi::{CONTROL_LEN, Control, NAME_LEN, NAME_SPACE, Name, empty_header};
use crate::sys::iov::EMPTY;

/// Slots of `LEN` bytes that start `STRIDE` bytes apart, each with its name and control messages.
pub(in crate::sys) struct Slots<const LEN: usize, const STRIDE: usize> {
    slab: Vec<u8>,
    names: Vec<Name>,
    controls: Vec<Control>,
    iovs: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

/// One filled slot.
pub(in crate::sys) struct Filled<'s> {
    pub(in crate::sys) header: &'s libc::mmsghdr,
    /// Who sent it, as the kernel writes socket addresses.
    pub(in crate::sys) name: &'s [u8; NAME_LEN],
    control: &'s Control,
    /// The whole slot, whatever was received.
    pub(in crate::sys) slot: &'s mut [u8],
}

impl<'s> Filled<'s> {
    /// What the kernel wrote of control messages.
    pub(in crate::sys) fn control(&self) -> &'s [u8] {
        #[expect(clippy::unnecessary_cast, reason = "socklen_t on some libcs")]
        let used = (self.header.msg_hdr.msg_controllen as usize).min(CONTROL_LEN);
        self.control.0.get(..used).unwrap_or_default()
    }
}

impl<const LEN: usize, const STRIDE: usize> Slots<LEN, STRIDE> {
    /// Allocates `entries` slots; pages become resident when first filled.
    pub(in crate::sys) fn new(entries: usize) -> Self {
        const { assert!(LEN <= STRIDE) };
        Self {
            slab: vec![0; entries * STRIDE],
            names: vec![Name([0; NAME_LEN]); entries],
            controls: vec![Control([0; CONTROL_LEN]); entries],
            iovs: vec![EMPTY; entries],
            headers: vec![empty_header(); entries],
        }
    }

    /// How many there are.
    pub(in crate::sys) const fn len(&self) -> usize {
        self.headers.len()
    }

    /// Receives up to `ask` messages without waiting, into as many of the first slots as it returns.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when nothing is there.
    pub(in crate::sys) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        ask: usize,
    ) -> io::Result<usize> {
        let ask = ask.min(self.headers.len());
        let slots = self.slab.chunks_exact_mut(STRIDE);
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
                iov_len: LEN,
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
        // SAFETY: the first `ask` headers, which is at most all of them, were just filled with pointers into vectors
        // of `self` that are borrowed exclusively until the call returns, with lengths that are at most theirs; no
        // timeout is passed; the descriptor is open by its type.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                libc::c_uint::try_from(ask).unwrap_or(1),
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        Ok(usize::try_from(Errno::result(count)?).unwrap_or(0))
    }

    /// All slots in order, filled or not.
    pub(in crate::sys) fn iter_mut(&mut self) -> impl Iterator<Item = Filled<'_>> {
        let known = self.headers.iter().zip(&self.names).zip(&self.controls);
        known
            .zip(self.slab.chunks_exact_mut(STRIDE))
            .map(|(((header, name), control), slot)| Filled {
                header,
                name: &name.0,
                control,
                slot: slot.get_mut(..LEN).unwrap_or_default(),
            })
    }

    /// `len` bytes at `off` of slot `idx`; empty when that is not within it.
    #[inline]
    pub(in crate::sys) fn slice(&self, idx: usize, off: usize, len: usize) -> &[u8] {
        let start = idx * STRIDE + off;
        if off + len > LEN {
            return &[];
        }
        self.slab.get(start..start + len).unwrap_or_default()
    }
}
