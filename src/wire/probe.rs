//! Owns the format of a probe: the UDP payload by which nodes that run this program learn how they reach each
//! other. Never reads a clock or sends anything.
//!
//! All numbers are big-endian. Every datagram begins with the same [`HEADER_LEN`] bytes; a [`Kind::Report`] and
//! [`Kind::Sights`] have a body behind them ([`Report`], [`Sights`]), and everything behind that is padding of any value.
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | `loPr` |
//! | 4 | version, 1 |
//! | 5 | [`Kind`] |
//! | 6..8 | [`Flags`]; unknown ones are ignored |
//! | 8..12 | sequence number of the request |
//! | 12..16 | sequence number of the last request of the receiver's that the sender heard |
//! | 16..20 | how long ago it last heard anything of it, in milliseconds; all ones: never |
//! | 20..22 | bytes of the request's IP packet, as it arrived |
//! | 22 | TTL or hop limit of the request, as it arrived |
//! | 23 | TOS or traffic class of the request, as it arrived |
//! | 24..32 | nonce of the request |
//! | 32..40 | when the request left, in nanoseconds of the asking node's wall clock since 1970 |
//! | 40..48 | when it arrived, by the answering node's |
//! | 48..56 | when the answer left, by the answering node's |
//! | 56..64 | number of the sending daemon, drawn at its start |
//! | 64 | [`Via`]: what the request came in by |
//! | 65 | length of the sender's IPv4 subnet, 0 for none |
//! | 66 | length of the sender's IPv6 subnet, 0 for none |
//! | 67 | reserved |
//! | 68..72 | the sender's IPv4 subnet |
//! | 72..88 | the sender's IPv6 subnet |
//!
//! A version that adds to the format keeps these bytes; one that changes them has another number, and is not
//! answered by those who do not know it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::field::Field;

/// The UDP port that is probed on a peer's overlay address. Not assigned by IANA, and not next to the tunnel's, where
/// a second network's tunnel would be.
pub const PORT: u16 = 18285;

/// Bytes of the fixed part.
pub const HEADER_LEN: usize = 88;

/// The only version there is.
pub const VERSION: u8 = 1;

const MAGIC: [u8; 4] = *b"loPr";
const NEVER: u32 = u32::MAX;

const MAGIC_FIELD: Field<4> = Field::at(0);
const VERSION_FIELD: Field<1> = Field::at(4);
const KIND: Field<1> = Field::at(5);
const FLAGS: Field<2> = Field::at(6);
const SEQUENCE: Field<4> = Field::at(8);
const HEARD: Field<4> = Field::at(12);
const HEARD_AGE: Field<4> = Field::at(16);
const SEEN_LEN: Field<2> = Field::at(20);
const SEEN_TTL: Field<1> = Field::at(22);
const SEEN_TOS: Field<1> = Field::at(23);
const NONCE: Field<8> = Field::at(24);
const LEFT: Field<8> = Field::at(32);
const ARRIVED: Field<8> = Field::at(40);
const ANSWERED: Field<8> = Field::at(48);
const NODE: Field<8> = Field::at(56);
const VIA: Field<1> = Field::at(64);
const V4_LEN: Field<1> = Field::at(65);
const V6_LEN: Field<1> = Field::at(66);
const RESERVED: Field<1> = Field::at(67);
const V4: Field<4> = Field::at(68);
const V6: Field<16> = Field::at(72);

/// Why bytes are not a probe. There is nothing to do but to ignore them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// Fewer bytes than the fixed part has.
    #[error("a probe has at least {HEADER_LEN} bytes, there are {0}")]
    TooShort(usize),
    /// It begins otherwise.
    #[error("it does not begin as a probe does")]
    NotAProbe,
    /// A newer program's.
    #[error("version {0} of the probe format is not known: run the same version on all nodes")]
    Version(u8),
    /// A kind that the version does not have.
    #[error("probe kind {0} is not known")]
    Kind(u8),
    /// A prefix that is longer than its family's addresses.
    #[error("the sender's subnet has a prefix length of {0}")]
    PrefixLen(u8),
    /// A report that says it has more entries than it has bytes for.
    #[error("a report of {entries} entries does not fit in {len} bytes")]
    Entries {
        /// Entries it claims.
        entries: u16,
        /// Bytes of the datagram.
        len: usize,
    },
}

/// What a probe is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Asks for an answer.
    Request = 1,
    /// Answers.
    Answer = 2,
    /// Asks for a [`Report`]; its body is the number of the first peer to report on.
    Ask = 3,
    /// Reports.
    Report = 4,
    /// Asks to look out for a trace's probes, which have its nonce; its body is an [`Order`].
    Watch = 5,
    /// Tells what was seen of them.
    Sights = 6,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Request,
        Self::Answer,
        Self::Ask,
        Self::Report,
        Self::Watch,
        Self::Sights,
    ];

    /// What answers it, if anything does.
    #[must_use]
    pub const fn answer(self) -> Option<Self> {
        match self {
            Self::Request => Some(Self::Answer),
            Self::Ask => Some(Self::Report),
            Self::Watch => Some(Self::Sights),
            Self::Answer | Self::Report | Self::Sights => None,
        }
    }
}

/// What is asked for beside an answer, and what is said about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u16);

impl Flags {
    /// The answer shall be as long as the request. Without it, it is as short as it can be.
    pub const FULL: Self = Self(1);
    /// The answer would have been too long for the answering node's own link, and is short for that reason.
    pub const CUT: Self = Self(2);
    /// Part of a trace that somebody follows.
    pub const TRACE: Self = Self(4);
    /// Of a request: a second, short answer shall come past the tunnel. Of an answer: it is that one.
    pub const PAST: Self = Self(8);
    /// It takes a way that is being proven, and says nothing about that of other packets.
    pub const PROVING: Self = Self(16);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The first without the second.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether all of `other` are set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a datagram came in by, as far as its receiver can tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Via {
    /// Not told.
    #[default]
    Unknown = 0,
    /// The device of this program's own data plane.
    Tunnel = 1,
    /// The kernel's tunnel device, VXLAN or IPIP.
    KernelTunnel = 2,
    /// The underlay itself.
    Underlay = 3,
    /// Another device.
    Other = 4,
}

impl Via {
    const ALL: [Self; 5] = [
        Self::Unknown,
        Self::Tunnel,
        Self::KernelTunnel,
        Self::Underlay,
        Self::Other,
    ];

    /// By its number. A newer program may know more of them.
    pub(super) fn of(number: u8) -> Self {
        let known = Self::ALL.into_iter().find(|&one| one as u8 == number);
        known.unwrap_or(Self::Other)
    }

    /// In a word or two.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Tunnel => "tunnel",
            Self::KernelTunnel => "kernel-tunnel",
            Self::Underlay => "underlay",
            Self::Other => "other",
        }
    }
}

/// The last that a node heard of another through the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// The other's last request; 0 if there was none.
    pub sequence: u32,
    /// How long ago it said anything; beyond 49 days it says never.
    pub age: Duration,
}

/// Who sends a probe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Drawn at the daemon's start; tells two nodes apart that share an address.
    pub node: u64,
    /// Its IPv4 subnet.
    pub v4: Option<Ipv4Net>,
    /// Its IPv6 subnet.
    pub v6: Option<Ipv6Net>,
}

impl Identity {
    /// Whether an address is in the sender's subnets.
    #[must_use]
    pub fn holds(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => self.v4.is_some_and(|net| net.contains(&addr)),
            IpAddr::V6(addr) => self.v6.is_some_and(|net| net.contains(&addr)),
        }
    }
}

/// The fixed part of every probe. Times are nanoseconds of a wall clock since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What it is.
    pub kind: Kind,
    /// What is asked for.
    pub flags: Flags,
    /// The request's number.
    pub sequence: u32,
    /// Ties the answer to the request.
    pub nonce: u64,
    /// What the sender last heard from the receiver.
    pub heard: Option<Heard>,
    /// Bytes of the request's IP packet, as it arrived.
    pub seen_len: u16,
    /// The request's TTL, as it arrived.
    pub seen_ttl: u8,
    /// The request's TOS, as it arrived.
    pub seen_tos: u8,
    /// What the request came in by.
    pub via: Via,
    /// When the request left, by the asking node's clock.
    pub left: u64,
    /// When the request arrived, by the answering node's.
    pub arrived: u64,
    /// When the answer left, by the answering node's.
    pub answered: u64,
    /// Who sends it.
    pub sender: Identity,
}

impl Probe {
    /// A request; what only an answer has is zero.
    #[must_use]
    pub const fn request(kind: Kind, sequence: u32, nonce: u64, sender: Identity) -> Self {
        Self {
            kind,
            flags: Flags(0),
            sequence,
            nonce,
            heard: None,
            seen_len: 0,
            seen_ttl: 0,
            seen_tos: 0,
            via: Via::Unknown,
            left: 0,
            arrived: 0,
            answered: 0,
            sender,
        }
    }

    /// Reads the fixed part; what follows it is the caller's.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ProbeError> {
        if bytes.len() < HEADER_LEN {
            return Err(ProbeError::TooShort(bytes.len()));
        }
        if MAGIC_FIELD.octets(bytes) != MAGIC {
            return Err(ProbeError::NotAProbe);
        }
        let version = VERSION_FIELD.get(bytes);
        if version != VERSION {
            return Err(ProbeError::Version(version));
        }
        let kind = KIND.get(bytes);
        let known = Kind::ALL.into_iter().find(|&one| one as u8 == kind);
        let age = HEARD_AGE.get(bytes);
        let via = Via::of(VIA.get(bytes));
        Ok(Self {
            kind: known.ok_or(ProbeError::Kind(kind))?,
            flags: Flags(FLAGS.get(bytes)),
            sequence: SEQUENCE.get(bytes),
            nonce: NONCE.get(bytes),
            heard: (age != NEVER).then(|| Heard {
                sequence: HEARD.get(bytes),
                age: Duration::from_millis(age.into()),
            }),
            seen_len: SEEN_LEN.get(bytes),
            seen_ttl: SEEN_TTL.get(bytes),
            seen_tos: SEEN_TOS.get(bytes),
            via,
            left: LEFT.get(bytes),
            arrived: ARRIVED.get(bytes),
            answered: ANSWERED.get(bytes),
            sender: Identity {
                node: NODE.get(bytes),
                v4: prefix(V4_LEN.get(bytes), Ipv4Addr::from(V4.octets(bytes)).into())?
                    .and_then(only_v4),
                v6: prefix(V6_LEN.get(bytes), Ipv6Addr::from(V6.octets(bytes)).into())?
                    .and_then(only_v6),
            },
        })
    }

    /// Writes the fixed part to the front of `bytes`, which holds at least [`HEADER_LEN`]; the rest stays.
    pub fn write(&self, bytes: &mut [u8]) {
        MAGIC_FIELD.put(bytes, MAGIC);
        VERSION_FIELD.set(bytes, VERSION);
        KIND.set(bytes, self.kind as u8);
        FLAGS.set(bytes, self.flags.0);
        SEQUENCE.set(bytes, self.sequence);
        let age = self
            .heard
            .map(|heard| u32::try_from(heard.age.as_millis()).unwrap_or(NEVER));
        HEARD.set(bytes, self.heard.map_or(0, |heard| heard.sequence));
        HEARD_AGE.set(bytes, age.unwrap_or(NEVER));
        SEEN_LEN.set(bytes, self.seen_len);
        SEEN_TTL.set(bytes, self.seen_ttl);
        SEEN_TOS.set(bytes, self.seen_tos);
        NONCE.set(bytes, self.nonce);
        LEFT.set(bytes, self.left);
        ARRIVED.set(bytes, self.arrived);
        ANSWERED.set(bytes, self.answered);
        NODE.set(bytes, self.sender.node);
        VIA.set(bytes, self.via as u8);
        RESERVED.set(bytes, 0);
        let Identity { v4, v6, .. } = self.sender;
        V4_LEN.set(bytes, v4.map_or(0, |net| net.prefix_len()));
        V4.put(bytes, v4.map_or([0; 4], |net| net.addr().octets()));
        V6_LEN.set(bytes, v6.map_or(0, |net| net.prefix_len()));
        V6.put(bytes, v6.map_or([0; 16], |net| net.addr().octets()));
    }
}

/// None where the length is 0.
fn prefix(len: u8, addr: IpAddr) -> Result<Option<IpNet>, ProbeError> {
    match len {
        0 => Ok(None),
        _ => IpNet::new(addr, len)
            .map(Some)
            .map_err(|_too_long| ProbeError::PrefixLen(len)),
    }
}

const fn only_v4(net: IpNet) -> Option<Ipv4Net> {
    match net {
        IpNet::V4(net) => Some(net),
        IpNet::V6(_) => None,
    }
}

const fn only_v6(net: IpNet) -> Option<Ipv6Net> {
    match net {
        IpNet::V6(net) => Some(net),
        IpNet::V4(_) => None,
    }
}

mod report;
mod sights;

pub use report::{Entry, Facts, Health, Reach, Report, asked_from, write_asked_from};
pub use sights::{About, Order, Sights, Standing};

#[cfg(test)]
mod tests;
