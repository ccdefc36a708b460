//! Owns the one ethtool request that is needed: whether a device takes packets without their checksum
//! (include/uapi/linux/ethtool.h). Never decides whether it should.

#![expect(unsafe_code, reason = "an ioctl that no library offers")]

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;

/// `ETHTOOL_GTXCSUM` and `ETHTOOL_STXCSUM`: all of a device's transmit checksum offloads at once, of which a VXLAN device
/// has one, `tx-checksum-ip-generic`.
const GET: u32 = 0x16;
const SET: u32 = 0x17;

/// `struct ethtool_value`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Value {
    cmd: u32,
    data: u32,
}

const _: () = assert!(size_of::<Value>() == 8);

// `struct ifreq`, of which the ioctl reads the name and a pointer.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<libc::ifreq>() == 40);

/// Whether `device`, in the network namespace of the calling thread, computes transmit checksums, or claims to.
///
/// # Errors
/// There is no such device, or it does not tell.
pub fn tx_checksum(device: &str) -> io::Result<bool> {
    let value = Value { cmd: GET, data: 0 };
    Ok(request(device, value)?.data != 0)
}

/// Has `device` take packets without their checksum, or no longer.
///
/// # Errors
/// There is no such device, or the caller lacks `CAP_NET_ADMIN`.
pub fn set_tx_checksum(device: &str, on: bool) -> io::Result<()> {
    let data = on.into();
    request(device, Value { cmd: SET, data }).map(drop)
}

fn request(device: &str, mut value: Value) -> io::Result<Value> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // One byte stays zero: the kernel wants the name terminated.
    if device.len() >= ifr_name.len() || device.contains('\0') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in ifr_name.iter_mut().zip(device.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // Any socket will do.
    let socket = UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    let ifru_data = (&raw mut value).cast();
    let mut request = libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data },
    };
    // SAFETY: SIOCETHTOOL reads one `struct ifreq`, which `request` is, and for both commands reads and writes one
    // `struct ethtool_value` where it points, which `value` is; both outlive the call, and nothing else refers to them.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    Errno::result(result)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_are_not_there_or_have_no_name_are_refused() {
        assert!(tx_checksum("no-such-device").is_err());
        assert!(set_tx_checksum("no-such-device", true).is_err());
        let kind = tx_checksum("sixteen-letters-").unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::InvalidInput);
    }
}
