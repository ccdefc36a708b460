//! Owns reading `iptables -t filter -S` as conditions on the probe. Never judges a whole ruleset.

use super::{Condition, Direction, Probe, Rule, Ruleset, Verdict, any, holds, words};

/// The ruleset with the built-in chain of `direction` as its base.
pub(super) fn read(
    program: &str,
    listing: &str,
    direction: Direction,
    probe: Probe<'_>,
) -> Ruleset {
    let base = match direction {
        Direction::Input => "INPUT",
        Direction::Output => "OUTPUT",
    };
    let mut ruleset = Ruleset {
        name: format!("{program} filter"),
        ..Ruleset::default()
    };
    for line in listing.lines() {
        let words = words(line);
        match words[..] {
            ["-P", chain, policy] => {
                ruleset.chains.entry(chain.to_owned()).or_default();
                if chain == base {
                    ruleset.bases.push((base.to_owned(), policy == "DROP"));
                }
            }
            ["-N", chain] => {
                ruleset.chains.entry(chain.to_owned()).or_default();
            }
            ["-A", chain, ref rest @ ..] => {
                let rule = read_rule(line, rest, direction, probe);
                ruleset
                    .chains
                    .entry(chain.to_owned())
                    .or_default()
                    .push(rule);
            }
            _ => {}
        }
    }
    ruleset
}

fn read_rule(line: &str, words: &[&str], direction: Direction, probe: Probe<'_>) -> Rule {
    let mut rule = Rule {
        conditions: Vec::new(),
        verdict: Verdict::Continue,
        text: line.to_owned(),
    };
    let mut words = words.iter().copied();
    let mut negated = false;
    while let Some(option) = words.next() {
        if option == "!" {
            negated = true;
            continue;
        }
        if let "-j" | "-g" = option {
            rule.verdict = verdict(option, words.next().unwrap_or_default());
            // What follows is about the target.
            break;
        }
        let mut value = || words.next().unwrap_or_default();
        let arrival = probe.arrival;
        let list = |text: &str| any(text.split(',').map(|one| arrival.is_in_range(one, ':')));
        let condition = match option {
            "-m" | "--comment" => {
                value();
                continue;
            }
            "-p" => {
                let protocol = value();
                Condition::known(protocol == "all" || arrival.is_protocol(protocol))
            }
            "-i" | "-o" => {
                let ours = (option == "-i") == (direction == Direction::Input);
                Condition::known(is_interface(value(), probe.interface) && ours)
            }
            "-s" | "-d" => any([holds(value(), probe.addr)]),
            "--dport" | "--dports" => list(value()),
            "--sport" | "--sports" => list(value()).about_source_port(),
            "--ctstate" | "--state" => Condition::States {
                names: value().split(',').map(str::to_owned).collect(),
                negated: false,
            },
            "--dst-type" => {
                Condition::known((value() == "LOCAL") == (direction == Direction::Input))
            }
            _ => {
                // Whether a value follows is unknown too; a value is never an option.
                Condition::Unknown
            }
        };
        rule.conditions.push(condition.negate_if(negated));
        negated = false;
    }
    rule
}

fn verdict(option: &str, target: &str) -> Verdict {
    match target {
        "ACCEPT" => Verdict::Accept,
        "DROP" | "REJECT" => Verdict::Refuse,
        "RETURN" => Verdict::Return,
        // LOG, MARK and the like go on; they name no chain, and a jump to none goes on as well.
        other if option == "-g" => Verdict::Goto(other.to_owned()),
        other => Verdict::Jump(other.to_owned()),
    }
}

/// `eth+` means every name that begins with `eth`.
fn is_interface(pattern: &str, name: &str) -> bool {
    pattern
        .strip_suffix('+')
        .map_or(pattern == name, |prefix| name.starts_with(prefix))
}
