//! What nodes say, in every order, and what the daemon hears of it.

use super::*;
use crate::lease::{BackendData, LeaseAttrs, LeaseExtension};

/// A node that was created at second `age` and has the subnet 198.18.`net`.0/24.
fn member(age: i64, net: u8, last: u8) -> Known {
    Known {
        created: Some(Timestamp::from_second(age).unwrap()),
        standing: Standing::Member(Lease {
            subnets: key(net),
            attrs: LeaseAttrs {
                public_ip: Some([192, 0, 2, last].into()),
                ..LeaseAttrs::default()
            },
            expires: None,
            extension: LeaseExtension::default(),
        }),
    }
}

fn refused() -> Known {
    let fault = NodeFault::PodCidrs { count: 3 };
    Known {
        created: None,
        standing: Standing::Refused(fault),
    }
}

fn key(net: u8) -> Subnets {
    format!("198.18.{net}.0-24").parse().unwrap()
}

fn listed(nodes: Vec<(&str, Known)>) -> View {
    let mut view = View::new("own");
    relist(&mut view, nodes);
    view
}

fn relist(view: &mut View, nodes: Vec<(&str, Known)>) {
    view.begin();
    for (name, known) in nodes {
        view.list(name.to_owned(), known);
    }
    view.done();
}

/// What is told, in short: `+2=7` for the subnet 198.18.2.0/24 of 192.0.2.7, `-2` for none, problems by subject.
fn told(view: &mut View) -> Vec<String> {
    if !view.has_news() {
        return Vec::new();
    }
    let put = |lease: &Lease| {
        let net = lease.subnets.v4().unwrap().addr().octets()[2];
        let last = lease.attrs.public_ip.unwrap().octets()[3];
        format!("+{net}={last}")
    };
    let (mut all, problems): (Vec<String>, _) = match view.tell() {
        StoreEvent::Snapshot { leases, problems } => (leases.iter().map(put).collect(), problems),
        StoreEvent::Delta { deltas, problems } => {
            let one = |delta: &LeaseDelta| match delta {
                LeaseDelta::Put(lease) => put(lease),
                LeaseDelta::Delete(key) => {
                    format!("-{}", key.v4().unwrap().addr().octets()[2])
                }
            };
            (deltas.iter().map(one).collect(), problems)
        }
        StoreEvent::OwnLost { .. } => unreachable!("a view loses nothing"),
    };
    all.extend(problems.into_iter().map(|problem| {
        let kind = if problem.cause == Cause::Solved {
            "solved".to_owned()
        } else if let Cause::Node(NodeFault::Claimed { owner, .. }) = &problem.cause {
            format!("claimed by {owner}")
        } else {
            problem.cause.to_string().chars().take(13).collect()
        };
        format!("{}: {kind}", problem.subject)
    }));
    all
}

#[test]
fn nothing_is_told_before_all_nodes_are_listed() {
    let mut view = View::new("own");
    view.begin();
    view.list("a".to_owned(), member(1, 1, 1));
    view.say("the API".to_owned(), Some(Cause::Away("slow".to_owned())));
    assert!(!view.has_news());
    view.done();
    view.say("the API".to_owned(), None);
    assert_eq!(told(&mut view), ["+1=1"]);
    assert!(!view.has_news());
}

#[test]
fn a_change_of_what_matters_is_told_and_nothing_else() {
    let mut view = listed(vec![("a", member(1, 1, 1)), ("b", member(2, 2, 2))]);
    assert_eq!(told(&mut view), ["+1=1", "+2=2"]);
    view.put("a".to_owned(), member(1, 1, 1));
    assert_eq!(told(&mut view), [""; 0]);
    view.put("a".to_owned(), member(1, 1, 9));
    assert_eq!(told(&mut view), ["+1=9"]);
    view.put("a".to_owned(), member(1, 3, 9));
    assert_eq!(told(&mut view), ["-1", "+3=9"]);
    view.remove("b");
    assert_eq!(told(&mut view), ["-2"]);
    view.remove("never there");
    assert_eq!(told(&mut view), [""; 0]);
}

#[test]
fn a_change_in_one_family_alone_is_told() {
    let both = |v4: u8, v6: u16, data: &str| {
        let mut known = member(1, 1, v4);
        if let Standing::Member(lease) = &mut known.standing {
            lease.attrs.public_ipv6 = Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, v6].into());
            lease.attrs.backend_v6_data = BackendData::new(data);
        }
        known
    };
    let mut view = listed(vec![("a", both(1, 1, "{}"))]);
    told(&mut view);
    for known in [both(2, 1, "{}"), both(2, 2, "{}"), both(2, 2, "[]")] {
        view.put("a".to_owned(), known);
        assert_eq!(told(&mut view), ["+1=2"]);
    }
}

#[test]
fn only_the_last_state_of_a_node_is_told() {
    let mut view = listed(vec![("a", member(1, 1, 1))]);
    told(&mut view);
    for last in 2..200 {
        view.put("a".to_owned(), member(1, 1, last));
        view.put("b".to_owned(), member(2, 2, last));
    }
    view.remove("b");
    assert_eq!(told(&mut view), ["-2", "+1=199"]);
}

#[test]
fn a_listing_takes_away_who_is_gone_and_keeps_quiet_about_who_stayed() {
    let mut view = listed(vec![("a", member(1, 1, 1)), ("b", member(2, 2, 2))]);
    told(&mut view);
    relist(
        &mut view,
        vec![("b", member(2, 2, 2)), ("c", member(3, 3, 3))],
    );
    assert_eq!(told(&mut view), ["-1", "+3=3"]);
}

#[test]
fn of_two_nodes_with_one_subnet_the_older_keeps_it() {
    let mut view = listed(vec![("old", member(1, 1, 1))]);
    told(&mut view);
    view.put("new".to_owned(), member(2, 1, 2));
    assert_eq!(told(&mut view), ["node new: claimed by old"]);
    view.remove("old");
    assert_eq!(told(&mut view), ["+1=2", "node new: solved"]);
    // Ours is never another's, however old that is.
    view.put("own".to_owned(), member(9, 1, 9));
    assert_eq!(told(&mut view), ["+1=9", "node new: claimed by own"]);
    view.remove("new");
    assert_eq!(told(&mut view), ["node new: solved"]);
}

#[test]
fn a_node_that_makes_no_sense_is_named_and_costs_nobody_else_anything() {
    let mut view = listed(vec![("a", member(1, 1, 1)), ("b", refused())]);
    assert_eq!(told(&mut view), ["+1=1", "node b: spec.podCIDRs"]);
    view.put("a".to_owned(), refused());
    assert_eq!(told(&mut view), ["-1", "node a: spec.podCIDRs"]);
    view.put("a".to_owned(), member(1, 1, 1));
    assert_eq!(told(&mut view), ["+1=1", "node a: solved"]);
}

#[test]
fn ten_thousand_claims_on_one_subnet_are_judged_in_time() {
    let mut nodes = vec![("own".to_owned(), member(5, 2, 2))];
    nodes.extend((0..10_000).map(|n| (format!("n{n}"), member(10 + n, 1, 1))));
    let mut view = View::new("own");
    view.begin();
    for (name, known) in nodes {
        view.list(name, known);
    }
    view.done();
    let all = told(&mut view);
    assert_eq!(all.len(), 2 + 9_999);
    assert_eq!(all[..2], ["+1=1", "+2=2"]);
    view.put("n7".to_owned(), member(17, 1, 8));
    assert_eq!(told(&mut view), [""; 0]);
}

proptest::proptest! {
    /// Whatever happens in whatever order, what was told adds up to what a fresh listing tells.
    #[test]
    fn what_was_told_adds_up(
        steps in proptest::collection::vec((0u8..5, proptest::option::of((0i64..3, 0u8..3, 1u8..4)), 0u8..3), 1..60),
    ) {
        let mut view = listed(vec![]);
        let mut heard = BTreeMap::new();
        let mut nodes: BTreeMap<String, Known> = BTreeMap::new();
        let mut hear = |view: &mut View| {
            for text in told(view) {
                if let Some((net, last)) = text.strip_prefix('+').and_then(|rest| rest.split_once('=')) {
                    heard.insert(net.to_owned(), last.to_owned());
                } else if let Some(net) = text.strip_prefix('-') {
                    heard.remove(net);
                }
            }
            heard.clone()
        };
        for (node, state, look) in steps {
            let name = format!("n{node}");
            match state {
                Some((age, net, last)) => {
                    nodes.insert(name.clone(), member(age, net, last));
                    view.put(name, member(age, net, last));
                }
                None => {
                    nodes.remove(&name);
                    view.remove(&name);
                }
            }
            if look == 0 {
                hear(&mut view);
            }
        }
        let heard = hear(&mut view);
        let fresh = nodes.iter().map(|(name, known)| (name.as_str(), known.clone()));
        let fresh: Vec<String> = told(&mut listed(fresh.collect()));
        let fresh: BTreeMap<String, String> = fresh
            .iter()
            .filter_map(|text| text.strip_prefix('+')?.split_once('='))
            .map(|(net, last)| (net.to_owned(), last.to_owned()))
            .collect();
        proptest::prop_assert_eq!(heard, fresh);
    }
}
