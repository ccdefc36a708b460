//! Owns the backends that only lease a subnet and leave the packets to others: `alloc` to whoever set the network up,
//! `extension` to commands of the operator's. Pure. Flannel specification sections 8.7 and 8.9.

use std::net::IpAddr;

use super::ends::Ends;
use crate::addr::Mtu;
use crate::config::ExtensionBackend;
use crate::iface::Choice;
use crate::lease::{BackendData, LeaseAttrs};

/// What the lease calls the one with commands; the other's lease names no type.
pub const EXTENSION: &str = "extension";

/// What the backend needs on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outside {
    ends: Ends,
    /// Its commands, if it is the one that has any.
    commands: Option<ExtensionBackend>,
    /// What the first of them said, for peers.
    data: Option<BackendData>,
}

impl Outside {
    /// Leases a subnet, and no more.
    #[must_use]
    pub const fn alloc(ends: Ends) -> Self {
        Self {
            ends,
            commands: None,
            data: None,
        }
    }

    /// Leases a subnet, and has commands do the rest.
    #[must_use]
    pub const fn extension(ends: Ends, commands: ExtensionBackend) -> Self {
        Self {
            ends,
            commands: Some(commands),
            data: None,
        }
    }

    /// The commands, if there are any to be run.
    #[must_use]
    pub const fn commands(&self) -> Option<&ExtensionBackend> {
        self.commands.as_ref()
    }

    /// Publishes what a command has said: one JSON text, as the original does.
    pub fn publish(&mut self, output: &str) {
        let json = serde_json::to_string(output).unwrap_or_default();
        self.data = BackendData::new(&json);
    }

    /// Takes over what was published before.
    pub fn keep_data_of(&mut self, before: &Self) {
        self.data.clone_from(&before.data);
    }

    /// What pods may send: nothing is known that is put around it.
    #[must_use]
    pub const fn mtu(&self) -> Mtu {
        self.ends.primary().mtu
    }

    /// The backend's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self.commands {
            Some(_) => EXTENSION,
            None => "alloc",
        }
    }

    /// What the lease says about us. With commands these are the interface's addresses, whatever `--public-ip` says.
    #[must_use]
    pub fn attrs(&self) -> LeaseAttrs {
        let Some(_) = &self.commands else {
            return self.ends.attrs("");
        };
        let mut attrs = self.ends.attrs(EXTENSION);
        for Choice { addr, .. } in self.ends.iter() {
            match addr {
                IpAddr::V4(ip) => attrs.public_ip = Some(*ip),
                IpAddr::V6(ip) => attrs.public_ipv6 = Some(*ip),
            }
        }
        attrs.backend_data.clone_from(&self.data);
        attrs
    }
}
