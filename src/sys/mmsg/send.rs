//! Owns sending bursts with `sendmmsg`. Never decides what goes where.

#![expect(unsafe_code, reason = "sendmmsg over arrays that outlive many bursts")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use socket2::SockAddr;

use super::abi::{CMSG_HEADER_LEN, cmsg_align, empty_header};
use crate::sys::iov::{EMPTY, MAX_SLICES, iovec};

/// Two control messages of one `int` or less: segment size and TOS.
const SEND_CONTROL_LEN: usize = 2 * (CMSG_HEADER_LEN + cmsg_align(4));

#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct SendControl([u8; SEND_CONTROL_LEN]);

/// Arrays for sending up to a fixed number of entries with one system call.
pub struct SendBatch {
    headers: Vec<libc::mmsghdr>,
    iovs: Vec<libc::iovec>,
    controls: Vec<SendControl>,
}

impl SendBatch {
    /// Allocates room for `entries` entries of `slices` slices together.
    #[must_use]
    pub fn new(entries: usize, slices: usize) -> Self {
        Self {
            headers: vec![empty_header(); entries],
            iovs: vec![EMPTY; slices],
            controls: vec![SendControl([0; SEND_CONTROL_LEN]); entries],
        }
    }

    /// Begins a batch; addresses and slices pushed must outlive it, which `'b` says.
    #[must_use]
    pub const fn start<'b>(&mut self) -> Sending<'_, 'b> {
        Sending {
            batch: self,
            entries: 0,
            slices: 0,
            borrowed: PhantomData,
        }
    }
}

/// How one entry is sent.
#[derive(Clone, Copy)]
pub struct Entry<'b> {
    /// Where to.
    pub to: &'b SockAddr,
    /// Cut into datagrams of this many bytes (`UDP_SEGMENT`).
    pub segment_len: Option<u16>,
    /// TOS byte or traffic class of the outer header; 0 leaves the socket's.
    pub tos: u8,
}

/// A batch being put together and sent.
pub struct Sending<'a, 'b> {
    batch: &'a mut SendBatch,
    entries: usize,
    slices: usize,
    borrowed: PhantomData<&'b [u8]>,
}

impl<'b> Sending<'_, 'b> {
    /// Appends an entry made of `slices`; `false`, and nothing appended, when it does not fit any more.
    pub fn push(&mut self, entry: Entry<'b>, slices: impl Iterator<Item = &'b [u8]>) -> bool {
        let start = self.slices;
        let mut end = start;
        for slice in slices {
            let Some(iov) = self
                .batch
                .iovs
                .get_mut(end)
                .filter(|_| end - start < MAX_SLICES)
            else {
                return false;
            };
            *iov = iovec(slice);
            end += 1;
        }
        let (Some(header), Some(control), Some(iovs)) = (
            self.batch.headers.get_mut(self.entries),
            self.batch.controls.get_mut(self.entries),
            self.batch.iovs.get_mut(start..end),
        ) else {
            return false;
        };
        let control_len = write_control(entry, &mut control.0);
        let msg = &mut header.msg_hdr;
        msg.msg_name = entry.to.as_ptr().cast_mut().cast();
        msg.msg_namelen = entry.to.len();
        msg.msg_iov = iovs.as_mut_ptr();
        msg.msg_iovlen = iovs.len() as _;
        msg.msg_control = if control_len == 0 {
            std::ptr::null_mut()
        } else {
            control.0.as_mut_ptr().cast()
        };
        msg.msg_controllen = control_len as _;
        msg.msg_flags = 0;
        self.entries += 1;
        self.slices = end;
        true
    }

    /// Number of entries pushed.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries
    }

    /// Whether nothing was pushed.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Sends entries from number `from` on without waiting; returns how many went. Fewer than asked means
    /// that the next one failed; sending again from there tells why.
    ///
    /// # Errors
    /// The kernel's, about entry `from`.
    pub fn send(&mut self, socket: BorrowedFd<'_>, from: usize) -> io::Result<usize> {
        let Some(headers) = self.batch.headers.get_mut(from..self.entries) else {
            return Ok(0);
        };
        // SAFETY: `headers` are entries filled by `push`: names and slices live for 'b, which is not over
        // while `self` exists, vectors and control messages belong to the batch, which `self` borrows
        // exclusively; the kernel writes only `msg_len`; the descriptor is open by its type.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                libc::c_uint::try_from(headers.len()).unwrap_or(1),
                (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _,
            )
        };
        usize::try_from(sent).map_err(|_negative| io::Error::last_os_error())
    }
}

/// Writes the control messages of an entry; returns their length, 0 for none.
fn write_control(entry: Entry<'_>, control: &mut [u8; SEND_CONTROL_LEN]) -> usize {
    let mut used = 0;
    if let Some(segment_len) = entry.segment_len {
        used = put(
            control,
            used,
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            &segment_len.to_ne_bytes(),
        );
    }
    if entry.tos != 0 {
        let (level, kind) = if entry.to.is_ipv6() {
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
        } else {
            (libc::IPPROTO_IP, libc::IP_TOS)
        };
        let tos = libc::c_int::from(entry.tos).to_ne_bytes();
        used = put(control, used, level, kind, &tos);
    }
    used
}

/// Appends one control message at `at`; returns where the next one starts.
fn put(
    control: &mut [u8; SEND_CONTROL_LEN],
    at: usize,
    level: libc::c_int,
    kind: libc::c_int,
    data: &[u8],
) -> usize {
    const WORD: usize = size_of::<usize>();
    let len = CMSG_HEADER_LEN + data.len();
    let end = at + cmsg_align(len);
    if let Some(message) = control.get_mut(at..end) {
        let (head, body) = message.split_at_mut(CMSG_HEADER_LEN);
        head[..WORD].copy_from_slice(&len.to_ne_bytes());
        head[WORD..WORD + 4].copy_from_slice(&level.to_ne_bytes());
        head[WORD + 4..WORD + 8].copy_from_slice(&kind.to_ne_bytes());
        body[..data.len()].copy_from_slice(data);
    }
    end
}
