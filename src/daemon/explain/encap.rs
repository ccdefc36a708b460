//! Owns the explanation of a packet that leaves this node: from its pod over the kernel to whatever carries it, and
//! through our own data plane, where that is it.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use super::way::{Leaving, Way};
use super::{Case, Question, is_refusal};
use crate::backend::kernel::Kernel;
use crate::daemon::traffic::Traffic;
use crate::daemon::tunnel::Tunnel;
use crate::datapath::DropReason;
use crate::datapath::foretell::Foretold;

impl<'a, K: Kernel> Case<'a, K> {
    /// The whole way.
    pub(super) async fn encap(&mut self) {
        self.answer.unseen.push(
            "what the node's own firewall does with forwarded packets, and policy rules (ip rule)"
                .to_owned(),
        );
        if !self.tunnel_is_up().await {
            return;
        }
        let Some(leaving) = self.leaving().await else {
            return;
        };
        let name = &leaving.name;
        match leaving.way {
            Way::Tunnel(tunnel) => self.by_tunnel(tunnel).await,
            _ if !self.is_in_overlay(self.question.to) => self.outside(&leaving).await,
            Way::Device | Way::Past => self.by_kernel(&leaving).await,
            Way::Elsewhere => {
                let lease = self.lease_of(self.question.to);
                let why = lease.and_then(|lease| self.session.why_unserved(&lease.subnets));
                if let Some(why) = why {
                    let verdict = format!("no way was made to its node: {why}");
                    return self.end("kernel", verdict);
                }
                let meant = if self.has_tunnel() {
                    "reach the tunnel"
                } else {
                    "take the overlay's way"
                };
                let verdict = format!("it does not {meant}: the kernel routes it by {name}");
                self.end("kernel", verdict);
            }
        }
    }

    /// Whether our own data plane's device is up; without it, the kernel has no route that would say so.
    async fn tunnel_is_up(&mut self) -> bool {
        let Some(tunnel) = self.tunnel.filter(|_| self.is_in_overlay(self.question.to)) else {
            return true;
        };
        let device = tunnel.device.clone();
        match self.kernel.link_at(tunnel.index).await {
            Ok(Some(link)) if !link.up => {
                let verdict = format!("{device} is down: ip link set {device} up");
                self.end("kernel", verdict);
                return false;
            }
            Ok(_) => {}
            Err(error) => self.answer.unseen.push(error.to_string()),
        }
        true
    }

    /// A packet to what is not in the overlay.
    async fn outside(&mut self, leaving: &Leaving<'a>) {
        let Question { from, to, .. } = self.question;
        if !self.forwards() {
            return;
        }
        let masquerades = self.options.traffic.masquerade && !self.local[0];
        let as_whom = if masquerades && self.is_in_overlay(from) {
            let to_us = ", with this node's address in the place of the pod's";
            self.step("nat", "masqueraded: it leaves the overlay (--ip-masq)");
            to_us
        } else {
            self.step("nat", "none of ours");
            ""
        };
        self.neighbour(&leaving.reach, &leaving.name).await;
        self.kernel_counter("tx", &leaving.name);
        let who = match self.lease_of(to) {
            Some(_) => "the node's own address",
            None => "outside the overlay",
        };
        self.end(
            "kernel",
            format!(
                "{to} is {who}: the kernel sends it by {}{as_whom}, and loden has no part in it",
                leaving.name
            ),
        );
    }

    /// Through our own data plane.
    async fn by_tunnel(&mut self, tunnel: &Tunnel) {
        if !self.forwards() {
            return;
        }
        self.nat();
        let overlay = self.session.registration.plan.mtu().get();
        self.mtus(overlay, tunnel);
        let Question { len, whole, .. } = self.question;
        if len > overlay && (whole || self.question.to.is_ipv6()) {
            return self.end(
                "kernel",
                format!("{len} bytes exceed the tunnel's MTU of {overlay}: the kernel tells the sender so"),
            );
        }
        let packet = self.packet(len.min(overlay));
        let Some(foretold) = tunnel.foretell(|data| data.foretell_encap(&packet)) else {
            return;
        };
        self.counters(&["datapath.total.encap.read"]);
        match foretold {
            Foretold::Sent(peer) | Foretold::Fragmented(peer, _) => {
                self.towards(tunnel, peer, foretold).await
            }
            Foretold::Answered(reason) => {
                self.counters(&["datapath.total.encap.answered"]);
                self.refuse(
                    "answered",
                    reason,
                    format!(
                        "the sender gets an ICMP error from this node: {}",
                        reason.name()
                    ),
                );
            }
            Foretold::Dropped(reason) => self.drop_here("encap", reason),
            Foretold::Delivered => {}
        }
    }

    /// Whether the kernel forwards what pods send.
    pub(super) fn forwards(&mut self) -> bool {
        if self.local[0] {
            self.step("forwarding", "none needed: the node itself sends it");
            return true;
        }
        let (family, setting) = match self.question.from {
            IpAddr::V4(_) => ("ipv4", "/proc/sys/net/ipv4/ip_forward"),
            IpAddr::V6(_) => ("ipv6", "/proc/sys/net/ipv6/conf/all/forwarding"),
        };
        match fs::read_to_string(setting) {
            Ok(text) if text.trim() == "0" => {
                self.step("forwarding", format!("{setting} is 0"));
                self.end(
                    "kernel",
                    format!("this node does not forward {family} packets: set {setting} to 1"),
                );
                return false;
            }
            Ok(_) => self.step("forwarding", "the kernel forwards packets of pods"),
            Err(error) => self.answer.unseen.push(format!("{setting}: {error}")),
        }
        true
    }

    /// What the traffic rules do with a packet within the overlay.
    pub(super) fn nat(&mut self) {
        let masquerade = if self.options.traffic.masquerade {
            "between nodes' pods there is none: masquerading leaves the overlay alone"
        } else {
            "none of ours: --ip-masq is off"
        };
        self.step("nat", masquerade);
        if let Some(problem) = self.session.traffic.as_ref().and_then(Traffic::problem) {
            self.step("rules", format!("not as they should be: {problem}"));
        }
    }

    fn mtus(&mut self, overlay: u16, tunnel: &Tunnel) {
        let registration = &self.session.registration;
        let bind = tunnel.bind.ip();
        let mut ends = registration.ends.iter();
        let end = ends
            .find(|end| end.addr == bind)
            .unwrap_or(registration.choice());
        let found = format!(
            "{overlay} in {}, {} on {}, {} of headers between them",
            tunnel.device,
            end.mtu,
            end.name,
            tunnel.encapsulation.overhead(bind)
        );
        self.step("mtu", found);
        let lease = self.lease_of(self.question.to);
        let node = lease.and_then(|lease| super::public_of(lease, bind.is_ipv4()));
        let mut peers = self.status.peers.iter();
        if let Some(peer) = peers.find(|peer| Some(peer.addr.ip()) == node) {
            let found = match peer.path_mtu {
                Some(mtu) => format!(
                    "the path to {} carries {mtu} bytes, as it was learned",
                    peer.addr
                ),
                None => format!("nothing smaller was learned of the path to {}", peer.addr),
            };
            self.step("path mtu", found);
        }
    }

    /// The rest of the way to a peer.
    async fn towards(&mut self, tunnel: &Tunnel, peer: SocketAddr, foretold: Foretold) {
        let to = self.question.to;
        if let (Some(lease), Some(net)) = (self.lease_of(to).cloned(), self.net_of(to)) {
            self.transport(&lease, net, Way::Tunnel(tunnel));
        }
        let index = self.status.peers.iter().position(|one| one.addr == peer);
        let known = index
            .and_then(|index| self.status.peers.get(index))
            .cloned();
        if let Some(known) = &known {
            let runs = self
                .status
                .capabilities
                .iter()
                .find(|one| one.name == "udp-gso");
            let found = match (&known.gso_withdrawn, runs.map(|one| one.used)) {
                (Some(why), _) => format!("single datagrams: {why}"),
                (None, Some(true)) => "runs of datagrams (UDP GSO)".to_owned(),
                (None, _) => "single datagrams: no UDP GSO".to_owned(),
            };
            self.step("offload", found);
        }
        match self.kernel.route_to(peer.ip()).await {
            Ok(Some(reach)) => {
                let (name, link) = self.link(reach.link).await;
                self.step("underlay", format!("{} is reached by {name}", peer.ip()));
                if link.is_some_and(|link| !link.up) {
                    return self.drop_here("encap", DropReason::UnderlayDown);
                }
                self.neighbour(&reach, &name).await;
            }
            Ok(None) => {
                self.step(
                    "underlay",
                    format!("the kernel has no route to {}", peer.ip()),
                );
                return self.drop_here("encap", DropReason::UnderlayDown);
            }
            // What the kernel says to a lookup it says to a datagram, too: a route that refuses.
            Err(error) if is_refusal(&error.source) => {
                let found = format!("the route to {} refuses: {}", peer.ip(), error.source);
                self.step("underlay", found);
                return self.drop_here("encap", DropReason::of_send(&error.source));
            }
            Err(error) => self.answer.unseen.push(error.to_string()),
        }
        self.counters(&["datapath.total.encap.sent"]);
        if let Some(index) = index {
            self.answer
                .counters
                .push(format!("datapath.peers.{index}.sent"));
        }
        self.answer.unseen.extend([
            format!("the underlay between here and {}", peer.ip()),
            format!(
                "the firewall, daemon and forwarding of {}: ask there",
                peer.ip()
            ),
        ]);
        let (outcome, how) = match foretold {
            Foretold::Fragmented(_, max) => ("fragmented", format!(" in fragments of {max} bytes")),
            Foretold::Sent(_)
            | Foretold::Delivered
            | Foretold::Answered(_)
            | Foretold::Dropped(_) => ("sent", String::new()),
        };
        let then = if self.owns_source() {
            "whose source check accepts it"
        } else {
            self.answer.remedy = Some(DropReason::SpoofedSource.remedy());
            "whose source check drops it as spoofed_source unless it is loose"
        };
        self.end(
            outcome,
            format!("this node sends it{how} to {peer}, {then}"),
        );
    }

    /// Whether the source is one that peers take from this node: of our lease, or our address on the underlay.
    pub(super) fn owns_source(&mut self) -> bool {
        let source = self.question.from;
        let registration = &self.session.registration;
        let is_public = registration.ends.iter().any(|end| end.public == source);
        let is_ours = is_public || self.own_nets().iter().any(|net| net.contains(&source));
        let found = if is_ours {
            format!("{source} is ours to send from")
        } else {
            format!("{source} is not in our lease")
        };
        self.step("ownership", found);
        is_ours
    }
}
