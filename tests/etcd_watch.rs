//! The watch of the store in etcd, through everything that can happen to a real etcd.

#[path = "common/etcd.rs"]
mod common;

use std::fmt::Write as _;
use std::time::Duration;

use common::{Etcd, Follower, PREFIX, Patient, request, soon, subnets, vxlan_value};
use loden::store::{AcquireRequest, Cause, LeaseStore as _, LostTo, StoreEvent};
use nix::sys::signal::Signal;

const CONFIG: &str = r#"{"Network":"198.18.0.0/16"}"#;

/// Lets time pass for a server that is away: not to wait for something, but so that it is away for so long.
async fn away_for(time: Duration) {
    tokio::time::sleep(time).await;
}

/// How many of the problems say that the store is away.
fn outages(follower: &Follower) -> usize {
    let away = |p: &&loden::store::Problem| matches!(p.cause, Cause::Away(_));
    follower.problems.iter().filter(away).count()
}

#[test]
fn changes_are_followed_and_neighbours_of_the_prefix_are_not() {
    let etcd = Etcd::start();
    etcd.put("subnets/198.18.1.0-24", &vxlan_value(1));
    etcd.put("subnetsX/198.18.9.0-24", &vxlan_value(9));
    etcd.run(async || {
        let mut follower = Follower::new(etcd.store().watch());
        follower.until("the snapshot", |f| f.snapshots == 1).await;
        assert_eq!(follower.keys(), ["198.18.1.0-24"]);
        etcd.put("subnetsX/198.18.8.0-24", &vxlan_value(8));
        etcd.put("subnets", &vxlan_value(8));
        etcd.put("subnets/198.18.1.0-24", &vxlan_value(7));
        etcd.put("subnets/198.18.2.0-24&fd00:0:0:2::-64", &vxlan_value(2));
        follower
            .until("the second lease", |f| f.leases.len() == 2)
            .await;
        let moved = &follower.leases[&subnets("198.18.1.0-24")];
        assert_eq!(moved.attrs.node().unwrap().to_string(), "198.51.100.7");
        etcd.delete("subnets/198.18.1.0-24", false);
        follower.until("the removal", |f| f.leases.len() == 1).await;
        assert_eq!(follower.keys(), ["198.18.2.0-24&fd00:0:0:2::-64"]);
        assert_eq!((follower.snapshots, follower.problems.len()), (1, 0));
    });
}

#[test]
fn a_bad_key_or_value_withdraws_nobody_and_is_named_once_per_change() {
    let etcd = Etcd::start();
    etcd.put("subnets/198.18.1.0-24", &vxlan_value(1));
    etcd.put("subnets/README", "hello");
    etcd.put("subnets/198.18.2.0-24", "{");
    etcd.run(async || {
        let mut follower = Follower::new(etcd.store().watch());
        follower.until("the snapshot", |f| f.snapshots == 1).await;
        assert_eq!(follower.keys(), ["198.18.1.0-24"]);
        let named = |f: &Follower| -> Vec<String> {
            let subject =
                |p: &loden::store::Problem| p.subject.strip_prefix(PREFIX).unwrap().to_owned();
            f.problems.iter().map(subject).collect()
        };
        let at_start = ["/subnets/198.18.2.0-24", "/subnets/README"];
        assert_eq!(named(&follower), at_start);

        // Later: a good lease goes bad, a bad one good, and a bad key comes.
        etcd.put("subnets/198.18.1.0-24", r#"{"PublicIP":7}"#);
        etcd.put("subnets/198.18.2.0-24", &vxlan_value(2));
        etcd.put("subnets/198.18.3.7-24", &vxlan_value(3));
        etcd.put("subnets/README", "hello again");
        etcd.put("subnets/198.18.4.0-24", &vxlan_value(4));
        follower
            .until("the last lease", |f| f.has("198.18.4.0-24"))
            .await;
        assert_eq!(
            follower.keys(),
            ["198.18.1.0-24", "198.18.2.0-24", "198.18.4.0-24"]
        );
        let later = [
            "/subnets/198.18.1.0-24",
            "/subnets/198.18.2.0-24",
            "/subnets/198.18.3.7-24",
        ];
        assert_eq!(named(&follower)[2..], later);
        assert_eq!(follower.problems[3].cause, Cause::Solved);
        assert_eq!(follower.snapshots, 1);

        // What is bad is no way out for a node that is gone.
        etcd.delete("subnets/198.18.1.0-24", false);
        follower
            .until("the removal", |f| !f.has("198.18.1.0-24"))
            .await;
        etcd.delete("subnets/README", false);
        let solved = |f: &Follower| {
            let solved = f.problems.iter().filter(|p| p.cause == Cause::Solved);
            solved.map(|p| p.subject.clone()).collect::<Vec<_>>()
        };
        follower
            .until("all is told", |f| solved(f).len() >= 3)
            .await;
        let keys = ["198.18.2.0-24", "198.18.1.0-24", "README"];
        assert_eq!(
            solved(&follower),
            keys.map(|key| format!("{PREFIX}/subnets/{key}"))
        );
    });
}

#[test]
fn a_watcher_that_missed_a_compaction_learns_everything_and_withdraws_only_what_is_gone() {
    let mut etcd = Etcd::start();
    for n in 1..=3 {
        etcd.put(&format!("subnets/198.18.{n}.0-24"), &vxlan_value(n));
    }
    let netns = etcd.netns().clone();
    let store = etcd.store();
    common::run_in(&netns, async || {
        let mut follower = Follower::new(store.watch());
        follower
            .until("the snapshot", |f| f.leases.len() == 3)
            .await;
        // A server on another port lets the changes happen unseen by the watcher.
        etcd.kill(0);
        follower.until("the outage", |f| outages(f) == 1).await;
        etcd.spawn_hidden(0);
        etcd.delete("subnets/198.18.1.0-24", false);
        etcd.put("subnets/198.18.2.0-24", &vxlan_value(9));
        let last = etcd.put("subnets/198.18.4.0-24", &vxlan_value(4));
        etcd.ctl(&["compact", &last.to_string(), "--physical"]);
        etcd.kill(0);
        etcd.spawn(0);
        follower
            .until("the new lease", |f| f.has("198.18.4.0-24"))
            .await;
        assert_eq!(follower.snapshots, 2);
        assert_eq!(follower.withdrawn, [subnets("198.18.1.0-24")]);
        let changed = &follower.leases[&subnets("198.18.2.0-24")];
        assert_eq!(changed.attrs.node().unwrap().to_string(), "198.51.100.9");
    });
}

#[test]
fn after_an_outage_the_watch_goes_on_where_it_was_and_the_outage_is_over() {
    let mut etcd = Etcd::start();
    etcd.put("subnets/198.18.1.0-24", &vxlan_value(1));
    let netns = etcd.netns().clone();
    let store = etcd.store();
    common::run_in(&netns, async || {
        let mut follower = Follower::new(store.watch());
        follower.until("the snapshot", |f| f.snapshots == 1).await;
        for round in 2..=3 {
            etcd.kill(0);
            away_for(Duration::from_secs(2)).await;
            etcd.spawn(0);
            etcd.await_health();
            etcd.put(&format!("subnets/198.18.{round}.0-24"), &vxlan_value(round));
            let key = format!("198.18.{round}.0-24");
            let news = follower.until("the first change after it", |f| f.has(&key));
            soon("the first change after it", news).await;
        }
        assert_eq!(follower.snapshots, 1, "nothing is listed again");
        assert_eq!(follower.withdrawn, []);
        assert_eq!(outages(&follower), 1, "said once a minute at most");
        let subject = follower.problems[0].subject.clone();
        let over = loden::store::Problem {
            subject,
            cause: Cause::Solved,
        };
        assert_eq!(follower.problems[1..], [over]);
    });
}

#[test]
fn a_frozen_server_is_noticed_and_its_return_too() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.put("subnets/198.18.1.0-24", &vxlan_value(1));
    etcd.run(async || {
        let store = etcd.store();
        let mut follower = Follower::new(store.watch());
        follower.until("the snapshot", |f| f.snapshots == 1).await;
        etcd.signal(0, Signal::SIGSTOP);
        let error = soon("an error", store.0.network_config()).await;
        let error = error.unwrap_err();
        assert!(error.to_string().contains("no answer within 3s"), "{error}");
        follower.until("the outage", |f| outages(f) == 1).await;
        assert_eq!(follower.keys(), ["198.18.1.0-24"]);
        etcd.signal(0, Signal::SIGCONT);
        etcd.put("subnets/198.18.2.0-24", &vxlan_value(2));
        let news = follower.until("the first change after it", |f| f.has("198.18.2.0-24"));
        soon("the first change after it", news).await;
        assert_eq!((follower.snapshots, follower.withdrawn.len()), (1, 0));
    });
}

#[test]
fn a_frozen_member_is_left_for_another() {
    let etcd = Etcd::cluster(3, "http", &[]);
    etcd.configure(CONFIG);
    etcd.put("subnets/198.18.1.0-24", &vxlan_value(1));
    let leader = etcd.leader();
    let (frozen, alive) = ((leader + 1) % 3, (leader + 2) % 3);
    etcd.run(async || {
        // Only the one to be frozen, and another to go to.
        let mut settings = etcd.settings();
        settings.endpoints = [frozen, alive]
            .map(|n| format!("http://192.0.2.{}:2379", n + 1))
            .join(",");
        let store = Patient::new(settings);
        let mut follower = Follower::new(store.watch());
        follower.until("the snapshot", |f| f.snapshots == 1).await;
        etcd.signal(frozen, Signal::SIGSTOP);
        etcd.put("subnets/198.18.2.0-24", &vxlan_value(2));
        follower
            .until("the change", |f| f.has("198.18.2.0-24"))
            .await;
        store.network_config().await.unwrap();
        etcd.signal(frozen, Signal::SIGCONT);
        assert_eq!((follower.snapshots, outages(&follower)), (1, 0));
    });
}

#[test]
fn a_cluster_that_loses_its_majority_and_gets_it_back_takes_nobody_away() {
    let mut etcd = Etcd::cluster(3, "http", &[]);
    etcd.configure(CONFIG);
    etcd.put("subnets/198.18.1.0-24", &vxlan_value(1));
    let leader = etcd.leader();
    let netns = etcd.netns().clone();
    let store = etcd.store();
    common::run_in(&netns, async || {
        let mut follower = Follower::new(store.watch());
        follower.until("the snapshot", |f| f.snapshots == 1).await;
        // First the leader alone: the others elect another.
        etcd.kill(leader);
        etcd.await_health();
        etcd.put("subnets/198.18.2.0-24", &vxlan_value(2));
        follower.until("a change", |f| f.has("198.18.2.0-24")).await;
        // Then one more: whoever is left can do nothing.
        let second = (leader + 1) % 3;
        etcd.kill(second);
        follower.until("the outage", |f| outages(f) > 0).await;
        let error = store.0.acquire(request(9)).await.unwrap_err().to_string();
        assert!(
            error.contains("has no leader") || error.contains("no answer"),
            "{error}"
        );
        assert!(error.contains("connection refused"), "{error}");
        etcd.spawn(second);
        etcd.spawn(leader);
        etcd.await_health();
        etcd.put("subnets/198.18.3.0-24", &vxlan_value(3));
        follower
            .until("the first change after it", |f| f.has("198.18.3.0-24"))
            .await;
        assert_eq!((follower.snapshots, follower.withdrawn.len()), (1, 0));
    });
}

#[test]
fn when_all_leases_are_deleted_every_node_learns_it_and_registers_again() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.run(async || {
        let store = etcd.store();
        let lease = store.acquire(request(1)).await.unwrap();
        etcd.put("subnets/198.18.200.0-24", &vxlan_value(2));
        let mut follower = Follower::new(store.watch());
        follower.until("both leases", |f| f.leases.len() == 2).await;
        etcd.delete("subnets/", true);
        follower.until("the loss", |f| !f.lost.is_empty()).await;
        assert!(follower.leases.is_empty(), "an operator's word counts");
        let again = AcquireRequest {
            previous: Some(lease.subnets),
            ..request(1)
        };
        assert_eq!(store.acquire(again).await.unwrap().subnets, lease.subnets);
        follower.until("our lease", |f| f.leases.len() == 1).await;
    });
}

#[test]
fn a_store_that_comes_back_empty_withdraws_nobody_until_the_nodes_are_back() {
    let mut etcd = Etcd::start();
    etcd.configure(CONFIG);
    let netns = etcd.netns().clone();
    let store = etcd.store();
    common::run_in(&netns, async || {
        let lease = store.acquire(request(1)).await.unwrap();
        etcd.put("subnets/198.18.200.0-24", &vxlan_value(2));
        etcd.put("subnets/198.18.201.0-24", &vxlan_value(3));
        let mut follower = Follower::new(store.watch());
        follower.until("all leases", |f| f.leases.len() == 3).await;
        etcd.kill(0);
        etcd.wipe(0);
        etcd.spawn(0);
        follower.until("the loss", |f| !f.lost.is_empty()).await;
        let to = LostTo::Nobody;
        assert_eq!(
            follower.lost,
            [StoreEvent::OwnLost {
                subnets: lease.subnets,
                to
            }]
        );
        assert_eq!(follower.leases.len(), 3, "packets go on");
        let told = follower
            .problems
            .iter()
            .any(|p| matches!(p.cause, Cause::DataLoss { missing: 3, .. }));
        assert!(told, "{:?}", follower.problems);

        // It is restored, node by node; one has another subnet now.
        etcd.configure(CONFIG);
        let again = AcquireRequest {
            previous: Some(lease.subnets),
            ..request(1)
        };
        assert_eq!(store.acquire(again).await.unwrap().subnets, lease.subnets);
        etcd.put("subnets/198.18.200.0-24", &vxlan_value(2));
        etcd.put("subnets/198.18.202.0-24", &vxlan_value(3));
        follower
            .until("the new subnet", |f| f.has("198.18.202.0-24"))
            .await;
        assert_eq!(follower.withdrawn, [subnets("198.18.201.0-24")]);
        assert_eq!(follower.leases.len(), 3);
        // From here on it is a store like any other.
        etcd.delete("subnets/198.18.200.0-24", false);
        follower
            .until("a removal", |f| !f.has("198.18.200.0-24"))
            .await;
    });
}

#[test]
fn a_watch_that_starts_without_a_store_says_so_and_begins_when_it_comes() {
    let mut etcd = Etcd::start();
    etcd.put("subnets/198.18.1.0-24", &vxlan_value(1));
    etcd.kill(0);
    let netns = etcd.netns().clone();
    let store = etcd.store();
    common::run_in(&netns, async || {
        let mut follower = Follower::new(store.watch());
        follower.until("the outage", |f| outages(f) == 1).await;
        assert_eq!(
            follower.snapshots, 0,
            "an empty snapshot would withdraw everybody"
        );
        let said = follower.problems[0].to_string();
        let expected = "http://192.0.2.1:2379: the store cannot be read, known leases are kept: \
            http://192.0.2.1:2379: connection refused: is etcd running there?";
        assert_eq!(said, expected);
        etcd.spawn(0);
        follower
            .until("the snapshot", |f| f.leases.len() == 1)
            .await;
    });
}

#[test]
fn five_thousand_leases_are_listed_and_followed() {
    let etcd = Etcd::start();
    etcd.configure(r#"{"Network":"198.18.0.0/15","SubnetLen":28}"#);
    let key = |n: u32| format!("198.{}.{}.{}-28", 18 + n / 4096, n / 16 % 256, n % 16 * 16);
    // As etcdctl takes transactions: no condition, puts, nothing otherwise.
    for chunk in 0..50 {
        let mut txn = "\n".to_owned();
        for n in chunk * 100..(chunk + 1) * 100 {
            let value = format!(
                r#"{{"PublicIP":"203.{}.{}.{}","PublicIPv6":null,"BackendType":"udp"}}"#,
                n / 65536,
                n / 256 % 256,
                n % 256
            );
            writeln!(txn, "put {PREFIX}/subnets/{} {:?}", key(n), value).unwrap();
        }
        txn.push_str("\n\n");
        etcd.txn(&txn);
    }
    etcd.run(async || {
        let store = etcd.store();
        let mut follower = Follower::new(store.watch());
        follower.until("the snapshot", |f| f.snapshots == 1).await;
        assert_eq!(follower.leases.len(), 5000);
        assert!(follower.leases.contains_key(&subnets(&key(4999))));
        assert_eq!(follower.problems, []);
        let lease = store.acquire(request(1)).await.unwrap();
        assert!(!follower.leases.contains_key(&lease.subnets));
        follower
            .until("our lease", |f| f.leases.contains_key(&lease.subnets))
            .await;
        // A receiver that was busy all the time learns how it ended.
        etcd.delete("subnets/", true);
        etcd.put("subnets/198.18.1.0-28", &vxlan_value(2));
        follower
            .until("the end", |f| f.keys() == ["198.18.1.0-28"])
            .await;
    });
}
