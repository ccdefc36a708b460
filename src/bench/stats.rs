//! Owns the arithmetic on repetitions: median and spread. Pure.

use serde::{Deserialize, Serialize};

/// The middle of some repetitions, and how far apart they lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The median.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Summarises `values`; `None` if there are none, or one is not a number.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        if values.iter().any(|value| value.is_nan()) {
            return None;
        }
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let upper = *sorted.get(sorted.len() / 2)?;
        let lower = *sorted.get((sorted.len() - 1) / 2)?;
        Some(Self {
            median: f64::midpoint(lower, upper),
            min: *sorted.first()?,
            max: *sorted.last()?,
        })
    }

    /// How far apart they lie, over the median: 0 if they agree. Not a number if they do not and their median is 0.
    #[must_use]
    pub fn spread(&self) -> f64 {
        let width = self.max - self.min;
        if width == 0.0 {
            0.0
        } else if self.median == 0.0 {
            f64::NAN
        } else {
            width / self.median.abs()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_lies_between_the_two_in_the_middle() {
        let summary = Summary::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(
            summary,
            Summary {
                median: 2.5,
                min: 1.0,
                max: 4.0
            }
        );
    }

    #[test]
    fn an_outlier_moves_the_spread_and_not_the_median() {
        let summary = Summary::of(&[2.0, 100.0, 1.0]).unwrap();
        assert_eq!(
            summary,
            Summary {
                median: 2.0,
                min: 1.0,
                max: 100.0
            }
        );
    }

    #[test]
    fn the_spread_is_the_width_in_medians() {
        let spread = |values: &[f64]| Summary::of(values).unwrap().spread();
        assert_eq!(spread(&[4.0, 5.0, 6.0]), 0.4);
        assert_eq!(spread(&[0.0, 0.0]), 0.0);
        assert!(spread(&[0.0, 0.0, 1.0]).is_nan());
    }

    #[test]
    fn nothing_has_no_median_and_neither_has_a_broken_measurement() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1.0, f64::NAN]), None);
    }
}
