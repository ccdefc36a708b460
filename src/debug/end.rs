//! Owns how people name an end of a packet: by its address, or as a pod. Never looks anything up.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::store::pods::{PodName, PodNameError};

/// An end of a packet, as it was asked about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum End {
    /// By its address.
    Addr(IpAddr),
    /// As a pod.
    Pod(PodName),
}

impl FromStr for End {
    type Err = PodNameError;

    fn from_str(text: &str) -> Result<Self, PodNameError> {
        match text.parse() {
            Ok(addr) => Ok(Self::Addr(addr)),
            Err(_any) => text.parse().map(Self::Pod),
        }
    }
}

impl TryFrom<String> for End {
    type Error = PodNameError;

    fn try_from(text: String) -> Result<Self, PodNameError> {
        text.parse()
    }
}

impl From<End> for String {
    fn from(end: End) -> Self {
        end.to_string()
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(f),
            Self::Pod(name) => name.fmt(f),
        }
    }
}
