//! Owns what a tap says about one packet or superpacket, and its bytes between worker and reader. Never copies
//! a packet by itself.
//!
//! A record is [`HEADER_LEN`] bytes, little-endian, and behind them the packet's bytes as far as they were
//! copied:
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | length of the record, header included |
//! | 4..8 | length of the inner packet, without headers in front of it |
//! | 8..16 | nanoseconds since 1970 |
//! | 16 | direction: 0 encap, 1 decap |
//! | 17 | verdict: 0 sent, 1 fragmented, 2 delivered, 3 answered, 4 dropped, 5 handed, 6 arrived |
//! | 18 | the drop reason's number, for answered and dropped |
//! | 19 | outer TOS byte |
//! | 20..24 | inner packets it stands for |
//! | 24..26 | our outer port, 0 where there is none |
//! | 26..28 | the other end's outer port |
//! | 28 | the other end's family: 0 none, 4, 6 |
//! | 29 | worker |
//! | 30 | transport: 0 UDP, 1 VXLAN, 2 the kernel's VXLAN, 3 its IPIP, 4 a route |
//! | 31 | bytes of outer headers in front of the inner packet |
//! | 32..48 | the other end's address |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::super::DropReason;

/// Bytes in front of a record's packet.
pub const HEADER_LEN: usize = 48;

/// Where a packet was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// TUN to underlay.
    Encap,
    /// Underlay to TUN.
    Decap,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Handed to the kernel for the underlay.
    Sent,
    /// The same, in fragments of the inner packet.
    Fragmented,
    /// Written to the TUN.
    Delivered,
    /// Its sender got an ICMP error, for this reason.
    Answered(DropReason),
    /// It ended here.
    Dropped(DropReason),
    /// Given to the kernel, which carries it further; what it does with it is not seen.
    Handed,
    /// It came from the kernel, on its way to a pod of this node; whether it gets there is not seen.
    Arrived,
}

/// How a packet crosses the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// As raw IP in UDP, by our own data plane.
    Udp,
    /// In VXLAN, by our own data plane.
    Vxlan,
    /// In VXLAN, by the kernel.
    KernelVxlan,
    /// In IPIP, by the kernel.
    Ipip,
    /// As it is, by the kernel's routes.
    Route,
}

impl Transport {
    /// Its name, as in `loden status`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Vxlan | Self::KernelVxlan => "vxlan",
            Self::Ipip => "ipip",
            Self::Route => "route",
        }
    }

    /// Whether the kernel carries the packets, so that a packet socket and no worker has seen them.
    #[must_use]
    pub const fn is_kernels(self) -> bool {
        match self {
            Self::Udp | Self::Vxlan => false,
            Self::KernelVxlan | Self::Ipip | Self::Route => true,
        }
    }
}

/// What is known of one packet, or of one superpacket, beside its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds since 1970, when it was read and before anything became of it.
    pub time_ns: u64,
    /// Where it was seen.
    pub direction: Direction,
    /// What became of it.
    pub verdict: Verdict,
    /// The outer address of the other end: whom it went to, or who sent it. None where it never had one.
    pub outer: Option<SocketAddr>,
    /// Our own outer port; 0 where it never had one.
    pub local_port: u16,
    /// The outer TOS byte.
    pub tos: u8,
    /// The worker that saw it, or the packet socket, of those that the capture has.
    pub worker: u8,
    /// How it crosses the underlay.
    pub transport: Transport,
    /// Bytes of outer headers that were copied in front of it.
    pub inner_at: u8,
    /// Inner packets it stands for: more than one for a superpacket.
    pub packets: u32,
    /// Length of the inner packet in bytes, of which fewer may have been copied.
    pub len: u32,
}

/// Bytes that are no record. Reading on makes no sense then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Too few bytes for what they claim.
    #[error("a record ends early")]
    Short,
    /// A field has a value that means nothing.
    #[error("a record's {0} is unknown: daemon and client differ in version")]
    Unknown(&'static str),
}

impl Record {
    /// The record's header, for `copied` bytes of the packet behind it.
    #[must_use]
    pub fn encode(&self, copied: usize) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let total = u32::try_from(HEADER_LEN + copied).unwrap_or(u32::MAX);
        let (verdict, reason) = match self.verdict {
            Verdict::Sent => (0, 0),
            Verdict::Fragmented => (1, 0),
            Verdict::Delivered => (2, 0),
            Verdict::Answered(reason) => (3, reason as u8),
            Verdict::Dropped(reason) => (4, reason as u8),
            Verdict::Handed => (5, 0),
            Verdict::Arrived => (6, 0),
        };
        let (family, port, addr) = match self.outer {
            None => (0, 0, [0; 16]),
            Some(SocketAddr::V4(outer)) => {
                let mut addr = [0; 16];
                addr[..4].copy_from_slice(&outer.ip().octets());
                (4, outer.port(), addr)
            }
            Some(SocketAddr::V6(outer)) => (6, outer.port(), outer.ip().octets()),
        };
        bytes[0..4].copy_from_slice(&total.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.len.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.time_ns.to_le_bytes());
        bytes[16] = u8::from(self.direction == Direction::Decap);
        bytes[17] = verdict;
        bytes[18] = reason;
        bytes[19] = self.tos;
        bytes[20..24].copy_from_slice(&self.packets.to_le_bytes());
        bytes[24..26].copy_from_slice(&self.local_port.to_le_bytes());
        bytes[26..28].copy_from_slice(&port.to_le_bytes());
        bytes[28] = family;
        bytes[29] = self.worker;
        bytes[30] = match self.transport {
            Transport::Udp => 0,
            Transport::Vxlan => 1,
            Transport::KernelVxlan => 2,
            Transport::Ipip => 3,
            Transport::Route => 4,
        };
        bytes[31] = self.inner_at;
        bytes[32..48].copy_from_slice(&addr);
        bytes
    }

    /// The first record of `bytes`: itself, what was copied of its packet, and the bytes behind it.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8], &[u8]), RecordError> {
        let (header, _) = bytes
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(RecordError::Short)?;
        let total = total_len(header);
        let (record, rest) = bytes.split_at_checked(total).ok_or(RecordError::Short)?;
        let copied = record.get(HEADER_LEN..).ok_or(RecordError::Short)?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let reason = || {
            let reason = DropReason::ALL.get(usize::from(header[18]));
            reason.copied().ok_or(RecordError::Unknown("drop reason"))
        };
        let verdict = match header[17] {
            0 => Verdict::Sent,
            1 => Verdict::Fragmented,
            2 => Verdict::Delivered,
            3 => Verdict::Answered(reason()?),
            4 => Verdict::Dropped(reason()?),
            5 => Verdict::Handed,
            6 => Verdict::Arrived,
            _ => return Err(RecordError::Unknown("verdict")),
        };
        let addr: [u8; 16] = std::array::from_fn(|i| header[32 + i]);
        let outer = match header[28] {
            0 => None,
            4 => Some(IpAddr::V4(Ipv4Addr::new(
                addr[0], addr[1], addr[2], addr[3],
            ))),
            6 => Some(IpAddr::V6(Ipv6Addr::from(addr))),
            _ => return Err(RecordError::Unknown("address family")),
        };
        let record = Self {
            time_ns: u64::from_le_bytes(std::array::from_fn(|i| header[8 + i])),
            direction: match header[16] {
                0 => Direction::Encap,
                1 => Direction::Decap,
                _ => return Err(RecordError::Unknown("direction")),
            },
            verdict,
            outer: outer.map(|ip| SocketAddr::new(ip, half(26))),
            local_port: half(24),
            tos: header[19],
            worker: header[29],
            transport: match header[30] {
                0 => Transport::Udp,
                1 => Transport::Vxlan,
                2 => Transport::KernelVxlan,
                3 => Transport::Ipip,
                4 => Transport::Route,
                _ => return Err(RecordError::Unknown("transport")),
            },
            inner_at: header[31],
            packets: word(20),
            len: word(4),
        };
        Ok((record, copied, rest))
    }
}

/// The length of the record that this header begins.
#[must_use]
pub(super) const fn total_len(header: &[u8; HEADER_LEN]) -> usize {
    u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_survives_the_way_to_the_reader() {
        let v4 = "192.0.2.7:8285".parse().unwrap();
        let v6 = "[2001:db8::7]:1".parse().unwrap();
        let transports = [
            Transport::Udp,
            Transport::Vxlan,
            Transport::KernelVxlan,
            Transport::Ipip,
            Transport::Route,
        ];
        let plain = [
            Verdict::Sent,
            Verdict::Fragmented,
            Verdict::Delivered,
            Verdict::Handed,
            Verdict::Arrived,
        ];
        let verdicts = plain
            .into_iter()
            .chain(DropReason::ALL.iter().map(|&r| Verdict::Answered(r)))
            .chain(DropReason::ALL.iter().map(|&r| Verdict::Dropped(r)));
        for (n, verdict) in (1_u8..).zip(verdicts) {
            for outer in [None, Some(v4), Some(v6)] {
                for direction in [Direction::Encap, Direction::Decap] {
                    let record = Record {
                        time_ns: 1_700_000_000_000_000_000 + u64::from(n),
                        direction,
                        verdict,
                        outer,
                        local_port: 40_000 + u16::from(n),
                        tos: n,
                        worker: n,
                        transport: transports[usize::from(n) % 5],
                        inner_at: n,
                        packets: 1 << (n % 16),
                        len: 70_000,
                    };
                    let mut bytes = record.encode(3).to_vec();
                    bytes.extend(b"abcnext");
                    let decoded = Record::decode(&bytes).unwrap();
                    assert_eq!(decoded, (record, &b"abc"[..], &b"next"[..]));
                }
            }
        }
    }

    #[test]
    fn bytes_that_are_no_record_are_refused() {
        let record = Record {
            time_ns: 0,
            direction: Direction::Encap,
            verdict: Verdict::Dropped(DropReason::NoRoute),
            outer: None,
            local_port: 0,
            tos: 0,
            worker: 0,
            transport: Transport::Udp,
            inner_at: 0,
            packets: 1,
            len: 1,
        };
        let good = record.encode(0);
        assert_eq!(Record::decode(&good[..47]), Err(RecordError::Short));
        assert_eq!(
            Record::decode(&record.encode(1)),
            Err(RecordError::Short),
            "the packet is missing"
        );
        for (at, field) in [
            (16, "direction"),
            (17, "verdict"),
            (18, "drop reason"),
            (28, "address family"),
            (30, "transport"),
        ] {
            let mut bad = good;
            bad[at] = 0xff;
            assert_eq!(Record::decode(&bad), Err(RecordError::Unknown(field)));
        }
        let mut tiny = good;
        tiny[0] = 47;
        assert_eq!(Record::decode(&tiny), Err(RecordError::Short));
    }
}
