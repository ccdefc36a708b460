//! Owns who is meant by the ends of a packet: pods are asked for by name, and one address of each end is taken. Never
//! looks at the session.

use std::fmt;
use std::net::IpAddr;
use std::pin::Pin;

use futures_util::future::join;

use crate::debug::end::End;
use crate::iface::Family;
use crate::store::LeaseStore;
use crate::store::pods::{Pod, PodLookup, PodName};

/// An end with the address that is asked about.
#[derive(Debug, Clone)]
pub(in crate::daemon) struct Named {
    pub(in crate::daemon) addr: IpAddr,
    pub(super) pod: Option<(PodName, Pod)>,
}

impl Named {
    /// It is a pod in its node's network.
    pub(super) fn shares_node(&self) -> bool {
        self.pod.as_ref().is_some_and(|(_, pod)| pod.shares_node)
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((name, pod)) = &self.pod else {
            return self.addr.fmt(f);
        };
        write!(f, "pod {name}")?;
        if let Some(node) = &pod.node {
            write!(f, " of node {node}")?;
        }
        if pod.shares_node {
            f.write_str(", in its node's network")?;
        }
        write!(f, ": {}", self.addr)
    }
}

/// Both ends, source first, or why they are not known.
pub(in crate::daemon) type Found = Pin<Box<dyn Future<Output = Result<[Named; 2], String>> + Send>>;

/// Finds out who is meant, asking the store where there are names.
pub(in crate::daemon) fn find<S: LeaseStore>(
    store: &S,
    from: End,
    to: End,
    family: Option<Family>,
) -> Found {
    let (from, to) = (meant(store, from), meant(store, to));
    Box::pin(async move {
        let (from, to) = join(from.find(), to.find()).await;
        pair(&from?, &to?, family)
    })
}

enum Meant {
    Addr(IpAddr),
    Pod(PodName, PodLookup),
}

fn meant<S: LeaseStore>(store: &S, end: End) -> Meant {
    match end {
        End::Addr(addr) => Meant::Addr(addr),
        End::Pod(name) => Meant::Pod(name.clone(), store.pod(name)),
    }
}

impl Meant {
    /// Every address it may be about, the preferred one first; at least one.
    async fn find(self) -> Result<Vec<Named>, String> {
        let (name, lookup) = match self {
            Self::Addr(addr) if addr.is_loopback() || addr.is_unspecified() => {
                return Err(format!(
                    "{addr} is no address that others reach: give that of a pod or a node"
                ));
            }
            Self::Addr(addr) => return Ok(vec![Named { addr, pod: None }]),
            Self::Pod(name, lookup) => (name, lookup),
        };
        let pod = lookup.await.map_err(|error| error.to_string())?;
        if pod.addrs.is_empty() {
            let on = pod.node.as_deref();
            let on = on.map_or_else(String::new, |node| format!(" on node {node}"));
            return Err(format!(
                "pod {name} has no address now: it is {}{on}: kubectl describe pod -n {} {} says why",
                pod.phase,
                name.namespace(),
                name.name()
            ));
        }
        let named = |&addr: &IpAddr| Named {
            addr,
            pod: Some((name.clone(), pod.clone())),
        };
        Ok(pod.addrs.iter().map(named).collect())
    }
}

/// An address of each, of one family: the wanted one, or that which the source prefers.
fn pair(from: &[Named], to: &[Named], family: Option<Family>) -> Result<[Named; 2], String> {
    let is_wanted = |named: &&Named| family.is_none_or(|wanted| wanted == Family::of(named.addr));
    for source in from.iter().filter(is_wanted) {
        let mut others = to.iter().filter(is_wanted);
        let same = |other: &&Named| other.addr.is_ipv4() == source.addr.is_ipv4();
        if let Some(destination) = others.find(same) {
            return Ok([source.clone(), destination.clone()]);
        }
    }
    let list = |ends: &[Named]| {
        let texts: Vec<String> = ends.iter().map(|end| end.addr.to_string()).collect();
        texts.join(" and ")
    };
    let what = match family {
        Some(family) => format!("have no {family} addresses"),
        None => "are of different families".to_owned(),
    };
    Err(format!(
        "source and destination {what}: the source has {}, the destination {}",
        list(from),
        list(to)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(addrs: &[&str]) -> Vec<Named> {
        let named = |addr: &&str| Named {
            addr: addr.parse().unwrap(),
            pod: None,
        };
        addrs.iter().map(named).collect()
    }

    #[test]
    fn ends_meet_in_the_family_that_both_have_or_that_is_asked_for() {
        let both = end(&["198.18.1.2", "fd00::2"]);
        let six_first = end(&["fd00::3", "198.18.2.3"]);
        let four = end(&["198.18.2.4"]);
        let paired = |from: &[Named], to: &[Named], family| {
            pair(from, to, family).map(|pair| pair.map(|named| named.addr.to_string()))
        };
        assert_eq!(
            paired(&both, &six_first, None).unwrap(),
            ["198.18.1.2", "198.18.2.3"]
        );
        assert_eq!(
            paired(&six_first, &both, None).unwrap(),
            ["fd00::3", "fd00::2"]
        );
        assert_eq!(
            paired(&six_first, &four, None).unwrap(),
            ["198.18.2.3", "198.18.2.4"]
        );
        let six = paired(&both, &six_first, Some(Family::V6));
        assert_eq!(six.unwrap(), ["fd00::2", "fd00::3"]);
        let none = paired(&both, &four, Some(Family::V6)).unwrap_err();
        assert!(
            none.contains("no IPv6 addresses") && none.contains("198.18.2.4"),
            "{none}"
        );
        let none = paired(&end(&["fd00::9"]), &four, None).unwrap_err();
        assert!(none.contains("different families"), "{none}");
    }
}
