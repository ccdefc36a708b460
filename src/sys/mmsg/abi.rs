//! Owns the layout of message headers, socket addresses and control messages. Never calls the kernel.

#![expect(
    unsafe_code,
    reason = "message headers with private padding can only be zeroed"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// `struct sockaddr_in6`, the larger of the two.
pub(super) const NAME_LEN: usize = size_of::<libc::sockaddr_in6>();
/// As the kernel counts it.
pub(super) const NAME_SPACE: libc::socklen_t = 28;
const _: () = assert!(NAME_SPACE as usize == NAME_LEN);
/// Room for the control messages we ask for: a GRO stride, a TOS byte; and on the error queue one
/// `sock_extended_err` with its offender's address.
pub(super) const CONTROL_LEN: usize = 128;
/// `CMSG_ALIGN(sizeof(struct cmsghdr))`, include/linux/socket.h.
pub(super) const CMSG_HEADER_LEN: usize = cmsg_align(size_of::<libc::cmsghdr>());

/// `CMSG_ALIGN`: to the size of a `long`.
pub(super) const fn cmsg_align(len: usize) -> usize {
    len.next_multiple_of(size_of::<usize>())
}

#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct Name(pub(super) [u8; NAME_LEN]);

#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct Control(pub(super) [u8; CONTROL_LEN]);

/// An all-zero message header; its fields are pointers and lengths, some libcs add private padding.
pub(super) const fn empty_header() -> libc::mmsghdr {
    // SAFETY: `mmsghdr` is plain old data of integers and raw pointers, for which zero bytes are valid.
    unsafe { std::mem::zeroed() }
}

/// Iterates control messages as (level, type, data).
pub(in crate::sys) struct ControlMessages<'a>(pub(in crate::sys) &'a [u8]);

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

pub(super) fn read_int(bytes: &[u8]) -> Option<libc::c_int> {
    bytes
        .first_chunk()
        .map(|&int| libc::c_int::from_ne_bytes(int))
}

/// A socket address as the kernel wrote it. Unspecified when it is of no known family.
pub(super) fn parse_name(name: &[u8; NAME_LEN]) -> SocketAddr {
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
