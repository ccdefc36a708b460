//! Owns the explanation of a packet that leaves this node: from its pod over the kernel and the tunnel to the peer.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use super::{Case, Question, is_refusal};
use crate::addr::udp_overhead;
use crate::backend::kernel::Kernel;
use crate::backend::plan::Plan;
use crate::daemon::traffic::Traffic;
use crate::daemon::tunnel::Tunnel;
use crate::datapath::DropReason;
use crate::datapath::foretell::Foretold;

impl<K: Kernel> Case<'_, K> {
    /// The whole way.
    pub(super) async fn encap(&mut self) {
        self.answer.unseen.push(
            "what the node's own firewall does with forwarded packets, and policy rules (ip rule)"
                .to_owned(),
        );
        let Some(tunnel) = self.tunnel else {
            return self.by_kernel().await;
        };
        if !self.reaches_tunnel(tunnel).await || !self.forwards() {
            return;
        }
        let overlay = self.session.registration.plan.mtu().get();
        self.mtus(overlay, &tunnel.device);
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
                self.towards(peer, foretold).await
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

    /// Whether the kernel brings the packet to the tunnel.
    async fn reaches_tunnel(&mut self, tunnel: &Tunnel) -> bool {
        let (device, index) = (tunnel.device.clone(), tunnel.index);
        match self.kernel.link_at(index).await {
            Ok(Some(link)) if !link.up => {
                self.end(
                    "kernel",
                    format!("{device} is down: ip link set {device} up"),
                );
                return false;
            }
            Ok(_) => {}
            Err(error) => self.answer.unseen.push(error.to_string()),
        }
        match self.kernel.route_to(self.question.to).await {
            Ok(Some(reach)) if reach.link == index => {
                self.step("route", format!("the kernel routes it into {device}"));
            }
            Ok(Some(reach)) => {
                let other = self.kernel.link_at(reach.link).await.ok().flatten();
                let other = other.map_or_else(|| format!("link {}", reach.link), |link| link.name);
                self.step("route", format!("the kernel routes it by {other}"));
                self.end(
                    "kernel",
                    format!("it does not reach the tunnel: the kernel routes it by {other}"),
                );
                return false;
            }
            Ok(None) => {
                self.step("route", "the kernel has none");
                self.end(
                    "kernel",
                    "the kernel has no route for it: the sender gets \"network unreachable\""
                        .to_owned(),
                );
                return false;
            }
            Err(error) if is_refusal(&error.source) => {
                self.step("route", format!("it refuses: {}", error.source));
                let verdict = "it does not reach the tunnel: the kernel's route refuses it";
                self.end("kernel", verdict.to_owned());
                return false;
            }
            Err(error) => self.answer.unseen.push(error.to_string()),
        }
        true
    }

    /// Whether the kernel forwards what pods send, and what the traffic rules do with it.
    pub(super) fn forwards(&mut self) -> bool {
        let source = self.question.from;
        let pods = source != self.session.registration.choice().addr;
        let (family, setting) = match source {
            IpAddr::V4(_) => ("ipv4", "/proc/sys/net/ipv4/ip_forward"),
            IpAddr::V6(_) => ("ipv6", "/proc/sys/net/ipv6/conf/all/forwarding"),
        };
        match fs::read_to_string(setting) {
            Ok(text) if text.trim() == "0" && pods => {
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
        let masquerade = if self.options.traffic.masquerade {
            "between nodes' pods there is none: masquerading leaves the overlay alone"
        } else {
            "none of ours: --ip-masq is off"
        };
        self.step("nat", masquerade);
        if let Some(problem) = self.session.traffic.as_ref().and_then(Traffic::problem) {
            self.step("rules", format!("not as they should be: {problem}"));
        }
        true
    }

    fn mtus(&mut self, overlay: u16, device: &str) {
        let choice = self.session.registration.choice();
        // VXLAN puts its own header and Ethernet's between UDP's and the packet (RFC 7348 section 5).
        let frame = match self.session.registration.plan {
            Plan::Vxlan(_) => 8 + 14,
            Plan::Udp { .. } | Plan::HostGw(_) | Plan::Ipip(_) | Plan::Outside(_) => 0,
        };
        let found = format!(
            "{overlay} in {device}, {} on {}, {} of headers between them",
            choice.mtu,
            choice.name,
            udp_overhead(choice.addr) + frame
        );
        self.step("mtu", found);
        let lease = self.lease_of(self.question.to);
        let endpoint = lease.and_then(|lease| {
            let plan = &self.session.registration.plan;
            plan.endpoint_of(&lease.attrs)
        });
        let mut peers = self.status.peers.iter();
        if let Some(peer) = peers.find(|peer| Some(peer.addr) == endpoint) {
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
    async fn towards(&mut self, peer: SocketAddr, foretold: Foretold) {
        let name = self.session.registration.plan.name();
        let found = format!("{name}: the network's backend, and the same for every peer");
        self.step("transport", found);
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
                let link = self.kernel.link_at(reach.link).await.ok().flatten();
                let name = link.as_ref().map_or("?", |link| link.name.as_str());
                self.step("underlay", format!("{} is reached by {name}", peer.ip()));
                if link.as_ref().is_some_and(|link| !link.up) {
                    return self.drop_here("encap", DropReason::UnderlayDown);
                }
                let name = name.to_owned();
                self.neighbour(peer.ip(), &name);
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
        let source = self.question.from;
        let accepted = source == self.session.registration.choice().public || self.is_here(source);
        let then = if accepted {
            "whose source check accepts it"
        } else {
            self.answer.remedy = Some(DropReason::SpoofedSource.remedy());
            "whose source check drops it as spoofed_source unless it is loose"
        };
        self.step(
            "ownership",
            if accepted {
                format!("{source} is ours to send from")
            } else {
                format!("{source} is not in our lease")
            },
        );
        self.end(
            outcome,
            format!("this node sends it{how} to {peer}, {then}"),
        );
    }

    /// The link-layer address of an IPv4 neighbour, as far as the kernel needs one.
    pub(super) fn neighbour(&mut self, addr: IpAddr, device: &str) {
        if addr.is_ipv6() {
            let unseen = format!("the neighbour entry of {addr} (ip -6 neigh show {addr})");
            return self.answer.unseen.push(unseen);
        }
        // Of this thread's network namespace; the process's may be another.
        let table = fs::read_to_string("/proc/thread-self/net/arp").unwrap_or_default();
        let text = addr.to_string();
        let entry = table.lines().skip(1).find_map(|line| {
            let mut columns = line.split_whitespace();
            (columns.next()? == text).then(|| (columns.nth(1), columns.next()))
        });
        let found = match entry {
            Some((Some("0x0"), _)) => {
                format!("{addr} does not answer on {device}: packets wait for it and are lost")
            }
            Some((_, Some(mac))) => format!("{addr} is at {mac} on {device}"),
            _ => format!("{addr} has no entry on {device}: a router's is used, or it is asked for"),
        };
        self.step("neighbour", found);
    }
}
