use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const CLUSTER: u64 = 7;

fn now(seconds: u64) -> Now {
    Now {
        wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds),
        monotonic: Duration::from_secs(seconds),
    }
}

const fn at(revision: i64) -> Position {
    Position {
        cluster: CLUSTER,
        revision,
    }
}

fn view() -> View {
    View::new(Keys::new("/n"))
}

/// A key of its own memory, from which items are borrowed.
#[derive(Debug, Clone)]
struct Stored {
    key: String,
    value: String,
    etcd_lease: i64,
    mod_revision: i64,
}

impl Stored {
    fn lease(subnet: u8, node: u8, mod_revision: i64) -> Self {
        Self {
            key: format!("/n/subnets/198.18.{subnet}.0-24"),
            value: format!(r#"{{"PublicIP":"198.51.100.{node}","PublicIPv6":null}}"#),
            etcd_lease: 1,
            mod_revision,
        }
    }

    fn item(&self) -> Item<'_> {
        Item {
            key: self.key.as_bytes(),
            value: self.value.as_bytes(),
            etcd_lease: self.etcd_lease,
            mod_revision: self.mod_revision,
        }
    }
}

fn keys(view: &View) -> Vec<String> {
    let leases = view.leases();
    leases
        .iter()
        .map(|lease| lease.subnets.to_string())
        .collect()
}

#[test]
fn a_listing_of_the_same_history_withdraws_what_it_lacks_at_once() {
    let mut view = view();
    let (a, b) = (Stored::lease(1, 1, 3), Stored::lease(2, 2, 4));
    view.replace([a.item(), b.item()], at(4), now(0));
    view.replace([b.item()], at(9), now(1));
    assert_eq!(keys(&view), ["198.18.2.0-24"]);
}

#[test]
fn a_store_is_another_one_if_its_past_is() {
    let (a, b) = (Stored::lease(1, 1, 3), Stored::lease(2, 2, 4));
    let missing = Stored::lease(3, 3, 9);
    for (what, listing, later) in [
        ("an earlier revision", vec![&b], at(3)),
        (
            "another cluster",
            vec![&b, &missing],
            Position {
                cluster: 1,
                revision: 9,
            },
        ),
        // At revision 4 there were `a` and `b` alone; a third key cannot have been there already.
        ("another past", vec![&Stored::lease(4, 4, 2)], at(9)),
    ] {
        let mut view = view();
        view.replace([a.item(), b.item()], at(4), now(0));
        let found = view.replace(listing.iter().map(|s| s.item()), later, now(1));
        assert!(keys(&view).contains(&"198.18.1.0-24".to_owned()), "{what}");
        assert!(
            found.values().any(|c| matches!(c, Cause::DataLoss { .. })),
            "{what}"
        );
        // What is kept is not taken for what is stored.
        assert_eq!(
            view.holds(&"198.18.1.0-24".parse().unwrap()),
            None,
            "{what}"
        );
        // A second loss does not prolong the time.
        view.replace([b.item()], at(1), now(2));
        let last = 1 + GRACE.as_secs();
        assert!(
            view.expire_orphans(now(last - 1).monotonic).0.is_empty(),
            "{what}"
        );
        let (gone, solved) = view.expire_orphans(now(last).monotonic);
        assert!(
            gone.contains(&LeaseDelta::Delete("198.18.1.0-24".parse().unwrap())),
            "{what}"
        );
        let (_, later) = view.expire_orphans(now(last + 1).monotonic);
        let solved: Vec<_> = solved.into_iter().chain(later).collect();
        assert_eq!(
            solved,
            [("/n/subnets/".to_owned(), Cause::Solved)],
            "{what}"
        );
    }
}

#[test]
fn a_lost_lease_gives_way_to_whoever_takes_its_addresses_and_to_its_own_node() {
    let (a, b) = (Stored::lease(1, 1, 3), Stored::lease(2, 2, 4));
    let mut view = view();
    view.replace([a.item(), b.item()], at(4), now(0));
    view.replace([], at(1), now(1));
    assert_eq!(view.len(), 2);
    let smaller = Stored {
        key: "/n/subnets/198.18.1.128-26".to_owned(),
        ..Stored::lease(1, 9, 2)
    };
    let (deltas, _) = view.apply([Change::Put(smaller.item())], now(2));
    assert!(deltas.contains(&LeaseDelta::Delete("198.18.1.0-24".parse().unwrap())));
    let moved = Stored::lease(7, 2, 3);
    let (deltas, _) = view.apply([Change::Put(moved.item())], now(2));
    assert!(deltas.contains(&LeaseDelta::Delete("198.18.2.0-24".parse().unwrap())));
    assert_eq!(keys(&view), ["198.18.1.128-26", "198.18.7.0-24"]);
    assert!(view.expire_orphans(Duration::MAX).0.is_empty());
}

#[test]
fn an_extension_is_of_a_lease_only_if_both_were_written_at_once() {
    let mut view = view();
    let lease = Stored::lease(1, 1, 5);
    let beside = |mod_revision, value: &str| Stored {
        key: "/n/subnet-extensions/198.18.1.0-24".to_owned(),
        value: value.to_owned(),
        mod_revision,
        etcd_lease: 1,
    };
    let json = extension::to_json(LeaseExtension { ecn: true }).unwrap();
    assert_eq!(extension::to_json(LeaseExtension::default()), None);
    let ecn = |view: &View| view.leases()[0].extension.ecn;
    let together = beside(5, &json);
    view.replace([together.item(), lease.item()], at(5), now(0));
    assert!(ecn(&view));
    let alone = Stored::lease(1, 1, 6);
    let (deltas, _) = view.apply([Change::Put(alone.item())], now(1));
    assert!(!ecn(&view) && deltas.len() == 1);
    let bad = beside(6, "[]");
    let (_, found) = view.apply([Change::Put(bad.item())], now(1));
    assert!(!ecn(&view) && found.len() == 1);
    let unknown = beside(6, r#"{"Ecn":true,"Later":1}"#);
    view.apply([Change::Put(unknown.item())], now(1));
    assert!(ecn(&view));
}

#[test]
fn keys_are_shown_short_and_without_what_a_terminal_obeys() {
    let long = format!("/n/subnets/\u{1b}[2J{}", "x".repeat(1000));
    let text = shown(long.as_bytes());
    assert!(
        text.chars().count() < 220 && !text.contains('\u{1b}'),
        "{text}"
    );
}

/// What may happen to one of a few keys.
#[derive(Debug, Clone)]
enum Step {
    Put { subnet: u8, node: u8 },
    Bad { subnet: u8 },
    Delete { subnet: u8 },
    List,
}

fn step() -> impl Strategy<Value = Step> {
    let subnet = 1u8..6;
    prop_oneof![
        (subnet.clone(), 1u8..9).prop_map(|(subnet, node)| Step::Put { subnet, node }),
        subnet.clone().prop_map(|subnet| Step::Bad { subnet }),
        subnet.prop_map(|subnet| Step::Delete { subnet }),
        Just(Step::List),
    ]
}

proptest! {
    /// The oracle is a map of the last good value per key that exists; what is heard is put together like a
    /// receiver does.
    #[test]
    fn whatever_happens_the_view_and_its_deltas_are_the_last_good_state(
        steps in proptest::collection::vec(step(), 0..60),
    ) {
        let mut view = view();
        view.replace([], at(1), now(0));
        let mut good: BTreeMap<u8, u8> = BTreeMap::new();
        let mut stored: BTreeMap<u8, Stored> = BTreeMap::new();
        let mut heard: BTreeMap<String, String> = BTreeMap::new();
        let mut bad = BTreeSet::new();
        for (n, step) in steps.into_iter().enumerate() {
            let revision = i64::try_from(n).unwrap() + 2;
            let time = now(revision.unsigned_abs());
            let (deltas, found) = match step {
                Step::Put { subnet, node } => {
                    let lease = Stored::lease(subnet, node, revision);
                    good.insert(subnet, node);
                    let said = view.apply([Change::Put(lease.item())], time);
                    stored.insert(subnet, lease);
                    said
                }
                Step::Bad { subnet } => {
                    let lease = Stored { value: "{".to_owned(), ..Stored::lease(subnet, 1, revision) };
                    let said = view.apply([Change::Put(lease.item())], time);
                    stored.insert(subnet, lease);
                    said
                }
                Step::Delete { subnet } => {
                    good.remove(&subnet);
                    stored.remove(&subnet);
                    let key = Stored::lease(subnet, 1, 1).key;
                    let said = view.apply([Change::Delete { key: key.as_bytes() }], time);
                    view.advance(revision);
                    said
                }
                Step::List => {
                    let listing = stored.values().map(Stored::item);
                    (Vec::new(), view.replace(listing, at(revision), time))
                }
            };
            for (subject, cause) in found {
                if cause == Cause::Solved {
                    prop_assert!(bad.remove(&subject), "{} was never wrong", subject);
                } else {
                    bad.insert(subject);
                }
            }
            let wrong = stored.values().filter(|stored| stored.value == "{");
            let wrong: BTreeSet<String> = wrong.map(|stored| stored.key.clone()).collect();
            prop_assert_eq!(&bad, &wrong);
            for delta in deltas {
                match delta {
                    LeaseDelta::Put(lease) => {
                        let node = lease.attrs.node().unwrap().to_string();
                        heard.insert(lease.subnets.to_string(), node);
                    }
                    LeaseDelta::Delete(subnets) => {
                        heard.remove(&subnets.to_string());
                    }
                }
            }
            let expected: BTreeMap<String, String> = good
                .iter()
                .map(|(subnet, node)| (format!("198.18.{subnet}.0-24"), format!("198.51.100.{node}")))
                .collect();
            let seen: BTreeMap<String, String> = view
                .leases()
                .iter()
                .map(|l| (l.subnets.to_string(), l.attrs.node().unwrap().to_string()))
                .collect();
            prop_assert_eq!(&seen, &expected);
            prop_assert_eq!(&heard, &expected);
            prop_assert_eq!(view.position().unwrap().revision, revision);
            let newest = stored.values().max_by_key(|s| s.mod_revision);
            let fingerprint = newest.map(|newest| Fingerprint {
                count: stored.len(),
                newest: newest.key.clone().into_bytes(),
                mod_revision: newest.mod_revision,
            });
            prop_assert_eq!(view.fingerprint(), fingerprint);
        }
    }
}
