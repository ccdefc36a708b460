use ipnet::{Ipv4Net, Ipv6Net};
use proptest::prelude::*;

use super::*;
use crate::firewall::{FamilyRules, Masquerade, Notrack, Underlay};

fn rules_v4(network: &str, subnet: &str) -> Rules {
    let masquerade = Masquerade::<Ipv4Net> {
        fully_random: true,
        exempt: Vec::new(),
    };
    let (network, subnet) = (network.parse().unwrap(), subnet.parse().unwrap());
    let notrack = Notrack {
        port: 8285,
        underlay: Underlay::Dual,
    };
    Rules::none()
        .with(FamilyRules::new(network, subnet, Some(masquerade), true).unwrap())
        .with_notrack(notrack)
}

fn rules_v6() -> Rules {
    let masquerade = Masquerade::<Ipv6Net> {
        fully_random: true,
        exempt: Vec::new(),
    };
    let network = "fd00:10:244::/56".parse().unwrap();
    let subnet = "fd00:10:244:1::/64".parse().unwrap();
    Rules::none().with(FamilyRules::new(network, subnet, Some(masquerade), true).unwrap())
}

/// The payload on a host where nothing of ours exists.
fn fresh(slot: &Slot, rules: &Rules, family: Family, random_fully: bool) -> String {
    let wanted = desired(slot, rules, family, random_fully);
    plan("iptables", slot, wanted.as_ref(), &Observed::default()).payload
}

/// What the kernel would have after `content` was put in place, between rules of others.
fn observed(content: &Content, before: &[&str], after: &[&str]) -> Observed {
    let hook = |jump: &String| {
        let owned = |rules: &[&str]| rules.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>();
        [owned(before), vec![jump.clone()], owned(after)].concat()
    };
    Observed {
        hooks: content.jumps.iter().map(hook).collect(),
        chain: Some(content.rules.clone()),
    }
}

#[test]
fn a_fresh_host_gets_flannels_rules_to_the_byte() {
    let rules = rules_v4("10.244.0.0/16", "10.244.1.0/24");
    let golden = include_str!("../../../tests/golden/firewall/restore-v4.txt");
    let payloads = SLOTS.map(|slot| fresh(&slot, &rules, Family::V4, true));
    assert_eq!(payloads.concat(), golden);
    let golden = include_str!("../../../tests/golden/firewall/restore-v6.txt");
    let payloads = TRAFFIC.map(|slot| fresh(&slot, &rules_v6(), Family::V6, true));
    assert_eq!(payloads.concat(), golden);
}

#[test]
fn an_old_program_is_not_asked_for_random_ports() {
    let rules = rules_v4("10.244.0.0/16", "10.244.1.0/24");
    let payload = fresh(&TRAFFIC[0], &rules, Family::V4, false);
    assert!(payload.contains("-j MASQUERADE\n") && !payload.contains("--random-fully"));
}

#[test]
fn exempt_destinations_come_before_the_masquerade() {
    let masquerade = Masquerade::<Ipv4Net> {
        fully_random: false,
        exempt: vec!["203.0.113.0/24".parse().unwrap()],
    };
    let (network, subnet) = (
        "10.1.0.0/16".parse().unwrap(),
        "10.1.1.0/24".parse().unwrap(),
    );
    let rules =
        Rules::none().with(FamilyRules::new(network, subnet, Some(masquerade), false).unwrap());
    let content = desired(&TRAFFIC[0], &rules, Family::V4, true).unwrap();
    assert!(content.rules[4].starts_with("-s 10.1.0.0/16 -d 203.0.113.0/24 "));
    assert!(content.rules[5].ends_with("-j MASQUERADE"));
    assert_eq!(desired(&TRAFFIC[1], &rules, Family::V4, true), None);
}

#[test]
fn a_prefix_of_length_zero_is_refused() {
    let all: Ipv4Net = "0.0.0.0/0".parse().unwrap();
    let some: Ipv4Net = "10.0.0.0/8".parse().unwrap();
    assert!(FamilyRules::new(all, some, None, true).is_err());
    assert!(FamilyRules::new(some, all, None, true).is_err());
}

#[test]
fn what_is_in_place_is_left_alone_wherever_others_insert() {
    let rules = rules_v4("10.244.0.0/16", "10.244.1.0/24");
    for slot in &SLOTS {
        let wanted = desired(slot, &rules, Family::V4, true).unwrap();
        let found = observed(&wanted, &["-j KUBE-FORWARD"], &["-j REJECT", "-j CNI"]);
        assert_eq!(
            plan("iptables", slot, Some(&wanted), &found),
            Plan::default()
        );
    }
}

#[test]
fn only_what_differs_is_written() {
    let rules = rules_v4("10.244.0.0/16", "10.244.1.0/24");
    let slot = &TRAFFIC[1];
    let wanted = desired(slot, &rules, Family::V4, true).unwrap();
    let whats = |found: &Observed| {
        let plan = plan("iptables", slot, Some(&wanted), found);
        let whats: Vec<What> = plan.differences.iter().map(|d| d.what).collect();
        (whats, plan.payload)
    };
    let right = observed(&wanted, &[], &[]);

    let mut no_jump = right.clone();
    no_jump.hooks[0].clear();
    let (found, payload) = whats(&no_jump);
    assert_eq!(found, [What::Missing]);
    let jump = &wanted.jumps[0];
    assert_eq!(payload, format!("*filter\n-A FORWARD {jump}\nCOMMIT\n"));

    let mut reordered = right.clone();
    reordered.chain.as_mut().unwrap().reverse();
    let (found, payload) = whats(&reordered);
    assert_eq!(found, [What::Changed]);
    assert!(payload.starts_with("*filter\n:FLANNEL-FWD - [0:0]\n-A FLANNEL-FWD -s "));
    assert!(!payload.contains("FORWARD "));

    let mut twice = right;
    twice.hooks[0].push(jump.clone());
    let (found, payload) = whats(&twice);
    assert_eq!(found, [What::Duplicate]);
    let (delete, append) = (
        format!("-D FORWARD {jump}\n"),
        format!("-A FORWARD {jump}\n"),
    );
    assert_eq!(
        payload,
        format!("*filter\n{delete}{delete}{append}COMMIT\n")
    );
}

#[test]
fn a_jump_behind_the_distributions_reject_goes_before_it() {
    let rules = rules_v4("10.244.0.0/16", "10.244.1.0/24");
    let slot = &TRAFFIC[1];
    let wanted = desired(slot, &rules, Family::V4, true).unwrap();
    let reject = "-j REJECT --reject-with icmp-host-prohibited";
    let behind = observed(&wanted, &["-i lo -j ACCEPT", reject], &[]);
    let plan = plan("iptables", slot, Some(&wanted), &behind);
    assert_eq!(plan.differences[0].what, What::Misplaced);
    let jump = &wanted.jumps[0];
    assert_eq!(
        plan.payload,
        format!("*filter\n-D FORWARD {jump}\n-I FORWARD 2 {jump}\nCOMMIT\n")
    );
}

#[test]
fn what_is_no_longer_wanted_goes_jump_first_and_nothing_else_does() {
    let slot = &TRAFFIC[0];
    let rules = rules_v4("10.244.0.0/16", "10.244.1.0/24");
    let mut found = observed(
        &desired(slot, &rules, Family::V4, true).unwrap(),
        &["-s 10.9.0.0/16 -j MASQUERADE"],
        &[],
    );
    // Before 0.20, flannel had its rules in the built-in chain.
    let old = r#"-s 10.1.0.0/16 -m comment --comment "flanneld masq" -j RETURN"#;
    found.hooks[0].push(old.to_owned());
    let plan = plan("iptables", slot, None, &found);
    assert_eq!(
        plan.payload,
        format!(
            "*nat\n-D POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
             -D POSTROUTING {old}\n-F FLANNEL-POSTRTG\n-X FLANNEL-POSTRTG\nCOMMIT\n"
        )
    );
}

/// An independent model of `iptables-restore --noflush` for the lines that a payload may hold.
fn restore(observed: &mut Observed, slot: &Slot, payload: &str) {
    let hook_of = |name: &str| slot.hooks.iter().position(|hook| *hook == name);
    observed.hooks.resize(slot.hooks.len(), Vec::new());
    for line in payload.lines() {
        let mut words = line.splitn(3, ' ');
        let (op, name, rest) = (
            words.next().unwrap(),
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        match op {
            "COMMIT" | "*nat" | "*filter" | "*raw" => {}
            "-A" if name == slot.chain => observed.chain.as_mut().unwrap().push(rest.to_owned()),
            "-A" => observed.hooks[hook_of(name).unwrap()].push(rest.to_owned()),
            "-D" => {
                let hook = &mut observed.hooks[hook_of(name).unwrap()];
                let at = hook.iter().position(|rule| rule == rest).unwrap();
                hook.remove(at);
            }
            "-I" => {
                let (number, rule) = rest.split_once(' ').unwrap();
                let at: usize = number.parse().unwrap();
                observed.hooks[hook_of(name).unwrap()].insert(at - 1, rule.to_owned());
            }
            "-F" => observed.chain.as_mut().unwrap().clear(),
            "-X" => assert_eq!(observed.chain.take(), Some(Vec::new())),
            declared => {
                assert_eq!(declared, format!(":{}", slot.chain));
                observed.chain = Some(Vec::new());
            }
        }
    }
}

fn listing(observed: &Observed, slot: &Slot) -> String {
    let mut text = String::new();
    for (hook, rules) in slot.hooks.iter().zip(&observed.hooks) {
        for rule in rules {
            text.push_str(&format!("-A {hook} {rule}\n"));
        }
    }
    for rule in observed.chain.iter().flatten() {
        text.push_str(&format!("-A {} {rule}\n", slot.chain));
    }
    text
}

fn prefixes() -> impl Strategy<Value = (String, String)> {
    (any::<[u8; 4]>(), 1u8..=32, 1u8..=32).prop_map(|(addr, one, other)| {
        let net = |len| {
            let net = Ipv4Net::new(addr.into(), len).unwrap().trunc();
            net.to_string()
        };
        (net(one), net(other))
    })
}

proptest! {
    #[test]
    fn what_is_rendered_is_read_back_unchanged((network, subnet) in prefixes()) {
        let rules = rules_v4(&network, &subnet);
        for slot in &SLOTS {
            let wanted = desired(slot, &rules, Family::V4, true).unwrap();
            let state = observed(&wanted, &["-j OTHER"], &["-s 10.0.0.0/8 -j LOG"]);
            let text = listing(&state, slot);
            let read = Observed {
                hooks: slot.hooks.iter().map(|hook| parse_listing(&text, hook)).collect(),
                chain: Some(parse_listing(&text, slot.chain)),
            };
            prop_assert_eq!(read, state);
        }
    }

    #[test]
    fn a_plan_carried_out_leaves_nothing_to_do_and_every_foreign_rule(
        pieces in prop::collection::vec(0usize..6, 0..8),
        chain in prop::option::of(prop::collection::vec(0usize..7, 0..8)),
        wanted_at_all: bool,
    ) {
        let rules = rules_v4("10.244.0.0/16", "10.244.1.0/24");
        let other = rules_v4("10.9.0.0/16", "10.9.1.0/24");
        for slot in &SLOTS {
            let full = desired(slot, &rules, Family::V4, true).unwrap();
            let stale = desired(slot, &other, Family::V4, true).unwrap();
            let foreign = ["-j KUBE", "-j DROP", "-s 10.0.0.0/8 -j ACCEPT", "-j ACCEPT"];
            let mut state = Observed {
                hooks: full.jumps.iter().map(|jump| pieces.iter().map(|&piece| match piece {
                    0 | 1 => jump.clone(),
                    other => foreign[other - 2].to_owned(),
                }).collect()).collect(),
                chain: chain.as_ref().map(|chain| chain.iter().map(|&at| {
                    let rules = if at % 2 == 0 { &full.rules } else { &stale.rules };
                    rules[at % rules.len()].clone()
                }).collect()),
            };
            // Jumps to a chain that does not exist cannot be.
            if state.chain.is_none() {
                for hook in &mut state.hooks {
                    hook.retain(|rule| !rule.contains(slot.chain));
                }
            }
            let theirs = |state: &Observed| -> Vec<Vec<String>> {
                let keep = |rules: &Vec<String>| rules.iter()
                    .filter(|rule| !rule.contains(slot.chain)).cloned().collect();
                state.hooks.iter().map(keep).collect()
            };
            let before = theirs(&state);
            let wanted = wanted_at_all.then_some(&full);
            let first = plan("iptables", slot, wanted, &state);
            prop_assert_eq!(first.payload.is_empty(), first.differences.is_empty());
            restore(&mut state, slot, &first.payload);
            prop_assert_eq!(plan("iptables", slot, wanted, &state), Plan::default());
            prop_assert_eq!(theirs(&state), before);
            prop_assert_eq!(state.chain.as_ref(), wanted.map(|content| &content.rules));
        }
    }
}
