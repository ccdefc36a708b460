//! Leases in a real etcd: acquiring, renewing and losing them, beside nodes that run the original.

#[path = "common/etcd.rs"]
mod common;
#[path = "common/seeded.rs"]
mod seeded;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use common::{Etcd, Follower, PREFIX, Patient, request, soon, subnets, vxlan_value};
use loden::lease::{BackendData, LeaseAttrs, LeaseExtension};
use loden::store::{AcquireRequest, Cause, LEASE_TTL, LostTo, RenewError, StoreError, StoreEvent};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample;

const CONFIG: &str = r#"{"Network":"198.18.0.0/16"}"#;

/// A network with room for three nodes: .4, .8 and .12.
const SMALL: &str = r#"{"Network":"198.18.0.0/28","SubnetLen":30}"#;

const SMALL_SUBNETS: [&str; 3] = ["198.18.0.4-30", "198.18.0.8-30", "198.18.0.12-30"];

#[test]
fn a_missing_configuration_is_named_and_found_when_it_appears() {
    let etcd = Etcd::start();
    etcd.run(async || {
        let store = etcd.store();
        let error = store.network_config().await.unwrap_err();
        let expected =
            format!("no network configuration at {PREFIX}/config in etcd at http://192.0.2.1:2379");
        assert!(error.to_string().starts_with(&expected), "{error}");
        let error = store.acquire(request(1)).await.unwrap_err();
        assert!(matches!(error, StoreError::ConfigMissing { .. }));
        etcd.configure("{");
        let error = store.network_config().await.unwrap_err();
        assert!(matches!(error, StoreError::Config { .. }), "{error}");
        etcd.configure(CONFIG);
        let config = store.network_config().await.unwrap();
        let network = config.ipv4.unwrap().network();
        assert_eq!(network.to_string(), "198.18.0.0/16");
    });
}

#[test]
fn keys_and_values_are_those_of_flannel() {
    let etcd = Etcd::start();
    etcd.configure(r#"{"Network":"198.18.0.0/22","EnableIPv6":true,"IPv6Network":"fd00::/62"}"#);
    etcd.run(async || {
        let store = etcd.store();
        let mac = |n: u8| format!(r#"{{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:{n:02x}"}}"#);
        let mut wanted = request(3);
        wanted.attrs = LeaseAttrs {
            public_ipv6: Some("2001:db8::3".parse().unwrap()),
            backend_type: "vxlan".to_owned(),
            backend_data: BackendData::new(&mac(4)),
            backend_v6_data: BackendData::new(&mac(6)),
            ..wanted.attrs
        };
        wanted.previous = Some(subnets("198.18.2.0-24&fd00:0:0:1::-64"));
        wanted.extension = LeaseExtension { ecn: true };
        let lease = store.acquire(wanted.clone()).await.unwrap();
        assert_eq!(Some(lease.subnets), wanted.previous);
        let key = "subnets/198.18.2.0-24&fd00:0:0:1::-64";
        assert_eq!(etcd.keys("subnets"), [key]);
        let (value, etcd_lease) = etcd.get(key).unwrap();
        assert_eq!(
            value,
            r#"{"PublicIP":"198.51.100.3","PublicIPv6":"2001:db8::3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:04"},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:06"}}"#
        );
        let left = etcd.ctl(&["lease", "timetolive", &format!("{etcd_lease:x}")]);
        assert!(left.contains("granted with TTL(86400s)"), "{left}");
        let beside = "subnet-extensions/198.18.2.0-24&fd00:0:0:1::-64";
        assert_eq!(
            etcd.get(beside).unwrap(),
            (r#"{"Ecn":true}"#.to_owned(), etcd_lease)
        );
        // Without anything to say beside it, there is no key beside it.
        let plain = store.acquire(request(9)).await.unwrap();
        assert_eq!(
            etcd.get(&format!("subnets/{}", plain.subnets)).unwrap().0,
            r#"{"PublicIP":"198.51.100.9","PublicIPv6":null}"#
        );
        assert_eq!(etcd.keys("subnet-e"), [beside]);
    });
}

#[test]
fn a_node_finds_its_lease_by_its_public_ip() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    let granted = etcd.grant(100);
    etcd.ctl(&[
        "put",
        &format!("{PREFIX}/subnets/198.18.77.0-24"),
        &vxlan_value(7),
        "--lease",
        &granted,
    ]);
    etcd.run(async || {
        let store = etcd.store();
        let mut wanted = request(7);
        wanted.previous = Some(subnets("198.18.5.0-24"));
        let lease = store.acquire(wanted).await.unwrap();
        assert_eq!(lease.subnets.to_string(), "198.18.77.0-24");
        let left = lease
            .expires
            .unwrap()
            .duration_since(std::time::SystemTime::now());
        assert!(left.unwrap() > LEASE_TTL / 2);
        let (value, now_on) = etcd.get("subnets/198.18.77.0-24").unwrap();
        assert_eq!(value, r#"{"PublicIP":"198.51.100.7","PublicIPv6":null}"#);
        assert_ne!(format!("{now_on:x}"), granted);
        assert_eq!(etcd.keys("subnets/").len(), 1);
    });
}

#[test]
fn a_lease_that_no_longer_fits_is_given_back_for_one_that_does() {
    let etcd = Etcd::start();
    etcd.configure(r#"{"Network":"198.18.0.0/16","SubnetLen":26}"#);
    let granted = etcd.grant(100);
    let key = format!("{PREFIX}/subnets/198.18.77.0-24");
    etcd.ctl(&["put", &key, &vxlan_value(7), "--lease", &granted]);
    etcd.run(async || {
        let lease = etcd.store().acquire(request(7)).await.unwrap();
        assert_eq!(lease.subnets.v4().unwrap().prefix_len(), 26);
        assert_eq!(
            etcd.keys("subnets/"),
            [format!("subnets/{}", lease.subnets)]
        );
    });
}

#[test]
fn a_family_that_comes_or_goes_leaves_the_other_as_it_was() {
    let etcd = Etcd::start();
    const DUAL: &str = r#"{"Network":"198.18.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
    etcd.run(async || {
        etcd.configure(CONFIG);
        let single = etcd.store().acquire(request(7)).await.unwrap().subnets;
        etcd.configure(DUAL);
        let mut wanted = request(7);
        wanted.attrs.public_ipv6 = Some("2001:db8::7".parse().unwrap());
        let dual = etcd.store().acquire(wanted.clone()).await.unwrap().subnets;
        assert_eq!(dual.v4(), single.v4());
        assert!(dual.v6().is_some());
        assert_eq!(etcd.keys("subnets/"), [format!("subnets/{dual}")]);
        // Without IPv4 the node has another first address; what it had is known by the subnets.
        etcd.configure(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#);
        wanted.attrs.public_ip = None;
        wanted.previous = Some(dual);
        let six = etcd.store().acquire(wanted.clone()).await.unwrap().subnets;
        assert_eq!((six.v4(), six.v6()), (None, dual.v6()));
        etcd.configure(DUAL);
        wanted.attrs.public_ip = request(7).attrs.public_ip;
        wanted.previous = Some(six);
        let back = etcd.store().acquire(wanted).await.unwrap().subnets;
        assert_eq!(back.v6(), dual.v6());
        assert_eq!(etcd.keys("subnets/"), [format!("subnets/{back}")]);
    });
}

#[test]
fn the_subnets_of_the_run_before_are_taken_only_if_both_are_free_and_fit() {
    let etcd = Etcd::start();
    let config = r#"{"Network":"198.18.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
    etcd.configure(config);
    etcd.put("subnets/198.18.9.0-24&fd00:0:0:9::-64", &vxlan_value(9));
    etcd.run(async || {
        for (node, previous, is_taken) in [
            (1, "198.18.1.0-24&fd00:0:0:1::-64", true),
            // The IPv4 subnet is free, the IPv6 one is not.
            (2, "198.18.2.0-24&fd00:0:0:9::-64", false),
            (3, "198.18.9.0-24&fd00:0:0:3::-64", false),
            // Not of this network any more.
            (4, "198.18.4.0-25&fd00:0:0:4::-64", false),
            (5, "198.18.5.0-24", false),
        ] {
            let mut wanted = request(node);
            wanted.previous = Some(subnets(previous));
            let lease = etcd.store().acquire(wanted.clone()).await.unwrap();
            assert_eq!(
                Some(lease.subnets) == wanted.previous,
                is_taken,
                "{previous}"
            );
        }
        let v6: BTreeSet<String> = etcd
            .keys("subnets/")
            .iter()
            .map(|k| k.split('&').nth(1).unwrap().to_owned())
            .collect();
        assert_eq!(v6.len(), 6);
    });
}

#[test]
fn a_cloned_machine_does_not_get_the_subnet_of_its_original() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.run(async || {
        let cloned = |node| AcquireRequest {
            previous: Some(subnets("198.18.42.0-24")),
            ..request(node)
        };
        let (a, b) = (etcd.store(), etcd.store());
        let (a, b) = tokio::join!(a.acquire(cloned(1)), b.acquire(cloned(2)));
        let both = [a.unwrap().subnets, b.unwrap().subnets];
        assert_ne!(both[0], both[1]);
        assert!(both.contains(&subnets("198.18.42.0-24")));
    });
}

#[test]
fn a_reservation_stays_permanent() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    let key = "subnets/198.18.88.0-24";
    etcd.put(key, &vxlan_value(8));
    etcd.run(async || {
        let store = etcd.store();
        let mut wanted = request(8);
        wanted.previous = Some(subnets("198.18.5.0-24"));
        for _restart in 0..2 {
            let lease = store.acquire(wanted.clone()).await.unwrap();
            assert_eq!(lease.subnets.to_string(), "198.18.88.0-24");
            assert_eq!(lease.expires, None);
            assert_eq!(store.renew(&lease).await.unwrap(), lease);
            let (value, etcd_lease) = etcd.get(key).unwrap();
            assert_eq!(etcd_lease, 0);
            assert_eq!(value, r#"{"PublicIP":"198.51.100.8","PublicIPv6":null}"#);
        }
        let version = etcd.ctl(&["get", &format!("{PREFIX}/{key}"), "-w", "fields"]);
        assert!(
            version.contains("\"Version\" : 2"),
            "it is written once: {version}"
        );
    });
}

/// One race: which subnets are free, and who asks when, for what.
#[derive(Debug)]
struct Round {
    free: Vec<&'static str>,
    /// Of each contender: how long it waits, and whether it asks for the first free subnet by name.
    contenders: Vec<(Duration, bool)>,
}

impl Round {
    /// The round of a seed. There are always more contenders than free subnets.
    fn of(seed: u64) -> Self {
        // Half of the rounds are about the last one.
        let free = prop_oneof![
            sample::subsequence(&SMALL_SUBNETS[..], 1),
            sample::subsequence(&SMALL_SUBNETS[..], 1..=3),
        ];
        let contender = (0_u64..3000, any::<bool>());
        let round = (free, vec(contender, 2..=5)).prop_map(|(free, mut contenders)| {
            contenders.resize(contenders.len().max(free.len() + 1), (0, false));
            let wait = |(micros, named)| (Duration::from_micros(micros), named);
            let contenders = contenders.into_iter().map(wait).collect();
            Self { free, contenders }
        });
        seeded::value(&round, seed)
    }
}

#[test]
fn stores_that_race_for_the_last_free_subnet_never_share_one() {
    let seeds = seeded::seeds(30);
    let etcd = Etcd::start();
    etcd.configure(SMALL);
    etcd.run(async || {
        let stores: Vec<Patient> = (0..5).map(|_| etcd.store()).collect();
        for seed in seeds.clone() {
            let round = Round::of(seed);
            etcd.delete("subnets/", true);
            for (taken, node) in SMALL_SUBNETS.iter().zip(100..) {
                if !round.free.contains(taken) {
                    etcd.put(&format!("subnets/{taken}"), &vxlan_value(node));
                }
            }
            let named = subnets(round.free[0]);
            let contenders = round.contenders.iter().zip(&stores).zip(1..);
            let acquired = contenders.map(async |((&(wait, asks), store), node)| {
                tokio::time::sleep(wait).await;
                let previous = asks.then_some(named);
                let request = AcquireRequest {
                    previous,
                    ..request(node)
                };
                store.acquire(request).await
            });
            let mut got = Vec::new();
            for lease in futures_util::future::join_all(acquired).await {
                match lease {
                    Ok(lease) => got.push(lease.subnets),
                    Err(StoreError::OutOfSubnets { .. }) => {}
                    Err(error) => unreachable!("seed {seed}: {error}"),
                }
            }
            got.sort();
            let free: Vec<_> = round.free.iter().map(|key| subnets(key)).collect();
            assert_eq!(got, free, "seed {seed}: {round:?}");
        }
    });
    println!(
        "{} rounds, seeds {seeds:?}: no subnet twice",
        seeds.clone().count()
    );
}

/// Keys with the same IPv6 subnet differ if their IPv4 subnets do: no condition on one key sees that.
#[test]
fn nodes_with_two_families_never_share_a_subnet_of_either() {
    let etcd = Etcd::start();
    etcd.configure(
        r#"{"Network":"198.18.0.0/24","SubnetLen":30,"EnableIPv6":true,"IPv6Network":"fd00::/60","IPv6SubnetLen":64}"#,
    );
    etcd.run(async || {
        let stores: Vec<Patient> = (0..8).map(|_| etcd.store()).collect();
        for round in 0..8 {
            etcd.delete("subnets/", true);
            let acquired = futures_util::future::join_all(
                stores
                    .iter()
                    .zip(1..)
                    .map(|(store, node)| store.acquire(request(node))),
            )
            .await;
            let got: Vec<_> = acquired.into_iter().map(|l| l.unwrap().subnets).collect();
            for (n, a) in got.iter().enumerate() {
                assert!(
                    got[..n].iter().all(|b| !a.overlaps(b)),
                    "round {round}: {got:?}"
                );
            }
            // Nothing is left behind by those who had to give way.
            assert_eq!(etcd.keys("subnets/").len(), stores.len());
        }
    });
}

#[test]
fn a_lease_is_renewed_only_while_it_is_ours() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.run(async || {
        let store = etcd.store();
        let lease = store.acquire(request(1)).await.unwrap();
        let key = format!("subnets/{}", lease.subnets);
        let before = etcd.get(&key).unwrap();
        let renewed = store.renew(&lease).await.unwrap();
        assert!(renewed.expires >= lease.expires);
        let after = etcd.get(&key).unwrap();
        assert_eq!(before.0, after.0);
        assert_ne!(before.1, after.1, "a new etcd lease holds it");

        let error = |e: RenewError| e.to_string();
        let theirs = vxlan_value(9);
        etcd.put(&key, &theirs);
        let lost = store.renew(&renewed).await.map_err(error).unwrap_err();
        assert_eq!(
            lost,
            format!(
                "lease {} is lost: node 198.51.100.9 holds it",
                lease.subnets
            )
        );
        assert_eq!(
            etcd.get(&key).unwrap().0,
            theirs,
            "what is not ours is not touched"
        );

        etcd.delete(&key, false);
        let lost = store.renew(&renewed).await.map_err(error).unwrap_err();
        assert_eq!(
            lost,
            format!("lease {} is lost: it was deleted", lease.subnets)
        );
        assert!(
            etcd.keys("subnets/").is_empty(),
            "nothing is written for a lost lease"
        );
    });
}

#[test]
fn losing_our_own_lease_is_reported_once_and_to_whom() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.run(async || {
        let store = etcd.store();
        let mut follower = Follower::new(store.watch());
        let lease = store.acquire(request(1)).await.unwrap();
        follower
            .until("our lease", |f| f.leases.contains_key(&lease.subnets))
            .await;
        let key = format!("subnets/{}", lease.subnets);
        etcd.delete(&key, false);
        follower.until("the loss", |f| !f.lost.is_empty()).await;
        let subnets = lease.subnets;
        let nobody = StoreEvent::OwnLost {
            subnets,
            to: LostTo::Nobody,
        };
        assert_eq!(follower.lost, [nobody]);

        let again = AcquireRequest {
            previous: Some(subnets),
            ..request(1)
        };
        assert_eq!(store.acquire(again).await.unwrap().subnets, subnets);
        follower
            .until("our lease again", |f| f.leases.contains_key(&subnets))
            .await;
        etcd.put(&key, &vxlan_value(9));
        follower
            .until("the second loss", |f| f.lost.len() > 1)
            .await;
        let to = LostTo::Node(Ipv4Addr::new(198, 51, 100, 9).into());
        assert_eq!(follower.lost[1], StoreEvent::OwnLost { subnets, to });
    });
}

#[test]
fn another_daemon_with_our_public_ip_is_noticed() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.run(async || {
        let (store, twin) = (etcd.store(), etcd.store());
        let mut follower = Follower::new(store.watch());
        let lease = store.acquire(request(1)).await.unwrap();
        let renewed = store.renew(&lease).await.unwrap();
        let second = store.acquire(request(2)).await;
        assert!(second.is_ok());
        let lease = store.acquire(request(1)).await.unwrap();
        assert_eq!(lease.subnets, renewed.subnets);
        follower.until("our lease", |f| f.leases.len() == 2).await;
        assert_eq!(follower.problems, [], "our own writes are known");
        assert_eq!(
            twin.acquire(request(1)).await.unwrap().subnets,
            lease.subnets
        );
        follower.until("the twin", |f| !f.problems.is_empty()).await;
        let ip = Ipv4Addr::new(198, 51, 100, 1).into();
        assert_eq!(follower.problems[0].cause, Cause::Twin(ip));
        assert_eq!(follower.lost, []);
    });
}

#[test]
fn a_claim_on_everything_locks_nobody_out_and_takes_nothing_away() {
    let etcd = Etcd::start();
    etcd.configure(SMALL);
    // Earlier than all.
    etcd.put("subnets/198.18.0.0-28", &vxlan_value(9));
    etcd.run(async || {
        let (first, second) = (etcd.store(), etcd.store());
        let held = first.acquire(request(1)).await.unwrap();
        let other = second.acquire(request(2)).await.unwrap();
        assert_ne!(held.subnets, other.subnets);
        assert_eq!(
            etcd.store().acquire(request(1)).await.unwrap().subnets,
            held.subnets
        );
        first.renew(&held).await.unwrap();
        // Known from the run before only.
        etcd.delete(&format!("subnets/{}", held.subnets), false);
        let asking = AcquireRequest {
            previous: Some(held.subnets),
            ..request(1)
        };
        assert_eq!(
            etcd.store().acquire(asking).await.unwrap().subnets,
            held.subnets
        );
        assert!(
            etcd.get("subnets/198.18.0.0-28").is_some(),
            "not ours to remove"
        );
    });
}

#[test]
fn our_own_lease_that_nobody_can_read_any_more_is_told_and_renewing_it_ends_that() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.run(async || {
        let store = etcd.store();
        let lease = store.acquire(request(1)).await.unwrap();
        let key = format!("subnets/{}", lease.subnets);
        let mut follower = Follower::new(store.watch());
        follower.until("our lease", |f| f.leases.len() == 1).await;
        etcd.put(&key, "{");
        let said = |f: &Follower, cause: &Cause| {
            let ours = format!("{PREFIX}/{key} (ours)");
            let mut problems = f.problems.iter();
            problems.any(|p| p.subject == ours && p.cause == *cause)
        };
        follower
            .until("the damage", |f| said(f, &Cause::Overwritten))
            .await;
        assert_eq!(follower.lost, []);
        store.renew(&lease).await.unwrap();
        follower
            .until("the repair", |f| said(f, &Cause::Solved))
            .await;
        assert_eq!(follower.withdrawn, []);
        assert_eq!(follower.problems.len(), 4, "{:?}", follower.problems);
    });
}

#[test]
fn an_extension_counts_only_with_the_lease_it_was_written_with() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.run(async || {
        let store = etcd.store();
        let wanted = AcquireRequest {
            extension: LeaseExtension { ecn: true },
            ..request(1)
        };
        let lease = store.acquire(wanted).await.unwrap();
        let mut follower = Follower::new(etcd.store().watch());
        follower
            .until("the lease", |f| f.leases.contains_key(&lease.subnets))
            .await;
        assert!(follower.leases[&lease.subnets].extension.ecn);
        // A renewal keeps it, and nobody sees it gone in between.
        store.renew(&lease).await.unwrap();
        etcd.put("subnets/198.18.200.0-24", &vxlan_value(2));
        follower
            .until("the renewal", |f| {
                assert!(f.leases[&lease.subnets].extension.ecn);
                f.has("198.18.200.0-24")
            })
            .await;
        // The node goes back to flannel, which writes the lease alone.
        etcd.put(&format!("subnets/{}", lease.subnets), &vxlan_value(1));
        follower
            .until("flannel", |f| !f.leases[&lease.subnets].extension.ecn)
            .await;
        assert_eq!(follower.leases[&lease.subnets].attrs.backend_type, "vxlan");
    });
}

#[test]
fn a_network_of_ipv6_alone_has_an_owner_per_node() {
    let etcd = Etcd::start();
    etcd.configure(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#);
    etcd.run(async || {
        let wanted = |n: u16| AcquireRequest {
            attrs: LeaseAttrs {
                public_ipv6: Some(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n)),
                ..LeaseAttrs::default()
            },
            ..request(0)
        };
        let a = etcd.store().acquire(wanted(1)).await.unwrap().subnets;
        let b = etcd.store().acquire(wanted(2)).await.unwrap().subnets;
        assert_ne!(a, b);
        assert_eq!(etcd.store().acquire(wanted(1)).await.unwrap().subnets, a);
        assert!(a.to_string().starts_with("0.0.0.0-0&fd00:"));
        let (value, _) = etcd.get(&format!("subnets/{a}")).unwrap();
        assert_eq!(
            value,
            r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1"}"#
        );
    });
}

#[test]
fn a_lease_that_runs_out_is_withdrawn() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.run(async || {
        let mut follower = Follower::new(etcd.store().watch());
        let key = format!("{PREFIX}/subnets/198.18.7.0-24");
        // One that runs out before it is written or seen shows nothing.
        for seconds in [2, 8, 32] {
            let granted = etcd.grant(seconds);
            let value = vxlan_value(7);
            etcd.try_ctl(&["put", &key, &value, "--lease", &granted], "60s");
            let marker = format!("198.18.{}.0-24", 100 + seconds);
            etcd.put(&format!("subnets/{marker}"), &vxlan_value(8));
            follower
                .until("what came after it", |f| f.has(&marker))
                .await;
            assert_eq!(follower.leases[&subnets(&marker)].expires, None);
            if follower.has("198.18.7.0-24") {
                break;
            }
            etcd.delete(&format!("subnets/{marker}"), false);
            follower.until("the next", |f| !f.has(&marker)).await;
        }
        assert!(follower.leases[&subnets("198.18.7.0-24")].expires.is_some());
        soon(
            "the end",
            follower.until("its end", |f| !f.has("198.18.7.0-24")),
        )
        .await;
        assert_eq!(follower.leases.len(), 1, "{:?}", follower.keys());
    });
}
