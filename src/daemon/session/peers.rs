//! Owns what a session knows of its peers: what the store says, and what follows for whatever carries the packets.

use std::collections::HashSet;
use std::time::Instant;

use super::Session;
use crate::backend::desired::Refused;
use crate::daemon::carrier::{Wanted, tell};
use crate::daemon::renewal::Order;
use crate::lease::LeaseDelta;
use crate::store::{Cause, StoreEvent};

/// Problems of the store that are remembered for status.
const MAX_PROBLEMS: usize = 64;

impl Session {
    /// Takes news from the store in; whether any peer is concerned.
    pub(super) fn apply(&mut self, event: StoreEvent) -> bool {
        let now = Instant::now();
        self.publication.taken(now);
        self.counts.store_events += 1;
        self.counts.store_heard = now;
        let (deltas, problems) = match event {
            StoreEvent::Snapshot { leases, problems } => {
                self.listed = true;
                let refused = self.peers.refused().map(|refused| refused.lease.subnets);
                let known = self
                    .peers
                    .leases()
                    .map(|lease| lease.subnets)
                    .chain(refused);
                (self.hold.filter_listing(leases, known, now), problems)
            }
            StoreEvent::Delta { deltas, problems } => (self.hold.filter(deltas, now), problems),
            StoreEvent::OwnLost { to, .. } => {
                // The keeper lives as long as the session.
                let _ended = self.orders.send(Order::Lost(to));
                return false;
            }
        };
        self.counts.store_problems += problems.len() as u64;
        for problem in problems {
            self.problems
                .retain(|known| known.subject != problem.subject);
            if problem.cause == Cause::Solved {
                tracing::info!("{problem}");
                continue;
            }
            if problem.cause == Cause::Overwritten {
                // The keeper lives as long as the session.
                let attrs = self.registration.lease.attrs.clone();
                let _ended = self.orders.send(Order::Publish(attrs));
            }
            self.log_limited(problem.to_string());
            if self.problems.len() >= MAX_PROBLEMS {
                self.problems.remove(0);
            }
            self.problems.push(problem);
        }
        self.take(deltas)
    }

    /// Takes changes of leases in; whether any peer is concerned.
    pub(super) fn take(&mut self, deltas: Vec<LeaseDelta>) -> bool {
        let applied = self.peers.apply_delta(deltas);
        for change in &applied.changes {
            tracing::debug!(?change, "peer");
        }
        for refused in &applied.refused {
            self.log_lease(refused);
        }
        !applied.changes.is_empty()
    }

    /// Takes the peers as they are now to whatever carries the packets.
    pub(super) fn publish(&mut self) {
        if self.carrier.is_none() {
            self.publication.put_off();
            return;
        }
        let begun = Instant::now();
        let wanted = self.wanted();
        if let Some(carrier) = &mut self.carrier {
            carrier.publish(wanted);
            if carrier.is_stale() {
                self.look_soon();
            }
        }
        self.tell_watches();
        self.publication.published(begun, Instant::now());
    }

    /// What should be there for the peers as they are now.
    pub(super) fn wanted(&mut self) -> Wanted {
        self.directory.update(self.peers.leases());
        if let (Some(commands), true) = (&self.commands, self.listed) {
            commands.want(self.peers.leases());
        }
        let registration = &self.registration;
        let own = self.peers.own();
        let leases = self.peers.leases();
        let (mut desired, mut refused) =
            registration
                .plan
                .desired(&registration.config, &own, leases);
        desired.complete = self.listed;
        self.ways.prove(&mut desired);
        let (routes, unreachable) = registration.plan.routes(self.peers.leases());
        refused.extend(unreachable);
        // There may be thousands.
        let told: HashSet<&Refused> = self.refused.iter().collect();
        tell(refused.iter().filter(|refused| !told.contains(refused)));
        self.refused = refused;
        Wanted { routes, desired }
    }
}
