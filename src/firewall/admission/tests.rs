use std::net::{IpAddr, Ipv4Addr};

use super::*;

const PROBE: Probe<'_> = Probe {
    arrival: Arrival::Udp(8285),
    interface: "eth0",
    addr: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10)),
};

fn iptables(rules: &str) -> Admission {
    judge(PROBE, None, &[("iptables", rules.to_owned())])
}

fn nft(rules: &str) -> Admission {
    let listing = format!(
        "table inet filter {{\n\tset names {{\n\t\ttype ipv4_addr\n\t\telements = {{ 192.0.2.7 }}\n\t}}\n\n\
         \tchain input {{\n\t\ttype filter hook input priority filter; policy drop;\n{rules}\n\t}}\n\n\
         \tchain zone {{\n\t\tudp dport 8285 accept\n\t}}\n}}\n"
    );
    judge(PROBE, Some(&listing), &[])
}

const ESTABLISHED: &str = "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n";

#[test]
fn a_host_without_rules_is_open() {
    assert_eq!(judge(PROBE, None, &[]), Admission::Open);
    assert_eq!(
        iptables("-P INPUT ACCEPT\n-P OUTPUT ACCEPT\n"),
        Admission::Open
    );
}

#[test]
fn a_dropping_policy_behind_an_accept_for_established_ones_keeps_ports_fixed() {
    let admission = iptables(&format!("-P INPUT DROP\n{ESTABLISHED}"));
    assert!(!admission.untracked() && !admission.varying_source_ports());
    let Admission::Established(refusal) = admission else {
        panic!("{admission:?}");
    };
    assert_eq!(
        refusal.to_string(),
        "iptables filter INPUT refuses it by: its policy"
    );
}

#[test]
fn a_reject_at_the_end_is_as_good_as_a_policy() {
    let rules = format!(
        "-P INPUT ACCEPT\n{ESTABLISHED}-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n\
         -A INPUT -j REJECT --reject-with icmp-host-prohibited\n"
    );
    let Admission::Established(refusal) = iptables(&rules) else {
        panic!("{:?}", iptables(&rules));
    };
    assert!(refusal.rule.starts_with("-A INPUT -j REJECT"), "{refusal}");
}

#[test]
fn an_accept_for_the_port_opens_it_in_any_spelling() {
    for accept in [
        "-p udp -m udp --dport 8285 -j ACCEPT",
        "-p udp -m multiport --dports 53,8000:9000 -j ACCEPT",
        "-s 192.0.2.0/24 -j ACCEPT",
        "-i eth+ -m comment --comment \"the -j DROP of old\" -j ACCEPT",
        "! -i lo -p udp -j ACCEPT",
    ] {
        let rules = format!("-P INPUT DROP\n{ESTABLISHED}-A INPUT {accept}\n");
        assert_eq!(iptables(&rules), Admission::Open, "{accept}");
    }
    for other in [
        "-p udp -m udp --dport 8286 -j ACCEPT",
        "-s 198.51.100.0/24 -j ACCEPT",
        "-i eth1 -j ACCEPT",
        "-p udp -m udp --dport 8285 -m limit --limit 5/sec -j ACCEPT",
        "-p udp -m udp --dport 8285 -j LOG --log-prefix \"ACCEPT \"",
    ] {
        let rules = format!("-P INPUT DROP\n{ESTABLISHED}-A INPUT {other}\n");
        assert!(
            matches!(iptables(&rules), Admission::Established(_)),
            "{other}"
        );
    }
}

#[test]
fn an_accept_for_new_connections_only_keeps_tracking_but_frees_the_ports() {
    let rules = format!(
        "-P INPUT DROP\n{ESTABLISHED}-A INPUT -p udp -m state --state NEW -m udp --dport 8285 -j ACCEPT\n"
    );
    let admission = iptables(&rules);
    assert!(matches!(admission, Admission::Tracked(_)), "{admission:?}");
    assert!(!admission.untracked() && admission.varying_source_ports());
}

#[test]
fn chains_are_followed_and_returned_from() {
    let rules = "-P INPUT DROP\n-N a\n-N b\n-A INPUT -j a\n-A a -p udp -j b\n-A a -j DROP\n\
                 -A b -p tcp -j ACCEPT\n-A b -m conntrack --ctstate INVALID -j RETURN\n\
                 -A b -p udp -m udp --dport 8285 -j ACCEPT\n";
    assert_eq!(iptables(rules), Admission::Open);
    let closed = iptables(&rules.replace("8285", "1"));
    assert!(matches!(closed, Admission::Closed(_)), "{closed:?}");
}

#[test]
fn chains_that_call_each_other_end_with_the_careful_answer() {
    let rules = "-P INPUT ACCEPT\n-N a\n-A INPUT -j a\n-A a -j a\n-A a -j a\n";
    assert!(matches!(iptables(rules), Admission::Closed(_)));
}

#[test]
fn what_leaves_is_followed_too() {
    let rules = "-P INPUT ACCEPT\n-P OUTPUT DROP\n-A OUTPUT -o eth0 -m conntrack --ctstate ESTABLISHED,NEW -j ACCEPT\n";
    assert!(matches!(iptables(rules), Admission::Tracked(_)));
}

#[test]
fn nftables_rules_are_read_in_their_usual_spellings() {
    let established = "\t\tct state established,related accept\n";
    for accept in [
        "udp dport 8285 accept",
        "udp dport { 53, 8000-9000 } counter packets 3 bytes 99 accept",
        "iifname \"eth0\" goto zone",
        "ip saddr 192.0.2.0/24 accept",
        "meta l4proto { tcp, udp } th dport 8285 accept comment \"drop nothing\"",
        "iifname != \"eth1\" jump zone",
        "log prefix \"in drop \" level debug jump zone",
    ] {
        assert_eq!(
            nft(&format!("{established}\t\t{accept}")),
            Admission::Open,
            "{accept}"
        );
    }
    for other in [
        "tcp dport 8285 accept",
        "udp dport 53 accept",
        "ip saddr @names accept",
        "ip6 saddr ::/0 accept",
        "iifname \"lo\" jump zone",
        "udp dport 8285 limit rate 5/second accept",
    ] {
        let found = nft(&format!("{established}\t\t{other}"));
        assert!(
            matches!(found, Admission::Established(_)),
            "{other}: {found:?}"
        );
    }
}

#[test]
fn a_map_of_states_is_read_entry_by_entry() {
    let map = "\t\tct state vmap { established : accept, related : accept, invalid : drop }\n";
    assert!(matches!(nft(map), Admission::Established(_)));
    assert_eq!(
        nft(&format!("{map}\t\tudp dport 8285 accept")),
        Admission::Open
    );
    let new = format!("{map}\t\tct state new udp dport 8285 accept");
    assert!(matches!(nft(&new), Admission::Tracked(_)));
}

#[test]
fn every_table_must_let_it_through() {
    let listing = "table inet a {\n\tchain in {\n\t\ttype filter hook input priority filter; policy accept;\n\
                   \t\tudp dport 8285 accept\n\t}\n}\n\
                   table ip b {\n\tchain in {\n\t\ttype filter hook input priority 10; policy drop;\n\t}\n}\n\
                   table ip6 c {\n\tchain in {\n\t\ttype filter hook input priority 10; policy drop;\n\t}\n}\n";
    let Admission::Closed(refusal) = judge(PROBE, Some(listing), &[]) else {
        panic!("the second table drops");
    };
    assert_eq!(refusal.chain, "ip b in");
}

#[test]
fn ip_in_ip_is_admitted_by_its_protocol_and_by_nothing_about_ports() {
    let probe = Probe {
        arrival: Arrival::Ipip,
        ..PROBE
    };
    let by_iptables = |rule: &str| {
        let rules = format!("-P INPUT DROP\n{ESTABLISHED}-A INPUT {rule}\n");
        judge(probe, None, &[("iptables", rules)])
    };
    let by_nft = |rule: &str| {
        let listing = format!(
            "table inet f {{\n\tchain i {{\n\t\ttype filter hook input priority filter; policy drop;\n\
             \t\tct state established accept\n\t\t{rule}\n\t}}\n}}\n"
        );
        judge(probe, Some(&listing), &[])
    };
    let open = [
        by_iptables("-p ipencap -j ACCEPT"),
        by_iptables("-p 4 -s 192.0.2.0/24 -j ACCEPT"),
        by_iptables("! -p udp -j ACCEPT"),
        by_nft("ip protocol ipencap accept"),
        by_nft("meta l4proto { udp, ipencap } accept"),
        by_nft("meta l4proto 4 ip saddr 192.0.2.0/24 accept"),
    ];
    assert_eq!(open, [const { Admission::Open }; 6]);
    for refused in [
        // Another protocol, by the name that everybody expects.
        by_iptables("-p ipip -j ACCEPT"),
        by_iptables("-p udp -j ACCEPT"),
        by_nft("udp dport 8285 accept"),
        by_nft("udp dport != 53 accept"),
        by_nft("meta l4proto ipip accept"),
    ] {
        assert!(matches!(refused, Admission::Established(_)), "{refused:?}");
    }
    let refusal = judge(probe, None, &[("iptables", "-P INPUT DROP\n".to_owned())]);
    assert!(matches!(refusal, Admission::Closed(_)), "{refusal:?}");
}

proptest::proptest! {
    #[test]
    fn no_listing_makes_the_reader_fail(text in "[-a-zA-Z{}!,:;\" \\n]{0,200}") {
        judge(PROBE, Some(&text), &[("iptables", text.clone())]);
    }
}

#[test]
fn what_our_own_source_check_refuses_is_no_refusal_of_the_hosts() {
    let probe = Probe {
        arrival: Arrival::Ipip,
        ..PROBE
    };
    let listing = |name: &str| {
        format!(
            "table inet {name} {{\n\tset own-v4 {{\n\t\ttype ipv4_addr\n\t}}\n\n\tchain outer {{\n\t\ttype filter hook input \
             priority raw; policy accept;\n\t\tip protocol ipencap counter drop\n\t}}\n}}\n"
        )
    };
    let refusal = |name| judge(probe, Some(&listing(name)), &[]).refusal().is_some();
    assert!(!refusal("loden-ipip"));
    assert!(refusal("loden-ipip2"));
}
