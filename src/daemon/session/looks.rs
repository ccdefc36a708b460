//! Owns when a session looks at what carries its packets, and what follows from what it finds.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::{RESYNC, Session};
use crate::backend::kernel::{Change, Kernel};
use crate::daemon::Daemon;
use crate::daemon::carrier::{Carrier, Looked};
use crate::probe::Ways;
use crate::store::LeaseStore;
use crate::sys::heap;

/// A burst of notifications about the device is answered by one look, this much later.
const SETTLE: Duration = Duration::from_millis(20);

/// News of the external interface is looked into this much later, when an address that is taken away only to be
/// set again is back.
const SETTLE_INTERFACE: Duration = Duration::from_secs(1);

/// Without a change for so long, changes have ended.
const QUIET: Duration = Duration::from_secs(5);

/// What could not be put right is tried again this much later.
const RETRY: Duration = Duration::from_secs(1);

impl<S: LeaseStore, K: Kernel> Daemon<'_, S, K> {
    /// Opens what carries the packets again.
    pub(super) async fn reopen(&mut self, session: &mut Session) {
        let wanted = session.wanted();
        let opened = Carrier::open(self.options, &session.registration, self.kernel, wanted);
        match opened.await {
            Ok(carrier) => {
                session.carrier = Some(carrier);
                session.tell_ways();
                session.publication.started(Instant::now());
                session.down = None;
                session.backoff.succeeded(Instant::now());
                session.look_at = Instant::now() + RESYNC;
                session.tell_senders();
                session.tell_past();
                session.look_at_checksums();
                session.tell_watches();
                self.reopened += 1;
            }
            Err(error) => session.close(&error.to_string()),
        }
    }
}

impl Session {
    /// Makes the next look at the device come soon if the change may be about it.
    pub(super) fn notice(&mut self, change: Change) {
        let external = self.registration.choice().index;
        let about_external = match change {
            Change::Link(index) | Change::Tunnel(index) | Change::Address(index) => {
                index == external || self.moved.is_some()
            }
            Change::Route(_) | Change::Neighbour(_) => false,
            Change::Everything => true,
        };
        if [Change::Link(external), Change::Tunnel(external)].contains(&change) {
            self.ways.hurry();
            self.tell_past();
        }
        if about_external && self.choose_at.is_none() {
            self.choose_at = Some(Instant::now() + SETTLE_INTERFACE);
        }
        let Some(carrier) = &self.carrier else { return };
        if carrier.concerns(change, external) {
            self.look_soon();
        }
    }

    /// Looks before long: at most a fifth of the time is spent on looking, however much is going on.
    pub(super) fn look_soon(&mut self) {
        let took = self
            .carrier
            .as_ref()
            .map_or(Duration::ZERO, |carrier| carrier.look_took);
        self.look_at = self.look_at.min(Instant::now() + SETTLE.max(took * 4));
    }

    /// Looks at what carries the packets and puts it right.
    pub(super) async fn look(&mut self, kernel: &impl Kernel) {
        let Some(carrier) = &mut self.carrier else {
            return;
        };
        let looked = carrier.look(kernel).await;
        self.tidy();
        self.tell_senders();
        self.tell_past();
        self.look_at_checksums();
        self.tell_watches();
        self.look_at = Instant::now() + RESYNC;
        self.counts.looks += 1;
        self.incomplete = None;
        self.tell_ways();
        match looked {
            Looked::Unchanged => {}
            Looked::Programmed(changes) => tracing::debug!(changes, "programmed"),
            Looked::Repaired(what) => {
                self.counts.repairs += 1;
                self.log_limited(format!("changed by somebody else, repaired: {what}"));
            }
            Looked::Incomplete(why) => {
                self.look_at = Instant::now() + RETRY;
                self.log_limited(why.clone());
                self.incomplete = Some(why);
            }
            Looked::Broken(why) => self.close(&why),
        }
    }

    /// Gives back the memory that changes of leases took on their way here, once they have ended.
    fn tidy(&mut self) {
        let tables = Some(self.publication.cost().count);
        if tables != self.tidied && self.publication.is_quiet(QUIET, Instant::now()) {
            self.tidied = tables;
            heap::give_back();
        }
    }

    /// Has the source check know the peers as the last look found them.
    pub(super) fn tell_senders(&self) {
        let report = self.carrier.as_ref().map(|carrier| &carrier.report);
        if let Some(report) = report
            && let Some(senders) = &report.senders
        {
            self.guard.want(senders, &report.devices);
        }
    }

    /// Has devices tested that are new, once there are peers to test them with.
    pub(super) fn look_at_checksums(&mut self) {
        let carrier = self.carrier.as_ref();
        let devices = carrier.map_or(&[][..], |carrier| carrier.report.devices.as_slice());
        let devices = match self.peers.leases().len() {
            0 => &[],
            _ => devices,
        };
        self.checksums.look(devices);
    }

    /// Has the peers proven to whom the last look found a way past the tunnel.
    pub(super) fn tell_past(&self) {
        let report = self.carrier.as_ref().map(|carrier| &carrier.report);
        self.ways.want(&self.registration, report);
    }

    /// Says which links carry the overlay, so that a probe's way can be told.
    pub(super) fn tell_ways(&self) {
        let carrier = self.carrier.as_ref();
        let tunnels = carrier.map_or(&[][..], |carrier| carrier.tunnels.as_slice());
        let devices = carrier.map_or(&[][..], |carrier| carrier.report.devices.as_slice());
        let ways = Ways {
            tunnel: tunnels.iter().map(|tunnel| tunnel.index).collect(),
            kernel_tunnel: devices.to_vec(),
            underlay: self.registration.ends.iter().map(|end| end.index).collect(),
            past: carrier.map_or_else(HashSet::new, |carrier| carrier.report.direct.clone()),
        };
        let mtu = self.registration.plan.mtu();
        self.directory.set_ways(ways, mtu.get());
    }

    /// Closes what carries the packets, to be opened again.
    pub(super) fn close(&mut self, why: &str) {
        self.carrier = None;
        self.incomplete = None;
        let now = Instant::now();
        self.reopen_at = self.backoff.failed(now);
        let wait = self.reopen_at.saturating_duration_since(now);
        tracing::error!("tunnel is down: {why}: opening it again in {wait:?}");
        self.down = Some(why.to_owned());
    }
}
