//! Owns the difference between what the kernel should hold for the peers and what it does hold. Pure and
//! level-triggered: the same difference serves the start, every change and every look.

mod resolved;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::desired::{Candidate, Desired, Device, Refused, Senders, Way};
use super::kernel::{Edit, Forward, Neighbour, PROTOCOL_BOOT, PROTOCOL_LODEN, Route};
use super::on_link::OnLink;
use crate::addr::Origin;
use crate::lease::Subnets;
use resolved::Resolved;

/// What the kernel holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// The numbers of [`Desired::devices`], in their order.
    pub devices: Vec<u32>,
    /// The numbers of all links that are named like a device of flannel's.
    pub flannels: Vec<u32>,
    /// The routes of the main table.
    pub routes: Vec<Route>,
    /// The routes that only probes take.
    pub probe_routes: Vec<Route>,
    /// The permanent neighbours of the devices.
    pub neighbours: Vec<Neighbour>,
    /// The permanent forwarding entries of the devices.
    pub forwards: Vec<Forward>,
    /// Whom tunnels of other people receive from, of the kind of our devices.
    pub others: BTreeSet<IpAddr>,
    /// Tunnels of other people receive on the port of our devices.
    pub shared: bool,
}

/// One change, and the peer for whom it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The change.
    pub edit: Edit,
    /// The lease; `None` where something stale goes.
    pub lease: Option<Subnets>,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Difference {
    /// The changes, in an order that works.
    pub steps: Vec<Step>,
    /// Peers that get no way.
    pub refused: Vec<Refused>,
    /// The subnets that are reached by a route through their node.
    pub direct: HashSet<IpNet>,
    /// The links that those routes lead by.
    pub direct_links: BTreeSet<u32>,
    /// Who may send through the devices; none as long as not all peers are known.
    pub senders: Option<Senders>,
    /// Peers whose way past the tunnel can be probed.
    pub candidates: Vec<Candidate>,
    /// The subnets whose way past the tunnel is to be probed and cannot be: they are on no link.
    pub distant: HashSet<IpNet>,
}

/// The changes that lead from `observed` to `desired`.
///
/// Stale routes go first, since they may cover others; then a peer's neighbour and forwarding entry come before
/// its route, so that no packet finds the route without them; what no route needs any more goes last.
#[must_use]
pub fn difference(desired: &Desired, observed: &Observed) -> Difference {
    let mut resolved = Resolved::default();
    let observer = Observer::new(desired, observed);
    for peer in &desired.peers {
        if let Err(why) = resolved.add(peer, observed, &observer) {
            let lease = peer.lease;
            resolved.refused.push(Refused { lease, why });
        }
    }
    let mut steps = stale_routes(desired, observed, &resolved, &observer);
    steps.extend(missing_entries(observed, &resolved));
    steps.append(&mut resolved.route_steps);
    steps.extend(stale_entries(desired, observed, &resolved));
    steps.extend(probe_steps(observed, &resolved));
    let senders = desired
        .complete
        .then(|| senders(desired, observed, &resolved));
    Difference {
        senders,
        steps,
        refused: resolved.refused,
        direct: resolved.direct,
        direct_links: resolved.direct_links,
        candidates: resolved.candidates,
        distant: resolved.distant,
    }
}

/// What is looked up again and again.
struct Observer<'a> {
    on_link: OnLink,
    routes: HashMap<IpNet, Vec<&'a Route>>,
    publics: HashSet<IpAddr>,
    flannels: HashSet<u32>,
    networks: &'a [IpNet],
    own: &'a [IpNet],
}

impl<'a> Observer<'a> {
    fn new(desired: &'a Desired, observed: &'a Observed) -> Self {
        let inside = |net: &IpNet| desired.networks.iter().any(|network| network.contains(net));
        let mut routes: HashMap<IpNet, Vec<&Route>> = HashMap::new();
        for route in observed.routes.iter().filter(|route| inside(&route.net)) {
            routes.entry(route.net).or_default().push(route);
        }
        let retained = desired.retained.iter().filter_map(|lease| lease.public);
        let flannels = observed.devices.iter().chain(&observed.flannels);
        Self {
            on_link: OnLink::new(observed.routes.iter().filter(|route| !inside(&route.net))),
            routes,
            publics: desired
                .peers
                .iter()
                .map(|peer| peer.public)
                .chain(retained)
                .collect(),
            flannels: flannels.copied().collect(),
            networks: &desired.networks,
            own: &desired.own,
        }
    }

    fn inside(&self, net: &IpNet) -> bool {
        self.networks.iter().any(|network| network.contains(net))
    }

    /// Whether a route is ours to replace and remove: marked as ours, or left by the original inside the network
    /// on a device of its or through a known node.
    fn is_ours(&self, route: &Route) -> bool {
        let Some(gateway) = route.gateway else {
            return route.protocol == PROTOCOL_LODEN;
        };
        let originals = route.protocol == PROTOCOL_BOOT
            && !self.own.iter().any(|own| own.contains(&route.net))
            && (self.flannels.contains(&route.link) || self.publics.contains(&gateway));
        route.protocol == PROTOCOL_LODEN || originals
    }
}

/// The peers, and whoever uses another backend for now and is still reached through a device: by the entries that
/// stay there for it.
fn senders(desired: &Desired, observed: &Observed, resolved: &Resolved) -> Senders {
    let own = desired.devices.iter().filter_map(Device::receives_all_to);
    let mut senders = Senders {
        own: own.map(IpAddr::V4).collect(),
        others: observed.others.clone(),
        shared: observed.shared,
        ..Senders::default()
    };
    for peer in &desired.peers {
        let origin = match peer.way {
            Way::Vxlan { mac, .. } => Origin::Frame(mac),
            Way::Ipip { .. } => Origin::Datagram(peer.public),
            Way::Gateway { .. } | Way::Tunnel { .. } => continue,
        };
        if resolved.routes.contains(&peer.net) {
            senders.outer.insert(peer.public);
            senders.inner.insert((origin, peer.net));
        }
    }
    for lease in &desired.retained {
        let reaches_us = |from: &IpAddr| {
            senders
                .own
                .iter()
                .any(|own| own.is_ipv4() == from.is_ipv4())
        };
        if let Some(public) = lease.public.filter(reaches_us) {
            senders.outer.insert(public);
            senders.inner.insert((Origin::Datagram(public), lease.net));
        }
        let inside = |it: &&Neighbour| lease.net.contains(&it.ip);
        let macs = observed.neighbours.iter().filter(inside).map(|it| it.mac);
        for mac in macs {
            senders.inner.insert((Origin::Frame(mac), lease.net));
            let forwards = observed.forwards.iter().filter(|it| it.mac == mac);
            senders.outer.extend(forwards.map(|it| it.to));
        }
    }
    senders
}

fn stale_routes(
    desired: &Desired,
    observed: &Observed,
    resolved: &Resolved,
    observer: &Observer<'_>,
) -> Vec<Step> {
    if !desired.complete {
        return Vec::new();
    }
    let retained = |net: &IpNet| desired.retained.iter().any(|lease| lease.net == *net);
    let stale = observed.routes.iter().filter(|route| {
        observer.inside(&route.net)
            && observer.is_ours(route)
            && !(resolved.routes.contains(&route.net) && route.has_default_metric())
            && !retained(&route.net)
    });
    let step = |route: &Route| Step {
        edit: Edit::DeleteRoute(*route),
        lease: None,
    };
    stale.map(step).collect()
}

/// Makes the probes' table what the candidates need: it is wholly ours.
fn probe_steps(observed: &Observed, resolved: &Resolved) -> Vec<Step> {
    let wanted: HashMap<IpNet, Route> = resolved
        .candidates
        .iter()
        .map(|candidate| {
            let route = Route {
                net: candidate.net,
                link: candidate.link,
                gateway: Some(candidate.public),
                onlink: false,
                metric: None,
                protocol: PROTOCOL_LODEN,
            };
            (candidate.net, route)
        })
        .collect();
    let is_right = |route: &Route| {
        let wanted = wanted.get(&route.net);
        wanted.is_some_and(|wanted| wanted.same_way(route) && route.has_default_metric())
    };
    let (right, wrong): (Vec<&Route>, Vec<&Route>) = observed
        .probe_routes
        .iter()
        .partition(|route| is_right(route));
    let there: HashSet<IpNet> = right.iter().map(|route| route.net).collect();
    let stale = wrong
        .into_iter()
        .map(|route| Edit::DeleteProbeRoute(*route));
    let missing = wanted.values().filter(|route| !there.contains(&route.net));
    let edits = stale.chain(missing.copied().map(Edit::AddProbeRoute));
    edits.map(|edit| Step { edit, lease: None }).collect()
}

fn missing_entries(observed: &Observed, resolved: &Resolved) -> Vec<Step> {
    let neighbours: HashSet<&Neighbour> = observed.neighbours.iter().collect();
    let forwards: HashSet<&Forward> = observed.forwards.iter().collect();
    let missing = resolved
        .neighbours
        .values()
        .filter(|(it, _)| !neighbours.contains(it));
    let mut steps: Vec<Step> = missing
        .map(|(it, lease)| Step {
            edit: Edit::SetNeighbour(*it),
            lease: Some(*lease),
        })
        .collect();
    let missing = resolved
        .forwards
        .values()
        .filter(|(it, _)| !forwards.contains(it));
    steps.extend(missing.map(|(it, lease)| Step {
        edit: Edit::SetForward(*it),
        lease: Some(*lease),
    }));
    steps
}

fn stale_entries(desired: &Desired, observed: &Observed, resolved: &Resolved) -> Vec<Step> {
    if !desired.complete {
        return Vec::new();
    }
    let stale_neighbour = |it: &&Neighbour| {
        let inside = desired.networks.iter().any(|net| net.contains(&it.ip));
        let retained = desired
            .retained
            .iter()
            .any(|lease| lease.net.contains(&it.ip));
        inside && !retained && !resolved.neighbours.contains_key(&(it.link, it.ip))
    };
    let stale_forward = |it: &&Forward| {
        let wanted = resolved.forwards.get(&(it.link, it.mac));
        let retained = desired
            .retained
            .iter()
            .any(|lease| lease.public == Some(it.to));
        !retained && wanted.is_none_or(|(wanted, _)| wanted != *it)
    };
    let neighbours = observed.neighbours.iter().filter(stale_neighbour);
    let forwards = observed.forwards.iter().filter(stale_forward);
    let edits = neighbours.copied().map(Edit::DeleteNeighbour);
    let edits = edits.chain(forwards.copied().map(Edit::DeleteForward));
    edits.map(|edit| Step { edit, lease: None }).collect()
}
