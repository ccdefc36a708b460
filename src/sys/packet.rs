//! Owns packet sockets (packet(7)): what passes a link, as the kernel shows it to whoever looks on. Never sends, and
//! never looks into a packet.

#![expect(
    unsafe_code,
    reason = "bind and getsockopt with structures that no library offers safely"
)]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use nix::errno::Errno;
use socket2::{Domain, SockFilter, Socket, Type};

use super::mmsg::{ControlMessages, Filled, Slots};
use super::socket::{IntOption, set};

/// The longest frame that is copied whole: an IP packet with room for headers of links, tunnels and the kernel's own in
/// front of it.
const SLOT_LEN: usize = (1 << 16) + 256;

/// Bytes of `struct tpacket_auxdata` (include/uapi/linux/if_packet.h).
const AUXDATA_LEN: usize = 20;
const _: () = assert!(size_of::<libc::tpacket_auxdata>() == AUXDATA_LEN);

/// Which way a frame goes, as the kernel sorts them (`sll_pkttype` in packet(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It leaves by the link.
    Leaves,
    /// It came by the link, for this node or for all.
    Arrives,
    /// It came by the link, for another's link address.
    Strays,
    /// A copy for this node itself.
    Loops,
}

/// What is known of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// When it passed, in nanoseconds since 1970.
    pub time_ns: u64,
    /// Where it goes.
    pub way: Way,
    /// Bytes it has, from the link's header on.
    pub len: usize,
    /// Where its network header begins, from the link's header on.
    pub network_at: usize,
}

/// An open packet socket on one link. What it receives has a vnet header in front
/// ([`crate::offload::vnet_hdr`]), then the link's header.
#[derive(Debug)]
pub struct PacketSocket {
    socket: Socket,
}

impl PacketSocket {
    /// Opens one on the link of this number, for what `filter` accepts, with a buffer of `buffer` bytes.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without `CAP_NET_RAW`, `EAFNOSUPPORT` where it has no packet sockets, `ENODEV` without
    /// such a link.
    pub fn open(link: u32, filter: &[SockFilter], buffer: i32) -> io::Result<Self> {
        // Of no protocol, so that nothing comes in before the filter is there.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        socket.attach_filter(filter)?;
        for (option, value) in [
            (IntOption::PACKET_AUXDATA, 1),
            (IntOption::PACKET_VNET_HDR, 1),
            (IntOption::SO_TIMESTAMPNS, 1),
            (IntOption::SO_RCVBUFFORCE, buffer),
        ] {
            set(socket.as_fd(), option, value)?;
        }
        #[expect(clippy::cast_possible_truncation, reason = "constants of 16 bits")]
        let addr = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as libc::sa_family_t,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: i32::try_from(link).unwrap_or(i32::MAX),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        #[expect(clippy::cast_possible_truncation, reason = "twenty bytes")]
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the kernel reads `len` bytes from `addr`, a structure of that size that outlives the call; the
        // descriptor is open as long as `socket` is.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const addr).cast(), len) };
        Errno::result(result)?;
        Ok(Self { socket })
    }

    /// How many frames did not fit the buffer since the last time this was asked.
    ///
    /// # Errors
    /// The kernel's.
    pub fn lost(&self) -> io::Result<u64> {
        let mut stats = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        #[expect(clippy::cast_possible_truncation, reason = "eight bytes")]
        let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes to `stats`, a structure of that size, and the length to `len`;
        // both outlive the call and are borrowed by nobody else; the descriptor is open as long as `self` is.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut len,
            )
        };
        Errno::result(result)?;
        Ok(u64::from(stats.tp_drops))
    }
}

/// Arrays for receiving up to a fixed number of frames with one system call.
pub struct FrameBatch {
    slots: Slots<SLOT_LEN, SLOT_LEN>,
}

impl FrameBatch {
    /// Allocates `entries` slots; pages become resident when first filled.
    #[must_use]
    pub fn new(entries: usize) -> Self {
        Self {
            slots: Slots::new(entries),
        }
    }

    /// Receives what is there without waiting, and gives what is known of each frame and its bytes to `each`, in the
    /// order of time as far as the kernel tells it. Returns whether the socket was drained: fewer came than fit.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when nothing is there.
    pub fn receive(
        &mut self,
        socket: &PacketSocket,
        mut each: impl FnMut(Frame, &mut [u8]),
    ) -> io::Result<bool> {
        let all = self.slots.len();
        let count = self.slots.receive(socket.socket.as_fd(), all)?;
        let filled = self.slots.iter_mut().take(count);
        let mut frames: Vec<(Frame, &mut [u8])> = filled
            .map(|filled| {
                let len = (filled.header.msg_len as usize).min(SLOT_LEN);
                let frame = describe(&filled);
                (frame, filled.slot.get_mut(..len).unwrap_or_default())
            })
            .collect();
        // They are queued by several CPUs, each a moment after it read the clock.
        frames.sort_by_key(|(frame, _)| frame.time_ns);
        for (frame, bytes) in frames {
            each(frame, bytes);
        }
        Ok(count < all)
    }
}

/// Reads what the kernel wrote beside the frame.
fn describe(filled: &Filled<'_>) -> Frame {
    // `sll_pkttype` of `struct sockaddr_ll`, behind family, protocol, number and type of the link.
    let way = match filled.name[10] {
        libc::PACKET_OUTGOING => Way::Leaves,
        libc::PACKET_HOST | libc::PACKET_BROADCAST | libc::PACKET_MULTICAST => Way::Arrives,
        libc::PACKET_OTHERHOST => Way::Strays,
        _ => Way::Loops,
    };
    let mut frame = Frame {
        time_ns: 0,
        way,
        len: filled.header.msg_len as usize,
        network_at: 0,
    };
    for (level, kind, data) in ControlMessages(filled.control()) {
        match (level, kind) {
            (libc::SOL_PACKET, libc::PACKET_AUXDATA) => {
                // Status, length, length as kept, and 16 bits each: where the link's and the network's header begin.
                if let Some(aux) = data.first_chunk::<AUXDATA_LEN>() {
                    frame.len = u32::from_ne_bytes([aux[4], aux[5], aux[6], aux[7]]) as usize;
                    frame.network_at = usize::from(u16::from_ne_bytes([aux[14], aux[15]]));
                }
            }
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                frame.time_ns = nanoseconds(data).unwrap_or(0);
            }
            _ => {}
        }
    }
    frame
}

/// A `struct timespec`: two words, of 64 bits but for 32-bit systems.
fn nanoseconds(data: &[u8]) -> Option<u64> {
    let word = |half: &[u8]| match half.len() {
        4 => Some(u64::from(u32::from_ne_bytes(half.try_into().ok()?))),
        _ => Some(u64::from_ne_bytes(half.try_into().ok()?)),
    };
    let (seconds, nanos) = data.split_at(data.len() / 2);
    let time =
        Duration::from_secs(word(seconds)?).checked_add(Duration::from_nanos(word(nanos)?))?;
    u64::try_from(time.as_nanos()).ok()
}
