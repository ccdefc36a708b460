//! Owns the 10-byte vnet header that precedes every read from and write to the TUN device. Never looks at
//! the packet behind it, and never trusts `hdr_len`.
//!
//! Source: `struct virtio_net_hdr`, `include/uapi/linux/virtio_net.h`; the TUN device speaks the legacy form
//! in native endian unless told otherwise (`TUNSETVNETLE`, `TUNSETVNETBE`).

use thiserror::Error;

/// Bytes of the header: the kernel's default `TUNGETVNETHDRSZ`, without the `num_buffers` of virtio 1.0.
pub const VNET_HDR_LEN: usize = 10;

const FLAG_NEEDS_CSUM: u8 = 1;
const FLAG_DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// How a superpacket is to be segmented.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gso {
    /// Not a superpacket.
    #[default]
    None,
    /// TCP over IPv4.
    TcpV4 {
        /// The header carries CWR, which belongs to the first segment only.
        ecn: bool,
    },
    /// TCP over IPv6.
    TcpV6 {
        /// The header carries CWR, which belongs to the first segment only.
        ecn: bool,
    },
    /// UDP over either family, one datagram per `gso_size` bytes (USO).
    UdpL4,
}

/// The decoded vnet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHdr {
    /// The checksum at `csum_start + csum_offset` holds only the folded pseudo-header sum.
    pub needs_csum: bool,
    /// The kernel has verified the checksum, or vouches for it.
    pub data_valid: bool,
    /// How to segment; [`Gso::None`] for a plain packet.
    pub gso: Gso,
    /// Bytes of all headers. A hint: on the forward path the kernel writes the length of the whole linear
    /// part of its buffer, so readers recompute it.
    pub hdr_len: u16,
    /// Payload bytes per segment, all but the last.
    pub gso_size: u16,
    /// Byte offset where the transport checksum's coverage begins.
    pub csum_start: u16,
    /// Byte offset of the checksum field from `csum_start`.
    pub csum_offset: u16,
}

/// Why bytes are not a vnet header this program can act on.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum VnetHdrError {
    /// Fewer than [`VNET_HDR_LEN`] bytes.
    #[error("vnet header is {len} bytes, {VNET_HDR_LEN} are needed: is IFF_VNET_HDR set?")]
    Truncated {
        /// Bytes given.
        len: usize,
    },
    /// A flag that changes what the other fields mean.
    #[error("vnet header flags {flags:#04x} hold bits that were not negotiated")]
    UnknownFlags {
        /// The byte as read.
        flags: u8,
    },
    /// A segmentation type that was not offered with `TUNSETOFFLOAD`.
    #[error("vnet header gso_type {gso_type:#04x} was not negotiated")]
    UnknownGso {
        /// The byte as read.
        gso_type: u8,
    },
    /// The ECN bit without TCP.
    #[error("vnet header gso_type {gso_type:#04x} has the ECN bit, which only TCP may have")]
    EcnWithoutTcp {
        /// The byte as read.
        gso_type: u8,
    },
    /// A superpacket with `gso_size` zero cannot be segmented.
    #[error("vnet header announces a superpacket with gso_size 0")]
    GsoWithoutSize,
}

impl VnetHdr {
    /// Decodes the first [`VNET_HDR_LEN`] bytes; anything after them is the packet and is not looked at.
    ///
    /// # Errors
    /// [`VnetHdrError`] names the field that cannot be acted on.
    pub const fn parse(bytes: &[u8]) -> Result<Self, VnetHdrError> {
        let Some(bytes) = bytes.first_chunk::<VNET_HDR_LEN>() else {
            return Err(VnetHdrError::Truncated { len: bytes.len() });
        };
        let &[flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1] = bytes;
        if flags & !(FLAG_NEEDS_CSUM | FLAG_DATA_VALID) != 0 {
            return Err(VnetHdrError::UnknownFlags { flags });
        }
        let ecn = gso_type & GSO_ECN != 0;
        let gso = match gso_type & !GSO_ECN {
            GSO_NONE => Gso::None,
            GSO_TCPV4 => Gso::TcpV4 { ecn },
            GSO_TCPV6 => Gso::TcpV6 { ecn },
            GSO_UDP_L4 => Gso::UdpL4,
            _ => return Err(VnetHdrError::UnknownGso { gso_type }),
        };
        if ecn && matches!(gso, Gso::None | Gso::UdpL4) {
            return Err(VnetHdrError::EcnWithoutTcp { gso_type });
        }
        let gso_size = u16::from_ne_bytes([g0, g1]);
        if gso_size == 0 && !matches!(gso, Gso::None) {
            return Err(VnetHdrError::GsoWithoutSize);
        }
        Ok(Self {
            needs_csum: flags & FLAG_NEEDS_CSUM != 0,
            data_valid: flags & FLAG_DATA_VALID != 0,
            gso,
            hdr_len: u16::from_ne_bytes([h0, h1]),
            gso_size,
            csum_start: u16::from_ne_bytes([s0, s1]),
            csum_offset: u16::from_ne_bytes([o0, o1]),
        })
    }

    /// The bytes to put in front of a packet.
    #[must_use]
    pub const fn encode(&self) -> [u8; VNET_HDR_LEN] {
        let needs_csum = if self.needs_csum { FLAG_NEEDS_CSUM } else { 0 };
        let data_valid = if self.data_valid { FLAG_DATA_VALID } else { 0 };
        let gso_type = match self.gso {
            Gso::None => GSO_NONE,
            Gso::TcpV4 { ecn: false } => GSO_TCPV4,
            Gso::TcpV4 { ecn: true } => GSO_TCPV4 | GSO_ECN,
            Gso::TcpV6 { ecn: false } => GSO_TCPV6,
            Gso::TcpV6 { ecn: true } => GSO_TCPV6 | GSO_ECN,
            Gso::UdpL4 => GSO_UDP_L4,
        };
        let [h0, h1] = self.hdr_len.to_ne_bytes();
        let [g0, g1] = self.gso_size.to_ne_bytes();
        let [s0, s1] = self.csum_start.to_ne_bytes();
        let [o0, o1] = self.csum_offset.to_ne_bytes();
        [
            needs_csum | data_valid,
            gso_type,
            h0,
            h1,
            g0,
            g1,
            s0,
            s1,
            o0,
            o1,
        ]
    }

    /// Whether more than one packet may be behind this header.
    #[must_use]
    pub const fn is_superpacket(&self) -> bool {
        !matches!(self.gso, Gso::None)
    }
}
