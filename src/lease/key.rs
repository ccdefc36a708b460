//! Owns the key of a lease, and flannel's text for it. Never allocates subnets.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

use crate::addr::OverlayPrefix;

/// The longest key text looked at: `255.255.255.255-32&` and the longest IPv6 prefix.
const MAX_KEY_LEN: usize = 19 + 39 + 4;

/// What stands for IPv4 in the key of a node without it.
const NO_IPV4: &str = "0.0.0.0-0";

/// The subnets of one node: at least one family, host bits zero.
///
/// Its text is flannel's key, specification section 5.1: `10.12.13.0-24`, `10.12.13.0-24&fd00:12:13::-56`, and
/// `0.0.0.0-0&fd00:12:13::-56` for IPv6 alone. There is exactly one text per value, so keys can be compared as
/// text, and file names never alias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnets {
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
}

/// Why a text is not a lease key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not of the form at all.
    #[error("not of the form 10.12.13.0-24 or 10.12.13.0-24&fd00:12:13::-56")]
    Form,
    /// One part is not a prefix.
    #[error("{part:?} is not an {family} prefix of the form {example}")]
    Prefix {
        /// The text.
        part: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// What it could look like.
        example: &'static str,
    },
    /// Another spelling of a key: host bits set, leading zeros, or not the shortest IPv6 text.
    #[error("not the canonical spelling: use {canonical}")]
    NotCanonical {
        /// The one text of the same subnets.
        canonical: Subnets,
    },
}

impl Subnets {
    /// Takes at least one subnet and masks host bits off. `None` without any, for lengths no key can carry (0,
    /// and whole addresses: /32, /128), and for IPv4-mapped IPv6.
    #[must_use]
    pub fn new(v4: Option<Ipv4Net>, v6: Option<Ipv6Net>) -> Option<Self> {
        let v4_fits = v4.is_none_or(|net| (1..=31).contains(&net.prefix_len()));
        // The IPv4-mapped range is no overlay, and its text would hold dots, which no key does.
        let v6_fits = v6.is_none_or(|net| {
            (1..=127).contains(&net.prefix_len()) && net.trunc().addr().to_ipv4_mapped().is_none()
        });
        let some = v4.is_some() || v6.is_some();
        (some && v4_fits && v6_fits).then(|| Self {
            v4: v4.map(|net| net.trunc()),
            v6: v6.map(|net| net.trunc()),
        })
    }

    /// The IPv4 subnet.
    #[must_use]
    pub const fn v4(&self) -> Option<Ipv4Net> {
        self.v4
    }

    /// The IPv6 subnet.
    #[must_use]
    pub const fn v6(&self) -> Option<Ipv6Net> {
        self.v6
    }

    /// Whether some address lies in both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        overlap(self.v4, other.v4) || overlap(self.v6, other.v6)
    }

    /// Whether it has more addresses than `other` in some family of both.
    #[must_use]
    pub fn is_larger_than(&self, other: &Self) -> bool {
        larger(self.v4, other.v4) || larger(self.v6, other.v6)
    }
}

fn larger<N: OverlayPrefix>(a: Option<N>, b: Option<N>) -> bool {
    matches!((a, b), (Some(a), Some(b)) if a.len_bits() < b.len_bits())
}

fn overlap<N: OverlayPrefix>(a: Option<N>, b: Option<N>) -> bool {
    matches!((a, b), (Some(a), Some(b)) if a.holds(&b) || b.holds(&a))
}

impl fmt::Display for Subnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.v4 {
            Some(v4) => write!(f, "{}-{}", v4.network(), v4.prefix_len())?,
            None => f.write_str(NO_IPV4)?,
        }
        match self.v6 {
            Some(v6) => write!(f, "&{}-{}", v6.network(), v6.prefix_len()),
            None => Ok(()),
        }
    }
}

impl FromStr for Subnets {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        if text.len() > MAX_KEY_LEN {
            return Err(KeyError::Form);
        }
        let (v4_text, v6_text) = match text.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (text, None),
        };
        let v4 = if v4_text == NO_IPV4 {
            None
        } else {
            Some(v4_prefix(v4_text)?)
        };
        let v6 = v6_text.map(v6_prefix).transpose()?;
        let subnets = Self::new(v4, v6).ok_or(KeyError::Form)?;
        if subnets.to_string() == text {
            Ok(subnets)
        } else {
            Err(KeyError::NotCanonical { canonical: subnets })
        }
    }
}

fn v4_prefix(text: &str) -> Result<Ipv4Net, KeyError> {
    split::<Ipv4Addr>(text)
        .and_then(|(addr, len)| Ipv4Net::new(addr, len).ok())
        .filter(|net| (1..=31).contains(&net.prefix_len()))
        .ok_or_else(|| KeyError::Prefix {
            part: text.to_owned(),
            family: "IPv4",
            example: "10.12.13.0-24",
        })
}

fn v6_prefix(text: &str) -> Result<Ipv6Net, KeyError> {
    split::<Ipv6Addr>(text)
        .and_then(|(addr, len)| Ipv6Net::new(addr, len).ok())
        .filter(|net| (1..=127).contains(&net.prefix_len()))
        .ok_or_else(|| KeyError::Prefix {
            part: text.to_owned(),
            family: "IPv6",
            example: "fd00:12:13::-56",
        })
}

/// Splits `<address>-<length>`. Neither address text contains a `-`.
fn split<A: FromStr>(text: &str) -> Option<(A, u8)> {
    let (addr, len) = text.split_once('-')?;
    Some((addr.parse().ok()?, len.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_keys_of_the_specification_round_trip() {
        for text in include_str!("../../tests/golden/store/keys.txt").lines() {
            assert_eq!(text.parse::<Subnets>().unwrap().to_string(), text);
        }
        let dual: Subnets = "10.12.13.0-24&fd00:12:13::-56".parse().unwrap();
        assert_eq!(dual.v4(), Some("10.12.13.0/24".parse().unwrap()));
        assert_eq!(dual.v6(), Some("fd00:12:13::/56".parse().unwrap()));
    }

    #[test]
    fn everything_flannel_rejects_and_what_it_should_is_rejected() {
        let refused = include_str!("../../tests/golden/store/keys-refused.txt");
        let stricter = [
            "10.12.13.0-32",
            "10.12.13.0-24&2001::-128",
            // Accepted by flannel's unanchored, unescaped expression.
            "hi10.12.13.0-24",
            "/10.12.13.0-24",
            "10.12x13y0-24",
            // Other spellings of good keys.
            "10.12.13.7-24",
            "10.12.13.0-024",
            "10.12.13.0-+24",
            "10.12.13.0-24&2001:0::-56",
            "10.12.13.0-24&2001::1-56",
            "10.12.13.0-24&FD00::-56",
            "",
            "0.0.0.0-0",
            "0.0.0.0-0&::-0",
            "10.12.13.0-24&",
            "10.12.13.0-24&2001::-56&2002::-56",
            ".10.12.13.0-24.tmp",
            "0.0.0.0-0&::ffff:10.1.2.0-120",
        ];
        for text in refused.lines().chain(stricter) {
            assert!(text.parse::<Subnets>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_value_survives_its_text(
            v4 in proptest::option::of((any::<u32>(), 1u8..=31)),
            v6 in proptest::option::of((any::<u128>(), 1u8..=127)),
        ) {
            let v4 = v4.and_then(|(bits, len)| Ipv4Net::new(bits.into(), len).ok());
            let v6 = v6.and_then(|(bits, len)| Ipv6Net::new(bits.into(), len).ok());
            if let Some(subnets) = Subnets::new(v4, v6) {
                prop_assert_eq!(subnets.to_string().parse(), Ok(subnets));
            }
        }

        #[test]
        fn overlap_is_what_comparing_every_address_says(a in 0u32..64, b in 0u32..64, la in 26u8..=31, lb in 26u8..=31) {
            let net = |bits: u32, len| Ipv4Net::new((0x0a00_0000 + bits).into(), len).unwrap();
            let (a, b) = (net(a, la), net(b, lb));
            let shared = (0..64u32).any(|i| {
                let addr = Ipv4Addr::from(0x0a00_0000 + i);
                a.contains(&addr) && b.contains(&addr)
            });
            let key = |net| Subnets::new(Some(net), None).unwrap();
            prop_assert_eq!(key(a).overlaps(&key(b)), shared);
        }
    }
}
