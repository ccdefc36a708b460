//! Owns what `loden top` draws: readable at 80 by 24, more where there is more room. Pure: the same rates and
//! keys give the same screen.

use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize as _};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Row, Table};

use super::rates::{Direction, Peer, Rates};
use crate::debug::socket::clean;

/// Workers with rows of their own.
const MAX_WORKERS: usize = 4;
/// Reasons with rows of their own.
const MAX_DROPS: usize = 5;

/// What peers are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Packets both ways, most first.
    #[default]
    Traffic,
    /// Packets sent to them.
    Sent,
    /// Packets received from them.
    Received,
    /// Packets from them that were dropped.
    Dropped,
    /// Their subnets.
    Subnet,
}

impl Order {
    const fn next(self) -> Self {
        match self {
            Self::Traffic => Self::Sent,
            Self::Sent => Self::Received,
            Self::Received => Self::Dropped,
            Self::Dropped => Self::Subnet,
            Self::Subnet => Self::Traffic,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Traffic => "traffic",
            Self::Sent => "sent",
            Self::Received => "received",
            Self::Dropped => "dropped",
            Self::Subnet => "subnet",
        }
    }

    fn sort(self, peers: &mut [&Peer]) {
        let by = |of: fn(&Peer) -> f64| move |a: &&Peer, b: &&Peer| of(b).total_cmp(&of(a));
        match self {
            Self::Traffic => peers.sort_by(by(|p| p.sent_per_second + p.received_per_second)),
            Self::Sent => peers.sort_by(by(|p| p.sent_per_second)),
            Self::Received => peers.sort_by(by(|p| p.received_per_second)),
            Self::Dropped => peers.sort_by(by(|p| p.dropped_per_second)),
            Self::Subnet => peers.sort_by(|a, b| a.subnets.cmp(&b.subnets)),
        }
    }
}

/// What a key asks of whoever runs the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing more than drawing again.
    Draw,
    /// The end.
    Quit,
}

/// What is shown, and how.
#[derive(Clone, Debug, Default)]
pub struct View {
    shown: Rates,
    latest: Rates,
    problem: Option<String>,
    frozen: bool,
    order: Order,
    filter: String,
    /// The filter is being typed.
    typing: bool,
}

impl View {
    /// Takes new rates in; they are shown unless the view is frozen.
    pub fn update(&mut self, rates: Rates) {
        self.problem = None;
        if !self.frozen {
            self.shown = rates.clone();
        }
        self.latest = rates;
    }

    /// The daemon does not answer.
    pub fn fail(&mut self, problem: String) {
        self.problem = Some(problem);
    }

    /// Does what a key means.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "all other keys of a keyboard mean nothing"
    )]
    pub fn key(&mut self, key: KeyEvent) -> Asked {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Asked::Quit;
        }
        if self.typing {
            match key.code {
                KeyCode::Enter => self.typing = false,
                KeyCode::Esc => {
                    self.typing = false;
                    self.filter.clear();
                }
                KeyCode::Backspace => {
                    self.filter.pop();
                }
                KeyCode::Char(c) if self.filter.len() < 40 => self.filter.push(c),
                _ => {}
            }
            return Asked::Draw;
        }
        match key.code {
            KeyCode::Char('q') => return Asked::Quit,
            KeyCode::Char('s') => self.order = self.order.next(),
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char(' ') => {
                self.frozen = !self.frozen;
                if !self.frozen {
                    self.shown = self.latest.clone();
                }
            }
            _ => {}
        }
        Asked::Draw
    }

    /// Draws everything.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let rates = &self.shown;
        let fit = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        let workers = if rates.workers.len() > 1 {
            2 * rates.workers.len().min(MAX_WORKERS)
        } else {
            0
        };
        let drops = rates.drops.len().clamp(1, MAX_DROPS);
        let offloads = self.offloads(usize::from(frame.area().width));
        let [title, traffic, peers, drop_rows, used, footer] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(fit(4 + workers)),
            Constraint::Min(3),
            Constraint::Length(fit(2 + drops)),
            Constraint::Length(fit(offloads.len())),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(Paragraph::new(self.title()), title);
        frame.render_widget(traffic_table(rates), traffic);
        self.peers(frame, peers);
        frame.render_widget(drop_table(rates), drop_rows);
        frame.render_widget(Paragraph::new(offloads), used);
        frame.render_widget(Paragraph::new(self.footer()), footer);
    }

    fn title(&self) -> Vec<Line<'_>> {
        let rates = &self.shown;
        let what = format!(
            "loden {}  pid {}  {}  {}  {} workers",
            rates.version,
            rates.pid,
            rates.device,
            rates.engine,
            rates.workers.len(),
        );
        let state = match (&self.problem, &rates.down) {
            (Some(problem), _) => clean(problem),
            (None, Some(down)) => format!("DOWN: {}", clean(down)),
            (None, None) if self.frozen => "frozen: space goes on".to_owned(),
            (None, None) => String::new(),
        };
        vec![Line::from(what).bold(), Line::from(state).bold()]
    }

    fn peers(&self, frame: &mut Frame<'_>, area: Rect) {
        let matches = |peer: &&Peer| {
            let endpoint = peer.endpoint.as_deref().unwrap_or_default();
            peer.subnets.contains(&self.filter) || endpoint.contains(&self.filter)
        };
        let mut peers: Vec<&Peer> = self.shown.peers.iter().filter(matches).collect();
        self.order.sort(&mut peers);
        let room = usize::from(area.height).saturating_sub(2);
        let hidden = peers.len().saturating_sub(room);
        let mut title = format!("peers by {}", self.order.name());
        if hidden > 0 {
            title = format!("{title} +{hidden}");
        }
        let rows = peers.iter().take(room).map(|peer| {
            let path_mtu = peer
                .path_mtu
                .map_or_else(|| "-".to_owned(), |mtu| mtu.to_string());
            Row::new([
                clean(&peer.subnets),
                clean(peer.endpoint.as_deref().unwrap_or("unreachable")),
                right(&short(peer.sent_per_second), 9),
                right(&short(peer.received_per_second), 9),
                right(&short(peer.dropped_per_second), 9),
                right(&path_mtu, 5),
            ])
        });
        let columns = [
            Constraint::Min(20),
            Constraint::Length(21),
            Constraint::Length(9),
            Constraint::Length(9),
            Constraint::Length(9),
            Constraint::Length(5),
        ];
        let header = [
            title,
            "endpoint".to_owned(),
            right("sent/s", 9),
            right("recv/s", 9),
            right("drop/s", 9),
            right("PMTU", 5),
        ];
        let table = Table::new(rows, columns).header(Row::new(header).style(heading()));
        frame.render_widget(table, area);
    }

    /// Features in use in one line, and a line for each that is not.
    fn offloads(&self, width: usize) -> Vec<Line<'static>> {
        let capabilities = &self.shown.capabilities;
        let used = capabilities.iter().filter(|one| one.used);
        let used: Vec<String> = used.map(|one| clean(&one.name)).collect();
        let mut lines: Vec<Line<'_>> = wrap("uses", &used, width);
        for one in capabilities.iter().filter(|one| !one.used).take(2) {
            let reason = clean(one.reason.as_deref().unwrap_or_default());
            lines.push(Line::from(format!("not {}: {reason}", clean(&one.name))));
        }
        lines
    }

    fn footer(&self) -> Line<'_> {
        if self.typing {
            return Line::from(format!("peers that contain: {}_", self.filter)).reversed();
        }
        let filter = match self.filter.as_str() {
            "" => String::new(),
            filter => format!("  [only {filter}; Esc shows all]"),
        };
        Line::from(format!("q quit  s sort  / filter  space freeze{filter}")).reversed()
    }
}

const fn heading() -> Style {
    Style::new().underlined()
}

fn traffic_table(rates: &Rates) -> Table<'static> {
    let mut rows = vec![row("encap", &rates.encap), row("decap", &rates.decap)];
    if rates.workers.len() > 1 {
        for (idx, worker) in rates.workers.iter().take(MAX_WORKERS).enumerate() {
            rows.push(row(&format!("worker {idx} encap"), &worker.encap));
            rows.push(row(&format!("worker {idx} decap"), &worker.decap));
        }
    }
    let columns = [
        Constraint::Min(16),
        Constraint::Length(10),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(9),
    ];
    let header = [
        "inner packets".to_owned(),
        right("packets/s", 10),
        right("bit/s", 9),
        right("answer/s", 9),
        right("drop/s", 9),
        right("per read", 9),
        right("per send", 9),
    ];
    Table::new(rows, columns).header(Row::new(header).style(heading()))
}

fn row(name: &str, direction: &Direction) -> Row<'static> {
    Row::new([
        name.to_owned(),
        right(&short(direction.packets_per_second), 10),
        right(&short(direction.bits_per_second), 9),
        right(&short(direction.answered_per_second), 9),
        right(&short(direction.dropped_per_second), 9),
        right(&format!("{:.1}", direction.packets_per_read), 9),
        right(&format!("{:.1}", direction.packets_per_send), 9),
    ])
}

fn drop_table(rates: &Rates) -> Table<'static> {
    let mut rows: Vec<Row<'_>> = rates
        .drops
        .iter()
        .take(MAX_DROPS)
        .map(|drop| {
            Row::new([
                clean(&drop.reason),
                drop.direction.to_owned(),
                right(&short(drop.per_second), 9),
                right(&drop.total.to_string(), 14),
            ])
        })
        .collect();
    if rows.is_empty() {
        rows.push(Row::new(["none".to_owned()]));
    }
    let columns = [
        Constraint::Min(20),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(14),
    ];
    let header = [
        "drops".to_owned(),
        "direction".to_owned(),
        right("drop/s", 9),
        right("total", 14),
    ];
    Table::new(rows, columns).header(Row::new(header).style(heading()))
}

fn right(text: &str, width: usize) -> String {
    format!("{text:>width$}")
}

/// Words behind a title, as many to a line as fit.
fn wrap(title: &str, words: &[String], width: usize) -> Vec<Line<'static>> {
    let mut lines = vec![title.to_owned()];
    for word in words {
        let fits = lines
            .last()
            .is_some_and(|line| line.len() + 1 + word.len() <= width);
        match lines.last_mut() {
            Some(line) if fits => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(format!("     {word}")),
        }
    }
    lines.into_iter().map(Line::from).collect()
}

/// Three digits and a unit: `0`, `7.5`, `950`, `12.3k`, `4.20G`.
#[must_use]
pub fn short(value: f64) -> String {
    let mut scaled = value.max(0.0);
    for unit in ["", "k", "M", "G", "T"] {
        if scaled < 999.5 || unit == "T" {
            return match () {
                () if scaled == 0.0 => "0".to_owned(),
                () if scaled < 9.995 => format!("{scaled:.2}{unit}"),
                () if scaled < 99.95 => format!("{scaled:.1}{unit}"),
                () => format!("{scaled:.0}{unit}"),
            };
        }
        scaled /= 1000.0;
    }
    String::new()
}

#[cfg(test)]
mod tests;
