//! Owns the explanation of a packet that comes from a peer: over the node's firewall and the tunnel to its pod.

use super::Case;
use crate::backend::kernel::Kernel;
use crate::daemon::traffic::Admitting;
use crate::datapath::DropReason;
use crate::datapath::foretell::Foretold;
use crate::datapath::forward::Outer;
use crate::firewall::Admission;

impl<K: Kernel> Case<'_, K> {
    /// The whole way.
    pub(super) async fn decap(&mut self) {
        let from = self.question.from;
        let endpoint = self.lease_of(from).map(|lease| {
            let endpoint = self.session.registration.plan.endpoint_of(&lease.attrs);
            // Routes have no endpoint, and lead to the node itself.
            let by_route = lease.attrs.node().filter(|_| self.tunnel.is_none());
            endpoint.map(|endpoint| endpoint.ip()).or(by_route)
        });
        let outer = match endpoint {
            Some(Some(outer)) => outer,
            Some(None) => {
                return self.end(
                    "elsewhere",
                    "its node has no address of our underlay's family, so it cannot reach us"
                        .to_owned(),
                );
            }
            None => {
                self.answer
                    .unseen
                    .push("whether it comes by another way than the tunnel".to_owned());
                self.counters(&["datapath.total.decap.read"]);
                return self.refuse(
                    "dropped",
                    DropReason::SpoofedSource,
                    "nobody has a lease for the source: if a peer sends it through the tunnel, this node \
                     drops it as spoofed_source"
                        .to_owned(),
                );
            }
        };
        self.answer.unseen.extend([
            format!("whether {outer} sends it, and the underlay between: ask there"),
            "what the node's own firewall does with forwarded packets".to_owned(),
        ]);
        match Admitting::of(&self.options.traffic, &self.session.registration)
            .ask()
            .await
        {
            Ok(Admission::Closed(refusal)) => {
                self.step("firewall", format!("{refusal}"));
                return self.end(
                    "kernel",
                    format!("this node's firewall drops the tunnel's datagrams: {refusal}"),
                );
            }
            Ok(Admission::Open) => self.step("firewall", "the tunnel's port is open"),
            Ok(Admission::Tracked(refusal) | Admission::Established(refusal)) => self.step(
                "firewall",
                format!("the tunnel's port is open with connection tracking only: {refusal}"),
            ),
            Err(error) => self.answer.unseen.push(error),
        }
        let Some(tunnel) = self.tunnel else {
            self.answer.unseen.push(
                "what the kernel's VXLAN device or route does with it: no worker of ours sees it"
                    .to_owned(),
            );
            return self.local_route("the kernel", None).await;
        };
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
                self.local_route(&tunnel.device, Some(tunnel.index)).await;
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

    /// Where the kernel takes a packet that the tunnel delivered.
    async fn local_route(&mut self, device: &str, index: Option<u32>) {
        let to = self.question.to;
        let verdict = match self.kernel.route_to(to).await {
            Ok(Some(reach)) if Some(reach.link) == index => {
                self.step(
                    "route",
                    format!("the kernel routes {to} back into {device}"),
                );
                format!("this node delivers it to {device}, and nobody on the node has {to}")
            }
            Ok(Some(reach)) => {
                let link = self.kernel.link_at(reach.link).await.ok().flatten();
                let name = link.map_or_else(|| format!("link {}", reach.link), |link| link.name);
                self.step("route", format!("the kernel routes {to} by {name}"));
                format!("this node delivers it to {device}, and the kernel forwards it by {name}")
            }
            Ok(None) => {
                self.step("route", format!("the kernel has no route to {to}"));
                format!("this node delivers it to {device}, and the kernel has no route to {to}")
            }
            Err(error) => {
                self.answer.unseen.push(error.to_string());
                format!("this node delivers it to {device}")
            }
        };
        self.end("delivered", verdict);
    }
}
