//! Owns thousands of leases in a real etcd: puts them there, as flannel does or as an API server does, changes
//! hundreds of them a second, and sees from outside when a change has reached the data plane. Never looks into the
//! daemon.

#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, KvClient, PutOptions, Txn, TxnOp};
use futures_util::future::join_all;
use loden::lab::wait;
use tokio::net::UdpSocket;

use crate::etcd::{Etcd, PREFIX};

/// The network: 8192 subnets of /29 in one half of the benchmark range, the nodes' addresses in the other.
pub(crate) const CONFIG: &str =
    r#"{"Network":"198.18.0.0/16","SubnetLen":29,"EnableNFTables":true,"Backend":{"Type":"udp"}}"#;

/// Addresses on the wire where the probe's lease points to in turn; a daemon's tunnel port is open on each.
const PROBE_ADDRS: u32 = 100;
const PROBE_FIRST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 101);
const TUNNEL_PORT: u16 = 8285;

/// Several times a second, and no address comes back within ten seconds.
const PROBE_EVERY: Duration = Duration::from_millis(100);

/// How often the writer looks at how many changes are due.
const PACE: Duration = Duration::from_millis(10);

/// Etcd's own bound is 128 operations in a transaction.
const PER_TXN: usize = 100;

fn subnet(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + 8 * number)
}

/// The key of the lease `number`, counted from 1; flannel never leases number 0.
fn key(number: u32) -> String {
    format!("{}-29", subnet(number))
}

/// The `turn`th address of the node that has this lease; no two leases ever share one.
fn node(number: u32, turn: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 19, 0, 0)) + 8192 * (turn % 7) + number)
}

fn probe_addr(turn: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(PROBE_FIRST) + turn % PROBE_ADDRS)
}

/// How a lease is written.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    /// The key, below which all are, for the lease's own key.
    pub(crate) key: fn(&str) -> String,
    /// The value, for the lease's own key and the node.
    pub(crate) value: fn(&str, Ipv4Addr) -> String,
}

/// As flannel's udp backend does.
pub(crate) const FLANNEL: Form = Form {
    key: |key| format!("{PREFIX}/subnets/{key}"),
    value: |_, node| format!(r#"{{"PublicIP":"{node}","PublicIPv6":null}}"#),
};

/// The leases as they are in etcd: those of nodes that exist only there, numbers 2 and up, and the probe, number 1.
pub(crate) struct Leases {
    form: Form,
    count: u32,
    etcd_lease: i64,
    nodes: BTreeMap<u32, Ipv4Addr>,
    turns: BTreeMap<u32, u32>,
    probe_turn: u32,
    random: u64,
}

/// What the writer did.
pub(crate) struct Written {
    pub(crate) changes: u64,
    pub(crate) took: Duration,
    /// When each change of the probe was sent to etcd, by the turn.
    probe: Vec<(u32, Instant)>,
}

impl Leases {
    /// Writes `count` leases.
    pub(crate) fn write(etcd: &Etcd, form: Form, count: u32) -> Self {
        let mut leases = Self {
            form,
            count,
            etcd_lease: 0,
            nodes: BTreeMap::new(),
            turns: BTreeMap::new(),
            probe_turn: 0,
            random: 1,
        };
        etcd.run(async || {
            let mut client = Client::connect([etcd.endpoints()], None).await.unwrap();
            leases.etcd_lease = client.lease_grant(86400, None).await.unwrap().id();
            let all: Vec<u32> = (1..=count).collect();
            for numbers in all.chunks(PER_TXN) {
                let mut puts = Vec::new();
                for &number in numbers {
                    let at = match number {
                        1 => probe_addr(0),
                        number => node(number, 0),
                    };
                    leases.nodes.insert(number, at);
                    let (key, value) = leases.pair(number, at);
                    puts.push(TxnOp::put(key, value, Some(leases.options())));
                }
                client.txn(Txn::new().and_then(puts)).await.unwrap();
            }
        });
        leases
    }

    fn pair(&self, number: u32, at: Ipv4Addr) -> (String, String) {
        let key = key(number);
        ((self.form.key)(&key), (self.form.value)(&key, at))
    }

    const fn options(&self) -> PutOptions {
        PutOptions::new().with_lease(self.etcd_lease)
    }

    /// Subnet and node of every lease, as text.
    pub(crate) fn expected(&self) -> BTreeMap<String, String> {
        let text =
            |(number, at): (&u32, &Ipv4Addr)| (format!("{}/29", subnet(*number)), at.to_string());
        self.nodes.iter().map(text).collect()
    }

    /// Where packets for the probe go in the pod network.
    pub(crate) fn probe_target() -> SocketAddr {
        let base = u32::from(subnet(1));
        SocketAddr::from((Ipv4Addr::from(base + 2), 9))
    }

    /// Changes leases for a while, `rate` a second, each in a revision of its own: nodes that move, nodes that
    /// leave, nodes that come, and the probe.
    pub(crate) fn change(&mut self, etcd: &Etcd, rate: u32, time: Duration) -> Written {
        etcd.run(async || {
            let client = Client::connect([etcd.endpoints()], None).await.unwrap();
            let kv = client.kv_client();
            let begun = Instant::now();
            let mut written = Written {
                changes: 0,
                took: Duration::ZERO,
                probe: Vec::new(),
            };
            while begun.elapsed() < time {
                let elapsed = begun.elapsed();
                let due = elapsed.as_millis() * u128::from(rate) / 1000;
                let probe_due = elapsed.as_millis() / PROBE_EVERY.as_millis();
                let mut batch = Vec::new();
                if written.probe.len() as u128 <= probe_due {
                    self.probe_turn += 1;
                    self.nodes.insert(1, probe_addr(self.probe_turn));
                    batch.push(1);
                    written.probe.push((self.probe_turn, Instant::now()));
                }
                batch.extend(
                    self.pick(
                        due.saturating_sub(u128::from(written.changes) + batch.len() as u128),
                    ),
                );
                written.changes += batch.len() as u64;
                join_all(
                    batch
                        .iter()
                        .map(|&number| self.write_one(kv.clone(), number)),
                )
                .await;
                tokio::time::sleep(PACE).await;
            }
            written.took = begun.elapsed();
            written
        })
    }

    /// Decides what happens to some leases, no two of them the same.
    fn pick(&mut self, count: u128) -> BTreeSet<u32> {
        let mut picked = BTreeSet::new();
        while (picked.len() as u128) < count.min(u128::from(self.count) / 2) {
            // Marsaglia's xorshift: the same changes in every run.
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let among = u64::from(self.count - 1);
            let number = 2 + u32::try_from(self.random % among).unwrap();
            if !picked.insert(number) {
                continue;
            }
            let leaves = self.random >> 60 < 2;
            if leaves && self.nodes.remove(&number).is_some() {
                continue;
            }
            let turn = self.turns.entry(number).or_default();
            *turn += 1;
            self.nodes.insert(number, node(number, *turn));
        }
        picked
    }

    async fn write_one(&self, mut kv: KvClient, number: u32) {
        match self.nodes.get(&number) {
            Some(at) => {
                let (key, value) = self.pair(number, *at);
                kv.put(key, value, Some(self.options())).await.unwrap();
            }
            None => {
                let key = (self.form.key)(&key(number));
                kv.delete(key, None).await.unwrap();
            }
        }
    }
}

/// Takes the probe's packets where they arrive, in the namespace of the wire.
#[derive(Default)]
pub(crate) struct Arrivals {
    stop: AtomicBool,
    /// Turn of the address (modulo [`PROBE_ADDRS`]) and time of each first packet at another address than before.
    moved: Mutex<Vec<(u32, Instant)>>,
}

impl Arrivals {
    /// The addresses to give the wire.
    pub(crate) fn addrs() -> impl Iterator<Item = Ipv4Addr> {
        (0..PROBE_ADDRS).map(probe_addr)
    }

    /// Listens until told to stop. To be run on a thread in the namespace of the wire.
    pub(crate) fn listen(&self) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let last = std::cell::Cell::new(u32::MAX);
            let last = &last;
            let all = (0..PROBE_ADDRS).map(|turn| async move {
                let socket = UdpSocket::bind((probe_addr(turn), TUNNEL_PORT))
                    .await
                    .unwrap();
                let mut buffer = [0; 64];
                loop {
                    socket.recv_from(&mut buffer).await.unwrap();
                    if last.replace(turn) != turn {
                        self.moved.lock().unwrap().push((turn, Instant::now()));
                    }
                }
            });
            let stopped = async {
                while !self.stop.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::select! {
                _ = join_all::<Vec<_>>(all.collect()) => {}
                () = stopped => {}
            }
        });
    }

    /// Sends the probe's packets, every two milliseconds. To be run on a thread in the namespace of a node.
    pub(crate) fn send(&self) {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        while !self.stop.load(Ordering::Relaxed) {
            // Refused until there is a route.
            let _tried = socket.send_to(b"probe", Leases::probe_target());
            wait::pause(Duration::from_millis(2));
        }
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether a packet has arrived anywhere.
    pub(crate) fn any(&self) -> bool {
        !self.moved.lock().unwrap().is_empty()
    }

    /// For each change of the probe: how long after it was sent to etcd the first packet came that knew of it or
    /// of a later one. Those that none came for are at the end of the run; they count as `None`.
    pub(crate) fn lags(&self, written: &Written) -> Vec<Option<Duration>> {
        let moved = self.moved.lock().unwrap();
        let lag = |nth: usize, sent: Instant| {
            let newer: BTreeSet<u32> = written.probe[nth..]
                .iter()
                .take(PROBE_ADDRS as usize - 1)
                .map(|(turn, _)| turn % PROBE_ADDRS)
                .collect();
            let first = moved
                .iter()
                .find(|(turn, at)| *at >= sent && newer.contains(turn));
            first.map(|(_, at)| *at - sent)
        };
        let all = written.probe.iter().enumerate();
        all.map(|(nth, (_, sent))| lag(nth, *sent)).collect()
    }
}
