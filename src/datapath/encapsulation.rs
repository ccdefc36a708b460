//! Owns what stands between the outer UDP header and an inner packet: its length, writing it, checking it, and what
//! may have to be made up for in a packet behind it. Knows nothing of peers, and never does I/O. Everything else about a packet is the same for all encapsulations.

use std::net::IpAddr;

use super::drop::DropReason;
use crate::addr::{Mac, Mtu, Vni, udp_overhead};
use crate::offload::split::{Split, finish_checksum};
use crate::offload::unfinished;
use crate::offload::vnet_hdr::VnetHdr;
use crate::wire::checksum::SumFn;
use crate::wire::ip::{self, Version};
use crate::wire::vxlan::{self, Vxlan};

/// The most that [`Encapsulation::write_header`] writes.
pub const MAX_HEADER_LEN: usize = vxlan::HEADER_LEN;

/// How inner packets stand in datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encapsulation {
    /// Bare, as flannel's `udp` backend sends them.
    Plain,
    /// In Ethernet frames behind VXLAN headers (RFC 7348), as flannel's `vxlan` backend configures the kernel:
    /// one MAC address per node and no broadcast, so that neither ARP nor neighbour discovery is ever needed.
    Vxlan {
        /// The network; frames of others are dropped.
        vni: Vni,
        /// This node's address; frames for others are dropped.
        mac: Mac,
    },
}

/// A datagram that was opened.
#[derive(Debug)]
pub struct Inner<'b> {
    /// The packet, and padding where [`IpMeta::total_len`] is less.
    ///
    /// [`IpMeta::total_len`]: crate::wire::ip::IpMeta::total_len
    pub packet: &'b mut [u8],
    /// The MAC address of whoever sent it, where the encapsulation tells.
    pub sender: Option<Mac>,
    /// Its IP version, where the encapsulation tells.
    version: Option<Version>,
}

impl Inner<'_> {
    /// Whether a packet of this version may stand here.
    #[inline]
    #[must_use]
    pub fn may_be(&self, version: Version) -> bool {
        self.version.is_none_or(|claimed| claimed == version)
    }
}

impl Encapsulation {
    /// Bytes between the outer UDP header and the inner packet.
    #[inline]
    #[must_use]
    pub const fn header_len(self) -> usize {
        match self {
            Self::Plain => 0,
            Self::Vxlan { .. } => vxlan::HEADER_LEN,
        }
    }

    /// Bytes in front of the inner packet from the outer IP header on: 28 or 50 over IPv4, 48 or 70 over IPv6.
    #[must_use]
    pub const fn overhead(self, underlay: IpAddr) -> u16 {
        const VXLAN: u16 = 22;
        const _: () = assert!(VXLAN as usize == vxlan::HEADER_LEN);
        udp_overhead(underlay)
            + match self {
                Self::Plain => 0,
                Self::Vxlan { .. } => VXLAN,
            }
    }

    /// Whether a peer can be sent to only if its MAC address is known.
    #[inline]
    #[must_use]
    pub const fn needs_mac(self) -> bool {
        matches!(self, Self::Vxlan { .. })
    }

    /// Writes what precedes `packet` on its way to the node with the address `to`; returns how much that is.
    #[inline]
    pub fn write_header(self, to: Option<Mac>, packet: &[u8], out: &mut [u8]) -> usize {
        let Self::Vxlan { vni, mac } = self else {
            return 0;
        };
        if let (Some(to), Ok(version)) = (to, ip::version(packet)) {
            Vxlan::new_unchecked(out).write(vni, to, mac, version);
        }
        vxlan::HEADER_LEN
    }

    /// Finds the inner packet of a datagram. What the packet is, is not looked at: its header is worth parsing once,
    /// where it is used.
    ///
    /// # Errors
    /// The reason to drop it: it is not of this encapsulation, not of our network, not IP or not for us.
    #[inline]
    pub fn open(self, datagram: &mut [u8]) -> Result<Inner<'_>, DropReason> {
        let (header, packet) = datagram
            .split_at_mut_checked(self.header_len())
            .ok_or(DropReason::TooShort)?;
        let (version, sender) = match self {
            Self::Plain => (None, None),
            Self::Vxlan { vni, mac } => {
                let frame = Vxlan::new(header).or(Err(DropReason::TooShort))?;
                let (version, sender) = open_frame(&frame, vni, mac)?;
                (Some(version), Some(sender))
            }
        };
        Ok(Inner {
            packet,
            sender,
            version,
        })
    }

    /// Completes the checksum of a packet that a kernel on this machine left unfinished ([`unfinished`]). Of a
    /// superpacket nothing is touched. Our own nodes always finish what they send.
    #[inline]
    pub fn finish(self, packet: &mut [u8], mtu: Mtu, sum: SumFn) {
        let max_len = usize::from(mtu.get());
        if matches!(self, Self::Vxlan { .. })
            && packet.len() <= max_len
            && let Some(vnet) = unfinished::describe(packet, max_len, None)
        {
            // The field is where it was just read.
            let finished = finish_checksum(&vnet, packet, sum);
            debug_assert!(finished.is_ok(), "{finished:?}");
        }
    }

    /// The longest packet that is surely a single one: with an overlay's MTU of `mtu`, what is longer may be a
    /// superpacket of a kernel on this machine.
    #[inline]
    #[must_use]
    pub const fn max_single_len(self, mtu: Mtu) -> u16 {
        match self {
            Self::Plain => u16::MAX,
            Self::Vxlan { .. } => mtu.get(),
        }
    }

    /// How to cut a packet that came whole though the overlay's MTU is less: a superpacket of a kernel on this
    /// machine. `segment_len` is what the socket told about it, if anything.
    #[inline]
    #[must_use]
    pub fn superpacket(
        self,
        packet: &[u8],
        mtu: Mtu,
        segment_len: Option<u16>,
    ) -> Option<(VnetHdr, Split)> {
        let max_len = usize::from(self.max_single_len(mtu));
        if packet.len() <= max_len {
            return None;
        }
        let vnet = unfinished::describe(packet, max_len, segment_len)?;
        let split = Split::new(&vnet, packet).ok()?;
        Some((vnet, split))
    }

    /// Whether a receive buffer that the kernel says holds datagrams of `stride` bytes each is in truth one: a
    /// UDP superpacket behind one header, of which `stride` is the inner segments' length.
    #[must_use]
    pub fn is_one(self, received: &[u8], stride: usize) -> bool {
        matches!(self, Self::Vxlan { .. })
            && stride < received.len()
            && received
                .get(vxlan::HEADER_LEN..)
                .and_then(|packet| Some((packet.len(), ip::parse(packet).ok()?)))
                .is_some_and(|(len, meta)| meta.total_len() == len)
    }
}

/// The family of a frame's packet and who sent it, if it is of network `vni` and for `mac`.
#[inline]
fn open_frame(frame: &Vxlan<&mut [u8]>, vni: Vni, mac: Mac) -> Result<(Version, Mac), DropReason> {
    match frame.vni() {
        None => return Err(DropReason::NotVxlan),
        Some(theirs) if theirs != vni => return Err(DropReason::WrongVni),
        Some(_) => {}
    }
    // Before the address: whoever asks for a neighbour's address asks everybody.
    let version = frame.version().ok_or(DropReason::NotIp)?;
    if frame.destination() != Some(mac) {
        return Err(DropReason::WrongMac);
    }
    let sender = frame.source().ok_or(DropReason::SpoofedMac)?;
    Ok((version, sender))
}
