//! Owns this node's ends of the underlay: the external interface with an address for every family that a backend
//! needs. Pure; [`crate::iface`] has the rules of the choice.

use std::net::IpAddr;

use ipnet::IpNet;

use super::udp;
use crate::config::{Backend, NetworkConfig};
use crate::iface::{
    self, Candidate, Choice, Decision, Family, NoInterface, Selector, Snapshot, Stack, Wanted,
};
use crate::lease::{Lease, LeaseAttrs};

/// This node's ends of the underlay: one address per family of the overlay, all of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ends {
    first: Choice,
    second: Option<Choice>,
}

impl Ends {
    /// One family.
    #[must_use]
    pub const fn one(choice: Choice) -> Self {
        Self {
            first: choice,
            second: None,
        }
    }

    /// Both families, IPv4 first.
    #[must_use]
    pub const fn both(v4: Choice, v6: Choice) -> Self {
        Self {
            first: v4,
            second: Some(v6),
        }
    }

    /// The one that stands for the node: IPv4, if there is one.
    #[must_use]
    pub const fn primary(&self) -> &Choice {
        &self.first
    }

    /// Both, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = &Choice> {
        std::iter::once(&self.first).chain(&self.second)
    }

    fn of(&self, family: Family) -> Option<&Choice> {
        self.iter().find(|choice| Family::of(choice.addr) == family)
    }

    /// What a lease says about the node, without data.
    pub(super) fn attrs(&self, backend_type: &str) -> LeaseAttrs {
        let mut attrs = LeaseAttrs {
            backend_type: backend_type.to_owned(),
            ..LeaseAttrs::default()
        };
        for choice in self.iter() {
            match choice.public {
                IpAddr::V4(ip) => attrs.public_ip = Some(ip),
                IpAddr::V6(ip) => attrs.public_ipv6 = Some(ip),
            }
        }
        attrs
    }

    /// A peer's subnet and address in one family; none if either side does not use the family.
    pub(super) fn reach(
        &self,
        lease: &Lease,
        family: Family,
    ) -> Result<Option<(IpNet, IpAddr)>, String> {
        let net = match family {
            Family::V4 => lease.subnets.v4().map(IpNet::V4),
            Family::V6 => lease.subnets.v6().map(IpNet::V6),
        };
        let (Some(net), Some(_)) = (net, self.of(family)) else {
            return Ok(None);
        };
        let public = match family {
            Family::V4 => lease.attrs.public_ip.map(IpAddr::V4),
            Family::V6 => lease.attrs.public_ipv6.map(IpAddr::V6),
        };
        let public = public.ok_or_else(|| format!("it publishes no {family} address"))?;
        Ok(Some((net, public)))
    }
}

/// The external interface as a backend needs it.
#[derive(Debug)]
pub struct Search {
    /// The ends, or why there are none.
    pub ends: Result<Ends, NoInterface>,
    /// Selectors that found nothing, and why.
    pub failed: Vec<String>,
    /// Every link with the reason why it is or is not the one.
    pub candidates: Vec<Candidate>,
}

/// Looks for the external interface. Our own tunnel carries both families over either and needs one address;
/// everything else needs one of every family of the overlay.
#[must_use]
pub fn search(snapshot: &Snapshot, wanted: &Wanted, config: &NetworkConfig) -> Search {
    let single = |decision: Decision| Search {
        ends: decision.choice.map(Ends::one),
        failed: decision.failed,
        candidates: decision.candidates,
    };
    let stacks: &[Stack] = match (&config.backend, &config.ipv4, &config.ipv6) {
        (Backend::Udp(_), ..) => {
            return single(iface::choose(snapshot, wanted, udp::stack(config, wanted)));
        }
        (_, Some(_), Some(_)) => &[Stack::V4, Stack::V6],
        (_, Some(_), None) => return single(iface::choose(snapshot, wanted, Stack::V4)),
        (_, None, _) => return single(iface::choose(snapshot, wanted, Stack::V6)),
    };
    // An address of one family names the interface for both.
    let mut decisions: Vec<Decision> = stacks
        .iter()
        .map(|&stack| iface::choose(snapshot, wanted, stack))
        .collect();
    let found = decisions
        .iter()
        .position(|decision| decision.choice.is_ok());
    let mut search = single(decisions.swap_remove(found.unwrap_or(0)));
    let Ok(Ends { first, .. }) = &search.ends else {
        return search;
    };
    let other = match found {
        Some(0) => Stack::V6,
        _ => Stack::V4,
    };
    search.ends = beside(snapshot, wanted, other, first).map(|other| match first.addr {
        IpAddr::V4(_) => Ends::both(first.clone(), other),
        IpAddr::V6(_) => Ends::both(other, first.clone()),
    });
    search
}

/// The address of the other family on the interface that was chosen for the first.
fn beside(
    snapshot: &Snapshot,
    wanted: &Wanted,
    stack: Stack,
    first: &Choice,
) -> Result<Choice, NoInterface> {
    let links = snapshot
        .links
        .iter()
        .filter(|link| link.index == first.index);
    let narrowed = Snapshot {
        links: links.cloned().collect(),
        ..Snapshot::default()
    };
    let is_there = |ip: &IpAddr| {
        narrowed
            .links
            .iter()
            .any(|link| link.addrs.iter().any(|addr| addr.ip == *ip))
    };
    let family = stack.families().first().copied();
    let mut selectors: Vec<Selector> = wanted
        .selectors
        .iter()
        .filter(|selector| {
            matches!(selector, Selector::Address(ip) if Some(Family::of(*ip)) == family && is_there(ip))
        })
        .cloned()
        .collect();
    let public = family.and_then(|family| wanted.public(family));
    if wanted.selectors.is_empty() {
        selectors.extend(public.filter(is_there).map(Selector::Address));
    }
    selectors.push(Selector::Name(first.name.clone()));
    let wanted = Wanted {
        selectors,
        ..wanted.clone()
    };
    iface::choose(&narrowed, &wanted, stack).choice
}
