//! Owns the search for the highest rate at which packets still arrive. Pure: what a rate yields is asked of a
//! closure.

/// From here on it doubles.
const FIRST: u32 = 8_000;
/// No sender of one datagram at a time is faster on today's machines.
const LAST: u32 = 2_000_000;
/// Halvings between the highest rate that was carried and the lowest that was not: to within 3 %.
const HALVINGS: u32 = 5;

/// Looks for the highest rate that `carries` says yes to; `None` if not even the first is carried.
///
/// A rate is asked for a second time before it counts as too high: on a shared machine one stumble proves nothing.
///
/// # Errors
/// The first error of `carries`.
pub fn highest<E>(mut carries: impl FnMut(u32) -> Result<bool, E>) -> Result<Option<u32>, E> {
    let mut twice = |rate| Ok(carries(rate)? || carries(rate)?);
    let mut good = None;
    let mut rate = FIRST;
    while rate <= LAST && twice(rate)? {
        good = Some(rate);
        rate *= 2;
    }
    let Some(mut low) = good else {
        return Ok(None);
    };
    let mut high = rate;
    for _ in 0..HALVINGS {
        let middle = low.midpoint(high);
        if twice(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(Some(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_found_is_carried_and_lies_within_three_percent_of_the_limit() {
        for limit in [8_000_u32, 9_000, 25_000, 93_100, 140_000, 1_000_000] {
            let found = highest(|rate| Ok::<_, ()>(rate <= limit)).unwrap().unwrap();
            assert!(
                found <= limit && found >= limit - limit / 32,
                "{limit}: {found}"
            );
        }
    }

    #[test]
    fn one_stumble_is_forgiven_and_a_system_that_carries_nothing_has_no_rate() {
        let mut asked = 0;
        let found = highest(|rate| {
            asked += 1;
            Ok::<_, ()>(rate <= 50_000 && asked != 1)
        });
        assert!(found.unwrap().unwrap() > 48_000);
        assert_eq!(highest(|_| Ok::<_, ()>(false)), Ok(None));
        assert_eq!(highest(|_| Err("x")), Err("x"));
    }
}
