//! Owns the explanation of a packet that the kernel carries to a peer, through a device of its own or by a route: the way
//! that was made for it, as far as the kernel tells. Never says that it arrives.

use super::way::{Leaving, Way};
use super::{Case, Question};
use crate::backend::kernel::Kernel;

impl<'a, K: Kernel> Case<'a, K> {
    /// The whole way.
    pub(super) async fn by_kernel(&mut self, leaving: &Leaving<'a>) {
        self.answer.unseen.push(
            "the packet itself: the kernel carries it, and no worker of ours sees it (loden capture reads packet sockets, ip -s link counts)".to_owned(),
        );
        let Question { to, len, whole, .. } = self.question;
        let (Some(lease), Some(net)) = (self.lease_of(to).cloned(), self.net_of(to)) else {
            return self.end(
                "kernel",
                "nobody has a lease for the destination".to_owned(),
            );
        };
        let session = self.session;
        let name = &leaving.name;
        let Some(transport) = session.transport_of(&lease.subnets) else {
            let why = session.why_unserved(&lease.subnets).unwrap_or_default();
            return self.end("kernel", format!("no way was made to its node: {why}"));
        };
        self.transport(&lease, net, leaving.way);
        if !self.forwards() {
            return;
        }
        self.nat();
        let overlay = session.registration.plan.mtu().get();
        let link_mtu = leaving.link.as_ref().map_or(0, |link| link.mtu);
        let mut found = format!("{overlay} for pods, {link_mtu} on {name}");
        for end in session.registration.ends.iter() {
            if end.addr.is_ipv4() == to.is_ipv4() && end.name != *name {
                found = format!("{found}, {} on {}", end.mtu, end.name);
            }
        }
        self.step("mtu", found);
        let limit = u32::from(overlay).min(link_mtu.max(1));
        if u32::from(len) > limit && (whole || to.is_ipv6()) {
            return self.end(
                "kernel",
                format!("{len} bytes exceed the overlay's MTU of {limit}: the kernel tells the sender so"),
            );
        }
        let Some(public) = super::public_of(&lease, to.is_ipv4()) else {
            return self.end("kernel", "its lease names no node".to_owned());
        };
        if leaving.link.as_ref().is_some_and(|link| !link.up) {
            return self.end("kernel", format!("{name} is down: ip link set {name} up"));
        }
        match leaving.way {
            Way::Past => {
                self.path_mtu(&leaving.reach);
                if !self.neighbour(&leaving.reach, name).await {
                    let verdict = format!("its node {public} does not answer on {name}");
                    return self.end("kernel", verdict);
                }
            }
            Way::Device | Way::Tunnel(_) | Way::Elsewhere => {
                if !self.behind_device(leaving, public).await {
                    return;
                }
            }
        }
        self.owns_source();
        self.kernel_counter("tx", name);
        self.answer.unseen.push(format!(
            "the underlay between here and {public}, and the firewall, daemon and forwarding there: ask there"
        ));
        let then = match leaving.way {
            Way::Past if self.has_tunnel() => {
                ", past the tunnel: no source check of loden's is on that way, only what the other node's kernel and \
                 firewall take"
            }
            Way::Past | Way::Device | Way::Tunnel(_) | Way::Elsewhere => "",
        };
        self.end(
            "kernel",
            format!(
                "the kernel sends it to {public} by {name}, as loden told it ({transport}){then}"
            ),
        );
    }

    /// What a device of the kernel needs to send on, and where that leads; whether it can.
    async fn behind_device(&mut self, leaving: &Leaving<'a>, public: std::net::IpAddr) -> bool {
        let name = &leaving.name;
        let is_vxlan = leaving
            .link
            .as_ref()
            .is_some_and(|link| link.vxlan().is_some());
        if is_vxlan && !self.forwarded(leaving, public).await {
            return false;
        }
        // The other end of any other device is the router of the route into it.
        if let Some(end) = leaving.reach.via.filter(|&end| !is_vxlan && end != public) {
            let verdict = format!("{name} sends it to {end}, and its lease says {public}");
            self.end("kernel", verdict);
            return false;
        }
        match self.kernel.route_to(public).await {
            Ok(Some(reach)) => {
                let (underlay, link) = self.link(reach.link).await;
                self.step("underlay", format!("{public} is reached by {underlay}"));
                if link.is_some_and(|link| !link.up) {
                    let verdict = format!("{underlay} is down: ip link set {underlay} up");
                    self.end("kernel", verdict);
                    return false;
                }
                self.path_mtu(&reach);
                if !self.neighbour(&reach, &underlay).await {
                    let verdict = format!("its node {public} does not answer on {underlay}");
                    self.end("kernel", verdict);
                    return false;
                }
                self.kernel_counter("tx", &underlay);
            }
            Ok(None) => {
                self.step("underlay", format!("the kernel has no route to {public}"));
                let verdict = format!("{name} has no way to its node {public}: no route");
                self.end("kernel", verdict);
                return false;
            }
            Err(error) if super::is_refusal(&error.source) => {
                let found = format!("the route to {public} refuses: {}", error.source);
                self.step("underlay", found);
                let verdict = format!("{name} has no way to its node {public}: the route refuses");
                self.end("kernel", verdict);
                return false;
            }
            Err(error) => self.answer.unseen.push(error.to_string()),
        }
        true
    }

    /// Whether a VXLAN device knows where the peer's end is: its MAC address, and the node behind that.
    async fn forwarded(&mut self, leaving: &Leaving<'a>, public: std::net::IpAddr) -> bool {
        let (name, index) = (&leaving.name, leaving.reach.link);
        let end = leaving.reach.via.unwrap_or(leaving.reach.to);
        let (neighbour, forwards) = futures_util::future::join(
            self.kernel.neighbour(index, end),
            self.kernel.forwards(index),
        )
        .await;
        let mac = match neighbour {
            Ok(Some(known)) => known.mac.filter(|_| !known.is_silent),
            Ok(None) => None,
            Err(error) => {
                self.answer.unseen.push(error.to_string());
                return true;
            }
        };
        let Some(mac) = mac else {
            self.step("peer", format!("{name} knows no MAC address for {end}"));
            let verdict = format!("{name} drops it: it knows no MAC address for {end}");
            self.end("kernel", verdict);
            return false;
        };
        let to = match forwards {
            Ok(forwards) => forwards.iter().find(|one| one.mac == mac).map(|one| one.to),
            Err(error) => {
                self.answer.unseen.push(error.to_string());
                return true;
            }
        };
        match to {
            Some(to) => {
                self.step(
                    "peer",
                    format!("{end} is at {mac} behind {name}, at node {to}"),
                );
                if to != public {
                    let verdict = format!(
                        "{name} sends it to {to}, and its lease says {public}: it is repaired soon"
                    );
                    self.end("kernel", verdict);
                }
                to == public
            }
            None => {
                self.step("peer", format!("{name} knows no node with {mac}"));
                let verdict = format!("{name} drops it: it knows no node with {mac}");
                self.end("kernel", verdict);
                false
            }
        }
    }
}
