//! Owns the error object of the CNI protocol (CNI specification 1.1.0, "Error"). Never decides what is an error.

use std::fmt::Display;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The protocol version is not one that the plugin or the command takes.
pub(super) const INCOMPATIBLE_VERSION: u32 = 1;
/// A variable of the environment is missing or malformed.
pub(super) const ENVIRONMENT: u32 = 4;
/// A stream cannot be read.
pub(super) const IO: u32 = 5;
/// Something is not the JSON it should be.
pub(super) const DECODING: u32 = 6;
/// The network configuration makes no sense.
pub(super) const CONFIGURATION: u32 = 7;
/// The network namespace is not usable. The specification leaves 8 to 99 to itself; libcni gave it this meaning.
pub(super) const NETNS: u32 = 8;
/// The plugin cannot serve ADD now.
pub(super) const NOT_AVAILABLE: u32 = 50;
/// Everything else, as libcni has it.
const INTERNAL: u32 = 999;

/// What a plugin says on standard output when it fails.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, thiserror::Error)]
#[error("{msg}")]
pub struct CniError {
    /// Which kind of error.
    pub code: u32,
    /// What is wrong, with the field and the remedy.
    #[serde(default)]
    pub msg: String,
    /// More of it; empty for nothing.
    #[serde(default)]
    pub details: String,
}

impl CniError {
    pub(super) fn new(code: u32, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// An error without a code of its own.
    pub(super) fn internal(msg: impl Into<String>) -> Self {
        Self::new(INTERNAL, msg)
    }

    /// A refusal of the system about a file.
    pub(super) fn file(doing: &str, path: &Path, source: impl Display) -> Self {
        Self::internal(format!("cannot {doing} {}: {source}", path.display()))
    }

    /// The object, for a runtime that speaks `version`.
    pub(super) fn to_json(&self, version: &str) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Wire<'a> {
            cni_version: &'a str,
            code: u32,
            msg: &'a str,
            #[serde(skip_serializing_if = "str::is_empty")]
            details: &'a str,
        }
        let wire = Wire {
            cni_version: version,
            code: self.code,
            msg: &self.msg,
            details: &self.details,
        };
        // Texts and a number: nothing that JSON could refuse.
        let mut json = serde_json::to_vec_pretty(&wire).unwrap_or_default();
        json.push(b'\n');
        json
    }
}
