//! Owns saying once what would otherwise be said per packet: the first drop per source and reason. Never
//! counts.

use std::net::{IpAddr, SocketAddr};

use super::Event;
use super::drop::DropReason;
use super::shared::Shared;
use super::table::{RETRY_AFTER_MS, Table};

/// Unknown sources remembered; more are dropped silently (and counted) until the memory is cleared.
const MAX_STRANGERS: usize = 32;

/// One worker's memory of what was said.
pub struct Reporter {
    strangers: Vec<IpAddr>,
    cleared_ms: u64,
}

impl Reporter {
    /// Nothing said yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            strangers: Vec::with_capacity(MAX_STRANGERS),
            cleared_ms: 0,
        }
    }

    /// Tells the control plane about a drop on decap, if it is the first of its kind.
    pub fn first_drop(
        &mut self,
        shared: &Shared,
        table: &Table,
        reason: DropReason,
        outer: SocketAddr,
        inner: Option<IpAddr>,
    ) {
        let news = match table.peers_by_ip(outer.ip()).first() {
            Some(peer) => {
                peer.dropped
                    .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                peer.first_drop(reason)
            }
            None => self.is_new_stranger(outer.ip(), || shared.clock.now_ms()),
        };
        if news {
            shared.event(Event::FirstDrop {
                reason,
                outer,
                inner,
            });
        }
    }

    fn is_new_stranger(&mut self, addr: IpAddr, now_ms: impl Fn() -> u64) -> bool {
        if self.strangers.contains(&addr) {
            return false;
        }
        if self.strangers.len() == MAX_STRANGERS {
            let now_ms = now_ms();
            if now_ms < self.cleared_ms + RETRY_AFTER_MS {
                return false;
            }
            self.cleared_ms = now_ms;
            self.strangers.clear();
        }
        self.strangers.push(addr);
        true
    }
}

impl Default for Reporter {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stranger_is_named_once_and_a_flood_of_them_is_not() {
        let mut reporter = Reporter::new();
        let addr = |i: u32| IpAddr::V4((0xcb00_7100 + i).into());
        let named = |reporter: &mut Reporter, now: u64| {
            (0..200)
                .filter(|&i| reporter.is_new_stranger(addr(i), || now))
                .count()
        };
        assert_eq!(named(&mut reporter, 1), MAX_STRANGERS);
        assert_eq!(named(&mut reporter, 2), 0);
        assert!(
            named(&mut reporter, RETRY_AFTER_MS + 1) > 0,
            "forgotten after a while"
        );
    }
}
