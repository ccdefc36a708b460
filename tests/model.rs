//! Any sequence of what stores, operators, other programs and crashes do to a node leads to the state that a small
//! model of its own derives: the whole program on a real etcd, kernel and nft, in namespaces. A seed decides the
//! sequence (`LODEN_SEED`, `LODEN_ROUNDS`). Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/dropin.rs"]
mod dropin;
#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/seeded.rs"]
mod seeded;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use dropin::{Cluster, Daemon};
use nix::sys::signal::Signal;
use proptest::collection::vec;
use proptest::prelude::*;

/// Nodes lease 198.18.1.0/24 to 198.18.20.0/24, so that the tests' leases behind that are never in their way.
const CONFIG: &str = r#"{"Network":"198.18.0.0/16","SubnetMin":"198.18.1.0","SubnetMax":"198.18.20.0",
"EnableNFTables":true,"Backend":{"Type":"udp"}}"#;

/// The time from one look at the device to the next, that for which a deleted lease is held, and several times as much for
/// slow machines.
const CONVERGED_WITHIN: Duration = Duration::from_secs(90);

const OUR_VALUE: &str = r#"{"PublicIP":"198.51.100.1","PublicIPv6":null}"#;

/// Keys that are no leases.
const GARBAGE: [&str; 3] = ["README", "198.18.110.7-24", "198.18.110.0-24hi"];

/// Leases that claim more than anybody's share.
const CLAIMS: [&str; 3] = ["198.18.0.0-17", "203.0.113.0-24", "198.18.128.0-23"];

/// What others may have on a node, and remove again: `ip` adds it and takes it away.
const FOREIGN: [&str; 5] = [
    "route 203.0.113.0/24 dev other proto static metric 7",
    "route blackhole 203.0.113.128/25",
    "route 198.18.200.0/24 dev other",
    "route 198.18.0.0/16 dev other table 77",
    "rule from 203.0.113.7 lookup 77 priority 1000",
];

/// What may be done to the device, with `ip`.
const DEEDS: [&str; 8] = [
    "route del 198.18.0.0/16 dev flannel0",
    "addr flush dev flannel0",
    "addr add 198.18.201.1/24 dev flannel0",
    "link set flannel0 down",
    "link set flannel0 mtu 1300",
    "link set flannel0 txqueuelen 7",
    "route flush dev flannel0",
    "link del flannel0",
];

/// What may be done to the rules, with `nft`.
const SPOILS: [&str; 6] = [
    "flush ruleset",
    "delete table ip flannel-ipv4",
    "flush chain ip flannel-ipv4 postrtg",
    "insert rule ip flannel-ipv4 postrtg counter accept",
    "delete chain ip flannel-ipv4 forward",
    "delete table inet loden-notrack",
];

const FOREIGN_TABLE: &str = "table ip foreign {\n\tchain input {\n\t\ttype filter hook input priority filter; \
                             policy accept;\n\t\tip saddr 203.0.113.9 drop\n\t}\n}";

#[derive(Debug, Clone)]
enum Event {
    /// A lease, by subnet and node.
    Put(u8, u8),
    /// A lease's value that cannot be read.
    Bad(u8),
    Delete(u8),
    Garbage(usize, bool),
    Claim(usize, bool),
    DeleteAll,
    OwnDeleted,
    OwnBad,
    /// Another node's lease in the place of ours.
    OwnTaken(u8),
    /// etcd ends and starts again; with what was before forgotten, or not.
    Outage(bool),
    Crash,
    Stop,
    Start,
    Deed(usize),
    Spoil(usize),
    Foreign(usize),
    ForeignTable,
}

fn event() -> impl Strategy<Value = Event> {
    let subnet = 1_u8..6;
    prop_oneof![
        8 => (subnet.clone(), 1_u8..9).prop_map(|(subnet, node)| Event::Put(subnet, node)),
        3 => subnet.clone().prop_map(Event::Bad),
        4 => subnet.prop_map(Event::Delete),
        2 => (0..GARBAGE.len(), any::<bool>()).prop_map(|(n, put)| Event::Garbage(n, put)),
        2 => (0..CLAIMS.len(), any::<bool>()).prop_map(|(n, put)| Event::Claim(n, put)),
        1 => Just(Event::DeleteAll),
        1 => Just(Event::OwnDeleted),
        1 => Just(Event::OwnBad),
        1 => (1_u8..9).prop_map(Event::OwnTaken),
        1 => any::<bool>().prop_map(Event::Outage),
        2 => Just(Event::Crash),
        1 => Just(Event::Stop),
        3 => Just(Event::Start),
        8 => (0..DEEDS.len()).prop_map(Event::Deed),
        6 => (0..SPOILS.len()).prop_map(Event::Spoil),
        6 => (0..FOREIGN.len()).prop_map(Event::Foreign),
        2 => Just(Event::ForeignTable),
    ]
}

/// What the store says under a lease's key, and what a daemon that has watched all along knows of it.
#[derive(Debug, Clone)]
struct Stored {
    good: bool,
    node: Option<String>,
}

/// What there should be, apart from what a daemon may choose: its own subnet.
#[derive(Debug, Default)]
struct Model {
    leases: BTreeMap<String, Stored>,
    claims: BTreeSet<&'static str>,
    foreign: BTreeSet<&'static str>,
    foreign_table: bool,
}

impl Model {
    /// A daemon that starts to watch knows what is good, and nothing of what was.
    fn forget(&mut self) {
        for stored in self.leases.values_mut().filter(|stored| !stored.good) {
            stored.node = None;
        }
    }
}

/// One thing of a node's state by its name; the same for what is and for what should be.
type Picture = BTreeMap<&'static str, String>;

struct World {
    // First, so that it ends before its namespace.
    daemon: Option<Daemon>,
    cluster: Cluster,
    model: Model,
    routes: String,
    rules: String,
    markers: u8,
}

fn value(node: &str) -> String {
    format!(r#"{{"PublicIP":"{node}","PublicIPv6":null}}"#)
}

fn lines<'a>(lines: impl IntoIterator<Item = &'a str>) -> String {
    // Whether a link has a carrier yet is nobody's doing.
    let plain = |line: &'a str| line.trim().trim_end_matches(" linkdown");
    let mut lines: Vec<&str> = lines.into_iter().map(plain).collect();
    lines.retain(|line| !line.is_empty());
    lines.sort_unstable();
    lines.join("\n")
}

/// The tables of a listing of nft, in an order of their own.
fn tables(listing: &str) -> String {
    let mut tables: Vec<&str> = listing.split("\n}").map(str::trim).collect();
    tables.sort_unstable();
    tables.join("\n}\n")
}

impl World {
    fn new() -> Self {
        let cluster = Cluster::new(1, CONFIG);
        cluster.ip(1, "link add other type veth peer name far");
        cluster.ip(1, "link set far up");
        cluster.ip(1, "link set other up");
        let mut world = Self {
            cluster,
            daemon: None,
            model: Model::default(),
            routes: String::new(),
            rules: String::new(),
            markers: 0,
        };
        world.routes = world.cluster.ip(1, "-4 route show table all");
        world.rules = world.cluster.ip(1, "rule show");
        world.start();
        world
    }

    fn start(&mut self) {
        if self.daemon.is_none() {
            let args = ["-ip-masq", "-iptables-resync=5"];
            self.daemon = Some(self.cluster.start(1, &args));
            self.watches_anew();
        }
    }

    /// A daemon is ready before it has seen what the store has, if that takes long.
    fn watches_anew(&mut self) {
        self.model.forget();
        self.settle();
    }

    fn own_key(&self) -> String {
        self.cluster.base(1) + "-24"
    }

    fn wait_until(&self, what: &str, condition: impl FnMut() -> bool) {
        self.daemon.as_ref().unwrap().wait_until(what, condition);
    }

    fn put(&mut self, key: &str, node: String) {
        self.cluster
            .etcd
            .put(&format!("subnets/{key}"), &value(&node));
        let node = Some(node);
        let stored = Stored { good: true, node };
        self.model.leases.insert(key.to_owned(), stored);
    }

    fn put_bad(&mut self, key: &str) {
        self.cluster.etcd.put(&format!("subnets/{key}"), "{");
        let known = self.model.leases.remove(key);
        let node = known.and_then(|known| known.node);
        let node = node.filter(|_| self.daemon.is_some());
        let stored = Stored { good: false, node };
        self.model.leases.insert(key.to_owned(), stored);
    }

    /// Waits until the daemon has heard of everything that was written so far.
    fn settle(&mut self) {
        if self.daemon.is_none() {
            return;
        }
        self.markers += 1;
        let node = format!("198.51.100.{}", 100 + self.markers % 100);
        self.put("198.18.250.0-24", node.clone());
        self.wait_until("the marker", || {
            self.cluster.status(1)["peers"].to_string().contains(&node)
        });
    }

    fn play(&mut self, event: &Event) {
        let running = self.daemon.is_some();
        match *event {
            Event::Put(subnet, node) => self.put(
                &format!("198.18.{}.0-24", 100 + subnet),
                format!("198.51.100.{}", 50 + node),
            ),
            Event::Bad(subnet) => self.put_bad(&format!("198.18.{}.0-24", 100 + subnet)),
            Event::Delete(subnet) => {
                let key = format!("198.18.{}.0-24", 100 + subnet);
                self.cluster.etcd.delete(&format!("subnets/{key}"), false);
                self.model.leases.remove(&key);
            }
            Event::Garbage(n, put) => self.key_of_nobody(GARBAGE[n], put),
            Event::Claim(n, put) => {
                self.key_of_nobody(CLAIMS[n], put);
                if put {
                    self.model.claims.insert(CLAIMS[n]);
                } else {
                    self.model.claims.remove(CLAIMS[n]);
                }
            }
            Event::DeleteAll => {
                self.cluster.etcd.delete("subnets/", true);
                self.model.leases.clear();
                self.model.claims.clear();
                self.own_is_written_again(running);
            }
            Event::OwnDeleted => {
                let key = format!("subnets/{}", self.own_key());
                self.cluster.etcd.delete(&key, false);
                self.model.leases.remove(&self.own_key());
                self.own_is_written_again(running);
            }
            Event::OwnBad if running => {
                let key = format!("subnets/{}", self.own_key());
                self.cluster.etcd.put(&key, "{");
                self.own_is_written_again(running);
            }
            Event::OwnBad => self.put_bad(&self.own_key()),
            Event::OwnTaken(node) => {
                let key = self.own_key();
                self.settle();
                self.put(&key, format!("198.51.100.{}", 60 + node));
                if running {
                    self.wait_until("another subnet", || self.own_key() != key);
                    self.wait_until("readiness", || self.cluster.status(1)["ready"] == true);
                    self.watches_anew();
                }
            }
            Event::Outage(forget) => {
                self.settle();
                if forget {
                    let revision = self.cluster.etcd.put("other", "x").to_string();
                    self.cluster.etcd.kill(0);
                    self.cluster.etcd.spawn(0);
                    self.cluster.etcd.await_health();
                    self.cluster.etcd.ctl(&["compact", &revision]);
                } else {
                    self.cluster.etcd.kill(0);
                    self.cluster.etcd.spawn(0);
                    self.cluster.etcd.await_health();
                }
            }
            Event::Crash => {
                if let Some(daemon) = self.daemon.take() {
                    daemon.signal(Signal::SIGKILL);
                }
            }
            Event::Stop => {
                if let Some(daemon) = self.daemon.take() {
                    assert_eq!(daemon.stop(), 0);
                }
            }
            Event::Start => self.start(),
            Event::Deed(n) => self.cluster.try_exec(1, "ip", DEEDS[n]),
            Event::Spoil(n) => {
                self.cluster.try_exec(1, "nft", SPOILS[n]);
                self.model.foreign_table &= SPOILS[n] != "flush ruleset";
            }
            Event::Foreign(n) => {
                let (object, rest) = FOREIGN[n].split_once(' ').unwrap();
                let verb = if self.model.foreign.remove(FOREIGN[n]) {
                    "del"
                } else {
                    self.model.foreign.insert(FOREIGN[n]);
                    "add"
                };
                self.cluster.ip(1, &format!("{object} {verb} {rest}"));
            }
            Event::ForeignTable => {
                if self.model.foreign_table {
                    self.cluster.exec(1, "nft", &["delete table ip foreign"]);
                } else {
                    self.cluster.exec(1, "nft", &[FOREIGN_TABLE]);
                }
                self.model.foreign_table = !self.model.foreign_table;
            }
        }
    }

    fn key_of_nobody(&self, key: &str, put: bool) {
        let key = format!("subnets/{key}");
        if put {
            self.cluster.etcd.put(&key, &value("198.51.100.99"));
        } else {
            self.cluster.etcd.delete(&key, false);
        }
    }

    /// A running daemon has its lease back before anybody can miss it.
    fn own_is_written_again(&self, running: bool) {
        if running {
            let key = format!("subnets/{}", self.own_key());
            self.wait_until("our lease", || {
                self.cluster
                    .etcd
                    .get(&key)
                    .is_some_and(|(value, _)| value == OUR_VALUE)
            });
        }
    }

    fn should_be(&self) -> Picture {
        let own = self.own_key();
        let known = |(key, stored): (&String, &Stored)| {
            let net = key.replace('-', "/");
            let node = stored.node.as_ref()?;
            Some(format!("{net} at {node}:8285"))
        };
        let peers: Vec<String> = self.model.leases.iter().filter_map(known).collect();
        let mut routes = vec![self.routes.clone()];
        let mut rules = vec![self.rules.clone()];
        for foreign in &self.model.foreign {
            match foreign.split_once(' ').unwrap() {
                // As `ip` shows it.
                ("rule", _) => rules.push("1000:\tfrom 203.0.113.7 lookup 77".to_owned()),
                (_, "198.18.0.0/16 dev other table 77") => {
                    routes.push("198.18.0.0/16 dev other table 77 scope link".to_owned());
                }
                (_, route) => routes.push(match route.split_once(" metric ") {
                    Some((head, metric)) => format!("{head} scope link metric {metric}"),
                    None if route.starts_with("blackhole") => route.to_owned(),
                    None => format!("{route} scope link"),
                }),
            }
        }
        let ours = include_str!("golden/firewall/nft-list-v4.txt")
            .replace("10.244.1.0/24", &own.replace('-', "/"))
            .replace("10.244.0.0/16", "198.18.0.0/16");
        // The underlay has one family.
        let notrack = include_str!("golden/firewall/nft-list-notrack.txt")
            .replace("udp dport", "meta nfproto ipv4 udp dport");
        let foreign = if self.model.foreign_table {
            FOREIGN_TABLE
        } else {
            ""
        };
        Picture::from([
            ("peers", lines(peers.iter().map(String::as_str))),
            (
                "refused",
                self.model
                    .claims
                    .iter()
                    .copied()
                    .collect::<Vec<_>>()
                    .join(" "),
            ),
            ("our lease", OUR_VALUE.to_owned()),
            (
                "device",
                format!("1472 1000 up {}/32", self.cluster.base(1)),
            ),
            (
                "our routes",
                "198.18.0.0/16 dev flannel0 proto boot scope global".to_owned(),
            ),
            (
                "others' routes",
                lines(routes.iter().flat_map(|text| text.lines())),
            ),
            ("policy", lines(rules.iter().flat_map(|text| text.lines()))),
            ("rules", tables(&[&*ours, &notrack, foreign].join("\n"))),
        ])
    }

    fn is(&self) -> Picture {
        let status = self.cluster.status(1);
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let empty = Vec::new();
        let peers = status["peers"].as_array().unwrap_or(&empty).iter();
        let peers = peers.map(|peer| {
            format!(
                "{} at {}",
                text(&peer["subnets"][0]),
                text(&peer["endpoint"])
            )
        });
        let peers: Vec<String> = peers.collect();
        let refused = status["refused"].to_string();
        let claims = CLAIMS.iter().filter(|claim| {
            refused.contains(&format!("lease {}", claim.replace('-', "/")))
                || refused.contains(&format!("lease {claim}"))
        });
        let claims: BTreeSet<&str> = claims.copied().collect();
        let key = format!("subnets/{}", self.own_key());
        let lease = self.cluster.etcd.get(&key).map(|(value, _)| value);
        let device = self.cluster.ip(1, "-j addr show");
        let device: serde_json::Value = serde_json::from_str(&device).unwrap();
        let device = device.as_array().unwrap().iter();
        let device = device
            .filter(|link| link["ifname"] == "flannel0")
            .map(|link| {
                let up = link["flags"].to_string().contains("\"UP\"");
                let addrs = link["addr_info"].as_array().unwrap().iter();
                let addrs =
                    addrs.map(|addr| format!("{}/{}", text(&addr["local"]), addr["prefixlen"]));
                let state = if up { "up" } else { "down" };
                let addrs = addrs.collect::<Vec<_>>().join(" ");
                format!("{} {} {state} {addrs}", link["mtu"], link["txqlen"])
            });
        let main = self.cluster.ip(1, "-d route show");
        let ours = main.lines().filter(|line| line.contains("dev flannel0"));
        let ours = ours.map(|line| line.trim_start_matches("unicast "));
        let all = self.cluster.ip(1, "-4 route show table all");
        let others = all.lines().filter(|line| !line.contains("dev flannel0"));
        Picture::from([
            ("peers", lines(peers.iter().map(String::as_str))),
            ("refused", claims.into_iter().collect::<Vec<_>>().join(" ")),
            ("our lease", lease.unwrap_or_default()),
            ("device", device.collect()),
            ("our routes", lines(ours)),
            ("others' routes", lines(others)),
            ("policy", lines(self.cluster.ip(1, "rule show").lines())),
            (
                "rules",
                tables(&self.cluster.exec(1, "nft", &["list", "ruleset"])),
            ),
        ])
    }

    fn converges(&self) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            let (is, should) = (self.is(), self.should_be());
            if is == should {
                return Ok(());
            }
            if begin.elapsed() > CONVERGED_WITHIN {
                let wrong = is.iter().filter(|(name, is)| should[*name] != **is);
                let wrong = wrong.map(|(name, is)| {
                    format!("{name} are\n{is}\nand should be\n{}\n", should[*name])
                });
                return Err(wrong.collect());
            }
        }
    }
}

#[test]
fn whatever_happens_to_a_node_it_converges_to_what_the_store_says() {
    let events = vec(event(), 40);
    let seeds = seeded::seeds(3);
    for seed in seeds.clone() {
        let events = seeded::value(&events, seed);
        let mut world = World::new();
        for event in &events {
            world.play(event);
        }
        world.start();
        if let Err(wrong) = world.converges() {
            let log = world.daemon.as_ref().unwrap().log();
            unreachable!("seed {seed}: {events:?}\n{wrong}\n{log}");
        }
        assert_eq!(world.daemon.take().unwrap().stop(), 0);
    }
    println!(
        "{} sequences, seeds {seeds:?}: all converge",
        seeds.clone().count()
    );
}
