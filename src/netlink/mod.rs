//! Owns the conversation with the kernel's network configuration over rtnetlink: implements
//! [`Kernel`]. Never decides what the configuration should be.

mod decode;
mod monitor;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{Stream, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage,
};
use netlink_packet_route::route::{RouteMessage, RouteProtocol, RouteType};
use rtnetlink::{AddressMessageBuilder, Handle, LinkUnspec, RouteMessageBuilder};
use tokio::sync::mpsc;

use crate::backend::kernel::{Change, Kernel, KernelError, Link, LinkChange, Route};
use crate::iface::{Reach, Snapshot};

/// The longest name a link may have, `IFNAMSIZ` less the final zero.
const MAX_LINK_NAME: usize = 15;

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

    async fn find_link(
        &self,
        what: String,
        request: rtnetlink::LinkGetRequest,
    ) -> Result<Option<Link>, KernelError> {
        match request.execute().try_next().await {
            Ok(message) => Ok(message.as_ref().and_then(decode::link)),
            Err(error) => match failed(format!("look up {what}"))(error) {
                gone if gone.source.raw_os_error() == Some(libc::ENODEV) => Ok(None),
                error => Err(error),
            },
        }
    }

    async fn route_messages(&self) -> Result<Vec<RouteMessage>, KernelError> {
        let mut all = Vec::new();
        for filter in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let routes = self.handle.route().get(filter).execute();
            all.extend(collect(routes, "list routes").await?);
        }
        Ok(all)
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

    async fn set_link(&self, index: u32, change: LinkChange) -> Result<(), KernelError> {
        let mut message = LinkUnspec::new_with_index(index);
        let mut what = Vec::new();
        if let Some(mtu) = change.mtu {
            message = message.mtu(u32::from(mtu.get()));
            what.push(format!("mtu {mtu}"));
        }
        if let Some(len) = change.tx_queue_len {
            message = message.append_extra_attribute(LinkAttribute::TxQueueLen(len));
            what.push(format!("txqueuelen {len}"));
        }
        if change.up {
            message = message.up();
            what.push("up".to_owned());
        }
        let operation = format!("set link number {index} to {}", what.join(" "));
        let request = self.handle.link().set(message.build());
        request.execute().await.map_err(failed(operation))
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

    async fn addresses(&self, index: u32) -> Result<Vec<IpNet>, KernelError> {
        let request = self.handle.address().get().set_link_index_filter(index);
        let messages = collect(request.execute(), "list addresses").await?;
        Ok(messages.iter().filter_map(decode::prefix).collect())
    }

    async fn add_address(&self, index: u32, address: IpNet) -> Result<(), KernelError> {
        let (ip, len) = (address.addr(), address.prefix_len());
        let operation = format!("add address {address} to link number {index}");
        let added = self.handle.address().add(index, ip, len).execute().await;
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

    async fn add_route(&self, route: Route) -> Result<(), KernelError> {
        let message = encode_route(&route)?;
        let operation = format!("add route {}", describe(&route));
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
        let message = encode_route(&route)?;
        let operation = format!("replace route {}", describe(&route));
        let request = self.handle.route().add(message).replace();
        request.execute().await.map_err(failed(operation))
    }

    async fn delete_route(&self, route: Route) -> Result<(), KernelError> {
        let message = encode_route(&route)?;
        let operation = format!("delete route {}", describe(&route));
        let deleted = self.handle.route().del(message).execute().await;
        unless(libc::ESRCH, deleted.map_err(failed(operation)))
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

fn describe(route: &Route) -> String {
    let mut text = route.net.to_string();
    if let Some(gateway) = route.gateway {
        text.push_str(&format!(" via {gateway}"));
    }
    text.push_str(&format!(" on link number {}", route.link));
    text
}

fn encode_route(route: &Route) -> Result<RouteMessage, KernelError> {
    let invalid = |error: String| KernelError {
        operation: format!("describe route {}", describe(route)),
        source: io::Error::new(io::ErrorKind::InvalidInput, error),
    };
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.net.network(), route.net.prefix_len())
        .map_err(|e| invalid(e.to_string()))?
        .output_interface(route.link)
        .protocol(RouteProtocol::from(route.protocol));
    if let Some(gateway) = route.gateway {
        builder = builder
            .gateway(gateway)
            .map_err(|e| invalid(e.to_string()))?;
    }
    if let Some(metric) = route.metric {
        builder = builder.priority(metric);
    }
    Ok(builder.build())
}

async fn collect<T>(
    stream: impl Stream<Item = Result<T, rtnetlink::Error>>,
    operation: &str,
) -> Result<Vec<T>, KernelError> {
    stream
        .try_collect()
        .await
        .map_err(failed(operation.to_owned()))
}

fn failed(operation: String) -> impl FnOnce(rtnetlink::Error) -> KernelError {
    move |error| KernelError {
        operation,
        source: if let rtnetlink::Error::NetlinkError(message) = &error {
            message.to_io()
        } else {
            io::Error::other(error.to_string())
        },
    }
}

/// Takes the error number that says "it is so already" for success.
fn unless(code: i32, result: Result<(), KernelError>) -> Result<(), KernelError> {
    match result {
        Err(error) if error.source.raw_os_error() == Some(code) => Ok(()),
        result => result,
    }
}
