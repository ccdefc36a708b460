//! Planning of UDP_SEGMENT runs against a slow planner, and against what the kernel will do with a run.

#![expect(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

#[path = "offload_support/slow_plan.rs"]
mod slow_plan;

use loden::offload::gso::{PlanError, Planner, RunKey, RunLimits};
use proptest::collection::vec;
use proptest::prelude::*;
use slow_plan::{cut_by_the_kernel, plan_slowly};

const LIMITS: RunLimits = RunLimits {
    gso: true,
    max_segments: 64,
    max_bytes: RunLimits::MAX_BYTES_V4,
};

const KEY: RunKey = RunKey {
    source: 0,
    next_hop: 7,
    tos: 0,
};

#[test]
fn equal_segments_make_one_run_and_a_short_one_closes_it() {
    let plan = plan(
        LIMITS,
        &[
            (KEY, 1400),
            (KEY, 1400),
            (KEY, 900),
            (KEY, 900),
            (KEY, 1400),
        ],
    );
    assert_eq!(plan, [vec![0, 1, 2], vec![3], vec![4]]);
}

#[test]
fn flows_to_different_next_hops_interleave_and_still_build_long_runs() {
    let keys: Vec<RunKey> = (0..8).map(|next_hop| RunKey { next_hop, ..KEY }).collect();
    let segments: Vec<_> = (0..80).map(|i| (keys[i % 8], 1400)).collect();
    let expected: Vec<Vec<u16>> = (0..8)
        .map(|hop| (0..10).map(|i| i * 8 + hop).collect())
        .collect();
    assert_eq!(plan(LIMITS, &segments), expected);
}

#[test]
fn another_tos_closes_the_run_so_that_a_flow_keeps_its_order() {
    let marked = RunKey { tos: 3, ..KEY };
    let plan = plan(LIMITS, &[(KEY, 500), (marked, 500), (KEY, 500), (KEY, 500)]);
    assert_eq!(plan, [vec![0], vec![1], vec![2, 3]]);
}

#[test]
fn a_superpacket_of_64_kib_makes_two_runs() {
    let plan = plan(LIMITS, &[(KEY, 1488); 45]);
    assert_eq!(plan.iter().map(Vec::len).collect::<Vec<_>>(), [44, 1]);
}

#[test]
fn without_gso_every_segment_is_a_run() {
    let off = RunLimits {
        gso: false,
        ..LIMITS
    };
    assert_eq!(plan(off, &[(KEY, 100); 3]), [vec![0], vec![1], vec![2]]);
}

#[test]
fn a_withdrawn_capability_takes_effect_within_the_burst() {
    let mut planner = Planner::new(8, 1);
    let off = RunLimits {
        gso: false,
        ..LIMITS
    };
    for limits in [LIMITS, LIMITS, off, LIMITS] {
        planner.push(KEY, 100, &limits).unwrap();
    }
    assert_eq!(
        planner
            .runs()
            .iter()
            .map(|run| run.count())
            .collect::<Vec<_>>(),
        [2, 2]
    );
}

#[test]
fn each_source_socket_has_its_runs_together_in_the_order_first_touched() {
    let at = |source, next_hop| {
        (
            RunKey {
                source,
                next_hop,
                tos: 0,
            },
            100,
        )
    };
    let mut planner = Planner::new(16, 4);
    for (key, len) in [at(3, 1), at(1, 1), at(3, 2), at(1, 1), at(3, 1)] {
        planner.push(key, len, &LIMITS).unwrap();
    }
    let sources: Vec<u16> = planner.sources().collect();
    assert_eq!(sources, [3, 1]);
    let runs = |source| -> Vec<Vec<u16>> {
        planner
            .runs_of(source)
            .map(|run| planner.segments(run).collect())
            .collect()
    };
    assert_eq!(runs(3), [vec![0, 4], vec![2]]);
    assert_eq!(runs(1), [vec![1, 3]]);
    assert_eq!(runs(0), Vec::<Vec<u16>>::new());
    assert_eq!(runs(9), Vec::<Vec<u16>>::new());
}

#[test]
fn a_full_planner_takes_no_more_until_cleared() {
    let mut planner = Planner::new(2, 1);
    assert_eq!(planner.push(KEY, 9, &LIMITS), Ok(0));
    assert_eq!(planner.push(KEY, 9, &LIMITS), Ok(1));
    assert_eq!(planner.push(KEY, 9, &LIMITS), Err(PlanError::Full));
    assert_eq!((planner.len(), planner.runs().len()), (2, 1));
    planner.clear();
    assert!(planner.is_empty());
    assert_eq!(planner.sources().count() + planner.runs_of(0).count(), 0);
    assert_eq!(planner.push(KEY, 9, &LIMITS), Ok(0));
    assert_eq!(planner.runs().len(), 1);
}

#[test]
fn an_unknown_source_socket_is_refused_and_leaves_no_trace() {
    let mut planner = Planner::new(4, 2);
    let unknown = RunKey { source: 2, ..KEY };
    let refused = PlanError::UnknownSource {
        source_idx: 2,
        count: 2,
    };
    assert_eq!(planner.push(unknown, 9, &LIMITS), Err(refused));
    assert!(planner.is_empty() && planner.runs().is_empty());
}

proptest! {
    #[test]
    fn random_bursts_are_planned_like_the_slow_planner(
        bursts in vec(vec((0..3_u16, 0..4_u32, 0..2_u8, size()), 0..200), 1..3),
        max_segments in 1..70_u16,
        max_bytes in prop_oneof![Just(RunLimits::MAX_BYTES_V6), 1000..9000_u32],
    ) {
        let limits = RunLimits { gso: true, max_segments, max_bytes };
        let mut planner = Planner::new(200, 3);
        for burst in bursts {
            planner.clear();
            let segments: Vec<_> = burst
                .iter()
                .map(|&(source, next_hop, tos, len)| (RunKey { source, next_hop, tos }, len))
                .collect();
            for (i, &(key, len)) in segments.iter().enumerate() {
                prop_assert_eq!(planner.push(key, len, &limits).map(usize::from), Ok(i));
            }
            let runs: Vec<Vec<u16>> =
                planner.runs().iter().map(|run| planner.segments(run).collect()).collect();
            prop_assert_eq!(&runs, &plan_slowly(limits, &segments));

            let by_source: usize = planner
                .sources()
                .map(|source| {
                    assert!(planner.runs_of(source).all(|run| run.key().source == source));
                    planner.runs_of(source).count()
                })
                .sum();
            prop_assert_eq!(by_source, runs.len());
            for (run, indices) in planner.runs().iter().zip(&runs) {
                let sizes: Vec<u32> = indices.iter().map(|&i| segments[usize::from(i)].1).collect();
                prop_assert_eq!(sizes.len(), run.count());
                prop_assert_eq!(sizes.iter().sum::<u32>(), run.bytes());
                if run.count() > 1 {
                    prop_assert_eq!(cut_by_the_kernel(run.bytes(), run.size()), sizes);
                }
            }
        }
    }
}

/// Few sizes, so that runs form.
fn size() -> impl Strategy<Value = u32> {
    prop_oneof![6 => Just(1400_u32), 2 => Just(500_u32), 1 => Just(0_u32), 1 => 1..1500_u32]
}

fn plan(limits: RunLimits, segments: &[(RunKey, u32)]) -> Vec<Vec<u16>> {
    let mut planner = Planner::new(u16::try_from(segments.len()).unwrap(), 16);
    for &(key, len) in segments {
        planner.push(key, len, &limits).unwrap();
    }
    planner
        .runs()
        .iter()
        .map(|run| planner.segments(run).collect())
        .collect()
}
