use super::*;

/// `192.0.2.1`, with flags behind it: `d`eprecated, `t`emporary, `u`nverified, `l`eased (not permanent).
fn addr(text: &str) -> Address {
    let (ip, flags) = text.split_once('/').unwrap_or((text, ""));
    Address {
        ip: ip.parse().unwrap(),
        permanent: !flags.contains('l'),
        temporary: flags.contains('t'),
        deprecated: flags.contains('d'),
        unverified: flags.contains('u'),
    }
}

/// Links numbered from 1, `name mtu addr...`.
fn snapshot(links: &[&str], defaults: &[(Family, Option<u32>)]) -> Snapshot {
    let link = |(index, text): (u32, &&str)| {
        let mut words = text.split(' ');
        Link {
            index,
            name: words.next().unwrap().to_owned(),
            mtu: words.next().unwrap().parse().unwrap(),
            addrs: words.map(addr).collect(),
        }
    };
    let route = |&(family, link)| DefaultRoute { family, link };
    Snapshot {
        reach: Vec::new(),
        links: (1..).zip(links).map(link).collect(),
        default_routes: defaults.iter().map(route).collect(),
    }
}

fn node() -> Snapshot {
    snapshot(
        &[
            "lo 65536 127.0.0.1 ::1",
            "eth0 1500 192.0.2.1 192.0.2.2 2001:db8::1 fe80::1",
            "eth1 9000 198.51.100.1",
            "wg0 1420 fe80::2 2001:db8:1::2",
            "bare0 1500",
        ],
        &[(Family::V4, Some(3)), (Family::V6, Some(2))],
    )
}

/// `--iface`, and with a leading `~` `--iface-regex`.
fn wanted(selectors: &[&str]) -> Wanted {
    let selector = |text: &&str| match text.strip_prefix('~') {
        Some(regex) => Selector::Pattern(Pattern::new(regex).unwrap()),
        None => Selector::parse(text),
    };
    Wanted {
        selectors: selectors.iter().map(selector).collect(),
        ..Wanted::default()
    }
}

fn chosen(snapshot: &Snapshot, wanted: &Wanted, stack: Stack) -> Option<(String, String)> {
    let choice = choose(snapshot, wanted, stack).choice.ok()?;
    Some((choice.name, choice.addr.to_string()))
}

#[test]
fn every_kind_of_selector_finds_the_interface_the_specification_names() {
    use Stack::{Either, V4, V6};
    for (selectors, stack, expected) in [
        (&["eth0"][..], V4, Some(("eth0", "192.0.2.1"))),
        (&["eth0"], V6, Some(("eth0", "2001:db8::1"))),
        (&["eth0"], Either, Some(("eth0", "192.0.2.1"))),
        (&["wg0"], Either, Some(("wg0", "2001:db8:1::2"))),
        (&["wg0"], V4, None),
        (&["bare0"], Either, None),
        (&["eth9"], V4, None),
        (&["eth9", "eth1"], V4, Some(("eth1", "198.51.100.1"))),
        (&["eth1", "eth0"], V4, Some(("eth1", "198.51.100.1"))),
        // Any address that is there, usable or not: section 3.2 a.
        (&["192.0.2.2"], V4, Some(("eth0", "192.0.2.2"))),
        (&["127.0.0.1"], V4, Some(("lo", "127.0.0.1"))),
        (&["192.0.2.9"], V4, None),
        (&["2001:db8::1"], V4, None),
        (&["2001:db8::1"], Either, Some(("eth0", "2001:db8::1"))),
        // Addresses before names, over all interfaces, unanchored.
        (&["~^198[.]"], V4, Some(("eth1", "198.51.100.1"))),
        (&["~2[.]2$"], V4, Some(("eth0", "192.0.2.2"))),
        (&["~2$"], V4, Some(("eth0", "192.0.2.2"))),
        (&["~^eth[1-9]"], V4, Some(("eth1", "198.51.100.1"))),
        // The first name that matches decides, even if it has no usable address.
        (&["~^eth1|^wg"], V6, None),
        (&["~nothing"], V4, None),
        (&["~nothing", "~eth"], V4, Some(("eth0", "192.0.2.1"))),
        (&[], V4, Some(("eth1", "198.51.100.1"))),
        (&[], V6, Some(("eth0", "2001:db8::1"))),
        (&[], Either, Some(("eth1", "198.51.100.1"))),
    ] {
        let expected = expected.map(|(name, addr)| (name.to_owned(), addr.to_owned()));
        let found = chosen(&node(), &wanted(selectors), stack);
        assert_eq!(found, expected, "{selectors:?} {stack:?}");
    }
}

#[test]
fn addresses_are_preferred_global_then_permanent_then_in_kernel_order() {
    for (addrs, stack, expected) in [
        ("169.254.1.1 192.0.2.1/l 192.0.2.2", Stack::V4, "192.0.2.2"),
        ("169.254.1.1 192.0.2.1/l", Stack::V4, "192.0.2.1"),
        ("169.254.1.1", Stack::V4, "169.254.1.1"),
        ("10.0.0.1 192.0.2.1", Stack::V4, "10.0.0.1"),
        ("192.0.2.1/d 192.0.2.2/l", Stack::V4, "192.0.2.2"),
        ("2001:db8::1/t 2001:db8::2/l", Stack::V6, "2001:db8::2"),
        ("2001:db8::1/d 2001:db8::2/l", Stack::V6, "2001:db8::2"),
        ("2001:db8::1/u 2001:db8::2/l", Stack::V6, "2001:db8::2"),
        ("fe80::1 2001:db8::2/l", Stack::V6, "2001:db8::2"),
        ("2001:db8::2 192.0.2.1/l", Stack::Either, "192.0.2.1"),
        ("2001:db8::2 192.0.2.1/d", Stack::Either, "2001:db8::2"),
    ] {
        let node = snapshot(&[&format!("eth0 1500 {addrs}")], &[]);
        let found = chosen(&node, &wanted(&["eth0"]), stack).map(|(_, addr)| addr);
        assert_eq!(found.as_deref(), Some(expected), "{addrs}");
    }
}

#[test]
fn temporary_and_deprecated_addresses_are_never_chosen_and_the_reason_is_given() {
    let node = snapshot(
        &["eth0 1500 2001:db8::1/t 2001:db8::2/d 2001:db8::3/u"],
        &[],
    );
    let error = choose(&node, &wanted(&["eth0"]), Stack::V6)
        .choice
        .unwrap_err();
    let text = error.to_string();
    for reason in [
        "2001:db8::1 is temporary",
        "2001:db8::2 is deprecated",
        "2001:db8::3 is not verified",
        "--iface",
    ] {
        assert!(text.contains(reason), "{reason:?} is missing in {text}");
    }
}

#[test]
fn public_ip_without_selector_is_the_selector_and_with_one_need_not_be_local() {
    let public = |selectors: &[&str], ip: &str| Wanted {
        public_ip: Some(ip.parse().unwrap()),
        ..wanted(selectors)
    };
    let choice = |wanted: &Wanted| choose(&node(), wanted, Stack::V4).choice;
    let local = choice(&public(&[], "192.0.2.2")).unwrap();
    assert_eq!((&*local.name, local.addr), ("eth0", local.public));
    assert!(choice(&public(&[], "203.0.113.7")).is_err());
    let behind_nat = choice(&public(&["eth0"], "203.0.113.7")).unwrap();
    assert_eq!(behind_nat.addr.to_string(), "192.0.2.1");
    assert_eq!(behind_nat.public.to_string(), "203.0.113.7");
    let v6_only = Wanted {
        public_ipv6: Some("2001:db8:1::2".parse().unwrap()),
        ..Wanted::default()
    };
    let found = chosen(&node(), &v6_only, Stack::Either).unwrap();
    assert_eq!(found, ("wg0".to_owned(), "2001:db8:1::2".to_owned()));
}

#[test]
fn public_ip_of_the_store_overrules_that_of_the_command_line_in_its_family() {
    let flags = Wanted {
        public_ip: Some("192.0.2.1".parse().unwrap()),
        public_ipv6: Some("2001:db8::1".parse().unwrap()),
        ..Wanted::default()
    };
    let set = flags.with_public_ips((Some("192.0.2.2".parse().unwrap()), None));
    assert_eq!(set.public_ip.unwrap().to_string(), "192.0.2.2");
    assert_eq!(set.public_ipv6.unwrap().to_string(), "2001:db8::1");
}

#[test]
fn first_default_route_of_the_preferred_family_decides_even_if_it_leads_nowhere() {
    let links = ["eth0 1500 192.0.2.1 2001:db8::1", "eth1 1500 192.0.2.9"];
    let no_device = snapshot(&links, &[(Family::V4, None), (Family::V4, Some(1))]);
    assert_eq!(chosen(&no_device, &wanted(&[]), Stack::V4), None);
    let gone = snapshot(&links, &[(Family::V4, Some(7))]);
    assert_eq!(chosen(&gone, &wanted(&[]), Stack::V4), None);
    let v6 = snapshot(&links, &[(Family::V6, Some(1))]);
    assert_eq!(chosen(&v6, &wanted(&[]), Stack::V4), None);
    let found = chosen(&v6, &wanted(&[]), Stack::Either).unwrap();
    assert_eq!(found.0, "eth0");
}

#[test]
fn interface_whose_mtu_carries_no_ip_is_refused() {
    let node = snapshot(&["eth0 0 192.0.2.1"], &[]);
    let error = choose(&node, &wanted(&["eth0"]), Stack::V4)
        .choice
        .unwrap_err();
    assert!(error.to_string().contains("MTU of 0"), "{error}");
}

#[test]
fn every_interface_is_explained_and_exactly_the_choice_is_marked() {
    for selectors in [&["eth9", "eth0"][..], &["198.51.100.1"], &["~eth"], &[]] {
        let decision = choose(&node(), &wanted(selectors), Stack::V4);
        let choice = decision.choice.unwrap();
        let marked: Vec<_> = decision
            .candidates
            .iter()
            .filter(|one| one.chosen)
            .collect();
        assert_eq!(marked.len(), 1, "{selectors:?}");
        assert_eq!(marked[0].name, choice.name);
        assert_eq!(decision.candidates.len(), 5);
        assert!(decision.candidates.iter().all(|one| !one.why.is_empty()));
    }
    let decision = choose(&node(), &wanted(&["eth9", "eth0"]), Stack::V4);
    assert_eq!(decision.failed.len(), 1);
    assert!(decision.failed[0].contains("eth9"), "{:?}", decision.failed);
}

#[test]
fn refusal_lists_what_was_tried_and_what_there_is() {
    let error = choose(&node(), &wanted(&["eth9", "~^x"]), Stack::V4)
        .choice
        .unwrap_err();
    let text = error.to_string();
    for part in [
        "name eth9",
        "regular expression ^x",
        "eth1 [198.51.100.1]",
        "--iface",
    ] {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
}

#[test]
fn digits_of_a_pattern_are_ascii_as_in_go() {
    let arabic = snapshot(&["eth\u{0663} 1500 192.0.2.1"], &[]);
    assert_eq!(chosen(&arabic, &wanted(&[r"~^eth\d"]), Stack::V4), None);
}
