//! Owns what is concluded from an examination of a peer: the causes that there are, and which of them the evidence
//! names. Pure; never asks anybody.

mod cause;

use std::time::Duration;

use serde::Serialize;

use crate::lease::Subnets;
use crate::probe::{Figures, Sizes};
use crate::wire::probe::{Facts, Health, Identity, Via};

pub use cause::Cause;

/// A clock that is further off than this spoils what leases say of their end.
pub const CLOCK_OFF: Duration = Duration::from_secs(10);

/// Loss from which on it is called one, in percent; the examiner asks again before it believes it.
pub const LOSSY: u8 = 10;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is.
    pub cause: Cause,
    /// What speaks for it.
    pub detail: String,
    /// What to do about it.
    pub remedy: &'static str,
}

/// Whether the kernel has a way to the peer's node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// It has, by a link that is up.
    Open,
    /// It has not, or by a link that is down: why.
    Closed(String),
}

/// What a peer says of itself, before and after it was probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    /// Before.
    pub before: Facts,
    /// After.
    pub after: Facts,
    /// Who says so.
    pub sender: Identity,
    /// It has heard our probes through the overlay.
    pub hears_us: bool,
}

/// What an examination of one peer brought.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// What it has leased.
    pub subnets: Subnets,
    /// Why this node makes no way to it, if it makes none.
    pub unserved: Option<String>,
    /// The kernel's way to its node.
    pub way: Way,
    /// Our own firewall closes the tunnel's port: the rule.
    pub closed_here: Option<String>,
    /// Who else publishes its address.
    pub clashes: Vec<String>,
    /// The overlay's MTU in bytes.
    pub mtu: u16,
    /// Probes through the overlay.
    pub overlay: Figures,
    /// Echoes through the overlay, where probes were not answered.
    pub overlay_echo: Option<Figures>,
    /// Probes through the overlay without a UDP checksum, where those with one were not answered.
    pub unchecked: Option<Figures>,
    /// Probes to its node past the overlay.
    pub direct: Figures,
    /// Echoes to its node past the overlay.
    pub underlay: Option<Figures>,
    /// What gets through.
    pub sizes: Option<Sizes>,
    /// Its node says that nobody listens at the tunnel's port.
    pub refused: bool,
    /// What it says of itself, past the overlay or through it.
    pub said: Option<Said>,
    /// Something of it came through the overlay while it was examined.
    pub we_hear: bool,
    /// It has answered or asked as this program does.
    pub runs_it: bool,
    /// What our packets to it are to come in by there; unknown also where that changed while it was examined.
    pub sends_by: Via,
    /// Datagrams that our own kernel dropped for a wrong checksum while it was examined.
    pub bad_checksums_here: u64,
}

impl Evidence {
    const fn is_reached(&self) -> bool {
        self.overlay.answered > 0
    }

    fn echoes(&self) -> bool {
        answered(self.overlay_echo.as_ref())
    }

    /// Its node says something, if only no.
    fn node_is_there(&self) -> bool {
        self.direct.answered > 0
            || is_refusal(&self.direct)
            || answered(self.underlay.as_ref())
            || self.refused
            || self.said.is_some()
    }

    /// What its answers are to come in by here: as it says, if it says the same before and after.
    fn answers_by(&self) -> Via {
        let said = self
            .said
            .map(|said| (said.before.sends_by, said.after.sends_by));
        said.filter(|(before, after)| before == after)
            .map_or(Via::Unknown, |(_, after)| after)
    }

    fn health(&self, of: Health) -> bool {
        self.said.is_some_and(|said| said.after.health.has(of))
    }

    /// Who answers under its addresses, if it is not who leased the subnets.
    fn stranger(&self) -> Option<Identity> {
        let senders = [
            self.overlay.sender,
            self.direct.sender,
            self.said.map(|said| said.sender),
        ];
        let is_owner = |sender: &Identity| {
            // A lease may lack a family that the node has meanwhile.
            let (v4, v6) = (self.subnets.v4(), self.subnets.v6());
            (v4.is_none() || sender.v4 == v4) && (v6.is_none() || sender.v6 == v6)
        };
        senders
            .into_iter()
            .flatten()
            .find(|sender| !is_owner(sender))
    }
}

fn answered(figures: Option<&Figures>) -> bool {
    figures.is_some_and(|figures| figures.answered > 0)
}

fn is_refusal(figures: &Figures) -> bool {
    figures.errno == Some(libc::ECONNREFUSED)
}

/// The causes that the evidence names; none for a peer that is reached as it should be.
#[must_use]
pub fn diagnose(evidence: &Evidence) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |cause: Cause, detail: String| {
        findings.push(Finding {
            cause,
            detail,
            remedy: cause.remedy(),
        });
    };
    if !evidence.clashes.is_empty() {
        find(Cause::DuplicatePublicIp, evidence.clashes.join("; "));
    }
    if evidence.is_reached() {
        reached(evidence, &mut find);
    } else if let Some(why) = &evidence.unserved {
        // Whatever else is the matter could not be seen.
        find(Cause::NotServed, why.clone());
    } else if evidence.echoes() {
        echoing(evidence, &mut find);
    } else if evidence.clashes.is_empty() {
        silent(evidence, &mut find);
    }
    if evidence.health(Health::NOT_FORWARDING) {
        find(
            Cause::PeerNotForwarding,
            "it says that its kernel does not forward packets to its pods".to_owned(),
        );
    }
    findings
}

/// What may be wrong with a peer that answers.
fn reached(evidence: &Evidence, find: &mut impl FnMut(Cause, String)) {
    let overlay = &evidence.overlay;
    if evidence.clashes.is_empty()
        && let Some(stranger) = evidence.stranger()
    {
        find(Cause::WrongLease, wrong_lease(evidence, stranger));
    }
    if let Some(sizes) = evidence.sizes
        && !sizes.told
    {
        let short = |size: Option<u16>| size.is_none_or(|size| size < sizes.tried);
        if short(sizes.up) || short(sizes.down) {
            let bytes =
                |size: Option<u16>| size.map_or_else(|| "none".to_owned(), |size| size.to_string());
            find(
                Cause::MtuBlackHole,
                format!(
                    "of packets up to {} bytes, those up to {} get there and those up to {} get back; nobody \
                     on the way says that longer ones are too long",
                    sizes.tried,
                    bytes(sizes.up),
                    bytes(sizes.down)
                ),
            );
        }
    }
    let strays = [
        stray("ours", evidence.sends_by, "there", overlay.via_there),
        stray(
            "its answers",
            evidence.answers_by(),
            "here",
            overlay.via_here,
        ),
    ];
    let strays: Vec<String> = strays.into_iter().flatten().collect();
    if !strays.is_empty() {
        find(Cause::AsymmetricPath, strays.join("; "));
    }
    let limit = i64::try_from(CLOCK_OFF.as_micros()).unwrap_or(i64::MAX);
    if let Some(offset) = overlay.clock_offset_us
        && offset.abs() > limit
    {
        let seconds = offset.abs() / 1_000_000;
        let how = if offset > 0 { "ahead of" } else { "behind" };
        find(
            Cause::ClockOff,
            format!("its clock is {seconds} seconds {how} ours"),
        );
    }
    if overlay.loss_percent() >= LOSSY
        && let Some(detail) = some_bad_checksums(evidence)
    {
        find(Cause::ChecksumCorruption, detail);
    } else if overlay.loss_percent() >= LOSSY {
        let underlay = evidence.underlay.as_ref().map_or(0, Figures::loss_percent);
        let whose = if underlay >= LOSSY {
            format!("echoes past the overlay lose {underlay} %, too")
        } else {
            "echoes past the overlay do not".to_owned()
        };
        find(
            Cause::Loss,
            format!(
                "{} % of the probes are lost; {whose}",
                overlay.loss_percent()
            ),
        );
    }
}

/// Whether a way leads through a tunnel; none if nothing is known of it.
#[must_use]
pub fn is_tunnel(via: &str) -> Option<bool> {
    let tunnels = [Via::Tunnel.name(), Via::KernelTunnel.name()];
    (via != Via::Unknown.name()).then(|| tunnels.contains(&via))
}

/// How packets come in that were sent by another way than they took.
fn stray(whose: &str, meant: Via, place: &str, came: Option<&'static str>) -> Option<String> {
    let came = came?;
    let strays = is_tunnel(meant.name())? != is_tunnel(came)?;
    let meant = meant.name();
    strays.then(|| format!("{whose} are sent by {meant}, and come in {place} by {came}"))
}

/// What may be wrong with a peer that answers echoes through the overlay and no probes.
fn echoing(evidence: &Evidence, find: &mut impl FnMut(Cause, String)) {
    let gone = is_refusal(&evidence.overlay) || is_refusal(&evidence.direct);
    if gone && evidence.runs_it {
        find(
            Cause::PeerDaemonGone,
            "its kernel carries packets on, and nobody answers probes any more".to_owned(),
        );
    }
    if let Some(detail) = bad_checksums(evidence) {
        find(Cause::ChecksumCorruption, detail);
    }
}

/// What may be wrong with a peer from which nothing comes through the overlay.
fn silent(evidence: &Evidence, find: &mut impl FnMut(Cause, String)) {
    if let Way::Closed(why) = &evidence.way {
        return find(Cause::UnderlayDown, why.clone());
    }
    if let Some(rule) = &evidence.closed_here {
        return find(Cause::FirewallDrop, format!("on this node: {rule}"));
    }
    if !evidence.node_is_there() {
        let said = evidence.direct.refused.clone();
        let said = said.map_or_else(String::new, |said| format!(": {said}"));
        return find(
            Cause::UnderlayDown,
            format!("its node answers neither probes nor echoes on the underlay{said}"),
        );
    }
    if let Some(stranger) = evidence.stranger() {
        return find(Cause::WrongLease, wrong_lease(evidence, stranger));
    }
    if evidence.health(Health::FIREWALL_CLOSED) {
        return find(
            Cause::FirewallDrop,
            "on that node: it says that its firewall drops the tunnel's datagrams".to_owned(),
        );
    }
    if evidence.health(Health::TUNNEL_DOWN) {
        return find(Cause::PeerTunnelDown, "it says so itself".to_owned());
    }
    if evidence.refused {
        return find(
            Cause::PeerDaemonGone,
            "its node says that nobody listens at the tunnel's port".to_owned(),
        );
    }
    if let Some(detail) = bad_checksums(evidence) {
        return find(Cause::ChecksumCorruption, detail);
    }
    let detail = match (evidence.said.map(|said| said.hears_us), evidence.we_hear) {
        (Some(true), _) => {
            "on the way from it to us: it hears us, and its answers do not arrive".to_owned()
        }
        (Some(false), true) => {
            "on the way from us to it: we hear it, and it does not hear us".to_owned()
        }
        (Some(false), false) => "both ways: neither hears the other".to_owned(),
        (None, true) => {
            "on the way from us to it, or back: it cannot be asked, and we hear its own probes"
                .to_owned()
        }
        (None, false) => {
            "one way or both: its node is there, and cannot be asked what it hears; or its daemon serves another \
             store and knows nothing of us"
                .to_owned()
        }
    };
    find(Cause::PortFiltered, detail);
}

fn wrong_lease(evidence: &Evidence, stranger: Identity) -> String {
    let v4 = stranger.v4.map(|net| net.to_string());
    let v6 = stranger.v6.map(|net| net.to_string());
    let nets: Vec<String> = v4.into_iter().chain(v6).collect();
    format!(
        "the lease says {}, and the node there has {}",
        evidence.subnets,
        nets.join(" and ")
    )
}

/// What speaks for wrong checksums.
fn bad_checksums(evidence: &Evidence) -> Option<String> {
    let grown = evidence.said.map_or(0, |said| {
        said.after
            .bad_checksums
            .saturating_sub(said.before.bad_checksums)
    });
    if grown >= u64::from(evidence.overlay.sent / 2).max(3) {
        return Some(format!(
            "its kernel dropped {grown} datagrams for a wrong checksum while {} probes were sent",
            evidence.overlay.sent
        ));
    }
    answered(evidence.unchecked.as_ref()).then(|| {
        "probes without a UDP checksum are answered, and those with one are not".to_owned()
    })
}

/// Likewise where only some are wrong: about as many as there were losses.
fn some_bad_checksums(evidence: &Evidence) -> Option<String> {
    let there = evidence.said.map_or(0, |said| {
        said.after
            .bad_checksums
            .saturating_sub(said.before.bad_checksums)
    });
    let here = evidence.bad_checksums_here;
    let lost = evidence
        .overlay
        .sent
        .saturating_sub(evidence.overlay.answered);
    (there + here >= u64::from(lost / 2).max(1)).then(|| {
        format!(
            "its kernel dropped {there} datagrams for a wrong checksum and ours {here}, while {} % of the probes were \
             lost",
            evidence.overlay.loss_percent()
        )
    })
}

#[cfg(test)]
mod tests;
