//! Owns reading `nft list ruleset` as conditions on the probe. Never judges a whole ruleset.

use super::{Arrival, Condition, Direction, Probe, Rule, Ruleset, Verdict, any, holds, words};

/// The tables that see the probe, with their base chains of `direction`. `without_compat` leaves out those
/// that iptables made.
pub(super) fn read(
    listing: &str,
    direction: Direction,
    probe: Probe<'_>,
    without_compat: bool,
) -> Vec<Ruleset> {
    let hook = match direction {
        Direction::Input => "input",
        Direction::Output => "output",
    };
    let mut rulesets = Vec::new();
    let mut table: Option<Ruleset> = None;
    let mut chain: Option<String> = None;
    let mut skipped_blocks = 0usize;
    for line in listing.lines().map(str::trim) {
        if skipped_blocks > 0 {
            skipped_blocks = skipped_blocks
                .saturating_add(line.matches('{').count())
                .saturating_sub(line.matches('}').count());
            continue;
        }
        let words = words(line);
        match (&mut table, &chain, &words[..]) {
            (_, _, [] | ["#", ..]) => {}
            (None, _, ["table", family, name, "{"]) => {
                let seen = match *family {
                    "inet" => true,
                    "ip" => probe.addr.is_ipv4(),
                    "ip6" => probe.addr.is_ipv6(),
                    _ => false,
                };
                let compat = without_compat && *name == "filter" && *family != "inet";
                // What our own source check refuses is no peer's.
                let ours = *family == "inet" && crate::firewall::senders::is_ours(name);
                if seen && !compat && !ours {
                    table = Some(Ruleset {
                        name: format!("{family} {name}"),
                        ..Ruleset::default()
                    });
                } else {
                    skipped_blocks = 1;
                }
            }
            (Some(_), None, ["}"]) => rulesets.extend(table.take()),
            (Some(_), Some(_), ["}"]) => chain = None,
            (Some(ruleset), None, ["chain", name, "{"]) => {
                ruleset.chains.entry((*name).to_owned()).or_default();
                chain = Some((*name).to_owned());
            }
            (Some(_), None, [.., "{"]) => skipped_blocks = 1,
            (Some(ruleset), Some(name), ["type", _, "hook", at, ..]) => {
                let refuses = line.contains("policy drop");
                let base = (*at == hook).then(|| (name.clone(), refuses));
                ruleset.bases.extend(base);
            }
            (Some(ruleset), Some(name), rule) => {
                let rules = read_rule(line, rule, direction, probe);
                ruleset
                    .chains
                    .entry(name.clone())
                    .or_default()
                    .extend(rules);
            }
            _ => {}
        }
    }
    rulesets
}

/// One rule, or one for each entry of a map from states to verdicts.
fn read_rule(line: &str, words: &[&str], direction: Direction, probe: Probe<'_>) -> Vec<Rule> {
    let mut conditions = Vec::new();
    let mut rest = words;
    loop {
        let verdict = match rest {
            [] => Verdict::Continue,
            ["accept", ..] => Verdict::Accept,
            ["drop" | "reject", ..] => Verdict::Refuse,
            ["return", ..] => Verdict::Return,
            ["jump", to, ..] => Verdict::Jump((*to).to_owned()),
            ["goto", to, ..] => Verdict::Goto((*to).to_owned()),
            ["ct", "state", "vmap", "{", map @ ..] => {
                return state_map(map)
                    .map(|(state, verdict)| {
                        let state = Condition::States {
                            names: vec![state],
                            negated: false,
                        };
                        Rule {
                            conditions: conditions.iter().cloned().chain([state]).collect(),
                            verdict,
                            text: line.to_owned(),
                        }
                    })
                    .collect();
            }
            _ => {
                let (condition, after) = read_condition(rest, direction, probe);
                conditions.extend(condition);
                rest = after;
                continue;
            }
        };
        return vec![Rule {
            conditions,
            verdict,
            text: line.to_owned(),
        }];
    }
}

/// The entries of `established : accept, invalid : jump bad }`.
fn state_map(words: &[&str]) -> impl Iterator<Item = (String, Verdict)> {
    let text = words.join(" ");
    let (entries, _) = text.split_once('}').unwrap_or((&text, ""));
    let entry = |entry: &str| {
        let (state, verdict) = entry.split_once(':')?;
        let verdict = match verdict.split_whitespace().collect::<Vec<_>>()[..] {
            ["accept"] => Verdict::Accept,
            ["drop"] => Verdict::Refuse,
            ["return"] => Verdict::Return,
            ["jump", to] => Verdict::Jump(to.to_owned()),
            ["goto", to] => Verdict::Goto(to.to_owned()),
            _ => Verdict::Continue,
        };
        Some((state.trim().to_owned(), verdict))
    };
    entries
        .split(',')
        .filter_map(entry)
        .collect::<Vec<_>>()
        .into_iter()
}

/// The condition that `words` begin with, if it is one, and what follows it.
fn read_condition<'a, 'b>(
    words: &'b [&'a str],
    direction: Direction,
    probe: Probe<'_>,
) -> (Option<Condition>, &'b [&'a str]) {
    let input = direction == Direction::Input;
    match words {
        ["counter", "packets", _, "bytes", _, rest @ ..] => (None, rest),
        ["counter", rest @ ..] => (None, rest),
        ["comment", _, rest @ ..] => (None, rest),
        ["log", rest @ ..] => {
            // Up to the verdict, its options are words of their own.
            let end = ["accept", "drop", "reject", "return", "jump", "goto"];
            let at = rest.iter().position(|word| end.contains(word));
            (None, &rest[at.unwrap_or(rest.len())..])
        }
        ["meta", rest @ ..] if !matches!(rest, [] | ["mark" | "skuid" | "skgid", ..]) => {
            read_condition(rest, direction, probe)
        }
        ["iifname" | "iif", values @ ..] => {
            let is = |one: &str| Some(input && is_interface(one, probe.interface));
            matching(values, is)
        }
        ["oifname" | "oif", values @ ..] => {
            let is = |one: &str| Some(!input && is_interface(one, probe.interface));
            matching(values, is)
        }
        ["l4proto", values @ ..]
        | ["ip", "protocol", values @ ..]
        | ["ip6", "nexthdr", values @ ..] => {
            matching(values, |one| Some(probe.arrival.is_protocol(one)))
        }
        ["nfproto", values @ ..] => {
            matching(values, |one| Some((one == "ipv4") == probe.addr.is_ipv4()))
        }
        // What it has no ports for, it is not, whatever the comparison.
        ["udp" | "th", _, values @ ..] if probe.arrival == Arrival::Ipip => {
            (Some(Condition::Unmet), operand(values).2)
        }
        ["udp" | "th", "dport", values @ ..] => {
            matching(values, |one| probe.arrival.is_in_range(one, '-'))
        }
        ["udp" | "th", "sport", values @ ..] => {
            let (condition, rest) = matching(values, |one| probe.arrival.is_in_range(one, '-'));
            (condition.map(Condition::about_source_port), rest)
        }
        [family @ ("ip" | "ip6"), "saddr" | "daddr", values @ ..] => {
            let (condition, rest) = matching(values, |one| holds(one, probe.addr));
            let seen = (*family == "ip") == probe.addr.is_ipv4();
            (
                if seen {
                    condition
                } else {
                    Some(Condition::Unmet)
                },
                rest,
            )
        }
        ["ct", "state", values @ ..] => {
            let (list, negated, rest) = operand(values);
            let names = list.iter().map(|name| (*name).to_owned()).collect();
            (Some(Condition::States { names, negated }), rest)
        }
        ["fib", "daddr", "type", values @ ..] => {
            matching(values, |one| Some((one == "local") == input))
        }
        [
            "tcp" | "icmp" | "icmpv6" | "sctp" | "dccp" | "esp" | "ah" | "udplite",
            _,
            rest @ ..,
        ] => (Some(Condition::Unmet), rest),
        [_, rest @ ..] => (Some(Condition::Unknown), rest),
        [] => (None, words),
    }
}

/// A comparison of something with the operand that `words` begin with.
fn matching<'a, 'b>(
    words: &'b [&'a str],
    is: impl Fn(&str) -> Option<bool>,
) -> (Option<Condition>, &'b [&'a str]) {
    let (list, negated, rest) = operand(words);
    let condition = any(list.iter().map(|one| is(one))).negate_if(negated);
    (Some(condition), rest)
}

/// `!= x`, `{ x, y }` or `x,y`, and what follows. A named set is a word that nothing equals.
fn operand<'a, 'b>(words: &'b [&'a str]) -> (Vec<&'a str>, bool, &'b [&'a str]) {
    let (negated, words) = match words {
        ["!=", rest @ ..] => (true, rest),
        ["==", rest @ ..] => (false, rest),
        _ => (false, words),
    };
    match words {
        ["{", rest @ ..] => {
            let end = rest.iter().position(|word| *word == "}");
            let (inside, after) = rest.split_at(end.unwrap_or(rest.len()));
            let list = inside.iter().map(|word| word.trim_end_matches(','));
            (list.collect(), negated, after.get(1..).unwrap_or_default())
        }
        [one, rest @ ..] => (one.split(',').collect(), negated, rest),
        [] => (Vec::new(), negated, words),
    }
}

/// `eth*` means every name that begins with `eth`.
fn is_interface(pattern: &str, name: &str) -> bool {
    pattern
        .strip_suffix('*')
        .map_or(pattern == name, |prefix| name.starts_with(prefix))
}
