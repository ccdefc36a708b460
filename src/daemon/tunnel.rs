//! Owns the open data plane: from settings to running workers, and back. Never decides when to open it again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::{DaemonError, Options};
use crate::backend::data_plane::DataPlane;
use crate::backend::kernel::{Kernel, KernelError};
use crate::backend::reconcile::{self, Outcome, reconcile};
use crate::backend::udp;
use crate::datapath::foretell::Foretold;
use crate::datapath::tap::Taps;
use crate::datapath::{Datapath, Encapsulation, Event, PeerRoute, Settings, Status};

/// Events that wait to be looked at. The workers drop further ones; what matters for good has its own place.
const EVENTS: usize = 1024;

/// What the workers say.
pub(super) struct Events {
    /// Worth a log line.
    pub(super) news: mpsc::Receiver<Event>,
    /// The data plane is at its end. One is enough, so none is ever lost to a flood of news.
    pub(super) fatal: mpsc::Receiver<Event>,
}

/// How the workers say it.
pub(super) type OnEvent = Arc<dyn Fn(Event) + Send + Sync>;

/// A running data plane and its configured device. Dropping it drains and stops the workers and takes the device
/// away.
pub(super) struct Tunnel {
    /// Some until it is dropped.
    datapath: Option<Datapath>,
    pub(super) device: String,
    pub(super) index: u32,
    pub(super) desired: reconcile::Desired,
    /// Where its datagrams come from, and arrive. A table holds only peers of the same family.
    pub(super) bind: SocketAddr,
    pub(super) encapsulation: Encapsulation,
}

impl Tunnel {
    /// Opens the data plane, configures the device, publishes `routes` and starts the workers.
    pub(super) async fn open(
        options: &Options,
        plane: DataPlane,
        on_event: OnEvent,
        kernel: &impl Kernel,
        routes: &[PeerRoute],
    ) -> Result<Self, DaemonError> {
        let begun = Instant::now();
        let (bind, mtu) = (plane.bind, plane.mtu);
        let datapath = Datapath::open(Settings {
            engine: options.engine,
            workers: options.workers,
            pin: options.pin,
            device: udp::DEVICE.to_owned(),
            encapsulation: plane.encapsulation,
            bind,
            mtu,
            source_check: plane.source_check,
            source_port: plane.source_port,
            local: plane.local,
            on_event,
        })?;
        let device = datapath.device().to_owned();
        let vanished = || DaemonError::DeviceVanished(device.clone());
        let link = kernel.link(&device).await?.ok_or_else(vanished)?;
        let mut tunnel = Self {
            datapath: Some(datapath),
            index: link.index,
            desired: plane.device,
            bind,
            encapsulation: plane.encapsulation,
            device,
        };
        match tunnel.repair(kernel).await? {
            Outcome::Gone => return Err(DaemonError::DeviceVanished(tunnel.device.clone())),
            Outcome::Done(actions) => tracing::debug!(?actions, "device configured"),
        }
        if let Some(datapath) = &mut tunnel.datapath {
            match kernel.accept_own_sources(&link).await {
                Ok(()) => datapath.answer_as_self(),
                // A container with a read-only /proc/sys: answers name the destination instead.
                Err(error) => tracing::debug!("{error}"),
            }
            datapath.publish(&reachable(routes, bind.is_ipv4()));
            datapath.start().map_err(DaemonError::Workers)?;
        }
        tracing::info!(
            "tunnel {} is up: bound to {}, MTU {}, {} peer routes, after {:?}",
            tunnel.device,
            bind,
            mtu,
            routes.len(),
            begun.elapsed()
        );
        Ok(tunnel)
    }

    /// Brings the device back to what it should be.
    pub(super) async fn repair(&self, kernel: &impl Kernel) -> Result<Outcome, KernelError> {
        reconcile(kernel, self.index, &self.desired).await
    }

    pub(super) fn publish(&self, routes: &[PeerRoute]) {
        if let Some(datapath) = &self.datapath {
            datapath.publish(&reachable(routes, self.bind.is_ipv4()));
        }
    }

    /// Asks the data plane what would become of a packet; none while it is being closed.
    pub(super) fn foretell(&self, ask: impl FnOnce(&Datapath) -> Foretold) -> Option<Foretold> {
        self.datapath.as_ref().map(ask)
    }

    pub(super) fn taps(&self) -> Option<&Taps> {
        self.datapath.as_ref().map(Datapath::taps)
    }

    pub(super) fn status(&self) -> Status {
        let status = self.datapath.as_ref().map(Datapath::status);
        status.unwrap_or_default()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if let Some(datapath) = self.datapath.take() {
            datapath.stop();
        }
    }
}

/// The routes to peers of one family of the underlay.
fn reachable(routes: &[PeerRoute], is_ipv4: bool) -> Vec<PeerRoute> {
    let of_family = |route: &&PeerRoute| route.addr.is_ipv4() == is_ipv4;
    routes.iter().filter(of_family).cloned().collect()
}

/// How workers tell the session.
pub(super) fn event_channels() -> (OnEvent, Events) {
    let (news_sender, news) = mpsc::channel(EVENTS);
    let (fatal_sender, fatal) = mpsc::channel(1);
    let on_event = move |event: Event| {
        let place = match event {
            Event::DeviceGone { .. } | Event::WorkerDied { .. } => &fatal_sender,
            Event::CapabilityWithdrawn { .. }
            | Event::CapabilityRestored { .. }
            | Event::FirstDrop { .. }
            | Event::Rejected { .. }
            | Event::PathMtu { .. }
            | Event::PeerRefused { .. } => &news_sender,
        };
        // Full or closed: a worker must not wait, and the counters tell what a lost line would have.
        let _lost = place.try_send(event);
    };
    (Arc::new(on_event), Events { news, fatal })
}
