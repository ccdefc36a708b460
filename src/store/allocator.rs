//! Owns the choice of a free subnet. Pure: what is taken and the randomness are handed in. Never claims
//! anything.

use ipnet::{Ipv4Net, Ipv6Net};

use crate::addr::OverlayPrefix;
use crate::config::{ConfigError, NetworkConfig, SubnetPool};
use crate::lease::Subnets;

use super::StoreError;

/// How many free subnets are drawn from; specification section 5.4. Enough to keep nodes that start together
/// apart, few enough to keep a network's subnets together.
pub const CANDIDATES: usize = 100;

/// Picks subnets for a node in every family of the network: those of `kept`, and in the families without one, each
/// drawn uniformly from the first [`CANDIDATES`] free ones. Free is what overlaps nothing in `taken`.
///
/// `choose` is given a count of at least 1 and returns an index below it.
///
/// # Errors
///
/// [`StoreError::OutOfSubnets`] for the first family that has none left.
pub fn allocate(
    config: &NetworkConfig,
    kept: Kept,
    taken: &[Subnets],
    mut choose: impl FnMut(usize) -> usize,
) -> Result<Subnets, StoreError> {
    let v4 = match kept.v4 {
        Some(v4) => Ok(Some(v4)),
        None => draw(
            "IPv4",
            config.ipv4.as_ref(),
            taken.iter().filter_map(Subnets::v4),
            &mut choose,
        ),
    };
    let v6 = match kept.v6 {
        Some(v6) => Ok(Some(v6)),
        None => draw(
            "IPv6",
            config.ipv6.as_ref(),
            taken.iter().filter_map(Subnets::v6),
            &mut choose,
        ),
    };
    Subnets::new(v4?, v6?).ok_or_else(|| StoreError::Config {
        location: "network configuration".to_owned(),
        source: ConfigError::NoFamily,
    })
}

/// What a node keeps of the subnets that it had, family by family: a network that gains or loses a family costs the
/// pods of the other one nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kept {
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
}

impl Kept {
    /// What of `previous` lies in the network's pools and overlaps nothing in `standing`.
    #[must_use]
    pub fn of(config: &NetworkConfig, previous: Option<Subnets>, standing: &[Subnets]) -> Self {
        fn one<N: OverlayPrefix>(
            pool: Option<&SubnetPool<N>>,
            previous: Option<N>,
            mut standing: impl Iterator<Item = N>,
        ) -> Option<N> {
            let net = previous.filter(|net| pool.is_some_and(|pool| pool.contains(net)))?;
            let overlaps = |other: N| other.holds(&net) || net.holds(&other);
            (!standing.any(overlaps)).then_some(net)
        }
        let Some(previous) = previous else {
            return Self::default();
        };
        let v6 = standing.iter().filter_map(Subnets::v6);
        Self {
            v4: one(
                config.ipv4.as_ref(),
                previous.v4(),
                standing.iter().filter_map(Subnets::v4),
            ),
            v6: one(config.ipv6.as_ref(), previous.v6(), v6),
        }
    }
}

/// Whether a lease claims more than a node of this network may have. Every node refuses it, so that it stands in
/// nobody's way where no other subnet is free: one such key must not lock all others out.
#[must_use]
pub fn exceeds_share(config: &NetworkConfig, subnets: &Subnets) -> bool {
    fn one<N: OverlayPrefix>(pool: Option<&SubnetPool<N>>, subnet: Option<N>) -> bool {
        matches!((pool, subnet), (Some(pool), Some(subnet)) if subnet.len_bits() < pool.subnet_len())
    }
    one(config.ipv4.as_ref(), subnets.v4()) || one(config.ipv6.as_ref(), subnets.v6())
}

/// Whether a node of this network may hold `subnets`: each enabled family has one of its pool, and no other
/// family has one.
#[must_use]
pub fn compatible(config: &NetworkConfig, subnets: &Subnets) -> bool {
    fn one<N: OverlayPrefix>(pool: Option<&SubnetPool<N>>, subnet: Option<N>) -> bool {
        match (pool, subnet) {
            (Some(pool), Some(subnet)) => pool.contains(&subnet),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }
    one(config.ipv4.as_ref(), subnets.v4()) && one(config.ipv6.as_ref(), subnets.v6())
}

fn draw<N: OverlayPrefix>(
    family: &'static str,
    pool: Option<&SubnetPool<N>>,
    taken: impl Iterator<Item = N>,
    choose: &mut impl FnMut(usize) -> usize,
) -> Result<Option<N>, StoreError> {
    let Some(pool) = pool else { return Ok(None) };
    let free = first_free(pool, taken);
    let index = if free.is_empty() {
        0
    } else {
        choose(free.len())
    };
    free.get(index)
        .copied()
        .map(Some)
        .ok_or_else(|| StoreError::OutOfSubnets {
            family,
            network: pool.network().to_string(),
            first: pool.first().to_string(),
            last: pool.last().to_string(),
        })
}

/// The first [`CANDIDATES`] subnets of the pool that overlap nothing in `taken`, in order. Takes time in the
/// size of `taken`, not of the pool, which may hold 2^62 subnets.
fn first_free<N: OverlayPrefix>(pool: &SubnetPool<N>, taken: impl Iterator<Item = N>) -> Vec<N> {
    let mut taken: Vec<(u128, u128)> = taken
        .map(|net| (net.first_bits(), net.last_bits()))
        .collect();
    taken.sort_unstable();
    let mut taken = taken.into_iter().peekable();

    let len = pool.subnet_len();
    let end = pool.last().first_bits();
    let mut free = Vec::new();
    let mut at = pool.first();
    // The highest address of the ranges passed so far.
    let mut reach = None;
    loop {
        while let Some((_, last)) = taken.next_if(|&(first, _)| first <= at.last_bits()) {
            reach = reach.max(Some(last));
        }
        // Behind what is in the way, or behind the candidate.
        let next = match reach {
            Some(last) if last >= at.first_bits() => last.max(at.last_bits()),
            _ => {
                free.push(at);
                at.last_bits()
            }
        };
        // The subnet that holds the next address starts there: a range ends where some subnet of its own or a
        // longer length ends, unless it is smaller than a subnet, and then the candidate's end is what counts.
        let following = next.checked_add(1).and_then(|bits| N::from_bits(bits, len));
        match following {
            Some(following) if following.first_bits() <= end && free.len() < CANDIDATES => {
                at = following;
            }
            _ => return free,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text.as_bytes()).unwrap()
    }

    fn free(config: &NetworkConfig, taken: &[Ipv4Net]) -> Vec<Ipv4Net> {
        first_free(config.ipv4.as_ref().unwrap(), taken.iter().copied())
    }

    #[test]
    fn the_choice_is_among_the_first_hundred_free_subnets() {
        let config = config(r#"{"Network":"10.9.0.0/16"}"#);
        let taken = [
            "10.9.1.0-24".parse().unwrap(),
            "10.9.100.0-25".parse().unwrap(),
        ];
        let mut offered = None;
        let last = allocate(&config, Kept::default(), &taken, |n| {
            offered = Some(n);
            n - 1
        });
        // 2 to 103, without 100: a subnet that is taken in part is not free.
        assert_eq!(offered, Some(100));
        assert_eq!(last.unwrap().to_string(), "10.9.102.0-24");
        let first = allocate(&config, Kept::default(), &taken, |_| 0).unwrap();
        assert_eq!(first.to_string(), "10.9.2.0-24");
    }

    #[test]
    fn both_families_are_drawn_apart() {
        let config =
            config(r#"{"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#);
        let taken = ["10.9.1.0-24&fd00:0:0:1::-64".parse().unwrap()];
        let mut indices = [3, 7].into_iter();
        let drawn = allocate(&config, Kept::default(), &taken, |_| {
            indices.next().unwrap()
        })
        .unwrap();
        assert_eq!(drawn.to_string(), "10.9.5.0-24&fd00:0:0:9::-64");
    }

    #[test]
    fn each_family_is_kept_or_drawn_by_itself() {
        let dual =
            config(r#"{"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#);
        let taken: [Subnets; 2] = [
            "10.9.1.0-24&fd00:0:0:1::-64".parse().unwrap(),
            "10.9.9.0-24".parse().unwrap(),
        ];
        for (previous, got) in [
            ("10.9.7.0-24", "10.9.7.0-24&fd00:0:0:2::-64"),
            ("0.0.0.0-0&fd00:0:0:7::-64", "10.9.2.0-24&fd00:0:0:7::-64"),
            // Somebody else's, or not of the network's form: drawn anew, and the other family is kept.
            ("10.9.9.0-24&fd00:0:0:7::-64", "10.9.2.0-24&fd00:0:0:7::-64"),
            ("10.9.7.0-25&fd00:0:0:7::-64", "10.9.2.0-24&fd00:0:0:7::-64"),
            ("10.9.7.0-24&fd00:0:0:1::-64", "10.9.7.0-24&fd00:0:0:2::-64"),
        ] {
            let previous = Some(previous.parse().unwrap());
            let kept = Kept::of(&dual, previous, &taken);
            let drawn = allocate(&dual, kept, &taken, |_| 0).unwrap();
            assert_eq!(drawn.to_string(), got, "{previous:?}");
        }
        let single = config(r#"{"Network":"10.9.0.0/16"}"#);
        let previous = Some("10.9.7.0-24&fd00:0:0:7::-64".parse().unwrap());
        let kept = Kept::of(&single, previous, &taken);
        let drawn = allocate(&single, kept, &taken, |_| 0).unwrap();
        assert_eq!(drawn.to_string(), "10.9.7.0-24");
    }

    #[test]
    fn a_full_network_names_itself() {
        let config = config(r#"{"Network":"10.9.0.0/28"}"#);
        let taken = ["10.9.0.0-28".parse().unwrap()];
        assert_eq!(
            allocate(&config, Kept::default(), &taken, |_| 0)
                .unwrap_err()
                .to_string(),
            "out of subnets: every IPv4 subnet of 10.9.0.0/28 from 10.9.0.4/30 to 10.9.0.12/30 is leased"
        );
    }

    #[test]
    fn a_huge_network_is_searched_in_no_time() {
        let config = config(
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"8000::/1","IPv6SubnetLen":126}"#,
        );
        let taken = ["0.0.0.0-0&8000::-2".parse().unwrap()];
        let drawn = allocate(&config, Kept::default(), &taken, |_| 0).unwrap();
        assert_eq!(drawn.v6(), Some("c000::/126".parse::<Ipv6Net>().unwrap()));
    }

    #[test]
    fn the_last_subnet_of_the_address_space_ends_the_search() {
        let config = config(r#"{"Network":"255.255.255.240/28"}"#);
        assert_eq!(free(&config, &[]).len(), 3);
    }

    #[test]
    fn only_subnets_of_the_pool_and_of_every_enabled_family_are_compatible() {
        let config = config(r#"{"Network":"10.9.0.0/16","SubnetMax":"10.9.8.0"}"#);
        for (key, fits) in [
            ("10.9.1.0-24", true),
            ("10.9.8.0-24", true),
            ("10.9.0.0-24", false),
            ("10.9.9.0-24", false),
            ("10.9.2.0-25", false),
            ("10.9.2.0-23", false),
            ("10.9.2.0-24&fd00::-64", false),
            ("0.0.0.0-0&fd00::-64", false),
        ] {
            assert_eq!(compatible(&config, &key.parse().unwrap()), fits, "{key}");
        }
    }

    proptest! {
        #[test]
        fn free_is_what_walking_every_subnet_finds(
            taken in proptest::collection::vec((any::<u8>(), any::<u8>(), 17u8..=32), 0..40),
        ) {
            let config = config(r#"{"Network":"10.9.0.0/16","SubnetLen":25}"#);
            let taken: Vec<Ipv4Net> = taken
                .into_iter()
                .map(|(c, d, len)| Ipv4Net::new([10, 9, c, d].into(), len).unwrap().trunc())
                .collect();
            let network: Ipv4Net = "10.9.0.0/16".parse().unwrap();
            let walked: Vec<Ipv4Net> = network
                .subnets(25)
                .unwrap()
                .skip(1)
                .filter(|subnet| !taken.iter().any(|t| t.contains(subnet) || subnet.contains(t)))
                .take(CANDIDATES)
                .collect();
            prop_assert_eq!(free(&config, &taken), walked);
        }
    }
}
