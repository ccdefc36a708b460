//! Owns a table of what was measured against its goals, and the rows that every store's scale test has.
//! Never measures anything.

use std::fmt;
use std::time::Duration;

struct Row {
    what: String,
    goal: String,
    measured: String,
    met: bool,
}

/// Rows in the order in which people read them.
#[derive(Default)]
pub(crate) struct Scorecard {
    rows: Vec<Row>,
}

impl Scorecard {
    /// A figure and what it should be.
    pub(crate) fn goal(&mut self, what: &str, goal: &str, measured: String, met: bool) {
        self.rows.push(Row {
            what: what.to_owned(),
            goal: goal.to_owned(),
            measured,
            met,
        });
    }

    /// A figure without a goal.
    pub(crate) fn note(&mut self, what: &str, measured: String) {
        self.goal(what, "", measured, true);
    }

    /// A time that should not be longer than some whole seconds.
    pub(crate) fn at_most(&mut self, what: &str, limit: Duration, measured: Duration) {
        let goal = format!("<= {} s", limit.as_secs());
        self.goal(what, &goal, seconds(measured), measured <= limit);
    }

    /// How fast changes were written, and how long each took to carry a packet; none where it never did.
    pub(crate) fn changes(&mut self, per_second: f64, lags: &[Option<Duration>]) {
        let mut seen: Vec<Duration> = lags.iter().copied().flatten().collect();
        seen.sort();
        let unseen = lags.len() - seen.len();
        let at = |share: usize| seen.get((seen.len().max(1) - 1) * share / 100).copied();
        let worst = at(100).filter(|_| unseen == 0);
        self.goal(
            "changes written a second",
            ">= 500",
            format!("{per_second:.0}"),
            per_second >= 500.0,
        );
        self.goal(
            "longest from write to packet on the new way",
            "< 1 s",
            worst.map_or_else(|| format!("{unseen} never seen"), seconds),
            worst.is_some_and(|lag| lag < Duration::from_secs(1)),
        );
        let quantile = |share| seconds(at(share).unwrap_or_default());
        self.note(
            "  median of these, and 99th percentile",
            format!("{}, {}", quantile(50), quantile(99)),
        );
    }

    /// The largest resident memory there was, in KiB, which should not be more than some megabytes.
    pub(crate) fn memory(&mut self, limit_mb: u64, kib: u64) {
        self.goal(
            "resident memory, most ever",
            &format!("<= {limit_mb} MB"),
            mib(kib),
            kib * 1024 <= limit_mb * 1_000_000,
        );
    }

    /// How many goals are missed.
    pub(crate) fn missed(&self) -> usize {
        self.rows.iter().filter(|row| !row.met).count()
    }
}

impl fmt::Display for Scorecard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<46} {:>11}  {:<24}", "", "goal", "measured")?;
        for row in &self.rows {
            let verdict = match (row.goal.is_empty(), row.met) {
                (true, _) => "",
                (false, true) => "met",
                (false, false) => "MISSED",
            };
            let (what, goal, measured) = (&row.what, &row.goal, &row.measured);
            writeln!(f, "{what:<46} {goal:>11}  {measured:<24} {verdict}")?;
        }
        Ok(())
    }
}

pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}

/// Memory in KiB, as people read it.
#[expect(
    clippy::cast_precision_loss,
    reason = "two digits behind the point of what fits into memory"
)]
pub(crate) fn mib(kib: u64) -> String {
    format!("{:.1} MiB", kib as f64 / 1024.0)
}
