//! `loden explain` against the packet itself: what it says is sent, and what then happens is what it said, to the
//! counters that it named. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use common::{LODEN, await_ping, lab, pings, spec};
use loden::lab::{Backend, Interrupt, Lab, Member, Spec, Wire, wait};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);
/// Packets of a kind, so that the kernel's own now and then do not hide them.
const SOME: u64 = 20;
/// How often something is tried that others' packets may spoil, or a machine that stands still for a moment.
const ATTEMPTS: u32 = 8;

fn up() -> Lab {
    let spec = Spec {
        wire: Wire::PacketNoGro,
        ..spec(2, Backend::Udp)
    };
    let mut lab = lab(spec);
    lab.await_connected().unwrap();
    lab
}

fn loden(lab: &Lab, node: u8, args: &[&str]) -> Value {
    let mut errors = String::new();
    // A daemon that is busy says so, and is asked again.
    let answer = wait::until("an answer", LIMIT, &Interrupt::default(), || {
        let mut command = Command::new(LODEN);
        let command = command.args(args).args(["--json", "--socket"]);
        let output = command.arg(lab.status_socket(node)).output().unwrap();
        errors = String::from_utf8(output.stderr).unwrap();
        Ok(output.status.success().then_some(output.stdout))
    });
    let answer = answer.unwrap_or_else(|_| unreachable!("{args:?}: {errors}"));
    serde_json::from_slice(&answer).unwrap()
}

fn explain(lab: &Lab, node: u8, from: impl ToString, to: impl ToString, args: &[&str]) -> Value {
    let (from, to) = (from.to_string(), to.to_string());
    loden(lab, node, &[&["explain", &from, &to], args].concat())
}

/// The value of a counter named as `datapath.total.encap.sent`.
fn counter(status: &Value, name: &str) -> u64 {
    let pointer = format!("/{}", name.replace('.', "/"));
    let value = status.pointer(&pointer);
    value
        .and_then(Value::as_u64)
        .unwrap_or_else(|| unreachable!("no counter {name}"))
}

/// Everything that counts packets of a direction's outcome.
fn outcomes(status: &Value) -> Vec<(String, u64)> {
    let mut all = Vec::new();
    for direction in ["encap", "decap"] {
        let counters = &status["datapath"]["total"][direction];
        for name in ["sent", "answered"] {
            all.push((
                format!("datapath.total.{direction}.{name}"),
                counters[name].as_u64().unwrap(),
            ));
        }
        for (reason, count) in counters["drops"].as_object().unwrap() {
            all.push((
                format!("datapath.total.{direction}.drops.{reason}"),
                count.as_u64().unwrap(),
            ));
        }
    }
    all
}

/// Sends SOME packets and compares what moved with what `explain` said would: every counter it named by SOME,
/// and no other outcome of that direction by as much.
fn comes_true(lab: &Lab, node: u8, said: &Value, send: impl Fn()) {
    let named: Vec<&str> = said["counters"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap())
        .collect();
    assert!(!named.is_empty(), "{said}");
    let direction = if named[0].contains("encap") {
        ".encap."
    } else {
        ".decap."
    };
    let mut others = Vec::new();
    for _ in 0..ATTEMPTS {
        let before = loden(lab, node, &["status"]);
        send();
        let mut after = Value::Null;
        let moved = wait::until(
            "the counters that were named",
            LIMIT,
            &Interrupt::default(),
            || {
                after = loden(lab, node, &["status"]);
                let all = named
                    .iter()
                    .all(|name| counter(&after, name) >= counter(&before, name) + SOME);
                Ok(all.then_some(()))
            },
        );
        assert!(moved.is_ok(), "{said}\nbefore {before}\nafter {after}");
        // The longer it takes, the more probes are counted, too.
        let outcomes = outcomes(&before).into_iter().zip(outcomes(&after));
        others = outcomes
            .filter(|((name, old), (_, new))| {
                let is_named = named.contains(&name.as_str());
                name.contains(direction) && !is_named && new - old >= SOME / 2
            })
            .map(|((name, _), _)| name)
            .collect();
        if others.is_empty() {
            return;
        }
    }
    assert!(others.is_empty(), "{others:?} were not named: {said}");
}

/// UDP datagrams from a member's address; what the kernel refuses is part of the case.
fn send(lab: &Lab, member: Member, from: IpAddr, to: IpAddr) {
    let netns = lab.netns(member);
    let socket = netns.run(|| UdpSocket::bind(SocketAddr::new(from, 0)));
    let socket = socket.unwrap().unwrap();
    for _ in 0..SOME {
        let _refused = socket.send_to(b"explained", SocketAddr::new(to, 9));
    }
}

fn step<'a>(said: &'a Value, what: &str) -> &'a str {
    let steps = said["steps"].as_array().unwrap();
    let step = steps.iter().find(|step| step["what"] == what);
    step.map_or("", |step| step["found"].as_str().unwrap())
}

#[test]
fn packet_to_a_peer_is_sent_there_and_delivered_there() {
    let lab = up();
    let (a, b) = (lab.pod_addr(1, 1).unwrap(), lab.pod_addr(2, 1).unwrap());
    let here = explain(&lab, 1, a, b, &[]);
    assert_eq!(here["outcome"], "sent", "{here}");
    let verdict = here["verdict"].as_str().unwrap();
    assert!(
        verdict.contains("192.0.2.2:8285") && verdict.contains("accepts"),
        "{verdict}"
    );
    assert!(
        step(&here, "destination").contains("of node 192.0.2.2"),
        "{here}"
    );
    assert!(step(&here, "route").contains("flannel0"), "{here}");
    assert!(
        step(&here, "mtu").contains("1472 in flannel0, 1500 on eth0, 28 of headers"),
        "{here}"
    );
    let link = lab.run(
        Member::Node(2),
        "ip",
        &["-br", "link", "show", "dev", "eth0"],
    );
    let link = link.unwrap();
    let mac = link.split_whitespace().nth(2).unwrap();
    assert!(step(&here, "neighbour").contains(mac), "{here}");
    let there = explain(&lab, 2, a, b, &[]);
    assert_eq!(there["outcome"], "delivered", "{there}");
    comes_true(&lab, 1, &here, || {
        send(&lab, Member::Pod(1, 1), a.into(), b.into())
    });
    comes_true(&lab, 2, &there, || {
        send(&lab, Member::Pod(1, 1), a.into(), b.into())
    });
    // A pod that is gone: its neighbours find out, and then we know.
    let gone = Ipv4Addr::from(u32::from(b) + 70);
    let silent = wait::until("silence", LIMIT, &Interrupt::default(), || {
        send(&lab, Member::Pod(1, 1), a.into(), gone.into());
        let said = explain(&lab, 2, a, gone, &[]);
        let verdict = said["verdict"].as_str().unwrap();
        Ok(verdict
            .contains(&format!("where {gone} does not answer"))
            .then_some(()))
    });
    silent.unwrap();
    // From where the packet neither begins nor ends.
    assert_eq!(
        explain(&lab, 1, b, Ipv4Addr::new(203, 0, 113, 1), &[])["outcome"],
        "elsewhere"
    );
    assert_eq!(explain(&lab, 1, a, a, &[])["outcome"], "local");
}

#[test]
fn packet_to_nobody_is_answered_and_one_from_nobody_is_dropped_by_the_peer() {
    let lab = up();
    let a = lab.pod_addr(1, 1).unwrap();
    let nobody = Ipv4Addr::new(198, 18, 250, 7);
    let said = explain(&lab, 1, a, nobody, &[]);
    assert_eq!(
        (said["outcome"].as_str(), said["reason"].as_str()),
        (Some("answered"), Some("no_route"))
    );
    assert!(
        step(&said, "destination").contains("nobody's lease"),
        "{said}"
    );
    comes_true(&lab, 1, &said, || {
        send(&lab, Member::Pod(1, 1), a.into(), nobody.into())
    });

    // A source that is not ours: node 2 drops it, and its own explanation is about the same reason.
    let b = lab.pod_addr(2, 1).unwrap();
    lab.run(
        Member::Pod(1, 1),
        "ip",
        &["addr", "add", "198.18.250.7/32", "dev", "eth0"],
    )
    .unwrap();
    let there = explain(&lab, 2, nobody, b, &[]);
    assert_eq!(
        (there["outcome"].as_str(), there["reason"].as_str()),
        (Some("dropped"), Some("spoofed_source"))
    );
    let before = loden(&lab, 2, &["status"]);
    send(&lab, Member::Pod(1, 1), nobody.into(), b.into());
    let name = "datapath.total.decap.drops.spoofed_source";
    wait::until(
        "drops by the source check",
        LIMIT,
        &Interrupt::default(),
        || {
            let now = counter(&loden(&lab, 2, &["status"]), name);
            Ok((now >= counter(&before, name) + SOME).then_some(()))
        },
    )
    .unwrap();
}

#[test]
fn packet_that_never_reaches_the_tunnel_is_said_not_to() {
    let lab = up();
    let (a, b) = (lab.pod_addr(1, 1).unwrap(), lab.pod_addr(2, 1).unwrap());
    let node = Member::Node(1);
    let unsent = |said: &Value, words: &str| {
        assert_eq!(said["outcome"], "kernel", "{said}");
        let verdict = said["verdict"].as_str().unwrap();
        assert!(verdict.contains(words), "{verdict}");
        // The longer it takes, the more probes are counted.
        let unread = (0..ATTEMPTS).any(|_| {
            let before = counter(&loden(&lab, 1, &["status"]), "datapath.total.encap.read");
            send(&lab, Member::Pod(1, 1), a.into(), b.into());
            // What reaches the tunnel is counted within one burst; a ping takes longer.
            assert!(!pings(&lab, Member::Pod(1, 1), (2, 1)), "{verdict}");
            let after = counter(&loden(&lab, 1, &["status"]), "datapath.total.encap.read");
            after < before + SOME / 2
        });
        assert!(unread, "{verdict}");
    };
    let narrow = format!("{b}/32");
    lab.run(
        node,
        "ip",
        &["route", "add", &narrow, "via", "192.0.2.2", "dev", "eth0"],
    )
    .unwrap();
    // Node 2 would forward it all the same.
    lab.run(Member::Node(2), "nft", &["add table inet t; add chain inet t c { type filter hook prerouting priority -300; }; add rule inet t c iifname eth0 ip saddr 198.18.0.0/15 drop"]).unwrap();
    unsent(&explain(&lab, 1, a, b, &[]), "routes it by eth0");
    lab.run(node, "ip", &["route", "del", &narrow]).unwrap();
    lab.run(Member::Node(2), "nft", &["delete table inet t"])
        .unwrap();
    await_ping(&lab, Member::Pod(1, 1), (2, 1));
    lab.netns(node)
        .set_sysctls(&[("ipv4/ip_forward", "0")])
        .unwrap();
    unsent(&explain(&lab, 1, a, b, &[]), "does not forward");
    lab.netns(node)
        .set_sysctls(&[("ipv4/ip_forward", "1")])
        .unwrap();
    assert_eq!(explain(&lab, 1, a, b, &[])["outcome"], "sent");
}

#[test]
fn packet_that_is_too_long_is_told_so_and_one_that_fits_is_not() {
    let lab = up();
    let (a, b) = (lab.pod_addr(1, 1).unwrap(), lab.pod_addr(2, 1).unwrap());
    let ping = |len: u32| {
        let payload = (len - 28).to_string();
        let to = b.to_string();
        let args = ["-n", "-q", "-c1", "-W2", "-Mdo", "-s", &payload, &to];
        lab.run(Member::Node(1), "ping", &args).is_ok()
    };
    for (len, outcome, passes) in [(1472, "sent", true), (1473, "kernel", false)] {
        let len_text = len.to_string();
        let said = explain(&lab, 1, a, b, &["--df", "--len", &len_text]);
        assert_eq!(said["outcome"], outcome, "{said}");
        let tries = if passes { ATTEMPTS } else { 1 };
        assert_eq!((0..tries).any(|_| ping(len)), passes, "{len}");
    }
    // May be fragmented: the kernel cuts it for the tunnel's MTU.
    assert_eq!(
        explain(&lab, 1, a, b, &["--len", "3000"])["outcome"],
        "sent"
    );
    // Once the path proved narrower, the daemon itself answers.
    lab.run(
        Member::Node(1),
        "ip",
        &["route", "add", "192.0.2.2/32", "dev", "eth0", "mtu", "1300"],
    )
    .unwrap();
    let mut said = Value::Null;
    let learned = wait::until("a narrow path", LIMIT, &Interrupt::default(), || {
        assert!(!ping(1400));
        said = explain(&lab, 1, a, b, &["--df", "--len", "1400"]);
        let found = (said["outcome"].as_str(), said["reason"].as_str());
        Ok((found == (Some("answered"), Some("too_big"))).then_some(()))
    });
    assert!(learned.is_ok(), "{said}");
    assert!(
        step(&said, "path mtu").contains("carries 1300 bytes"),
        "{said}"
    );
    let short = explain(&lab, 1, a, b, &["--df", "--len", "1200"]);
    assert_eq!(short["outcome"], "sent", "{short}");
    assert!(
        step(&short, "path mtu").contains("carries 1300 bytes"),
        "{short}"
    );
    assert!((0..ATTEMPTS).any(|_| ping(1200)));
}

#[test]
fn underlay_that_is_down_and_a_firewall_that_is_closed_are_found() {
    let lab = up();
    let (a, b) = (lab.pod_addr(1, 1).unwrap(), lab.pod_addr(2, 1).unwrap());
    // Node 2's own firewall.
    lab.run(Member::Node(2), "nft", &["add table inet host; add chain inet host in { type filter hook input priority 0; }; add rule inet host in udp dport 8285 drop"]).unwrap();
    let said = explain(&lab, 2, a, b, &[]);
    assert_eq!(said["outcome"], "kernel", "{said}");
    assert!(
        said["verdict"]
            .as_str()
            .unwrap()
            .contains("udp dport 8285 drop"),
        "{said}"
    );
    assert!(!pings(&lab, Member::Pod(1, 1), (2, 1)));
    lab.run(Member::Node(2), "nft", &["delete table inet host"])
        .unwrap();
    assert_eq!(explain(&lab, 2, a, b, &[])["outcome"], "delivered");
    await_ping(&lab, Member::Pod(1, 1), (2, 1));
    // A route to the peer that is none.
    lab.run(
        Member::Node(1),
        "ip",
        &["route", "add", "unreachable", "192.0.2.2/32"],
    )
    .unwrap();
    let said = explain(&lab, 1, a, b, &[]);
    assert_eq!(
        (said["outcome"].as_str(), said["reason"].as_str()),
        (Some("dropped"), Some("underlay_down")),
        "{said}"
    );
    comes_true(&lab, 1, &said, || {
        send(&lab, Member::Pod(1, 1), a.into(), b.into())
    });
}

#[test]
fn text_has_the_verdict_first_and_names_what_was_not_seen() {
    let lab = up();
    let (a, b) = (lab.pod_addr(1, 1).unwrap(), lab.pod_addr(2, 1).unwrap());
    let output = Command::new(LODEN)
        .args(["explain", &a.to_string(), &b.to_string(), "--socket"])
        .arg(lab.status_socket(1))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with("verdict     this node sends it to 192.0.2.2:8285"),
        "{text}"
    );
    assert!(
        text.contains("not seen") && text.contains("ask there"),
        "{text}"
    );
    let output = Command::new(LODEN)
        .args(["explain", "198.18.0.1", "fd00::1", "--socket"])
        .arg(lab.status_socket(1))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("different families"), "{errors}");
}

#[test]
fn traced_probes_are_followed_to_where_sight_ends() {
    let mut lab = up();
    let (a, b) = (lab.pod_addr(1, 1).unwrap(), lab.pod_addr(2, 1).unwrap());
    let trace = |lab: &Lab| {
        let said = explain(lab, 1, a, b, &["--trace", "--len", "500"]);
        assert_eq!(said["outcome"], "sent", "{said}");
        let probed = step(&said, "last probe").to_owned();
        (said["trace"].to_string(), probed)
    };
    // Traces until one says all of this: probes and answers come too late where a daemon stands still for a moment.
    let says = |lab: &Lab, parts: &[&str], is_right: &dyn Fn(&str, &str) -> bool| {
        let mut last = (String::new(), String::new());
        let said = wait::until("a trace", 2 * LIMIT, &Interrupt::default(), || {
            last = trace(lab);
            let all = parts.iter().all(|part| last.0.contains(part));
            Ok((all && is_right(&last.0, &last.1)).then_some(()))
        });
        assert!(said.is_ok(), "{parts:#?}: {last:#?}");
    };
    let whole = [
        "3 marked probes of 500 bytes",
        "this node: 3 sent, to 192.0.2.2:8285 over udp",
        "192.0.2.2: 3 delivered, from 192.0.2.1:",
        "192.0.2.2: its daemon saw 3 of them come in by tunnel, with a TTL of ",
        "back from 192.0.2.2: 3 sent, to 192.0.2.1:8285 over udp",
        "back here: ",
        "delivered, from 192.0.2.2",
        "there and back in ",
    ];
    says(&lab, &whole, &|text, probed| {
        probed.contains("answers") && !text.contains("get lost")
    });
    // Its firewall closes the tunnel's port, in front of its workers, and then drops what they deliver.
    for (rule, parts) in [
        (
            "udp dport 8285",
            [
                "192.0.2.2: none of the probes reached its workers",
                "3 of 3 get lost between this node and 192.0.2.2, on the way there",
                "192.0.2.2's own for the tunnel's port",
            ],
        ),
        (
            "iifname flannel0 udp dport 18285",
            [
                "192.0.2.2: 3 that came did not reach its daemon",
                "192.0.2.2: its daemon took in none of them",
                "3 of 3 get lost on 192.0.2.2, between its links and its daemon",
            ],
        ),
    ] {
        let wall = format!(
            "table ip wall {{ chain c {{ type filter hook input priority -500; {rule} drop; }}; }}"
        );
        lab.run(Member::Node(2), "nft", &[&wall]).unwrap();
        says(&lab, &parts, &|_, _| true);
        lab.run(Member::Node(2), "nft", &["delete table ip wall"])
            .unwrap();
    }
    // Nobody answers there any more: sight ends behind our own workers.
    let pid = lab.daemon_pids()[1].to_string();
    lab.run(Member::Node(2), "kill", &["-9", &pid]).unwrap();
    wait::until("its end", LIMIT, &Interrupt::default(), || {
        Ok(lab.check_daemons().is_err().then_some(()))
    })
    .unwrap();
    let parts = [
        "this node: ",
        "192.0.2.2: sight ends here",
        "back here: no answer reached its workers",
    ];
    says(&lab, &parts, &|_, _| true);
}

#[test]
fn where_the_kernel_carries_packets_its_way_is_told_and_probes_are_sent() {
    for (backend, by, links) in [
        (Backend::Vxlan, "flannel.1", "flannel.1, eth0"),
        (Backend::HostGw, "eth0", "eth0"),
    ] {
        let mut lab = lab(spec(2, backend));
        lab.await_connected().unwrap();
        let (a, b) = (lab.pod_addr(1, 1).unwrap(), lab.pod_addr(2, 1).unwrap());
        let mut said = Value::Null;
        let traced = wait::until("a trace", LIMIT, &Interrupt::default(), || {
            said = explain(&lab, 1, a, b, &["--trace"]);
            let trace = said["trace"].to_string();
            Ok(trace.contains("its daemon saw 3 of them").then_some(()))
        });
        assert!(traced.is_ok(), "{backend:?} {said}");
        let verdict = said["verdict"].as_str().unwrap();
        assert!(
            verdict.starts_with(&format!("the kernel sends it to 192.0.2.2 by {by}")),
            "{said}"
        );
        assert_eq!(said["outcome"], "kernel");
        assert!(step(&said, "route").contains(by), "{said}");
        let unseen = said["unseen"].to_string();
        assert!(unseen.contains("no worker of ours sees it"), "{said}");
        let trace = said["trace"].to_string();
        let reading = format!("this node: reading packet sockets on {links}: ");
        assert!(trace.contains(&reading), "{trace}");
        lab.run(Member::Node(1), "sysctl", &["-qw", "net.ipv4.ip_forward=0"])
            .unwrap();
        let said = explain(&lab, 1, a, b, &[]);
        let verdict = said["verdict"].as_str().unwrap();
        assert!(verdict.contains("does not forward"), "{said}");
        let long = explain(&lab, 2, b, a, &["--len", "1501", "--df"]);
        let verdict = long["verdict"].as_str().unwrap();
        assert!(verdict.contains("exceed the overlay's MTU"), "{long}");
        // At the other end, the pod's route is told.
        let said = explain(&lab, 2, a, b, &[]);
        assert!(
            said["verdict"]
                .as_str()
                .unwrap()
                .contains("forwards it by cni0"),
            "{said}"
        );
    }
}
