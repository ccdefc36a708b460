//! The keeper against real changes by others, and the rules' effect on real packets: source addresses,
//! forwarding, connection tracking.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot prepare itself must fail"
)]

mod firewall_common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use firewall_common::{Namespace, Path, Program, golden, golden_rules, listing, open, v4};
use ipnet::Ipv6Net;
use loden::firewall::{
    Applied, FamilyRules, Keeper, KeeperStatus, Masquerade, Notrack, ResyncInterval, Rules,
    Underlay,
};
use tokio::sync::watch;

/// No test waits so long unless it fails.
const LIMIT: Duration = Duration::from_secs(30);

const NOTRACK: Notrack = Notrack {
    port: 8285,
    underlay: Underlay::Dual,
};

async fn until(
    status: &mut watch::Receiver<KeeperStatus>,
    what: &str,
    condition: impl FnMut(&KeeperStatus) -> bool,
) -> KeeperStatus {
    let reached = tokio::time::timeout(LIMIT, status.wait_for(condition)).await;
    let reached = reached.unwrap_or_else(|_| panic!("waited in vain for {what}"));
    reached.unwrap().clone()
}

/// Runs a keeper inside, and `work` beside it.
fn with_keeper(
    namespace: &Namespace,
    program: Program,
    seconds: i64,
    work: impl AsyncFnOnce(watch::Receiver<KeeperStatus>, watch::Sender<Rules>) + Send,
) {
    let path = Path::preferring(program);
    namespace.block_on(async || {
        let firewall = Arc::new(open(program, &path).await);
        let resync = ResyncInterval::from_secs(seconds).unwrap();
        let keeper = Keeper::new(firewall, resync).unwrap();
        let status = keeper.status();
        let (sender, rules) = watch::channel(golden_rules().with_notrack(NOTRACK));
        tokio::select! {
            end = keeper.run(rules) => panic!("the keeper ended: {end:?}"),
            () = work(status, sender) => {}
        }
    });
}

#[test]
fn whatever_others_do_to_the_ruleset_is_repaired_on_notice() {
    // Longer than any test waits: only a notification can be the reason.
    let never = 86_400;
    for program in [Program::Nft, Program::IptablesNft] {
        let namespace = Namespace::new();
        let changes: &[(&str, &str)] = match program {
            Program::Nft => &[
                ("nft flush ruleset", ""),
                ("nft flush chain ip flannel-ipv4 postrtg", ""),
                ("nft delete table inet loden-notrack", ""),
                (
                    "nft -f -",
                    "flush ruleset\ntable inet firewalld { chain c { type filter hook input priority 10; }\n }\n",
                ),
            ],
            Program::IptablesNft | Program::IptablesLegacy => &[
                ("nft flush ruleset", ""),
                ("iptables-nft -F", ""),
                ("iptables-nft -t nat -F POSTROUTING", ""),
                ("ip6tables-nft -t nat -F", ""),
                ("iptables-nft -t nat -I FLANNEL-POSTRTG -j ACCEPT", ""),
                (
                    "iptables-nft-restore",
                    "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n-A INPUT -i lo -j ACCEPT\nCOMMIT\n",
                ),
            ],
        };
        with_keeper(&namespace, program, never, async |mut status, _rules| {
            let mut last = until(&mut status, "the first look", |s| s.repairs == 1).await;
            for (command, input) in changes {
                assert_eq!(listing(&namespace, program), golden(program));
                namespace.feed(command, input);
                last = until(&mut status, command, |s| s.repairs > last.repairs).await;
                assert_eq!(last.error, None, "{command}");
            }
            assert_eq!(listing(&namespace, program), golden(program));
            // One repair each; its own notifications cause at most a look or two more.
            let count = u64::try_from(changes.len()).unwrap();
            assert_eq!(last.repairs, 1 + count, "{program:?}");
            assert!(last.looks <= 3 * last.repairs, "{last:?}");
        });
    }
}

#[test]
fn the_chains_of_a_service_proxy_cost_no_look() {
    let namespace = Namespace::new();
    let program = Program::IptablesNft;
    with_keeper(&namespace, program, 86_400, async |mut status, _rules| {
        // The second look is the one after its own changes.
        until(&mut status, "the look after its own", |s| s.looks == 2).await;
        namespace.feed(
            "iptables-nft-restore --noflush",
            "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -d 192.0.2.7/32 -j ACCEPT\nCOMMIT\n",
        );
        // Only an opportunity: on a machine too slow to use it, a keeper that looks is not caught here.
        let look = tokio::time::timeout(Duration::from_millis(300), status.changed()).await;
        assert!(look.is_err(), "{:?}", *status.borrow());
        namespace.run("iptables-nft -F FORWARD");
        let end = until(&mut status, "the repair", |s| s.repairs == 2).await;
        assert_eq!(end.looks, 3);
    });
}

#[test]
fn legacy_tables_are_read_again_at_the_interval() {
    let namespace = Namespace::new();
    let program = Program::IptablesLegacy;
    with_keeper(&namespace, program, 1, async |mut status, _rules| {
        until(&mut status, "the first look", |s| s.repairs == 1).await;
        namespace.run("iptables-legacy -t nat -F FLANNEL-POSTRTG");
        until(&mut status, "the repair", |s| s.repairs == 2).await;
        assert_eq!(listing(&namespace, program), golden(program));
    });
}

#[test]
fn other_rules_are_put_in_place_when_others_are_wanted() {
    for program in Program::ALL {
        let namespace = Namespace::new();
        with_keeper(&namespace, program, 86_400, async |mut status, rules| {
            until(&mut status, "the first look", |s| s.repairs == 1).await;
            rules.send(Rules::none()).unwrap();
            until(&mut status, "the removal", |s| s.repairs == 2).await;
            assert_eq!(firewall_common::traces(&namespace), Vec::<String>::new());
        });
    }
}

/// A pod behind a node that has one link to the outside.
struct Topology {
    pod: Namespace,
    node: Namespace,
    outside: Namespace,
}

const POD: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 18, 1, 2)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 2)),
];
const NODE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
const OUTSIDE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2)),
];
/// Where another node's pod would be; the outside plays it.
const OTHER_POD: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 18, 2, 2)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, 2)),
];

impl Topology {
    fn new() -> Self {
        let it = Self {
            pod: Namespace::new(),
            node: Namespace::new(),
            outside: Namespace::new(),
        };
        for (end, name) in [(&it.pod, "pod"), (&it.outside, "ext")] {
            it.node.run(&format!(
                "ip link add {name} type veth peer name eth0 netns {}",
                end.0.name()
            ));
            it.node.run(&format!("ip link set {name} up"));
            end.run("ip link set eth0 up");
        }
        for (namespace, device, addrs) in [
            (&it.node, "pod", ["198.18.1.1/24", "fd00:10:244:1::1/64"]),
            (&it.node, "ext", ["192.0.2.1/24", "2001:db8::1/64"]),
            (&it.pod, "eth0", ["198.18.1.2/24", "fd00:10:244:1::2/64"]),
            (&it.outside, "eth0", ["192.0.2.2/24", "2001:db8::2/64"]),
            (&it.outside, "lo", ["198.18.2.2/32", "fd00:10:244:2::2/128"]),
        ] {
            for addr in addrs {
                let nodad = if addr.contains(':') { " nodad" } else { "" };
                namespace.run(&format!("ip addr add {addr} dev {device}{nodad}"));
            }
        }
        it.pod.run("ip route add default via 198.18.1.1");
        it.pod.run("ip -6 route add default via fd00:10:244:1::1");
        it.outside.run("ip route add default via 192.0.2.1");
        it.outside.run("ip -6 route add default via 2001:db8::1");
        it.node.run("ip route add 198.18.2.0/24 via 192.0.2.2");
        it.node
            .run("ip -6 route add fd00:10:244:2::/64 via 2001:db8::2");
        let forwarding = [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];
        it.node.0.set_sysctls(&forwarding).unwrap();
        it
    }

    fn rules(masquerade: bool, forward: bool) -> Rules {
        let masquerade6 = masquerade.then(|| Masquerade::<Ipv6Net> {
            fully_random: true,
            exempt: vec!["2001:db8:ffff::/48".parse().unwrap()],
        });
        let (network, subnet) = ("fd00:10:244::/48", "fd00:10:244:1::/64");
        let (network, subnet) = (network.parse().unwrap(), subnet.parse().unwrap());
        Rules::none()
            .with(v4("198.18.0.0/16", "198.18.1.0/24", masquerade, forward))
            .with(FamilyRules::new(network, subnet, masquerade6, forward).unwrap())
    }

    fn apply(&self, program: Program, rules: &Rules) -> Applied {
        let path = Path::preferring(program);
        self.node
            .block_on(async || open(program, &path).await.apply(rules).await.unwrap())
    }
}

/// A socket that belongs to the namespace.
fn socket(namespace: &Namespace, addr: IpAddr, port: u16) -> UdpSocket {
    let bind = || UdpSocket::bind((addr, port)).unwrap();
    let socket = namespace.0.run(bind).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

/// The source that a datagram from one socket has when it arrives at the other.
fn observed_source(from: &UdpSocket, to: &UdpSocket) -> SocketAddr {
    from.send_to(b"who", to.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 16];
    loop {
        match to.recv_from(&mut buffer) {
            Ok((_, source)) => return source,
            // A socket with a time limit is interrupted by the end of any child, of other tests too.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => panic!("nothing arrived at {to:?}: {error}"),
        }
    }
}

#[test]
fn only_what_leaves_the_network_is_masqueraded() {
    for program in Program::ALL {
        for masquerade in [false, true] {
            let it = Topology::new();
            let applied = it.apply(program, &Topology::rules(masquerade, true));
            assert_eq!(applied.remaining, []);
            for family in 0..2 {
                let pod = socket(&it.pod, POD[family], 0);
                let outside = socket(&it.outside, OUTSIDE[family], 0);
                let other_pod = socket(&it.outside, OTHER_POD[family], 0);
                let seen = observed_source(&pod, &outside).ip();
                let wanted = if masquerade {
                    NODE[family]
                } else {
                    POD[family]
                };
                assert_eq!(seen, wanted, "{program:?}: a pod seen from outside");
                let pod = socket(&it.pod, POD[family], 0);
                let seen = observed_source(&pod, &other_pod).ip();
                assert_eq!(seen, POD[family], "{program:?}: a pod seen by a pod");
                // Both ways: a pod sees a pod of another node as itself.
                let seen = observed_source(&other_pod, &socket(&it.pod, POD[family], 0)).ip();
                assert_eq!(seen, OTHER_POD[family], "{program:?}: a remote pod");
                let node = socket(&it.node, NODE[family], 0);
                let seen = observed_source(&node, &socket(&it.pod, POD[family], 0)).ip();
                assert_eq!(seen, NODE[family], "{program:?}: a node seen by its pod");
            }
        }
    }
}

#[test]
fn a_tcp_connection_through_the_masquerade_answers_the_pod() {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    let it = Topology::new();
    let applied = it.apply(Program::Nft, &Topology::rules(true, true));
    assert_eq!(applied.remaining, []);
    let listener = it
        .outside
        .0
        .run(|| TcpListener::bind((OUTSIDE[0], 0)).unwrap());
    let listener = listener.unwrap();
    let addr = listener.local_addr().unwrap();
    let mut client = it
        .pod
        .0
        .run(|| TcpStream::connect_timeout(&addr, LIMIT).unwrap())
        .unwrap();
    let (mut server, source) = listener.accept().unwrap();
    assert_eq!(source.ip(), NODE[0]);
    server.write_all(b"hello").unwrap();
    drop(server);
    let mut text = String::new();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
}

#[test]
fn the_forward_rules_open_a_node_that_drops_what_it_forwards() {
    for program in Program::IPTABLES {
        let it = Topology::new();
        for family in ["iptables", "ip6tables"] {
            it.node
                .run(&format!("{family}{} -P FORWARD DROP", program.suffix()));
        }
        // Until one is answered, or for so many seconds.
        let pings = |addr: IpAddr, seconds: u32| {
            let command = format!("ping -n -q -i0.2 -c1 -w{seconds} {addr}");
            it.pod.attempt(&command, "").0
        };
        assert!(!OTHER_POD.iter().any(|addr| pings(*addr, 1)), "{program:?}");
        let applied = it.apply(program, &Topology::rules(false, true));
        assert_eq!(applied.remaining, []);
        assert!(OTHER_POD.iter().all(|addr| pings(*addr, 20)), "{program:?}");
    }
}

/// The connections that the node tracks between these ends, the second with the tunnel's port.
fn tracked(node: &Namespace, from: SocketAddr, to: IpAddr) -> Vec<String> {
    let read = || std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
    let table = node.0.run(read).unwrap();
    let spelled = |addr: IpAddr| match addr {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => v6.segments().map(|part| format!("{part:04x}")).join(":"),
    };
    let (source, port) = (spelled(from.ip()), from.port());
    let ends = format!("src={source} dst={} sport={port} dport=8285 ", spelled(to));
    let lines = table.lines().filter(|line| line.contains(&ends));
    lines.map(str::to_owned).collect()
}

#[test]
fn the_tunnels_datagrams_are_not_tracked_and_a_pods_to_the_same_port_are() {
    for program in Program::ALL {
        let it = Topology::new();
        let plain = Topology::rules(true, true);
        let applied = it.apply(program, &plain);
        assert_eq!(applied.remaining, []);
        for untracked in [false, true] {
            if untracked {
                let applied = it.apply(program, &plain.clone().with_notrack(NOTRACK));
                assert!(
                    applied.tracked_because.is_none(),
                    "{:?}",
                    applied.tracked_because
                );
            }
            for family in 0..2 {
                let receiver = socket(&it.node, NODE[family], 8285);
                let peer_receiver = socket(&it.outside, OUTSIDE[family], 8285);
                let sender = socket(&it.node, NODE[family], 0);
                let peer_sender = socket(&it.outside, OUTSIDE[family], 0);
                let sent = observed_source(&sender, &peer_receiver);
                let arrived = observed_source(&peer_sender, &receiver);
                for (from, to) in [(sent, OUTSIDE[family]), (arrived, NODE[family])] {
                    let entries = tracked(&it.node, from, to);
                    assert_eq!(entries.is_empty(), untracked, "{program:?}: {entries:?}");
                }
                // A pod that talks to that port outside is still masqueraded.
                let pod = socket(&it.pod, POD[family], 0);
                let seen = observed_source(&pod, &peer_receiver).ip();
                assert_eq!(seen, NODE[family], "{program:?}");
            }
        }
    }
}
