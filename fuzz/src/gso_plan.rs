//! Any burst of datagrams: planned as the slow planner does, and cut by the kernel into the same again.

use loden::offload::gso::{Planner, RunKey, RunLimits};

use self::slow_plan::{cut_by_the_kernel, plan_slowly};

#[path = "../../tests/offload_support/slow_plan.rs"]
mod slow_plan;

/// More would make the quadratic oracle the bottleneck.
const MAX_SEGMENTS: usize = 300;

/// Input: two bytes of limits, then two bytes per datagram: source, next hop and TOS; size.
pub fn run(data: &[u8]) {
    let [max_segments, max_bytes, rest @ ..] = data else {
        return;
    };
    let limits = RunLimits {
        gso: max_bytes & 1 == 0,
        max_segments: u16::from(*max_segments),
        max_bytes: u32::from(*max_bytes) * 64,
    };
    let (pairs, _) = rest.as_chunks::<2>();
    let segments: Vec<(RunKey, u32)> = pairs
        .iter()
        .take(MAX_SEGMENTS)
        .map(|&[key, size]| {
            let (source, next_hop) = (u16::from(key & 3), u32::from((key >> 2) & 7));
            (
                RunKey {
                    source,
                    next_hop,
                    tos: key >> 6,
                },
                u32::from(size),
            )
        })
        .collect();

    let mut planner = Planner::new(300, 4);
    for &(key, len) in &segments {
        assert!(
            planner.push(key, len, &limits).is_ok(),
            "capacity was chosen to fit"
        );
    }
    let runs: Vec<Vec<u16>> = planner
        .runs()
        .iter()
        .map(|run| planner.segments(run).collect())
        .collect();
    for (run, indices) in planner.runs().iter().zip(&runs) {
        let sizes: Vec<u32> = indices
            .iter()
            .map(|&i| segments[usize::from(i)].1)
            .collect();
        assert_eq!(
            (sizes.len(), sizes.iter().sum()),
            (run.count(), run.bytes())
        );
        if sizes.len() > 1 {
            assert!(limits.gso);
            assert_eq!(cut_by_the_kernel(run.bytes(), run.size()), sizes);
        }
    }
    if limits.gso {
        assert_eq!(runs, plan_slowly(limits, &segments));
    } else {
        assert_eq!(runs.len(), segments.len());
    }
    let by_source: usize = planner
        .sources()
        .map(|source| planner.runs_of(source).count())
        .sum();
    assert_eq!(by_source, runs.len());
}
