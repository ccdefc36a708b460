//! Owns hearing from the kernel that somebody changed a ruleset: the nftables notifications of nfnetlink.
//! Never says what changed beyond whether it may concern us, and never changes anything.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixDatagram as StdDatagram;

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, setsockopt, socket, sockopt,
};
use tokio::net::UnixDatagram;

/// `NFNLGRP_NFTABLES` (linux/netfilter/nfnetlink.h) is group 7; bind(2) takes groups as a mask.
const NFTABLES_GROUP: u32 = 1 << (7 - 1);
/// `NFNL_SUBSYS_NFTABLES`: the upper byte of a message's type.
const NFTABLES_SUBSYSTEM: u8 = 10;
/// Holds the notifications of some thousand rules; an overrun only means one look more.
const RECEIVE_BUFFER: usize = 1 << 20;
/// The kernel sends notifications in buffers of at most a page or 8 KiB (`NLMSG_GOODSIZE`), larger only for a
/// single larger message.
const DATAGRAM: usize = 64 << 10;

/// Which changes concern us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    /// Those of our own nftables tables.
    OwnTables,
    /// Those of the built-in chains of iptables that we have a jump in, and of our chains. A service proxy
    /// changes its own chains all the time; that costs us nothing.
    CompatChains,
    /// Everything in the tables of the source check, of which nobody but its keeper changes anything.
    SenderTables,
}

impl Interest {
    fn covers(self, table: &str, chain: Option<&str>) -> bool {
        match self {
            Self::OwnTables => {
                table == "loden-notrack" || table == "flannel-ipv4" || table == "flannel-ipv6"
            }
            Self::SenderTables => super::senders::is_ours(table),
            Self::CompatChains => super::iptables::SLOTS.iter().any(|slot| {
                slot.table == table
                    && chain.is_none_or(|name| name == slot.chain || slot.hooks.contains(&name))
            }),
        }
    }
}

/// A subscription in the network namespace of the thread that made it.
#[derive(Debug)]
pub(super) struct Events {
    /// A netlink socket, which to recv(2) is a datagram socket like any other, and to tokio must be one that
    /// it knows.
    socket: UnixDatagram,
    buffer: Vec<u8>,
    interest: Interest,
}

impl Events {
    /// Subscribes. Must be called within a tokio runtime.
    pub(super) fn subscribe(interest: Interest) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkNetFilter,
        )?;
        // Without CAP_NET_ADMIN the forced size is refused; the ordinary one is a matter of degree.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        }
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, NFTABLES_GROUP))?;
        Ok(Self {
            socket: UnixDatagram::from_std(StdDatagram::from(socket))?,
            buffer: vec![0; DATAGRAM],
            interest,
        })
    }

    /// Waits for a change that may concern us. Cancelling loses none.
    pub(super) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let received = self.socket.recv(&mut self.buffer).await;
            if concerns(overrun_is_none(received)?, &self.buffer, self.interest) {
                return Ok(());
            }
        }
    }

    /// Forgets what has arrived so far: one look answers all of it.
    pub(super) fn forget(&mut self) -> io::Result<()> {
        loop {
            match overrun_is_none(self.socket.try_recv(&mut self.buffer)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// The length of a datagram; `None` if the kernel had to drop some (netlink(7)).
fn overrun_is_none(received: io::Result<usize>) -> io::Result<Option<usize>> {
    match received {
        Ok(len) => Ok(Some(len)),
        Err(error) if error.raw_os_error() == Some(nix::Error::ENOBUFS as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a received datagram concerns us. Lost or unreadable ones do.
fn concerns(len: Option<usize>, buffer: &[u8], interest: Interest) -> bool {
    let Some(mut rest) = len.and_then(|len| buffer.get(..len)) else {
        return true;
    };
    while !rest.is_empty() {
        // struct nlmsghdr: length, type, flags, sequence, port; then struct nfgenmsg of 4 bytes.
        let Some((len, kind)) = header(rest) else {
            return true;
        };
        let Some(body) = rest.get(20..len) else {
            return true;
        };
        if message_concerns(kind, body, interest) {
            return true;
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

fn header(message: &[u8]) -> Option<(usize, u16)> {
    let len = u32::from_ne_bytes(message.get(..4)?.try_into().ok()?);
    let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    Some((usize::try_from(len).ok()?, kind))
}

/// Tables, chains and rules (`NFT_MSG_*` 0 to 8 of linux/netfilter/nf_tables.h) name their table in attribute
/// 1; a rule its chain in attribute 2, a chain itself in attribute 3. Sets and counters never matter here.
fn message_concerns(kind: u16, attributes: &[u8], interest: Interest) -> bool {
    let [message, subsystem] = kind.to_le_bytes();
    if subsystem != NFTABLES_SUBSYSTEM {
        return false;
    }
    // All kinds of messages about parts of a table name it first (linux/netfilter/nf_tables.h); that of a
    // generation, which names none, follows every change.
    if message > 8 {
        let sets = 9..=14;
        return interest == Interest::SenderTables
            && sets.contains(&message)
            && text(attributes, 1).is_some_and(|table| interest.covers(table, None));
    }
    let chain = match message {
        0..=2 => None,
        3..=5 => text(attributes, 3),
        _ => text(attributes, 2),
    };
    text(attributes, 1).is_none_or(|table| interest.covers(table, chain))
}

/// The text of the first attribute of this type: length, type, and a string that ends with 0.
fn text(mut attributes: &[u8], wanted: u16) -> Option<&str> {
    loop {
        let len = u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?);
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let len = usize::from(len);
        let value = attributes.get(4..len)?;
        if kind == wanted {
            return std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok();
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, attributes: &[(u16, &str)]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, value) in attributes {
            let len = u16::try_from(4 + value.len() + 1).unwrap();
            body.extend(len.to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(value.bytes().chain([0]));
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut bytes = u32::try_from(20 + body.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        bytes.extend(u16::from_le_bytes([kind, 10]).to_ne_bytes());
        bytes.resize(20, 0);
        bytes.extend(body);
        bytes
    }

    fn heard(bytes: &[u8], interest: Interest) -> bool {
        concerns(Some(bytes.len()), bytes, interest)
    }

    #[test]
    fn a_rule_removed_from_a_chain_with_our_jump_is_heard() {
        let gone = message(8, &[(1, "nat"), (2, "POSTROUTING")]);
        assert!(heard(&gone, Interest::CompatChains));
        assert!(!heard(&gone, Interest::OwnTables));
    }

    #[test]
    fn the_chains_of_a_service_proxy_are_not_listened_to() {
        let theirs = message(6, &[(1, "nat"), (2, "KUBE-SERVICES")]);
        assert!(!heard(&theirs, Interest::CompatChains));
        // Another message in the same datagram is.
        let both = [theirs, message(5, &[(1, "nat"), (3, "FLANNEL-POSTRTG")])].concat();
        assert!(heard(&both, Interest::CompatChains));
    }

    #[test]
    fn a_deleted_table_of_ours_is_heard_and_an_element_of_a_set_is_not() {
        assert!(heard(
            &message(2, &[(1, "flannel-ipv6")]),
            Interest::OwnTables
        ));
        assert!(!heard(
            &message(12, &[(1, "flannel-ipv6")]),
            Interest::OwnTables
        ));
        assert!(!heard(
            &message(2, &[(1, "firewalld")]),
            Interest::OwnTables
        ));
    }

    #[test]
    fn what_is_lost_or_cut_short_counts_as_a_change() {
        assert!(concerns(None, &[], Interest::OwnTables));
        let whole = message(2, &[(1, "firewalld")]);
        assert!(heard(&whole[..whole.len() - 3], Interest::OwnTables));
        assert!(heard(&[0; 16], Interest::OwnTables));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_fail(bytes: Vec<u8>) {
            heard(&bytes, Interest::CompatChains);
        }
    }
}
