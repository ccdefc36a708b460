//! Thousands of leases in a real etcd, hundreds of changes a second, and what that costs a daemon and the pods'
//! traffic. The short form shows that everything arrives; the long form, `scripts/soak etcd-scale`, holds the
//! figures against the goals. Every figure is taken from outside: from packets, processes and the writer's clock;
//! only the pauses of the workers are their own. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot prepare itself must fail"
)]

#[path = "common/dropin.rs"]
mod dropin;
#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/lease_load.rs"]
mod lease_load;
#[path = "common/scorecard.rs"]
mod scorecard;
#[path = "common/usage.rs"]
mod usage;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use dropin::{Cluster, Daemon, PodNs};
use lease_load::{Arrivals, CONFIG, FLANNEL, Leases};
use loden::lab::{Interrupt, NetNs, wait};
use scorecard::{Scorecard, mib};
use serde_json::Value;
use usage::{Cpu, memory};

/// Another program to measure in loden's place, to compare with.
const PROGRAM: &str = "LODEN_SCALE_DAEMON";

/// Only a failing run waits this long.
const LIMIT: Duration = Duration::from_secs(60);

/// iperf3 reports the bytes that arrived in intervals of this length. One without a byte is a stall: at the
/// retransmission timeout's floor of 200 ms (`TCP_RTO_MIN`), every lost flight shows as at least one.
const STALL: Duration = Duration::from_millis(100);

/// How much of everything.
struct Size {
    leases: u32,
    /// Changes a second, and for how long.
    rate: u32,
    time: Duration,
    idle: Duration,
}

/// What was measured.
#[derive(Default)]
struct Figures {
    /// From the daemon's start, with the store there, to readiness.
    started: Duration,
    /// From the store's first answer to readiness, of a daemon that waited for it.
    ready: Duration,
    /// Likewise, to the first packet that a lease in the store made arrive.
    first_packet: Duration,
    changes_per_second: f64,
    /// Of every tenth of a second's probe.
    lags: Vec<Option<Duration>>,
    quiet: Throughput,
    busy: Throughput,
    /// Of one processor, during the changes: the daemon without its workers.
    control: f64,
    /// Of one processor, idle: the whole daemon and what it runs.
    idle: f64,
    /// KiB.
    settled: u64,
    peak: u64,
    /// Times a worker took a new table, and took longer than a millisecond for it.
    tables: Option<(f64, f64)>,
    /// As the daemon sees the lag.
    told: String,
}

/// What one iperf3 run carried.
#[derive(Default)]
struct Throughput {
    gbit: f64,
    intervals: usize,
    stalls: usize,
}

#[test]
fn every_change_of_hundreds_of_leases_arrives_in_both_daemons() {
    let figures = measure(&Size {
        leases: 300,
        rate: 100,
        time: Duration::from_secs(3),
        idle: Duration::from_secs(1),
    });
    println!("{}{}", scorecard(&figures), figures.told);
    assert!(figures.changes_per_second > 0.0);
    assert!(figures.busy.gbit > 0.0);
}

#[test]
fn lag_ends_whatever_else_is_written_to_the_store() {
    let cluster = Cluster::new(1, CONFIG);
    let one = spawn(&cluster, 1);
    await_ready(&cluster, 1, &one);
    let figure = |name: &str| series(&cluster.http(1, "/metrics").1, name).unwrap();
    for round in 0..3 {
        // A bad key that is told once, one that stays as it was, and keys of others.
        for key in ["/coreos.com/network/subnets/none", "/elsewhere"] {
            cluster.etcd.ctl(&["put", key, "x"]);
        }
        let lease = format!("/coreos.com/network/subnets/198.18.77.{}-29", 8 * round);
        cluster.etcd.ctl(&["put", &lease, dropin::GOLDEN_VALUE]);
        one.wait_until("the peer", || figure("loden_peers ") > f64::from(round));
        cluster.etcd.ctl(&["put", "/elsewhere", "y"]);
        one.wait_until("the end of the lag", || {
            figure("loden_watch_revisions_behind ") == 0.0
                && figure("loden_watch_oldest_seconds ") == 0.0
        });
        let (_, metrics) = cluster.http(1, "/metrics");
        let events = series(&metrics, "loden_store_events_total ");
        assert_eq!(series(&metrics, "loden_watch_lag_seconds_count "), events);
    }
    assert_eq!(one.stop(), 0);
}

#[test]
#[ignore = "takes minutes of a quiet machine and a release build: scripts/soak etcd-scale"]
fn goals_for_five_thousand_leases_are_met() {
    let figures = measure(&Size {
        leases: 5000,
        rate: 500,
        time: Duration::from_secs(30),
        idle: Duration::from_secs(60),
    });
    let card = scorecard(&figures);
    println!("{card}{}", figures.told);
    assert_eq!(card.missed(), 0, "goals are missed");
}

fn measure(size: &Size) -> Figures {
    let mut figures = Figures::default();
    let mut cluster = Cluster::new(2, CONFIG);
    let hub = cluster.etcd.netns().clone();
    for addr in Arrivals::addrs() {
        let batch = format!("addr add {addr}/32 dev br0");
        let args = [
            &["-n", hub.name()][..],
            &batch.split(' ').collect::<Vec<_>>(),
        ]
        .concat();
        assert!(Command::new("ip").args(args).status().unwrap().success());
    }
    let mut leases = Leases::write(&cluster.etcd, FLANNEL, size.leases);

    let begun = Instant::now();
    let two = spawn(&cluster, 2);
    await_ready(&cluster, 2, &two);
    figures.started = begun.elapsed();

    let arrivals = Arrivals::default();
    thread::scope(|scope| {
        let one = NetNs::named(cluster.name(1));
        let probe = &arrivals;
        scope.spawn(move || hub.run(|| probe.listen()).unwrap());
        scope.spawn(move || one.run(|| probe.send()).unwrap());
        // Also if something below panics, the threads must end for that to be seen.
        let _stop = Stop(&arrivals);

        let one = wait_for_the_store(&mut cluster, &arrivals, &mut figures);
        let pods = [cluster.add_pod(1), cluster.add_pod(2)];
        cluster.reaches(1, 2);
        assert_settled(&cluster, &leases);

        let quiet = Iperf::start(&pods, size.time.min(Duration::from_secs(5)));
        figures.quiet = quiet.finish();
        let busy = Iperf::start(&pods, size.time + Duration::from_secs(1));
        let before = Cpu::of(one.pid());
        // A little faster than asked for, because the writer is a little late.
        let written = leases.change(&cluster.etcd, size.rate + size.rate / 50, size.time);
        let used = Cpu::of(one.pid()).since(before);
        figures.busy = busy.finish();
        figures.changes_per_second = written.changes as f64 / written.took.as_secs_f64();
        figures.control = used.rest.as_secs_f64() / written.took.as_secs_f64();
        arrivals.stop();
        figures.lags = arrivals.lags(&written);
        assert_settled(&cluster, &leases);
        let (_, metrics) = cluster.http(1, "/metrics");
        dropin::check_openmetrics(&metrics);
        figures.tables = tables_taken(&metrics);
        figures.told = watch_lag(&metrics);

        // What is kept for a while after the last change is over by then.
        wait::pause(size.idle.min(Duration::from_secs(10)));
        let before = [Cpu::of(one.pid()), Cpu::of(two.pid())];
        wait::pause(size.idle);
        let used = [
            Cpu::of(one.pid()).since(before[0]).total(),
            Cpu::of(two.pid()).since(before[1]).total(),
        ];
        figures.idle = used[0].max(used[1]).as_secs_f64() / size.idle.as_secs_f64();
        let [first, second] = [memory(one.pid()), memory(two.pid())];
        figures.settled = first.0.max(second.0);
        figures.peak = first.1.max(second.1);
        assert_eq!(one.stop(), 0);
    });
    assert_eq!(two.stop(), 0);
    figures
}

struct Stop<'a>(&'a Arrivals);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn spawn(cluster: &Cluster, node: u8) -> Daemon {
    let ip = format!("198.51.100.{node}");
    let args = [
        "-iface=eth0",
        "-ip-masq",
        "-healthz-port=8080",
        "-healthz-ip",
        &ip,
    ];
    let command = match std::env::var_os(PROGRAM) {
        Some(program) => cluster.program(node, &PathBuf::from(program), &args),
        None => cluster.bare(node, &args),
    };
    cluster.spawn_command(node, command)
}

fn await_ready(cluster: &Cluster, node: u8, daemon: &Daemon) {
    await_soon("readiness", Some(daemon), || {
        matches!(cluster.try_http(node, "/readyz"), Ok((200, _)))
    });
}

/// Looks every two milliseconds.
fn await_soon(what: &str, daemon: Option<&Daemon>, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        let log = daemon.map(Daemon::log).unwrap_or_default();
        assert!(begun.elapsed() < LIMIT, "no {what}; log:\n{log}");
        wait::pause(Duration::from_millis(2));
    }
}

/// Starts the first node's daemon while the store is away, and lets the store come.
fn wait_for_the_store(cluster: &mut Cluster, arrivals: &Arrivals, figures: &mut Figures) -> Daemon {
    cluster.etcd.kill(0);
    let one = spawn(cluster, 1);
    one.wait_for_log("waiting for the network configuration");
    cluster.etcd.spawn(0);
    let etcd = &cluster.etcd;
    etcd.run(async || {
        let begun = Instant::now();
        let endpoints = [etcd.endpoints()];
        while begun.elapsed() < LIMIT {
            if let Ok(mut client) = etcd_client::Client::connect(&endpoints, None).await
                && client.get("health", None).await.is_ok()
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    let answered = Instant::now();
    await_ready(cluster, 1, &one);
    figures.ready = answered.elapsed();
    await_soon("packet of the probe", Some(&one), || arrivals.any());
    figures.first_packet = answered.elapsed();
    one
}

/// Waits until both daemons have exactly the leases that were written, and each other's.
fn assert_settled(cluster: &Cluster, leases: &Leases) {
    let expected = leases.expected();
    for node in [1, 2] {
        let mut expected = expected.clone();
        let other = 3 - node;
        let subnet = format!("{}/29", cluster.base(other));
        expected.insert(subnet, format!("198.51.100.{other}"));
        let mut known = BTreeMap::new();
        let begun = Instant::now();
        while known != expected {
            let wrong = || {
                let missing = expected
                    .iter()
                    .filter(|one| known.get(one.0) != Some(one.1));
                let extra = known
                    .keys()
                    .filter(|subnet| !expected.contains_key(*subnet));
                (
                    missing.take(3).collect::<Vec<_>>(),
                    extra.take(3).collect::<Vec<_>>(),
                )
            };
            assert!(
                begun.elapsed() < LIMIT,
                "node {node} lacks or keeps: {:?}",
                wrong()
            );
            wait::pause(Duration::from_millis(200));
            known = peers(&cluster.status(node));
        }
    }
}

/// Subnet and underlay address of every peer, as the data plane has them.
fn peers(status: &Value) -> BTreeMap<String, String> {
    let peers = status["datapath"]["peers"].as_array();
    peers
        .into_iter()
        .flatten()
        .flat_map(|peer| {
            let addr: std::net::SocketAddr = peer["addr"].as_str().unwrap().parse().unwrap();
            let nets = peer["nets"].as_array().unwrap().iter();
            nets.map(move |net| (net.as_str().unwrap().to_owned(), addr.ip().to_string()))
        })
        .collect()
}

/// One TCP connection from the first pod to the second.
struct Iperf {
    server: Child,
    client: Child,
}

impl Iperf {
    fn start(pods: &[PodNs; 2], time: Duration) -> Self {
        let spawn = |pod: &PodNs, args: &[&str]| {
            let mut command = Command::new("iperf3");
            command
                .args(args)
                .stdin(Stdio::null())
                .stdout(Stdio::piped());
            NetNs::named(&pod.name).spawn(&mut command).unwrap()
        };
        let every = STALL.as_secs_f64().to_string();
        let server = spawn(&pods[1], &["-s", "-1", "-J", "-i", &every]);
        let netns = NetNs::named(&pods[1].name);
        wait::until_bound(&netns, "tcp", 5201, &Interrupt::default(), || Ok(())).unwrap();
        let seconds = time.as_secs().to_string();
        let client = spawn(&pods[0], &["-c", &pods[1].addr, "-J", "-t", &seconds]);
        Self { server, client }
    }

    /// What the server has seen.
    fn finish(self) -> Throughput {
        let said = self.client.wait_with_output().unwrap();
        let failed = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.status.success(), "{failed}");
        let report = self.server.wait_with_output().unwrap().stdout;
        let report: Value = serde_json::from_slice(&report).unwrap();
        let intervals = report["intervals"].as_array().unwrap();
        // The last one is what was left of the time.
        let whole = intervals
            .iter()
            .map(|one| &one["sum"])
            .filter(|sum| sum["seconds"].as_f64().unwrap() > STALL.as_secs_f64() * 0.9);
        let bytes: Vec<f64> = whole.map(|sum| sum["bytes"].as_f64().unwrap()).collect();
        Throughput {
            gbit: report["end"]["sum_received"]["bits_per_second"]
                .as_f64()
                .unwrap()
                / 1e9,
            intervals: bytes.len(),
            stalls: bytes.iter().filter(|bytes| **bytes == 0.0).count(),
        }
    }
}

/// The value of a series.
fn series(metrics: &str, name: &str) -> Option<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

/// How often a worker took a new table, and how often that took more than a millisecond.
fn tables_taken(metrics: &str) -> Option<(f64, f64)> {
    let count = series(metrics, "loden_table_take_seconds_count")?;
    let quick = series(metrics, r#"loden_table_take_seconds_bucket{le="0.001"}"#)?;
    Some((count, count - quick))
}

/// The daemon's own view of its lag.
fn watch_lag(metrics: &str) -> String {
    let lines = metrics.lines();
    let lines = lines.filter(|line| {
        line.starts_with("loden_watch_")
            || line.starts_with("loden_publication")
            || line.starts_with("loden_table_take")
    });
    lines.fold(String::new(), |mut text, line| {
        writeln!(text, "  {line}").unwrap();
        text
    })
}

/// The figures for people.
fn scorecard(figures: &Figures) -> Scorecard {
    let mut card = Scorecard::default();
    let five = Duration::from_secs(5);
    card.at_most("start to ready, store there", five, figures.started);
    card.at_most("store's answer to ready", five, figures.ready);
    card.at_most(
        "store's answer to a packet on a lease's way",
        five,
        figures.first_packet,
    );
    card.changes(figures.changes_per_second, &figures.lags);
    card.goal(
        "intervals of 100 ms without a byte in iperf3",
        "0",
        format!("{} of {}", figures.busy.stalls, figures.busy.intervals),
        figures.busy.stalls == 0 && figures.busy.intervals > 0,
    );
    card.note(
        "  throughput while leases change, and before",
        format!("{:.2}, {:.2} Gbit/s", figures.busy.gbit, figures.quiet.gbit),
    );
    card.note(
        "  control plane's processor time meanwhile",
        format!("{:.1} %", figures.control * 100.0),
    );
    card.goal(
        "workers' pauses > 1 ms for a new table",
        "0",
        figures.tables.map_or_else(
            || "not told".to_owned(),
            |(count, slow)| format!("{slow} of {count}"),
        ),
        figures
            .tables
            .is_some_and(|(count, slow)| count > 0.0 && slow == 0.0),
    );
    card.goal(
        "idle processor time, of one core",
        "<= 0.2 %",
        format!("{:.3} %", figures.idle * 100.0),
        figures.idle <= 0.002,
    );
    card.memory(64, figures.peak);
    card.note("  in the end", mib(figures.settled));
    card
}
