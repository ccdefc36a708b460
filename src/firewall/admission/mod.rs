//! Owns the question whether the host's own firewall lets the tunnel through, and in which states of
//! connection tracking. Pure: follows a datagram through listings. Never changes a rule of the host.
//!
//! Untracked datagrams are cheaper, and varying source ports spread over cores; but a host that admits only
//! *established* connections admits the tunnel only because both ends send from the port that they receive on,
//! and are tracked. There, source ports must stay fixed and tracking on.
//!
//! A condition that cannot be judged counts as not met, so a doubt ends with the careful answer. Peers are
//! taken to have addresses like our own: an accept for the node's network counts.

mod iptables;
mod nft;

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;

/// How far a host's firewall lets the tunnel's datagrams through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// From any source port, tracked or not.
    Open,
    /// Only if tracked: the host accepts the port in state `new`, and refuses untracked datagrams.
    Tracked(Refusal),
    /// Only as part of an established connection: tracked, and between fixed ports on both ends.
    Established(Refusal),
    /// Not at all. The tunnel will not work until the host's firewall accepts its port.
    Closed(Refusal),
}

impl Admission {
    /// Whether the tunnel may be exempt from connection tracking.
    #[must_use]
    pub const fn untracked(&self) -> bool {
        matches!(self, Self::Open)
    }

    /// Whether datagrams may leave from varying source ports.
    #[must_use]
    pub const fn varying_source_ports(&self) -> bool {
        matches!(self, Self::Open | Self::Tracked(_))
    }

    /// Why not [`Admission::Open`].
    #[must_use]
    pub const fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Open => None,
            Self::Tracked(refusal) | Self::Established(refusal) | Self::Closed(refusal) => {
                Some(refusal)
            }
        }
    }
}

/// Where an untracked datagram of the tunnel ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The table and chain that the host hooked in.
    pub chain: String,
    /// The rule that refuses, or the chain's policy.
    pub rule: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} refuses it by: {}", self.chain, self.rule)
    }
}

/// How what peers send arrives at this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// In UDP datagrams to this port.
    Udp(u16),
    /// In IPv4 packets of protocol 4 (RFC 2003). What `/etc/protocols` calls `ipip` is another.
    Ipip,
}

impl Arrival {
    /// Whether a listing means its protocol by this word.
    fn is_protocol(self, word: &str) -> bool {
        match self {
            Self::Udp(_) => matches!(word, "udp" | "17"),
            Self::Ipip => matches!(word, "ipencap" | "ipv4" | "4"),
        }
    }

    /// Whether a range of ports holds its port; `None` if it is not numeric.
    fn is_in_range(self, range: &str, separator: char) -> Option<bool> {
        match self {
            Self::Udp(port) => in_range(range, separator, port),
            Self::Ipip => Some(false),
        }
    }
}

impl fmt::Display for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp(port) => write!(f, "UDP port {port}"),
            Self::Ipip => f.write_str("IP protocol 4 (IP in IP)"),
        }
    }
}

/// The packet that is followed, without its state.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe<'a> {
    /// What it is.
    pub(super) arrival: Arrival,
    /// The external interface.
    pub(super) interface: &'a str,
    /// The node's address, which also stands for those of its peers.
    pub(super) addr: IpAddr,
}

/// What connection tracking says about a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Untracked,
    New,
    Established,
}

impl State {
    const fn is_named(self, name: &str) -> bool {
        name.eq_ignore_ascii_case(match self {
            Self::Untracked => "untracked",
            Self::New => "new",
            Self::Established => "established",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Input,
    Output,
}

/// A condition of a rule, judged as far as it does not depend on the state.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    Met,
    Unmet,
    Unknown,
    States {
        names: Vec<String>,
        negated: bool,
    },
    /// A condition on the source port, and whether the tunnel's port meets it: known only where it is fixed.
    SourcePort(bool),
}

impl Condition {
    const fn known(met: bool) -> Self {
        if met { Self::Met } else { Self::Unmet }
    }

    fn negate_if(self, negate: bool) -> Self {
        if !negate {
            return self;
        }
        match self {
            Self::Met => Self::Unmet,
            Self::Unmet => Self::Met,
            Self::Unknown => Self::Unknown,
            Self::States { names, negated } => Self::States {
                names,
                negated: !negated,
            },
            Self::SourcePort(met) => Self::SourcePort(!met),
        }
    }

    /// The same condition, put to the source port instead.
    fn about_source_port(self) -> Self {
        match self {
            Self::Met => Self::SourcePort(true),
            Self::Unmet => Self::SourcePort(false),
            Self::Unknown | Self::States { .. } | Self::SourcePort(_) => Self::Unknown,
        }
    }

    fn met(&self, state: State) -> bool {
        match self {
            Self::Met => true,
            Self::Unmet | Self::Unknown => false,
            Self::States { names, negated } => {
                names.iter().any(|name| state.is_named(name)) != *negated
            }
            Self::SourcePort(met) => *met && state == State::Established,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Accept,
    Refuse,
    Jump(String),
    Goto(String),
    Return,
    Continue,
}

#[derive(Clone, Debug)]
struct Rule {
    conditions: Vec<Condition>,
    verdict: Verdict,
    text: String,
}

/// The chains of one table; `bases` are those that the kernel calls.
#[derive(Clone, Debug, Default)]
struct Ruleset {
    name: String,
    chains: HashMap<String, Vec<Rule>>,
    /// Chain and whether its policy refuses.
    bases: Vec<(String, bool)>,
}

/// More rules than a datagram passes in any sane ruleset; past it, the answer is the careful one.
const MAX_STEPS: usize = 100_000;
/// The kernel's own limit of nested jumps (`NFT_JUMP_STACK_SIZE`).
const MAX_DEPTH: usize = 16;

impl Ruleset {
    /// Where a datagram in `state` is refused, if it is.
    fn refusal(&self, state: State) -> Option<Refusal> {
        self.bases.iter().find_map(|(base, policy_refuses)| {
            let mut steps = 0;
            let end = self.walk(base, state, 0, &mut steps);
            let rule = match end {
                Some((Verdict::Refuse, text)) => text.to_owned(),
                Some(_) => return None,
                None if *policy_refuses => "its policy".to_owned(),
                None => return None,
            };
            Some(Refusal {
                chain: format!("{} {base}", self.name),
                rule,
            })
        })
    }

    /// The final verdict of a chain; `None` if it has none.
    fn walk(
        &self,
        chain: &str,
        state: State,
        depth: usize,
        steps: &mut usize,
    ) -> Option<(Verdict, &str)> {
        for rule in self.chains.get(chain)? {
            *steps += 1;
            if *steps > MAX_STEPS || depth > MAX_DEPTH {
                return Some((Verdict::Refuse, "a ruleset too long to follow"));
            }
            if !rule.conditions.iter().all(|condition| condition.met(state)) {
                continue;
            }
            match &rule.verdict {
                Verdict::Continue => {}
                Verdict::Return => return None,
                Verdict::Accept => return Some((Verdict::Accept, &rule.text)),
                Verdict::Refuse => return Some((Verdict::Refuse, &rule.text)),
                Verdict::Goto(target) => return self.walk(target, state, depth + 1, steps),
                Verdict::Jump(target) => {
                    let end = self.walk(target, state, depth + 1, steps);
                    if end.is_some() {
                        return end;
                    }
                }
            }
        }
        None
    }
}

/// Follows the probe through `nft list ruleset` and the `iptables -t filter -S` of each variant, each with
/// the name of its program. A datagram passes if every base chain lets it.
pub(super) fn judge(
    probe: Probe<'_>,
    nft_listing: Option<&str>,
    iptables_listings: &[(&str, String)],
) -> Admission {
    let mut rulesets = Vec::new();
    for direction in [Direction::Input, Direction::Output] {
        for (program, listing) in iptables_listings {
            rulesets.push(iptables::read(program, listing, direction, probe));
        }
        if let Some(listing) = nft_listing {
            // nft cannot show every condition of a rule that iptables made.
            let compat = !iptables_listings.is_empty();
            rulesets.extend(nft::read(listing, direction, probe, compat));
        }
    }
    let refusal = |state| rulesets.iter().find_map(|ruleset| ruleset.refusal(state));
    let Some(untracked) = refusal(State::Untracked) else {
        return Admission::Open;
    };
    if refusal(State::New).is_none() {
        Admission::Tracked(untracked)
    } else if refusal(State::Established).is_none() {
        Admission::Established(untracked)
    } else {
        Admission::Closed(untracked)
    }
}

/// Whether `prefix` (an address, or one with a prefix length) holds `addr`; `None` if it is neither.
fn holds(prefix: &str, addr: IpAddr) -> Option<bool> {
    let net: Result<ipnet::IpNet, _> = prefix.parse();
    net.map(|net| net.contains(&addr))
        .or_else(|_| prefix.parse().map(|one: IpAddr| one == addr))
        .ok()
}

/// Whether `range` (`80`, or `80-90` with the given separator) holds `port`; `None` if it is not numeric.
fn in_range(range: &str, separator: char, port: u16) -> Option<bool> {
    let (low, high) = range.split_once(separator).unwrap_or((range, range));
    let (low, high): (u16, u16) = (low.parse().ok()?, high.parse().ok()?);
    Some((low..=high).contains(&port))
}

/// Some alternative is met, or all are known not to be.
fn any(alternatives: impl IntoIterator<Item = Option<bool>>) -> Condition {
    let mut result = Condition::Unmet;
    for one in alternatives {
        match one {
            Some(true) => return Condition::Met,
            Some(false) => {}
            None => result = Condition::Unknown,
        }
    }
    result
}

/// The words of a rule; what is in double quotes is one word, without them.
fn words(line: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = line.trim();
    while !rest.is_empty() {
        let (word, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_once(' ').unwrap_or((rest, "")),
        };
        words.push(word);
        rest = after.trim_start();
    }
    words
}

#[cfg(test)]
mod tests;
