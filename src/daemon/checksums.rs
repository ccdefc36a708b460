//! Owns finding out whether the checksums of what the kernel's tunnel devices send arrive whole: a NIC that promises to
//! compute them for encapsulated packets, and does it wrong, lets pings pass and nothing else. Needs no help from
//! the peer: a kernel answers a datagram to a port where nobody listens only if its checksum is right. Never touches
//! a device that works.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::Serialize;

use super::session::Session;
use crate::backend::kernel::Kernel;
use crate::probe::{Directory, Path, Prober, Round, random};

/// Where nobody listens, on nearly every node: that of the discard protocol (RFC 863).
const NOBODYS_PORT: u16 = 9;

/// Peers that are tried before it is given up.
const PEERS: u32 = 8;

/// The time between two tries: a peer that does not answer now may later.
const TRY_EVERY: Duration = Duration::from_secs(5);

/// What is found about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Finding {
    /// A peer has answered a datagram whose checksum the device was to compute.
    Right,
    /// The device leaves them to the kernel already: somebody knows, or a run before has found out.
    Off,
    /// None was answered before the device was told to leave checksums to the kernel, and after that they were.
    Spoiled,
    /// Nobody could be asked.
    Unknown(String),
}

/// What the status shows of a device.
#[derive(Debug, Serialize)]
pub(super) struct ChecksumDocument {
    device: String,
    /// `right`, `spoiled`, `off` or `unknown`.
    finding: &'static str,
    /// What was done about it, or why nothing is known.
    text: String,
}

/// A test that is under way.
pub(super) type Test<'a> = Pin<Box<dyn Future<Output = (u32, String, Finding)> + 'a>>;

/// What is known of each device, by its number: one that is made anew is tested anew.
#[derive(Debug, Default)]
pub(super) struct Checksums {
    known: HashMap<u32, Known>,
    next_at: Option<Instant>,
}

#[derive(Debug)]
struct Known {
    device: String,
    finding: Finding,
    tries: u32,
}

impl Checksums {
    /// When a device is to be tested next; none where all is known.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.next_at
    }

    /// Has the devices that are there now tested, if they have not been.
    pub(super) fn look(&mut self, devices: &[u32]) {
        self.known.retain(|index, _| devices.contains(index));
        let open = devices.iter().any(|index| self.is_open(*index));
        self.next_at = match self.next_at {
            _ if !open => None,
            None => Some(Instant::now()),
            at => at,
        };
    }

    fn is_open(&self, index: u32) -> bool {
        match self.known.get(&index) {
            None => true,
            Some(known) => matches!(known.finding, Finding::Unknown(_)) && known.tries < PEERS,
        }
    }

    /// The next test: of a device that is not known yet, with some peer behind it.
    pub(super) fn test<'a>(
        &mut self,
        session: &Session,
        kernel: &'a impl Kernel,
    ) -> Option<Test<'a>> {
        self.next_at = Some(Instant::now() + TRY_EVERY);
        let carrier = session.carrier.as_ref()?;
        let devices = carrier.wanted_devices().iter();
        let mut devices = devices.zip(&carrier.report.devices);
        let (device, &index) = devices.find(|(_, index)| self.is_open(**index))?;
        let own = device.addr.addr();
        // Peers of that family that are reached through the device.
        let peers: Vec<IpAddr> = session
            .peers
            .leases()
            .flat_map(|lease| crate::backend::udp::nets(&lease.subnets))
            .filter(|net| net.addr().is_ipv4() == own.is_ipv4())
            .filter(|net| !carrier.report.direct.contains(net))
            .map(|net: IpNet| net.network())
            .collect();
        let count = u64::try_from(peers.len()).ok().filter(|&count| count > 0)?;
        let nth = usize::try_from(random() % count).unwrap_or(0);
        let peer = *peers.get(nth)?;
        let (directory, name) = (Arc::clone(&session.directory), device.name.clone());
        Some(Box::pin(async move {
            let finding = test(
                kernel,
                &directory,
                &name,
                own,
                SocketAddr::new(peer, NOBODYS_PORT),
            )
            .await;
            (index, name, finding)
        }))
    }

    /// Takes over what a test has found.
    pub(super) fn take(&mut self, (index, device, finding): (u32, String, Finding)) {
        match &finding {
            Finding::Spoiled => tracing::warn!(
                "checksums of what {device} sends arrive spoiled: switched its tx-checksum-ip-generic off \
                 (ethtool -K {device} tx-checksum-ip-generic off)"
            ),
            finding @ (Finding::Right | Finding::Off | Finding::Unknown(_)) => {
                tracing::debug!(device, ?finding, "checksums tested");
            }
        }
        let tries = self.known.get(&index).map_or(0, |known| known.tries) + 1;
        let known = Known {
            device,
            finding,
            tries,
        };
        self.known.insert(index, known);
    }

    pub(super) fn documents(&self) -> Vec<ChecksumDocument> {
        let document = |known: &Known| {
            let (finding, text) = match &known.finding {
                Finding::Right => ("right", "checksums of what it sends arrive whole".to_owned()),
                Finding::Spoiled => (
                    "spoiled",
                    "checksums of what it sends arrived spoiled: tx-checksum-ip-generic was switched off".to_owned(),
                ),
                Finding::Off => ("off", "its tx-checksum-ip-generic is off".to_owned()),
                Finding::Unknown(why) => ("unknown", why.clone()),
            };
            ChecksumDocument {
                device: known.device.clone(),
                finding,
                text,
            }
        };
        let mut documents: Vec<ChecksumDocument> = self.known.values().map(document).collect();
        documents.sort_by(|a, b| a.device.cmp(&b.device));
        documents
    }
}

/// Tests a device with one peer.
async fn test(
    kernel: &impl Kernel,
    directory: &Arc<Directory>,
    device: &str,
    own: IpAddr,
    to: SocketAddr,
) -> Finding {
    let path = Path {
        local: Some(own),
        ..Path::default()
    };
    let round = Round {
        count: 3,
        every: Duration::from_millis(100),
        ..Round::default()
    };
    let unknown = |why: String| Finding::Unknown(why);
    match kernel.computes_checksums(device) {
        Ok(true) => {}
        Ok(false) => return Finding::Off,
        Err(error) => return unknown(error.to_string()),
    }
    // The checksum of an echo is computed in software.
    let echoed = match Prober::echoes(directory, &path, to.ip()) {
        Ok(mut prober) => prober.round(round).await.answered > 0,
        Err(error) => return unknown(format!("no echo can be sent: {error}")),
    };
    if !echoed {
        return unknown(format!("{} answers no pings", to.ip()));
    }
    // With the device's checksums, twice, in case of bad luck; without them; and with them again, so that it is known to
    // make the difference.
    let trial = Trial { kernel, device };
    for on in [true, true, false, true] {
        if let Err(error) = kernel.compute_checksums(device, on) {
            return unknown(error.to_string());
        }
        let answered = match answers(directory, &path, to, round).await {
            Ok(answered) => answered,
            Err(error) => return unknown(format!("no socket at {own}: {error}")),
        };
        match (on, answered) {
            (true, true) => return Finding::Right,
            (true, false) | (false, true) => {}
            (false, false) => {
                return unknown(format!("{} answers no datagrams, however sent", to.ip()));
            }
        }
        // A kernel limits how often it says that nobody listens.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    drop(trial);
    match kernel.compute_checksums(device, false) {
        Ok(()) => Finding::Spoiled,
        Err(error) => unknown(error.to_string()),
    }
}

/// A device that is being tried without its checksums: it has them again when the trial ends, however it does.
struct Trial<'a, K: Kernel> {
    kernel: &'a K,
    device: &'a str,
}

impl<K: Kernel> Drop for Trial<'_, K> {
    fn drop(&mut self) {
        if let Err(error) = self.kernel.compute_checksums(self.device, true) {
            tracing::debug!(%error, "the device is gone");
        }
    }
}

/// Whether the peer's kernel says that datagrams have arrived where nobody listens.
async fn answers(
    directory: &Arc<Directory>,
    path: &Path,
    to: SocketAddr,
    round: Round,
) -> std::io::Result<bool> {
    let figures = Prober::probes(directory, path, to)
        .await?
        .round(round)
        .await;
    Ok(figures.errno == Some(libc::ECONNREFUSED))
}
