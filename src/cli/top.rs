//! Owns `loden top`: asks the daemon again and again, and shows the difference in the terminal or as lines of
//! JSON. Never leaves the terminal other than it found it.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use super::page::unwritten;
use super::status::SocketArgs;
use crate::debug::socket::{self, Request};
use crate::debug::top::view::Asked;
use crate::debug::top::{Answer, Rates, View};
use crate::shutdown::Shutdown;

/// The longest wait for a key before signals are looked at again.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Flags of `loden top`.
#[derive(Debug, Args)]
#[command(
    after_help = "Keys: q quit, s sort peers by another column, / filter peers, space freeze."
)]
pub struct TopArgs {
    /// Print one line of JSON per interval instead
    #[arg(long)]
    json: bool,

    /// Seconds between two looks
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1.0, value_parser = interval)]
    interval: f64,

    /// End after so many intervals
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    #[command(flatten)]
    at: SocketArgs,
}

fn interval(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_not| "not a number".to_owned())?;
    (0.1..=3600.0)
        .contains(&seconds)
        .then_some(seconds)
        .ok_or_else(|| "give 0.1 to 3600 seconds".to_owned())
}

pub(super) fn run(args: &TopArgs) -> anyhow::Result<()> {
    let path = args.at.path();
    // A daemon that is not there now is a mistake; one that goes away later is shown as such.
    let first = Look::new(&path)?;
    let mut shutdown = Shutdown::install().context("cannot wait for signals")?;
    if args.json {
        return lines(args, &path, first, &mut shutdown);
    }
    let mut terminal = ratatui::try_init().context(
        "cannot use the terminal: run it in one, or with --json for lines that a program reads",
    )?;
    let ended = show(args, &path, first, &mut shutdown, &mut terminal);
    ratatui::restore();
    ended
}

/// One answer and when it came.
struct Look {
    at: Instant,
    answer: Answer,
}

impl Look {
    fn new(path: &Path) -> anyhow::Result<Self> {
        let document = socket::ask(path, &Request::Status)?;
        let answer = Answer::read(document).context("the daemon's answer cannot be read")?;
        Ok(Self {
            at: Instant::now(),
            answer,
        })
    }

    /// Replaces it with a new one, and returns what happened in between.
    fn again(&mut self, path: &Path) -> anyhow::Result<Rates> {
        let now = Self::new(path)?;
        let rates = Rates::between(&self.answer, &now.answer, now.at - self.at);
        *self = now;
        Ok(rates)
    }
}

/// When to look, over and over, without drift.
struct Pace {
    next: Instant,
    every: Duration,
    left: Option<u64>,
}

impl Pace {
    fn new(args: &TopArgs) -> Self {
        let every = Duration::from_secs_f64(args.interval);
        Self {
            next: Instant::now() + every,
            every,
            left: args.count,
        }
    }

    /// Whether that was the last one.
    fn is_over(&mut self) -> bool {
        self.next = (self.next + self.every).max(Instant::now());
        self.left = self.left.map(|left| left - 1);
        self.left == Some(0)
    }
}

fn lines(
    args: &TopArgs,
    path: &Path,
    mut look: Look,
    shutdown: &mut Shutdown,
) -> anyhow::Result<()> {
    let mut pace = Pace::new(args);
    let mut out = io::stdout();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()?;
    loop {
        let signalled = runtime.block_on(async {
            tokio::select! {
                () = tokio::time::sleep_until(pace.next.into()) => false,
                _ = shutdown.requested() => true,
            }
        });
        if signalled {
            return Ok(());
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let time = since.map_or(0.0, |since| since.as_secs_f64());
        let mut line = match look.again(path) {
            Ok(rates) => serde_json::to_value(rates)?,
            Err(error) => serde_json::json!({ "error": super::sentence(&error) }),
        };
        line["time"] = time.into();
        match writeln!(out, "{line}").and_then(|()| out.flush()) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result.map_err(|error| unwritten("standard output", &error))?,
        }
        if pace.is_over() {
            return Ok(());
        }
    }
}

fn show(
    args: &TopArgs,
    path: &Path,
    mut look: Look,
    shutdown: &mut Shutdown,
    terminal: &mut DefaultTerminal,
) -> anyhow::Result<()> {
    let mut pace = Pace::new(args);
    let mut view = View::default();
    // What is known before anything happened.
    view.update(Rates::between(&look.answer, &look.answer, Duration::ZERO));
    loop {
        terminal.draw(|frame| view.draw(frame))?;
        let wait = pace.next.saturating_duration_since(Instant::now());
        if event::poll(wait.min(LOOK_EVERY))?
            && let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
            && view.key(key) == Asked::Quit
        {
            return Ok(());
        }
        if shutdown.is_requested() {
            return Ok(());
        }
        if Instant::now() < pace.next {
            continue;
        }
        match look.again(path) {
            Ok(rates) => view.update(rates),
            Err(error) => view.fail(super::sentence(&error)),
        }
        if pace.is_over() {
            return Ok(());
        }
    }
}
