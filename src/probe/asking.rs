//! Owns asking one other for more than an answer: a report, or what it sees of a trace. Never asks more than
//! [`ATTEMPTS`] times, and never decides what is said.

use std::time::Duration;

use tokio::time::timeout;

use super::prober::{Carrier, Prober};
use super::{socket, wall_clock};
use crate::wire::probe::{Kind, Order, Probe, ProbeError, Report, Sights, write_asked_from};

/// Bytes of the datagram that asks, and that what is said has at most: what every IPv6 link carries, less the headers.
const LEN: usize = 1280 - 48;

/// How often the same is asked.
const ATTEMPTS: u32 = 3;

impl Prober {
    /// Asks the other about itself and its peers from the first-th on; none if it does not say.
    pub async fn report(&mut self, first: u32, patience: Duration) -> Option<(Report, Probe)> {
        let ask = |bytes: &mut [u8]| write_asked_from(bytes, first);
        let asked = self.ask(Kind::Ask, self.nonce(), ask, Report::parse, patience);
        asked.await
    }

    /// Has the other look out for the probes with this nonce, or tell what it saw of them; none if it does not say.
    pub async fn watch(&mut self, nonce: u64, order: Order, patience: Duration) -> Option<Sights> {
        let ask = |bytes: &mut [u8]| order.write(bytes);
        let asked = self.ask(Kind::Watch, nonce, ask, Sights::parse, patience);
        asked.await.map(|(sights, _)| sights)
    }

    /// Asks until something is said that `read` can read. Each attempt waits as long as `patience`.
    async fn ask<T>(
        &self,
        kind: Kind,
        nonce: u64,
        write: impl Fn(&mut [u8]),
        read: impl Fn(&[u8]) -> Result<T, ProbeError>,
        patience: Duration,
    ) -> Option<(T, Probe)> {
        let Carrier::Probes(socket) = &self.carrier else {
            return None;
        };
        for _ in 0..ATTEMPTS {
            let sequence = self.directory.next_sequence();
            let mut ask = [0; LEN];
            let mut probe = self.request(kind, sequence);
            probe.nonce = nonce;
            probe.left = wall_clock();
            probe.write(&mut ask);
            write(&mut ask);
            // A refusal is an answer, too, and comes while waiting.
            let _refused = socket.send(&ask).await;
            let waited = timeout(patience, async {
                loop {
                    let mut bytes = [0; LEN];
                    let received = socket::receive(socket, &mut bytes).await.ok()?;
                    let bytes = bytes.get(..received.len)?;
                    let said = Probe::parse(bytes).ok()?;
                    let ours = said.nonce == nonce && said.sequence == sequence;
                    if Some(said.kind) == kind.answer() && ours {
                        let via = self.directory.via(received.link);
                        return Some((read(bytes).ok()?, said, via));
                    }
                }
            });
            if let Ok(Some((said, probe, via))) = waited.await {
                self.hear(probe, via);
                return Some((said, probe));
            }
        }
        None
    }
}
