//! Owns the file beside a lease that holds what flannel's value has no field for. Never decides who wins.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::config::{Null, Object};
use crate::lease::LeaseExtension;

/// The largest sidecar read; one takes about 120 bytes.
pub(super) const MAX_SIDECAR_LEN: usize = 4096;

/// `expiry/<key>`: `{"Expires":1764000000,"Claimed":1763913600000000000,"Owner":"192.0.2.1","Ecn":true}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sidecar {
    /// When the lease ends; `null` for a reservation that a node has taken up.
    pub(super) expires: Option<SystemTime>,
    /// When the node claimed the subnet, in nanoseconds of Unix time. Renewals keep it.
    pub(super) claimed: u64,
    /// The node, as in the lease. Another one means that the two files are not of the same time.
    pub(super) owner: IpAddr,
    /// What the node publishes beside flannel's attributes.
    pub(super) extension: LeaseExtension,
}

impl Sidecar {
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        const EXPIRES: &str = "seconds of Unix time, or null for never";
        const CLAIMED: &str = "nanoseconds of Unix time";
        const OWNER: &str = "the node's public IP";
        let malformed = |e: &dyn std::fmt::Display| format!("the expiry file is malformed: {e}");
        let missing = |key, expected| malformed(&format!("{key} is missing: expected {expected}"));
        let object = Object::parse(text, "").map_err(|e| malformed(&e))?;
        let expires = object
            .plain::<u64>("Expires", EXPIRES)
            .map_err(|e| malformed(&e))?;
        if object.values("Expires").next().is_none() {
            return Err(missing("Expires", EXPIRES));
        }
        let expires = match expires {
            None => None,
            Some(seconds) => Some(
                SystemTime::UNIX_EPOCH
                    .checked_add(Duration::from_secs(seconds))
                    .ok_or_else(|| {
                        malformed(&object.refuse("Expires", EXPIRES, "a time too far"))
                    })?,
            ),
        };
        let claimed = object
            .plain::<u64>("Claimed", CLAIMED)
            .map_err(|e| malformed(&e))?;
        let owner = object
            .text("Owner", OWNER, Null::Refused, |text| {
                text.parse::<IpAddr>().ok()
            })
            .map_err(|e| malformed(&e))?;
        let ecn = object
            .plain::<bool>("Ecn", "true or false")
            .map_err(|e| malformed(&e))?;
        Ok(Self {
            expires,
            claimed: claimed.ok_or_else(|| missing("Claimed", CLAIMED))?,
            owner: owner.ok_or_else(|| missing("Owner", OWNER))?,
            extension: LeaseExtension {
                ecn: ecn.unwrap_or_default(),
            },
        })
    }

    pub(super) fn to_json(self) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Wire {
            expires: Option<u64>,
            claimed: u64,
            owner: IpAddr,
            ecn: bool,
        }
        let wire = Wire {
            expires: self.expires.map(|at| unix(at).as_secs()),
            claimed: self.claimed,
            owner: self.owner,
            ecn: self.extension.ecn,
        };
        // Plain numbers, texts and flags always serialize.
        serde_json::to_string(&wire).unwrap_or_default()
    }
}

/// Unix time; zero before 1970.
pub(super) fn unix(at: SystemTime) -> Duration {
    at.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}

/// The time of a claim.
pub(super) fn nanoseconds(at: SystemTime) -> u64 {
    u64::try_from(unix(at).as_nanos()).unwrap_or(u64::MAX)
}

/// What the sidecar can hold.
pub(super) fn whole_seconds(at: SystemTime) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(unix(at).as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sidecar_survives_its_text_to_the_byte() {
        for golden in [
            r#"{"Expires":1764000000,"Claimed":1763913600000000000,"Owner":"192.0.2.1","Ecn":true}"#,
            r#"{"Expires":null,"Claimed":0,"Owner":"2001:db8::1","Ecn":false}"#,
        ] {
            assert_eq!(Sidecar::parse(golden.as_bytes()).unwrap().to_json(), golden);
        }
    }

    #[test]
    fn every_malformed_field_is_named() {
        for (text, named) in [
            ("", "malformed"),
            (r#"{"Claimed":1,"Owner":"192.0.2.1"}"#, "Expires is missing"),
            (r#"{"Expires":1,"Owner":"192.0.2.1"}"#, "Claimed is missing"),
            (r#"{"Expires":1,"Claimed":1}"#, "Owner is missing"),
            (
                r#"{"Expires":-1,"Claimed":1,"Owner":"192.0.2.1"}"#,
                "Expires: expected",
            ),
            (
                r#"{"Expires":18446744073709551615,"Claimed":1,"Owner":"192.0.2.1"}"#,
                "too far",
            ),
            (
                r#"{"Expires":1,"Claimed":"x","Owner":"192.0.2.1"}"#,
                "Claimed: expected",
            ),
            (
                r#"{"Expires":1,"Claimed":1,"Owner":"me"}"#,
                "Owner: expected",
            ),
            (
                r#"{"Expires":1,"Claimed":1,"Owner":"192.0.2.1","Ecn":1}"#,
                "Ecn: expected",
            ),
        ] {
            let error = Sidecar::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
