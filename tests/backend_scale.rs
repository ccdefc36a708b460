//! Five thousand peers on the real kernel: all of them are programmed, and a look that finds nothing to do changes
//! nothing. Prints how long each takes; asserts only what is true on any machine. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/ns.rs"]
mod ns;

use std::time::{Duration, Instant};

use loden::backend::desired::Desired;
use loden::backend::ends::Ends;
use loden::backend::plan::Plan;
use loden::backend::settle::settle;
use loden::config::NetworkConfig;
use loden::firewall::{SenderCheck, SenderStatus, Senders, Tunnel, TunnelKind};
use loden::iface::{Choice, Stack, Wanted, choose};
use loden::lease::{Lease, LeaseAttrs, LeaseExtension, Subnets};
use loden::netlink::Netlink;
use ns::Ns;

const PEERS: u32 = 5000;

/// Only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(120);

fn lease(n: u32, backend: &str) -> Lease {
    let base = std::net::Ipv4Addr::from(0xc612_0000 + (n + 1) * 4);
    let [_, _, high, low] = n.to_be_bytes();
    let data = match backend {
        "vxlan" => {
            format!(r#","BackendData":{{"VNI":1,"VtepMAC":"02:01:00:00:{high:02x}:{low:02x}"}}"#)
        }
        _ => String::new(),
    };
    let attrs = format!(
        r#"{{"PublicIP":"192.0.{}.{}","PublicIPv6":null,"BackendType":"{backend}"{data}}}"#,
        128 + n / 250,
        1 + n % 250
    );
    Lease {
        subnets: format!("{base}-30").parse().unwrap(),
        attrs: LeaseAttrs::parse(attrs.as_bytes()).unwrap(),
        expires: None,
        extension: LeaseExtension::default(),
    }
}

fn desired(backend: &str, choice: &Choice) -> Desired {
    let text = format!(r#"{{"Network":"198.18.0.0/15","Backend":{{"Type":"{backend}"}}}}"#);
    let config = NetworkConfig::parse(text.as_bytes()).unwrap();
    let own: Subnets = "198.19.1.0-24".parse().unwrap();
    let leases: Vec<Lease> = (0..PEERS).map(|n| lease(n, backend)).collect();
    let plan = Plan::new(&config, Ends::one(choice.clone())).unwrap();
    let (mut desired, refused) = plan.desired(&config, &own, leases.iter());
    assert!(refused.is_empty(), "{:?}", refused[0]);
    desired.complete = true;
    desired
}

/// The source check takes them all.
async fn check_senders(senders: &loden::backend::desired::Senders, devices: &[u32]) -> Duration {
    let programs = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into);
    let tunnel = Tunnel {
        kind: TunnelKind::Vxlan {
            vni: 1,
            port: 8472,
            devices: vec!["flannel.1".to_owned()],
        },
        outer: true,
    };
    let check = SenderCheck::start(programs.to_vec(), tunnel).await.unwrap();
    let begun = Instant::now();
    check.want(Senders {
        outer: senders.outer.clone(),
        inner: senders.inner.clone(),
        devices: devices.to_vec(),
        ..Senders::default()
    });
    // Answered after what was wanted before is done.
    let mut status = check.status().await;
    while let Err(why) = held(&status) {
        assert!(begun.elapsed() < LIMIT, "{why}: {status:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
        status = check.status().await;
    }
    begun.elapsed()
}

/// Whether the kernel's sets hold every peer.
fn held(status: &SenderStatus) -> Result<(), String> {
    for set in ["outer-v4", "inner-v4"] {
        let output = std::process::Command::new("nft")
            .args(["list", "set", "inet", "loden-vxlan-1", set])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let count = match text.split_once("elements = {") {
            Some((_, elements)) => elements.split(',').count(),
            None => 0,
        };
        if u32::try_from(count) != Ok(PEERS) {
            return Err(format!("{set} has {count} of {PEERS}"));
        }
    }
    status.error.clone().map_or(Ok(()), Err)
}

#[test]
fn five_thousand_peers_are_programmed_and_found_in_place() {
    for (backend, per_peer) in [("vxlan", 3), ("host-gw", 1)] {
        let ns = Ns::new();
        ns.ip("addr del 192.0.2.1/24 dev eth0");
        ns.ip("addr add 192.0.2.1/16 dev eth0");
        let found = ns.block_on(|| async {
            let kernel = Netlink::connect().unwrap();
            let snapshot = loden::backend::kernel::Kernel::snapshot(&kernel)
                .await
                .unwrap();
            let wanted = Wanted {
                selectors: vec![loden::iface::Selector::parse("eth0")],
                ..Wanted::default()
            };
            let choice = choose(&snapshot, &wanted, Stack::V4).choice.unwrap();
            let desired = desired(backend, &choice);
            let begun = Instant::now();
            let report = settle(&kernel, &desired).await.unwrap();
            let programmed = begun.elapsed();
            assert_eq!(
                (report.failed, report.refused.len()),
                (0, 0),
                "{:?}",
                report.failures
            );
            let mut checked = Duration::ZERO;
            if let Some(senders) = &report.senders
                && backend == "vxlan"
            {
                checked = check_senders(senders, &report.devices).await;
            }
            let mut looks = Vec::new();
            for _ in 0..5 {
                let begun = Instant::now();
                let report = settle(&kernel, &desired).await.unwrap();
                looks.push(begun.elapsed());
                assert_eq!(report.changed, Vec::<String>::new());
            }
            looks.sort();
            eprintln!(
                "{backend}: {PEERS} peers programmed in {programmed:?} and their senders checked {checked:?} later, an idle \
                 look in {:?}",
                looks[2]
            );
            report.changed.len()
        });
        let routes = ns.json("-4 route show proto 108").len();
        assert_eq!(routes, usize::try_from(PEERS).unwrap());
        assert!(found >= routes * per_peer, "{found}");
    }
}
