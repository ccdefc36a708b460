//! Owns longest-prefix match from an overlay address to a next hop. Immutable once built; never does I/O.
//!
//! Leases of one network are normally subnets of one size, so each family's table is an array indexed by
//! `(address - base) >> host_bits`: one subtraction, one shift, one load. When prefixes differ in size, or
//! would need an array of more than 2²⁰ slots, a prefix trie takes over.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::{Prefix, PrefixMap};

/// The largest direct array, 4 MiB: a /8 of /24 subnets is 65 536 slots, a /44 of /64 is 1 048 576.
const MAX_SLOTS: u128 = 1 << 20;

/// An address family as integers: what the direct index needs to know.
trait Family: Copy + Ord {
    /// Its prefix type.
    type Net: Prefix + Copy;
    /// Bits of an address.
    const BITS: u8;
    /// The prefix's first address as bits, and its length.
    fn parts(net: &Self::Net) -> (u128, u8);
    /// The address as a prefix of full length.
    fn host(self) -> Self::Net;
    /// `(self - base) >> shift` in this family's own word size; wraps below the base, as the caller's bound
    /// check expects.
    fn slot(self, base: Self, shift: u8) -> usize;
    /// From the low bits of a `u128`.
    fn from_bits(bits: u128) -> Self;
}

impl Family for u32 {
    type Net = Ipv4Net;
    const BITS: u8 = 32;
    fn parts(net: &Ipv4Net) -> (u128, u8) {
        (u128::from(Self::from(net.network())), net.prefix_len())
    }
    fn host(self) -> Ipv4Net {
        Ipv4Net::from(Ipv4Addr::from(self))
    }
    #[inline]
    fn slot(self, base: Self, shift: u8) -> usize {
        (self.wrapping_sub(base) >> shift) as usize
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the caller passes an IPv4 address"
    )]
    fn from_bits(bits: u128) -> Self {
        bits as Self
    }
}

impl Family for u128 {
    type Net = Ipv6Net;
    const BITS: u8 = 128;
    fn parts(net: &Ipv6Net) -> (u128, u8) {
        (Self::from(net.network()), net.prefix_len())
    }
    fn host(self) -> Ipv6Net {
        Ipv6Net::from(Ipv6Addr::from(self))
    }
    #[inline]
    fn slot(self, base: Self, shift: u8) -> usize {
        usize::try_from(self.wrapping_sub(base) >> shift).unwrap_or(usize::MAX)
    }
    fn from_bits(bits: u128) -> Self {
        bits
    }
}

/// One family's table. Hop indices are stored plus one, so that zero means "none".
enum Table<F: Family> {
    /// Equal-sized prefixes: slot `(address - base) >> shift`.
    Direct {
        base: F,
        shift: u8,
        slots: Box<[u32]>,
    },
    /// Anything else.
    Trie(Box<PrefixMap<F::Net, u32>>),
}

impl<F: Family> Table<F> {
    fn build(routes: &[(F::Net, u32)]) -> Self {
        Self::direct(routes).unwrap_or_else(|| {
            let mut trie = PrefixMap::new();
            for (net, hop) in routes {
                trie.insert(*net, hop + 1);
            }
            Self::Trie(Box::new(trie))
        })
    }

    /// `None` when the prefixes differ in size or span too many slots.
    fn direct(routes: &[(F::Net, u32)]) -> Option<Self> {
        let Some((first, _)) = routes.first() else {
            return Some(Self::Direct {
                base: F::from_bits(0),
                shift: 0,
                slots: Box::default(),
            });
        };
        let (_, len) = F::parts(first);
        // A default route would need a shift by the whole width, which no integer has.
        if len == 0 || routes.iter().any(|(net, _)| F::parts(net).1 != len) {
            return None;
        }
        let shift = F::BITS - len;
        let bases = || routes.iter().map(|(net, _)| F::parts(net).0);
        let (low, high) = (bases().min()?, bases().max()?);
        let count = ((high - low) >> shift) + 1;
        if count > MAX_SLOTS {
            return None;
        }
        let mut slots = vec![0; usize::try_from(count).ok()?].into_boxed_slice();
        for (net, hop) in routes {
            let slot = usize::try_from((F::parts(net).0 - low) >> shift).ok()?;
            if let Some(entry) = slots.get_mut(slot) {
                *entry = hop + 1;
            }
        }
        Some(Self::Direct {
            base: F::from_bits(low),
            shift,
            slots,
        })
    }

    #[inline]
    fn lookup(&self, addr: F) -> Option<u32> {
        let stored = match self {
            Self::Direct { base, shift, slots } => {
                slots.get(addr.slot(*base, *shift)).copied().unwrap_or(0)
            }
            Self::Trie(trie) => trie.get_lpm(&addr.host()).map_or(0, |(_, hop)| *hop),
        };
        stored.checked_sub(1)
    }
}

/// Overlay prefix to next hop, for both families. `N` is whatever the reader needs to send there.
pub struct Fib<N> {
    v4: Table<u32>,
    v6: Table<u128>,
    hops: Vec<N>,
}

impl<N> Fib<N> {
    /// Builds a table from prefixes and indices into `hops`. Of two routes for one prefix the later wins;
    /// a route whose index is outside `hops` is ignored.
    #[must_use]
    pub fn build(routes: impl IntoIterator<Item = (IpNet, usize)>, hops: Vec<N>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (net, hop) in routes {
            let Some(hop) = u32::try_from(hop).ok().filter(|_| hop < hops.len()) else {
                continue;
            };
            match net {
                IpNet::V4(net) => v4.push((net.trunc(), hop)),
                IpNet::V6(net) => v6.push((net.trunc(), hop)),
            }
        }
        Self {
            v4: Table::build(&v4),
            v6: Table::build(&v6),
            hops,
        }
    }

    /// The next hop of the longest prefix that covers `addr`, and its index.
    #[inline]
    pub fn lookup(&self, addr: IpAddr) -> Option<(u32, &N)> {
        let hop = match addr {
            IpAddr::V4(addr) => self.v4.lookup(u32::from(addr)),
            IpAddr::V6(addr) => self.v6.lookup(u128::from(addr)),
        }?;
        self.hops.get(hop as usize).map(|next| (hop, next))
    }

    /// The next hop with this index, as [`Fib::lookup`] returned it.
    #[inline]
    pub fn hop(&self, idx: u32) -> Option<&N> {
        self.hops.get(idx as usize)
    }

    /// Every next hop, by index.
    pub fn hops(&self) -> &[N] {
        &self.hops
    }

    /// Whether both families use the direct index (or are empty): what the benchmark and `status` report.
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        matches!(self.v4, Table::Direct { .. }) && matches!(self.v6, Table::Direct { .. })
    }
}

impl<N> Default for Fib<N> {
    fn default() -> Self {
        Self::build([], Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The oracle: every prefix is tried, the longest that contains the address wins, the later of equals.
    fn slow(routes: &[(IpNet, usize)], addr: IpAddr) -> Option<u32> {
        let mut best: Option<(u8, usize)> = None;
        for (net, hop) in routes {
            if net.contains(&addr) && best.is_none_or(|(len, _)| net.prefix_len() >= len) {
                best = Some((net.prefix_len(), *hop));
            }
        }
        best.map(|(_, hop)| u32::try_from(hop).unwrap())
    }

    fn net_v4(len: impl Strategy<Value = u8>) -> impl Strategy<Value = IpNet> {
        (len, 0..=0xffff_u32).prop_map(|(len, low)| {
            IpNet::V4(
                Ipv4Net::new(Ipv4Addr::from(0xc612_0000 | low), len)
                    .unwrap()
                    .trunc(),
            )
        })
    }

    fn net_v6(len: impl Strategy<Value = u8>) -> impl Strategy<Value = IpNet> {
        (len, any::<u32>()).prop_map(|(len, low)| {
            let addr = 0xfd00_0000_0000_u128 << 80 | u128::from(low) << 62;
            IpNet::V6(Ipv6Net::new(Ipv6Addr::from(addr), len).unwrap().trunc())
        })
    }

    fn check(nets: Vec<IpNet>, probes: Vec<u32>) -> Result<(), TestCaseError> {
        let routes: Vec<_> = nets
            .into_iter()
            .enumerate()
            .map(|(hop, net)| (net, hop))
            .collect();
        let fib = Fib::build(routes.clone(), (0..routes.len()).collect());
        let near = routes
            .iter()
            .flat_map(|(net, _)| [net.network(), net.broadcast()]);
        let random = probes.iter().flat_map(|&low| {
            let v6 = 0xfd00_0000_0000_u128 << 80 | u128::from(low) << 60;
            [
                IpAddr::V4(Ipv4Addr::from(0xc612_0000 ^ low)),
                IpAddr::V6(Ipv6Addr::from(v6)),
            ]
        });
        for addr in near.chain(random) {
            prop_assert_eq!(
                fib.lookup(addr).map(|(hop, _)| hop),
                slow(&routes, addr),
                "{}",
                addr
            );
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn equal_sized_prefixes_agree_with_the_oracle(
            v4 in prop::collection::vec(net_v4(24..=24_u8), 0..40),
            v6 in prop::collection::vec(net_v6(64..=64_u8), 0..40),
            probes in prop::collection::vec(any::<u32>(), 0..40),
        ) {
            check(v4.into_iter().chain(v6).collect(), probes)?;
        }

        #[test]
        fn mixed_prefixes_agree_with_the_oracle(
            v4 in prop::collection::vec(net_v4(0..=32_u8), 0..40),
            v6 in prop::collection::vec(net_v6(0..=128_u8), 0..40),
            probes in prop::collection::vec(any::<u32>(), 0..40),
        ) {
            check(v4.into_iter().chain(v6).collect(), probes)?;
        }
    }

    #[test]
    fn equal_sized_subnets_use_the_direct_index_and_others_do_not() {
        let route = |net: &str| (net.parse::<IpNet>().unwrap(), 0);
        assert!(Fib::build([route("198.18.1.0/24"), route("198.18.9.0/24")], vec![()]).is_direct());
        assert!(
            !Fib::build([route("198.18.1.0/24"), route("198.18.0.0/16")], vec![()]).is_direct()
        );
        assert!(!Fib::build([route("10.0.0.0/30"), route("198.18.0.0/30")], vec![()]).is_direct());
        assert!(!Fib::build([route("0.0.0.0/0")], vec![()]).is_direct());
    }

    #[test]
    fn a_route_to_a_hop_that_does_not_exist_is_ignored() {
        let fib = Fib::build([("198.18.1.0/24".parse().unwrap(), 1)], vec![()]);
        assert!(fib.lookup("198.18.1.1".parse().unwrap()).is_none());
    }
}
