//! Probes between nodes: the responder of a daemon, asked from the next node by ours, over the overlay that the
//! daemons made. What is found is compared with what the test made of the path. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod common;

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use common::{lab, spec};
use ipnet::IpNet;
use loden::lab::{Backend, Interrupt, Lab, Member, Spec, Wire, wait};
use loden::lease::{Lease, LeaseAttrs, LeaseExtension, Subnets};
use loden::probe::past::{Found, Past, Target, Wanted};
use loden::probe::{Directory, Path, Prober, Responder, Round, Sizes};
use loden::wire::probe::{HEADER_LEN, Identity, Kind, PORT, Probe};

/// How long more answers are waited for where nobody knows how many come.
const PATIENCE: Duration = Duration::from_millis(300);

/// How long something is waited for that must come.
const LIMIT: Duration = Duration::from_secs(20);

/// How often something is tried that a machine which stands still for a moment may spoil.
const ATTEMPTS: u32 = 8;

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

/// A round whose every answer must come, which ends it.
fn patient() -> Round {
    Round {
        patience: LIMIT,
        ..Round::default()
    }
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
            let mut figures = prober.round(patient()).await;
            // Two workers that are woken at once, after a pause, may send out of order.
            for _ in 1..ATTEMPTS {
                if figures.reordered > 0 {
                    figures = prober.round(patient()).await;
                }
            }
            figures
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
        // Nobody has the first address.
        for (addr, round) in addrs.into_iter().zip([Round::default(), patient()]) {
            let mut prober = prober(&directory, addr).await;
            answered.push(prober.round(round).await.answered);
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
    let round = |count, len| {
        in_node(&lab, 1, async || {
            let mut prober = prober(&directory, peer).await;
            prober
                .round(Round {
                    count,
                    every: Duration::from_millis(2),
                    len,
                    ..Round::default()
                })
                .await
        })
    };
    let nft = |rule: &str| {
        let rule = format!(
            "flush ruleset; table inet t {{ chain c {{ type filter hook input priority 0; {rule}; }}; }}"
        );
        lab.run(Member::Node(2), "nft", &[&rule]).unwrap();
    };
    // Each round is of a length that no probe of the daemons' own has, and none that is late of a round before.
    let mut len = 200;
    // No answer is waited for that does not come, and one that is late is lost, too.
    wait::until("answers in time", LIMIT, lab.interrupt(), || {
        len += 1;
        // Every fourth probe is lost on the way to the other; the firewall counts them.
        let outer = len + 28;
        nft(&format!(
            "udp dport 8285 meta length {outer} numgen inc mod 4 0 counter drop"
        ));
        let figures = round(40, len);
        assert!(figures.sent == 40 && figures.answered <= 30, "{figures:?}");
        if figures.answered < 30 {
            return Ok(None);
        }
        assert_eq!(figures.loss_percent(), 25);
        let rules = lab.run(Member::Node(2), "nft", &["list ruleset"])?;
        assert!(rules.contains("counter packets 10 "), "{rules}");
        Ok(Some(()))
    })
    .unwrap();
    nft("udp dport 8285 drop");
    let figures = round(5, len);
    assert_eq!((figures.answered, figures.loss_percent()), (0, 100));
    assert_eq!(figures.rtt_us, None);
}

#[test]
fn usable_size_is_found_to_the_byte_in_each_direction() {
    let lab = up(Backend::Udp);
    let directory = directory(&lab);
    let peer = base(&lab, 2);
    let probes = |patience| {
        in_node(&lab, 1, async || {
            let mut prober = prober(&directory, peer).await;
            prober.sizes(1472, patience).await
        })
    };
    let echoes = |patience| {
        in_node(&lab, 1, async || {
            let mut prober = Prober::echoes(&directory, &Path::default(), peer).unwrap();
            prober.sizes(1472, patience).await
        })
    };
    find((1472, 1472), probes);
    find((1472, 1472), echoes);
    // A hole on the way: longer datagrams vanish without a word, here at 1400 bytes of the inner packet.
    let hole = |node: u8, len: u16| {
        let rule = format!(
            "table inet t {{ chain c {{ type filter hook input priority 0; udp dport 8285 meta length > {len} drop; }}; }}"
        );
        lab.run(Member::Node(node), "nft", &[&rule]).unwrap();
    };
    hole(2, 1428);
    // No answer is longer than what was asked.
    let found = find((1400, 1400), probes);
    assert!(!found.told);
    find((1400, 1400), echoes);
    hole(1, 1233);
    find((1400, 1205), probes);
}

/// Searches until these sizes are found, ever more patiently: a probe that is late is taken for lost. None that is longer
/// is ever found.
fn find((up, down): (u16, u16), search: impl Fn(Duration) -> Sizes) -> Sizes {
    let mut patience = SIZE_PATIENCE;
    let mut found = search(patience);
    for _ in 1..ATTEMPTS {
        assert!(
            found.up <= Some(up) && found.down <= Some(down),
            "{found:?}"
        );
        if (found.up, found.down) == (Some(up), Some(down)) {
            return found;
        }
        patience = (2 * patience).min(4 * SIZE_PATIENCE);
        found = search(patience);
    }
    assert_eq!((found.up, found.down), (Some(up), Some(down)), "{found:?}");
    found
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
            echoes.round(patient()).await,
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
            std::io::Result::Ok(prober.round(patient()).await)
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

/// A socket of a member, at one of its addresses.
fn socket(lab: &Lab, member: Member, from: IpAddr) -> UdpSocket {
    let at = SocketAddr::new(from, 0);
    lab.netns(member)
        .run(|| UdpSocket::bind(at))
        .unwrap()
        .unwrap()
}

/// The next datagram, if it comes in time.
fn received(socket: &UdpSocket, patience: Duration) -> Option<Vec<u8>> {
    socket.set_read_timeout(Some(patience)).unwrap();
    let mut bytes = vec![0; 2000];
    loop {
        match socket.recv(&mut bytes) {
            Ok(len) => {
                bytes.truncate(len);
                return Some(bytes);
            }
            // Whoever was stopped is told so, where a wait has a limit (signal(7)).
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_late) => return None,
        }
    }
}

/// The answer of a node's responder, asked until it answers: while it is busy, it does not.
fn answer(socket: &UdpSocket, to: IpAddr, bytes: &[u8]) -> Vec<u8> {
    let mut answer = None;
    wait::until("an answer", LIMIT, &Interrupt::default(), || {
        socket.send_to(bytes, SocketAddr::new(to, PORT)).unwrap();
        answer = received(socket, Duration::from_secs(2));
        Ok(answer.is_some().then_some(()))
    })
    .unwrap();
    answer.unwrap()
}

#[test]
fn only_nodes_are_answered_and_never_with_more_than_they_sent() {
    let lab = up(Backend::Udp);
    let (here, peer) = (base(&lab, 1), base(&lab, 2));
    let node = || socket(&lab, Member::Node(1), here);
    let mut request = vec![0; 500];
    Probe::request(Kind::Request, 1, 2, Identity::default()).write(&mut request);
    let mut ask = vec![0; 1000];
    Probe::request(Kind::Ask, 1, 2, Identity::default()).write(&mut ask);
    // When a report comes that was asked for later, whatever else was to be answered was.
    let silent_to = |from: &UdpSocket, bytes: &[u8]| {
        from.send_to(bytes, SocketAddr::new(peer, PORT)).unwrap();
        answer(&node(), peer, &ask);
        from.set_nonblocking(true).unwrap();
        from.recv(&mut [0; 2000])
            .is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    };
    let silent = |bytes: &[u8]| silent_to(&node(), bytes);
    let answered = answer(&node(), peer, &request);
    assert_eq!(answered.len(), HEADER_LEN);
    assert_eq!(Probe::parse(&answered).unwrap().seen_len, 528);
    // An ask that has no room for a report is not answered, one that has is.
    assert!(silent(&ask[..HEADER_LEN + 4]));
    let report = answer(&node(), peer, &ask);
    assert!(report.len() <= 1000);
    assert_eq!(Probe::parse(&report).unwrap().kind, Kind::Report);
    // An answer is not answered, nor is garbage, nor a pod, nor our own pod.
    let mut other = request.clone();
    Probe::request(Kind::Answer, 1, 2, Identity::default()).write(&mut other);
    assert!(silent(&other));
    assert!(silent(b"garbage"));
    assert!(silent(&request[..HEADER_LEN - 1]));
    for n in [1, 2] {
        let addr = IpAddr::V4(lab.pod_addr(n, 1).unwrap());
        let pod = socket(&lab, Member::Pod(n, 1), addr);
        assert!(silent_to(&pod, &request), "node {n}");
    }
    // From the underlay, who has a lease there.
    let underlay = |node: u8| IpAddr::V4(loden::lab::plan::underlay_v4(node));
    let outside = socket(&lab, Member::Node(1), underlay(1));
    answer(&outside, underlay(2), &request);
}

#[test]
fn flood_is_answered_up_to_the_limit_and_the_daemon_lives() {
    let lab = up(Backend::Udp);
    let (here, peer) = (base(&lab, 1), base(&lab, 2));
    let socket = socket(&lab, Member::Node(1), here);
    let mut request = [0; HEADER_LEN];
    Probe::request(Kind::Request, 1, 2, Identity::default()).write(&mut request);
    let begun = std::time::Instant::now();
    for _ in 0..5000 {
        socket
            .send_to(&request, SocketAddr::new(peer, PORT))
            .unwrap();
    }
    let mut answers = 0;
    let mut patience = LIMIT;
    while received(&socket, patience).is_some() {
        answers += 1;
        patience = PATIENCE;
    }
    // So many a second, however long it took.
    let limit =
        u64::from(loden::probe::responder::PER_PEER_AND_SECOND) * (begun.elapsed().as_secs() + 2);
    assert!(answers > 0 && answers <= limit, "{answers} of {limit}");
    let directory = directory(&lab);
    // What is left of it may fill a queue for a while.
    wait::until("answers to echoes", LIMIT, &Interrupt::default(), || {
        let echoes = in_node(&lab, 1, async || {
            let mut echoes = Prober::echoes(&directory, &Path::default(), peer).unwrap();
            echoes.round(Round::default()).await
        });
        Ok((echoes.answered == 10).then_some(()))
    })
    .unwrap();
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
    // A test that fails drops its end.
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    std::thread::scope(|scope| {
        let (lab, directory) = (&lab, &directory);
        scope.spawn(move || {
            in_node(lab, 2, async || {
                let directory = directory("198.18.100.0-24", "198.18.1.0-24", 2);
                let (reports, _asked) = tokio::sync::mpsc::channel(1);
                let _responder = Responder::start(PORT, &directory, &reports, 1).unwrap();
                let _dropped = ended.await;
            });
        });
        let is_exact = in_node(lab, 1, async || {
            let directory = directory("198.18.1.0-24", "198.18.100.0-24", 1);
            for _ in 0..ATTEMPTS {
                let mut past = Past::start(&directory, 1);
                past.want(Wanted {
                    targets: targets(),
                    local: vec!["198.18.1.0".parse().unwrap()],
                    len: 1450,
                    change: 0,
                });
                until_found(&mut past, |found| found.proven.len() == targets().len()).await;
                let wall = "table ip wall { chain c { type filter hook prerouting priority -500; \
                            ip daddr 198.18.110.0-198.18.129.255 drop; }; }";
                lab.run(Member::Node(2), "nft", &[wall]).unwrap();
                let fails = |net: &IpNet| (110..130).contains(&third(net.network()));
                let failing: HashSet<IpNet> =
                    targets().iter().map(|it| it.net).filter(fails).collect();
                let gave_up = |found: &Found, net: &IpNet| {
                    let why = found.why_not.get(net);
                    !found.proven.contains(net) && why.is_some_and(|it| it.contains("no answer"))
                };
                until_found(&mut past, |found| {
                    failing.iter().all(|net| gave_up(found, net))
                })
                .await;
                let found = past.found();
                // Others fail, too, where probes and answers stand still for as long as that takes.
                if found.proven.len() + failing.len() == targets().len()
                    && found.why_not.len() == failing.len()
                {
                    return true;
                }
                run(2, "nft", "delete table ip wall");
            }
            false
        });
        drop(end);
        assert!(is_exact, "others are given up, too");
    });
}

async fn until_found(past: &mut Past, is_enough: impl Fn(&Found) -> bool) {
    let found = async {
        while !is_enough(&past.found()) {
            past.changed().await;
        }
    };
    tokio::time::timeout(2 * LIMIT, found).await.unwrap();
}

const fn third(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(addr) => addr.octets()[2],
        IpAddr::V6(_) => 0,
    }
}
