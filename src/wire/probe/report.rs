//! Owns the body of a report: what a node says of itself and of how it reaches its peers, a part at a time.
//!
//! | bytes | what |
//! |---|---|
//! | 88..90 | [`Health`] |
//! | 90..92 | entries in this datagram |
//! | 92..96 | number of the first of them |
//! | 96..100 | peers there are |
//! | 100 | [`Via`]: what its packets to the asker are to come in by there |
//! | 101..104 | reserved |
//! | 104..120 | the node's public address; IPv4 as IPv4-mapped IPv6 |
//! | 120..128 | datagrams of the asker that the node's data plane has read; all ones: not counted |
//! | 128..136 | datagrams for the asker that it has sent; all ones: not counted |
//! | 136..144 | datagrams that the node's kernel dropped for a wrong checksum, in all |
//! | 144.. | entries of [`Entry::LEN`] bytes |
//!
//! An entry is a subnet's first address (16 bytes, likewise mapped), its length, [`Reach`], the loss in percent, a
//! reserved byte, and the round-trip time in microseconds (4 bytes, 0: not known).

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ipnet::IpNet;

use super::super::field::Field;
use super::{HEADER_LEN, ProbeError, Via};

const HEALTH: Field<2> = Field::at(88);
const ENTRIES: Field<2> = Field::at(90);
const FIRST: Field<4> = Field::at(92);
const PEERS: Field<4> = Field::at(96);
const SENDS_BY: Field<1> = Field::at(100);
const RESERVED: Field<1> = Field::at(101);
const RESERVED_REST: Field<2> = Field::at(102);
const PUBLIC: Field<16> = Field::at(104);
const RECEIVED: Field<8> = Field::at(120);
const SENT: Field<8> = Field::at(128);
const BAD_CHECKSUMS: Field<8> = Field::at(136);
const ENTRIES_OFF: usize = 144;

const NOT_COUNTED: u64 = u64::MAX;

/// The first peer that an [`Ask`](super::Kind::Ask) asks about.
const ASKED: Field<4> = Field::at(HEADER_LEN);

/// The number of the first peer that is asked about; the first of all where the request does not say.
#[must_use]
pub fn asked_from(bytes: &[u8]) -> u32 {
    ASKED.get(bytes)
}

/// Writes that number behind the fixed part.
pub fn write_asked_from(bytes: &mut [u8], first: u32) {
    ASKED.set(bytes, first);
}

/// What a node knows to be wrong with itself; nothing where all is well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health(u16);

impl Health {
    /// Its kernel does not forward packets to its pods.
    pub const NOT_FORWARDING: Self = Self(1);
    /// Its firewall drops the tunnel's datagrams.
    pub const FIREWALL_CLOSED: Self = Self(2);
    /// Its tunnel is down.
    pub const TUNNEL_DOWN: Self = Self(4);
    /// It follows its store no longer.
    pub const STORE_SILENT: Self = Self(8);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// How a node reaches a peer, as it last found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Reach {
    /// Not looked at yet.
    #[default]
    Unknown = 0,
    /// Its probes are answered.
    Answers = 1,
    /// It answers echo requests, and no probes.
    Echoes = 2,
    /// Some probes or echoes are lost.
    Loses = 3,
    /// Nothing comes back.
    Silent = 4,
}

impl Reach {
    /// Every one.
    pub const ALL: [Self; 5] = [
        Self::Unknown,
        Self::Answers,
        Self::Echoes,
        Self::Loses,
        Self::Silent,
    ];

    /// In a word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Answers => "answers",
            Self::Echoes => "echoes",
            Self::Loses => "loses",
            Self::Silent => "silent",
        }
    }
}

/// One peer of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its subnet, of the family that comes first.
    pub subnet: IpNet,
    /// How it is reached.
    pub reach: Reach,
    /// Of the last probes, in percent; at most 100.
    pub loss: u8,
    /// Of the last round, if one was answered.
    pub rtt: Option<Duration>,
}

impl Entry {
    /// Bytes of an entry.
    pub const LEN: usize = 24;

    fn parse(bytes: &[u8]) -> Result<Self, ProbeError> {
        const SUBNET: Field<16> = Field::at(0);
        const SUBNET_LEN: Field<1> = Field::at(16);
        const REACH: Field<1> = Field::at(17);
        const LOSS: Field<1> = Field::at(18);
        const RTT: Field<4> = Field::at(20);
        let addr = Ipv6Addr::from(SUBNET.octets(bytes)).to_canonical();
        let len = SUBNET_LEN.get(bytes);
        let subnet = IpNet::new(addr, len).map_err(|_too_long| ProbeError::PrefixLen(len))?;
        let reach = REACH.get(bytes);
        let reach = Reach::ALL.into_iter().find(|&one| one as u8 == reach);
        let rtt = RTT.get(bytes);
        Ok(Self {
            subnet,
            reach: reach.unwrap_or_default(),
            loss: LOSS.get(bytes).min(100),
            rtt: (rtt != 0).then(|| Duration::from_micros(rtt.into())),
        })
    }

    fn write(&self, bytes: &mut [u8]) {
        Field::<16>::at(0).put(bytes, mapped(self.subnet.addr()));
        Field::<1>::at(16).set(bytes, self.subnet.prefix_len());
        Field::<1>::at(17).set(bytes, self.reach as u8);
        Field::<1>::at(18).set(bytes, self.loss);
        Field::<1>::at(19).set(bytes, 0);
        let micros = self.rtt.map_or(0, |rtt| rtt.as_micros().max(1));
        Field::<4>::at(20).set(bytes, u32::try_from(micros).unwrap_or(u32::MAX));
    }
}

/// What a node says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// What is wrong with it.
    pub health: Health,
    /// Its address on the underlay.
    pub public: Option<IpAddr>,
    /// Datagrams of the asker that its data plane has read.
    pub received: Option<u64>,
    /// Datagrams for the asker that its data plane has sent.
    pub sent: Option<u64>,
    /// Datagrams that its kernel dropped for a wrong checksum.
    pub bad_checksums: u64,
    /// How many peers it has.
    pub peers: u32,
    /// What its packets to the asker are to come in by there.
    pub sends_by: Via,
}

/// A report, or the part of it that one datagram holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What it says of itself.
    pub facts: Facts,
    /// Number of the first entry.
    pub first: u32,
    /// Peers, from there on.
    pub entries: Vec<Entry>,
}

impl Report {
    /// Bytes of a datagram that reports on no peer.
    pub const MIN_LEN: usize = ENTRIES_OFF;

    /// How many entries fit into a datagram of `len` bytes.
    #[must_use]
    pub const fn room(len: usize) -> usize {
        len.saturating_sub(ENTRIES_OFF) / Entry::LEN
    }

    /// Reads the body of a datagram whose fixed part says that it is a report.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ProbeError> {
        if bytes.len() < ENTRIES_OFF {
            return Err(ProbeError::TooShort(bytes.len()));
        }
        let entries = ENTRIES.get(bytes);
        let len = usize::from(entries) * Entry::LEN;
        let Some(body) = bytes.get(ENTRIES_OFF..ENTRIES_OFF + len) else {
            return Err(ProbeError::Entries {
                entries,
                len: bytes.len(),
            });
        };
        let counted = |value: u64| (value != NOT_COUNTED).then_some(value);
        let public = Ipv6Addr::from(PUBLIC.octets(bytes)).to_canonical();
        Ok(Self {
            facts: Facts {
                health: Health(HEALTH.get(bytes)),
                public: (!public.is_unspecified()).then_some(public),
                received: counted(RECEIVED.get(bytes)),
                sent: counted(SENT.get(bytes)),
                bad_checksums: BAD_CHECKSUMS.get(bytes),
                peers: PEERS.get(bytes),
                sends_by: Via::of(SENDS_BY.get(bytes)),
            },
            first: FIRST.get(bytes),
            entries: body
                .chunks_exact(Entry::LEN)
                .map(Entry::parse)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Writes the body behind the fixed part, with as many entries as fit; how many bytes the datagram has then.
    /// `bytes` holds at least [`MIN_LEN`](Self::MIN_LEN).
    #[must_use]
    pub fn write(&self, bytes: &mut [u8]) -> usize {
        let room = Self::room(bytes.len()).min(self.entries.len());
        let count = u16::try_from(room).unwrap_or(u16::MAX);
        let facts = &self.facts;
        HEALTH.set(bytes, facts.health.0);
        ENTRIES.set(bytes, count);
        FIRST.set(bytes, self.first);
        PEERS.set(bytes, facts.peers);
        SENDS_BY.set(bytes, facts.sends_by as u8);
        RESERVED.set(bytes, 0);
        RESERVED_REST.set(bytes, 0);
        PUBLIC.put(bytes, facts.public.map_or([0; 16], mapped));
        RECEIVED.set(bytes, facts.received.unwrap_or(NOT_COUNTED));
        SENT.set(bytes, facts.sent.unwrap_or(NOT_COUNTED));
        BAD_CHECKSUMS.set(bytes, facts.bad_checksums);
        let body = bytes.get_mut(ENTRIES_OFF..).unwrap_or_default();
        let entries = self.entries.iter().take(count.into());
        for (place, entry) in body.chunks_exact_mut(Entry::LEN).zip(entries) {
            entry.write(place);
        }
        ENTRIES_OFF + usize::from(count) * Entry::LEN
    }
}

const fn mapped(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    }
}
