//! A data plane with nothing to do costs nothing, also after its device was deleted under it. A test binary of
//! its own with one test, because it looks at all workers of the process. Needs root.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

mod net;

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use loden::datapath::{EngineKind, Event};
use loden::lab::{Wire, wait};
use net::{Shape, ip, lab, pair, pings, tun_v4, wait_for};

/// Processor time that this process's workers have used (`/proc/PID/task/TID/schedstat`, first field).
fn workers_time() -> Duration {
    let mut total = Duration::ZERO;
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        if read("comm").starts_with("loden-") {
            let nanos = read("schedstat")
                .split(' ')
                .next()
                .unwrap()
                .parse()
                .unwrap();
            total += Duration::from_nanos(nanos);
        }
    }
    total
}

/// Waits for half a second in which all workers together stay below two per cent of one processor: workers that spin
/// have none. Of the first, what came before may still take some.
fn costs_nothing(when: &str) {
    const WHILE: Duration = Duration::from_millis(500);
    wait_for(when, || {
        let before = workers_time();
        wait::pause(WHILE);
        workers_time() - before < WHILE / 50
    });
}

#[test]
fn idle_workers_cost_nothing_even_after_the_device_was_deleted() {
    for (engine, workers) in [(EngineKind::Mmsg, 2), (EngineKind::Portable, 1)] {
        let lab = lab(2, 0, Wire::Superpacket);
        let shape = Shape {
            workers,
            ..Shape::of(engine)
        };
        let (a, b) = pair(&lab, &shape);
        assert!(pings(&a.netns, tun_v4(2)));
        costs_nothing("idle workers to cost nothing");

        ip(&b.netns, &format!("link del {}", b.device()));
        b.wait_event("the report", |event| {
            matches!(event, Event::DeviceGone { .. })
        });
        // The other direction lives on, and counts what it cannot deliver.
        let socket = a.udp();
        let to = SocketAddr::new(tun_v4(2).into(), 9);
        let before = b.status().total.decap.drops["device_down"];
        for _ in 0..20 {
            socket.send_to(b"x", to).unwrap();
        }
        b.wait_status("the drops", |status| {
            status.total.decap.drops["device_down"] == before + 20
        });
        costs_nothing("nothing to be spent on a deleted device");
        let gone = b
            .events()
            .into_iter()
            .filter(|event| matches!(event, Event::DeviceGone { .. }))
            .count();
        assert_eq!(gone, 1, "{:?}", b.events());
    }
}
