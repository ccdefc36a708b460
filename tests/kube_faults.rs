//! The store in Kubernetes when the API server, or what lies before it, misbehaves: after each fault it knows what a
//! fresh listing says, and has not asked for more listings than it needed. A real API server behind a proxy. Needs
//! root, and what `scripts/setup --kube` builds: run by `scripts/test kube`.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/kube.rs"]
mod kube_server;
#[path = "common/kube_proxy.rs"]
mod proxy;

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use etcd::{Etcd, Follower, request, soon};
use kube_server::{ApiServer, PREFIX};
use loden::store::kube::KubeSettings;
use loden::store::{Cause, KubeStore, LeaseStore as _};
use proxy::{Fault, Kind, PROXY, Proxy, Stream};
use serde_json::{Value, json};

/// A server with our Node and three others, and the proxy before it.
struct Scene {
    proxy: Proxy,
    server: ApiServer,
    etcd: Etcd,
}

impl Scene {
    fn new() -> Self {
        let etcd = Etcd::start();
        let server = ApiServer::start(&etcd);
        server.add_node("n1", "198.18.1.0/24", &json!({}));
        for peer in 2..=4 {
            server.add_peer(
                &format!("n{peer}"),
                &format!("198.18.{peer}.0/24"),
                &format!("198.51.100.{peer}"),
            );
        }
        let proxy = Proxy::start(etcd.netns(), &server.kubeconfig("daemon"));
        Self {
            proxy,
            server,
            etcd,
        }
    }

    /// Those of the daemon on the first node, through the proxy.
    fn settings(&self) -> KubeSettings {
        KubeSettings {
            api_url: Some(PROXY.to_owned()),
            ..self.server.settings("n1")
        }
    }

    async fn store(&self) -> KubeStore {
        KubeStore::new(self.settings()).await.unwrap()
    }

    /// A store that has its lease, and what its watch says, when it has listed all nodes.
    async fn follow(&self, settings: KubeSettings) -> (KubeStore, Follower) {
        let store = KubeStore::new(settings).await.unwrap();
        soon("a lease", store.acquire(request(1))).await.unwrap();
        let mut follower = Follower::new(store.watch());
        self.converge(&mut follower).await;
        (store, follower)
    }

    /// Subnet and address of every node that takes part, as kubectl lists them now.
    fn fresh(&self) -> BTreeMap<String, String> {
        let listing = self.server.kubectl(&["get", "nodes", "-o", "json"]);
        let listing: Value = serde_json::from_str(&listing).unwrap();
        let nodes = listing["items"].as_array().unwrap().iter();
        let members = nodes.filter_map(|node| {
            let texts = &node["metadata"]["annotations"];
            let text = |suffix: &str| texts[format!("{PREFIX}/{suffix}")].as_str();
            let taking_part = text("kube-subnet-manager") == Some("true");
            let subnet = node["spec"]["podCIDR"].as_str()?;
            let addr = text("public-ip")?;
            taking_part.then(|| (subnet.replace('/', "-"), addr.to_owned()))
        });
        members.collect()
    }

    /// Waits until the follower knows what a fresh listing says.
    async fn converge(&self, follower: &mut Follower) {
        let fresh = self.fresh();
        follower
            .until("what a fresh listing says", |f| heard(f) == fresh)
            .await;
        assert!(follower.lost.is_empty(), "{:?}", follower.lost);
    }

    /// Something of everything: one moves, one goes, one comes.
    fn change(&self, turn: u8) {
        let addr = format!("public-ip=198.51.100.{}", 100 + turn);
        self.server.annotate("n2", &addr);
        let (old, new) = (format!("n{}", 2 + turn), format!("n{}", 4 + turn));
        self.server.kubectl(&["delete", "node", &old]);
        let subnet = format!("198.18.{}.0/24", 4 + turn);
        self.server.add_peer(&new, &subnet, "198.51.100.9");
    }

    /// Waits until more than `before` requests of this kind have come.
    async fn asked_again(&self, kind: Kind, before: usize) {
        soon("another request", async {
            while self.proxy.count(kind) <= before {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

fn heard(follower: &Follower) -> BTreeMap<String, String> {
    let one = |lease: &loden::lease::Lease| {
        let addr = lease.attrs.public_ip.unwrap();
        (lease.subnets.to_string(), addr.to_string())
    };
    follower.leases.values().map(one).collect()
}

fn told(follower: &Follower, text: &str) -> bool {
    let problems = follower.problems.iter();
    problems.into_iter().any(|p| p.to_string().contains(text))
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn a_watch_that_breaks_goes_on_where_it_was_without_another_listing() {
    let scene = Scene::new();
    scene.etcd.run(async || {
        let (_store, mut follower) = scene.follow(scene.settings()).await;
        for (turn, fault) in (1..).zip([Stream::Reset, Stream::Torn, Stream::Reset]) {
            let watches = scene.proxy.count(Kind::Watch);
            scene.proxy.streams(fault);
            scene.change(turn);
            scene.asked_again(Kind::Watch, watches).await;
            scene.proxy.streams(Stream::Flowing);
            scene.converge(&mut follower).await;
        }
        // Slow is not broken.
        let watches = scene.proxy.count(Kind::Watch);
        follower.problems.clear();
        scene
            .proxy
            .streams(Stream::Slow(Duration::from_millis(300)));
        scene.change(4);
        scene.converge(&mut follower).await;
        assert_eq!(scene.proxy.count(Kind::Watch), watches);
        assert!(
            !told(&follower, "cannot be read"),
            "{:?}",
            follower.problems
        );
        assert_eq!(scene.proxy.count(Kind::List), 1);
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn a_place_that_the_server_forgot_is_listed_anew_at_a_falling_rate() {
    let scene = Scene::new();
    scene.etcd.run(async || {
        let (_store, mut follower) = scene.follow(scene.settings()).await;
        // In the middle of a watch, again and again.
        scene.proxy.streams(Stream::Gone);
        scene.change(1);
        scene.asked_again(Kind::List, 4).await;
        scene.proxy.streams(Stream::Flowing);
        scene.converge(&mut follower).await;
        // Each pause is twice the one before, and chance takes half of it at most.
        let lists = scene.proxy.times(Kind::List);
        let pauses: Vec<u128> = lists
            .windows(2)
            .map(|two| two[1].duration_since(two[0]).as_millis())
            .collect();
        for (pause, least) in pauses.iter().skip(1).zip([250, 500, 1000]) {
            assert!(*pause >= least, "{pauses:?}");
        }

        // At the beginning of a watch, which is another answer for the same.
        let (lists, watches) = (
            scene.proxy.count(Kind::List),
            scene.proxy.count(Kind::Watch),
        );
        scene
            .proxy
            .fail(Kind::Watch, 1, Fault::Refused(410, "Gone", None));
        scene.proxy.streams(Stream::Reset);
        scene.asked_again(Kind::Watch, watches).await;
        scene.proxy.streams(Stream::Flowing);
        scene.change(2);
        scene.converge(&mut follower).await;
        assert_eq!(scene.proxy.count(Kind::List), lists + 1);
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn what_is_never_answered_is_asked_again() {
    let scene = Scene::new();
    scene.etcd.run(async || {
        let settings = KubeSettings {
            watch: Duration::from_secs(2),
            ..scene.settings()
        };
        // The first listing, then the first watch.
        scene.proxy.fail(Kind::List, 1, Fault::Frozen);
        scene.proxy.fail(Kind::Watch, 1, Fault::Frozen);
        let (_store, mut follower) = scene.follow(settings).await;
        assert_eq!(scene.proxy.count(Kind::List), 2);
        let watches = scene.proxy.count(Kind::Watch);
        scene.change(1);
        scene.asked_again(Kind::Watch, watches).await;
        scene.converge(&mut follower).await;
        // A watch that is open.
        let watches = scene.proxy.count(Kind::Watch);
        scene.proxy.streams(Stream::Frozen);
        scene.change(2);
        scene.asked_again(Kind::Watch, watches).await;
        scene.proxy.streams(Stream::Flowing);
        scene.converge(&mut follower).await;
        assert_eq!(scene.proxy.count(Kind::List), 2);
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn a_server_that_asks_us_to_come_back_later_is_left_alone_until_then() {
    let scene = Scene::new();
    let busy = || Fault::Refused(429, "TooManyRequests", Some(3));
    let waited = |kind: Kind| {
        let times = scene.proxy.times(kind);
        let [.., refused, next] = times[..] else {
            unreachable!("{kind:?} was not asked again");
        };
        next.duration_since(refused)
    };
    let three = Duration::from_secs(3);
    scene.etcd.run(async || {
        let store = scene.store().await;
        scene.proxy.fail(Kind::Patch, 1, busy());
        let error = store.acquire(request(1)).await.unwrap_err().to_string();
        assert!(error.contains("come back later (429"), "{error}");
        soon("a lease", store.acquire(request(1))).await.unwrap();
        assert!(waited(Kind::Patch) >= three, "{:?}", waited(Kind::Patch));

        scene.proxy.fail(Kind::List, 1, busy());
        let mut follower = Follower::new(store.watch());
        scene.converge(&mut follower).await;
        assert!(waited(Kind::List) >= three, "{:?}", waited(Kind::List));

        let watches = scene.proxy.count(Kind::Watch);
        scene.proxy.fail(Kind::Watch, 1, busy());
        scene.proxy.streams(Stream::Reset);
        scene.asked_again(Kind::Watch, watches).await;
        scene.proxy.streams(Stream::Flowing);
        scene.change(1);
        follower
            .until("the reason", |f| told(f, "come back later (429"))
            .await;
        scene.converge(&mut follower).await;
        assert!(waited(Kind::Watch) >= three, "{:?}", waited(Kind::Watch));
        assert_eq!(scene.proxy.count(Kind::List), 2);
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn an_expired_token_is_named_and_the_next_one_in_its_file_is_used() {
    let scene = Scene::new();
    let token = || {
        let account = ["create", "token", "flannel", "-n", "kube-flannel"];
        scene.server.kubectl(&account).trim().to_owned()
    };
    let file = scene.server.dir().join("token");
    let old = token();
    fs::write(&file, &old).unwrap();
    let config = fs::read_to_string(scene.server.kubeconfig("daemon")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["users"][0]["user"] = json!({"tokenFile": file});
    let path = scene.server.kubeconfig("rotating");
    fs::write(&path, config.to_string()).unwrap();
    scene.etcd.run(async || {
        let settings = KubeSettings {
            kubeconfig: Some(path),
            ..scene.settings()
        };
        let (store, mut follower) = scene.follow(settings).await;
        let many = usize::MAX;
        for kind in [Kind::List, Kind::Watch, Kind::Get, Kind::Patch, Kind::Event] {
            let refused = Fault::Refused(401, "Unauthorized", None);
            scene.proxy.fail_token(&old, kind, many, refused);
        }
        scene.proxy.streams(Stream::Reset);
        follower
            .until("the reason", |f| told(f, "check that the service account"))
            .await;
        assert!(told(&follower, "401"), "{:?}", follower.problems);
        scene.proxy.streams(Stream::Flowing);
        // What a kubelet does long before that.
        fs::write(&file, token()).unwrap();
        scene.change(1);
        // The file is read once a minute.
        let fresh = scene.fresh();
        follower
            .until_within("the change", Duration::from_secs(90), |f| heard(f) == fresh)
            .await;
        assert_eq!(scene.proxy.count(Kind::List), 1);
        soon("a lease", store.acquire(request(1))).await.unwrap();
        // It took longer than a server that has just started would take.
        let (reason, message) = ("FlannelNeedsPermission", "check that the service account");
        soon("the event", async {
            let events = || scene.server.events("n1");
            while !events()
                .iter()
                .any(|(of, said)| of == reason && said.contains(message))
            {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        })
        .await;
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn who_writes_against_us_is_written_over_and_not_in_a_storm() {
    let scene = Scene::new();
    scene.etcd.run(async || {
        let store = scene.store().await;
        let conflict = Fault::Refused(409, "Conflict", None);
        scene.proxy.fail(Kind::Patch, 1, conflict.clone());
        let error = store.acquire(request(1)).await.unwrap_err().to_string();
        assert!(error.contains("Conflict, says the proxy (409)"), "{error}");
        soon("a lease", store.acquire(request(1))).await.unwrap();
        let mut follower = Follower::new(store.watch());
        scene.converge(&mut follower).await;

        let before = scene.proxy.count(Kind::Patch);
        for turn in 0..30 {
            let theirs = format!("public-ip=203.0.113.{}", 1 + turn);
            scene.server.annotate("n1", &theirs);
            follower.drain();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // One of ours is refused, too.
        scene.proxy.fail(Kind::Patch, 1, conflict);
        scene.server.annotate("n1", "public-ip=203.0.113.99");
        follower
            .until("the refusal", |f| {
                let refused = |c: &Cause| matches!(c, Cause::Unwritable(_));
                f.problems.iter().any(|p| refused(&p.cause))
            })
            .await;
        follower
            .until("ours", |f| heard(f)["198.18.1.0-24"] == "198.51.100.1")
            .await;
        scene.converge(&mut follower).await;
        let ours = scene.proxy.times(Kind::Patch);
        for two in ours[before..].windows(2) {
            let pause = two[1].duration_since(two[0]);
            assert!(pause >= Duration::from_secs(2), "{pause:?}");
        }
    });
}

#[ignore = "needs what scripts/setup --kube builds"]
#[test]
fn what_a_server_that_lags_behind_says_costs_nobody_a_lease_for_long() {
    let scene = Scene::new();
    scene.server.kubectl(&["delete", "node", "n1"]);
    let old = scene.server.kubectl(&["get", "--raw", "/api/v1/nodes"]);
    scene.server.add_node("n1", "198.18.1.0/24", &json!({}));
    let bare = ["get", "--raw", "/api/v1/nodes/n1"];
    let bare = scene.server.kubectl(&bare);
    scene.etcd.run(async || {
        let (store, mut follower) = scene.follow(scene.settings()).await;
        scene.change(1);
        scene.converge(&mut follower).await;
        // Its listing lacks our own Node, and has one that is gone.
        scene.proxy.fail(Kind::List, 1, Fault::Stale(old));
        let lists = scene.proxy.count(Kind::List);
        scene.proxy.streams(Stream::Gone);
        scene.asked_again(Kind::List, lists).await;
        scene.proxy.streams(Stream::Flowing);
        follower
            .until("the old state", |f| f.has("198.18.3.0-24"))
            .await;
        scene.converge(&mut follower).await;
        // Our own Node before we wrote anything.
        let fault = Fault::Stale(bare);
        scene.proxy.fail(Kind::Get, 1, fault);
        let lease = soon("a lease", store.acquire(request(1))).await.unwrap();
        assert_eq!(lease.subnets.to_string(), "198.18.1.0-24");
        scene.converge(&mut follower).await;
        assert!(follower.lost.is_empty(), "{:?}", follower.lost);
    });
}
