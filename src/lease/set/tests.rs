use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use proptest::prelude::*;

use super::*;
use crate::lease::{LeaseAttrs, LeaseExtension};

fn config() -> NetworkConfig {
    NetworkConfig::parse(br#"{"Network":"10.9.0.0/24","SubnetLen":27}"#).unwrap()
}

fn dual() -> NetworkConfig {
    let text = br#"{"Network":"10.9.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
    NetworkConfig::parse(text).unwrap()
}

fn lease(key: &str, node: u8) -> Lease {
    Lease {
        subnets: key.parse().unwrap(),
        attrs: LeaseAttrs {
            public_ip: Some(Ipv4Addr::new(192, 0, 2, node)),
            ..LeaseAttrs::default()
        },
        expires: None,
        extension: LeaseExtension::default(),
    }
}

fn set(own: &str, config: &NetworkConfig) -> LeaseSet {
    LeaseSet::new(own.parse().unwrap(), config)
}

fn reasons(applied: &Applied) -> Vec<Refusal> {
    applied
        .refused
        .iter()
        .map(|refused| refused.reason.clone())
        .collect()
}

#[test]
fn our_own_lease_never_shows_whatever_the_store_says() {
    let mut set = set("10.9.0.32-27", &config());
    let own = lease("10.9.0.32-27", 1);
    for _ in 0..3 {
        assert_eq!(set.apply_snapshot(vec![own.clone()]), Applied::default());
        assert_eq!(set.apply_snapshot(vec![]), Applied::default());
    }
    assert_eq!(
        set.apply_delta([LeaseDelta::Put(own.clone())]),
        Applied::default()
    );
    assert_eq!(
        set.apply_delta([LeaseDelta::Delete(own.subnets)]),
        Applied::default()
    );
}

#[test]
fn changed_attributes_and_extensions_are_updates_and_a_renewal_is_not() {
    let mut set = set("10.9.0.32-27", &config());
    let old = lease("10.9.0.64-27", 2);
    set.apply_snapshot(vec![old.clone()]);
    let renewed = Lease {
        expires: Some(std::time::UNIX_EPOCH),
        ..old
    };
    assert_eq!(
        set.apply_snapshot(vec![renewed.clone()]),
        Applied::default()
    );
    assert_eq!(
        set.leases().next(),
        Some(&renewed),
        "the expiry is kept up to date all the same"
    );
    let moved = lease("10.9.0.64-27", 3);
    let ecn = Lease {
        extension: LeaseExtension { ecn: true },
        ..moved.clone()
    };
    for (from, to) in [(&renewed, &moved), (&moved, &ecn)] {
        let change = LeaseChange::Updated {
            old: from.clone(),
            new: to.clone(),
        };
        assert_eq!(set.apply_snapshot(vec![to.clone()]).changes, [change]);
    }
}

#[test]
fn a_node_that_moves_is_removed_before_it_is_added() {
    let mut set = set("10.9.0.32-27", &config());
    let (before, after) = (lease("10.9.0.128-27", 2), lease("10.9.0.64-27", 2));
    set.apply_snapshot(vec![before.clone()]);
    let moved = [
        LeaseChange::Removed(before.clone()),
        LeaseChange::Added(after.clone()),
    ];
    assert_eq!(
        set.clone().apply_snapshot(vec![after.clone()]).changes,
        moved
    );
    let deltas = [LeaseDelta::Put(after), LeaseDelta::Delete(before.subnets)];
    assert_eq!(set.apply_delta(deltas).changes, moved);
}

#[test]
fn of_a_key_that_comes_and_goes_in_one_batch_only_the_end_counts() {
    let mut set = set("10.9.0.32-27", &config());
    let peer = lease("10.9.0.64-27", 2);
    let put = || LeaseDelta::Put(peer.clone());
    let delete = || LeaseDelta::Delete(peer.subnets);
    assert_eq!(set.apply_delta([put(), delete()]), Applied::default());
    assert_eq!(
        set.apply_delta([delete(), put()]).changes,
        [LeaseChange::Added(peer.clone())]
    );
    assert_eq!(set.apply_delta([delete(), put()]), Applied::default());
    assert_eq!(
        set.apply_delta([put(), delete()]).changes,
        [LeaseChange::Removed(peer.clone())]
    );
}

#[test]
fn leases_that_would_take_what_is_not_theirs_are_refused_by_name_and_once() {
    let mut set = set("10.9.0.32-27", &config());
    let good = lease("10.9.0.64-27", 2);
    set.apply_snapshot(vec![good.clone()]);
    let listing = vec![
        good.clone(),
        lease("10.9.0.0-26", 3),
        lease("10.9.0.40-29", 3),
        lease("10.9.0.72-29", 4),
        lease("10.8.0.0-27", 5),
        lease("0.0.0.0-0&fd00::-64", 6),
        lease("0.0.0.0-1", 7),
    ];
    let applied = set.apply_snapshot(listing.clone());
    assert_eq!(applied.changes, []);
    assert_eq!(
        reasons(&applied),
        [
            Refusal::NoEnabledFamily,
            Refusal::OutsideNetwork {
                subnet: "0.0.0.0/1".into(),
                network: "10.9.0.0/24".into()
            },
            Refusal::OutsideNetwork {
                subnet: "10.8.0.0/27".into(),
                network: "10.9.0.0/24".into()
            },
            Refusal::TooLarge {
                subnet: "10.9.0.0/26".into(),
                subnet_len: 27
            },
            Refusal::OverlapsOwn { own: set.own() },
            Refusal::OverlapsPeer { with: good.subnets },
        ]
    );
    assert!(
        applied.refused[5]
            .to_string()
            .contains("10.9.0.72-29 of 192.0.2.4 is refused")
    );
    assert_eq!(
        set.apply_snapshot(listing),
        Applied::default(),
        "nothing new, nothing said"
    );
    assert_eq!(set.refused().len(), 6);
}

#[test]
fn a_refused_lease_is_admitted_once_the_way_is_free() {
    let mut set = set("10.9.0.32-27", &config());
    let (first, second) = (lease("10.9.0.64-27", 2), lease("10.9.0.72-29", 3));
    set.apply_delta([LeaseDelta::Put(first.clone())]);
    assert_eq!(
        set.apply_delta([LeaseDelta::Put(second.clone())]).changes,
        []
    );
    assert_eq!(
        set.apply_delta([LeaseDelta::Delete(first.subnets)]).changes,
        [LeaseChange::Removed(first), LeaseChange::Added(second)]
    );
    assert_eq!(set.refused().len(), 0);
}

#[test]
fn either_family_can_overlap_and_a_family_that_is_off_does_not_matter() {
    let mut set = set("10.9.1.0-24&fd00:0:0:1::-64", &dual());
    let good = lease("10.9.2.0-24&fd00:0:0:2::-64", 2);
    let applied = set.apply_snapshot(vec![
        good.clone(),
        lease("10.9.3.0-24&fd00:0:0:2::-64", 3),
        lease("10.9.4.0-24&fd00:0:0:1::-64", 4),
        lease("10.9.5.0-24", 5),
    ]);
    assert_eq!(applied.changes.len(), 2);
    assert_eq!(
        reasons(&applied),
        [
            Refusal::OverlapsPeer { with: good.subnets },
            Refusal::OverlapsOwn { own: set.own() },
        ]
    );
    let mut v4_only = self::set("10.9.0.32-27", &config());
    let outside_v6 = lease("10.9.0.64-27&2001:db8::-64", 2);
    assert_eq!(v4_only.apply_snapshot(vec![outside_v6]).changes.len(), 1);
}

#[test]
fn after_a_rebase_only_what_no_longer_fits_is_removed() {
    let mut set = set("10.9.0.32-27", &config());
    let (near, far) = (lease("10.9.0.64-27", 2), lease("10.9.0.128-27", 3));
    let waiting = lease("10.9.0.40-29", 4);
    set.apply_snapshot(vec![near.clone(), far, waiting.clone()]);
    let applied = set.rebase("10.9.0.64-27".parse().unwrap(), &config());
    assert_eq!(
        applied.changes,
        [LeaseChange::Removed(near), LeaseChange::Added(waiting)]
    );
    assert_eq!(set.leases().count(), 2);
}

/// Replays changes the way a backend does, and fails on one that does not fit what is there.
#[derive(Default, Clone, Debug, PartialEq)]
struct Programmed(BTreeMap<Subnets, Lease>);

impl Programmed {
    fn program(&mut self, changes: &[LeaseChange]) {
        for change in changes {
            match change {
                LeaseChange::Added(lease) => {
                    let clash = self.0.keys().find(|key| key.overlaps(&lease.subnets));
                    assert_eq!(clash, None, "added over something: {lease:?}");
                    self.0.insert(lease.subnets, lease.clone());
                }
                LeaseChange::Updated { old, new } => {
                    assert_ne!(old, new);
                    assert_eq!(self.0.insert(new.subnets, new.clone()), Some(old.clone()));
                }
                LeaseChange::Removed(lease) => {
                    assert_eq!(self.0.remove(&lease.subnets), Some(lease.clone()));
                }
            }
        }
    }
}

/// The rules of admission by comparing everything with everything: what was in and is still offered stays;
/// the others follow in the order of keys.
fn oracle(
    before: &Programmed,
    offered: &BTreeMap<Subnets, Lease>,
    own: &Subnets,
) -> BTreeMap<Subnets, Lease> {
    let mut admitted: BTreeMap<Subnets, Lease> = BTreeMap::new();
    for kept in [true, false] {
        for (key, lease) in offered {
            let net = key.v4().unwrap();
            let network: Ipv4Net = "10.9.0.0/24".parse().unwrap();
            let fits = network.contains(&net) && net.prefix_len() >= 27 && !key.overlaps(own);
            let free = !admitted.keys().any(|other| other.overlaps(key));
            if before.0.contains_key(key) == kept && fits && free {
                admitted.insert(*key, lease.clone());
            }
        }
    }
    admitted
}

fn any_lease() -> impl Strategy<Value = Lease> {
    (
        prop_oneof![9 => Just(9u8), 1 => Just(8u8)],
        0u8..=255,
        26u8..=30,
        1u8..4,
    )
        .prop_map(|(second, last, len, node)| {
            let net = Ipv4Net::new(Ipv4Addr::new(10, second, 0, last), len).unwrap();
            lease(&Subnets::new(Some(net), None).unwrap().to_string(), node)
        })
}

proptest! {
    #[test]
    fn changes_always_lead_to_what_the_oracle_admits(
        rounds in proptest::collection::vec(
            (any::<bool>(), proptest::collection::vec((any::<bool>(), any_lease()), 0..12)),
            1..12,
        ),
    ) {
        let mut set = set("10.9.0.32-27", &config());
        let mut offered: BTreeMap<Subnets, Lease> = BTreeMap::new();
        let mut programmed = Programmed::default();
        for (as_snapshot, ops) in rounds {
            let mut deltas = Vec::new();
            for (put, lease) in ops {
                if put {
                    offered.insert(lease.subnets, lease.clone());
                    deltas.push(LeaseDelta::Put(lease));
                } else {
                    // Mostly something that is there.
                    let key = offered.keys().nth(usize::from(lease.subnets.v4().unwrap().addr().octets()[3]) % offered.len().max(1)).copied().unwrap_or(lease.subnets);
                    offered.remove(&key);
                    deltas.push(LeaseDelta::Delete(key));
                }
            }
            let expected = oracle(&programmed, &offered, &set.own());
            let applied = if as_snapshot {
                set.apply_snapshot(offered.values().cloned().collect())
            } else {
                set.apply_delta(deltas)
            };
            programmed.program(&applied.changes);
            prop_assert_eq!(&programmed.0, &expected);
            prop_assert_eq!(set.leases().cloned().collect::<Vec<_>>(), expected.into_values().collect::<Vec<_>>());
            prop_assert_eq!(set.leases().len() + set.refused().len(), offered.len() - usize::from(offered.contains_key(&set.own())));
        }
    }
}
