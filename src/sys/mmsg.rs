//! Owns batched datagram I/O: `recvmmsg`, `sendmmsg`, the error queue, over arrays built once. Never decides
//! what an error means.
//!
//! Vocabulary: an *entry* is one `mmsghdr`, the kernel's unit of success. A received entry may hold several
//! datagrams of one size (its *stride*, `UDP_GRO`); a sent entry may be cut into several (`UDP_SEGMENT`).

#![expect(
    unsafe_code,
    reason = "sendmmsg and recvmmsg over arrays that outlive many bursts"
)]

use std::io;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use socket2::SockAddr;

use super::iov::{EMPTY, MAX_SLICES, iovec};

/// The largest UDP payload either family carries, and so the largest GRO buffer, rounded up.
const SLOT_LEN: usize = 1 << 16;
/// Slots start this far apart: not a power of two, so that their first lines, which hold all headers, do not
/// compete for one cache set.
const SLOT_STRIDE: usize = SLOT_LEN + 17 * 64;
/// `struct sockaddr_in6`, the larger of the two.
const NAME_LEN: usize = size_of::<libc::sockaddr_in6>();
/// As the kernel counts it.
const NAME_SPACE: libc::socklen_t = 28;
const _: () = assert!(NAME_SPACE as usize == NAME_LEN);
/// Room for the control messages we ask for: a GRO stride, a TOS byte; and on the error queue one
/// `sock_extended_err` with its offender's address.
const CONTROL_LEN: usize = 128;
/// `CMSG_ALIGN(sizeof(struct cmsghdr))`, include/linux/socket.h.
const CMSG_HEADER_LEN: usize = cmsg_align(size_of::<libc::cmsghdr>());

/// `CMSG_ALIGN`: to the size of a `long`.
const fn cmsg_align(len: usize) -> usize {
    len.next_multiple_of(size_of::<usize>())
}

#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Name([u8; NAME_LEN]);

#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_LEN]);

/// An all-zero message header; its fields are pointers and lengths, some libcs add private padding.
const fn empty_header() -> libc::mmsghdr {
    // SAFETY: `mmsghdr` is plain old data of integers and raw pointers, for which zero bytes are valid.
    unsafe { std::mem::zeroed() }
}

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
    /// single packets do not pay for preparing them all.
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
        .clamp(Self::MIN_ASK.min(self.headers.len()), self.headers.len());
        Ok((count, drained))
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

/// Iterates control messages as (level, type, data).
struct ControlMessages<'a>(&'a [u8]);

impl<'a> Iterator for ControlMessages<'a> {
    type Item = (libc::c_int, libc::c_int, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        const WORD: usize = size_of::<usize>();
        let len = usize::from_ne_bytes(self.0.get(..WORD)?.try_into().ok()?);
        let level = read_int(self.0.get(WORD..)?)?;
        let kind = read_int(self.0.get(WORD + 4..)?)?;
        let data = self.0.get(CMSG_HEADER_LEN..len)?;
        self.0 = self.0.get(cmsg_align(len)..).unwrap_or_default();
        Some((level, kind, data))
    }
}

fn read_int(bytes: &[u8]) -> Option<libc::c_int> {
    bytes
        .first_chunk()
        .map(|&int| libc::c_int::from_ne_bytes(int))
}

/// A socket address as the kernel wrote it. Unspecified when it is of no known family.
fn parse_name(name: &[u8; NAME_LEN]) -> SocketAddr {
    let port = u16::from_be_bytes([name[2], name[3]]);
    let family = libc::c_int::from(libc::sa_family_t::from_ne_bytes([name[0], name[1]]));
    match family {
        libc::AF_INET => {
            let addr = Ipv4Addr::new(name[4], name[5], name[6], name[7]);
            SocketAddr::new(IpAddr::V4(addr), port)
        }
        libc::AF_INET6 => {
            let mut octets = [0; 16];
            octets.copy_from_slice(&name[8..24]);
            let scope = u32::from_ne_bytes([name[24], name[25], name[26], name[27]]);
            SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, scope))
        }
        _ => SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
    }
}

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

/// One error from a socket's error queue (ip(7), `IP_RECVERR`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuedError {
    /// The error number: `EMSGSIZE`, `ECONNREFUSED`, `EHOSTUNREACH`, ...
    pub errno: i32,
    /// It came from an ICMP message, not from the local stack.
    pub from_network: bool,
    /// For `EMSGSIZE`: the MTU of the path, outer headers included.
    pub info: u32,
    /// Where the datagram went that caused it.
    pub destination: SocketAddr,
}

/// Takes one error off the queue; `None` when it is empty.
///
/// # Errors
/// The kernel's other errors.
pub fn take_error(socket: BorrowedFd<'_>) -> io::Result<Option<QueuedError>> {
    // The kernel returns the start of the datagram that failed; we need none of it.
    let mut payload = [0_u8; 1];
    let mut name = Name([0; NAME_LEN]);
    let mut control = Control([0; CONTROL_LEN]);
    let mut iov = libc::iovec {
        iov_base: payload.as_mut_ptr().cast(),
        iov_len: payload.len(),
    };
    let mut header = empty_header().msg_hdr;
    header.msg_name = name.0.as_mut_ptr().cast();
    header.msg_namelen = NAME_SPACE;
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_LEN as _;
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // SAFETY: every pointer in `header` is to a local that outlives the call, with its true length; the
    // descriptor is open by its type.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock {
            Ok(None)
        } else {
            Err(error)
        };
    }
    #[expect(clippy::unnecessary_cast, reason = "socklen_t on some libcs")]
    let used = (header.msg_controllen as usize).min(CONTROL_LEN);
    let destination = parse_name(&name.0);
    let found = ControlMessages(control.0.get(..used).unwrap_or_default()).find_map(|message| {
        let (level, kind, data) = message;
        let wanted = matches!(
            (level, kind),
            (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
        );
        if wanted {
            parse_extended_error(data, destination)
        } else {
            None
        }
    });
    // A message without the control message we asked for tells nothing, but is not the end of the queue.
    let nothing = QueuedError {
        errno: 0,
        from_network: false,
        info: 0,
        destination,
    };
    Ok(Some(found.unwrap_or(nothing)))
}

/// `struct sock_extended_err`: errno u32, origin u8, type u8, code u8, pad u8, info u32, data u32
/// (include/uapi/linux/errqueue.h).
fn parse_extended_error(data: &[u8], destination: SocketAddr) -> Option<QueuedError> {
    let errno = read_int(data)?;
    let origin = *data.get(4)?;
    let info = u32::from_ne_bytes(*data.get(8..)?.first_chunk()?);
    Some(QueuedError {
        errno,
        from_network: origin != libc::SO_EE_ORIGIN_LOCAL,
        info,
        destination,
    })
}

#[cfg(test)]
mod tests {
    use super::super::socket::{self, IntOption};
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    fn pair() -> (UdpSocket, UdpSocket) {
        let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
        (bind(), bind())
    }

    /// Receives until `bytes` arrived; loopback delivers before the send returns, so this never waits.
    fn receive_all(batch: &mut RecvBatch, socket: &UdpSocket) -> Vec<(Received, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            match batch.receive(socket.as_fd()) {
                Ok(_) => all.extend(batch.entries().map(|(r, bytes)| (r, bytes.to_vec()))),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return all;
                }
            }
        }
    }

    #[test]
    fn a_batch_of_gathered_entries_arrives_whole_and_in_order() {
        let (from, to) = pair();
        let address = SockAddr::from(to.local_addr().unwrap());
        let payloads: Vec<Vec<u8>> = (0..20_u8).map(|i| vec![i; 100 + usize::from(i)]).collect();
        let mut batch = SendBatch::new(20, 40);
        let mut sending = batch.start();
        for payload in &payloads {
            let (head, tail) = payload.split_at(7);
            let entry = Entry {
                to: &address,
                segment_len: None,
                tos: 0,
            };
            assert!(sending.push(entry, [head, tail].into_iter()));
        }
        assert_eq!(sending.send(from.as_fd(), 0).unwrap(), 20);
        let received = receive_all(&mut RecvBatch::new(8), &to);
        let bytes: Vec<_> = received.iter().map(|(_, bytes)| bytes.clone()).collect();
        assert_eq!(bytes, payloads);
        assert!(
            received
                .iter()
                .all(|(r, bytes)| r.source == from.local_addr().unwrap()
                    && r.stride == bytes.len()
                    && !r.truncated)
        );
    }

    #[test]
    fn a_run_is_cut_by_the_kernel_and_comes_back_as_one_buffer_with_its_stride() {
        let (from, to) = pair();
        socket::set(to.as_fd(), IntOption::UDP_GRO, 1).unwrap();
        socket::set(to.as_fd(), IntOption::IP_RECVTOS, 1).unwrap();
        let address = SockAddr::from(to.local_addr().unwrap());
        let payload: Vec<u8> = (0..1000_u16).map(|i| i.to_ne_bytes()[0]).collect();
        let mut batch = SendBatch::new(1, 1);
        let mut sending = batch.start();
        let entry = Entry {
            to: &address,
            segment_len: Some(300),
            tos: 2,
        };
        assert!(sending.push(entry, std::iter::once(payload.as_slice())));
        assert!(!sending.push(entry, std::iter::empty()), "one entry fits");
        assert_eq!(sending.send(from.as_fd(), 0).unwrap(), 1);
        let received = receive_all(&mut RecvBatch::new(8), &to);
        let (first, _) = received.first().unwrap();
        assert_eq!((first.stride, first.tos), (300, 2));
        let joined: Vec<u8> = received.into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert_eq!(joined, payload);
    }

    #[test]
    fn the_error_queue_names_who_refused() {
        let from = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket::set(from.as_fd(), IntOption::IP_RECVERR, 1).unwrap();
        let closed = pair().0.local_addr().unwrap();
        assert_eq!(take_error(from.as_fd()).unwrap(), None);
        from.send_to(b"x", closed).unwrap();
        let error = take_error(from.as_fd()).unwrap().unwrap();
        assert_eq!(error.errno, libc::ECONNREFUSED);
        assert_eq!((error.destination, error.from_network), (closed, true));
        assert_eq!(take_error(from.as_fd()).unwrap(), None);
    }

    #[test]
    fn ipv6_names_and_classes_survive() {
        let to = UdpSocket::bind("[::1]:0").unwrap();
        socket::set(to.as_fd(), IntOption::IPV6_RECVTCLASS, 1).unwrap();
        let from = UdpSocket::bind("[::1]:0").unwrap();
        let address = SockAddr::from(to.local_addr().unwrap());
        let mut batch = SendBatch::new(1, 1);
        let mut sending = batch.start();
        let entry = Entry {
            to: &address,
            segment_len: None,
            tos: 1,
        };
        assert!(sending.push(entry, std::iter::once(b"six".as_slice())));
        sending.send(from.as_fd(), 0).unwrap();
        let received = receive_all(&mut RecvBatch::new(1), &to);
        let (received, bytes) = received.first().unwrap();
        assert_eq!(
            (received.source, received.tos),
            (from.local_addr().unwrap(), 1)
        );
        assert_eq!(bytes, b"six");
    }

    #[test]
    fn hostile_control_bytes_never_panic() {
        for len in 0..64 {
            for fill in [0_u8, 1, 16, 20, 0xff] {
                assert!(ControlMessages(&vec![fill; len]).count() <= len);
            }
        }
    }
}
