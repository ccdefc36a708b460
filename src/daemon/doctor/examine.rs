//! Owns how one peer is examined: what is asked, of whom, in which order. Never concludes anything.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tokio::time::{sleep, timeout};

use super::{Examination, PATIENCE, Patient, PeerDocument};
use crate::daemon::probes;
use crate::debug::doctor::{Evidence, LOSSY, Said, diagnose, is_tunnel};
use crate::probe::prober::{Prober, Round};
use crate::probe::{Figures, Path};
use crate::wire::probe::{Probe, Report, Via};

/// How long a peer is listened for that may not hear us: who is asked for a report probes the asker at its prober's
/// next tick.
const LISTEN: Duration = Duration::from_secs(4);

impl Examination {
    pub(super) async fn examine(
        &self,
        patient: &Patient,
        closed_here: Option<String>,
    ) -> PeerDocument {
        let begun = Instant::now();
        let bad_checksums = probes::bad_checksums();
        let sends_by = self.directory.sends_by(&patient.peer);
        let targets = self.directory.targets(&patient.peer);
        let overlay_addr = targets.first().copied();
        let past = |count| Round {
            count,
            patience: PATIENCE,
            ..Round::default()
        };
        let (mut overlay, mut direct, underlay, before) = tokio::join!(
            self.probes(overlay_addr, past(10)),
            self.probes(patient.public, past(3)),
            self.echoes(patient.public, past(3)),
            self.ask(patient),
        );
        let mut notes = Vec::new();
        if overlay.answered == 0 && direct.answered > 0 && targets.len() > 1 {
            notes.push(
                "it has no address in the overlay yet, before its first pod: its node was probed instead"
                    .to_owned(),
            );
            direct.sender = direct.sender.or(overlay.sender);
            overlay = direct.clone();
        }
        let mut evidence = Evidence {
            subnets: patient.peer.subnets,
            unserved: patient.unserved.clone(),
            way: patient.way.clone(),
            closed_here,
            clashes: patient.clashes.clone(),
            mtu: self.mtu,
            overlay_echo: None,
            unchecked: None,
            sizes: None,
            refused: false,
            said: None,
            we_hear: false,
            sends_by: Via::Unknown,
            bad_checksums_here: 0,
            runs_it: patient.peer.runs_it(),
            overlay,
            direct,
            underlay,
        };
        if evidence.overlay.answered == 0 {
            self.look_closer(patient, overlay_addr, begun, &mut evidence)
                .await;
            if evidence.overlay.answered > 0 {
                notes.push("nothing came back through the overlay at first".to_owned());
            }
        }
        if evidence.overlay.answered > 0 {
            self.measure(overlay_addr, &mut evidence).await;
        }
        let after = self.ask(patient).await;
        if self.directory.sends_by(&patient.peer) == sends_by {
            evidence.sends_by = sends_by;
        }
        evidence.bad_checksums_here = probes::bad_checksums().saturating_sub(bad_checksums);
        evidence.said = after.map(|(report, said)| {
            let hears_us = said.heard.is_some_and(|heard| heard.age <= begun.elapsed());
            Said {
                before: before.map_or(report.facts, |(report, _)| report.facts),
                after: report.facts,
                sender: said.sender,
                hears_us,
            }
        });
        evidence.clashes.extend(self.moved(patient, &evidence));
        let heard = patient.peer.memory().heard;
        evidence.we_hear = heard.is_some_and(|(at, _)| at >= begun);
        let findings = diagnose(&evidence);
        notes.extend(remarks(&evidence));
        PeerDocument {
            subnets: patient.peer.subnets.to_string(),
            public: patient.public,
            transport: patient.transport.clone(),
            findings,
            notes,
            overlay: evidence.overlay,
            overlay_echo: evidence.overlay_echo,
            direct: evidence.direct,
            underlay: evidence.underlay,
            sizes: evidence.sizes,
        }
    }

    /// Whether a peer says to be at an address that is another's.
    fn moved(&self, patient: &Patient, evidence: &Evidence) -> Option<String> {
        let says = evidence.said?.after.public?;
        let public = patient.public.filter(|&public| public != says)?;
        let other = self.directory.peer_at(says)?;
        (other.subnets != patient.peer.subnets).then(|| {
            format!(
                "the node at {public} publishes {says}, which is that of lease {}",
                other.subnets
            )
        })
    }

    /// What more there is to find out of a peer that answers.
    async fn measure(&self, addr: Option<IpAddr>, evidence: &mut Evidence) {
        if evidence.overlay.loss_percent() >= LOSSY {
            // One bad moment is none.
            let again = Round {
                count: 20,
                patience: PATIENCE,
                ..Round::default()
            };
            let again = self.probes(addr, again).await;
            if again.loss_percent() < evidence.overlay.loss_percent() {
                evidence.overlay = again;
            }
        }
        let Ok(mut prober) = self.prober(addr).await else {
            return;
        };
        let slowest = evidence.overlay.rtt_us.map_or(0, |rtt| rtt.max);
        let patience = Duration::from_micros(4 * slowest).clamp(PATIENCE / 2, 4 * PATIENCE);
        let mut sizes = prober.sizes(self.mtu, patience).await;
        if sizes.up < Some(self.mtu) || sizes.down < Some(self.mtu) {
            // Nor is one bad sweep.
            let whole = Round {
                count: 8,
                len: self.mtu,
                full: true,
                patience,
                ..Round::default()
            };
            if prober.round(whole).await.answered > 0 {
                sizes.up = Some(self.mtu);
                sizes.down = Some(self.mtu);
            }
        }
        evidence.sizes = Some(sizes);
    }

    /// What more there is to find out of a peer from which nothing comes; it is asked again beside, because one moment of
    /// silence is none.
    async fn look_closer(
        &self,
        patient: &Patient,
        addr: Option<IpAddr>,
        begun: Instant,
        evidence: &mut Evidence,
    ) {
        let few = Round {
            count: 3,
            patience: PATIENCE,
            ..Round::default()
        };
        let (again, echo, unchecked, refused) = tokio::join!(
            self.probes(addr, few),
            self.echoes(addr, few),
            self.unchecked_probes(addr, few),
            knock(patient.endpoint),
        );
        if again.answered > 0 {
            evidence.overlay = again;
            return;
        }
        evidence.overlay_echo = echo;
        evidence.unchecked = Some(unchecked);
        evidence.refused = refused;
        if evidence
            .overlay_echo
            .as_ref()
            .is_some_and(|echo| echo.answered > 0)
            || refused
        {
            return;
        }
        // Which end still hears tells the direction. It probes us of its own accord.
        let is_there = evidence.direct.answered > 0 && evidence.runs_it;
        while is_there && begun.elapsed() < LISTEN {
            if patient
                .peer
                .memory()
                .heard
                .is_some_and(|(at, _)| at >= begun)
            {
                break;
            }
            sleep(PATIENCE / 5).await;
        }
    }

    pub(super) async fn prober(&self, addr: Option<IpAddr>) -> io::Result<Prober> {
        let addr = addr.ok_or(io::ErrorKind::AddrNotAvailable)?;
        self.prober_by(addr, &self.directory.path_to(addr)).await
    }

    async fn prober_by(&self, addr: IpAddr, path: &Path) -> io::Result<Prober> {
        Prober::probes(&self.directory, path, SocketAddr::new(addr, self.port)).await
    }

    async fn probes(&self, addr: Option<IpAddr>, round: Round) -> Figures {
        figures(self.prober(addr).await, round).await
    }

    /// Probes without a UDP checksum.
    async fn unchecked_probes(&self, addr: Option<IpAddr>, round: Round) -> Figures {
        let Some(addr) = addr else {
            return figures(Err(io::ErrorKind::AddrNotAvailable.into()), round).await;
        };
        let path = Path {
            unchecked: true,
            ..self.directory.path_to(addr)
        };
        figures(self.prober_by(addr, &path).await, round).await
    }

    /// None where echoes may not be sent.
    async fn echoes(&self, addr: Option<IpAddr>, round: Round) -> Option<Figures> {
        let addr = addr?;
        let mut prober =
            Prober::echoes(&self.directory, &self.directory.path_to(addr), addr).ok()?;
        Some(prober.round(round).await)
    }

    /// What a peer says of itself: past the overlay, or through it.
    async fn ask(&self, patient: &Patient) -> Option<(Report, Probe)> {
        let overlay = self.directory.targets(&patient.peer).first().copied();
        for addr in [patient.public, overlay] {
            if let Ok(mut prober) = self.prober(addr).await
                && let Some(said) = prober.report(0, PATIENCE).await
            {
                return Some(said);
            }
        }
        None
    }
}

async fn figures(prober: io::Result<Prober>, round: Round) -> Figures {
    match prober {
        Ok(mut prober) => prober.round(round).await,
        Err(error) => Figures {
            errno: error.raw_os_error(),
            refused: Some(error.to_string()),
            ..Figures::default()
        },
    }
}

/// Whether a node says that nobody listens at its tunnel's port.
async fn knock(endpoint: Option<SocketAddr>) -> bool {
    let Some(endpoint) = endpoint else {
        return false;
    };
    let any: IpAddr = match endpoint.ip() {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let knocked = async {
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(endpoint).await?;
        // No packet of any version of IP: whoever listens drops it.
        socket.send(&[0]).await?;
        socket.recv(&mut [0]).await
    };
    let answer = timeout(PATIENCE, knocked).await;
    matches!(answer, Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused)
}

/// What is worth knowing of a peer, and no fault.
fn remarks(evidence: &Evidence) -> Vec<String> {
    let mut remarks = Vec::new();
    let echoes = evidence
        .overlay_echo
        .as_ref()
        .is_some_and(|echo| echo.answered > 0);
    if evidence.overlay.answered == 0 && echoes && !evidence.runs_it {
        remarks.push(
            "it answers echoes through the overlay and no probes: it runs another program, or its firewall closes \
             the probes' port"
                .to_owned(),
        );
    }
    let (there, here) = (evidence.overlay.via_there, evidence.overlay.via_here);
    let ways = there.and_then(is_tunnel).zip(here.and_then(is_tunnel));
    if let (Some((true, false) | (false, true)), Some(there), Some(here)) = (ways, there, here) {
        remarks.push(format!(
            "our packets come in there by {there}, and its come in here by {here}: each end takes the best way that it \
             has found (loden status, rejected)"
        ));
    }
    if let Some(sizes) = evidence.sizes
        && sizes.told
        && sizes.up.min(sizes.down) < Some(sizes.tried)
    {
        remarks.push(format!(
            "packets longer than {} bytes are refused on the way, and their senders are told",
            sizes.up.min(sizes.down).unwrap_or_default()
        ));
    }
    remarks
}
