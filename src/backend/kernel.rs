//! Owns the contract with the kernel's network configuration: links, addresses, routes, and news of them.
//! Never decides what they should be.

use std::future::Future;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use tokio::sync::mpsc;

use crate::addr::Mtu;
use crate::iface::{Reach, Snapshot};

/// What backends need of the kernel. Everything happens in the network namespace in which the value was made.
pub trait Kernel: Send + Sync {
    /// The link of this name, if there is one.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn link(&self, name: &str) -> impl Future<Output = Result<Option<Link>, KernelError>> + Send;

    /// The link of this index, if there is one.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn link_at(&self, index: u32)
    -> impl Future<Output = Result<Option<Link>, KernelError>> + Send;

    /// Changes what `change` names.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn set_link(
        &self,
        index: u32,
        change: LinkChange,
    ) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// Keeps the kernel from giving the link IPv6 addresses by itself, and from asking for routers on it. Best
    /// done before it comes up.
    ///
    /// # Errors
    ///
    /// The kernel refuses, for instance because IPv6 is off.
    fn silence_ipv6(&self, link: &Link) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// Makes the kernel take IPv4 packets from the link that come from an address of this node
    /// (`accept_local`): our ICMP errors to local senders do.
    ///
    /// # Errors
    ///
    /// The setting may not be written, as in a container with a read-only /proc/sys.
    fn accept_own_sources(
        &self,
        link: &Link,
    ) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// The addresses of a link, with their prefix lengths.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn addresses(&self, index: u32)
    -> impl Future<Output = Result<Vec<IpNet>, KernelError>> + Send;

    /// Gives a link an address. Succeeds if it has it already.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn add_address(
        &self,
        index: u32,
        address: IpNet,
    ) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// Takes an address from a link. Succeeds if it has not got it.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn delete_address(
        &self,
        index: u32,
        address: IpNet,
    ) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// The unicast routes of the main table, both families, in the kernel's order; a multipath route is one
    /// entry per next hop.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn routes(&self) -> impl Future<Output = Result<Vec<Route>, KernelError>> + Send;

    /// Adds a route. Succeeds if it is there already, and fails if another with the same destination and
    /// metric is.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn add_route(&self, route: Route) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// Adds a route in the place of the one with the same destination and metric.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn replace_route(&self, route: Route) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// Removes a route. Succeeds if it is not there.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn delete_route(&self, route: Route) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// What the choice of the external interface is made from.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn snapshot(&self) -> impl Future<Output = Result<Snapshot, KernelError>> + Send;

    /// By which link and from which address packets to `to` leave; `None` if there is no route.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn route_to(
        &self,
        to: IpAddr,
    ) -> impl Future<Output = Result<Option<Reach>, KernelError>> + Send;

    /// Adds a route that drops what is for `net`. Succeeds if there is a route to `net` already.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn add_blackhole(&self, net: IpNet) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// Starts to report changes, in a task of the current runtime that ends when the receiver is dropped.
    ///
    /// # Errors
    ///
    /// The kernel refuses to report.
    fn monitor(&self) -> Result<mpsc::Receiver<Change>, KernelError>;
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its transmit queue length in packets.
    pub tx_queue_len: u32,
    /// Administratively up.
    pub up: bool,
    /// The kernel gives it IPv6 addresses by itself (`IFLA_INET6_ADDR_GEN_MODE` is not `none`).
    pub makes_ipv6_addresses: bool,
    /// Packets the kernel dropped on the way out, for a TUN those its reader was too slow for.
    pub tx_dropped: u64,
}

/// What to change about a link; `None` leaves it as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkChange {
    /// The MTU.
    pub mtu: Option<Mtu>,
    /// The transmit queue length in packets.
    pub tx_queue_len: Option<u32>,
    /// Bring it up.
    pub up: bool,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Route {
    /// Where to.
    pub net: IpNet,
    /// The link it leaves by; 0 if it names none.
    pub link: u32,
    /// The next router; `None` for a destination on the link.
    pub gateway: Option<IpAddr>,
    /// `RTA_PRIORITY`; `None` lets the kernel choose, which makes it 0 for IPv4 and 1024 for IPv6.
    pub metric: Option<u32>,
    /// Who put it there (`rtm_protocol`).
    pub protocol: u8,
}

/// `RTPROT_BOOT`: how the original marks what it adds (specification section 8.0), and therefore how the route
/// to the whole network is marked.
pub const PROTOCOL_BOOT: u8 = 3;

/// What the kernel says changed. Only a hint at what to look at: the state itself is read anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A link appeared, changed or vanished.
    Link(u32),
    /// An address of a link came or went.
    Address(u32),
    /// A route came or went.
    Route(IpNet),
    /// News was lost: anything may have changed.
    Everything,
}

/// A refused operation.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}: {source}{}", remedy(source))]
pub struct KernelError {
    /// What was tried, `add address 198.18.3.0/32 to flannel0`.
    pub operation: String,
    /// What the kernel says.
    pub source: io::Error,
}

fn remedy(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        ": run as root or with CAP_NET_ADMIN"
    } else if error.kind() == io::ErrorKind::AlreadyExists {
        ": remove the one that is in the way (ip route show)"
    } else {
        ""
    }
}
