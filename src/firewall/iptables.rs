//! Owns the iptables form of the rules: their texts, what `iptables -S` shows of them, and the
//! `iptables-restore --noflush` payload that turns one into the other. Pure: runs nothing.
//!
//! A payload declares a chain of ours (`:CHAIN - [0:0]`), which creates it or empties it, and fills it in the
//! same commit, so there is no moment without rules, and rules for a network or subnet of earlier go with it.

use super::error::{Difference, What};
use super::rules::{Family, Rules};

const MASQ_COMMENT: &str = r#"-m comment --comment "flanneld masq""#;
const FORWARD_COMMENT: &str = r#"-m comment --comment "flanneld forward""#;
const NOTRACK_COMMENT: &str = r#"-m comment --comment "loden notrack""#;

/// A chain of ours with its place in one table of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) table: &'static str,
    pub(super) chain: &'static str,
    /// The built-in chains that jump to it.
    pub(super) hooks: &'static [&'static str],
    /// Marks rules in the built-in chains as ours, even those that jump nowhere: flannel before 0.20 had them.
    comment: &'static str,
}

/// flannel's two chains.
pub(super) const TRAFFIC: [Slot; 2] = [
    Slot {
        table: "nat",
        chain: "FLANNEL-POSTRTG",
        hooks: &["POSTROUTING"],
        comment: MASQ_COMMENT,
    },
    Slot {
        table: "filter",
        chain: "FLANNEL-FWD",
        hooks: &["FORWARD"],
        comment: FORWARD_COMMENT,
    },
];

/// Our own chain.
pub(super) const NOTRACK: Slot = Slot {
    table: "raw",
    chain: "LODEN-NOTRACK",
    hooks: &["PREROUTING", "OUTPUT"],
    comment: NOTRACK_COMMENT,
};

/// All of them.
pub(super) const SLOTS: [Slot; 3] = [TRAFFIC[0], TRAFFIC[1], NOTRACK];

/// Rules of a slot: one jump specification per hook and the chain's rules, each without `-A CHAIN`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) jumps: Vec<String>,
    pub(super) rules: Vec<String>,
}

/// What `slot` should hold for `family`; `None` if nothing. The texts are flannel's
/// (`pkg/trafficmngr/iptables`), in its order.
pub(super) fn desired(
    slot: &Slot,
    rules: &Rules,
    family: Family,
    random_fully: bool,
) -> Option<Content> {
    let jump = |conditions: &str| format!("{conditions}{} -j {}", slot.comment, slot.chain);
    if slot.table == NOTRACK.table {
        let notrack = rules.notrack().filter(|n| n.underlay.has(family))?;
        let port = notrack.port;
        // A pod's own traffic to that port elsewhere stays tracked, and so masqueraded.
        let arriving = format!("-p udp -m udp --dport {port} -m addrtype --dst-type LOCAL ");
        let leaving = format!("-p udp -m udp --dport {port} ");
        return Some(Content {
            jumps: vec![jump(&arriving), jump(&leaving)],
            rules: vec![format!("{NOTRACK_COMMENT} -j CT --notrack")],
        });
    }
    let wanted = rules.family(family)?;
    let (net, pod) = (wanted.network(), wanted.subnet());
    let lines = if slot.table == "nat" {
        let masquerade = wanted.masquerade()?;
        let random = if masquerade.fully_random && random_fully {
            " --random-fully"
        } else {
            ""
        };
        let multicast = family.multicast();
        let mut lines = vec![
            format!("-m mark --mark 0x4000/0x4000 {MASQ_COMMENT} -j RETURN"),
            format!("-s {pod} -d {net} {MASQ_COMMENT} -j RETURN"),
            format!("-s {net} -d {pod} {MASQ_COMMENT} -j RETURN"),
            format!("! -s {net} -d {pod} {MASQ_COMMENT} -j RETURN"),
        ];
        let exempt = masquerade.exempt.iter();
        lines.extend(exempt.map(|to| format!("-s {net} -d {to} {MASQ_COMMENT} -j RETURN")));
        lines.extend([
            format!("-s {net} ! -d {multicast} {MASQ_COMMENT} -j MASQUERADE{random}"),
            format!("! -s {net} -d {net} {MASQ_COMMENT} -j MASQUERADE{random}"),
        ]);
        lines
    } else {
        if !wanted.forward() {
            return None;
        }
        vec![
            format!("-s {net} {FORWARD_COMMENT} -j ACCEPT"),
            format!("-d {net} {FORWARD_COMMENT} -j ACCEPT"),
        ]
    };
    Some(Content {
        jumps: vec![jump("")],
        rules: lines,
    })
}

/// What the kernel has: every rule of the hooks, in the slot's order, and the chain's, if it exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Observed {
    pub(super) hooks: Vec<Vec<String>>,
    pub(super) chain: Option<Vec<String>>,
}

/// The rules of `chain` in what `iptables -S CHAIN` printed, without `-A CHAIN`, in order.
pub(super) fn parse_listing(listing: &str, chain: &str) -> Vec<String> {
    let rule = |line: &str| {
        let rest = line.strip_prefix("-A ")?.strip_prefix(chain)?;
        Some(rest.strip_prefix(' ')?.trim_end().to_owned())
    };
    listing.lines().filter_map(rule).collect()
}

/// What to do about one slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) differences: Vec<Difference>,
    /// The input for `iptables-restore --noflush`; empty if there is nothing to do.
    pub(super) payload: String,
}

/// Compares and plans. `program` only names the place in the differences.
pub(super) fn plan(
    program: &str,
    slot: &Slot,
    wanted: Option<&Content>,
    observed: &Observed,
) -> Plan {
    let Slot { table, chain, .. } = slot;
    let mut differences = Vec::new();
    let mut differs = |place: &str, what| {
        differences.push(Difference {
            place: format!("{program} {table} {place}"),
            what,
        });
    };
    // The chain's declaration comes first, because jumps need it; its end comes last, because they use it.
    let (mut head, mut jumps, mut rules, mut tail) = (vec![], vec![], vec![], vec![]);
    match (wanted, &observed.chain) {
        (Some(wanted), Some(found)) if wanted.rules == *found => {}
        (Some(wanted), found) => {
            differs(
                chain,
                found.as_ref().map_or(What::Missing, |_| What::Changed),
            );
            head.push(format!(":{chain} - [0:0]"));
            rules.extend(wanted.rules.iter().map(|rule| format!("-A {chain} {rule}")));
        }
        (None, Some(_)) => {
            differs(chain, What::LeftOver);
            tail.extend([format!("-F {chain}"), format!("-X {chain}")]);
        }
        (None, None) => {}
    }
    for (index, hook) in slot.hooks.iter().enumerate() {
        let found = observed.hooks.get(index).map_or(&[][..], Vec::as_slice);
        let wanted = wanted.and_then(|content| content.jumps.get(index));
        let Some(what) = judge(slot, wanted, found) else {
            continue;
        };
        differs(hook, what);
        let ours = found.iter().filter(|rule| is_ours(slot, rule));
        jumps.extend(ours.map(|rule| format!("-D {hook} {rule}")));
        if let Some(jump) = wanted {
            let others = found.iter().filter(|rule| !is_ours(slot, rule));
            jumps.push(match others.clone().position(|rule| decides_all(rule)) {
                Some(before) => format!("-I {hook} {} {jump}", before + 1),
                None => format!("-A {hook} {jump}"),
            });
        }
    }
    let lines: Vec<String> = [head, jumps, rules, tail].concat();
    let payload = if lines.is_empty() {
        String::new()
    } else {
        format!("*{table}\n{}\nCOMMIT\n", lines.join("\n"))
    };
    Plan {
        differences,
        payload,
    }
}

/// What is wrong with our part of a built-in chain. Where exactly the jump stands is free, because others
/// insert and append too, as long as every packet can get there.
fn judge(slot: &Slot, wanted: Option<&String>, found: &[String]) -> Option<What> {
    let ours: Vec<&String> = found.iter().filter(|rule| is_ours(slot, rule)).collect();
    let Some(wanted) = wanted else {
        return (!ours.is_empty()).then_some(What::LeftOver);
    };
    match ours[..] {
        [] => Some(What::Missing),
        [one] if one == wanted => {
            let first = found
                .iter()
                .find(|rule| *rule == wanted || decides_all(rule));
            (first != Some(wanted)).then_some(What::Misplaced)
        }
        [_] => Some(What::Misplaced),
        _ => Some(What::Duplicate),
    }
}

/// Whether a rule of a built-in chain was made by flannel or by us for this slot.
fn is_ours(slot: &Slot, rule: &str) -> bool {
    let target = rule.rsplit_once("-j ").map(|(_, target)| target);
    target == Some(slot.chain) || rule.contains(slot.comment)
}

/// Whether no packet gets past this rule, so that nothing behind it has an effect: distributions end FORWARD
/// with such a reject.
fn decides_all(rule: &str) -> bool {
    let mut words = rule.split_ascii_whitespace();
    words.next() == Some("-j") && matches!(words.next(), Some("ACCEPT" | "DROP" | "REJECT"))
}

#[cfg(test)]
mod tests;
