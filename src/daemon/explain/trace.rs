//! Owns following marked probes through both nodes' daemons: ours shows what it sees of each ([`Sight`]), and the
//! other's says what arrived. Never says more of a node than its daemon told.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use super::Explanation;
use super::sight::Sight;
use crate::backend::kernel::Kernel;
use crate::daemon::Daemon;
use crate::daemon::session::Session;
use crate::probe::prober::{Prober, Round};
use crate::probe::{Directory, Figures};
use crate::store::LeaseStore;

/// Marked probes: enough to tell a loss from a way that is closed.
const PROBES: u16 = 3;

/// How long answers are waited for.
const PATIENCE: Duration = Duration::from_millis(500);

/// What a trace needs of the daemon.
pub(in crate::daemon) struct Trace {
    directory: Arc<Directory>,
    to: SocketAddr,
    len: u16,
    sight: Sight,
    /// The other node.
    node: String,
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
        Ok(Self {
            directory: Arc::clone(&session.directory),
            to: SocketAddr::new(to, port),
            len,
            sight: Sight::begin(session, to, port),
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
        let path = self.directory.path_to(self.to.ip());
        let mut prober = match Prober::probes(&self.directory, &path, self.to).await {
            Ok(prober) => prober,
            Err(error) => return vec![format!("no probe can be sent to {}: {error}", self.to)],
        };
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
        self.sight.fetch(prober.nonce()).await;
        let mut lines = vec![format!(
            "{} marked probes of {} bytes to {}",
            figures.sent, self.len, self.to
        )];
        lines.extend(self.sight.out());
        lines.push(format!("{}: {}", self.node, there(&figures)));
        lines.extend(self.sight.back(figures.answered));
        if let Some(rtt) = figures.rtt_us {
            lines.push(format!(
                "there and back in {:.2} to {:.2} ms",
                millis(rtt.min),
                millis(rtt.max)
            ));
        }
        lines
    }
}

/// What the other node says of the probes.
fn there(figures: &Figures) -> String {
    let Some(via) = figures.via_there else {
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
