//! Owns the role newtypes for addresses, prefixes, ports and MTUs. Never does I/O.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

/// An address on the underlay, the real network between nodes: never unspecified, loopback-free choice is
/// the caller's; never multicast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct UnderlayAddr(IpAddr);

impl UnderlayAddr {
    /// Takes any unicast address; `None` for an unspecified, multicast or IPv4 broadcast one.
    #[must_use]
    pub fn new(addr: IpAddr) -> Option<Self> {
        let unusable = addr.is_unspecified()
            || addr.is_multicast()
            || matches!(addr, IpAddr::V4(v4) if v4.is_broadcast());
        (!unusable).then_some(Self(addr))
    }

    /// The plain address.
    #[must_use]
    pub const fn ip(self) -> IpAddr {
        self.0
    }
}

impl fmt::Display for UnderlayAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A link or path limit in bytes, counted from the IP header on. At least 68 (RFC 791 section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Mtu(u16);

impl Mtu {
    /// The smallest MTU of IPv4, RFC 791.
    pub const MIN: Self = Self(68);
    /// The smallest MTU of IPv6, RFC 8200 section 5.
    pub const MIN_V6: Self = Self(1280);

    /// Takes 68 to 65535; `None` outside.
    #[must_use]
    pub fn new(bytes: u32) -> Option<Self> {
        u16::try_from(bytes)
            .ok()
            .filter(|&b| b >= Self::MIN.0)
            .map(Self)
    }

    /// The number of bytes.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// What is left for the inner packet after `overhead` bytes of outer headers; `None` below [`Mtu::MIN`].
    #[must_use]
    pub fn less(self, overhead: u16) -> Option<Self> {
        self.0
            .checked_sub(overhead)
            .and_then(|b| Self::new(u32::from(b)))
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of a VXLAN network, 24 bits (RFC 7348 section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vni(u32);

impl Vni {
    /// Takes 0 to 16 777 215; `None` beyond.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        if number >> 24 == 0 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes of outer headers in front of the inner packet for raw IP-in-UDP: IP header plus 8 bytes of UDP.
#[must_use]
pub const fn udp_overhead(underlay: IpAddr) -> u16 {
    match underlay {
        IpAddr::V4(_) => 28,
        IpAddr::V6(_) => 48,
    }
}

/// A prefix of the overlay in either address family, with its addresses as the low bits of a `u128`, so that
/// validation, allocation and admission are written once for both families.
pub trait OverlayPrefix: Copy + Ord + std::hash::Hash + fmt::Debug + fmt::Display {
    /// Width of an address: 32 or 128.
    const BITS: u8;

    /// The prefix of `len` bits that holds the address `bits`, host bits masked off; `None` when `len` or
    /// `bits` is too large for the family.
    fn from_bits(bits: u128, len: u8) -> Option<Self>;

    /// The lowest address.
    fn first_bits(&self) -> u128;

    /// The number of network bits.
    fn len_bits(&self) -> u8;

    /// The highest address.
    fn last_bits(&self) -> u128 {
        let host_bits = u32::from(Self::BITS - self.len_bits());
        let host_mask = 1u128
            .checked_shl(host_bits)
            .map_or(u128::MAX, |size| size - 1);
        self.first_bits() | host_mask
    }

    /// Whether every address of `inner` is also in `self`.
    fn holds(&self, inner: &Self) -> bool {
        self.first_bits() <= inner.first_bits() && inner.last_bits() <= self.last_bits()
    }
}

impl OverlayPrefix for ipnet::Ipv4Net {
    const BITS: u8 = 32;

    fn from_bits(bits: u128, len: u8) -> Option<Self> {
        let bits = u32::try_from(bits).ok()?;
        Self::new(bits.into(), len).ok().map(|net| net.trunc())
    }

    fn first_bits(&self) -> u128 {
        u128::from(u32::from(self.network()))
    }

    fn len_bits(&self) -> u8 {
        self.prefix_len()
    }
}

impl OverlayPrefix for ipnet::Ipv6Net {
    const BITS: u8 = 128;

    fn from_bits(bits: u128, len: u8) -> Option<Self> {
        Self::new(bits.into(), len).ok().map(|net| net.trunc())
    }

    fn first_bits(&self) -> u128 {
        u128::from(self.network())
    }

    fn len_bits(&self) -> u8 {
        self.prefix_len()
    }
}

/// An Ethernet address of one station: never zero, never a group address (IEEE 802 section 8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac([u8; 6]);

impl Mac {
    /// Takes six bytes; `None` for zero and for group addresses.
    #[must_use]
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        (bytes != [0; 6] && bytes[0] & 1 == 0).then_some(Self(bytes))
    }

    /// A locally administered address made from the lower 46 bits.
    #[must_use]
    pub const fn local(bits: u64) -> Self {
        let [_, _, a, b, c, d, e, f] = bits.to_be_bytes();
        Self([(a & 0xfc) | 0x02, b, c, d, e, f])
    }

    /// The bytes, in the order in which they are sent.
    #[must_use]
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// By what it is told which node sent a packet through a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The source of the frame that was around it: the node's tunnel device.
    Frame(Mac),
    /// The source of the datagram that was around it: the node's address on the underlay.
    Datagram(IpAddr),
}

/// The text is not six pairs of hexadecimal digits, or not the address of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected the MAC address of one station, like 02:00:5e:10:00:01")]
pub struct MacError;

impl std::str::FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            let digits = part.filter(|part| part.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = digits
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or(MacError)?;
        }
        match parts.next() {
            Some(_) => Err(MacError),
            None => Self::new(bytes).ok_or(MacError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_of_one_station_are_read_and_others_refused() {
        let mac: Mac = "C6:d2:32:6f:8f:44".parse().unwrap();
        assert_eq!(mac.to_string(), "c6:d2:32:6f:8f:44");
        assert_eq!(mac.bytes(), [0xc6, 0xd2, 0x32, 0x6f, 0x8f, 0x44]);
        for text in [
            "",
            "c6:d2:32:6f:8f",
            "c6:d2:32:6f:8f:44:00",
            "c6:d2:32:6f:8f:4",
            "c6:d2:32:6f:8f:+4",
            "c6-d2-32-6f-8f-44",
            "00:00:00:00:00:00",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(MacError), "{text}");
        }
        for bits in [0, 1, u64::MAX, 0x0100_0000_0000] {
            let [first, ..] = Mac::local(bits).bytes();
            assert_eq!(first & 0b11, 0b10, "{bits:x}");
        }
    }
}
