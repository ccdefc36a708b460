//! The traffic rules against the real programs, in namespaces of their own: what upstream's tests would see,
//! what a second run changes, what a switch and a removal leave.

mod firewall_common;

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use firewall_common::{
    Namespace, Path, Program, everything, golden, golden_rules, listing, open, system_path, traces,
    v4, v6,
};
use loden::firewall::{
    Admission, Arrival, Error, Family, Firewall, Flavor, Mode, Notrack, Rules, Underlay, What,
    remove,
};

const NOTRACK: Notrack = Notrack {
    port: 8285,
    underlay: Underlay::Dual,
};

/// Rules of others in all programs: what a service proxy, a container engine and an administrator have.
fn add_foreign_rules(namespace: &Namespace) {
    for suffix in ["-nft", "-legacy"] {
        for family in ["iptables", "ip6tables"] {
            namespace.feed(
                &format!("{family}{suffix}-restore --noflush"),
                "*nat\n:KUBE-POSTROUTING - [0:0]\n\
                 -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
                 -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\nCOMMIT\n\
                 *filter\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n\
                 -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\nCOMMIT\n\
                 *raw\n-A PREROUTING -p tcp -m tcp --dport 9 -j DROP\nCOMMIT\n",
            );
        }
    }
    namespace.feed(
        "nft -f -",
        "table inet admin { set s { type ipv4_addr; elements = { 192.0.2.7 }; }\n\
         chain input { type filter hook input priority 5; ip saddr @s drop; }\n }\n",
    );
}

#[test]
fn the_kernel_shows_flannels_rules_to_the_byte() {
    for program in Program::ALL {
        let (namespace, path) = (Namespace::new(), Path::preferring(program));
        let applied = namespace.block_on(async || {
            let firewall = open(program, &path).await;
            let rules = golden_rules().with_notrack(NOTRACK);
            let before = firewall.check(&rules).await.unwrap();
            assert!(
                before.iter().all(|found| found.what == What::Missing),
                "{before:?}"
            );
            firewall.apply(&rules).await.unwrap()
        });
        assert!(!applied.fixed.is_empty(), "{program:?}");
        assert_eq!(applied.remaining, [], "{program:?}");
        assert!(
            applied.tracked_because.is_none(),
            "{:?}",
            applied.tracked_because
        );
        assert_eq!(listing(&namespace, program), golden(program), "{program:?}");
    }
}

#[test]
fn a_second_apply_changes_no_handle_and_no_counter() {
    for program in Program::ALL {
        let (namespace, path) = (Namespace::new(), Path::preferring(program));
        let rules = golden_rules().with_notrack(NOTRACK);
        let look = || {
            let suffix = program.suffix();
            match program {
                Program::Nft => namespace.run("nft -a list ruleset"),
                Program::IptablesNft => namespace.run("nft -a list ruleset"),
                Program::IptablesLegacy => ["nat", "filter", "raw"]
                    .map(|table| namespace.run(&format!("iptables{suffix} -v -t {table} -S")))
                    .concat(),
            }
        };
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            let first = firewall.apply(&rules).await.unwrap();
            assert!(!first.fixed.is_empty());
        });
        // A counter that starts again at 0 would show.
        let socket = namespace.0.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
        let socket = socket.unwrap();
        socket.send_to(b"x", ("127.0.0.1", 8285)).unwrap();
        let before = look();
        if program == Program::IptablesLegacy {
            assert!(before.contains("-c 1 29 -j LODEN-NOTRACK"), "{before}");
        }
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            let second = firewall.apply(&rules).await.unwrap();
            assert_eq!(second.fixed, [], "{program:?}");
            assert_eq!(firewall.check(&rules).await.unwrap(), []);
        });
        assert_eq!(look(), before, "{program:?}");
    }
}

#[test]
fn rules_of_others_stay_as_they_are_through_a_whole_life() {
    for program in Program::ALL {
        let (namespace, path) = (Namespace::new(), Path::preferring(program));
        add_foreign_rules(&namespace);
        let before = everything(&namespace);
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            let applied = firewall.apply(&golden_rules().with_notrack(NOTRACK)).await;
            assert!(!applied.unwrap().fixed.is_empty());
        });
        let mut with_ours = everything(&namespace);
        for line in &before {
            let at = with_ours.iter().position(|other| other == line);
            assert!(at.is_some(), "{program:?} lost {line}");
            with_ours.remove(at.unwrap());
        }
        let removed = namespace.block_on(async || remove(path.list()).await);
        assert_eq!(removed.errors.len(), 0, "{:?}", removed.errors);
        assert!(removed.places.len() >= 3, "{:?}", removed.places);
        assert_eq!(traces(&namespace), Vec::<String>::new());
        // Looking creates empty built-in chains in places; no rule of others may differ.
        let rules = |lines: Vec<String>| -> Vec<String> {
            let is_rule = |line: &String| line.contains("-A ") || line.contains("admin");
            lines.into_iter().filter(is_rule).collect()
        };
        assert_eq!(rules(everything(&namespace)), rules(before), "{program:?}");
        let again = namespace.block_on(async || remove(path.list()).await);
        assert_eq!(again.places, Vec::<String>::new());
    }
}

#[test]
fn inserted_reordered_duplicated_and_missing_rules_are_found_and_put_right() {
    for program in Program::IPTABLES {
        let (namespace, path) = (Namespace::new(), Path::preferring(program));
        let iptables = format!("iptables{}", program.suffix());
        let rules = golden_rules().with_notrack(NOTRACK);
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            let applied = firewall.apply(&rules).await.unwrap();
            assert!(!applied.fixed.is_empty());
        });
        for (change, what) in [
            (
                "-t nat -I FLANNEL-POSTRTG 3 -s 192.0.2.0/24 -j ACCEPT",
                What::Changed,
            ),
            ("-t nat -D FLANNEL-POSTRTG 1", What::Changed),
            ("-t filter -A FLANNEL-FWD -j DROP", What::Changed),
            ("-t filter -A FORWARD -j FLANNEL-FWD", What::Duplicate),
            ("-t filter -F FORWARD", What::Missing),
            ("-t filter -I FORWARD -j DROP", What::Misplaced),
            ("-t raw -F LODEN-NOTRACK", What::Changed),
            ("-t raw -F OUTPUT", What::Missing),
            ("-t nat -F", What::Missing),
        ] {
            namespace.run(&format!("{iptables} {change}"));
            namespace.block_on(async || {
                let firewall = open(program, &path).await;
                let found = firewall.check(&rules).await.unwrap();
                assert!(found.iter().any(|d| d.what == what), "{change}: {found:?}");
                let applied = firewall.apply(&rules).await.unwrap();
                assert_eq!(applied.fixed, found, "{change}");
                assert_eq!(applied.remaining, [], "{change}");
            });
            if what == What::Misplaced {
                let forward = namespace.run(&format!("{iptables} -t filter -S FORWARD"));
                let (ours, drop) = (forward.find("FLANNEL-FWD"), forward.find("-j DROP"));
                assert!(ours < drop, "{forward}");
                namespace.run(&format!("{iptables} -t filter -D FORWARD -j DROP"));
            }
            assert_eq!(listing(&namespace, program), golden(program), "{change}");
        }
    }
}

#[test]
fn an_nftables_table_that_was_tampered_with_is_made_anew() {
    let (namespace, path) = (Namespace::new(), Path::preferring(Program::Nft));
    let rules = golden_rules().with_notrack(NOTRACK);
    for change in [
        "add rule ip flannel-ipv4 postrtg accept",
        "insert rule ip6 flannel-ipv6 forward drop",
        "flush chain ip flannel-ipv4 forward",
        "delete table ip6 flannel-ipv6",
        "add chain ip flannel-ipv4 extra",
        "chain ip flannel-ipv4 forward { policy drop ; }",
        "delete chain inet loden-notrack output",
        "flush ruleset",
    ] {
        namespace.block_on(async || {
            let firewall = open(Program::Nft, &path).await;
            assert!(firewall.apply(&rules).await.unwrap().remaining.is_empty());
        });
        namespace.feed("nft -f -", &format!("{change}\n"));
        namespace.block_on(async || {
            let firewall = open(Program::Nft, &path).await;
            assert!(
                !firewall.check(&rules).await.unwrap().is_empty(),
                "{change}"
            );
            assert_eq!(firewall.apply(&rules).await.unwrap().remaining, []);
        });
        assert_eq!(
            listing(&namespace, Program::Nft),
            golden(Program::Nft),
            "{change}"
        );
    }
}

#[test]
fn a_switch_of_programs_leaves_only_the_new_ones_rules() {
    for from in Program::ALL {
        for to in Program::ALL.into_iter().filter(|to| *to != from) {
            let namespace = Namespace::new();
            let rules = golden_rules().with_notrack(NOTRACK);
            for program in [from, to] {
                let path = Path::preferring(program);
                let applied = namespace.block_on(async || {
                    let firewall = open(program, &path).await;
                    firewall.apply(&rules).await.unwrap()
                });
                assert_eq!(
                    applied.swept.is_empty(),
                    program == from,
                    "{:?}",
                    applied.swept
                );
                assert_eq!(listing(&namespace, program), golden(program));
            }
            assert_eq!(
                listing(&namespace, from).replace("-N FLANNEL-POSTRTG", ""),
                "",
                "{from:?} to {to:?}"
            );
        }
    }
}

#[test]
fn rules_for_an_earlier_network_and_subnet_go() {
    for program in Program::ALL {
        let (namespace, path) = (Namespace::new(), Path::preferring(program));
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            let old = Rules::none()
                .with(v4("10.99.0.0/16", "10.99.7.0/24", true, true))
                .with(v6(true, true));
            assert!(!firewall.apply(&old).await.unwrap().fixed.is_empty());
        });
        assert!(listing(&namespace, program).contains("10.99.7.0/24"));
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            assert_eq!(firewall.apply(&golden_rules()).await.unwrap().remaining, []);
        });
        assert_eq!(listing(&namespace, program), golden(program));
        assert!(!everything(&namespace).concat().contains("10.99."));
    }
}

#[test]
fn what_the_original_left_in_either_program_is_taken_over_or_removed() {
    // The original's way: chains first, rules appended, nothing flushed; and its cleanup leaves half behind.
    let payload = include_str!("golden/firewall/restore-v4.txt").replace("10.244", "10.99");
    for program in Program::IPTABLES {
        let (namespace, path) = (Namespace::new(), Path::preferring(program));
        namespace.feed(
            &format!("iptables{}-restore --noflush", program.suffix()),
            &payload,
        );
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            let rules = golden_rules().with_notrack(NOTRACK);
            assert_eq!(firewall.apply(&rules).await.unwrap().remaining, []);
        });
        assert_eq!(listing(&namespace, program), golden(program));

        let (namespace, path) = (Namespace::new(), Path::preferring(Program::Nft));
        namespace.feed(
            &format!("iptables{}-restore --noflush", program.suffix()),
            &payload,
        );
        namespace.block_on(async || {
            let firewall = open(Program::Nft, &path).await;
            assert_eq!(
                firewall.apply(&golden_rules()).await.unwrap().swept.len(),
                7
            );
        });
        assert!(!everything(&namespace).concat().contains("10.99."));
        assert!(!everything(&namespace).concat().contains("FLANNEL"));
    }
}

#[test]
fn what_is_no_longer_wanted_is_removed() {
    for program in Program::ALL {
        let (namespace, path) = (Namespace::new(), Path::preferring(program));
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            let full = golden_rules().with_notrack(NOTRACK);
            assert_eq!(firewall.apply(&full).await.unwrap().remaining, []);
            let less = Rules::none().with(v4("10.244.0.0/16", "10.244.1.0/24", false, true));
            let found = firewall.check(&less).await.unwrap();
            assert!(
                found
                    .iter()
                    .all(|d| matches!(d.what, What::LeftOver | What::Changed)),
                "{found:?}"
            );
            assert_eq!(firewall.apply(&less).await.unwrap().remaining, []);
        });
        let text = everything(&namespace).concat();
        assert!(
            !text.contains("POSTRTG") && !text.contains("postrtg"),
            "{text}"
        );
        assert!(
            !text.contains("otrack") && !text.contains("fd00:"),
            "{text}"
        );
        assert!(text.contains("10.244.0.0/16"), "{text}");
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            assert_eq!(firewall.apply(&Rules::none()).await.unwrap().remaining, []);
        });
        assert_eq!(traces(&namespace), Vec::<String>::new());
    }
}

#[test]
fn removal_takes_every_variant_at_once() {
    let namespace = Namespace::new();
    add_foreign_rules(&namespace);
    for suffix in ["-nft", "-legacy"] {
        for family in ["v4", "v6"] {
            let payload = std::fs::read_to_string(format!(
                "{}/tests/golden/firewall/restore-{family}.txt",
                env!("CARGO_MANIFEST_DIR")
            ));
            let command = if family == "v4" {
                "iptables"
            } else {
                "ip6tables"
            };
            let payload = payload.unwrap();
            namespace.feed(&format!("{command}{suffix}-restore --noflush"), &payload);
        }
    }
    let tables = [
        include_str!("golden/firewall/nft-list-v4.txt"),
        include_str!("golden/firewall/nft-list-v6.txt"),
        include_str!("golden/firewall/nft-list-notrack.txt"),
    ];
    namespace.feed("nft -f -", &tables.concat());
    let removed = namespace.block_on(async || remove(system_path()).await);
    assert!(removed.errors.is_empty(), "{:?}", removed.errors);
    // Three tables; per iptables, chain and jump of nat and filter twice, and the three of raw once.
    assert_eq!(
        removed.places.len(),
        3 + 2 * (2 * 4 + 3),
        "{:?}",
        removed.places
    );
    assert_eq!(traces(&namespace), Vec::<String>::new());
    assert!(everything(&namespace).concat().contains("KUBE-POSTROUTING"));
}

#[test]
fn looking_for_legacy_rules_does_not_create_legacy_tables() {
    let (namespace, path) = (Namespace::new(), Path::preferring(Program::Nft));
    namespace.block_on(async || {
        let firewall = open(Program::Nft, &path).await;
        assert_eq!(firewall.apply(&golden_rules()).await.unwrap().remaining, []);
        assert!(remove(path.list()).await.errors.is_empty());
    });
    let tables = namespace.0.run(|| {
        ["ip", "ip6"].map(|family| {
            std::fs::read_to_string(format!("/proc/thread-self/net/{family}_tables_names")).unwrap()
        })
    });
    assert_eq!(tables.unwrap(), ["", ""]);
}

#[test]
fn programs_that_are_missing_are_named_and_those_not_needed_are_not_missed() {
    let namespace = Namespace::new();
    namespace.block_on(async || {
        let nothing = Path::only(&[]);
        for mode in [Mode::Nftables, Mode::Iptables] {
            let error = Firewall::open(nothing.list(), mode).await.unwrap_err();
            assert!(matches!(error, Error::Missing { .. }), "{error}");
        }
        let only_nft = Path::only(&["nft"]);
        let firewall = open(Program::Nft, &only_nft).await;
        assert_eq!(firewall.apply(&golden_rules()).await.unwrap().remaining, []);
        let only_v4 = Path::only(&["iptables", "iptables-restore"]);
        let firewall = open(Program::IptablesNft, &only_v4).await;
        let v4_only = Rules::none().with(v4("10.244.0.0/16", "10.244.1.0/24", true, true));
        assert_eq!(firewall.apply(&v4_only).await.unwrap().remaining, []);
        let error = firewall.apply(&golden_rules()).await.unwrap_err();
        assert!(
            error.to_string().contains("ip6tables is not installed"),
            "{error}"
        );
        assert!(remove(nothing.list()).await.errors.is_empty());
    });
}

#[test]
fn the_iptables_that_holds_the_hosts_rules_is_chosen() {
    for program in Program::IPTABLES {
        let namespace = Namespace::new();
        let command = format!("iptables{} -A INPUT -p tcp -j ACCEPT", program.suffix());
        namespace.run(&command);
        let flavor = namespace.block_on(async || {
            let firewall = Firewall::open(system_path(), Mode::Iptables).await.unwrap();
            firewall.flavor()
        });
        let expected = match program {
            Program::IptablesLegacy => Flavor::Legacy,
            Program::Nft | Program::IptablesNft => Flavor::Nft,
        };
        assert_eq!(flavor, Some(expected), "{program:?}");
    }
}

#[test]
fn a_refusal_quotes_the_command_and_the_kernels_answer() {
    // Jumped to by somebody else, the chain cannot go.
    let (namespace, path) = (Namespace::new(), Path::preferring(Program::IptablesLegacy));
    namespace.block_on(async || {
        let firewall = open(Program::IptablesLegacy, &path).await;
        assert_eq!(firewall.apply(&golden_rules()).await.unwrap().remaining, []);
    });
    namespace.run("iptables-legacy -N MINE");
    namespace.run("iptables-legacy -A MINE -j FLANNEL-FWD");
    let error = namespace.block_on(async || {
        let firewall = open(Program::IptablesLegacy, &path).await;
        firewall.apply(&Rules::none()).await.unwrap_err()
    });
    let text = error.to_string();
    assert!(text.contains("iptables-restore --noflush --wait"), "{text}");
    assert!(text.contains("-X FLANNEL-FWD"), "{text}");
}

#[test]
fn the_hosts_own_firewall_is_asked_whether_it_admits_the_tunnel() {
    let addr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10));
    for program in Program::ALL {
        let (namespace, path) = (Namespace::new(), Path::preferring(program));
        let ask = || {
            namespace.block_on(async || {
                let firewall = open(program, &path).await;
                firewall
                    .admission(Arrival::Udp(8285), "eth0", addr)
                    .await
                    .unwrap()
            })
        };
        assert_eq!(ask(), Admission::Open);
        let iptables = format!("iptables{}", program.suffix());
        if program == Program::Nft {
            namespace.feed(
                "nft -f -",
                "table inet host { chain in { type filter hook input priority 0; policy drop;\n\
                 ct state { established, related } counter accept; iifname lo accept; }\n }\n",
            );
        } else {
            namespace.run(&format!("{iptables} -P INPUT DROP"));
            let established = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";
            namespace.run(&format!("{iptables} -A INPUT {established}"));
        }
        let admission = ask();
        assert!(
            matches!(admission, Admission::Established(_)),
            "{program:?}: {admission:?}"
        );
        let accept = if program == Program::Nft {
            "nft add rule inet host in udp dport 8000-9000 accept".to_owned()
        } else {
            format!("{iptables} -A INPUT -p udp --dport 8000:9000 -j ACCEPT")
        };
        namespace.run(&accept);
        assert_eq!(ask(), Admission::Open, "{program:?}");
    }
}

#[test]
fn one_underlay_family_alone_can_be_untracked() {
    for program in Program::IPTABLES {
        let (namespace, path) = (Namespace::new(), Path::preferring(program));
        namespace.block_on(async || {
            let firewall = open(program, &path).await;
            let rules = Rules::none().with_notrack(Notrack {
                port: 8472,
                underlay: Underlay::Only(Family::V6),
            });
            assert_eq!(firewall.apply(&rules).await.unwrap().remaining, []);
        });
        let traces = traces(&namespace);
        assert!(
            traces.iter().any(|line| line.contains("--dport 8472")),
            "{traces:?}"
        );
        assert!(
            traces.iter().all(|line| !line.starts_with("iptables")),
            "{traces:?}"
        );
    }
}
