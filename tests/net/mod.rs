//! Owns what tests of the data plane in namespaces share: a data plane in a node of a lab, traffic through
//! it, and looks at the kernel's own counters. Never decides what is right.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use loden::addr::{Mac, Mtu, Vni};
use loden::datapath::{
    Datapath, Encapsulation, EngineKind, Event, Local, OpenError, PeerRoute, Settings, SourceCheck,
    SourcePort, Status,
};
use loden::lab::{Backend, Interrupt, Lab, Member, NetNs, Spec, Wire, command, plan, wait};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// The tunnel port of every node.
pub(crate) const PORT: u16 = 8285;
/// The same where it speaks VXLAN.
pub(crate) const VXLAN_PORT: u16 = 8472;
/// flannel's VXLAN network.
pub(crate) const VNI: u32 = 1;
/// Longer than anything takes, so that a test that hangs fails instead.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// How a test's nodes differ from the usual.
#[derive(Clone)]
pub(crate) struct Shape {
    pub(crate) engine: EngineKind,
    pub(crate) workers: usize,
    pub(crate) mtu: u32,
    pub(crate) underlay_v6: bool,
    pub(crate) ecn: bool,
    /// Workers keep to their processors, so that the kernel's per-processor queues cannot reorder.
    pub(crate) pin: bool,
    pub(crate) vxlan: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            engine: EngineKind::Mmsg,
            workers: 1,
            mtu: 1472,
            underlay_v6: false,
            ecn: false,
            pin: false,
            vxlan: false,
        }
    }
}

impl Shape {
    /// Nodes that speak VXLAN, over an underlay of either family with an MTU of 1500.
    pub(crate) fn vxlan(engine: EngineKind, underlay_v6: bool) -> Self {
        Self {
            engine,
            underlay_v6,
            mtu: if underlay_v6 { 1430 } else { 1450 },
            vxlan: true,
            ..Self::default()
        }
    }

    pub(crate) fn of(engine: EngineKind) -> Self {
        Self {
            engine,
            ..Self::default()
        }
    }

    pub(crate) fn underlay(&self, n: u8) -> SocketAddr {
        let ip = if self.underlay_v6 {
            IpAddr::V6(plan::underlay_v6(n))
        } else {
            IpAddr::V4(plan::underlay_v4(n))
        };
        SocketAddr::new(ip, if self.vxlan { VXLAN_PORT } else { PORT })
    }

    /// The routes of every node in `nodes` but `me`.
    pub(crate) fn routes(&self, me: u8, nodes: &[u8]) -> Vec<PeerRoute> {
        let others = nodes.iter().filter(|&&n| n != me);
        others
            .flat_map(|&n| {
                [net_v4(n), net_v6(n)].map(|net| PeerRoute {
                    net,
                    addr: self.underlay(n),
                    mac: self.vxlan.then(|| vtep_mac(n)),
                    ecn: self.ecn,
                })
            })
            .collect()
    }

    /// What node `n` opens its data plane with; events are appended to `events`.
    pub(crate) fn settings(&self, n: u8, events: &Arc<Mutex<Vec<Event>>>) -> Settings {
        let sink = Arc::clone(events);
        Settings {
            engine: self.engine,
            workers: self.workers,
            pin: self.pin,
            device: "flannel%d".to_owned(),
            encapsulation: if self.vxlan {
                Encapsulation::Vxlan {
                    vni: Vni::new(VNI).unwrap(),
                    mac: vtep_mac(n),
                }
            } else {
                Encapsulation::Plain
            },
            bind: self.underlay(n),
            mtu: Mtu::new(self.mtu).unwrap(),
            source_check: SourceCheck::Strict,
            source_port: SourcePort::Spread,
            local: Local {
                nets: vec![net_v4(n), net_v6(n)],
                addrs: vec![self.underlay(n).ip()],
                icmp_v4: Some(tun_v4(n)),
                icmp_v6: Some(tun_v6(n)),
            },
            on_event: Arc::new(move |event| sink.lock().unwrap().push(event)),
        }
    }
}

/// Node `n`'s subnets, and its TUN device's addresses in them.
pub(crate) fn net_v4(n: u8) -> ipnet::IpNet {
    format!("198.18.{n}.0/24").parse().unwrap()
}

pub(crate) fn net_v6(n: u8) -> ipnet::IpNet {
    format!("fd00:18:0:{n}::/64").parse().unwrap()
}

pub(crate) const fn tun_v4(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, n, 0)
}

pub(crate) fn tun_v6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x18, 0, u16::from(n), 0, 0, 0, 1)
}

/// The MAC address that node `n` is reached by in VXLAN.
pub(crate) const fn vtep_mac(n: u8) -> Mac {
    Mac::local(n as u64)
}

/// A lab without a backend whose name nobody else uses.
pub(crate) fn lab(nodes: u8, pods: u8, wire: Wire) -> Lab {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("net-{}-{number}", std::process::id());
    let spec = Spec {
        pods,
        wire,
        backend: Backend::None,
        ..Spec::new(name.parse().unwrap(), nodes)
    };
    Lab::build(spec, &Interrupt::default()).unwrap()
}

pub(crate) fn run(netns: &NetNs, program: &str, args: &str) -> String {
    let args: Vec<&str> = args.split_whitespace().collect();
    command::run(Some(netns), program, &args).unwrap()
}

pub(crate) fn ip(netns: &NetNs, args: &str) -> String {
    run(netns, "ip", args)
}

/// A data plane in a node of a lab, running, its device configured as the daemon does it.
pub(crate) struct Node {
    pub(crate) n: u8,
    pub(crate) datapath: Datapath,
    pub(crate) netns: NetNs,
    pub(crate) addr: SocketAddr,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Node {
    pub(crate) fn start(lab: &Lab, n: u8, shape: &Shape, nodes: &[u8]) -> Self {
        Self::start_with(lab, n, shape, nodes, Datapath::open)
    }

    pub(crate) fn start_with(
        lab: &Lab,
        n: u8,
        shape: &Shape,
        nodes: &[u8],
        open: impl FnOnce(Settings) -> Result<Datapath, OpenError> + Send,
    ) -> Self {
        let netns = lab.netns(Member::Node(n));
        let events = Arc::default();
        let settings = shape.settings(n, &events);
        let mut datapath = netns.run(|| open(settings)).unwrap().unwrap();
        configure(&netns, datapath.device(), n, shape.mtu);
        datapath.publish(&shape.routes(n, nodes));
        datapath.start().unwrap();
        Self {
            n,
            datapath,
            netns,
            addr: shape.underlay(n),
            events,
        }
    }

    pub(crate) fn device(&self) -> &str {
        self.datapath.device()
    }

    pub(crate) fn status(&self) -> Status {
        self.datapath.status()
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    /// Waits until `enough` of the status, then returns it.
    pub(crate) fn wait_status(&self, what: &str, enough: impl Fn(&Status) -> bool) -> Status {
        let mut last = None;
        let limit = Instant::now() + LIMIT;
        loop {
            let status = self.status();
            if enough(&status) {
                return status;
            }
            assert!(
                Instant::now() < limit,
                "waited in vain for {what}: {last:?}"
            );
            last = Some(status);
            wait::pause(Duration::from_millis(1));
        }
    }

    /// Waits until `wanted` of the events.
    pub(crate) fn wait_event(&self, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let mut found = None;
        wait_for(what, || {
            found = self.events().into_iter().find(|event| wanted(event));
            found.is_some()
        });
        found.unwrap()
    }

    /// A UDP socket of this node on its overlay address.
    pub(crate) fn udp(&self) -> UdpSocket {
        udp_at(&self.netns, (tun_v4(self.n), 0).into())
    }
}

/// Makes node `n` a kernel VXLAN peer of the others, as flannel does it (specification section 8.2): permanent
/// neighbours, forwarding entries, on-link routes, no learning. Where flannel has a device per family, one
/// device has both here, so that every inner family crosses every outer one.
pub(crate) fn kernel_vtep(lab: &Lab, shape: &Shape, n: u8, others: &[u8]) -> NetNs {
    let netns = lab.netns(Member::Node(n));
    let base_v6 = |n: u8| net_v6(n).network();
    let mut lines = vec![
        format!(
            "link add flannel.1 mtu {} txqueuelen 0 address {} \
             type vxlan id {VNI} local {} dev eth0 dstport {VXLAN_PORT} nolearning",
            shape.mtu,
            vtep_mac(n),
            shape.underlay(n).ip(),
        ),
        "link set flannel.1 addrgenmode none".to_owned(),
        format!("addr add {}/32 dev flannel.1", tun_v4(n)),
        format!("addr add {}/128 dev flannel.1 nodad", tun_v6(n)),
        "link set flannel.1 up".to_owned(),
    ];
    let mut fdb = Vec::new();
    for &peer in others {
        for (via, net, src) in [
            (
                IpAddr::V4(tun_v4(peer)),
                net_v4(peer),
                IpAddr::V4(tun_v4(n)),
            ),
            (base_v6(peer), net_v6(peer), IpAddr::V6(tun_v6(n))),
        ] {
            let mac = vtep_mac(peer);
            lines.push(format!(
                "neigh add {via} lladdr {mac} dev flannel.1 nud permanent"
            ));
            lines.push(format!(
                "route add {net} via {via} dev flannel.1 onlink src {src}"
            ));
        }
        fdb.push(format!(
            "fdb add {} dev flannel.1 dst {} self permanent",
            vtep_mac(peer),
            shape.underlay(peer).ip()
        ));
    }
    command::batch(Some(&netns), "ip", &lines).unwrap();
    command::batch(Some(&netns), "bridge", &fdb).unwrap();
    netns
}

/// Two nodes that know each other.
pub(crate) fn pair(lab: &Lab, shape: &Shape) -> (Node, Node) {
    let start = |n| Node::start(lab, n, shape, &[1, 2]);
    (start(1), start(2))
}

/// Addresses, MTU and the overlay's route. Without IPv6 autoconfiguration, so that the kernel sends nothing
/// of its own.
fn configure(netns: &NetNs, device: &str, n: u8, mtu: u32) {
    let lines = [
        format!("link set {device} addrgenmode none"),
        format!("link set {device} mtu {mtu} up"),
        format!("addr add {}/32 dev {device}", tun_v4(n)),
        format!("addr add {}/128 dev {device} nodad", tun_v6(n)),
        format!("route add {} dev {device} src {}", plan::NETWORK, tun_v4(n)),
        format!(
            "route add fd00:18::/48 dev {device} mtu {} src {}",
            mtu.max(1280),
            tun_v6(n)
        ),
    ];
    command::batch(Some(netns), "ip", &lines).unwrap();
}

pub(crate) fn udp_at(netns: &NetNs, at: SocketAddr) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind(at)).unwrap().unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

/// Receives a datagram; its length. A wait with a time limit ends early when the process is stopped and goes on, or
/// handles a signal (signal(7)): it is taken up again.
pub(crate) fn recv(socket: &UdpSocket, bytes: &mut [u8]) -> usize {
    recv_from(socket, bytes).0
}

/// The same, with where it came from.
pub(crate) fn recv_from(socket: &UdpSocket, bytes: &mut [u8]) -> (usize, SocketAddr) {
    loop {
        match socket.recv_from(bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => return received.unwrap(),
        }
    }
}

/// Whether an answer comes, however long a busy machine takes for it.
pub(crate) fn pings(netns: &NetNs, to: impl Into<IpAddr>) -> bool {
    ping(netns, to.into(), LIMIT.as_secs())
}

/// Whether an answer comes within a second: for who asks again, or expects none.
pub(crate) fn pings_now(netns: &NetNs, to: impl Into<IpAddr>) -> bool {
    ping(netns, to.into(), 1)
}

fn ping(netns: &NetNs, to: IpAddr, seconds: u64) -> bool {
    let (wait, to) = (format!("-W{seconds}"), to.to_string());
    command::run(Some(netns), "ping", &["-n", "-q", "-c1", &wait, &to]).is_ok()
}

/// Waits until `done` says so, or fails with what was waited for.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    wait::until(what, LIMIT, &Interrupt::default(), || {
        Ok(done().then_some(()))
    })
    .unwrap();
}

/// Waits until nothing of a data plane is open in a namespace: no device, no socket, no lock. What this process has
/// closed may be open for a moment longer in a child that another test has forked and that is about to become a program.
pub(crate) fn nothing_left(netns: &NetNs) {
    let read = |table: &str| {
        let read = || fs::read_to_string(format!("/proc/thread-self/net/{table}"));
        netns.run(read).unwrap().unwrap()
    };
    wait_for("devices to vanish", || {
        !ip(netns, "-brief link").contains("flannel")
    });
    // The heading stays.
    wait_for("sockets to vanish", || read("udp").lines().count() == 1);
    wait_for("locks to vanish", || !read("unix").contains("@loden/"));
}

/// `read = sent + answered + Σ drops + queued`, exactly, in both directions of every worker.
pub(crate) fn adds_up(status: &Status) {
    for worker in status.workers.iter().chain([&status.total]) {
        for (name, side) in [("encap", &worker.encap), ("decap", &worker.decap)] {
            let drops: u64 = side.drops.values().sum();
            assert_eq!(
                side.read,
                side.sent + side.answered + drops,
                "{name}: {side:?}"
            );
            assert_eq!(side.queued, 0, "{name} at a burst boundary: {side:?}");
        }
    }
}

/// Received and transmitted packets of a device as the kernel counts them, from its point of view: what the
/// program reads from a TUN is transmitted.
pub(crate) fn device_packets(netns: &NetNs, device: &str) -> (u64, u64) {
    let table = netns
        .run(|| fs::read_to_string("/proc/thread-self/net/dev"))
        .unwrap()
        .unwrap();
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {device} in {table}"));
    let columns: Vec<u64> = line
        .split_whitespace()
        .map(|column| column.parse().unwrap())
        .collect();
    (columns[1], columns[9])
}

/// Bytes that follow from a seed: what a transfer's ends compare without sharing memory.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes()[..word.len()]);
        }
    }
}

const CHUNK: usize = 1 << 16;

/// Sends `chunks` of 64 KiB over one TCP connection to `to` in another namespace, and compares every byte
/// that arrives.
pub(crate) fn tcp_transfer(from: &NetNs, to: (&NetNs, IpAddr), chunks: usize) {
    tcp_transfer_with(from, to, chunks, |_| {});
}

/// The same, of a socket that `prepare` changes once it is connected.
pub(crate) fn tcp_transfer_with(
    from: &NetNs,
    (there, to): (&NetNs, IpAddr),
    chunks: usize,
    prepare: impl FnOnce(&TcpStream) + Send,
) {
    let listener = there.run(|| TcpListener::bind((to, 0))).unwrap().unwrap();
    let at = listener.local_addr().unwrap();
    let seed = u64::from(at.port());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let connect = || TcpStream::connect_timeout(&at, LIMIT);
            let mut stream = from.run(connect).unwrap().unwrap();
            stream.set_write_timeout(Some(LIMIT)).unwrap();
            prepare(&stream);
            let (mut noise, mut chunk) = (Noise::new(seed), vec![0; CHUNK]);
            for _ in 0..chunks {
                noise.fill(&mut chunk);
                stream.write_all(&chunk).unwrap();
            }
        });
        listener.set_nonblocking(true).unwrap();
        let mut accepted = None;
        wait_for("a connection", || {
            accepted = listener.accept().ok();
            accepted.is_some()
        });
        let (mut stream, _) = accepted.unwrap();
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let (mut noise, mut wanted, mut got) = (Noise::new(seed), vec![0; CHUNK], vec![0; CHUNK]);
        for number in 0..chunks {
            stream.read_exact(&mut got).unwrap();
            noise.fill(&mut wanted);
            assert!(got == wanted, "chunk {number} differs");
        }
        let mut more = Vec::new();
        stream.read_to_end(&mut more).unwrap();
        assert_eq!(more.len(), 0, "more than was sent");
    });
}

/// Keeps the calling thread on one processor.
pub(crate) fn pin_to(cpu: usize) {
    let cpus = std::thread::available_parallelism().unwrap().get();
    let mut set = CpuSet::new();
    set.set(cpu % cpus).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}
