//! Owns the choice of programs: nftables or iptables, and which of the two iptables. Never changes a rule.
//!
//! A host whose rules live in the legacy tables and one whose rules live in nftables look alike through the
//! wrong `iptables`. The choice follows the one that flannel's image makes when it starts
//! (kubernetes-sigs/iptables-wrappers): kubelet's hint chain first, then where more rules are.

use std::fs;
use std::path::PathBuf;

use super::rules::Family;
use super::tool::{self, SearchPath};
use super::{Error, nft};

/// Which program holds the rules; flannel's `EnableNFTables`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `nft`.
    Nftables,
    /// `iptables-restore` and `ip6tables-restore`.
    Iptables,
}

/// Where an iptables program keeps its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// In nftables, as compatible rules.
    Nft,
    /// In the legacy tables, which notify nobody of a change.
    Legacy,
}

/// A version in the three numbers that `iptables --version` prints.
type Version = (u32, u32, u32);

/// From here on `iptables` knows `--wait`.
const WAIT: Version = (1, 4, 20);
/// From here on `iptables-restore` knows `--wait`, and MASQUERADE `--random-fully`.
const RESTORE_WAIT: Version = (1, 6, 2);

/// The programs of one address family.
#[derive(Clone, Debug)]
pub(super) struct Iptables {
    pub(super) family: Family,
    pub(super) flavor: Flavor,
    pub(super) command: PathBuf,
    pub(super) restore: PathBuf,
    version: Version,
}

const PACKAGE: &str = "iptables";

impl Iptables {
    /// The programs called `iptables{suffix}` or `ip6tables{suffix}`.
    pub(super) async fn find(
        search: &SearchPath,
        family: Family,
        suffix: &str,
    ) -> Result<Self, Error> {
        let name = program(family, suffix);
        let command = search.require(&name, PACKAGE)?;
        let restore = search.require(&format!("{name}-restore"), PACKAGE)?;
        let ended = tool::run(&command, &["--version"], "").await?;
        let text = ended.success("")?;
        let version = parse_version(&text).ok_or_else(|| Error::Listing {
            command: format!("{name} --version"),
            line: text.trim().to_owned(),
        })?;
        Ok(Self {
            family,
            // Before 1.8 there was only the legacy kind, and it did not say so.
            flavor: if text.contains("nf_tables") {
                Flavor::Nft
            } else {
                Flavor::Legacy
            },
            command,
            restore,
            version,
        })
    }

    /// The name for messages.
    pub(super) const fn name(&self) -> &'static str {
        match self.family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        }
    }

    pub(super) fn random_fully(&self) -> bool {
        self.version >= RESTORE_WAIT
    }

    /// `iptables --wait -t TABLE -S CHAIN`; `None` if there is no such chain.
    pub(super) async fn list(&self, table: &str, chain: &str) -> Result<Option<String>, Error> {
        let mut args = vec!["-t", table, "-S", chain];
        if self.version >= WAIT {
            args.insert(0, "--wait");
        }
        let ended = tool::run(&self.command, &args, "").await?;
        // iptables-nft calls a chain that does not exist "incompatible".
        let absent = ["No chain/target/match by that name", "is incompatible"];
        if ended.code == Some(1) && absent.iter().any(|text| ended.stderr.contains(text)) {
            return Ok(None);
        }
        ended.success("").map(Some)
    }

    /// `iptables --wait -t TABLE -S`: the whole table.
    pub(super) async fn list_table(&self, table: &str) -> Result<String, Error> {
        let mut args = vec!["-t", table, "-S"];
        if self.version >= WAIT {
            args.insert(0, "--wait");
        }
        tool::run(&self.command, &args, "").await?.success("")
    }

    /// Applies a payload in one transaction.
    pub(super) async fn restore(&self, payload: &str) -> Result<(), Error> {
        let args: &[&str] = if self.version >= RESTORE_WAIT {
            &["--noflush", "--wait"]
        } else {
            &["--noflush"]
        };
        let ended = tool::run(&self.restore, args, payload).await?;
        ended.success(payload).map(drop)
    }

    /// Whether the kernel has this table at all. Asking the legacy program would create it.
    pub(super) fn has_table(&self, table: &str) -> bool {
        self.flavor == Flavor::Nft || legacy_tables(self.family).iter().any(|name| name == table)
    }
}

/// The legacy tables that exist in this network namespace.
fn legacy_tables(family: Family) -> Vec<String> {
    let path = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    let names = fs::read_to_string(path).unwrap_or_default();
    names.lines().map(str::to_owned).collect()
}

fn program(family: Family, suffix: &str) -> String {
    match family {
        Family::V4 => format!("iptables{suffix}"),
        Family::V6 => format!("ip6tables{suffix}"),
    }
}

/// The first `vA.B.C` in the text.
fn parse_version(text: &str) -> Option<Version> {
    text.split_ascii_whitespace().find_map(|word| {
        let mut numbers = word.strip_prefix('v')?.split('.');
        let mut number = || numbers.next()?.parse().ok();
        Some((number()?, number()?, number()?))
    })
}

/// The suffix of the programs to use: "", "-nft" or "-legacy".
pub(super) async fn choose(search: &SearchPath) -> &'static str {
    let has_both = ["iptables-nft-restore", "iptables-legacy-restore"]
        .iter()
        .all(|name| search.find(name).is_some());
    if !has_both {
        return "";
    }
    let nft = census(search, "-nft").await;
    let legacy = census(search, "-legacy").await;
    let unnamed = search.find("iptables-restore").is_some();
    prefer(nft, legacy, unnamed)
}

/// What a variant's tables hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Census {
    /// kubelet's hint or canary chain is there.
    hint: bool,
    /// How many rules are not ours.
    rules: usize,
}

const fn prefer(nft: Census, legacy: Census, unnamed: bool) -> &'static str {
    match (nft.hint, legacy.hint) {
        (true, _) => "-nft",
        (false, true) => "-legacy",
        (false, false) if legacy.rules > nft.rules => "-legacy",
        (false, false) if nft.rules > legacy.rules => "-nft",
        // Nothing to go by: what the system calls `iptables`.
        (false, false) if unnamed => "",
        (false, false) => "-nft",
    }
}

async fn census(search: &SearchPath, suffix: &str) -> Census {
    let mut sum = Census::default();
    for family in Family::ALL {
        // Of the legacy tables, `-save` shows only those that exist, and creates none.
        let Some(save) = search.find(&format!("{}-save", program(family, suffix))) else {
            continue;
        };
        // A variant that cannot be read holds nothing that counts.
        if let Ok(Ok(text)) = tool::run(&save, &[], "")
            .await
            .map(|ended| ended.success(""))
        {
            let count = count(&text);
            sum.hint |= count.hint;
            sum.rules += count.rules;
        }
    }
    sum
}

/// Reads `iptables-save` output.
fn count(saved: &str) -> Census {
    let ours = |line: &str| {
        super::iptables::SLOTS
            .iter()
            .any(|s| line.contains(s.chain))
    };
    Census {
        hint: saved.lines().any(|line| {
            line.starts_with(":KUBE-IPTABLES-HINT ") || line.starts_with(":KUBE-KUBELET-CANARY ")
        }),
        rules: saved
            .lines()
            .filter(|line| line.starts_with("-A ") && !ours(line))
            .count(),
    }
}

/// Every distinct iptables of `family` that the search path holds: to remove rules wherever they are.
pub(super) async fn all(search: &SearchPath, family: Family) -> Vec<Iptables> {
    let mut found: Vec<Iptables> = Vec::new();
    for suffix in ["", "-nft", "-legacy"] {
        if let Ok(one) = Iptables::find(search, family, suffix).await
            && found.iter().all(|other| other.flavor != one.flavor)
        {
            found.push(one);
        }
    }
    found
}

/// `nft` and what it can do.
#[derive(Clone, Debug)]
pub(super) struct Nft {
    command: PathBuf,
    pub(super) caps: nft::Caps,
}

impl Nft {
    pub(super) async fn find(search: &SearchPath) -> Result<Self, Error> {
        let command = search.require("nft", "nftables")?;
        let accepts = async |probe: &str| {
            let ended = tool::run(&command, &["--check", "-f", "-"], probe).await?;
            Ok::<_, Error>(ended.code == Some(0))
        };
        let caps = nft::Caps {
            comments: accepts(nft::COMMENT_PROBE).await?,
            fully_random: accepts(nft::RANDOM_PROBE).await?,
        };
        Ok(Self { command, caps })
    }

    /// `nft list table FAMILY NAME`; `None` if there is no such table.
    pub(super) async fn list(&self, family: &str, name: &str) -> Result<Option<String>, Error> {
        let args = ["list", "table", family, name];
        let ended = tool::run(&self.command, &args, "").await?;
        if ended.code == Some(1) && ended.stderr.contains("No such file or directory") {
            return Ok(None);
        }
        ended.success("").map(Some)
    }

    /// The whole ruleset, of everybody.
    pub(super) async fn list_all(&self) -> Result<String, Error> {
        let ended = tool::run(&self.command, &["list", "ruleset"], "").await?;
        ended.success("")
    }

    /// Runs a script in one transaction.
    pub(super) async fn transact(&self, script: &str) -> Result<(), Error> {
        let ended = tool::run(&self.command, &["-f", "-"], script).await?;
        ended.success(script).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_flannel_reads_them() {
        for (text, version) in [
            ("iptables v1.8.9 (nf_tables)\n", Some((1, 8, 9))),
            ("iptables v1.4.20\n", Some((1, 4, 20))),
            ("iptables v1.6\n", None),
            ("busybox", None),
        ] {
            assert_eq!(parse_version(text), version, "{text}");
        }
    }

    #[test]
    fn kubelets_hint_outweighs_any_number_of_rules() {
        let nft = count(":KUBE-IPTABLES-HINT - [0:0]\n-A INPUT -j KUBE-FIREWALL\n");
        let legacy = count(&"-A INPUT -j ACCEPT\n".repeat(20));
        assert_eq!((nft.rules, legacy.rules), (1, 20));
        assert_eq!(prefer(nft, legacy, true), "-nft");
        assert_eq!(prefer(Census::default(), legacy, true), "-legacy");
    }

    #[test]
    fn the_variant_with_more_rules_of_others_is_chosen() {
        let ours = "-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n";
        let nft = count(&ours.repeat(9));
        let legacy = count("-A INPUT -p tcp -j ACCEPT\n:INPUT ACCEPT [0:0]\n");
        assert_eq!(prefer(nft, legacy, true), "-legacy");
        assert_eq!(prefer(legacy, nft, true), "-nft");
    }

    #[test]
    fn without_any_rule_the_systems_own_choice_stands() {
        let none = Census::default();
        assert_eq!(prefer(none, none, true), "");
        assert_eq!(prefer(none, none, false), "-nft");
    }
}
