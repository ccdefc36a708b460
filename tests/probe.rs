//! Probes between nodes: the responder of a daemon, asked from the next node by ours, over the overlay that the
//! daemons made. What is found is compared with what the test made of the path. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use common::{lab, spec};
use loden::lab::{Backend, Lab, Member, Spec, Wire};
use loden::lease::{Lease, LeaseAttrs, LeaseExtension, Subnets};
use loden::probe::past::{Past, Target, Wanted};
use loden::probe::{Directory, Path, Prober, Responder, Round};
use loden::wire::probe::{HEADER_LEN, Identity, Kind, PORT, Probe};

/// How long an answer is waited for that must not come.
const PATIENCE: Duration = Duration::from_millis(300);

/// How long one is waited for that must come.
const LIMIT: Duration = Duration::from_secs(20);

/// How long a size is waited for before it counts as lost.
const SIZE_PATIENCE: Duration = Duration::from_millis(700);

fn up(backend: Backend) -> Lab {
    let spec = Spec {
        wire: Wire::PacketNoGro,
        ..spec(2, backend)
    };
    let mut lab = lab(spec);
    lab.await_connected().unwrap();
    lab
}

fn subnets(lab: &Lab, node: u8) -> Subnets {
    format!("{}-24", base(lab, node)).parse().unwrap()
}

/// What a daemon on the first node would know.
fn directory(lab: &Lab) -> Arc<Directory> {
    let directory = Directory::new(1);
    directory.lease(&subnets(lab, 1));
    let lease = Lease {
        subnets: subnets(lab, 2),
        attrs: LeaseAttrs {
            public_ip: Some(loden::lab::plan::underlay_v4(2)),
            ..LeaseAttrs::default()
        },
        expires: None,
        extension: LeaseExtension::default(),
    };
    directory.update([&lease].into_iter());
    Arc::new(directory)
}

/// The first address of a node's subnet, which is a /24: its pods' gateway has the next.
fn base(lab: &Lab, node: u8) -> IpAddr {
    let gateway = lab.node_addr(node).unwrap();
    Ipv4Addr::from(u32::from(gateway) - 1).into()
}

/// Runs `work` in a node, on a runtime of its own.
fn in_node<T: Send, F: Future<Output = T>>(
    lab: &Lab,
    node: u8,
    work: impl FnOnce() -> F + Send,
) -> T {
    let netns = lab.netns(Member::Node(node));
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(work())
    };
    netns.run(run).unwrap()
}

async fn prober(directory: &Arc<Directory>, to: IpAddr) -> Prober {
    let to = SocketAddr::new(to, PORT);
    Prober::probes(directory, &Path::default(), to)
        .await
        .unwrap()
}

#[test]
fn peer_answers_over_the_overlay_and_says_who_it_is() {
    for (backend, via) in [(Backend::Udp, "tunnel"), (Backend::Vxlan, "kernel-tunnel")] {
        let lab = up(backend);
        let directory = directory(&lab);
        let peer = base(&lab, 2);
        let figures = in_node(&lab, 1, async || {
            let mut prober = prober(&directory, peer).await;
            prober.round(Round::default()).await
        });
        assert_eq!((figures.sent, figures.answered), (10, 10), "{figures:?}");
        assert_eq!((figures.reordered, figures.duplicated), (0, 0));
        let rtt = figures.rtt_us.unwrap();
        assert!(0 < rtt.min && rtt.min <= rtt.median && rtt.median <= rtt.max);
        assert_eq!(figures.via_there, Some(via));
        // One clock: what is measured is at most the round trip off.
        let offset = figures.clock_offset_us.unwrap().unsigned_abs();
        assert!(offset <= rtt.min, "{offset} {rtt:?}");
        let sender = figures.sender.unwrap();
        assert_eq!(sender.v4, subnets(&lab, 2).v4());
        assert!(sender.node != 0 && sender.node != 1);
        let known = directory.peers().remove(0).memory();
        assert_eq!(known.sender, Some(sender));
        // After the first, the peer had heard us, and said so.
        let (claimed, _) = known.claimed.unwrap();
        assert!(claimed.unwrap().sequence > 0);
    }
}

#[test]
fn where_routes_carry_the_packets_the_pods_bridge_answers() {
    let lab = up(Backend::HostGw);
    let directory = directory(&lab);
    let addrs: Vec<IpAddr> = directory.peers()[0].overlay_addrs().collect();
    let answered: Vec<u32> = in_node(&lab, 1, async || {
        let mut answered = Vec::new();
        for addr in addrs {
            let mut prober = prober(&directory, addr).await;
            answered.push(prober.round(Round::default()).await.answered);
        }
        answered
    });
    assert_eq!(answered, [0, 10]);
}

#[test]
fn loss_and_order_are_what_the_wire_makes_of_them() {
    let lab = up(Backend::Udp);
    let directory = directory(&lab);
    let peer = base(&lab, 2);
    let round = |count| {
        in_node(&lab, 1, async || {
            let mut prober = prober(&directory, peer).await;
            prober
                .round(Round {
                    count,
                    every: Duration::from_millis(2),
                    ..Round::default()
                })
                .await
        })
    };
    let nft = |rule: &str| {
        let rule =
            format!("table inet t {{ chain c {{ type filter hook input priority 0; {rule}; }}; }}");
        lab.run(Member::Node(2), "nft", &[&rule]).unwrap();
    };
    // Every fourth probe is lost on the way to the other; the firewall counts them.
    nft("udp dport 8285 meta length 144 numgen inc mod 4 0 counter drop");
    let figures = round(40);
    let rules = lab.run(Member::Node(2), "nft", &["list ruleset"]).unwrap();
    let lost = rules.split_once("packets ").unwrap().1;
    let lost: u32 = lost.split(' ').next().unwrap().parse().unwrap();
    assert!((9..=11).contains(&lost), "{rules}");
    assert_eq!(
        (figures.sent, figures.answered),
        (40, 40 - lost),
        "{figures:?}"
    );
    assert_eq!(u32::from(figures.loss_percent()), (lost * 100).div_ceil(40));
    lab.run(Member::Node(2), "nft", &["flush ruleset"]).unwrap();
    nft("udp dport 8285 drop");
    let figures = round(5);
    assert_eq!((figures.answered, figures.loss_percent()), (0, 100));
    assert_eq!(figures.rtt_us, None);
}

#[test]
fn usable_size_is_found_to_the_byte_in_each_direction() {
    let lab = up(Backend::Udp);
    let directory = directory(&lab);
    let peer = base(&lab, 2);
    let sizes = || {
        in_node(&lab, 1, async || {
            let mut prober = prober(&directory, peer).await;
            let probes = prober.sizes(1472, SIZE_PATIENCE).await;
            let mut prober = Prober::echoes(&directory, &Path::default(), peer).unwrap();
            (probes, prober.sizes(1472, SIZE_PATIENCE).await)
        })
    };
    let (probes, echoes) = sizes();
    assert_eq!(
        (probes.up, probes.down),
        (Some(1472), Some(1472)),
        "{probes:?}"
    );
    assert_eq!(
        (echoes.up, echoes.down),
        (Some(1472), Some(1472)),
        "{echoes:?}"
    );
    // A hole on the way: longer datagrams vanish without a word, here at 1400 bytes of the inner packet.
    let hole = |node: u8, len: u16| {
        let rule = format!(
            "table inet t {{ chain c {{ type filter hook input priority 0; udp dport 8285 meta length > {len} drop; }}; }}"
        );
        lab.run(Member::Node(node), "nft", &[&rule]).unwrap();
    };
    hole(2, 1428);
    let (probes, echoes) = sizes();
    assert_eq!(probes.up, Some(1400), "{probes:?}");
    assert_eq!(
        probes.down,
        Some(1400),
        "no longer than what was asked: {probes:?}"
    );
    assert!(!probes.told);
    assert_eq!(echoes.up, Some(1400), "{echoes:?}");
    hole(1, 1233);
    let (probes, _) = sizes();
    assert_eq!(
        (probes.up, probes.down),
        (Some(1400), Some(1205)),
        "{probes:?}"
    );
}

#[test]
fn node_without_the_program_refuses_probes_and_answers_echoes() {
    let lab = up(Backend::ByHand);
    let directory = directory(&lab);
    let peer = IpAddr::V4(lab.node_addr(2).unwrap());
    let (probes, echoes) = in_node(&lab, 1, async || {
        let mut probes = prober(&directory, peer).await;
        let mut echoes = Prober::echoes(&directory, &Path::default(), peer).unwrap();
        (
            probes.round(Round::default()).await,
            echoes.round(Round::default()).await,
        )
    });
    assert_eq!(probes.answered, 0);
    assert_eq!(probes.errno, Some(libc::ECONNREFUSED), "{probes:?}");
    assert_eq!((echoes.sent, echoes.answered), (10, 10), "{echoes:?}");
    assert!(echoes.rtt_us.is_some() && echoes.ttl_here == Some(64));
}

#[test]
fn path_is_the_one_that_was_chosen() {
    let lab = up(Backend::Udp);
    let directory = directory(&lab);
    let (here, peer) = (base(&lab, 1), base(&lab, 2));
    let node = |args: &str| {
        let args: Vec<&str> = args.split(' ').collect();
        lab.run(Member::Node(1), "ip", &args).unwrap();
    };
    // Marked packets go straight over the underlay: the other says what they came in by.
    node("rule add fwmark 7 lookup 77");
    node(&format!("route add {peer}/32 via 192.0.2.2 table 77"));
    let via = |path: Path| {
        let directory = &directory;
        in_node(&lab, 1, async move || {
            let to = SocketAddr::new(peer, PORT);
            let mut prober = Prober::probes(directory, &path, to).await?;
            std::io::Result::Ok(prober.round(Round::default()).await)
        })
    };
    let path = Path {
        local: Some(here),
        ..Path::default()
    };
    assert_eq!(via(path.clone()).unwrap().via_there, Some("tunnel"));
    let marked = via(Path {
        mark: Some(7),
        ..path.clone()
    });
    assert_eq!(marked.unwrap().via_there, Some("underlay"));
    let by_device = |name: &str| {
        via(Path {
            device: Some(name.to_owned()),
            ..path.clone()
        })
    };
    assert_eq!(by_device("flannel0").unwrap().via_there, Some("tunnel"));
    assert!(by_device("nosuch0").is_err());
}

/// Whatever is sent from an address to the second node's responder has no answer.
fn is_silent(lab: &Lab, member: Member, from: IpAddr, to: IpAddr, bytes: &[u8]) -> bool {
    answer_within(PATIENCE, lab, member, from, to, bytes).is_none()
}

fn answer_within(
    patience: Duration,
    lab: &Lab,
    member: Member,
    from: IpAddr,
    to: IpAddr,
    bytes: &[u8],
) -> Option<Vec<u8>> {
    let socket = lab
        .netns(member)
        .run(|| UdpSocket::bind(SocketAddr::new(from, 0)))
        .unwrap()
        .unwrap();
    socket.set_read_timeout(Some(patience)).unwrap();
    socket.send_to(bytes, SocketAddr::new(to, PORT)).unwrap();
    let mut answer = vec![0; 2000];
    let len = socket.recv(&mut answer).ok()?;
    answer.truncate(len);
    Some(answer)
}

#[test]
fn only_nodes_are_answered_and_never_with_more_than_they_sent() {
    let lab = up(Backend::Udp);
    let (here, peer) = (base(&lab, 1), base(&lab, 2));
    let mut request = vec![0; 500];
    Probe::request(Kind::Request, 1, 2, Identity::default()).write(&mut request);
    let answer =
        |bytes: &[u8]| answer_within(LIMIT, &lab, Member::Node(1), here, peer, bytes).unwrap();
    let silent = |bytes: &[u8]| is_silent(&lab, Member::Node(1), here, peer, bytes);
    let answered = answer(&request);
    assert_eq!(answered.len(), HEADER_LEN);
    assert_eq!(Probe::parse(&answered).unwrap().seen_len, 528);
    // An ask that has no room for a report is not answered, one that has is.
    let mut ask = vec![0; 1000];
    Probe::request(Kind::Ask, 1, 2, Identity::default()).write(&mut ask);
    assert!(silent(&ask[..HEADER_LEN + 4]));
    let report = answer(&ask);
    assert!(report.len() <= 1000);
    assert_eq!(Probe::parse(&report).unwrap().kind, Kind::Report);
    // An answer is not answered, nor is garbage, nor a pod, nor our own pod.
    let mut other = request.clone();
    Probe::request(Kind::Answer, 1, 2, Identity::default()).write(&mut other);
    assert!(silent(&other));
    assert!(silent(b"garbage"));
    assert!(silent(&request[..HEADER_LEN - 1]));
    let pod = |node: u8| IpAddr::V4(lab.pod_addr(node, 1).unwrap());
    assert!(is_silent(&lab, Member::Pod(1, 1), pod(1), peer, &request));
    assert!(is_silent(&lab, Member::Pod(2, 1), pod(2), peer, &request));
    // From the underlay, who has a lease there.
    let underlay = |node: u8| IpAddr::V4(loden::lab::plan::underlay_v4(node));
    let (from, to) = (underlay(1), underlay(2));
    assert!(answer_within(LIMIT, &lab, Member::Node(1), from, to, &request).is_some());
}

#[test]
fn flood_is_answered_up_to_the_limit_and_the_daemon_lives() {
    let lab = up(Backend::Udp);
    let (here, peer) = (base(&lab, 1), base(&lab, 2));
    let netns = lab.netns(Member::Node(1));
    let socket = netns
        .run(|| UdpSocket::bind(SocketAddr::new(here, 0)))
        .unwrap()
        .unwrap();
    let mut request = [0; HEADER_LEN];
    Probe::request(Kind::Request, 1, 2, Identity::default()).write(&mut request);
    let begun = std::time::Instant::now();
    for _ in 0..5000 {
        socket
            .send_to(&request, SocketAddr::new(peer, PORT))
            .unwrap();
    }
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answers = 0;
    while socket.recv(&mut [0; 2000]).is_ok() {
        answers += 1;
    }
    // So many a second, however long it took.
    let limit =
        u64::from(loden::probe::responder::PER_PEER_AND_SECOND) * (begun.elapsed().as_secs() + 2);
    assert!(answers > 0 && answers <= limit, "{answers} of {limit}");
    let directory = directory(&lab);
    let echoes = in_node(&lab, 1, async || {
        let mut echoes = Prober::echoes(&directory, &Path::default(), peer).unwrap();
        echoes.round(Round::default()).await
    });
    assert_eq!(echoes.answered, 10);
}

/// Three dozen peers' addresses, all of which node 2 has.
fn targets() -> Vec<Target> {
    let target = |n: u8| Target {
        net: format!("198.18.{n}.0/24").parse().unwrap(),
        port: PORT,
        public: loden::lab::plan::underlay_v4(2).into(),
        link: 2,
    };
    (100..136).map(target).collect()
}

#[test]
fn of_three_dozen_ways_past_the_tunnel_those_that_fail_are_given_up_and_no_others() {
    let lab = lab(spec(2, Backend::None));
    let run = |node: u8, program: &str, line: &str| {
        let args: Vec<&str> = line.split(' ').collect();
        lab.run(Member::Node(node), program, &args).unwrap();
    };
    run(1, "ip", "addr add 198.18.1.0/32 dev eth0");
    run(1, "ip", "route add 198.18.0.0/16 via 192.0.2.2");
    run(2, "ip", "route add 198.18.1.0/24 via 192.0.2.1");
    for target in targets() {
        run(
            2,
            "ip",
            &format!("addr add {}/32 dev eth0", target.net.network()),
        );
    }
    let directory = |own: &str, peer: &str, node: u8| {
        let directory = Directory::new(node.into());
        directory.lease(&own.parse().unwrap());
        let lease = Lease {
            subnets: peer.parse().unwrap(),
            attrs: LeaseAttrs {
                public_ip: Some(loden::lab::plan::underlay_v4(3 - node)),
                ..LeaseAttrs::default()
            },
            expires: None,
            extension: LeaseExtension::default(),
        };
        directory.update([&lease].into_iter());
        Arc::new(directory)
    };
    let ended = tokio::sync::Notify::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            in_node(&lab, 2, async || {
                let directory = directory("198.18.100.0-24", "198.18.1.0-24", 2);
                let (reports, _asked) = tokio::sync::mpsc::channel(1);
                let _responder = Responder::start(PORT, &directory, &reports, 1).unwrap();
                ended.notified().await;
            });
        });
        in_node(&lab, 1, async || {
            let directory = directory("198.18.1.0-24", "198.18.100.0-24", 1);
            let mut past = Past::start(&directory, 1);
            past.want(Wanted {
                targets: targets(),
                local: vec!["198.18.1.0".parse().unwrap()],
                len: 1450,
                change: 0,
            });
            let limit = Duration::from_secs(30);
            let all = async {
                while past.found().proven.len() < targets().len() {
                    past.changed().await;
                }
            };
            tokio::time::timeout(limit, all).await.unwrap();
            for line in [
                "add table ip wall",
                "add chain ip wall c { type filter hook prerouting priority -500 ; }",
                "add rule ip wall c ip daddr 198.18.110.0-198.18.129.255 drop",
            ] {
                run(2, "nft", line);
            }
            let failed = async {
                while past.found().why_not.len() < 20 {
                    past.changed().await;
                }
            };
            tokio::time::timeout(limit, failed).await.unwrap();
            let found = past.found();
            for target in targets() {
                let fails = (110..130).contains(&u32::from(third(target.net.network())));
                assert_eq!(found.proven.contains(&target.net), !fails, "{}", target.net);
                let why = found.why_not.get(&target.net);
                assert_eq!(why.is_some_and(|it| it.contains("no answer")), fails);
            }
        });
        ended.notify_one();
    });
}

const fn third(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(addr) => addr.octets()[2],
        IpAddr::V6(_) => 0,
    }
}
