use ipnet::{Ipv4Net, Ipv6Net};
use proptest::prelude::*;

use super::*;
use crate::firewall::{Masquerade, Notrack, Underlay};

const CAPS: Caps = Caps {
    comments: true,
    fully_random: true,
};

fn rules(network: &str, subnet: &str) -> Rules {
    let v4 = Masquerade::<Ipv4Net> {
        fully_random: true,
        exempt: Vec::new(),
    };
    let v6 = Masquerade::<Ipv6Net> {
        fully_random: true,
        exempt: Vec::new(),
    };
    let (network, subnet) = (network.parse().unwrap(), subnet.parse().unwrap());
    let network6 = "fd00:10:244::/56".parse().unwrap();
    let subnet6 = "fd00:10:244:1::/64".parse().unwrap();
    Rules::none()
        .with(FamilyRules::new(network, subnet, Some(v4), true).unwrap())
        .with(FamilyRules::new(network6, subnet6, Some(v6), true).unwrap())
        .with_notrack(Notrack {
            port: 8285,
            underlay: Underlay::Dual,
        })
}

#[test]
fn a_listing_by_nft_is_what_is_wanted() {
    let rules = rules("10.244.0.0/16", "10.244.1.0/24");
    let [v4, v6] = &traffic(&rules, CAPS)[..] else {
        panic!("two families are two tables");
    };
    for (table, listing) in [
        (
            v4,
            include_str!("../../../tests/golden/firewall/nft-list-v4.txt"),
        ),
        (
            v6,
            include_str!("../../../tests/golden/firewall/nft-list-v6.txt"),
        ),
    ] {
        assert_eq!(parse(listing).as_ref(), Some(table));
    }
    let listing = include_str!("../../../tests/golden/firewall/nft-list-notrack.txt");
    assert_eq!(parse(listing), notrack(&rules));
}

#[test]
fn every_change_of_a_listing_is_a_difference() {
    let rules = rules("10.244.0.0/16", "10.244.1.0/24");
    let table = &traffic(&rules, CAPS)[0];
    let listing = include_str!("../../../tests/golden/firewall/nft-list-v4.txt");
    let place = traffic_table(Family::V4);
    assert_eq!(compare(place, Some(table), Some(listing)), None);
    let lines: Vec<&str> = listing.lines().collect();
    let mut changed = 0;
    for (index, line) in lines.iter().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        for twice in [false, true] {
            let mut lines = lines.clone();
            if twice {
                lines.insert(index, line);
            } else {
                lines.remove(index);
            }
            let found = compare(place, Some(table), Some(&lines.join("\n")));
            // Said twice, a comment and a type are the same.
            if !twice || !line.contains("comment") && !line.contains("type ") {
                assert_eq!(found.map(|d| d.what), Some(What::Changed), "{line} {twice}");
                changed += 1;
            }
        }
    }
    assert!(changed > 20);
    let dropping = listing.replacen("policy accept", "policy drop", 1);
    assert!(compare(place, Some(table), Some(&dropping)).is_some());
    assert_eq!(
        compare(place, None, Some(listing)).unwrap().what,
        What::LeftOver
    );
    assert_eq!(
        compare(place, Some(table), None).unwrap().what,
        What::Missing
    );
}

#[test]
fn nothing_wanted_is_no_table() {
    let network: Ipv4Net = "10.244.0.0/16".parse().unwrap();
    let rules = Rules::none().with(FamilyRules::new(network, network, None, false).unwrap());
    assert_eq!(traffic(&rules, CAPS), []);
    assert_eq!(notrack(&rules), None);
    assert_eq!(
        replace("ip", "flannel-ipv4", None),
        "add table ip flannel-ipv4\ndelete table ip flannel-ipv4\n"
    );
}

#[test]
fn what_the_host_cannot_do_is_left_out() {
    let none = Caps {
        comments: false,
        fully_random: false,
    };
    let text = render(&traffic(&rules("10.244.0.0/16", "10.244.1.0/24"), none)[0]);
    assert!(
        !text.contains("comment") && !text.contains("fully-random"),
        "{text}"
    );
}

#[test]
fn priorities_are_read_as_numbers_names_and_sums() {
    for (text, value) in [
        ("-300", -300),
        ("srcnat", 100),
        ("filter - 10", -10),
        ("raw + 1", -299),
    ] {
        let words: Vec<&str> = text.split(' ').collect();
        assert_eq!(parse_priority(&words), Some(value), "{text}");
    }
    assert_eq!(parse_priority(&["soon"]), None);
}

proptest! {
    #[test]
    fn what_is_rendered_is_read_back_unchanged(
        addr: [u8; 4], one in 1u8..=32, other in 1u8..=32, comments: bool, fully_random: bool,
    ) {
        let net = |len| Ipv4Net::new(addr.into(), len).unwrap().trunc().to_string();
        let rules = rules(&net(one), &net(other));
        let caps = Caps { comments, fully_random };
        for table in traffic(&rules, caps).into_iter().chain(notrack(&rules)) {
            prop_assert_eq!(parse(&render(&table)), Some(table));
        }
    }

    #[test]
    fn no_listing_makes_the_reader_fail(text in "[a-z0-9{};\" \\n]{0,200}") {
        parse(&text);
    }
}
