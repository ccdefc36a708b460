//! Owns the requests that the operations are made of, and what their errors are called. Never decides which to make.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use futures_util::{Stream, TryStreamExt as _};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage};
use netlink_packet_route::route::RouteMessage;
use rtnetlink::RouteMessageBuilder;

use super::{Netlink, decode, encode};
use crate::backend::kernel::{Edit, Forward, KernelError, Link, Neighbour, PROBE_TABLE};

impl Netlink {
    pub(super) async fn find_link(
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

    /// Neighbours, or forwarding entries for [`AddressFamily::Bridge`]. Those of other links may be among them:
    /// older kernels do not select.
    pub(super) async fn entries(
        &self,
        family: AddressFamily,
        index: u32,
        operation: &str,
    ) -> Result<Vec<NeighbourMessage>, KernelError> {
        let mut request = self.handle.neighbours().get().set_address_family(family);
        if family != AddressFamily::Bridge {
            let only = NeighbourAttribute::IfIndex(index);
            request.message_mut().attributes.push(only);
        }
        collect(request.execute(), operation).await
    }

    pub(super) async fn edit_one(&self, edit: Edit) -> Result<(), KernelError> {
        let handle = &self.handle;
        let (gone, done) = match edit {
            Edit::AddRoute(route) => {
                let request = handle.route().add(encode::route(&route)?);
                (None, request.execute().await)
            }
            Edit::ReplaceRoute(route) => {
                let request = handle.route().add(encode::route(&route)?).replace();
                (None, request.execute().await)
            }
            Edit::DeleteRoute(route) => {
                let request = handle.route().del(encode::route(&route)?);
                (Some(libc::ESRCH), request.execute().await)
            }
            Edit::AddProbeRoute(route) => {
                let message = encode::in_table(encode::route(&route)?, PROBE_TABLE);
                (None, handle.route().add(message).execute().await)
            }
            Edit::DeleteProbeRoute(route) => {
                let message = encode::in_table(encode::route(&route)?, PROBE_TABLE);
                let done = handle.route().del(message).execute().await;
                (Some(libc::ESRCH), done)
            }
            Edit::SetNeighbour(Neighbour { link, ip, mac }) => {
                let request = handle.neighbours().add(link, ip);
                let request = request.link_layer_address(&mac.bytes()).replace();
                (None, request.execute().await)
            }
            Edit::DeleteNeighbour(neighbour) => {
                let request = handle.neighbours().del(encode::neighbour(&neighbour));
                (Some(libc::ENOENT), request.execute().await)
            }
            Edit::SetForward(Forward { link, mac, to }) => {
                let request = handle.neighbours().add_bridge(link, &mac.bytes());
                let request = request.flags(NeighbourFlags::Own).destination(to).replace();
                (None, request.execute().await)
            }
            Edit::DeleteForward(forward) => {
                let request = handle.neighbours().del(encode::forward(&forward));
                (Some(libc::ENOENT), request.execute().await)
            }
        };
        let result = done.map_err(failed(edit.to_string()));
        match gone {
            // What was on a link goes with it.
            Some(code) => unless(code, unless(libc::ENODEV, result)),
            None => result,
        }
    }

    pub(super) async fn route_messages(&self) -> Result<Vec<RouteMessage>, KernelError> {
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

pub(super) async fn collect<T>(
    stream: impl Stream<Item = Result<T, rtnetlink::Error>>,
    operation: &str,
) -> Result<Vec<T>, KernelError> {
    stream
        .try_collect()
        .await
        .map_err(failed(operation.to_owned()))
}

pub(super) fn failed(operation: String) -> impl FnOnce(rtnetlink::Error) -> KernelError {
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
pub(super) fn unless(code: i32, result: Result<(), KernelError>) -> Result<(), KernelError> {
    match result {
        Err(error) if error.source.raw_os_error() == Some(code) => Ok(()),
        result => result,
    }
}
