//! What VXLAN costs the packet path: TCP from pod to pod over the bare encapsulation and over VXLAN, in one run,
//! taken in turns, on both kinds of wire. The data planes run in this process. The ratio is taken within a
//! repetition; its median is the result.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, and one that cannot prepare itself must fail"
)]

#[path = "../tests/net/mod.rs"]
mod net;

use loden::bench::iperf;
use loden::bench::system::Path;
use loden::datapath::EngineKind;
use loden::lab::{Lab, Member, Wire};
use net::{Node, Shape, adds_up, ip, lab, pair};

fn pods(wire: Wire, shape: &Shape) -> (Lab, [Node; 2]) {
    let lab = lab(2, 1, wire);
    for n in [1, 2] {
        let pod = lab.netns(Member::Pod(n, 1));
        ip(&pod, &format!("link set eth0 mtu {}", shape.mtu));
    }
    let (a, b) = pair(&lab, shape);
    (lab, [a, b])
}

fn gigabits(lab: &Lab, seconds: u32) -> f64 {
    let result = iperf::run(lab, &Path::of_pods(lab, 1, 2).unwrap(), 1, false, seconds).unwrap();
    result.bits_per_second / 1e9
}

fn main() {
    // Only `cargo bench` alone measures. What it measures needs root, and is shown to work by tests/net_vxlan.rs.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let (reps, seconds) = (7, 2);
    let workers = std::thread::available_parallelism().unwrap().get();
    for wire in [Wire::Superpacket, Wire::Packet] {
        let shapes = [
            Shape::of(EngineKind::Mmsg),
            Shape::vxlan(EngineKind::Mmsg, false),
        ]
        .map(|shape| Shape { workers, ..shape });
        let [(bare, bare_nodes), (vxlan, vxlan_nodes)] = shapes.map(|shape| pods(wire, &shape));
        let mut ratios = Vec::new();
        for rep in 0..reps {
            // Whoever runs right after another's load must not always be the same.
            let (bare, vxlan) = if rep % 2 == 0 {
                let bare = gigabits(&bare, seconds);
                (bare, gigabits(&vxlan, seconds))
            } else {
                let vxlan = gigabits(&vxlan, seconds);
                (gigabits(&bare, seconds), vxlan)
            };
            println!("{wire:?}: bare {bare:.2} Gb/s, VXLAN {vxlan:.2} Gb/s");
            ratios.push(vxlan / bare);
        }
        for node in bare_nodes.iter().chain(&vxlan_nodes) {
            adds_up(&node.status());
        }
        ratios.sort_by(f64::total_cmp);
        println!(
            "{wire:?}: VXLAN / bare {:.2} ({:.2} to {:.2})",
            ratios[ratios.len() / 2],
            ratios[0],
            ratios[ratios.len() - 1]
        );
    }
}
