//! Owns the ioctls of `/dev/net/tun` (drivers/net/tun.c). Never configures addresses or routes.

#![expect(
    unsafe_code,
    reason = "ioctls that no library offers with offloads and detached queues"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;

/// The clone device every queue is opened from.
pub const CLONE_DEVICE: &str = "/dev/net/tun";

// `struct ifreq` is what every TUN ioctl copies in and out; 40 bytes on 64-bit Linux.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<libc::ifreq>() == 40);

/// Checksum offload: packets may be read and written with a partial checksum.
pub const OFFLOAD_CSUM: u32 = libc::TUN_F_CSUM;
/// TCP superpackets over IPv4.
pub const OFFLOAD_TSO4: u32 = libc::TUN_F_TSO4;
/// TCP superpackets over IPv6.
pub const OFFLOAD_TSO6: u32 = libc::TUN_F_TSO6;
/// TCP superpackets that carry ECN.
pub const OFFLOAD_TSO_ECN: u32 = libc::TUN_F_TSO_ECN;
/// UDP superpackets over IPv4 (Linux 6.2).
pub const OFFLOAD_USO4: u32 = libc::TUN_F_USO4;
/// UDP superpackets over IPv6 (Linux 6.2).
pub const OFFLOAD_USO6: u32 = libc::TUN_F_USO6;

/// How a queue is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Every read and write carries a virtio-net header (`IFF_VNET_HDR`).
    pub vnet_hdr: bool,
    /// More queues may follow (`IFF_MULTI_QUEUE`).
    pub multi_queue: bool,
}

/// Opens the clone device and attaches it to device `name`, creating the device if it does not exist. A name
/// with `%d` lets the kernel pick the number. Returns the queue, non-blocking, and the device's name.
///
/// # Errors
/// The kernel's: no clone device, no `CAP_NET_ADMIN`, flags unknown (`EINVAL`), device busy.
pub fn attach(name: &str, mode: Mode) -> io::Result<(File, String)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(CLONE_DEVICE)?;
    let mut flags = libc::IFF_TUN | libc::IFF_NO_PI;
    if mode.vnet_hdr {
        flags |= libc::IFF_VNET_HDR;
    }
    if mode.multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = ifreq(name, flags)?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is and outlives the call.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let name = request
        .ifr_name
        .iter()
        .map(|&c| c.to_ne_bytes()[0])
        .take_while(|&c| c != 0)
        .map(char::from)
        .collect();
    Ok((file, name))
}

/// Tells the kernel which offloads this side understands; they are a property of the device.
///
/// # Errors
/// `EINVAL` when the kernel lacks one of them.
pub fn set_offload(queue: &File, offloads: u32) -> io::Result<()> {
    let argument = libc::c_ulong::from(offloads);
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    Errno::result(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, argument) })?;
    Ok(())
}

/// Sets the length of the header in front of each packet, in bytes.
///
/// # Errors
/// `EINVAL` for a length shorter than the kernel's header.
pub fn set_vnet_hdr_len(queue: &File, len: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one `int`, which `len` is and outlives the call.
    Errno::result(unsafe {
        libc::ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len)
    })?;
    Ok(())
}

/// Detaches a queue: the kernel delivers nothing to it any more and does not steer by what is written to it,
/// but writes still enter the device (`tun_get_user` skips the flow table when `detached` is set).
///
/// # Errors
/// `EINVAL` when the queue is not attached to a multi-queue device.
pub fn detach(queue: &File) -> io::Result<()> {
    let mut request = ifreq("", libc::IFF_DETACH_QUEUE)?;
    // SAFETY: TUNSETQUEUE reads and writes one `struct ifreq`, which `request` is and outlives the call.
    Errno::result(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) })?;
    Ok(())
}

/// A request with a name and flags.
fn ifreq(name: &str, flags: libc::c_int) -> io::Result<libc::ifreq> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // One byte stays zero: the kernel wants the name terminated.
    if name.len() >= ifr_name.len() || name.contains('\0') {
        return Err(invalid());
    }
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let ifru_flags = libc::c_short::try_from(flags & 0x7fff).map_err(|_wide| invalid())?;
    // IFF_NO_CARRIER and friends never pass here; IFF_VNET_HDR (0x4000) is the highest flag used.
    debug_assert_eq!(flags & !0x7fff, 0);
    Ok(libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_do_not_fit_are_refused_before_the_kernel_sees_them() {
        for name in ["sixteen-letters-", "nul\0inside"] {
            assert_eq!(
                ifreq(name, 0).err().unwrap().kind(),
                io::ErrorKind::InvalidInput
            );
        }
        assert!(ifreq("fifteen-letters", 0).is_ok());
    }
}
