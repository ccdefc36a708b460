//! Owns the sentences in which the data plane's events are told. Never decides what to do about them.

use std::net::SocketAddr;

use crate::datapath::Event;

/// One line for the log.
pub(super) fn sentence(event: &Event) -> String {
    match event {
        Event::DeviceGone { error } => format!("the device is gone: {error}"),
        Event::WorkerDied { worker, error } => format!("worker {worker} died: {error}"),
        Event::CapabilityWithdrawn {
            capability,
            next_hop,
            reason,
        } => format!("{capability} given up{}: {reason}", towards(*next_hop)),
        Event::CapabilityRestored {
            capability,
            next_hop,
        } => format!("{capability} works again{}", towards(*next_hop)),
        Event::FirstDrop {
            reason,
            outer,
            inner,
        } => {
            let inner = inner.map_or_else(String::new, |ip| format!(", inner source {ip}"));
            let (name, remedy) = (reason.name(), reason.remedy());
            format!("dropping packets from {outer}{inner}: {name}: {remedy}")
        }
        Event::Rejected { what, error } => format!("the kernel refuses {what}: {error}"),
        Event::PathMtu { next_hop, mtu } => format!("path MTU towards {next_hop} is {mtu}"),
        Event::PeerRefused { next_hop } => {
            format!("nothing listens at {next_hop}: is its daemon running?")
        }
    }
}

fn towards(next_hop: Option<SocketAddr>) -> String {
    next_hop.map_or_else(String::new, |next_hop| format!(" towards {next_hop}"))
}
