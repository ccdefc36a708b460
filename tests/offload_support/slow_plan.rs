//! Owns a slow planner that asks what the kernel would cut. Shares no code with what it judges.

#![expect(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "an oracle may panic, and is compiled into several crates"
)]

use std::collections::HashMap;

use loden::offload::gso::{RunKey, RunLimits};

/// What UDP_SEGMENT does: cut every `size` bytes.
pub fn cut_by_the_kernel(bytes: u32, size: u32) -> Vec<u32> {
    let mut left = bytes;
    let mut sizes = Vec::new();
    while left > 0 {
        sizes.push(left.min(size));
        left -= left.min(size);
    }
    sizes
}

/// A segment joins the most recent run of its source socket and next hop, if the kernel would cut the
/// longer run into the same datagrams again.
pub fn plan_slowly(limits: RunLimits, segments: &[(RunKey, u32)]) -> Vec<Vec<u16>> {
    let mut runs: Vec<Vec<u16>> = Vec::new();
    let mut most_recent: HashMap<(u16, u32), usize> = HashMap::new();
    for (i, (key, _)) in segments.iter().enumerate() {
        let i = u16::try_from(i).unwrap();
        let route = (key.source, key.next_hop);
        if let Some(&at) = most_recent.get(&route) {
            let longer: Vec<u16> = runs[at].iter().copied().chain([i]).collect();
            let sizes: Vec<u32> = longer.iter().map(|&k| segments[usize::from(k)].1).collect();
            let bytes = sizes.iter().sum();
            let same_tos = longer
                .iter()
                .all(|&k| segments[usize::from(k)].0.tos == key.tos);
            let fits =
                longer.len() <= usize::from(limits.max_segments) && bytes <= limits.max_bytes;
            if same_tos && fits && sizes[0] != 0 && cut_by_the_kernel(bytes, sizes[0]) == sizes {
                runs[at] = longer;
                continue;
            }
        }
        most_recent.insert(route, runs.len());
        runs.push(vec![i]);
    }
    runs
}
