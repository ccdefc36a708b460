//! Owns an in-memory kernel for tests: one namespace's links, addresses, routes, neighbours and forwarding
//! entries, with the kernel's rules that matter to reconciliation.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use tokio::sync::mpsc;

use super::kernel::{
    Change, Edit, Forward, Kernel, KernelError, Known, Link, LinkChange, Neighbour, NewTunnel,
    Route, TunnelLink, VxlanLink,
};
use crate::iface::Snapshot;

/// The state, open to the test.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) links: Vec<Link>,
    pub(crate) addrs: Vec<(u32, IpNet)>,
    pub(crate) routes: Vec<Route>,
    pub(crate) probe_routes: Vec<Route>,
    /// Whether marked probes look there, in IPv4 and IPv6.
    pub(crate) steered: (bool, bool),
    pub(crate) neighbours: Vec<Neighbour>,
    pub(crate) forwards: Vec<Forward>,
    /// What is below `/proc/sys/net`.
    pub(crate) settings: Vec<(&'static str, &'static str)>,
    /// The kernel has neither VXLAN nor IPIP.
    pub(crate) no_tunnels: bool,
    /// Operations from now on that are refused, by the first word of what they do.
    pub(crate) refuse: Option<&'static str>,
    /// What was done, in order.
    pub(crate) log: Vec<String>,
}

/// The kernel.
#[derive(Debug, Default)]
pub(crate) struct FakeKernel(Mutex<State>);

impl FakeKernel {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(
        &self,
        operation: String,
        apply: impl FnOnce(&mut State) -> Result<(), i32>,
    ) -> Result<(), KernelError> {
        let mut state = self.state();
        let refused = state.refuse.is_some_and(|word| operation.starts_with(word));
        let result = if refused {
            Err(libc::EPERM)
        } else {
            apply(&mut state)
        };
        state.log.push(operation.clone());
        result.map_err(|errno| KernelError {
            operation,
            source: io::Error::from_raw_os_error(errno),
        })
    }
}

impl State {
    pub(crate) fn link_mut(&mut self, index: u32) -> Result<&mut Link, i32> {
        let mut links = self.links.iter_mut();
        links.find(|link| link.index == index).ok_or(libc::ENODEV)
    }

    /// Takes a link away as the kernel does: with all that is on it, and the VXLAN devices that send by it.
    pub(crate) fn remove_link(&mut self, index: u32) {
        self.links.retain(|link| link.index != index);
        self.routes.retain(|route| route.link != index);
        self.probe_routes.retain(|route| route.link != index);
        self.addrs.retain(|(at, _)| *at != index);
        self.neighbours.retain(|it| it.link != index);
        self.forwards.retain(|it| it.link != index);
        let above = |link: &&Link| link.vxlan().is_some_and(|vxlan| vxlan.link == index);
        if let Some(above) = self.links.iter().find(above).map(|link| link.index) {
            self.remove_link(above);
        }
    }

    /// Applies one change with the kernel's rules.
    fn edit(&mut self, edit: Edit) -> Result<(), i32> {
        let same_key = |a: &Route, b: &Route| {
            let metric = |route: &Route| route.metric.filter(|_| !route.has_default_metric());
            a.net == b.net && metric(a) == metric(b)
        };
        match edit {
            Edit::AddRoute(route) | Edit::ReplaceRoute(route) => {
                if !self.link_mut(route.link)?.up {
                    return Err(libc::ENETDOWN);
                }
                let reached = |gateway| {
                    let on_link = |it: &Route| {
                        it.link == route.link && it.gateway.is_none() && it.net.contains(&gateway)
                    };
                    route.onlink || self.routes.iter().any(on_link)
                };
                if !route.gateway.is_none_or(reached) {
                    return Err(libc::ENETUNREACH);
                }
                // As ip6_route_check_nh_onlink does.
                if let (true, Some(gateway @ std::net::IpAddr::V6(_))) =
                    (route.onlink, route.gateway)
                {
                    let covering = self.routes.iter().filter(|it| it.net.contains(&gateway));
                    let longest = covering.max_by_key(|it| it.net.prefix_len());
                    if longest.is_some_and(|it| it.link != route.link) {
                        return Err(libc::EINVAL);
                    }
                }
                if matches!(edit, Edit::ReplaceRoute(_)) {
                    self.routes.retain(|other| !same_key(other, &route));
                } else if self.routes.iter().any(|other| same_key(other, &route)) {
                    return Err(libc::EEXIST);
                }
                self.routes.push(route);
            }
            Edit::DeleteRoute(route) => self.routes.retain(|other| *other != route),
            Edit::AddProbeRoute(route) => {
                if !self.link_mut(route.link)?.up {
                    return Err(libc::ENETDOWN);
                }
                if self.probe_routes.iter().any(|other| other.net == route.net) {
                    return Err(libc::EEXIST);
                }
                self.probe_routes.push(route);
            }
            Edit::DeleteProbeRoute(route) => self.probe_routes.retain(|other| *other != route),
            Edit::SetNeighbour(it) => {
                self.link_mut(it.link)?;
                let same = |other: &Neighbour| (other.link, other.ip) == (it.link, it.ip);
                self.neighbours.retain(|other| !same(other));
                self.neighbours.push(it);
            }
            Edit::DeleteNeighbour(it) => self
                .neighbours
                .retain(|other| (other.link, other.ip) != (it.link, it.ip)),
            Edit::SetForward(it) => {
                self.link_mut(it.link)?;
                let mut there = self.forwards.iter_mut();
                let same = |other: &&mut Forward| (other.link, other.mac) == (it.link, it.mac);
                // As vxlan_fdb_replace does: only the first of several.
                match there.find(same) {
                    Some(other) => *other = it,
                    None => self.forwards.push(it),
                }
            }
            Edit::DeleteForward(it) => self.forwards.retain(|other| *other != it),
        }
        Ok(())
    }

    /// Takes a link down as the kernel does: its routes and neighbours go, its IPv4 addresses stay.
    pub(crate) fn set_down(&mut self, index: u32) {
        if let Ok(link) = self.link_mut(index) {
            link.up = false;
        }
        self.routes.retain(|route| route.link != index);
        self.probe_routes.retain(|route| route.link != index);
        self.neighbours.retain(|it| it.link != index);
        self.addrs
            .retain(|(at, addr)| *at != index || addr.addr().is_ipv4());
    }
}

impl Kernel for FakeKernel {
    async fn link(&self, name: &str) -> Result<Option<Link>, KernelError> {
        Ok(self
            .state()
            .links
            .iter()
            .find(|link| link.name == name)
            .cloned())
    }

    async fn link_at(&self, index: u32) -> Result<Option<Link>, KernelError> {
        Ok(self
            .state()
            .links
            .iter()
            .find(|link| link.index == index)
            .cloned())
    }

    async fn links(&self) -> Result<Vec<Link>, KernelError> {
        Ok(self.state().links.clone())
    }

    async fn add_tunnel(&self, device: &NewTunnel) -> Result<(), KernelError> {
        self.change(format!("make {}", device.name), |state| {
            let is_v6 = |vxlan: &VxlanLink| vxlan.local.map(|ip| ip.is_ipv6());
            let key = |vxlan: &VxlanLink| (vxlan.vni, vxlan.port, is_v6(vxlan));
            if state.no_tunnels {
                return Err(libc::EOPNOTSUPP);
            }
            let double = |link: &Link| {
                let same = match (&link.tunnel, &device.tunnel) {
                    (Some(TunnelLink::Vxlan(is)), TunnelLink::Vxlan(new)) => key(is) == key(new),
                    (Some(TunnelLink::Ipip(is)), TunnelLink::Ipip(new)) => is == new,
                    (Some(_) | None, _) => false,
                };
                link.name == device.name || same
            };
            if state.links.iter().any(double) {
                return Err(libc::EEXIST);
            }
            if let TunnelLink::Vxlan(vxlan) = &device.tunnel {
                state.link_mut(vxlan.link)?;
            }
            let index = state.links.iter().map(|link| link.index).max();
            state.links.push(Link {
                index: index.unwrap_or(0) + 1,
                name: device.name.clone(),
                mtu: u32::from(device.mtu.get()),
                tx_queue_len: 0,
                up: false,
                makes_ipv6_addresses: true,
                tx_dropped: 0,
                mac: device.mac,
                tunnel: Some(device.tunnel),
            });
            Ok(())
        })
    }

    async fn delete_link(&self, index: u32) -> Result<(), KernelError> {
        self.change("delete link".to_owned(), |state| {
            state.remove_link(index);
            Ok(())
        })
    }

    async fn neighbours(&self, index: u32) -> Result<Vec<Neighbour>, KernelError> {
        let state = self.state();
        let of_link = state.neighbours.iter().filter(|it| it.link == index);
        Ok(of_link.copied().collect())
    }

    async fn neighbour(
        &self,
        index: u32,
        ip: std::net::IpAddr,
    ) -> Result<Option<Known>, KernelError> {
        let state = self.state();
        let mut of_link = state.neighbours.iter().filter(|it| it.link == index);
        let found = of_link.find(|it| it.ip == ip);
        Ok(found.map(|it| Known {
            mac: Some(it.mac),
            is_silent: false,
        }))
    }

    async fn forwards(&self, index: u32) -> Result<Vec<Forward>, KernelError> {
        let state = self.state();
        let of_link = state.forwards.iter().filter(|it| it.link == index);
        Ok(of_link.copied().collect())
    }

    async fn edit(&self, edits: &[Edit]) -> Vec<Result<(), KernelError>> {
        let one = |edit: &Edit| self.change(edit.to_string(), |state| state.edit(*edit));
        edits.iter().map(one).collect()
    }

    fn setting(&self, path: &str) -> Option<String> {
        let state = self.state();
        let mut settings = state.settings.iter();
        let found = settings.find(|(name, _)| *name == path);
        found.map(|(_, value)| (*value).to_owned())
    }

    async fn set_link(&self, index: u32, change: LinkChange) -> Result<(), KernelError> {
        self.change("set link".to_owned(), |state| {
            let link = state.link_mut(index)?;
            if let Some(mtu) = change.mtu {
                link.mtu = u32::from(mtu.get());
            }
            if let Some(len) = change.tx_queue_len {
                link.tx_queue_len = len;
            }
            if let Some(mac) = change.mac {
                link.mac = Some(mac);
            }
            if let (Some(learning), Some(TunnelLink::Vxlan(vxlan))) =
                (change.learning, &mut link.tunnel)
            {
                vxlan.learning = learning;
            }
            link.up |= change.up;
            Ok(())
        })
    }

    async fn silence_ipv6(&self, link: &Link) -> Result<(), KernelError> {
        self.change("silence".to_owned(), |state| {
            state.link_mut(link.index)?.makes_ipv6_addresses = false;
            Ok(())
        })
    }

    async fn accept_own_sources(&self, link: &Link) -> Result<(), KernelError> {
        self.change("accept own sources".to_owned(), |state| {
            state.link_mut(link.index).map(|_link| ())
        })
    }

    fn computes_checksums(&self, _device: &str) -> Result<bool, KernelError> {
        Ok(true)
    }

    fn compute_checksums(&self, device: &str, on: bool) -> Result<(), KernelError> {
        self.change(format!("have {device} compute checksums: {on}"), |_| Ok(()))
    }

    async fn addresses(&self, index: u32) -> Result<Vec<IpNet>, KernelError> {
        let state = self.state();
        let of_link = state.addrs.iter().filter(|(at, _)| *at == index);
        Ok(of_link.map(|(_, addr)| *addr).collect())
    }

    async fn add_address(&self, index: u32, address: IpNet) -> Result<(), KernelError> {
        self.change(format!("add address {address}"), |state| {
            state.link_mut(index)?;
            state.addrs.push((index, address));
            Ok(())
        })
    }

    async fn delete_address(&self, index: u32, address: IpNet) -> Result<(), KernelError> {
        self.change(format!("delete address {address}"), |state| {
            state.addrs.retain(|entry| *entry != (index, address));
            Ok(())
        })
    }

    async fn routes(&self) -> Result<Vec<Route>, KernelError> {
        Ok(self.state().routes.clone())
    }

    async fn probe_routes(&self) -> Result<Vec<Route>, KernelError> {
        Ok(self.state().probe_routes.clone())
    }

    async fn steer_probes(&self, v4: bool, v6: bool) -> Result<bool, KernelError> {
        let mut changed = false;
        self.change("steer probes".to_owned(), |state| {
            changed = std::mem::replace(&mut state.steered, (v4, v6)) != (v4, v6);
            Ok(())
        })?;
        Ok(changed)
    }

    async fn add_route(&self, route: Route) -> Result<(), KernelError> {
        self.change(format!("add route {}", route.net), |state| {
            if !state.link_mut(route.link)?.up {
                return Err(libc::ENETDOWN);
            }
            if state.routes.iter().any(|other| other.net == route.net) {
                return Err(libc::EEXIST);
            }
            state.routes.push(route);
            Ok(())
        })
    }

    async fn replace_route(&self, route: Route) -> Result<(), KernelError> {
        self.change(format!("replace route {}", route.net), |state| {
            state.routes.retain(|other| other.net != route.net);
            state.routes.push(route);
            Ok(())
        })
    }

    async fn delete_route(&self, route: Route) -> Result<(), KernelError> {
        self.change(format!("delete route {}", route.net), |state| {
            state.routes.retain(|other| *other != route);
            Ok(())
        })
    }

    async fn snapshot(&self) -> Result<Snapshot, KernelError> {
        Ok(Snapshot::default())
    }

    async fn route_to(
        &self,
        _to: std::net::IpAddr,
    ) -> Result<Option<crate::iface::Reach>, KernelError> {
        Ok(None)
    }

    async fn add_blackhole(&self, _net: IpNet) -> Result<(), KernelError> {
        Ok(())
    }

    fn monitor(&self) -> Result<mpsc::Receiver<Change>, KernelError> {
        Ok(mpsc::channel(1).1)
    }
}
