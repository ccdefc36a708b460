//! Owns the explanation of a packet that comes from a peer: over the node's firewall and the tunnel, or past it, to its
//! pod.

use std::net::IpAddr;

use ipnet::IpNet;

use super::Case;
use super::way::Coming;
use crate::addr::Origin;
use crate::backend::kernel::Kernel;
use crate::daemon::traffic::Admitting;
use crate::daemon::tunnel::Tunnel;
use crate::datapath::DropReason;
use crate::datapath::foretell::Foretold;
use crate::datapath::forward::Outer;
use crate::firewall::Admission;

impl<'a, K: Kernel> Case<'a, K> {
    /// The whole way.
    pub(super) async fn decap(&mut self) {
        let from = self.question.from;
        let Some(lease) = self.lease_of(from).cloned() else {
            return self.refuse_nobody();
        };
        let is_ipv4 = match self.tunnel {
            Some(tunnel) => tunnel.bind.is_ipv4(),
            None => from.is_ipv4(),
        };
        let Some(outer) = super::public_of(&lease, is_ipv4) else {
            return self.end(
                "elsewhere",
                "its node has no address of our underlay's family, so it cannot reach us"
                    .to_owned(),
            );
        };
        self.answer.unseen.extend([
            format!("whether {outer} sends it, and the underlay between: ask there"),
            "what the node's own firewall does with forwarded packets".to_owned(),
        ]);
        match self.coming(&lease).await {
            Coming::Tunnel(tunnel) => {
                if self.is_admitted().await {
                    self.in_by_tunnel(tunnel, outer).await;
                }
            }
            Coming::Device { index, name } => {
                if self.is_admitted().await && self.is_checked(outer) {
                    self.unwatched();
                    self.in_by_link(index, &name).await;
                }
            }
            Coming::Past { index, name } => {
                self.step(
                    "source check",
                    "none of loden's on this way: what the kernel and the node's own firewall take",
                );
                self.unwatched();
                self.in_by_link(index, &name).await;
            }
            Coming::Unknown => self.end(
                "kernel",
                "this node has no link of the overlay that it could come in by".to_owned(),
            ),
        }
    }

    fn unwatched(&mut self) {
        self.answer.unseen.push(
            "the packet itself: the kernel carries it, and no worker of ours sees it".to_owned(),
        );
    }

    /// A packet whose source is in nobody's lease.
    fn refuse_nobody(&mut self) {
        self.answer
            .unseen
            .push("whether it comes by another way than the tunnel".to_owned());
        let checks = self.session.guard.scope().is_some_and(|scope| scope.inner);
        if self.tunnel.is_none() && !checks {
            return self.end(
                "kernel",
                "nobody has a lease for the source, and nothing here checks that: the kernel takes it, if its reverse \
                 path filter does"
                    .to_owned(),
            );
        }
        if self.tunnel.is_some() {
            self.counters(&["datapath.total.decap.read"]);
        }
        self.refuse(
            "dropped",
            DropReason::SpoofedSource,
            "nobody has a lease for the source: if a peer sends it through the tunnel, this node \
             drops it as spoofed_source"
                .to_owned(),
        );
    }

    /// Whether the host's firewall takes the tunnel's datagrams.
    async fn is_admitted(&mut self) -> bool {
        let admitting = Admitting::of(&self.options.traffic, &self.session.registration);
        match admitting.ask().await {
            Ok(Admission::Closed(refusal)) => {
                self.step("firewall", format!("{refusal}"));
                self.end(
                    "kernel",
                    format!("this node's firewall drops the tunnel's datagrams: {refusal}"),
                );
                return false;
            }
            Ok(Admission::Open) if self.session.registration.plan.port().is_none() => {}
            Ok(Admission::Open) => self.step("firewall", "the tunnel's port is open"),
            Ok(Admission::Tracked(refusal) | Admission::Established(refusal)) => self.step(
                "firewall",
                format!("the tunnel's port is open with connection tracking only: {refusal}"),
            ),
            Err(error) => self.answer.unseen.push(error),
        }
        true
    }

    /// Whether the source check in front of the kernel's devices takes it.
    fn is_checked(&mut self, outer: IpAddr) -> bool {
        let Some(scope) = self.session.guard.scope() else {
            let why = self.session.guard.idle().unwrap_or_default();
            self.step("source check", format!("none: {why}"));
            return true;
        };
        let carrier = self.session.carrier.as_ref();
        let Some(senders) = carrier.and_then(|carrier| carrier.report.senders.as_ref()) else {
            self.step(
                "source check",
                "it does not know the peers yet, and takes everything",
            );
            return true;
        };
        let from = self.question.from;
        // The MAC address of a frame is of the same lease as the outer address.
        let may_send = |(origin, net): &(Origin, IpNet)| {
            net.contains(&from)
                && (!scope.outer
                    || matches!(origin, Origin::Frame(_))
                    || *origin == Origin::Datagram(outer))
        };
        let reason = if scope.outer && !senders.outer.contains(&outer) {
            Some(DropReason::UnknownPeer)
        } else if scope.inner && !senders.inner.iter().any(may_send) {
            Some(DropReason::SpoofedSource)
        } else {
            None
        };
        match reason {
            Some(reason) => {
                let verdict = format!("this node drops it: {}", reason.name());
                self.refuse("dropped", reason, verdict);
                false
            }
            None => {
                self.step("source check", format!("{from} is {outer}'s to send from"));
                true
            }
        }
    }

    /// Through our own data plane.
    async fn in_by_tunnel(&mut self, tunnel: &Tunnel, outer: IpAddr) {
        let from = self.question.from;
        let packet = self.packet(self.question.len);
        // Without a congestion mark, as most are.
        let datagram = Outer {
            addr: outer,
            tos: 0,
            mac: None,
        };
        let foretold = tunnel.foretell(|data| data.foretell_decap(&packet, datagram));
        self.counters(&["datapath.total.decap.read"]);
        match foretold {
            Some(Foretold::Delivered) => {
                self.step("ownership", format!("{from} is {outer}'s to send from"));
                self.counters(&["datapath.total.decap.sent"]);
                let index = self
                    .status
                    .peers
                    .iter()
                    .position(|one| one.addr.ip() == outer);
                if let Some(index) = index {
                    self.answer
                        .counters
                        .push(format!("datapath.peers.{index}.received"));
                }
                self.in_by_link(tunnel.index, &tunnel.device).await;
            }
            Some(Foretold::Answered(reason)) => {
                self.counters(&["datapath.total.decap.answered"]);
                self.refuse(
                    "answered",
                    reason,
                    format!(
                        "the sender gets an ICMP error from this node: {}",
                        reason.name()
                    ),
                );
            }
            Some(Foretold::Dropped(reason)) => self.drop_here("decap", reason),
            Some(Foretold::Sent(_) | Foretold::Fragmented(..)) | None => {}
        }
    }

    /// Where the kernel takes a packet that comes in by a link.
    async fn in_by_link(&mut self, index: u32, device: &str) {
        let how = if self.tunnel.is_some_and(|tunnel| tunnel.index == index) {
            format!("this node delivers it to {device}")
        } else {
            self.kernel_counter("rx", device);
            format!("this node takes it in by {device}")
        };
        if !self.reverse_path(index, device).await {
            return;
        }
        let to = self.question.to;
        if self.local[1] {
            self.step("route", format!("{to} is an address of this node"));
            return self.end("delivered", format!("{how}, and has {to} itself"));
        }
        let verdict = match self.kernel.route_to(to).await {
            Ok(Some(reach)) if reach.link == index => {
                self.step(
                    "route",
                    format!("the kernel routes {to} back into {device}"),
                );
                format!("{how}, and nobody on the node has {to}")
            }
            Ok(Some(reach)) => {
                let (name, _) = self.link(reach.link).await;
                self.step("route", format!("the kernel routes {to} by {name}"));
                if !self.forwards_in() {
                    return;
                }
                if self.neighbour(&reach, &name).await {
                    format!("{how}, and the kernel forwards it by {name}")
                } else {
                    format!(
                        "{how}, and the kernel would forward it by {name}, where {to} does not answer"
                    )
                }
            }
            Ok(None) => {
                self.step("route", format!("the kernel has no route to {to}"));
                format!("{how}, and the kernel has no route to {to}")
            }
            Err(error) if super::is_refusal(&error.source) => {
                self.step("route", format!("it refuses: {}", error.source));
                format!("{how}, and the kernel's route to {to} refuses it")
            }
            Err(error) => {
                self.answer.unseen.push(error.to_string());
                how
            }
        };
        self.end("delivered", verdict);
    }

    /// Whether the kernel passes on to pods what comes in.
    fn forwards_in(&mut self) -> bool {
        let setting = match self.question.to {
            IpAddr::V4(_) => "ipv4/ip_forward",
            IpAddr::V6(_) => "ipv6/conf/all/forwarding",
        };
        if self.kernel.setting(setting).as_deref() != Some("0") {
            self.step("forwarding", "the kernel forwards packets to pods");
            return true;
        }
        self.step("forwarding", format!("/proc/sys/net/{setting} is 0"));
        self.end(
            "kernel",
            format!(
                "this node does not forward packets to its pods: set /proc/sys/net/{setting} to 1"
            ),
        );
        false
    }

    /// Whether the kernel takes what comes in by this link from that source (net.ipv4.conf.*.rp_filter, ip-sysctl; the
    /// larger of the link's and all links' counts). IPv6 has no such filter.
    async fn reverse_path(&mut self, index: u32, device: &str) -> bool {
        let from = self.question.from;
        if from.is_ipv6() {
            return true;
        }
        let of = |link: &str| {
            let value = self.kernel.setting(&format!("ipv4/conf/{link}/rp_filter"));
            value
                .and_then(|value| value.parse::<u8>().ok())
                .unwrap_or(0)
        };
        let filter = of("all").max(of(device));
        let back = self.kernel.route_to(from).await.ok().flatten();
        let passes = match (filter, &back) {
            (0, _) => true,
            // Strict.
            (1, Some(back)) => back.link == index,
            // Loose.
            (_, Some(_)) => true,
            (_, None) => false,
        };
        if passes {
            return true;
        }
        let by = match back {
            Some(back) => format!("goes back by {}", self.link(back.link).await.0),
            None => "has no way back".to_owned(),
        };
        self.step(
            "reverse path",
            format!("rp_filter is {filter} on {device}, and what is for {from} {by}"),
        );
        self.end(
            "kernel",
            format!(
                "the kernel drops it: reverse path filtering is strict on {device}, and {from} {by}; \
                 sysctl -w net.ipv4.conf.all.rp_filter=2 makes it loose"
            ),
        );
        false
    }
}
