//! Owns the explanation of a packet that the kernel carries to a peer: the way that was made for it, as far as the kernel
//! tells. Never says that it arrives.

use super::{Case, Question, is_refusal};
use crate::backend::kernel::Kernel;

impl<K: Kernel> Case<'_, K> {
    /// The whole way.
    pub(super) async fn by_kernel(&mut self) {
        self.answer.unseen.push(
            "the packet itself: the kernel carries it, and no worker of ours sees it (ip -s link counts)".to_owned(),
        );
        let Question { to, len, whole, .. } = self.question;
        let Some(lease) = self.lease_of(to).cloned() else {
            return self.end(
                "kernel",
                "nobody has a lease for the destination".to_owned(),
            );
        };
        let session = self.session;
        let (link, name) = match self.kernel.route_to(to).await {
            Ok(Some(reach)) => {
                let link = self.kernel.link_at(reach.link).await.ok().flatten();
                let name = link.map_or_else(|| format!("link {}", reach.link), |link| link.name);
                self.step("route", format!("the kernel routes it by {name}"));
                (reach.link, name)
            }
            Ok(None) => {
                self.step("route", "the kernel has none");
                let verdict =
                    "the kernel has no route for it: the sender gets \"network unreachable\"";
                return self.end("kernel", verdict.to_owned());
            }
            Err(error) if is_refusal(&error.source) => {
                self.step("route", format!("it refuses: {}", error.source));
                return self.end("kernel", "the kernel's route refuses it".to_owned());
            }
            Err(error) => return self.end("kernel", format!("the kernel does not say: {error}")),
        };
        let devices = session
            .carrier
            .as_ref()
            .map_or(&[][..], |carrier| carrier.report.devices.as_slice());
        let transport = session.transport_of(&lease.subnets);
        let by_device = devices.contains(&link);
        let by_underlay = session
            .registration
            .ends
            .iter()
            .any(|end| end.index == link);
        if !by_device && !by_underlay {
            return self.end(
                "kernel",
                format!("it does not take the overlay's way: the kernel routes it by {name}"),
            );
        }
        let Some(transport) = transport else {
            let why = session.why_unserved(&lease.subnets).unwrap_or_default();
            return self.end("kernel", format!("no way was made to its node: {why}"));
        };
        self.step("transport", transport.clone());
        if !self.forwards() {
            return;
        }
        let overlay = session.registration.plan.mtu().get();
        let choice = session.registration.choice();
        let found = format!("{overlay} for pods, {} on {}", choice.mtu, choice.name);
        self.step("mtu", found);
        if len > overlay && (whole || to.is_ipv6()) {
            return self.end(
                "kernel",
                format!("{len} bytes exceed the overlay's MTU of {overlay}: the kernel tells the sender so"),
            );
        }
        let Some(public) = lease.attrs.node() else {
            return self.end("kernel", "its lease names no node".to_owned());
        };
        match self.kernel.route_to(public).await {
            Ok(Some(reach)) => {
                let link = self.kernel.link_at(reach.link).await.ok().flatten();
                let name = link
                    .as_ref()
                    .map_or("?", |link| link.name.as_str())
                    .to_owned();
                self.step("underlay", format!("{public} is reached by {name}"));
                if link.is_some_and(|link| !link.up) {
                    return self.end("kernel", format!("{name} is down: ip link set {name} up"));
                }
                self.neighbour(public, &name);
            }
            Ok(None) => {
                self.step("underlay", format!("the kernel has no route to {public}"));
                return self.end(
                    "kernel",
                    format!("the kernel has no route to its node {public}"),
                );
            }
            Err(error) => self.answer.unseen.push(error.to_string()),
        }
        self.answer.unseen.push(format!(
            "the underlay between here and {public}, and the firewall, daemon and forwarding there: ask there"
        ));
        self.end(
            "kernel",
            format!("the kernel sends it to {public} by {name}, as loden told it ({transport})"),
        );
    }
}
