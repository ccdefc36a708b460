//! Owns the difference between what the kernel should hold for the peers and what it does hold. Pure and
//! level-triggered: the same difference serves the start, every change and every look.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::desired::{Candidate, Desired, Direct, Peer, Refused, Senders, Way};
use super::kernel::{Edit, Forward, Neighbour, PROTOCOL_BOOT, PROTOCOL_LODEN, Route};
use super::on_link::OnLink;
use crate::lease::Subnets;

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

/// What a device of the kernel's needs beside the route, to know where to send a packet.
enum Tunnel {
    /// The peer's MAC address.
    Vxlan(crate::addr::Mac),
    /// Nothing.
    Ipip,
}

/// What the peers need, now that it is known who is on a link.
#[derive(Default)]
struct Resolved {
    routes: HashSet<IpNet>,
    /// With the lease each is for.
    neighbours: HashMap<(u32, IpAddr), (Neighbour, Subnets)>,
    forwards: HashMap<(u32, crate::addr::Mac), (Forward, Subnets)>,
    route_steps: Vec<Step>,
    refused: Vec<Refused>,
    direct: HashSet<IpNet>,
    direct_links: BTreeSet<u32>,
    candidates: Vec<Candidate>,
    distant: HashSet<IpNet>,
}

impl Resolved {
    fn add(
        &mut self,
        peer: &Peer,
        observed: &Observed,
        observer: &Observer<'_>,
    ) -> Result<(), String> {
        let Peer {
            net, public, lease, ..
        } = *peer;
        if observer
            .own
            .iter()
            .any(|own| own.contains(&net) || net.contains(own))
        {
            return Err(format!("its subnet {net} is this node's own"));
        }
        if observer
            .networks
            .iter()
            .any(|network| network.contains(&public))
        {
            return Err(format!(
                "its public IP {public} lies inside the overlay network"
            ));
        }
        let device = |device: usize| observed.devices.get(device).copied().unwrap_or_default();
        let (link, tunnel) = match peer.way {
            Way::Gateway { link } if observer.on_link.is_on(public, link) => (link, None),
            Way::Gateway { .. } => {
                return Err(format!(
                    "its public IP {public} is not on the link of the external interface (ip route get {public}): \
                     join the nodes by one link, or use the vxlan or udp backend"
                ));
            }
            Way::Vxlan {
                device: at,
                mac,
                direct,
            } => match self.link_past_the_tunnel(peer, direct, observer) {
                Some(link) => (link, None),
                None => (device(at), Some(Tunnel::Vxlan(mac))),
            },
            Way::Ipip { device: at, direct } => {
                match self.link_past_the_tunnel(peer, direct, observer) {
                    Some(link) => (link, None),
                    None => (device(at), Some(Tunnel::Ipip)),
                }
            }
            Way::Tunnel { direct } => match self.link_past_the_tunnel(peer, direct, observer) {
                Some(link) => (link, None),
                // The route to the whole network leads there.
                None => return Ok(()),
            },
        };
        let route = Route {
            net,
            link,
            gateway: Some(match tunnel {
                Some(Tunnel::Vxlan(_)) => net.network(),
                // The device sends to the next router.
                Some(Tunnel::Ipip) | None => public,
            }),
            onlink: tunnel.is_some(),
            metric: None,
            protocol: PROTOCOL_LODEN,
        };
        let edits = self.route_step(&route, observer)?;
        if let Some(Tunnel::Vxlan(mac)) = tunnel {
            let forward = Forward {
                link,
                mac,
                to: public,
            };
            // A node that was given another lease is at the same place with both until the first one ends.
            let held = self.forwards.get(&(link, mac));
            if let Some((_, other)) = held.filter(|(held, _)| *held != forward) {
                return Err(format!(
                    "its VtepMAC {mac} is also that of lease {other}: give the nodes different ones"
                ));
            }
            self.forwards.insert((link, mac), (forward, lease));
            let ip = net.network();
            let neighbour = Neighbour { link, ip, mac };
            self.neighbours.insert((link, ip), (neighbour, lease));
        } else if tunnel.is_none() {
            self.direct.insert(net);
            self.direct_links.insert(link);
        }
        self.routes.insert(net);
        self.route_steps.extend(edits.into_iter().map(|edit| Step {
            edit,
            lease: Some(lease),
        }));
        Ok(())
    }

    /// The link of a peer that is reached past the tunnel. Notes who is to be probed.
    fn link_past_the_tunnel(
        &mut self,
        peer: &Peer,
        direct: Direct,
        observer: &Observer<'_>,
    ) -> Option<u32> {
        let Peer { net, public, .. } = *peer;
        let link = match direct {
            Direct::Never => return None,
            Direct::OnLink | Direct::Probed { .. } => observer.on_link.link_of(public),
        };
        let Direct::Probed { port, proven } = direct else {
            return link;
        };
        let Some(link) = link else {
            self.distant.insert(net);
            return None;
        };
        self.candidates.push(Candidate {
            net,
            public,
            link,
            port,
        });
        proven.then_some(link)
    }

    /// What makes `route` the one to its destination; nothing if it is.
    ///
    /// IPv6 takes a next router as on the link only if no route there is leads elsewhere
    /// (`ip6_route_check_nh_onlink` in net/ipv6/route.c), so what is in the place goes first.
    fn route_step(&self, route: &Route, observer: &Observer<'_>) -> Result<Vec<Edit>, String> {
        let there = observer.routes.get(&route.net);
        let there = there
            .into_iter()
            .flatten()
            .filter(|route| route.has_default_metric());
        let there: Vec<&&Route> = there.collect();
        match there.as_slice() {
            [] => Ok(vec![Edit::AddRoute(*route)]),
            [one] if one.same_way(route) && one.protocol == route.protocol => Ok(Vec::new()),
            several => match several.iter().find(|route| !observer.is_ours(route)) {
                None if route.onlink
                    && matches!(route.net, IpNet::V6(_))
                    && several.iter().any(|old| old.link != route.link) =>
                {
                    let old = several.iter().map(|old| Edit::DeleteRoute(***old));
                    Ok(old.chain([Edit::AddRoute(*route)]).collect())
                }
                None => Ok(vec![Edit::ReplaceRoute(*route)]),
                Some(foreign) => Err(format!(
                    "the route {foreign} is in its way and not ours: remove it (ip route del {})",
                    foreign.net
                )),
            },
        }
    }
}

/// The peers, and whoever uses another backend for now and is still reached through a device: by the entries that
/// stay there for it.
fn senders(desired: &Desired, observed: &Observed, resolved: &Resolved) -> Senders {
    let mut senders = Senders::default();
    for peer in &desired.peers {
        if let Way::Vxlan { mac, .. } = peer.way
            && resolved.routes.contains(&peer.net)
        {
            senders.outer.insert(peer.public);
            senders.inner.insert((mac, peer.net));
        }
    }
    for lease in &desired.retained {
        let inside = |it: &&Neighbour| lease.net.contains(&it.ip);
        let macs = observed.neighbours.iter().filter(inside).map(|it| it.mac);
        for mac in macs {
            senders.inner.insert((mac, lease.net));
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
