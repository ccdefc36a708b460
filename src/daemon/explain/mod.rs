//! Owns the document that `loden explain` shows: what becomes of a packet between two addresses, step by step,
//! by the same decisions that the workers take and, where the kernel decides, by its own answers. Never sends anything
//! unless it is asked to (`trace`), and says what it cannot see.

mod decap;
mod encap;
mod kernel;
mod names;
mod trace;
mod way;

use std::io;
use std::net::{IpAddr, SocketAddr};

use etherparse::{IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header};
use ipnet::IpNet;
use serde::Serialize;

use super::session::Session;
use super::tunnel::Tunnel;
use super::{Daemon, Options};
use crate::backend::kernel::Kernel;
use crate::backend::plan::Plan;
use crate::backend::udp;
use crate::datapath::{self, DropReason};
use crate::lease::Lease;
use crate::probe::background::sentence;
use crate::store::LeaseStore;
pub(super) use names::{Found, Named, find};
pub(super) use trace::{Lookouts, Trace};

/// The TTL that a packet of this node has when it reaches the tunnel: 64, less the node's own hop.
const TTL: u8 = 63;

/// What becomes of the packet.
#[derive(Debug, Serialize)]
pub(super) struct Explanation {
    /// One sentence.
    verdict: String,
    /// `sent`, `fragmented`, `delivered`, `answered`, `dropped`: by this daemon. `kernel`: it does not reach the
    /// daemon. `local`: both ends are on this node. `elsewhere`: neither is.
    outcome: &'static str,
    /// The drop reason, where there is one.
    reason: Option<&'static str>,
    /// What to do about it.
    remedy: Option<&'static str>,
    /// What was looked at, in the packet's order.
    steps: Vec<Step>,
    /// The counters of `loden status` that such a packet raises, and those of the kernel's links, which say so.
    counters: Vec<String>,
    /// What decides about it, too, and cannot be seen from here.
    unseen: Vec<String>,
    /// What became of probes that were sent after it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) trace: Vec<String>,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Step {
    what: &'static str,
    found: String,
}

/// Two addresses and the length of the packet between them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    /// Bytes of the IP packet.
    pub(super) len: u16,
    /// It must not be fragmented.
    pub(super) whole: bool,
}

/// What is asked about, with everything the answer is taken from.
struct Case<'a, K> {
    question: Question,
    ends: &'a [Named; 2],
    /// Whether each end is on this node, in a pod or as the node itself; and as the node itself.
    here: [bool; 2],
    local: [bool; 2],
    session: &'a Session,
    /// Our own data plane's, where it carries the packets.
    tunnel: Option<&'a Tunnel>,
    options: &'a Options,
    kernel: &'a K,
    status: datapath::Status,
    answer: Explanation,
}

/// Explains one packet between these ends.
pub(super) async fn explain<S: LeaseStore, K: Kernel>(
    daemon: &Daemon<'_, S, K>,
    session: &Session,
    question: Question,
    ends: &[Named; 2],
) -> Result<Explanation, String> {
    let carrier = session.carrier.as_ref().ok_or_else(|| {
        let why = session.down.as_deref().unwrap_or("not opened yet");
        format!("the tunnel is down, so no packet of the overlay gets anywhere: {why}")
    })?;
    let tunnel = carrier.tunnel_of(question.to);
    let mut case = Case {
        question,
        ends,
        here: [false; 2],
        local: [false; 2],
        session,
        tunnel,
        options: daemon.options,
        kernel: daemon.kernel,
        status: tunnel.map(Tunnel::status).unwrap_or_default(),
        answer: Explanation {
            verdict: String::new(),
            outcome: "kernel",
            reason: None,
            remedy: None,
            steps: Vec::new(),
            counters: Vec::new(),
            unseen: Vec::new(),
            trace: Vec::new(),
        },
    };
    case.locate().await;
    case.show_ends();
    let other = if case.here[1] {
        question.from
    } else {
        question.to
    };
    case.last_probe(other);
    match case.here {
        [true, true] => case.on_this_node().await,
        [_, true] => case.decap().await,
        [true, false] => case.encap().await,
        [false, false] => {
            let node = case.lease_of(question.from);
            let node = node.and_then(|lease| lease.attrs.node());
            let node = node.map_or_else(String::new, |node| format!(", {node}"));
            case.end(
                "elsewhere",
                format!("neither end is on this node: ask on the node that has the source{node}"),
            );
        }
    }
    Ok(case.answer)
}

/// Makes ready to follow probes that take the way of a packet that was explained.
///
/// # Errors
///
/// Why they cannot be followed.
pub(super) fn begin_trace<S: LeaseStore, K: Kernel>(
    daemon: &Daemon<'_, S, K>,
    session: &Session,
    question: Question,
) -> Result<Trace, String> {
    let registration = &session.registration;
    let own = udp::nets(&registration.lease.subnets);
    let is_own = own.iter().any(|net| net.contains(&question.to));
    let other = if is_own { question.from } else { question.to };
    let len = question.len.min(registration.plan.mtu().get());
    Trace::begin(daemon, session, other, len)
}

impl<K: Kernel> Case<'_, K> {
    /// Between two ends that are both here.
    async fn on_this_node(&mut self) {
        let to = self.question.to;
        let mut verdict =
            "both ends are on this node: its kernel delivers the packet, and loden never sees it"
                .to_owned();
        if !self.local[1]
            && let Ok(Some(reach)) = self.kernel.route_to(to).await
        {
            let (name, _) = self.link(reach.link).await;
            self.step("route", format!("the kernel routes {to} by {name}"));
            if !self.neighbour(&reach, &name).await {
                verdict = format!("both ends are on this node, and {to} does not answer on {name}");
            }
        }
        self.end("local", verdict);
    }

    /// What probes last found of the other node.
    fn last_probe(&mut self, addr: IpAddr) {
        let Some(subnets) = self.lease_of(addr).map(|lease| lease.subnets) else {
            return;
        };
        let Some(peer) = self.session.directory.peer_of(&subnets) else {
            return;
        };
        let history = peer.history();
        let mut found = sentence(history.state(), history.loss_percent());
        if let (Some(at), Some(rtt)) = (history.visited(), history.rtt()) {
            let (millis, ago) = (rtt.as_secs_f64() * 1e3, at.elapsed().as_secs());
            found = format!("{found}, in {millis:.2} ms, {ago} s ago");
        }
        if let Some((at, via)) = peer.memory().heard {
            let ago = at.elapsed().as_secs();
            found = format!("{found}; heard of it by {} {ago} s ago", via.name());
        }
        self.step("last probe", found);
    }

    fn step(&mut self, what: &'static str, found: impl Into<String>) {
        let found = found.into();
        self.answer.steps.push(Step { what, found });
    }

    fn end(&mut self, outcome: &'static str, verdict: String) {
        self.answer.outcome = outcome;
        self.answer.verdict = verdict;
    }

    fn refuse(&mut self, outcome: &'static str, reason: DropReason, verdict: String) {
        self.answer.reason = Some(reason.name());
        self.answer.remedy = Some(reason.remedy());
        self.end(outcome, verdict);
    }

    fn counters(&mut self, names: &[&str]) {
        self.answer
            .counters
            .extend(names.iter().map(|&name| name.to_owned()));
    }

    fn own_nets(&self) -> Vec<IpNet> {
        udp::nets(&self.session.registration.lease.subnets)
    }

    /// Finds out which ends are on this node. What a pod in the node's network sends to the overlay comes from the address
    /// that the kernel chooses for it.
    async fn locate(&mut self) {
        let addrs = [self.question.from, self.question.to];
        for (nth, addr) in addrs.into_iter().enumerate() {
            let is_local = match self.kernel.route_to(addr).await {
                Ok(reach) => reach.is_some_and(|reach| reach.is_local),
                // A route that refuses says enough later.
                Err(_refused) => false,
            };
            let mut ends = self.session.registration.ends.iter();
            // Behind NAT, the address that others use is none of the kernel's.
            let is_local = is_local || ends.any(|end| end.public == addr);
            let in_lease = self.own_nets().iter().any(|net| net.contains(&addr));
            self.local[nth] = is_local;
            self.here[nth] = is_local || in_lease;
        }
        let is_host = self.ends[0].shares_node() && self.local[0];
        if is_host
            && self.is_in_overlay(self.question.to)
            && let Ok(Some(reach)) = self.kernel.route_to(self.question.to).await
            && let Some(from) = reach.from
        {
            self.question.from = from;
        }
    }

    fn is_in_overlay(&self, addr: IpAddr) -> bool {
        let networks = udp::networks(&self.session.registration.config);
        networks.iter().any(|net| net.contains(&addr))
    }

    /// Who has the lease that an address lies in.
    fn lease_of(&self, addr: IpAddr) -> Option<&Lease> {
        let mut leases = self.session.peers.leases();
        leases.find(|lease| {
            lease.attrs.node() == Some(addr)
                || udp::nets(&lease.subnets)
                    .iter()
                    .any(|net| net.contains(&addr))
        })
    }

    fn show_ends(&mut self) {
        let addrs = [self.question.from, self.question.to];
        for (nth, what) in ["source", "destination"].into_iter().enumerate() {
            let addr = addrs[nth];
            let place = if self.here[nth] {
                "is on this node".to_owned()
            } else if let Some(lease) = self.lease_of(addr)
                && let Some(why) = self.session.why_unserved(&lease.subnets)
            {
                format!("is in lease {}, which is not served: {why}", lease.subnets)
            } else if let Some(lease) = self.lease_of(addr) {
                self.place_of(lease, addr)
            } else if self.is_in_overlay(addr) {
                "is in the overlay, in nobody's lease".to_owned()
            } else {
                "is outside the overlay".to_owned()
            };
            let end = &self.ends[nth];
            let then = if end.addr == addr {
                String::new()
            } else {
                format!("; what it sends there comes from {addr}")
            };
            let found = format!("{end} {place}{then}");
            self.step(what, found);
        }
    }

    fn place_of(&self, lease: &Lease, addr: IpAddr) -> String {
        if !self.is_in_overlay(addr) {
            return format!("is the node's that has lease {}", lease.subnets);
        }
        let plan = &self.session.registration.plan;
        let node = public_of(lease, self.question.to.is_ipv4());
        let endpoint = plan
            .endpoint_of(&lease.attrs)
            .map(|endpoint| match (plan, node) {
                // Each family crosses its own.
                (Plan::Vxlan(_), Some(node)) => SocketAddr::new(node, endpoint.port()),
                _ => endpoint,
            });
        let node = endpoint.map(|endpoint| endpoint.ip()).or(node);
        let node = node.map_or_else(|| "no public IP".to_owned(), |ip| ip.to_string());
        match endpoint {
            Some(endpoint) => {
                format!(
                    "is in lease {} of node {node}, reached at {endpoint}",
                    lease.subnets
                )
            }
            // Routes have no endpoint.
            None if self.tunnel.is_none() => {
                format!("is in lease {} of node {node}", lease.subnets)
            }
            None => format!(
                "is in lease {} of node {node}, which has no address of our underlay's family",
                lease.subnets
            ),
        }
    }

    /// A packet as the question describes it.
    fn packet(&self, len: u16) -> Vec<u8> {
        let mut packet = match (self.question.from, self.question.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = Ipv4Header {
                    total_len: len,
                    dont_fragment: self.question.whole,
                    time_to_live: TTL,
                    protocol: IpNumber::UDP,
                    source: from.octets(),
                    destination: to.octets(),
                    ..Ipv4Header::default()
                };
                header.header_checksum = header.calc_header_checksum();
                header.to_bytes().to_vec()
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::default(),
                payload_length: len.saturating_sub(40),
                next_header: IpNumber::UDP,
                hop_limit: TTL,
                source: from.octets(),
                destination: to.octets(),
            }
            .to_bytes()
            .to_vec(),
            _ => Vec::new(),
        };
        let header_len = packet.len();
        packet.resize(header_len.max(usize::from(len)), 0);
        packet
    }

    fn drop_here(&mut self, direction: &str, reason: DropReason) {
        self.answer.counters.push(format!(
            "datapath.total.{direction}.drops.{}",
            reason.name()
        ));
        self.refuse(
            "dropped",
            reason,
            format!("this node drops it: {}", reason.name()),
        );
    }
}

/// Where a peer's node is on the underlay of a family; in the other one, if it has only that.
fn public_of(lease: &Lease, is_ipv4: bool) -> Option<IpAddr> {
    let v4 = lease.attrs.public_ip.map(IpAddr::V4);
    let v6 = lease.attrs.public_ipv6.map(IpAddr::V6);
    if is_ipv4 { v4.or(v6) } else { v6.or(v4) }
}

/// What an `unreachable`, `prohibit` or `blackhole` route says (`fib_props`, net/ipv4/fib_semantics.c).
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL)
    )
}
