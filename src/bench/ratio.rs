//! Owns ratios of two systems: taken within a repetition, where both met the same state of the machine, and refused
//! where the repetitions disagree too much. Pure.

use serde::{Deserialize, Serialize};

use super::medium::Medium;
use super::report::Cells;
use super::scenario::{Metric, Scenario};
use super::stats::Summary;
use super::system::System;

/// When a ratio is printed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// Repetitions in which both systems must have been measured.
    pub repetitions: usize,
    /// How far apart the repetitions' ratios may lie: the largest less the smallest, over the median.
    pub spread: f64,
}

impl Default for Rule {
    /// Three repetitions, of which the extremes lie within half of the median.
    fn default() -> Self {
        Self {
            repetitions: 3,
            spread: 0.5,
        }
    }
}

impl Rule {
    /// Takes whatever there is.
    pub const ANY: Self = Self {
        repetitions: 1,
        spread: f64::MAX,
    };

    /// Summarises the ratios of single repetitions.
    ///
    /// # Errors
    /// Why they say nothing.
    pub fn judge(&self, ratios: &[f64]) -> Result<Summary, String> {
        if ratios.len() < self.repetitions {
            return Err(format!(
                "{} repetitions, a ratio needs {}",
                ratios.len(),
                self.repetitions
            ));
        }
        let summary = Summary::of(ratios).ok_or("no repetition")?;
        let spread = summary.spread();
        // A spread that is not a number is none to rely on either.
        if spread <= self.spread {
            Ok(summary)
        } else {
            Err(format!("spread {spread:.2} exceeds {}", self.spread))
        }
    }
}

/// One number of one system over the same of another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// On this wire.
    pub wire: Medium,
    /// In this scenario.
    pub scenario: Scenario,
    /// Of this number.
    pub metric: Metric,
    /// The numerator.
    pub over: System,
    /// The denominator.
    pub under: System,
    /// Over the repetitions; none if refused.
    pub ratio: Option<Summary>,
    /// Why it is refused.
    pub refused: Option<String>,
}

/// The ratios of the repetitions in which both values were taken.
#[must_use]
pub fn paired(over: &[Option<f64>], under: &[Option<f64>]) -> Vec<f64> {
    over.iter()
        .zip(under)
        .filter_map(|(over, under)| Some((*over)? / (*under)?))
        .filter(|ratio| ratio.is_finite())
        .collect()
}

/// Every system over every other, for the number that ranks each scenario.
#[must_use]
pub fn all(cells: &Cells, rule: &Rule) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for wire in cells.wires() {
        for scenario in cells.scenarios_on(wire) {
            let metric = scenario.load.headline();
            let systems = cells.systems();
            for over in &systems {
                for under in systems.iter().filter(|under| *under != over) {
                    let values = |system| cells.values(wire, scenario, system, metric);
                    let (Some(above), Some(below)) = (values(over), values(under)) else {
                        continue;
                    };
                    let judged = rule.judge(&paired(&above, &below));
                    ratios.push(Ratio {
                        wire,
                        scenario,
                        metric,
                        over: over.clone(),
                        under: under.clone(),
                        ratio: judged.as_ref().ok().copied(),
                        refused: judged.err(),
                    });
                }
            }
        }
    }
    ratios
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_taken_within_a_repetition_and_one_that_failed_is_left_out() {
        let over = [Some(9.0), None, Some(3.0), Some(3.0)];
        let under = [Some(10.0), Some(1.0), Some(5.0)];
        assert_eq!(paired(&over, &under), [0.9, 0.6]);
        assert_eq!(paired(&[Some(1.0)], &[Some(0.0)]), Vec::<f64>::new());
    }

    #[test]
    fn repetitions_that_disagree_and_too_few_of_them_make_no_ratio() {
        let rule = Rule::default();
        // (1.2 - 0.8) / 1.0 = 0.4
        assert_eq!(rule.judge(&[0.8, 1.2, 1.0]).unwrap().median, 1.0);
        // (1.5 - 0.8) / 1.0 = 0.7
        assert_eq!(
            rule.judge(&[0.8, 1.5, 1.0]),
            Err("spread 0.70 exceeds 0.5".to_owned())
        );
        assert_eq!(
            rule.judge(&[1.0, 1.0]),
            Err("2 repetitions, a ratio needs 3".to_owned())
        );
        assert_eq!(Rule::ANY.judge(&[1.0, 9.0]).unwrap().max, 9.0);
        assert!(Rule::ANY.judge(&[]).is_err());
    }
}
