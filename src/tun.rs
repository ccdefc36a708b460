//! Owns the TUN device of the batched engine: its queues and what they can do. Never configures addresses or
//! routes, never interprets packets.
//!
//! Each worker has two descriptors on the device: one attached, which it reads, and one detached, which it
//! writes. A write through an attached queue makes the kernel steer that flow's next reads to the same queue
//! (`tun_flow_update`, drivers/net/tun.c), and a flow that changes queues overtakes itself.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use crate::sys::iov::Gathered;
use crate::sys::tun::{
    self, Mode, OFFLOAD_CSUM, OFFLOAD_TSO_ECN, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_USO4,
    OFFLOAD_USO6,
};

/// Length of the virtio-net header in front of each packet.
const VNET_HDR_LEN: libc::c_int = 10;

/// Offload sets, best first; each is tried until the kernel takes one.
const OFFLOAD_STEPS: [u32; 5] = [
    OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_TSO_ECN | OFFLOAD_USO4 | OFFLOAD_USO6,
    OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_TSO_ECN,
    OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6,
    OFFLOAD_CSUM,
    0,
];

/// What the device can do, as probed when it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunCaps {
    /// Packets carry a virtio-net header.
    pub vnet_hdr: bool,
    /// More than one queue.
    pub multi_queue: bool,
    /// Writes go through detached queues, so they never steer.
    pub detached_writes: bool,
    /// Accepted `TUN_F_*` bits.
    pub offloads: u32,
}

impl TunCaps {
    /// A device that can do nothing beyond carrying packets.
    pub const NONE: Self = Self {
        vnet_hdr: false,
        multi_queue: false,
        detached_writes: false,
        offloads: 0,
    };

    /// TCP superpackets over IPv4 in both directions.
    #[must_use]
    pub const fn tso4(self) -> bool {
        self.offloads & OFFLOAD_TSO4 != 0
    }

    /// TCP superpackets over IPv6 in both directions.
    #[must_use]
    pub const fn tso6(self) -> bool {
        self.offloads & OFFLOAD_TSO6 != 0
    }

    /// UDP superpackets over both families in both directions.
    #[must_use]
    pub const fn uso(self) -> bool {
        self.offloads & (OFFLOAD_USO4 | OFFLOAD_USO6) == OFFLOAD_USO4 | OFFLOAD_USO6
    }

    /// Bytes in front of each packet read and written.
    #[must_use]
    pub const fn header_len(self) -> usize {
        if self.vnet_hdr {
            VNET_HDR_LEN as usize
        } else {
            0
        }
    }
}

/// Why the device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The clone device is missing or may not be opened.
    #[error("{path}: {0}", path = tun::CLONE_DEVICE)]
    Clone(io::Error),
    /// `TUNSETIFF` failed.
    #[error("TUNSETIFF: {0}")]
    Attach(io::Error),
    /// Another ioctl failed.
    #[error("{0}: {1}")]
    Setup(&'static str, io::Error),
}

/// The two descriptors of one worker.
pub struct TunQueue {
    read: File,
    /// `None` when the kernel could not detach one: then writes go through `read`.
    write: Option<File>,
}

impl TunQueue {
    /// A queue over open, non-blocking descriptors: packets are read from the first, and written to the
    /// second where there is one.
    #[must_use]
    pub const fn new(read: File, write: Option<File>) -> Self {
        Self { read, write }
    }

    /// Reads one packet with its virtio-net header without waiting.
    ///
    /// # Errors
    /// `WouldBlock` when none is there; `EBADFD` when the device is gone; `EINVAL` when the kernel could not describe
    /// one in a virtio-net header, which is lost then.
    #[inline]
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        (&self.read).read(buf)
    }

    /// Writes one packet with its virtio-net header.
    ///
    /// # Errors
    /// `EINVAL` for a header that the kernel refuses, `EIO` while the device is down, `EBADFD` when it is
    /// gone, `ENOMEM`/`ENOBUFS`.
    #[inline]
    pub fn write(&self, packet: Gathered<'_, '_>) -> io::Result<usize> {
        packet.write(self.write.as_ref().unwrap_or(&self.read).as_fd())
    }

    /// The descriptor to wait on.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.read.as_raw_fd()
    }

    /// The descriptor to wait on, borrowed.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}

/// An open TUN device; it vanishes when the last queue is dropped.
pub struct TunDevice {
    /// The name the kernel gave it.
    pub name: String,
    /// What it can do.
    pub caps: TunCaps,
    /// One per worker.
    pub queues: Vec<TunQueue>,
}

impl TunDevice {
    /// Creates the device from a name template with this many queues, or as many as the kernel gives it. Without
    /// multi-queue support there is one, whatever was asked.
    ///
    /// # Errors
    /// [`TunError`]; the device does not exist afterwards.
    pub fn open(template: &str, queues: usize) -> Result<Self, TunError> {
        let best = Mode {
            vnet_hdr: true,
            multi_queue: true,
        };
        let single = Mode {
            multi_queue: false,
            ..best
        };
        let plain = Mode {
            vnet_hdr: false,
            multi_queue: false,
        };
        let mut opened = Err(TunError::Attach(io::Error::from_raw_os_error(libc::EINVAL)));
        for mode in [best, single, plain] {
            opened = attach(template, mode).map(|(file, name)| (file, name, mode));
            // Only "flags unknown" is worth a step down; anything else fails the same way again.
            match &opened {
                Err(TunError::Attach(error)) if error.raw_os_error() == Some(libc::EINVAL) => {}
                _ => break,
            }
        }
        let (first, name, mode) = opened?;
        let mut offloads = 0;
        if mode.vnet_hdr {
            tun::set_vnet_hdr_len(&first, VNET_HDR_LEN)
                .map_err(|error| TunError::Setup("TUNSETVNETHDRSZ", error))?;
            offloads = OFFLOAD_STEPS
                .into_iter()
                .find(|&step| tun::set_offload(&first, step).is_ok())
                .unwrap_or(0);
        }
        let mut caps = TunCaps {
            vnet_hdr: mode.vnet_hdr,
            multi_queue: mode.multi_queue,
            detached_writes: mode.multi_queue,
            offloads,
        };
        let mut opened: Vec<TunQueue> = Vec::with_capacity(queues);
        let mut read = Some(first);
        while let Some(file) = read {
            let write = if caps.detached_writes {
                writer(&name, mode)?
            } else {
                None
            };
            if caps.detached_writes && write.is_none() {
                if !opened.is_empty() {
                    // The device's last queue: it has none beside it to write through.
                    break;
                }
                caps.detached_writes = false;
            }
            opened.push(TunQueue { read: file, write });
            read = if mode.multi_queue && opened.len() < queues {
                further(&name, mode)?
            } else {
                None
            };
        }
        Ok(Self {
            name,
            caps,
            queues: opened,
        })
    }
}

fn attach(name: &str, mode: Mode) -> Result<(File, String), TunError> {
    tun::attach(name, mode).map_err(|error| match error.raw_os_error() {
        // The clone device itself: no such file, no such device behind it, not permitted by the container.
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::EACCES) => TunError::Clone(error),
        _ => TunError::Attach(error),
    })
}

/// One more queue of an open device; `None` when it has as many as the kernel gives it (`MAX_TAP_QUEUES`,
/// drivers/net/tun.c, which counts detached ones, too).
fn further(name: &str, mode: Mode) -> Result<Option<File>, TunError> {
    match attach(name, mode) {
        Ok((file, _)) => Ok(Some(file)),
        Err(TunError::Attach(error)) if error.raw_os_error() == Some(libc::E2BIG) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A detached queue for writing; `None` when the kernel has none left or cannot detach.
fn writer(name: &str, mode: Mode) -> Result<Option<File>, TunError> {
    let file = further(name, mode)?;
    Ok(file.filter(|file| tun::detach(file).is_ok()))
}
