//! Owns what a benchmark shows on standard error while it runs: a bar with the time that is left where somebody
//! looks, lines elsewhere.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::bench::run::Watch;

/// Shows how far a run is.
pub(super) enum Progress {
    /// On a terminal.
    Bar(ProgressBar),
    /// Elsewhere, or where results follow that somebody may read together with this.
    Lines {
        /// Whether each line ends with the time that is left.
        left: bool,
        /// That time.
        expected: Duration,
    },
}

impl Progress {
    /// A bar on a terminal, else lines.
    pub(super) fn here() -> Self {
        if io::stderr().is_terminal() {
            let bar = ProgressBar::new(0);
            // The template is constant, and a style that it did not fit would be the default one.
            if let Ok(style) = ProgressStyle::with_template(
                "[{elapsed_precise}] {bar:30} {percent}%, {eta} left: {msg}",
            ) {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_secs(1));
            Self::Bar(bar)
        } else {
            Self::Lines {
                left: true,
                expected: Duration::ZERO,
            }
        }
    }

    /// One line for each sample, and nothing else.
    pub(super) const fn lines() -> Self {
        Self::Lines {
            left: false,
            expected: Duration::ZERO,
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

impl Watch for Progress {
    fn begins(&mut self, total: Duration) {
        match self {
            Self::Bar(bar) => bar.set_length(milliseconds(total)),
            Self::Lines { expected, .. } => *expected = total,
        }
        self.says(&format!("this takes about {}", duration(total)));
    }

    fn doing(&mut self, what: &str) {
        if let Self::Bar(bar) = self {
            bar.set_message(what.to_owned());
        }
    }

    fn says(&mut self, line: &str) {
        match self {
            Self::Bar(bar) => bar.println(line),
            Self::Lines { left, expected } => {
                let left = match *left {
                    true => format!(" (about {} left)", duration(*expected)),
                    false => String::new(),
                };
                // Nobody may be reading progress; the result goes elsewhere.
                if let Err(error) = writeln!(io::stderr().lock(), "bench: {line}{left}") {
                    tracing::trace!(%error, "progress was not shown");
                }
            }
        }
    }

    fn passes(&mut self, part: Duration) {
        match self {
            Self::Bar(bar) => bar.inc(milliseconds(part)),
            Self::Lines { expected, .. } => *expected = expected.saturating_sub(part),
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn duration(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds => format!("{} min", seconds.div_ceil(60)),
    }
}
