//! Owns taking errors off a socket's error queue. Never acts on them.

#![expect(unsafe_code, reason = "recvmsg with MSG_ERRQUEUE")]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::abi::{
    CONTROL_LEN, Control, ControlMessages, NAME_LEN, NAME_SPACE, Name, empty_header, parse_name,
    read_int,
};

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
