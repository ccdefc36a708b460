//! Owns what this node sees of a trace's probes: by our workers, and where the kernel carries packets by packet sockets
//! on its links. Never says more than was seen, and says where sight ends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::sleep;

use crate::daemon::session::{Part, Session};
use crate::daemon::tunnel::Tunnel;
use crate::datapath::tap::filter::Filter;
use crate::datapath::tap::{Capture, Direction, Record, Verdict, Wanted, now_ns};
use crate::debug::pcapng::Outcome;
use crate::debug::watch::scene::{Kind, Place, names, reading};
use crate::probe::headers_len;
use crate::wire::probe::{Flags, HEADER_LEN, Probe};

/// Captures are looked at so often, this long apart, before what they do not show counts as not seen.
const LOOKS: u32 = 20;
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Bytes of records that are fetched in one look; three probes and their answers take a few hundred.
const ENOUGH: usize = 1 << 16;

/// What watches on this node.
pub(super) struct Sight {
    workers: Option<Eye>,
    sockets: Option<Eye>,
    /// What could not be watched, and why.
    blind: Vec<String>,
    /// Bytes in front of a probe.
    headers_len: u16,
}

/// One capture, and what it showed. Dropping it ends the capture.
struct Eye {
    capture: Capture,
    /// The links of its packet sockets; none, if it is of workers.
    places: Vec<Place>,
    seen: Vec<Seen>,
    /// All that passed before the last look is among them.
    complete: bool,
}

/// A probe or an answer, where it was seen.
struct Seen {
    record: Record,
    /// Since the request left.
    after: Duration,
}

impl Sight {
    /// Begins to watch what passes between this node and `port` of `to`.
    pub(super) fn begin(session: &Session, to: IpAddr, port: u16) -> Self {
        let mut sight = Self {
            workers: None,
            sockets: None,
            blind: Vec::new(),
            headers_len: headers_len(to),
        };
        let filter = match format!("udp port {port} and host {to}").parse::<Filter>() {
            Ok(filter) => filter,
            Err(error) => {
                sight.blind.push(error.to_string());
                return sight;
            }
        };
        let wanted = |segments| Wanted {
            filter: filter.clone(),
            snap_len: usize::from(headers_len(to)) + HEADER_LEN,
            segments,
        };
        let carrier = session.carrier.as_ref();
        let tunnel = carrier.and_then(|carrier| carrier.tunnel_of(to));
        let taps = tunnel.and_then(Tunnel::taps);
        match taps.map(|taps| taps.capture(wanted(true))) {
            Some(Ok(capture)) => sight.workers = Some(Eye::of(capture, Vec::new())),
            Some(Err(why)) => sight
                .blind
                .push(format!("its workers are not watched: {why}")),
            None => {}
        }
        // Probes are too far apart to be merged.
        match session.watch(wanted(false), Part::All) {
            Some(Ok((capture, places))) => sight.sockets = Some(Eye::of(capture, places)),
            Some(Err(why)) => {
                let why = format!("what the kernel carries is not watched: {why}");
                sight.blind.push(why);
            }
            None if tunnel.is_none() => {
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
        let headers_len = usize::from(self.headers_len);
        for eye in self.workers.iter_mut().chain(&mut self.sockets) {
            for _ in 0..LOOKS {
                if eye.look(nonce, headers_len, until) {
                    break;
                }
                sleep(LOOK_EVERY).await;
            }
        }
    }

    /// What became of the probes here.
    pub(super) fn out(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let places = self.sockets.as_ref().map(|eye| eye.places.as_slice());
        lines.extend(reading(places.unwrap_or_default()));
        lines.extend(self.blind.iter().cloned());
        lines.extend(self.told(Direction::Encap, "none of the probes"));
        lines.extend(self.sockets.as_ref().and_then(Eye::end));
        let whose = |line| format!("this node: {line}");
        lines.into_iter().map(whose).collect()
    }

    /// What became of the answers here, of which so many reached the daemon.
    pub(super) fn back(&self, answered: u32) -> Vec<String> {
        let mut lines = self.told(Direction::Decap, "no answer");
        let eyes = self.workers.iter().chain(&self.sockets);
        let came = eyes.flat_map(Eye::came).max().unwrap_or(0);
        if came > answered {
            lines.push(format!(
                "{} that came did not reach the daemon: ask this node's own firewall, and what its kernel counts as \
                 dropped (nstat -az)",
                came - answered
            ));
        }
        let eyes = self.workers.iter().chain(&self.sockets);
        lines.extend(eyes.filter_map(Eye::doubt));
        let whose = |line| format!("back here: {line}");
        lines.into_iter().map(whose).collect()
    }

    /// What was seen in a direction, or by whom it was not.
    fn told(&self, direction: Direction, none: &str) -> Vec<String> {
        let eyes = || self.workers.iter().chain(&self.sockets);
        let lines: Vec<String> = eyes().flat_map(|eye| eye.told(direction)).collect();
        if !lines.is_empty() {
            return lines;
        }
        let unseen = |eye: &Eye| match names(&eye.places) {
            links if links.is_empty() => format!("{none} reached its workers"),
            links => format!("{none} was seen on {links}"),
        };
        eyes().map(unseen).collect()
    }
}

impl Eye {
    const fn of(capture: Capture, places: Vec<Place>) -> Self {
        Self {
            capture,
            places,
            seen: Vec::new(),
            complete: false,
        }
    }

    /// Fetches what is there. Whether nothing that passed before `until` is missing.
    fn look(&mut self, nonce: u64, headers_len: usize, until: u64) -> bool {
        let settled = self.capture.settled();
        let mut bytes = Vec::new();
        let emptied = self.capture.take(&mut bytes, ENOUGH);
        let mut rest = bytes.as_slice();
        while let Ok((record, copied, after)) = Record::decode(rest) {
            rest = after;
            let probe = copied.get(usize::from(record.inner_at) + headers_len..);
            let Some(Ok(probe)) = probe.map(Probe::parse) else {
                continue;
            };
            if probe.nonce == nonce && probe.flags.has(Flags::TRACE) {
                let after = Duration::from_nanos(record.time_ns.saturating_sub(probe.left));
                self.seen.push(Seen { record, after });
            }
        }
        self.complete = emptied && settled >= until;
        self.complete
    }

    /// What was seen in one direction, in the order of the packet's way: where, what became of it, how many, and when.
    fn told(&self, direction: Direction) -> Vec<String> {
        let mut groups = BTreeMap::<(bool, usize, String), (u32, Duration, Duration)>::new();
        for Seen { record, after } in &self.seen {
            if record.direction != direction {
                continue;
            }
            // Workers are no places on a way.
            let link = usize::from(record.worker).min(self.places.len());
            let key = (self.is_underlay(record), link, Outcome(record).to_string());
            let group = groups.entry(key).or_insert((0, *after, *after));
            *group = (
                group.0 + record.packets,
                group.1.min(*after),
                group.2.max(*after),
            );
        }
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let line = |(key, group): ((bool, usize, String), (u32, Duration, Duration))| {
            let ((_, link, outcome), (count, first, last)) = (key, group);
            let at = match self.places.get(link) {
                Some(place) if matches!(place.kind, Kind::Outer(_)) => {
                    format!(" wrapped on {}:", place.device)
                }
                Some(place) => format!(" on {}:", place.device),
                None => String::new(),
            };
            format!(
                "{count}{at} {outcome}, {:.2} to {:.2} ms after the probe left",
                millis(first),
                millis(last)
            )
        };
        let lines = groups.into_iter().map(line);
        match direction {
            Direction::Encap => lines.collect(),
            Direction::Decap => lines.rev().collect(),
        }
    }

    /// Where sight of the probes ends, if the kernel had them.
    fn end(&self) -> Option<String> {
        let out = self.seen.iter().map(|seen| &seen.record);
        let out = out.filter(|record| record.direction == Direction::Encap);
        let last = out.max_by_key(|record| self.is_underlay(record))?;
        let place = self.places.get(usize::from(last.worker))?;
        let device = &place.device;
        let Kind::Inner(tunnel) = place.kind else {
            return Some(format!(
                "sight ends behind {device}: what the underlay does is told by the other node's answer alone"
            ));
        };
        let mut carriers = self.places.clone();
        carriers.retain(|place| place.kind == Kind::Outer(tunnel));
        Some(format!(
            "sight ends at {device}: nothing that wraps them was seen on {}, so this node's own firewall, routes or \
             neighbours keep it, or have another link for it",
            names(&carriers)
        ))
    }

    /// Whether it was seen on a link of the underlay, which is behind those of tunnels.
    fn is_underlay(&self, record: &Record) -> bool {
        let place = self.places.get(usize::from(record.worker));
        place.is_some_and(|place| !matches!(place.kind, Kind::Inner(_)))
    }

    /// How many came by each link, or to the workers.
    fn came(&self) -> impl Iterator<Item = u32> {
        let mut came = vec![0; self.places.len() + 1];
        for Seen { record, .. } in &self.seen {
            let is_here = matches!(record.verdict, Verdict::Arrived | Verdict::Delivered);
            let link = usize::from(record.worker).min(self.places.len());
            if let Some(count) = came.get_mut(link).filter(|_| is_here) {
                *count += record.packets;
            }
        }
        came.into_iter()
    }

    /// Why what was not seen may have passed all the same.
    fn doubt(&self) -> Option<String> {
        let who = match names(&self.places) {
            links if links.is_empty() => "its workers".to_owned(),
            links => format!("the packet sockets on {links}"),
        };
        let lost = self.capture.lost().packets;
        let why = if self.capture.is_over() {
            "were closed meanwhile".to_owned()
        } else if lost > 0 {
            format!("could not keep {lost} packets")
        } else if !self.complete {
            "were not read to their end".to_owned()
        } else {
            return None;
        };
        Some(format!("{who} {why}: what is missing may have passed"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::datapath::tap::{Cut, Form, Seen as Noted, Tap, Taps};
    use crate::debug::watch::scene::Tunnel;
    use crate::wire::probe::{Identity, Kind as ProbeKind};

    const NONCE: u64 = 7;
    const HEADERS_LEN: usize = 28;

    fn packet(in_front: usize, nonce: u64, flags: Flags) -> Vec<u8> {
        let mut bytes = vec![0; in_front + HEADERS_LEN + HEADER_LEN];
        let mut probe = Probe::request(ProbeKind::Request, 1, nonce, Identity::default());
        probe.flags = flags;
        probe.left = 1_000_000;
        probe.write(&mut bytes[in_front + HEADERS_LEN..]);
        bytes
    }

    /// An underlay link, then a tunnel device, as where there are devices of two families.
    fn eye() -> (Eye, [Tap; 2]) {
        let tunnel = Tunnel::Vxlan { port: 8472, vni: 1 };
        let place = |device: &str, index, kind| Place {
            device: device.to_owned(),
            index,
            kind,
        };
        let places = vec![
            place("eth0", 1, Kind::Outer(tunnel)),
            place("flannel.1", 2, Kind::Inner(tunnel)),
        ];
        let transports = places.iter().map(Place::transport).collect();
        let taps = Arc::new(Taps::beside(transports, Arc::default()));
        let capture = taps.capture(Wanted {
            filter: Filter::default(),
            snap_len: HEADERS_LEN + HEADER_LEN,
            segments: false,
        });
        let taps = [0, 1].map(|worker| Tap::new(&taps, worker));
        for tap in &taps {
            tap.begin();
        }
        (Eye::of(capture.unwrap(), places), taps)
    }

    fn note(tap: &Tap, inner_at: u8, bytes: &[u8], micros: u64) {
        tap.set_time(1_000_000 + micros * 1000);
        let seen = Noted {
            direction: Direction::Encap,
            verdict: Verdict::Handed,
            outer: None,
            local_port: 0,
            tos: 0,
            packets: 1,
        };
        let cut = Cut {
            inner_at,
            len: None,
        };
        tap.note_cut(Form::Any, cut, || (seen, [bytes]));
    }

    #[test]
    fn only_marked_probes_of_this_trace_are_told_with_their_times_in_the_order_of_their_way() {
        let (mut eye, [eth0, flannel]) = eye();
        let marked = packet(0, NONCE, Flags::TRACE);
        note(&flannel, 0, &marked, 20);
        note(&flannel, 0, &marked, 1500);
        note(&flannel, 0, &packet(0, NONCE + 1, Flags::TRACE), 30);
        note(&flannel, 0, &packet(0, NONCE, Flags::FULL), 30);
        note(&flannel, 0, &marked[..HEADERS_LEN + 3], 30);
        flannel.end();
        // A socket that has not been read yet.
        assert!(!eye.look(NONCE, HEADERS_LEN, now_ns()));
        let end = eye.end().unwrap();
        let expected = "sight ends at flannel.1: nothing that wraps them was seen on eth0";
        assert!(end.starts_with(expected), "{end}");
        note(&eth0, 50, &packet(50, NONCE, Flags::TRACE), 40);
        eth0.end();
        assert!(eye.look(NONCE, HEADERS_LEN, now_ns()));
        assert_eq!(
            eye.told(Direction::Encap),
            [
                "2 on flannel.1: handed to the kernel, 0.02 to 1.50 ms after the probe left",
                "1 wrapped on eth0: handed to the kernel, 0.04 to 0.04 ms after the probe left",
            ]
        );
        assert!(eye.told(Direction::Decap).is_empty());
        assert!(eye.end().unwrap().starts_with("sight ends behind eth0"));
        assert_eq!(eye.doubt(), None);
    }

    #[test]
    fn what_was_not_read_makes_what_was_not_seen_doubtful() {
        let (mut eye, [eth0, flannel]) = eye();
        eye.look(NONCE, HEADERS_LEN, now_ns());
        let doubt = eye.doubt().unwrap();
        assert!(doubt.contains("eth0, flannel.1 were not read"), "{doubt}");
        eth0.lose(3);
        let doubt = eye.doubt().unwrap();
        assert!(doubt.contains("could not keep 3 packets"), "{doubt}");
        drop((eth0, flannel));
        let doubt = eye.doubt().unwrap();
        assert!(doubt.contains("were closed meanwhile"), "{doubt}");
    }
}
