//! Owns what each peer needs in the kernel, once it is known who is on a link. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::desired::{Candidate, Direct, Peer, Refused, Way};
use super::super::kernel::{Edit, Forward, Neighbour, PROTOCOL_LODEN, Route};
use super::{Observed, Observer, Step};
use crate::addr::Mac;
use crate::lease::Subnets;

/// What a device of the kernel's needs beside the route, to know where to send a packet.
enum Tunnel {
    /// The peer's MAC address.
    Vxlan(Mac),
    /// Nothing.
    Ipip,
}

/// What the peers need, now that it is known who is on a link.
#[derive(Default)]
pub(super) struct Resolved {
    pub(super) routes: HashSet<IpNet>,
    /// With the lease each is for.
    pub(super) neighbours: HashMap<(u32, IpAddr), (Neighbour, Subnets)>,
    pub(super) forwards: HashMap<(u32, Mac), (Forward, Subnets)>,
    pub(super) route_steps: Vec<Step>,
    pub(super) refused: Vec<Refused>,
    pub(super) direct: HashSet<IpNet>,
    pub(super) direct_links: BTreeSet<u32>,
    pub(super) candidates: Vec<Candidate>,
    pub(super) distant: HashSet<IpNet>,
}

impl Resolved {
    pub(super) fn add(
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
