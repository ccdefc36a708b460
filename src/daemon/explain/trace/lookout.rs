//! Owns looking out for the probes of peers' traces, and telling what was seen of them. Never looks out for more than
//! [`AT_ONCE`] at once, or for longer than [`LASTS`], whatever peers ask.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::sight::Sight;
use crate::daemon::session::{Session, Whose};
use crate::datapath::tap::Direction;
use crate::lease::Subnets;
use crate::probe::directory::Peer;
use crate::probe::responder::Told;
use crate::telemetry::rate_limit::Allowance;
use crate::wire::probe::{About, Order, Sights, Standing};

/// Traces that are watched at once, one of each peer. They do not count among the captures of this node's clients.
const AT_ONCE: usize = 4;

/// Traces that begin in a second: each opens sockets and starts a thread.
const PER_SECOND: u32 = 20;

/// Orders to tell that may wait: they come through the overlay and past it at once, each again where no answer comes.
const ORDERS: usize = 8;

/// How long a trace is watched, and what was seen is remembered. One takes two seconds where nothing is answered, and what
/// stands still meanwhile is not to end it.
const LASTS: Duration = Duration::from_secs(5);

/// What looks out for peers.
pub(in crate::daemon) struct Lookouts {
    posts: HashMap<Subnets, Post>,
    begun: Allowance,
}

/// One trace that is watched. Dropping it ends that.
struct Post {
    nonce: u64,
    /// Nothing is watched any more.
    told: Arc<AtomicBool>,
    orders: mpsc::Sender<oneshot::Sender<Told>>,
}

impl Post {
    fn watches(&self) -> bool {
        !self.told.load(Ordering::Relaxed) && !self.orders.is_closed()
    }
}

impl Default for Lookouts {
    fn default() -> Self {
        Self {
            posts: HashMap::new(),
            begun: Allowance::new(PER_SECOND, Duration::from_secs(1)),
        }
    }
}

impl Lookouts {
    /// Does what a peer orders for its trace with this nonce, whose probes go to `port`.
    pub(in crate::daemon) fn order(
        &mut self,
        session: &Session,
        peer: &Arc<Peer>,
        (nonce, order): (u64, Order),
        port: u16,
        answer: oneshot::Sender<Told>,
    ) {
        self.posts.retain(|_, post| !post.orders.is_closed());
        let own = self.posts.get(&peer.subnets);
        let watches_other = own.is_some_and(Post::watches);
        let known = own.filter(|post| post.nonce == nonce);
        let is_known = known.is_some();
        if let (Order::Tell, Some(post)) = (order, known) {
            // A peer that asks more often than it should gets fewer answers.
            let _full = post.orders.try_send(answer);
            return;
        }
        let standing = if order == Order::Tell {
            Standing::Unwatched
        } else if is_known {
            Standing::Watches
        } else if watches_other || self.is_busy(Instant::now()) {
            Standing::Busy
        } else {
            self.begin(session, peer, nonce, port);
            Standing::Watches
        };
        // Who asked may have given up.
        let _gone = answer.send(standing.into());
    }

    fn is_busy(&mut self, now: Instant) -> bool {
        let watching = self.posts.values().filter(|post| post.watches()).count();
        watching >= AT_ONCE || !self.begun.allow(now)
    }

    fn begin(&mut self, session: &Session, peer: &Arc<Peer>, nonce: u64, port: u16) {
        let ends: Vec<_> = peer
            .overlay_addrs()
            .chain(peer.public.iter().copied())
            .collect();
        let watch = Watch {
            sight: Sight::begin(session, &ends, port, Whose::Peer),
            peer: Arc::clone(peer),
            nonce,
        };
        let (orders, received) = mpsc::channel(ORDERS);
        let told = Arc::new(AtomicBool::new(false));
        let post = Post {
            nonce,
            told: Arc::clone(&told),
            orders,
        };
        self.posts.insert(peer.subnets, post);
        // Without an order in time, nothing is told.
        tokio::spawn(async move {
            let _over = timeout(LASTS, keep(watch, received, &told)).await;
        });
    }
}

/// Watches until it is asked, then tells the same to whoever asks again.
async fn keep(watch: Watch, mut orders: mpsc::Receiver<oneshot::Sender<Told>>, told: &AtomicBool) {
    let Some(first) = orders.recv().await else {
        return;
    };
    let sights = watch.end().await;
    told.store(true, Ordering::Relaxed);
    let mut next = Some(first);
    while let Some(answer) = next {
        let _gone = answer.send(Told::Sights(sights.clone()));
        next = orders.recv().await;
    }
}

/// What watches for one trace.
struct Watch {
    sight: Sight,
    peer: Arc<Peer>,
    nonce: u64,
}

impl Watch {
    /// Watches no longer, and says what was seen.
    async fn end(mut self) -> Sights {
        self.sight.fetch(self.nonce).await;
        let sight = &self.sight;
        let traced = self.peer.traced(self.nonce);
        let taken = traced.map_or(0, |traced| u32::from(traced.taken));
        let came = sight.passed(Direction::Decap);
        let since = sight.since_came();
        let mut probes = sight.watching();
        probes.extend(sight.told(Direction::Decap, &since, "none of the probes"));
        if came > taken {
            probes.push(format!(
                "{} that came did not reach its daemon: ask its own firewall, its routes back (reverse path filter), \
                 and what its kernel counts as dropped (nstat -az)",
                came - taken
            ));
        }
        let mut answers = Vec::new();
        if let Some(errno) = traced.and_then(|traced| traced.refused) {
            let error = io::Error::from_raw_os_error(errno);
            answers.push(format!("its kernel does not send them: {error}"));
        }
        answers.extend(sight.told(Direction::Encap, &since, "none"));
        answers.extend(sight.doubts());
        let probes = probes.into_iter().map(|line| (About::Probes, line));
        let answers = answers.into_iter().map(|line| (About::Answers, line));
        let short = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        Sights {
            standing: Standing::Told,
            whole: sight.is_whole(),
            more: false,
            came: short(came),
            taken: short(taken),
            left: short(sight.passed(Direction::Encap)),
            lines: probes.chain(answers).collect(),
        }
    }
}
