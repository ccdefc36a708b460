//! Owns the contract with the kernel's network configuration: links, addresses, routes, neighbours, forwarding
//! entries, and news of them. Never decides what they should be.

mod objects;

use std::future::Future;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use tokio::sync::mpsc;

use crate::iface::{Reach, Snapshot};

pub use objects::{
    Edit, Forward, IpipLink, Known, Link, LinkChange, Neighbour, NewTunnel, PROBE_MARK,
    PROBE_PRIORITY, PROBE_TABLE, PROTOCOL_BOOT, PROTOCOL_LODEN, Route, TunnelLink, VxlanLink,
};

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

    /// All links.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn links(&self) -> impl Future<Output = Result<Vec<Link>, KernelError>> + Send;

    /// Makes a tunnel device, which is down.
    ///
    /// # Errors
    ///
    /// The kernel has no such tunnels ([`KernelError::is_unsupported`]), or refuses, for instance because there is a
    /// link of that name, or another that would receive the same packets.
    fn add_tunnel(
        &self,
        device: &NewTunnel,
    ) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// Removes a link. Succeeds if it is not there.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn delete_link(&self, index: u32) -> impl Future<Output = Result<(), KernelError>> + Send;

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

    /// Whether a device computes the checksums of what it sends, or the kernel does, before it gets there.
    ///
    /// # Errors
    ///
    /// There is no such device.
    fn computes_checksums(&self, device: &str) -> Result<bool, KernelError>;

    /// Has a device compute them, or the kernel.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or there is no such device.
    fn compute_checksums(&self, device: &str, on: bool) -> Result<(), KernelError>;

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

    /// The routes of [`PROBE_TABLE`], both families.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn probe_routes(&self) -> impl Future<Output = Result<Vec<Route>, KernelError>> + Send;

    /// Has packets with [`PROBE_MARK`] look into [`PROBE_TABLE`] first, in these families of IPv4 and IPv6 and in no
    /// other. Whether anything had to be changed.
    ///
    /// # Errors
    ///
    /// The kernel has no policy routing, or refuses.
    fn steer_probes(
        &self,
        v4: bool,
        v6: bool,
    ) -> impl Future<Output = Result<bool, KernelError>> + Send;

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

    /// The permanent neighbours of a link, both families.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn neighbours(
        &self,
        index: u32,
    ) -> impl Future<Output = Result<Vec<Neighbour>, KernelError>> + Send;

    /// What is known of the neighbour of a link that has an address; `None` while nobody has asked for it.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn neighbour(
        &self,
        index: u32,
        ip: IpAddr,
    ) -> impl Future<Output = Result<Option<Known>, KernelError>> + Send;

    /// The permanent forwarding entries of a VXLAN device.
    ///
    /// # Errors
    ///
    /// The kernel refuses to say.
    fn forwards(
        &self,
        index: u32,
    ) -> impl Future<Output = Result<Vec<Forward>, KernelError>> + Send;

    /// Makes many changes in their order, without waiting for one before the next is asked for. What became of
    /// each, in the same order. To remove what is not there succeeds.
    fn edit(&self, edits: &[Edit]) -> impl Future<Output = Vec<Result<(), KernelError>>> + Send;

    /// The value of a setting below `/proc/sys/net`, without white space at its ends; `None` if there is none.
    fn setting(&self, path: &str) -> Option<String>;

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

/// What the kernel says changed. Only a hint at what to look at: the state itself is read anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A link appeared, changed or vanished.
    Link(u32),
    /// Likewise, one that is a tunnel like ours, which may receive what comes to ours or share its port.
    Tunnel(u32),
    /// An address of a link came or went.
    Address(u32),
    /// A route came or went.
    Route(IpNet),
    /// A neighbour or a forwarding entry of a link came, changed or went.
    Neighbour(u32),
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

impl KernelError {
    /// The kernel lacks what was asked for: a module that is not there, or a feature it is too old for.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        self.source.raw_os_error() == Some(libc::EOPNOTSUPP)
    }

    /// Something in its place exists already.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        self.source.kind() == io::ErrorKind::AlreadyExists
    }
}

fn remedy(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        ": run as root or with CAP_NET_ADMIN"
    } else if error.kind() == io::ErrorKind::AlreadyExists {
        ": remove the one that is in the way (ip link show, ip route show)"
    } else if error.kind() == io::ErrorKind::AddrInUse {
        ": another program or device has the UDP port (ss -ulnp, ip -d link show type vxlan)"
    } else {
        ""
    }
}
