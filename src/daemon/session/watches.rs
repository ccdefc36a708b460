//! Owns what captures learn where the kernel carries the packets: which links to watch, and who the peers are. Never
//! reads a packet.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use nix::net::if_::if_indextoname;
use tokio::sync::watch;

use super::Session;
use crate::backend::kernel::TunnelLink;
use crate::datapath::tap::{Capture, Wanted};
use crate::debug::watch::scene::{Kind, Peers, Place, Scene, Tunnel};
use crate::debug::watch::{self as packets, WatchError};

/// Captures of what the kernel carries. Dropping it ends them.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Watches {
    scenes: watch::Sender<Scene>,
    running: Arc<AtomicUsize>,
}

/// What of the packets that the kernel carries is watched. Those past every tunnel always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::daemon) enum Part {
    /// Inner packets, on the tunnel's device.
    Inner,
    /// The datagrams that they are wrapped into.
    Outer,
    /// Both.
    All,
}

/// Whom a capture is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::daemon) enum Whose {
    /// This node's clients, of whose captures so many may run.
    Clients,
    /// A peer, which takes no client's place. Who begins it bounds how many there are.
    Peer,
}

impl Session {
    /// Begins a capture of what the kernel carries. None where it carries nothing.
    pub(in crate::daemon) fn watch(
        &self,
        wanted: Wanted,
        part: Part,
        whose: Whose,
    ) -> Option<Result<(Capture, Vec<Place>), WatchError>> {
        let choose = match part {
            Part::Inner => |place: &Place| !matches!(place.kind, Kind::Outer(_)),
            Part::Outer => |place: &Place| !matches!(place.kind, Kind::Inner(_)),
            Part::All => |_: &Place| true,
        };
        let scene = self.scene()?;
        scene.places.iter().find(|place| choose(place))?;
        self.watches.scenes.send_replace(scene);
        let scenes = self.watches.scenes.subscribe();
        let running = match whose {
            Whose::Clients => Arc::clone(&self.watches.running),
            Whose::Peer => Arc::default(),
        };
        Some(packets::start(scenes, choose, wanted, &running))
    }

    /// Has captures follow what there is to watch now.
    pub(super) fn tell_watches(&self) {
        if self.watches.scenes.receiver_count() == 0 {
            return;
        }
        let Some(scene) = self.scene() else { return };
        self.watches.scenes.send_if_modified(|was| {
            let changed = *was != scene;
            *was = scene;
            changed
        });
    }

    /// What there is to watch; none while nothing carries packets.
    fn scene(&self) -> Option<Scene> {
        let carrier = self.carrier.as_ref()?;
        let ends = &self.registration.ends;
        let desired = carrier.desired();
        let mut places = Vec::new();
        let mut add = |place: Place| {
            // Devices of both families share a link.
            if !places.contains(&place) {
                places.push(place);
            }
        };
        for (device, &index) in desired.devices.iter().zip(&carrier.report.devices) {
            let tunnel = match device.tunnel {
                TunnelLink::Vxlan(vxlan) => Tunnel::Vxlan {
                    port: vxlan.port,
                    vni: vxlan.vni,
                },
                TunnelLink::Ipip(_) => Tunnel::Ipip,
            };
            add(Place {
                device: device.name.clone(),
                index,
                kind: Kind::Inner(tunnel),
            });
            // One link has both families.
            let end = ends.primary();
            add(Place {
                device: end.name.clone(),
                index: end.index,
                kind: Kind::Outer(tunnel),
            });
        }
        if self.registration.plan.goes_past() {
            let networks = &desired.networks;
            let mut past = |device: String, index: u32| {
                add(Place {
                    device,
                    index,
                    kind: Kind::Past {
                        networks: networks.clone(),
                    },
                });
            };
            for end in ends.iter() {
                past(end.name.clone(), end.index);
            }
            for &index in &carrier.report.direct_links {
                // A link that is gone is in the next report no more.
                if let Ok(name) = if_indextoname(index) {
                    past(name.to_string_lossy().into_owned(), index);
                }
            }
        }
        let peers = desired.peers.iter().map(|peer| (peer.net, peer.public));
        let others = desired.retained.iter();
        let others = others.filter_map(|lease| Some((lease.net, lease.public?)));
        Some(Scene {
            places,
            peers: Arc::new(Peers::new(peers.chain(others))),
        })
    }
}
