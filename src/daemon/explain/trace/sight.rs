//! Owns what a node sees of a trace's probes: by our workers, and where the kernel carries packets by packet sockets
//! on its links. Never says more than was seen, and says where sight ends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::eye::{Eye, SNAP_LEN, Since};
use crate::daemon::carrier::Carrier;
use crate::daemon::session::{Part, Session, Whose};
use crate::daemon::tunnel::Tunnel;
use crate::datapath::tap::filter::Filter;
use crate::datapath::tap::{Capture, Direction, TooMany, Wanted, now_ns};
use crate::debug::watch::scene::reading;

/// Captures are looked at so often, this long apart, before what they do not show counts as not seen.
const LOOKS: u32 = 20;
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What watches on this node.
pub(super) struct Sight {
    workers: Option<Eye>,
    sockets: Option<Eye>,
    /// What could not be watched, and why.
    blind: Vec<String>,
}

impl Sight {
    /// Begins to watch what passes between this node and `port` of these addresses, or their owner and ours.
    pub(super) fn begin(session: &Session, ends: &[IpAddr], port: u16, whose: Whose) -> Self {
        let mut sight = Self {
            workers: None,
            sockets: None,
            blind: Vec::new(),
        };
        let hosts: Vec<String> = ends.iter().map(|end| format!("host {end}")).collect();
        let filter = format!("udp port {port} and ({})", hosts.join(" or "));
        let filter = match filter.parse::<Filter>() {
            Ok(filter) => filter,
            Err(error) => {
                sight.blind.push(error.to_string());
                return sight;
            }
        };
        let wanted = |segments| Wanted {
            filter: filter.clone(),
            snap_len: SNAP_LEN,
            segments,
        };
        let tunnels = tunnels(session.carrier.as_ref(), ends);
        for tunnel in &tunnels {
            match capture(tunnel, wanted(true), whose) {
                Some(Ok(capture)) => match &mut sight.workers {
                    Some(eye) => eye.join(capture),
                    None => sight.workers = Some(Eye::of(capture, Vec::new())),
                },
                Some(Err(why)) => sight
                    .blind
                    .push(format!("its workers are not watched: {why}")),
                None => {}
            }
        }
        // Probes are too far apart to be merged.
        match session.watch(wanted(false), Part::All, whose) {
            Some(Ok((capture, places))) => sight.sockets = Some(Eye::of(capture, places)),
            Some(Err(why)) => {
                let why = format!("what the kernel carries is not watched: {why}");
                sight.blind.push(why);
            }
            None if tunnels.is_empty() => {
                let plan = session.registration.plan.name();
                let why = format!("the {plan} backend leaves the packets to others");
                sight.blind.push(why);
            }
            None => {}
        }
        sight
    }

    /// Fetches what was seen until now of the marked probes with this nonce. A worker shows a packet after it has sent it,
    /// and a packet socket is read now and then: either may be after the answer has come.
    pub(super) async fn fetch(&mut self, nonce: u64) {
        let until = now_ns();
        for eye in self.workers.iter_mut().chain(&mut self.sockets) {
            for _ in 0..LOOKS {
                if eye.look(nonce, until) {
                    break;
                }
                sleep(LOOK_EVERY).await;
            }
        }
    }

    /// By what it is watched, and what is not.
    pub(super) fn watching(&self) -> Vec<String> {
        let places = self.sockets.as_ref().map(|eye| eye.places.as_slice());
        let read = reading(places.unwrap_or_default()).into_iter();
        read.chain(self.blind.iter().cloned()).collect()
    }

    /// What was seen in a direction, or by whom it was not: `none` of them.
    pub(super) fn told(&self, direction: Direction, since: &Since, none: &str) -> Vec<String> {
        let lines = self.eyes().flat_map(|eye| eye.told(direction, since));
        let lines: Vec<String> = lines.collect();
        if lines.is_empty() {
            return self.eyes().map(|eye| eye.unseen(none)).collect();
        }
        let kept = self.sockets.as_ref().and_then(|eye| eye.kept(direction));
        lines.into_iter().chain(kept).collect()
    }

    /// Times from when each probe came to this node.
    pub(super) fn since_came(&self) -> Since {
        let mut firsts = BTreeMap::new();
        for (sequence, time_ns) in self.eyes().flat_map(Eye::firsts) {
            let first = firsts.entry(sequence).or_insert(time_ns);
            *first = time_ns.min(*first);
        }
        Since::Came(firsts)
    }

    /// The link of the underlay that the kernel sent them by.
    pub(super) fn behind(&self) -> Option<&str> {
        self.sockets.as_ref()?.behind()
    }

    /// How many passed in a direction: left this node, or came by one of its links.
    pub(super) fn passed(&self, direction: Direction) -> u32 {
        let passed: BTreeSet<u32> = self.eyes().flat_map(|eye| eye.passed(direction)).collect();
        u32::try_from(passed.len()).unwrap_or(u32::MAX)
    }

    /// Why what was not seen may have passed all the same.
    pub(super) fn doubts(&self) -> Vec<String> {
        self.eyes().filter_map(Eye::doubt).collect()
    }

    /// Whether whatever passes this node is seen.
    pub(super) fn is_whole(&self) -> bool {
        let sees = self.eyes().next().is_some();
        sees && self.blind.is_empty() && self.doubts().is_empty()
    }

    fn eyes(&self) -> impl Iterator<Item = &Eye> {
        self.workers.iter().chain(&self.sockets)
    }
}

/// Our tunnels that carry what goes to these addresses or comes from them.
fn tunnels<'a>(carrier: Option<&'a Carrier>, ends: &[IpAddr]) -> Vec<&'a Tunnel> {
    let mut tunnels: Vec<&Tunnel> = Vec::new();
    for end in ends {
        if let Some(tunnel) = carrier.and_then(|carrier| carrier.tunnel_of(*end))
            && !tunnels.iter().any(|one| std::ptr::eq(*one, tunnel))
        {
            tunnels.push(tunnel);
        }
    }
    tunnels
}

/// Begins a capture of a tunnel's workers; none while they end.
fn capture(tunnel: &Tunnel, wanted: Wanted, whose: Whose) -> Option<Result<Capture, TooMany>> {
    let taps = tunnel.taps()?;
    Some(match whose {
        Whose::Clients => taps.capture(wanted),
        Whose::Peer => taps.capture_beside(wanted, &Arc::default()),
    })
}
