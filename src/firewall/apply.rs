//! Owns making the kernel's rules what they should be: reads, compares, changes the difference one table at a
//! time, and removes what any variant of them left elsewhere. Never decides which rules those are.

use std::net::IpAddr;
use std::path::PathBuf;

use tokio::sync::Mutex;
use tracing::debug;

use super::error::Difference;
use super::iptables::{self, Observed, Plan, Slot};
use super::kernel_events::Interest;
use super::nft::{self, NOTRACK_TABLE, Table};
use super::rules::{Family, Rules};
use super::tool::SearchPath;
use super::variant::{self, Flavor, Iptables, Mode, Nft};
use super::{Admission, Arrival, Error, admission};

/// The program that holds the rules, chosen and probed.
#[derive(Debug)]
pub struct Firewall {
    search: SearchPath,
    holder: Holder,
    /// One change at a time: two would each undo what the other has just read.
    changing: Mutex<()>,
}

#[derive(Debug)]
enum Holder {
    Nft(Nft),
    Iptables {
        suffix: &'static str,
        tools: [Option<Iptables>; 2],
    },
}

/// What an [`apply`](Firewall::apply) did.
#[derive(Debug)]
#[must_use]
pub struct Applied {
    /// What differed and was changed. Empty if all was in place.
    pub fixed: Vec<Difference>,
    /// What still differs: another program changes the same chains.
    pub remaining: Vec<Difference>,
    /// Rules of ours that other programs held, and that are gone.
    pub swept: Vec<String>,
    /// Why the tunnel is still tracked, if that was to be prevented and could not: the kernel lacks a module.
    /// All else is in place.
    pub tracked_because: Option<Error>,
}

/// What [`remove`] did.
#[derive(Debug, Default)]
#[must_use]
pub struct Removed {
    /// The chains and tables that were there and are gone.
    pub places: Vec<String>,
    /// What could not be looked at or removed.
    pub errors: Vec<Error>,
}

impl Firewall {
    /// Finds the program for `mode` in the directories `search` (those of PATH) and probes what it can do. For
    /// [`Mode::Iptables`] on a host with both variants, takes the one that holds the host's other rules.
    ///
    /// # Errors
    /// [`Error::Missing`] if it is not installed, or the error of running it.
    pub async fn open(search: Vec<PathBuf>, mode: Mode) -> Result<Self, Error> {
        let search = SearchPath(search);
        let holder = match mode {
            Mode::Nftables => Holder::Nft(Nft::find(&search).await?),
            Mode::Iptables => {
                let suffix = variant::choose(&search).await;
                let v4 = Iptables::find(&search, Family::V4, suffix).await;
                let v6 = Iptables::find(&search, Family::V6, suffix).await;
                let tools = match (v4, v6) {
                    (Err(error), Err(_)) => return Err(error),
                    (v4, v6) => [v4.ok(), v6.ok()],
                };
                Holder::Iptables { suffix, tools }
            }
        };
        Ok(Self {
            search,
            holder,
            changing: Mutex::new(()),
        })
    }

    /// Which kind of iptables holds the rules; `None` for nftables itself.
    #[must_use]
    pub fn flavor(&self) -> Option<Flavor> {
        match &self.holder {
            Holder::Nft(_) => None,
            Holder::Iptables { tools, .. } => tools.iter().flatten().map(|tool| tool.flavor).next(),
        }
    }

    /// Puts `rules` in place, and then removes what other programs hold of ours, so that a switch leaves no
    /// moment without rules. Changes nothing that is right already.
    ///
    /// # Errors
    /// That of the program that failed. Its table is then as it was; a later call tries again.
    pub async fn apply(&self, rules: &Rules) -> Result<Applied, Error> {
        let mut applied = self.repair(rules).await?;
        let swept = sweep(&self.search, Some(&self.holder)).await;
        for error in &swept.errors {
            debug!(%error, "cannot look for rules held by another program");
        }
        applied.swept = swept.places;
        Ok(applied)
    }

    /// As [`apply`](Self::apply), but looks only where the rules should be.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub async fn repair(&self, rules: &Rules) -> Result<Applied, Error> {
        let _one = self.changing.lock().await;
        let mut fixed = self.traffic(rules, true).await?;
        let tracked_because = match self.notrack(rules, true).await {
            Ok(more) => {
                fixed.extend(more);
                None
            }
            Err(error) => Some(error),
        };
        let mut remaining = Vec::new();
        if !fixed.is_empty() {
            remaining.extend(self.traffic(rules, false).await?);
            if tracked_because.is_none() {
                remaining.extend(self.notrack(rules, false).await?);
            }
        }
        Ok(Applied {
            fixed,
            remaining,
            swept: Vec::new(),
            tracked_because,
        })
    }

    /// How the kernel differs from `rules`: missing, changed, reordered, duplicated or left over rules in our
    /// tables and chains. Empty if all is in place. Changes nothing.
    ///
    /// # Errors
    /// That of the program that failed.
    pub async fn check(&self, rules: &Rules) -> Result<Vec<Difference>, Error> {
        let _one = self.changing.lock().await;
        let mut differences = self.traffic(rules, false).await?;
        differences.extend(self.notrack(rules, false).await?);
        Ok(differences)
    }

    /// Whether the host's own firewall lets what peers send through on the external
    /// `interface`, which has the address `public_ip`, and if only as tracked connections. Reads the whole
    /// ruleset; meant for the start.
    ///
    /// # Errors
    /// That of the program that failed.
    pub async fn admission(
        &self,
        arrival: Arrival,
        interface: &str,
        public_ip: IpAddr,
    ) -> Result<Admission, Error> {
        let nft = match &self.holder {
            Holder::Nft(nft) => Some(nft.clone()),
            Holder::Iptables { .. } => Nft::find(&self.search).await.ok(),
        };
        let nft_listing = match nft {
            Some(nft) => Some(nft.list_all().await?),
            None => None,
        };
        let family = if public_ip.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        };
        let mut filters = Vec::new();
        for tool in variant::all(&self.search, family).await {
            if tool.has_table("filter") {
                match tool.list_table("filter").await {
                    Ok(listing) => filters.push((tool.name(), listing)),
                    // A table that iptables cannot read was made with nft, whose listing shows it.
                    Err(error) => debug!(%error, "cannot read the host's filter table"),
                }
            }
        }
        let probe = admission::Probe {
            arrival,
            interface,
            addr: public_ip,
        };
        Ok(admission::judge(probe, nft_listing.as_deref(), &filters))
    }

    /// What to listen for; `None` if this program's changes are not notified.
    pub(super) fn interest(&self) -> Option<Interest> {
        match (&self.holder, self.flavor()) {
            (Holder::Nft(_), _) => Some(Interest::OwnTables),
            (Holder::Iptables { .. }, Some(Flavor::Nft)) => Some(Interest::CompatChains),
            (Holder::Iptables { .. }, _) => None,
        }
    }

    async fn traffic(&self, rules: &Rules, change: bool) -> Result<Vec<Difference>, Error> {
        match &self.holder {
            Holder::Nft(nft) => {
                let wanted = nft::traffic(rules, nft.caps);
                let places = Family::ALL.map(nft::traffic_table);
                bring_tables(nft, &places, &wanted, change).await
            }
            Holder::Iptables { .. } => self.slots(&iptables::TRAFFIC, rules, change).await,
        }
    }

    async fn notrack(&self, rules: &Rules, change: bool) -> Result<Vec<Difference>, Error> {
        match &self.holder {
            Holder::Nft(nft) => {
                let wanted: Vec<Table> = nft::notrack(rules).into_iter().collect();
                bring_tables(nft, &[NOTRACK_TABLE], &wanted, change).await
            }
            Holder::Iptables { .. } => self.slots(&[iptables::NOTRACK], rules, change).await,
        }
    }

    async fn slots(
        &self,
        slots: &[Slot],
        rules: &Rules,
        change: bool,
    ) -> Result<Vec<Difference>, Error> {
        let Holder::Iptables { suffix, tools } = &self.holder else {
            return Ok(Vec::new());
        };
        let mut differences = Vec::new();
        let mut failed = None;
        for (family, tool) in Family::ALL.into_iter().zip(tools) {
            for slot in slots {
                let random = tool.as_ref().is_some_and(Iptables::random_fully);
                let wanted = iptables::desired(slot, rules, family, random);
                let wanted = wanted.as_ref();
                let found = match (tool, wanted) {
                    (Some(tool), _) => bring_slot(tool, slot, wanted, change).await,
                    (None, None) => continue,
                    // Says which program is missing, or runs one that has been installed since.
                    (None, Some(_)) => match Iptables::find(&self.search, family, suffix).await {
                        Ok(tool) => bring_slot(&tool, slot, wanted, change).await,
                        Err(error) => Err(error),
                    },
                };
                match found {
                    Ok(found) => differences.extend(found),
                    // One chain that cannot be changed is no reason to neglect the others.
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
        }
        failed.map_or(Ok(differences), Err)
    }
}

/// Removes every rule, chain and table that this module or flannel ever made, of every variant that the search
/// path has a program for. Nothing else, and nothing that is not there.
pub async fn remove(search: Vec<PathBuf>) -> Removed {
    sweep(&SearchPath(search), None).await
}

/// Removes what is held by programs other than `keep`.
async fn sweep(search: &SearchPath, keep: Option<&Holder>) -> Removed {
    let mut removed = Removed::default();
    if keep.is_none() {
        match super::senders::sweep(search.0.clone(), |_of| false).await {
            Ok(found) => removed.places.extend(found),
            Err(error) => removed.errors.push(error),
        }
    }
    let mut note = |result: Result<Vec<Difference>, Error>| match result {
        Ok(found) => removed.places.extend(found.into_iter().map(|d| d.place)),
        Err(error) => removed.errors.push(error),
    };
    if !matches!(keep, Some(Holder::Nft(_))) && search.find("nft").is_some() {
        let [v4, v6] = Family::ALL.map(nft::traffic_table);
        match Nft::find(search).await {
            Ok(nft) => note(bring_tables(&nft, &[v4, v6, NOTRACK_TABLE], &[], true).await),
            Err(error) => note(Err(error)),
        }
    }
    for family in Family::ALL {
        for tool in variant::all(search, family).await {
            let kept = matches!(keep, Some(Holder::Iptables { tools, .. })
                if tools.iter().flatten().any(|other| other.flavor == tool.flavor));
            if kept {
                continue;
            }
            for slot in &iptables::SLOTS {
                note(bring_slot(&tool, slot, None, true).await);
            }
        }
    }
    removed
}

/// Brings the tables at `places` to `wanted` (those of them that are wanted) in one transaction, or only says
/// how they differ.
async fn bring_tables(
    nft: &Nft,
    places: &[(&'static str, &'static str)],
    wanted: &[Table],
    change: bool,
) -> Result<Vec<Difference>, Error> {
    let mut differences = Vec::new();
    let mut script = String::new();
    for &(family, name) in places {
        let wanted = wanted.iter().find(|t| t.family == family && t.name == name);
        let listing = nft.list(family, name).await?;
        if let Some(found) = nft::compare((family, name), wanted, listing.as_deref()) {
            differences.push(found);
            script.push_str(&nft::replace(family, name, wanted));
        }
    }
    if change && !script.is_empty() {
        nft.transact(&script).await?;
    }
    Ok(differences)
}

/// Brings one chain of ours and the jumps to it to `wanted`, or only says how they differ.
async fn bring_slot(
    tool: &Iptables,
    slot: &Slot,
    wanted: Option<&iptables::Content>,
    change: bool,
) -> Result<Vec<Difference>, Error> {
    if wanted.is_none() && !tool.has_table(slot.table) {
        return Ok(Vec::new());
    }
    let plan = match plan(tool, slot, wanted).await {
        Ok(plan) => plan,
        // A kernel without this table or family cannot hold what is not wanted either.
        Err(error @ Error::Refused { .. }) if wanted.is_none() => {
            debug!(%error, "cannot look for rules that are not wanted");
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    if !change || plan.payload.is_empty() {
        return Ok(plan.differences);
    }
    match tool.restore(&plan.payload).await {
        // Somebody may have changed the chain since it was read.
        Err(Error::Refused { .. }) => {
            let again = self::plan(tool, slot, wanted).await?;
            if !again.payload.is_empty() {
                tool.restore(&again.payload).await?;
            }
        }
        result => result?,
    }
    Ok(plan.differences)
}

async fn plan(
    tool: &Iptables,
    slot: &Slot,
    wanted: Option<&iptables::Content>,
) -> Result<Plan, Error> {
    let mut observed = Observed::default();
    for hook in slot.hooks {
        let listing = tool.list(slot.table, hook).await?.unwrap_or_default();
        observed.hooks.push(iptables::parse_listing(&listing, hook));
    }
    let chain = tool.list(slot.table, slot.chain).await?;
    observed.chain = chain.map(|listing| iptables::parse_listing(&listing, slot.chain));
    Ok(iptables::plan(tool.name(), slot, wanted, &observed))
}
