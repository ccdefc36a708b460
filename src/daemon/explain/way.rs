//! Owns which way the kernel gives a packet of the overlay, what made it that, and what stands at its beginning: route,
//! link, neighbour. Generic over what carries the overlay. Never says what becomes of the packet behind it.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Case, is_refusal};
use crate::backend::desired::Direct;
use crate::backend::kernel::{Kernel, Link};
use crate::daemon::tunnel::Tunnel;
use crate::iface::Reach;
use crate::lease::Lease;
use crate::wire::probe::Via;

/// What the kernel gives a packet to.
#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    /// Our own data plane.
    Tunnel(&'a Tunnel),
    /// A device of the kernel that was made for the overlay.
    Device,
    /// A link, by the route through the other's node that was made for the overlay.
    Past,
    /// Something that was not made for it.
    Elsewhere,
}

/// By what a packet of a peer comes in.
pub(super) enum Coming<'a> {
    /// Our own data plane.
    Tunnel(&'a Tunnel),
    /// A device of the kernel that was made for the overlay.
    Device { index: u32, name: String },
    /// A link, past the tunnel or without any.
    Past { index: u32, name: String },
    /// Nothing that is there.
    Unknown,
}

/// A packet that leaves.
pub(super) struct Leaving<'a> {
    pub(super) reach: Reach,
    /// The name of its link.
    pub(super) name: String,
    pub(super) link: Option<Link>,
    pub(super) way: Way<'a>,
}

impl<'a, K: Kernel> Case<'a, K> {
    /// Where the kernel sends what is for `to`; none, if nowhere, and then that is the answer.
    pub(super) async fn leaving(&mut self) -> Option<Leaving<'a>> {
        let to = self.question.to;
        let reach = match self.kernel.route_to(to).await {
            Ok(Some(reach)) => reach,
            Ok(None) => {
                self.step("route", "the kernel has none");
                let verdict =
                    "the kernel has no route for it: the sender gets \"network unreachable\"";
                self.end("kernel", verdict.to_owned());
                return None;
            }
            Err(error) if is_refusal(&error.source) => {
                self.step("route", format!("it refuses: {}", error.source));
                let verdict = "it does not leave this node: the kernel's route refuses it";
                self.end("kernel", verdict.to_owned());
                return None;
            }
            Err(error) => {
                self.end("kernel", format!("the kernel does not say: {error}"));
                return None;
            }
        };
        let (name, link) = self.link(reach.link).await;
        let way = self.way_by(reach.link);
        let by = match reach.via {
            // The address that stands for the other end of a tunnel says nothing to anybody.
            Some(via) if !matches!(way, Way::Tunnel(_) | Way::Device) => {
                format!("{name} through {via}")
            }
            Some(_) | None => name.clone(),
        };
        self.step(
            "route",
            match way {
                Way::Tunnel(_) => format!("the kernel routes it into {by}"),
                Way::Device | Way::Past | Way::Elsewhere => {
                    format!("the kernel routes it by {by}")
                }
            },
        );
        Some(Leaving {
            reach,
            name,
            link,
            way,
        })
    }

    /// By what a peer's packet comes in. Each end chooses its way to the other, so where there are several, the peer's last
    /// probe tells; until there was one, it is taken to do as we do.
    pub(super) async fn coming(&mut self, lease: &Lease) -> Coming<'a> {
        let from = self.question.from;
        let Some(carrier) = self.session.carrier.as_ref() else {
            return Coming::Unknown;
        };
        let net = self.net_of(from);
        let may_be_past = net.is_some_and(|net| self.direct(net) != Direct::Never);
        let heard = self.session.directory.peer_of(&lease.subnets);
        let heard = heard.and_then(|peer| peer.memory().heard);
        let is_past = match heard {
            _ if !self.has_tunnel() => true,
            _ if !may_be_past => false,
            Some((_, via)) if via != Via::Unknown => via == Via::Underlay,
            Some(_) | None => {
                self.answer.unseen.push(
                    "which way its node takes: none of its probes has come in yet, so it is taken to do as this node \
                     does"
                        .to_owned(),
                );
                net.is_some_and(|net| self.is_past(net))
            }
        };
        let is_ipv4 = from.is_ipv4();
        if is_past {
            let ends = &self.session.registration.ends;
            let end = ends.iter().find(|end| end.addr.is_ipv4() == is_ipv4);
            let end = end.unwrap_or(self.session.registration.choice());
            let (index, name) = (end.index, end.name.clone());
            let how = if self.has_tunnel() {
                "past the tunnel, as its last probe did"
            } else {
                "by routes, without a tunnel"
            };
            self.step("transport", format!("it comes in by {name}, {how}"));
            return Coming::Past { index, name };
        }
        if let Some(tunnel) = self.tunnel {
            let device = &tunnel.device;
            self.step(
                "transport",
                format!("it comes through our tunnel, {device}"),
            );
            return Coming::Tunnel(tunnel);
        }
        let mut devices = carrier.wanted_devices().iter().zip(&carrier.report.devices);
        let device = devices.find(|(device, _)| device.addr.addr().is_ipv4() == is_ipv4);
        match device {
            Some((device, &index)) => {
                let name = device.name.clone();
                self.step("transport", format!("it comes through the kernel's {name}"));
                Coming::Device { index, name }
            }
            None => Coming::Unknown,
        }
    }

    /// The name of a link, and what else the kernel says of it.
    pub(super) async fn link(&self, index: u32) -> (String, Option<Link>) {
        let link = self.kernel.link_at(index).await.ok().flatten();
        let name = link
            .as_ref()
            .map_or_else(|| format!("link {index}"), |link| link.name.clone());
        (name, link)
    }

    /// What a link is to a packet for our destination.
    fn way_by(&self, link: u32) -> Way<'a> {
        let Some(carrier) = self.session.carrier.as_ref() else {
            return Way::Elsewhere;
        };
        if let Some(tunnel) = carrier.tunnels.iter().find(|tunnel| tunnel.index == link) {
            return Way::Tunnel(tunnel);
        }
        if carrier.report.devices.contains(&link) {
            return Way::Device;
        }
        let is_end = |end: &crate::iface::Choice| end.index == link;
        let is_past = self
            .net_of(self.question.to)
            .is_some_and(|net| self.is_past(net));
        if is_past && self.session.registration.ends.iter().any(is_end) {
            return Way::Past;
        }
        Way::Elsewhere
    }

    /// The subnet that an address of a peer lies in.
    pub(super) fn net_of(&self, addr: IpAddr) -> Option<IpNet> {
        let lease = self.lease_of(addr)?;
        let nets = crate::backend::udp::nets(&lease.subnets).into_iter();
        nets.into_iter().find(|net| net.contains(&addr))
    }

    /// Whether loden has made a route to a peer's subnet past the tunnel, or without any.
    pub(super) fn is_past(&self, net: IpNet) -> bool {
        let carrier = self.session.carrier.as_ref();
        carrier.is_some_and(|carrier| carrier.report.direct.contains(&net))
    }

    /// The overlay has a tunnel, ours or the kernel's.
    pub(super) fn has_tunnel(&self) -> bool {
        self.session.carrier.as_ref().is_some_and(|carrier| {
            !carrier.tunnels.is_empty() || !carrier.report.devices.is_empty()
        })
    }

    /// Whether a peer may be reached past the tunnel, and what it takes.
    fn direct(&self, net: IpNet) -> Direct {
        let carrier = self.session.carrier.as_ref();
        let direct = carrier.and_then(|carrier| carrier.direct_to(net));
        direct.unwrap_or(Direct::Never)
    }

    /// What carries the packet, and why that and nothing else.
    pub(super) fn transport(&mut self, lease: &Lease, net: IpNet, way: Way<'_>) {
        let plan = &self.session.registration.plan;
        let name = match plan.in_user_space() {
            Some(why) => format!("{} in user space ({why})", plan.name()),
            None => plan.name().to_owned(),
        };
        let found = match (way, self.direct(net)) {
            (Way::Past, Direct::Probed { .. }) => {
                format!("route, past the tunnel ({name}): probes of full size have proven that way")
            }
            (Way::Past, Direct::OnLink) => format!(
                "route, past the tunnel ({name}): its node is on a link of this one, and DirectRouting is on"
            ),
            (Way::Past, Direct::Never) => format!("{name}: the network's backend, all by routes"),
            (_, Direct::Probed { .. }) if self.is_past(net) => {
                format!("{name}: the way past it is proven, and not taken: somebody routes it here")
            }
            (_, Direct::OnLink) if self.is_past(net) => {
                format!(
                    "{name}: there is a way past it, and it is not taken: somebody routes it here"
                )
            }
            (_, Direct::OnLink) => format!(
                "{name}: its node is on no link of this one, so DirectRouting has no way past it"
            ),
            (_, Direct::Probed { .. } | Direct::Never) => match self.rejected(lease, net) {
                Some(why) => format!("{name}: past it is no way: {why}"),
                None => format!("{name}: the network's backend, and the same for every peer"),
            },
        };
        self.step("transport", found);
    }

    /// Why a peer is not reached past the tunnel, where that was looked for.
    fn rejected(&self, lease: &Lease, net: IpNet) -> Option<String> {
        let session = self.session;
        let report = &session.carrier.as_ref()?.report;
        let ways = &session.ways;
        let mut all = ways
            .rejected(&session.registration, report, lease)
            .into_iter();
        all.find(|rejected| rejected.subnet == net)
            .map(|rejected| rejected.why)
    }

    /// The link-layer address of the next hop on a link. Whether packets for it get as far as the link: none waits for
    /// somebody who does not answer.
    pub(super) async fn neighbour(&mut self, reach: &Reach, device: &str) -> bool {
        let addr = reach.via.unwrap_or(reach.to);
        let known = self.kernel.neighbour(reach.link, addr).await;
        let is_silent = matches!(&known, Ok(Some(known)) if known.is_silent);
        let found = match known {
            Ok(Some(known)) if known.is_silent => {
                format!("{addr} does not answer on {device}: packets wait for it and are lost")
            }
            Ok(Some(known)) => match known.mac {
                Some(mac) => format!("{addr} is at {mac} on {device}"),
                None => format!("{device} needs none for {addr}"),
            },
            Ok(None) => {
                format!("{addr} has no entry on {device}: it is asked for with the next packet")
            }
            Err(error) => {
                self.answer.unseen.push(error.to_string());
                return true;
            }
        };
        self.step("neighbour", found);
        !is_silent
    }

    /// What a link of the kernel counts for the packet.
    pub(super) fn kernel_counter(&mut self, direction: &str, link: &str) {
        let counter = format!("{direction}_packets of {link} (ip -s link show {link})");
        self.answer.counters.push(counter);
    }

    /// What the path to an address is known to carry.
    pub(super) fn path_mtu(&mut self, reach: &Reach) {
        let found = match reach.mtu {
            Some(mtu) => format!(
                "the path to {} carries {mtu} bytes, as the kernel knows",
                reach.to
            ),
            None => format!(
                "the kernel knows of nothing smaller on the path to {}",
                reach.to
            ),
        };
        self.step("path mtu", found);
    }
}
