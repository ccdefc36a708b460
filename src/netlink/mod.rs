//! Owns the conversation with the kernel's network configuration over rtnetlink: implements
//! [`Kernel`]. Never decides what the configuration should be.

mod decode;
mod encode;
mod monitor;
mod request;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::StreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressHeaderFlags;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage,
};
use netlink_packet_route::route::{RouteProtocol, RouteType};
use netlink_packet_route::rule::RuleMessage;
use rtnetlink::{AddressMessageBuilder, Handle, IpVersion, RouteMessageBuilder};
use tokio::sync::mpsc;

use crate::backend::kernel::{
    Change, Edit, Forward, Kernel, KernelError, Known, Link, LinkChange, Neighbour, NewTunnel,
    PROBE_TABLE, Route,
};
use crate::iface::{Reach, Snapshot};
use crate::sys::ethtool;
use request::{collect, failed, unless};

/// The longest name a link may have, `IFNAMSIZ` less the final zero.
const MAX_LINK_NAME: usize = 15;

/// Requests whose answers are waited for at the same time. An answer takes less than a kilobyte of the socket's
/// receive buffer, which has 200 of them by default.
const EDITS_AT_ONCE: usize = 64;

/// The kernel of the network namespace in which this was made.
#[derive(Debug, Clone)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens a socket, served by a task of the current runtime.
    ///
    /// # Errors
    ///
    /// The kernel gives no socket.
    pub fn connect() -> Result<Self, KernelError> {
        let (connection, handle, _unsolicited) =
            rtnetlink::new_connection().map_err(|source| KernelError {
                operation: "open a netlink socket".to_owned(),
                source,
            })?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }
}

impl Kernel for Netlink {
    async fn link(&self, name: &str) -> Result<Option<Link>, KernelError> {
        if name.len() > MAX_LINK_NAME {
            return Ok(None);
        }
        let request = self.handle.link().get().match_name(name);
        self.find_link(format!("link {name}"), request).await
    }

    async fn link_at(&self, index: u32) -> Result<Option<Link>, KernelError> {
        let request = self.handle.link().get().match_index(index);
        self.find_link(format!("link number {index}"), request)
            .await
    }

    async fn links(&self) -> Result<Vec<Link>, KernelError> {
        let messages = collect(self.handle.link().get().execute(), "list links").await?;
        Ok(messages.iter().filter_map(decode::link).collect())
    }

    async fn add_tunnel(&self, device: &NewTunnel) -> Result<(), KernelError> {
        let operation = format!("make the device {}", device.name);
        let request = self.handle.link().add(encode::tunnel(device));
        request.execute().await.map_err(failed(operation))
    }

    async fn delete_link(&self, index: u32) -> Result<(), KernelError> {
        let deleted = self.handle.link().del(index).execute().await;
        let operation = format!("delete link number {index}");
        unless(libc::ENODEV, deleted.map_err(failed(operation)))
    }

    async fn set_link(&self, index: u32, change: LinkChange) -> Result<(), KernelError> {
        let (message, what) = encode::change(index, change);
        let operation = format!("set link number {index} to {what}");
        let request = self.handle.link().set(message);
        request.execute().await.map_err(failed(operation))?;
        // Another message type: the one above cannot name the kind of link.
        if let Some(learning) = change.learning {
            let operation = format!("set learning of link number {index} to {learning}");
            let request = self.handle.link().change(encode::learning(index, learning));
            request.execute().await.map_err(failed(operation))?;
        }
        Ok(())
    }

    async fn silence_ipv6(&self, link: &Link) -> Result<(), KernelError> {
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let spec = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]);
        let mut message = LinkMessage::default();
        message.header.index = link.index;
        message.attributes.push(spec);
        let operation = format!("set {} to addrgenmode none", link.name);
        let request = self.handle.link().set(message);
        request.execute().await.map_err(failed(operation))?;
        // The view of /proc/sys/net is that of the calling thread's namespace.
        let path = format!("/proc/sys/net/ipv6/conf/{}/accept_ra", link.name);
        std::fs::write(&path, "0").map_err(|source| KernelError {
            operation: format!("write {path}"),
            source,
        })
    }

    async fn accept_own_sources(&self, link: &Link) -> Result<(), KernelError> {
        let path = format!("/proc/sys/net/ipv4/conf/{}/accept_local", link.name);
        std::fs::write(&path, "1").map_err(|source| KernelError {
            operation: format!("write {path}"),
            source,
        })
    }

    fn computes_checksums(&self, device: &str) -> Result<bool, KernelError> {
        // As everything about names, in the namespace of the calling thread.
        ethtool::tx_checksum(device).map_err(|source| KernelError {
            operation: format!("ask for tx-checksum-ip-generic of {device}"),
            source,
        })
    }

    fn compute_checksums(&self, device: &str, on: bool) -> Result<(), KernelError> {
        ethtool::set_tx_checksum(device, on).map_err(|source| KernelError {
            operation: format!("set tx-checksum-ip-generic of {device} to {on}"),
            source,
        })
    }

    async fn addresses(&self, index: u32) -> Result<Vec<IpNet>, KernelError> {
        let request = self.handle.address().get().set_link_index_filter(index);
        let messages = collect(request.execute(), "list addresses").await?;
        Ok(messages.iter().filter_map(decode::prefix).collect())
    }

    async fn add_address(&self, index: u32, address: IpNet) -> Result<(), KernelError> {
        let (ip, len) = (address.addr(), address.prefix_len());
        let operation = format!("add address {address} to link number {index}");
        let mut request = self.handle.address().add(index, ip, len);
        // It comes from our lease, so no other node has it; and who would ask for it on the link, while it cannot be
        // used, reaches nobody through a tunnel (RFC 4862 section 5.4).
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        let added = request.execute().await;
        unless(libc::EEXIST, added.map_err(failed(operation)))
    }

    async fn delete_address(&self, index: u32, address: IpNet) -> Result<(), KernelError> {
        let len = address.prefix_len();
        let message = match address.addr() {
            IpAddr::V4(ip) => AddressMessageBuilder::<Ipv4Addr>::new()
                .index(index)
                .address(ip, len)
                .build(),
            IpAddr::V6(ip) => AddressMessageBuilder::<Ipv6Addr>::new()
                .index(index)
                .address(ip, len)
                .build(),
        };
        let operation = format!("delete address {address} from link number {index}");
        let deleted = self.handle.address().del(message).execute().await;
        unless(libc::EADDRNOTAVAIL, deleted.map_err(failed(operation)))
    }

    async fn routes(&self) -> Result<Vec<Route>, KernelError> {
        let messages = self.route_messages().await?;
        Ok(messages.iter().flat_map(decode::routes).collect())
    }

    async fn probe_routes(&self) -> Result<Vec<Route>, KernelError> {
        let messages = self.route_messages().await?;
        let routes = |message| decode::routes_of(message, PROBE_TABLE);
        Ok(messages.iter().flat_map(routes).collect())
    }

    async fn steer_probes(&self, v4: bool, v6: bool) -> Result<bool, KernelError> {
        let mut changed = false;
        for (version, wanted) in [(IpVersion::V4, v4), (IpVersion::V6, v6)] {
            let there = self.handle.rule().get(version.clone()).execute();
            let there: Vec<RuleMessage> = match collect(there, "list routing rules").await {
                Err(error) if error.is_unsupported() && !wanted => continue,
                there => there?,
            };
            let ours: Vec<RuleMessage> = there.into_iter().filter(encode::is_probe_rule).collect();
            if wanted && ours.len() == 1 {
                continue;
            }
            for rule in ours {
                changed = true;
                let deleted = self.handle.rule().del(rule).execute().await;
                let what = "delete the routing rule for probes".to_owned();
                unless(libc::ENOENT, deleted.map_err(failed(what)))?;
            }
            if wanted {
                changed = true;
                let mut request = self.handle.rule().add();
                *request.message_mut() = encode::probe_rule(version);
                let what = "add the routing rule for probes".to_owned();
                let added = request.execute().await;
                unless(libc::EEXIST, added.map_err(failed(what)))?;
            }
        }
        Ok(changed)
    }

    async fn add_route(&self, route: Route) -> Result<(), KernelError> {
        let message = encode::route(&route)?;
        let operation = format!("add route {}", route);
        let added = self.handle.route().add(message).execute().await;
        match added.map_err(failed(operation)) {
            Err(error) if error.source.raw_os_error() == Some(libc::EEXIST) => {
                let same = |other: &Route| {
                    other.net == route.net
                        && other.link == route.link
                        && other.gateway == route.gateway
                };
                if self.routes().await?.iter().any(same) {
                    Ok(())
                } else {
                    Err(error)
                }
            }
            result => result,
        }
    }

    async fn replace_route(&self, route: Route) -> Result<(), KernelError> {
        let message = encode::route(&route)?;
        let operation = format!("replace route {}", route);
        let request = self.handle.route().add(message).replace();
        request.execute().await.map_err(failed(operation))
    }

    async fn delete_route(&self, route: Route) -> Result<(), KernelError> {
        let message = encode::route(&route)?;
        let operation = format!("delete route {}", route);
        let deleted = self.handle.route().del(message).execute().await;
        unless(libc::ESRCH, deleted.map_err(failed(operation)))
    }

    async fn neighbours(&self, index: u32) -> Result<Vec<Neighbour>, KernelError> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let messages = self.entries(family, index, "list neighbours").await?;
            let neighbours = messages.iter().filter_map(decode::neighbour);
            all.extend(neighbours.filter(|neighbour| neighbour.link == index));
        }
        Ok(all)
    }

    async fn neighbour(&self, index: u32, ip: IpAddr) -> Result<Option<Known>, KernelError> {
        let family = match ip {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        let messages = self.entries(family, index, "list neighbours").await?;
        let mut of_link = messages
            .iter()
            .filter(|message| message.header.ifindex == index);
        Ok(of_link.find_map(|message| decode::known(message, ip)))
    }

    async fn forwards(&self, index: u32) -> Result<Vec<Forward>, KernelError> {
        let what = "list forwarding entries";
        let messages = self.entries(AddressFamily::Bridge, index, what).await?;
        let forwards = messages.iter().filter_map(decode::forward);
        Ok(forwards.filter(|forward| forward.link == index).collect())
    }

    async fn edit(&self, edits: &[Edit]) -> Vec<Result<(), KernelError>> {
        // Each future sends its request when it is first polled, and that happens in order.
        let futures: Vec<_> = edits.iter().map(|&edit| self.edit_one(edit)).collect();
        futures_util::stream::iter(futures)
            .buffered(EDITS_AT_ONCE)
            .collect()
            .await
    }

    fn setting(&self, path: &str) -> Option<String> {
        // The view of /proc/sys/net is that of the calling thread's namespace.
        let text = std::fs::read_to_string(format!("/proc/sys/net/{path}")).ok()?;
        Some(text.trim().to_owned())
    }

    async fn snapshot(&self) -> Result<Snapshot, KernelError> {
        let links = collect(self.handle.link().get().execute(), "list links").await?;
        let addrs = collect(self.handle.address().get().execute(), "list addresses").await?;
        let routes = self.route_messages().await?;
        Ok(decode::snapshot(&links, &addrs, &routes))
    }

    async fn route_to(&self, to: IpAddr) -> Result<Option<Reach>, KernelError> {
        let operation = format!("ask for the route to {to}");
        let whole = if to.is_ipv4() { 32 } else { 128 };
        let message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(to, whole)
            .map_err(|error| KernelError {
                operation: operation.clone(),
                source: io::Error::new(io::ErrorKind::InvalidInput, error.to_string()),
            })?
            .build();
        match collect(self.handle.route().get(message).execute(), &operation).await {
            Ok(answers) => Ok(answers.first().and_then(|answer| decode::reach(to, answer))),
            Err(error) if error.source.raw_os_error() == Some(libc::ENETUNREACH) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn add_blackhole(&self, net: IpNet) -> Result<(), KernelError> {
        let operation = format!("add the blackhole route {net}");
        let message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(net.network(), net.prefix_len())
            .map_err(|error| KernelError {
                operation: operation.clone(),
                source: io::Error::new(io::ErrorKind::InvalidInput, error.to_string()),
            })?
            .kind(RouteType::BlackHole)
            .protocol(RouteProtocol::Boot)
            .build();
        let added = self.handle.route().add(message).execute().await;
        unless(libc::EEXIST, added.map_err(failed(operation)))
    }

    fn monitor(&self) -> Result<mpsc::Receiver<Change>, KernelError> {
        monitor::start()
    }
}
