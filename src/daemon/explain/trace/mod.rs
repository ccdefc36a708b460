//! Owns following marked probes through both nodes: each shows what it sees of them ([`Sight`]), the other one by an order
//! that comes through the overlay or past it ([`Lookouts`]). Never says more of a node than its daemon told.

mod eye;
mod lookout;
mod loss;
mod sight;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

use self::eye::Since;
use self::loss::Passed;
use self::sight::Sight;
use super::Explanation;
use crate::backend::kernel::Kernel;
use crate::daemon::Daemon;
use crate::daemon::session::{Session, Whose};
use crate::datapath::tap::Direction;
use crate::probe::prober::{Prober, Round};
use crate::probe::{Directory, Figures};
use crate::store::LeaseStore;
use crate::wire::probe::{About, Order, Sights, Standing};
pub(in crate::daemon) use lookout::Lookouts;

/// Marked probes: enough to tell a loss from a way that is closed.
const PROBES: u16 = 3;

/// How long answers are waited for.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long the other node is waited for, each of the times that it is asked: it lets its workers and sockets show what
/// they have.
const ORDER_PATIENCE: Duration = Duration::from_millis(350);

/// What a trace needs of the daemon.
pub(in crate::daemon) struct Trace {
    way: Way,
    len: u16,
    sight: Sight,
    /// The other node.
    node: String,
}

/// How the other node is reached.
struct Way {
    directory: Arc<Directory>,
    to: SocketAddr,
    /// Where it is told to look out: where the probes go, and past the overlay, which may be what is broken.
    orders: Vec<SocketAddr>,
}

impl Trace {
    /// Makes ready to follow probes to the node whose lease has `addr`; why not, if they cannot be.
    pub(super) fn begin<S: LeaseStore, K: Kernel>(
        daemon: &Daemon<'_, S, K>,
        session: &Session,
        addr: IpAddr,
        len: u16,
    ) -> Result<Self, String> {
        let port = daemon.probes.options.port.map(NonZero::get);
        let port =
            port.ok_or("the daemon runs with --probe-port 0, so there is nothing to follow")?;
        let peer = session.directory.peers().into_iter().find(|peer| {
            let nets = crate::backend::udp::nets(&peer.subnets);
            nets.iter().any(|net| net.contains(&addr)) || peer.public.contains(&addr)
        });
        let peer = peer.ok_or_else(|| {
            format!("{addr} is in no peer's lease: there is nobody to follow probes to")
        })?;
        let targets = session.directory.targets(&peer).into_iter();
        let mut targets = targets.chain(peer.overlay_addrs());
        let to = targets.find(|of| of.is_ipv4() == addr.is_ipv4());
        let to = to.ok_or_else(|| format!("the peer of {addr} has no address of that family"))?;
        let orders = std::iter::once(to).chain(peer.public.iter().copied());
        let way = Way {
            directory: Arc::clone(&session.directory),
            to: SocketAddr::new(to, port),
            orders: orders.map(|addr| SocketAddr::new(addr, port)).collect(),
        };
        Ok(Self {
            way,
            len,
            sight: Sight::begin(session, &[to], port, Whose::Clients),
            node: peer
                .public
                .first()
                .map_or_else(|| to.to_string(), IpAddr::to_string),
        })
    }

    /// Sends the probes, and adds what was seen of them.
    pub(in crate::daemon) async fn run(self, explanation: &mut Explanation) {
        let lines = self.follow().await;
        explanation.trace = lines;
    }

    async fn follow(mut self) -> Vec<String> {
        let mut prober = match self.way.prober().await {
            Ok(prober) => prober,
            Err(error) => return vec![self.way.unsendable(&error)],
        };
        let nonce = prober.nonce();
        let begun = self.way.order(nonce, Order::Begin).await;
        // Workers begin to show packets at their next burst, which these make.
        let waking = Round {
            count: PROBES,
            every: Duration::from_millis(1),
            patience: PATIENCE / 5,
            ..Round::default()
        };
        prober.round(waking).await;
        self.len = self.len.max(prober.least_len());
        let round = Round {
            count: PROBES,
            patience: PATIENCE,
            len: self.len,
            full: true,
            trace: true,
            ..Round::default()
        };
        let figures = prober.round(round).await;
        self.sight.fetch(nonce).await;
        let there = match begun {
            Some(Sights {
                standing: Standing::Watches,
                ..
            }) => self.way.order(nonce, Order::Tell).await,
            other => other,
        };
        self.lines(&figures, there.as_ref())
    }

    /// What there is to say, in the order of the way.
    fn lines(&self, figures: &Figures, there: Option<&Sights>) -> Vec<String> {
        let (sight, node) = (&self.sight, &self.node);
        let told = there.filter(|sights| sights.standing == Standing::Told);
        let mut lines = vec![format!(
            "{} marked probes of {} bytes to {}",
            figures.sent, self.len, self.way.to
        )];
        let mut out = sight.watching();
        out.extend(sight.told(Direction::Encap, &Since::Left, "none of the probes"));
        if let (Some(link), None) = (sight.behind(), told) {
            out.push(format!(
                "sight ends behind {link}: what the underlay does is told by the other node's answer alone"
            ));
        }
        lines.extend(out.iter().map(|line| format!("this node: {line}")));
        lines.extend(said(told, About::Probes).map(|line| format!("{node}: {line}")));
        lines.push(format!("{node}: {}", answering(figures, told)));
        lines.extend(unseen(figures, there).map(|why| format!("{node}: {why}")));
        lines.extend(said(told, About::Answers).map(|line| format!("back from {node}: {line}")));
        let mut back = sight.told(Direction::Decap, &Since::Left, "no answer");
        let came = sight.passed(Direction::Decap);
        if came > figures.answered {
            back.push(format!(
                "{} that came did not reach the daemon: ask this node's own firewall, and what its kernel counts as \
                 dropped (nstat -az)",
                came - figures.answered
            ));
        }
        back.extend(sight.doubts());
        lines.extend(back.iter().map(|line| format!("back here: {line}")));
        if let Some(rtt) = figures.rtt_us {
            lines.push(format!(
                "there and back in {:.2} to {:.2} ms",
                millis(rtt.min),
                millis(rtt.max)
            ));
        }
        lines.extend(self.passed(figures, told).lost(node));
        lines
    }

    /// How many were seen where.
    fn passed(&self, figures: &Figures, told: Option<&Sights>) -> Passed {
        let here = |direction| {
            let passed = self.sight.passed(direction);
            self.sight.is_whole().then_some(passed)
        };
        let whole = told.filter(|sights| sights.whole);
        let there = |count: fn(&Sights) -> u16| whole.map(|sights| u32::from(count(sights)));
        Passed {
            sent: figures.sent,
            left: here(Direction::Encap),
            came: there(|sights| sights.came),
            taken: told.map(|sights| sights.taken.into()),
            answers_left: there(|sights| sights.left),
            answers_came: here(Direction::Decap),
            answered: figures.answered,
        }
    }
}

impl Way {
    /// Sends as a pod would where that can be: routes have no address of their own.
    async fn prober(&self) -> io::Result<Prober> {
        let addr = self.to.ip();
        if let Some(path) = self.directory.path_from_bridge(addr)
            && let Ok(prober) = Prober::probes(&self.directory, &path, self.to).await
        {
            return Ok(prober);
        }
        let path = self.directory.path_to(addr);
        Prober::probes(&self.directory, &path, self.to).await
    }

    fn unsendable(&self, error: &io::Error) -> String {
        let local = self.directory.path_to(self.to.ip()).local;
        match (error.kind(), local) {
            (io::ErrorKind::AddrNotAvailable, Some(local)) => format!(
                "no probe can be sent from {local}: no device has it, or the kernel still looks for another node that does \
                 (ip addr show, tentative): ask again in a few seconds"
            ),
            _ => format!("no probe can be sent to {}: {error}", self.to),
        }
    }

    /// Has the other node look out for these probes, or tell what it saw: by whichever way it says so first.
    async fn order(&self, nonce: u64, order: Order) -> Option<Sights> {
        let ask = |to: SocketAddr| async move {
            let path = self.directory.path_to(to.ip());
            let mut prober = Prober::probes(&self.directory, &path, to).await.ok()?;
            prober.watch(nonce, order, ORDER_PATIENCE).await
        };
        let mut asked: FuturesUnordered<_> = self.orders.iter().copied().map(ask).collect();
        while let Some(said) = asked.next().await {
            if said.is_some() {
                return said;
            }
        }
        None
    }
}

/// What the other node told about its part of the way.
fn said(told: Option<&Sights>, about: About) -> impl Iterator<Item = &str> {
    let lines = told.into_iter().flat_map(|sights| &sights.lines);
    let lines = lines.filter(move |(of, _)| *of == about);
    let more = told.is_some_and(|sights| sights.more) && about == About::Answers;
    let more = more.then_some("it saw more than it could tell");
    lines.map(|(_, line)| line.as_str()).chain(more)
}

/// Why nothing is known of the other node's links, though it answers.
fn unseen(figures: &Figures, there: Option<&Sights>) -> Option<String> {
    let why = match there.map(|sights| sights.standing) {
        Some(Standing::Told) => return None,
        Some(Standing::Busy) => {
            "it watches its links for as many traces as it may, one of each peer: ask again in a moment"
        }
        Some(Standing::Watches) => "it watched its links, and what it saw there did not come back",
        Some(Standing::Unwatched) => "it has forgotten what it saw on its links: trace again",
        None if figures.via_there.is_some() => {
            "its links are not seen: an older loden does not watch them"
        }
        None => return None,
    };
    Some(why.to_owned())
}

/// What the other node says of the probes.
fn answering(figures: &Figures, told: Option<&Sights>) -> String {
    let Some(via) = figures.via_there else {
        if let Some(sights) = told {
            return match sights.taken {
                0 => "its daemon took in none of them".to_owned(),
                taken => format!("its daemon took in {taken} of them, and no answer came back"),
            };
        }
        let said = figures.refused.as_ref();
        let said = said.map_or_else(String::new, |said| format!(" ({said})"));
        return format!("sight ends here: no daemon answers probes{said}");
    };
    let mut line = format!(
        "its daemon saw {} of them come in by {via}",
        figures.answered
    );
    if let Some(ttl) = figures.ttl_there {
        line = format!("{line}, with a TTL of {ttl}");
    }
    if let Some(len) = figures.len_there {
        line = format!("{line}, {len} bytes long");
    }
    line += ", and answered";
    if let Some(stay) = figures.stay_us {
        line = format!(
            "{line} after {:.2} to {:.2} ms",
            millis(stay.min),
            millis(stay.max)
        );
    }
    line
}

fn millis(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64() * 1e3
}
