//! Owns an in-memory kernel for tests: one namespace's links, addresses and routes, with the kernel's rules
//! that matter to reconciliation.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use tokio::sync::mpsc;

use super::kernel::{Change, Kernel, KernelError, Link, LinkChange, Route};
use crate::iface::Snapshot;

/// The state, open to the test.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) links: Vec<Link>,
    pub(crate) addrs: Vec<(u32, IpNet)>,
    pub(crate) routes: Vec<Route>,
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

    /// Takes a link down as the kernel does: its routes go, its IPv4 addresses stay.
    pub(crate) fn set_down(&mut self, index: u32) {
        if let Ok(link) = self.link_mut(index) {
            link.up = false;
        }
        self.routes.retain(|route| route.link != index);
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

    async fn set_link(&self, index: u32, change: LinkChange) -> Result<(), KernelError> {
        self.change("set link".to_owned(), |state| {
            let link = state.link_mut(index)?;
            if let Some(mtu) = change.mtu {
                link.mtu = u32::from(mtu.get());
            }
            if let Some(len) = change.tx_queue_len {
                link.tx_queue_len = len;
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
