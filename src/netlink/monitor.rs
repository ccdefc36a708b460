//! Owns the subscription to the kernel's notifications. Never interprets them beyond what they are about, and
//! never holds many: a notification is a hint, and a lost one becomes [`Change::Everything`].

use std::time::Duration;

use futures_util::{Stream, StreamExt};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::{AsyncSocket as _, SocketAddr};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::mpsc;

use super::decode;
use crate::backend::kernel::{Change, KernelError};

const GROUPS: &[MulticastGroup] = &[
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Neigh,
];

/// Room for notifications that arrive in a burst, such as the deletion of a link with thousands of routes at
/// about 200 bytes each; past it the kernel reports an overrun.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Wait before a subscription that ended is made anew.
const RESUBSCRIBE_AFTER: Duration = Duration::from_secs(1);

/// Changes that wait for their receiver, which may be busy for hours with waiting for a configuration.
const CHANGES: usize = 256;

type Message = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr);

/// Subscribes, and reports until the receiver is dropped.
pub(super) fn start() -> Result<mpsc::Receiver<Change>, KernelError> {
    let subscription = subscribe()?;
    let (changes, receiver) = mpsc::channel(CHANGES);
    tokio::spawn(report(subscription, changes));
    Ok(receiver)
}

/// The handle keeps the connection open.
fn subscribe() -> Result<(Handle, impl Stream<Item = Message> + Unpin + Send + 'static), KernelError>
{
    let (mut connection, handle, messages) =
        rtnetlink::new_multicast_connection(GROUPS).map_err(|source| KernelError {
            operation: "subscribe to netlink notifications".to_owned(),
            source,
        })?;
    let socket = connection.socket_mut().socket_mut();
    if let Err(error) = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER) {
        tracing::debug!(%error, "netlink receive buffer stays small: overruns are repaired by looking again");
    }
    tokio::spawn(connection);
    Ok((handle, messages))
}

async fn report(
    subscription: (Handle, impl Stream<Item = Message> + Unpin),
    changes: mpsc::Sender<Change>,
) {
    forward(subscription, &changes, false).await;
    while !changes.is_closed() {
        tracing::debug!("netlink subscription ended, making a new one");
        tokio::select! {
            () = changes.closed() => return,
            () = tokio::time::sleep(RESUBSCRIBE_AFTER) => {}
        }
        match subscribe() {
            Ok(subscription) => forward(subscription, &changes, true).await,
            Err(error) => tracing::debug!(%error, "no netlink subscription yet"),
        }
    }
}

/// Returns when the subscription or the interest in it has ended. The kernel's messages are always read: what
/// finds no room is replaced by one [`Change::Everything`] as soon as there is some, and so is whatever a
/// subscription made anew has missed.
async fn forward(
    (_handle, mut messages): (Handle, impl Stream<Item = Message> + Unpin),
    changes: &mpsc::Sender<Change>,
    mut missed: bool,
) {
    loop {
        let message = tokio::select! {
            () = changes.closed() => return,
            room = changes.reserve(), if missed => {
                let Ok(room) = room else { return };
                room.send(Change::Everything);
                missed = false;
                continue;
            }
            message = messages.next() => message,
        };
        let Some((message, _from)) = message else {
            return;
        };
        let Some(change) = interpret(message) else {
            continue;
        };
        // Closed is noticed above.
        missed |= !missed && changes.try_send(change).is_err();
    }
}

fn interpret(message: NetlinkMessage<RouteNetlinkMessage>) -> Option<Change> {
    use RouteNetlinkMessage as Message;
    if matches!(message.payload, NetlinkPayload::Overrun(_)) {
        return Some(Change::Everything);
    }
    let NetlinkPayload::InnerMessage(inner) = message.payload else {
        return None;
    };
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "an answer, or about something else"
    )]
    match inner {
        Message::NewLink(link) | Message::DelLink(link) => {
            let index = link.header.index;
            let tunnel = decode::link(&link).and_then(|link| link.tunnel);
            Some(tunnel.map_or(Change::Link(index), |_| Change::Tunnel(index)))
        }
        Message::NewAddress(address) | Message::DelAddress(address) => {
            Some(Change::Address(address.header.index))
        }
        Message::NewRoute(route) | Message::DelRoute(route) => {
            let routes = decode::routes(&route);
            routes.first().map(|route| Change::Route(route.net))
        }
        Message::NewNeighbour(entry) | Message::DelNeighbour(entry) => {
            Some(Change::Neighbour(entry.header.ifindex))
        }
        _ => None,
    }
}
