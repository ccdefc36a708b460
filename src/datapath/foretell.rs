//! Owns the answer to "what would become of this packet": the workers' own decision over the table in force,
//! without sending anything. Never counts, never changes what was learned.

use std::net::SocketAddr;
use std::sync::PoisonError;

use super::forward::{DecapVerdict, EncapVerdict, Outer, Rules};
use super::{Datapath, DropReason};
use crate::addr::Mtu;
use crate::wire::ip;

/// What would become of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foretold {
    /// It would go to this peer.
    Sent(SocketAddr),
    /// It would go to this peer in fragments of at most so many bytes.
    Fragmented(SocketAddr, Mtu),
    /// It would be written to the TUN.
    Delivered,
    /// Its sender would be told, as far as the limit on ICMP errors allows.
    Answered(DropReason),
    /// It would end here.
    Dropped(DropReason),
}

impl Datapath {
    /// Of a packet read from the TUN.
    #[must_use]
    pub fn foretell_encap(&self, packet: &[u8]) -> Foretold {
        let mut packet = packet.to_vec();
        let Ok(meta) = ip::parse(&packet) else {
            return Foretold::Dropped(DropReason::Malformed);
        };
        let len = packet.len();
        self.with_table(
            |table, rules| match rules.encap(table, &mut packet, &meta, len) {
                EncapVerdict::Send { peer, .. } => Foretold::Sent(peer.addr),
                EncapVerdict::Fragment { peer, max_len, .. } => {
                    Foretold::Fragmented(peer.addr, max_len)
                }
                EncapVerdict::Answer(_, reason) => Foretold::Answered(reason),
                EncapVerdict::Drop(reason) => Foretold::Dropped(reason),
            },
        )
    }

    /// Of a packet that came in `outer`.
    #[must_use]
    pub fn foretell_decap(&self, packet: &[u8], outer: Outer) -> Foretold {
        let mut packet = packet.to_vec();
        let Ok(meta) = ip::parse(&packet) else {
            return Foretold::Dropped(DropReason::of_unparsed(packet.len()));
        };
        self.with_table(
            |table, rules| match rules.decap(table, &mut packet, &meta, outer) {
                DecapVerdict::Deliver(_) => Foretold::Delivered,
                DecapVerdict::Answer(_, _, reason) => Foretold::Answered(reason),
                DecapVerdict::Drop(reason) => Foretold::Dropped(reason),
            },
        )
    }

    fn with_table<T>(&self, decide: impl FnOnce(&super::table::Table, &Rules) -> T) -> T {
        let settings = &self.shared.settings;
        let rules = Rules::new(settings, self.shared.clock);
        let table = self
            .publisher
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .current();
        decide(&table, &rules)
    }
}
