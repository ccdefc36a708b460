//! Owns what a session tells of itself: what is missing, how peers are reached, `subnet.env`, and its part of the log.
//! Never changes what it tells of.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Instant;

use super::Session;
use crate::backend::desired::Refused;
use crate::backend::udp;
use crate::daemon::extension;
use crate::daemon::renewal::Held;
use crate::daemon::traffic::Traffic;
use crate::lease::Subnets;
use crate::store::env_file::SubnetEnv;

impl Session {
    /// What keeps pods of this node from reaching others, or the rules from being right.
    pub(in crate::daemon) fn missing(&self, held: &Held) -> Vec<String> {
        let mut missing = Vec::new();
        if self.carrier.is_none() {
            let why = self.down.as_deref().unwrap_or("not opened yet");
            missing.push(format!("the tunnel is down: {why}"));
        }
        if held.lost.get() {
            missing.push("the lease was deleted and is not registered again yet".to_owned());
        }
        if let Some(problem) = self.traffic.as_ref().and_then(Traffic::problem) {
            missing.push(format!("traffic rules: {problem}"));
        }
        missing.extend(self.incomplete.clone());
        missing.extend(self.guard.problem());
        let failures = self.commands.iter().map(extension::Peers::failures);
        for failures in failures.filter(|failures| !failures.is_empty()) {
            missing.push(format!("commands failed for {} peers", failures.len()));
        }
        if let Some(moved) = &self.moved {
            missing.push(moved.clone());
        }
        missing.extend(self.env_behind.clone());
        missing
    }

    /// Leases that nothing is done for, and why.
    pub(in crate::daemon) fn unserved(&self) -> impl Iterator<Item = &Refused> {
        let looked = self
            .carrier
            .iter()
            .flat_map(|carrier| &carrier.report.refused);
        self.refused.iter().chain(looked)
    }

    /// Why nothing is done for a lease, if nothing is.
    pub(in crate::daemon) fn why_unserved(&self, subnets: &Subnets) -> Option<String> {
        let mut unserved = self.unserved();
        let refused = unserved.find(|refused| refused.lease == *subnets)?;
        Some(refused.why.clone())
    }

    /// How packets reach a peer; none if they do not. Where the families differ, both ways are named.
    pub(in crate::daemon) fn transport_of(&self, subnets: &Subnets) -> Option<String> {
        let carrier = self.carrier.as_ref()?;
        if self.unserved().any(|refused| refused.lease == *subnets) {
            return None;
        }
        let tunnel = match self.registration.plan.in_user_space() {
            Some(_) => "vxlan in user space",
            None => self.registration.plan.name(),
        };
        let nets = udp::nets(subnets);
        let mut ways: Vec<&str> = nets
            .iter()
            .map(|net| match carrier.report.direct.contains(net) {
                true => "route",
                false => tunnel,
            })
            .collect();
        ways.dedup();
        Some(ways.join(" and "))
    }

    /// What commands have failed for which peers.
    pub(in crate::daemon) fn command_failures(&self) -> Arc<BTreeMap<Subnets, String>> {
        let commands = self.commands.as_ref();
        commands.map(extension::Peers::failures).unwrap_or_default()
    }

    pub(super) fn env(&self) -> SubnetEnv {
        let registration = &self.registration;
        let config = &registration.config;
        SubnetEnv {
            network: config.ipv4.as_ref().map(|pool| pool.network()),
            ipv6_network: config.ipv6.as_ref().map(|pool| pool.network()),
            subnets: registration.lease.subnets,
            mtu: registration.plan.mtu(),
            ip_masq: false,
        }
    }

    /// A few lines about leases a minute; `loden status` has them all.
    pub(super) fn log_lease(&mut self, text: &dyn Display) {
        if self.lease_lines.allow(Instant::now()) {
            tracing::warn!("{text}");
        } else {
            self.log_limited(
                "more leases are not used than the log has room for: `loden status` lists them"
                    .to_owned(),
            );
        }
    }

    /// At most one line per text and minute.
    pub(super) fn log_limited(&mut self, text: String) {
        match self.log.allow(text.clone(), Instant::now()) {
            Some(0) => tracing::warn!("{text}"),
            Some(suppressed) => tracing::warn!("{text} (suppressed {suppressed})"),
            None => {}
        }
    }
}
