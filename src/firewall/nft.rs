//! Owns the nftables form of the rules: our tables, the script that replaces them, and reading back what
//! `nft list table` shows of them. Pure: runs nothing.
//!
//! The tables are wholly ours, so one that differs is deleted and made anew in one transaction: packets see
//! the old one or the new one. The script is written in the syntax of the listing, which `nft -f` reads too.

use std::fmt::Write as _;

use super::error::{Difference, What};
use super::rules::{Family, FamilyRules, Rules};

/// The address family of a table, as nft writes it.
type TableFamily = &'static str;

/// Our own table, beside flannel's two.
pub(super) const NOTRACK_TABLE: (TableFamily, &str) = ("inet", "loden-notrack");

/// flannel's tables.
pub(super) const fn traffic_table(family: Family) -> (TableFamily, &'static str) {
    match family {
        Family::V4 => ("ip", "flannel-ipv4"),
        Family::V6 => ("ip6", "flannel-ipv6"),
    }
}

/// What `nft` and the kernel can do here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caps {
    /// Tables and chains may carry comments (Linux 5.10, nft 0.9.7).
    pub(super) comments: bool,
    /// `masquerade fully-random`.
    pub(super) fully_random: bool,
}

/// A table with everything in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) family: String,
    pub(super) name: String,
    pub(super) comment: Option<String>,
    pub(super) chains: Vec<Chain>,
}

/// A base chain; its policy is to accept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: String,
    pub(super) comment: Option<String>,
    /// `filter` or `nat`.
    pub(super) kind: String,
    pub(super) hook: String,
    pub(super) priority: i32,
    pub(super) rules: Vec<String>,
}

/// Priorities that listings show by name (nft(8), "standard priority names").
const PRIORITIES: [(&str, i32); 6] = [
    ("raw", -300),
    ("mangle", -150),
    ("dstnat", -100),
    ("filter", 0),
    ("security", 50),
    ("srcnat", 100),
];

/// flannel's tables as `rules` want them, rule texts and comments as in its `pkg/trafficmngr/nftables`. A
/// family that wants nothing has none.
pub(super) fn traffic(rules: &Rules, caps: Caps) -> Vec<Table> {
    let families = Family::ALL.into_iter();
    families
        .filter_map(|family| traffic_of(rules.family(family)?, caps))
        .collect()
}

fn traffic_of(rules: &FamilyRules, caps: Caps) -> Option<Table> {
    let (ip, name) = traffic_table(rules.family());
    let (net, pod) = (rules.network(), rules.subnet());
    let comment = |text: &str| caps.comments.then(|| text.to_owned());
    let mut chains = Vec::new();
    if let Some(masquerade) = rules.masquerade() {
        let random = if masquerade.fully_random && caps.fully_random {
            " fully-random"
        } else {
            ""
        };
        let multicast = rules.family().multicast();
        // The fourth rule says POD where iptables says NET, and the first compares the whole mark: kept,
        // because flannel's own tests compare these texts.
        let mut lines = vec![
            "meta mark 0x00004000 return".to_owned(),
            format!("{ip} saddr {pod} {ip} daddr {net} return"),
            format!("{ip} saddr {net} {ip} daddr {pod} return"),
            format!("{ip} saddr != {pod} {ip} daddr {net} return"),
        ];
        let exempt = masquerade.exempt.iter();
        lines.extend(exempt.map(|to| format!("{ip} saddr {net} {ip} daddr {to} return")));
        lines.extend([
            format!("{ip} saddr {net} {ip} daddr != {multicast} masquerade{random}"),
            format!("{ip} saddr != {net} {ip} daddr {net} masquerade{random}"),
        ]);
        chains.push(Chain {
            name: "postrtg".to_owned(),
            comment: comment("chain to manage traffic masquerading by flannel"),
            kind: "nat".to_owned(),
            hook: "postrouting".to_owned(),
            priority: 100,
            rules: lines,
        });
    }
    if rules.forward() {
        chains.push(Chain {
            name: "forward".to_owned(),
            comment: comment("chain to accept flannel traffic"),
            kind: "filter".to_owned(),
            hook: "forward".to_owned(),
            priority: 0,
            rules: vec![
                format!("{ip} saddr {net} accept"),
                format!("{ip} daddr {net} accept"),
            ],
        });
    }
    (!chains.is_empty()).then(|| Table {
        family: ip.to_owned(),
        name: name.to_owned(),
        comment: comment(&format!("rules for {name}")),
        chains,
    })
}

/// Our own table as `rules` want it.
pub(super) fn notrack(rules: &Rules) -> Option<Table> {
    let wanted = rules.notrack()?;
    let port = wanted.port;
    let [v4, v6] = Family::ALL.map(|family| wanted.underlay.has(family));
    let only = match (v4, v6) {
        (true, false) => "meta nfproto ipv4 ",
        (false, true) => "meta nfproto ipv6 ",
        (true, true) | (false, false) => "",
    };
    let chain = |hook: &str, condition: &str| Chain {
        name: hook.to_owned(),
        comment: None,
        kind: "filter".to_owned(),
        hook: hook.to_owned(),
        priority: -300,
        rules: vec![format!("{only}udp dport {port}{condition} notrack")],
    };
    let (family, name) = NOTRACK_TABLE;
    Some(Table {
        family: family.to_owned(),
        name: name.to_owned(),
        comment: None,
        // A pod's own traffic to that port elsewhere stays tracked, and so masqueraded.
        chains: vec![
            chain("prerouting", " fib daddr type local"),
            chain("output", ""),
        ],
    })
}

/// The transaction that leaves of the table (`family`, `name`) exactly `wanted`, whatever was there.
pub(super) fn replace(family: &str, name: &str, wanted: Option<&Table>) -> String {
    // Adding first lets the deletion succeed when there is no table; `destroy` needs Linux 6.3.
    let mut script = format!("add table {family} {name}\ndelete table {family} {name}\n");
    if let Some(table) = wanted {
        script.push_str(&render(table));
    }
    script
}

/// The table in the syntax of `nft list table`.
pub(super) fn render(table: &Table) -> String {
    let mut text = format!("table {} {} {{\n", table.family, table.name);
    let mut line = |indent: &str, content: std::fmt::Arguments<'_>| {
        writeln!(text, "{indent}{content}").expect("writing to a String cannot fail");
    };
    if let Some(comment) = &table.comment {
        line("\t", format_args!("comment \"{comment}\""));
    }
    for chain in &table.chains {
        line("\t", format_args!("chain {} {{", chain.name));
        if let Some(comment) = &chain.comment {
            line("\t\t", format_args!("comment \"{comment}\""));
        }
        line(
            "\t\t",
            format_args!(
                "type {} hook {} priority {}; policy accept;",
                chain.kind, chain.hook, chain.priority
            ),
        );
        for rule in &chain.rules {
            line("\t\t", format_args!("{rule}"));
        }
        line("\t", format_args!("}}"));
    }
    line("", format_args!("}}"));
    text
}

/// Reads one table of a listing; `None` for anything that our tables never hold (sets, regular chains, another
/// policy, flags).
pub(super) fn parse(listing: &str) -> Option<Table> {
    let mut lines = listing.lines().map(str::trim).filter(|l| !l.is_empty());
    let mut head = lines.next()?.split_ascii_whitespace();
    if head.next() != Some("table") {
        return None;
    }
    let mut table = Table {
        family: head.next()?.to_owned(),
        name: head.next()?.to_owned(),
        ..Table::default()
    };
    loop {
        let line = lines.next()?;
        if line == "}" {
            return lines.next().is_none().then_some(table);
        }
        if let Some(comment) = quoted(line) {
            table.comment = Some(comment);
        } else {
            let name = line.strip_prefix("chain ")?.strip_suffix(" {")?;
            table.chains.push(parse_chain(name, &mut lines)?);
        }
    }
}

fn parse_chain<'a>(name: &str, lines: &mut impl Iterator<Item = &'a str>) -> Option<Chain> {
    let mut chain = Chain {
        name: name.to_owned(),
        ..Chain::default()
    };
    loop {
        let line = lines.next()?;
        if line == "}" {
            return (!chain.kind.is_empty()).then_some(chain);
        }
        if let Some(comment) = quoted(line) {
            chain.comment = Some(comment);
        } else if let Some(rest) = line.strip_prefix("type ") {
            let rest = rest.strip_suffix("; policy accept;")?;
            let words: Vec<&str> = rest.split_ascii_whitespace().collect();
            let [kind, "hook", hook, "priority", priority @ ..] = &words[..] else {
                return None;
            };
            chain.kind = (*kind).to_owned();
            chain.hook = (*hook).to_owned();
            chain.priority = parse_priority(priority)?;
        } else {
            chain.rules.push(line.to_owned());
        }
    }
}

/// `100`, `srcnat`, or `srcnat + 5`.
fn parse_priority(words: &[&str]) -> Option<i32> {
    let base = |word: &str| {
        let named = PRIORITIES.iter().find(|(name, _)| *name == word);
        named.map_or_else(|| word.parse().ok(), |&(_, value)| Some(value))
    };
    match words {
        [word] => base(word),
        [word, "+", more] => base(word)?.checked_add(more.parse().ok()?),
        [word, "-", less] => base(word)?.checked_sub(less.parse().ok()?),
        _ => None,
    }
}

fn quoted(line: &str) -> Option<String> {
    let text = line.strip_prefix("comment \"")?.strip_suffix('"')?;
    Some(text.to_owned())
}

/// How the table (`family`, `name`) differs from `wanted`; `listing` is `None` if there is no such table.
pub(super) fn compare(
    (family, name): (&str, &str),
    wanted: Option<&Table>,
    listing: Option<&str>,
) -> Option<Difference> {
    let what = match (wanted, listing) {
        (None, None) => return None,
        (Some(_), None) => What::Missing,
        (None, Some(_)) => What::LeftOver,
        (Some(wanted), Some(listing)) if parse(listing).as_ref() == Some(wanted) => return None,
        (Some(_), Some(_)) => What::Changed,
    };
    Some(Difference {
        place: format!("nft table {family} {name}"),
        what,
    })
}

/// Input for `nft --check`: accepted where tables may carry comments.
pub(super) const COMMENT_PROBE: &str = "add table ip loden-probe { comment \"probe\" ; }\n";

/// Input for `nft --check`: accepted where masquerading may pick random ports.
pub(super) const RANDOM_PROBE: &str = "\
add table ip loden-probe
add chain ip loden-probe probe { type nat hook postrouting priority 100 ; }
add rule ip loden-probe probe ip saddr != 127.0.0.1 masquerade fully-random
";

#[cfg(test)]
mod tests;
