//! Owns the search for the longest packet that passes, in each direction. Never decides what a short one means.

use std::time::Duration;

use super::figures::Sizes;
use super::prober::{Prober, Sending};
use crate::wire::probe::Flags;

/// Sizes tried at a time, and how often each in each direction: four sweeps find any size to the byte, and take
/// less than a responder answers in a second.
const SWEEP: u16 = 16;
const COPIES: usize = 2;

/// Sweeps of a search: four in each direction.
const MAX_SWEEPS: usize = 8;

/// Between two probes of a sweep, so that they do not overflow a queue on the way.
const SWEEP_EVERY: Duration = Duration::from_micros(500);

impl Prober {
    /// Finds the longest IP packet of at most `most` bytes that gets to the other whole, and back. `patience` is
    /// the time to wait for answers; more than a round trip.
    pub async fn sizes(&mut self, most: u16, patience: Duration) -> Sizes {
        let mut sizes = Sizes {
            tried: most,
            up: None,
            down: None,
            told: false,
        };
        let mut high_up = most;
        let mut high_down = most;
        self.sweep(&[most], &mut sizes, patience).await;
        if sizes.up == Some(most) && sizes.down == Some(most) {
            return sizes;
        }
        let least = self.least_len().min(most);
        for _ in 0..MAX_SWEEPS {
            let (low, high) = match (sizes.up, sizes.down) {
                (up, _) if up.is_none_or(|up| up + 1 < high_up) && up != Some(most) => {
                    (up.unwrap_or(least - 1), high_up)
                }
                // No answer is longer than its request.
                (Some(up), down)
                    if down.is_none_or(|down| down + 1 < high_down) && down < Some(up) =>
                {
                    (down.unwrap_or(least - 1), high_down.min(up + 1))
                }
                _ => break,
            };
            let tried = between(low, high);
            self.sweep(&tried, &mut sizes, patience).await;
            let above = |size: Option<u16>, high: u16| {
                let above = tried.iter().copied().find(|&len| Some(len) > size);
                above.map_or(high, |above| above.min(high))
            };
            (high_up, high_down) = (above(sizes.up, high_up), above(sizes.down, high_down));
            if sizes.up.is_none() {
                break;
            }
        }
        sizes
    }

    async fn sweep(&mut self, lens: &[u16], sizes: &mut Sizes, patience: Duration) {
        let of = |flags: Flags| lens.iter().map(move |&len| Sending { len, flags });
        // A short answer tells that the request got there where one of its length does not come back.
        let both = of(Flags::default()).chain(of(Flags::FULL));
        let plan: Vec<Sending> = both.cycle().take(2 * lens.len() * COPIES).collect();
        let exchange = self.exchange(&plan, SWEEP_EVERY, patience).await;
        for reply in &exchange.replies {
            let up = reply.said.map_or(reply.len, |said| said.len);
            sizes.up = sizes.up.max(Some(up));
            sizes.down = sizes.down.max(Some(reply.len));
        }
        sizes.told |= exchange.told | exchange.cut;
    }
}

/// Sizes above `low` and below `high`, evenly, at most [`SWEEP`] of them.
fn between(low: u16, high: u16) -> Vec<u16> {
    let gap = u32::from(high.saturating_sub(low));
    let parts = u32::from(SWEEP) + 1;
    let sizes = (1..parts).map(|nth| low + u16::try_from(gap * nth / parts).unwrap_or_default());
    let mut sizes: Vec<u16> = sizes.filter(|&len| len > low && len < high).collect();
    sizes.dedup();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_sweeps_find_any_size_to_the_byte() {
        for truth in [116, 117, 1000, 1399, 1471, 8000, 65534] {
            let (mut low, mut high) = (115, 65535);
            let mut sweeps = 0;
            while low + 1 < high {
                let tried = between(low, high);
                assert!(tried.len() <= usize::from(SWEEP) && !tried.is_empty());
                low = tried
                    .iter()
                    .copied()
                    .rfind(|&len| len <= truth)
                    .unwrap_or(low);
                high = tried
                    .iter()
                    .copied()
                    .find(|&len| len > truth)
                    .unwrap_or(high);
                sweeps += 1;
            }
            assert_eq!(low, truth);
            assert!(sweeps <= 4, "{truth}: {sweeps}");
        }
        let of_ethernet = between(115, 1472);
        assert_eq!(of_ethernet.len(), 16);
    }
}
