//! Owns what one capture shows of a trace's probes: where, how many, what became of them, and when. Never says more than
//! was seen.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::datapath::tap::{Capture, Direction, Record, Verdict};
use crate::debug::pcapng::Outcome;
use crate::debug::watch::scene::{Kind, Place, names};
use crate::wire::ipv6;
use crate::wire::probe::{Flags, HEADER_LEN, Probe};
use crate::wire::udp;

/// Bytes of a probe's packet that are looked at, of either family.
pub(super) const SNAP_LEN: usize = ipv6::HEADER_LEN + udp::HEADER_LEN + HEADER_LEN;

/// Bytes of records that are fetched in one look; three probes and their answers take a few hundred.
const ENOUGH: usize = 1 << 16;

/// One capture, and what it showed. Dropping it ends the capture.
pub(super) struct Eye {
    capture: Capture,
    /// The links of its packet sockets; none, if it is of workers.
    pub(super) places: Vec<Place>,
    seen: Vec<Seen>,
    /// All that passed before the last look is among them.
    complete: bool,
}

/// A probe or an answer, where it was seen.
struct Seen {
    record: Record,
    /// Of the probe, and of the answer to it.
    sequence: u32,
    /// When the probe left the node that traces, by that node's clock.
    left_ns: u64,
}

/// What times are counted from.
pub(super) enum Since {
    /// When the probe left this node.
    Left,
    /// When each was first seen here, in nanoseconds since 1970, by its sequence number.
    Came(BTreeMap<u32, u64>),
}

impl Since {
    fn began(&self, seen: &Seen) -> u64 {
        match self {
            Self::Left => seen.left_ns,
            Self::Came(firsts) => {
                let first = firsts.get(&seen.sequence);
                first.copied().unwrap_or(seen.record.time_ns)
            }
        }
    }

    const fn what(&self) -> &'static str {
        match self {
            Self::Left => "after the probe left",
            Self::Came(_) => "after the probe came",
        }
    }
}

impl Eye {
    pub(super) const fn of(capture: Capture, places: Vec<Place>) -> Self {
        Self {
            capture,
            places,
            seen: Vec::new(),
            complete: false,
        }
    }

    /// Takes another capture of workers in.
    pub(super) fn join(&mut self, other: Capture) {
        self.capture.join(other);
    }

    /// Fetches what is there. Whether nothing that passed before `until` is missing.
    pub(super) fn look(&mut self, nonce: u64, until: u64) -> bool {
        let settled = self.capture.settled();
        let mut bytes = Vec::new();
        let emptied = self.capture.take(&mut bytes, ENOUGH);
        let mut rest = bytes.as_slice();
        while let Ok((record, copied, after)) = Record::decode(rest) {
            rest = after;
            let packet = copied.get(usize::from(record.inner_at)..);
            let Some(Ok(probe)) = packet.and_then(payload).map(Probe::parse) else {
                continue;
            };
            if probe.nonce == nonce && probe.flags.has(Flags::TRACE) {
                self.seen.push(Seen {
                    record,
                    sequence: probe.sequence,
                    left_ns: probe.left,
                });
            }
        }
        self.complete = emptied && settled >= until;
        self.complete
    }

    /// When each probe was first seen, by its sequence number.
    pub(super) fn firsts(&self) -> impl Iterator<Item = (u32, u64)> {
        let seen = self.seen.iter();
        seen.map(|seen| (seen.sequence, seen.record.time_ns))
    }

    /// What was seen in one direction, in the order of the packet's way: where, what became of it, how many, and when.
    pub(super) fn told(&self, direction: Direction, since: &Since) -> Vec<String> {
        let mut groups = BTreeMap::<(bool, usize, String), (u32, Duration, Duration)>::new();
        for seen in self.seen_in(direction) {
            let record = &seen.record;
            let after = Duration::from_nanos(record.time_ns.saturating_sub(since.began(seen)));
            // Workers are no places on a way.
            let link = usize::from(record.worker).min(self.places.len());
            let key = (self.is_underlay(record), link, Outcome(record).to_string());
            let group = groups.entry(key).or_insert((0, after, after));
            *group = (
                group.0 + record.packets,
                group.1.min(after),
                group.2.max(after),
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
                "{count}{at} {outcome}, {:.2} to {:.2} ms {}",
                millis(first),
                millis(last),
                since.what()
            )
        };
        let lines = groups.into_iter().map(line);
        match direction {
            Direction::Encap => lines.collect(),
            Direction::Decap => lines.rev().collect(),
        }
    }

    /// That those of a direction were not seen.
    pub(super) fn unseen(&self, none: &str) -> String {
        match names(&self.places) {
            links if links.is_empty() => format!("{none} reached its workers"),
            links => format!("{none} was seen on {links}"),
        }
    }

    /// Where the node itself keeps those of a direction, if a tunnel of the kernel's has only one end of their way.
    pub(super) fn kept(&self, direction: Direction) -> Option<String> {
        let kinds: Vec<&Place> = self
            .seen_in(direction)
            .filter_map(|seen| self.place(&seen.record))
            .collect();
        let has = |wanted: fn(&Kind) -> bool| kinds.iter().find(|place| wanted(&place.kind));
        let inner = has(|kind| matches!(kind, Kind::Inner(_)));
        let outer = has(|kind| !matches!(kind, Kind::Inner(_)));
        let missing = |wanted: &dyn Fn(&Kind) -> bool| {
            let mut places = self.places.clone();
            places.retain(|place| wanted(&place.kind));
            names(&places)
        };
        match (direction, inner, outer) {
            (Direction::Encap, Some(Place { device, kind, .. }), None) => {
                let Kind::Inner(tunnel) = kind else {
                    return None;
                };
                let carriers = missing(&|kind| *kind == Kind::Outer(*tunnel));
                Some(format!(
                    "sight ends at {device}: nothing that wraps them was seen on {carriers}, so its own firewall, routes \
                     or neighbours keep it, or have another link for it"
                ))
            }
            (Direction::Decap, None, Some(Place { device, kind, .. })) => {
                let Kind::Outer(tunnel) = kind else {
                    return None;
                };
                let devices = missing(&|kind| *kind == Kind::Inner(*tunnel));
                Some(format!(
                    "sight ends at {device}: nothing unwrapped was seen on {devices}, so its own firewall keeps it, or the \
                     device is down or takes it for another's"
                ))
            }
            _ => None,
        }
    }

    /// The link of the underlay that they left by.
    pub(super) fn behind(&self) -> Option<&str> {
        let mut out = self.seen_in(Direction::Encap);
        let last = out.find(|seen| self.is_underlay(&seen.record))?;
        Some(&self.place(&last.record)?.device)
    }

    /// The probes, or their answers, that passed in a direction: that left by the underlay or were sent, or that came by
    /// whichever link.
    pub(super) fn passed(&self, direction: Direction) -> BTreeSet<u32> {
        let passes = |seen: &&Seen| {
            let record = &seen.record;
            match record.verdict {
                Verdict::Handed => self.is_underlay(record),
                Verdict::Sent | Verdict::Fragmented | Verdict::Delivered | Verdict::Arrived => true,
                Verdict::Answered(_) | Verdict::Dropped(_) => false,
            }
        };
        let passed = self.seen_in(direction).filter(passes);
        passed.map(|seen| seen.sequence).collect()
    }

    /// Why what was not seen may have passed all the same.
    pub(super) fn doubt(&self) -> Option<String> {
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

    fn seen_in(&self, direction: Direction) -> impl Iterator<Item = &Seen> {
        let seen = self.seen.iter();
        seen.filter(move |seen| seen.record.direction == direction)
    }

    fn place(&self, record: &Record) -> Option<&Place> {
        self.places.get(usize::from(record.worker))
    }

    /// Whether it was seen on a link of the underlay, which is behind those of tunnels.
    fn is_underlay(&self, record: &Record) -> bool {
        let place = self.place(record);
        place.is_some_and(|place| !matches!(place.kind, Kind::Inner(_)))
    }
}

/// What a packet without options has behind its UDP header.
fn payload(packet: &[u8]) -> Option<&[u8]> {
    let ip_len = match packet.first()? >> 4 {
        4 => 20,
        _ => ipv6::HEADER_LEN,
    };
    packet.get(ip_len + udp::HEADER_LEN..)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::datapath::tap::filter::Filter;
    use crate::datapath::tap::{Cut, Form, Seen as Noted, Tap, Taps, Wanted, now_ns};
    use crate::debug::watch::scene::Tunnel;
    use crate::wire::probe::{Identity, Kind as ProbeKind};

    const NONCE: u64 = 7;
    const HEADERS_LEN: usize = 28;

    fn packet(in_front: usize, nonce: u64, flags: Flags) -> Vec<u8> {
        let mut bytes = vec![0; in_front + HEADERS_LEN + HEADER_LEN];
        bytes[in_front] = 0x45;
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
        assert!(!eye.look(NONCE, now_ns()));
        let end = eye.kept(Direction::Encap).unwrap();
        let expected = "sight ends at flannel.1: nothing that wraps them was seen on eth0";
        assert!(end.starts_with(expected), "{end}");
        note(&eth0, 50, &packet(50, NONCE, Flags::TRACE), 40);
        eth0.end();
        assert!(eye.look(NONCE, now_ns()));
        assert_eq!(
            eye.told(Direction::Encap, &Since::Left),
            [
                "2 on flannel.1: handed to the kernel, 0.02 to 1.50 ms after the probe left",
                "1 wrapped on eth0: handed to the kernel, 0.04 to 0.04 ms after the probe left",
            ]
        );
        assert!(eye.told(Direction::Decap, &Since::Left).is_empty());
        assert_eq!(eye.kept(Direction::Encap), None);
        assert_eq!(eye.behind(), Some("eth0"));
        assert_eq!(eye.doubt(), None);
    }

    #[test]
    fn what_was_not_read_makes_what_was_not_seen_doubtful() {
        let (mut eye, [eth0, flannel]) = eye();
        eye.look(NONCE, now_ns());
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
