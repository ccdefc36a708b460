//! Owns which packets a capture wants: a subset of tcpdump's expressions over inner packets, and words of its
//! own for the overlay. Never allocates to match.
//!
//! | primitive | matches |
//! |---|---|
//! | `[src\|dst] host A`, or `[src\|dst] A` | the inner address |
//! | `[src\|dst] net P` | an inner address in the prefix |
//! | `[tcp\|udp] [src\|dst] port N`, `portrange A-B` | a port of TCP, UDP or SCTP |
//! | `ip`, `ip6`, `tcp`, `udp`, `icmp`, `icmp6`, `proto N` | the family or protocol |
//! | `less N`, `greater N` | inner packets of at most or at least N bytes |
//! | `peer A` | the other end's outer address |
//! | `encap`, `decap` | the direction |
//! | `sent`, `delivered`, `answered`, `dropped`, `handed`, `arrived` | the verdict |
//! | `reason NAME` | answered or dropped for this reason, by its name in `loden status` |
//!
//! They are joined with `and` (`&&`), `or` (`||`), `not` (`!`) and parentheses. As in pcap-filter(7), `and` and
//! `or` bind equally and from left to right, `not` binds tighter, and a value alone repeats the qualifiers
//! before it: `port 80 or 443`.

mod parse;

use std::fmt;
use std::net::IpAddr;

use etherparse::LaxIpSlice;
use ipnet::IpNet;

use super::super::DropReason;
use super::record::{Direction, Record, Verdict};
pub use parse::FilterError;

/// Which end of a packet a primitive is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Src,
    Dst,
    Either,
}

impl End {
    fn of<T: Copy>(self, (src, dst): (T, T), test: impl Fn(T) -> bool) -> bool {
        match self {
            Self::Src => test(src),
            Self::Dst => test(dst),
            Self::Either => test(src) || test(dst),
        }
    }

    const fn prefix(self) -> &'static str {
        match self {
            Self::Src => "src ",
            Self::Dst => "dst ",
            Self::Either => "",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Primitive {
    Net(End, IpNet),
    Port(End, u16, u16),
    V4,
    V6,
    Protocol(u8),
    Less(u32),
    Greater(u32),
    Peer(IpAddr),
    Direction(Direction),
    Sent,
    Delivered,
    Answered,
    Dropped,
    Handed,
    Arrived,
    Reason(DropReason),
}

/// The expression in postfix order: what makes matching a loop over a small array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Is(Primitive),
    Not,
    And,
    Or,
}

/// A parsed expression. The empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    steps: Vec<Step>,
}

/// What a filter looks at, read once per packet.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    record: &'a Record,
    addrs: Option<(IpAddr, IpAddr)>,
    protocol: Option<u8>,
    ports: Option<(u16, u16)>,
}

impl<'a> Facts<'a> {
    /// Of a packet of which `bytes` were copied, with what stands in front of it.
    #[must_use]
    pub fn of(record: &'a Record, bytes: &[u8]) -> Self {
        let mut facts = Self {
            record,
            addrs: None,
            protocol: None,
            ports: None,
        };
        let inner = bytes.get(usize::from(record.inner_at)..);
        let Ok((ip, _)) = LaxIpSlice::from_slice(inner.unwrap_or_default()) else {
            return facts;
        };
        facts.addrs = Some((ip.source_addr(), ip.destination_addr()));
        let payload = ip.payload();
        facts.protocol = Some(payload.ip_number.0);
        let first = match &ip {
            LaxIpSlice::Ipv4(ip) => ip.header().fragments_offset().value() == 0,
            LaxIpSlice::Ipv6(_) => !payload.fragmented,
        };
        // TCP, UDP and SCTP begin with their ports.
        if first && matches!(payload.ip_number.0, 6 | 17 | 132) {
            facts.ports = payload
                .payload
                .first_chunk()
                .map(|&[a, b, c, d]| (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])));
        }
        facts
    }

    /// The inner addresses, from and to.
    #[must_use]
    pub const fn addrs(&self) -> Option<(IpAddr, IpAddr)> {
        self.addrs
    }

    /// The inner ports, from and to.
    #[must_use]
    pub const fn ports(&self) -> Option<(u16, u16)> {
        self.ports
    }

    /// The inner protocol.
    #[must_use]
    pub const fn protocol(&self) -> Option<u8> {
        self.protocol
    }

    fn is(&self, primitive: Primitive) -> bool {
        let Record { verdict, .. } = *self.record;
        match primitive {
            Primitive::Net(end, net) => self
                .addrs
                .is_some_and(|both| end.of(both, |addr| net.contains(&addr))),
            Primitive::Port(end, low, high) => self
                .ports
                .is_some_and(|both| end.of(both, |port| (low..=high).contains(&port))),
            Primitive::V4 => self.addrs.is_some_and(|(src, _)| src.is_ipv4()),
            Primitive::V6 => self.addrs.is_some_and(|(src, _)| src.is_ipv6()),
            Primitive::Protocol(protocol) => self.protocol == Some(protocol),
            Primitive::Less(len) => self.record.len <= len,
            Primitive::Greater(len) => self.record.len >= len,
            Primitive::Peer(peer) => self.record.outer.is_some_and(|outer| outer.ip() == peer),
            Primitive::Direction(direction) => self.record.direction == direction,
            Primitive::Sent => matches!(verdict, Verdict::Sent | Verdict::Fragmented),
            Primitive::Delivered => verdict == Verdict::Delivered,
            Primitive::Answered => matches!(verdict, Verdict::Answered(_)),
            Primitive::Dropped => matches!(verdict, Verdict::Dropped(_)),
            Primitive::Handed => verdict == Verdict::Handed,
            Primitive::Arrived => verdict == Verdict::Arrived,
            Primitive::Reason(wanted) => {
                matches!(verdict, Verdict::Answered(reason) | Verdict::Dropped(reason) if reason == wanted)
            }
        }
    }
}

impl Filter {
    /// Whether the packet is wanted.
    #[must_use]
    pub fn matches(&self, facts: &Facts<'_>) -> bool {
        // One bit per value on the stack; the parser bounds the depth.
        let mut stack = 0_u128;
        for step in &self.steps {
            match *step {
                Step::Is(primitive) => stack = stack << 1 | u128::from(facts.is(primitive)),
                Step::Not => stack ^= 1,
                Step::And => stack = stack >> 1 & (stack | !1),
                Step::Or => stack = stack >> 1 | stack & 1,
            }
        }
        self.steps.is_empty() || stack & 1 == 1
    }

    /// What both want.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        if self.steps.is_empty() {
            return other;
        }
        if !other.steps.is_empty() {
            self.steps.extend(other.steps);
            self.steps.push(Step::And);
        }
        self
    }
}

impl fmt::Display for Primitive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(end, net) => write!(f, "{}net {net}", end.prefix()),
            Self::Port(end, low, high) if low == high => write!(f, "{}port {low}", end.prefix()),
            Self::Port(end, low, high) => write!(f, "{}portrange {low}-{high}", end.prefix()),
            Self::V4 => f.write_str("ip"),
            Self::V6 => f.write_str("ip6"),
            Self::Protocol(protocol) => write!(f, "proto {protocol}"),
            Self::Less(len) => write!(f, "less {len}"),
            Self::Greater(len) => write!(f, "greater {len}"),
            Self::Peer(peer) => write!(f, "peer {peer}"),
            Self::Direction(Direction::Encap) => f.write_str("encap"),
            Self::Direction(Direction::Decap) => f.write_str("decap"),
            Self::Sent => f.write_str("sent"),
            Self::Delivered => f.write_str("delivered"),
            Self::Answered => f.write_str("answered"),
            Self::Dropped => f.write_str("dropped"),
            Self::Handed => f.write_str("handed"),
            Self::Arrived => f.write_str("arrived"),
            Self::Reason(reason) => write!(f, "reason {}", reason.name()),
        }
    }
}

/// The expression with all its qualifiers; parsing it gives the same filter.
impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Each text, and whether it joins two others.
        let mut stack: Vec<(String, bool)> = Vec::new();
        let grouped = |(text, joins): (String, bool)| {
            if joins { format!("({text})") } else { text }
        };
        for step in &self.steps {
            let mut pop = || stack.pop().unwrap_or_default();
            let text = match step {
                Step::Is(primitive) => (primitive.to_string(), false),
                Step::Not => (format!("not {}", grouped(pop())), false),
                Step::And | Step::Or => {
                    let (right, (left, _)) = (grouped(pop()), pop());
                    let word = if *step == Step::And { "and" } else { "or" };
                    (format!("{left} {word} {right}"), true)
                }
            };
            stack.push(text);
        }
        stack.iter().try_for_each(|(text, _)| f.write_str(text))
    }
}

#[cfg(test)]
mod tests;
