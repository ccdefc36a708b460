//! Owns what a runtime says by environment variables, and what it may say there. Never reads the environment itself.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::conf::Attachment;
use super::error::{CniError, ENVIRONMENT};

/// The longest name of an interface: Linux's `IFNAMSIZ` without the final zero (`include/uapi/linux/if.h`).
const MAX_INTERFACE_LEN: usize = 15;

/// The variables that a runtime sets. One that is not set is empty.
#[derive(Debug, Default)]
pub struct Environment {
    pub(super) command: String,
    pub(super) container_id: String,
    pub(super) netns: OsString,
    netns_override: String,
    pub(super) ifname: String,
    pub(super) path: OsString,
}

impl Environment {
    /// Takes the variables that `lookup` knows.
    #[must_use]
    pub fn new(lookup: impl Fn(&str) -> Option<OsString>) -> Self {
        let raw = |name: &str| lookup(name).unwrap_or_default();
        let text = |name: &str| raw(name).to_string_lossy().into_owned();
        Self {
            command: text("CNI_COMMAND"),
            container_id: text("CNI_CONTAINERID"),
            netns: raw("CNI_NETNS"),
            netns_override: text("CNI_NETNS_OVERRIDE"),
            ifname: text("CNI_IFNAME"),
            path: raw("CNI_PATH"),
        }
    }

    /// The interface that is meant.
    pub(super) fn attachment(&self) -> Result<Attachment, CniError> {
        if !is_container_id(&self.container_id) {
            return Err(CniError::new(
                ENVIRONMENT,
                "invalid characters in containerID: CNI_CONTAINERID takes letters, digits, '_', '.' \
                 and '-', and begins with a letter or digit",
            ));
        }
        is_interface_name(&self.ifname).map_err(|reason| {
            CniError::new(ENVIRONMENT, format!("CNI_IFNAME: interface name {reason}"))
        })?;
        Ok(Attachment {
            container_id: self.container_id.clone(),
            ifname: self.ifname.clone(),
        })
    }

    /// Whether the namespace is the plugin's own, whose interfaces are the node's, and nobody wants that.
    pub(super) fn is_own_netns(&self) -> io::Result<bool> {
        if self.netns_override == "1" || self.netns_override.eq_ignore_ascii_case("true") {
            return Ok(false);
        }
        let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
        let own = identity(Path::new("/proc/thread-self/ns/net"))?;
        Ok(identity(Path::new(&self.netns))? == own)
    }
}

/// `[a-zA-Z0-9][a-zA-Z0-9_.-]*`, so never a path.
pub(super) fn is_container_id(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(allowed)
}

/// What Linux takes for the name of an interface; else the reason.
pub(super) fn is_interface_name(text: &str) -> Result<(), &'static str> {
    if text.is_empty() {
        Err("is empty")
    } else if text.len() > MAX_INTERFACE_LEN {
        Err("is too long: at most 15 bytes")
    } else if text == "." || text == ".." {
        Err("is . or ..")
    } else if text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
        Err("contains / or : or whitespace characters")
    } else {
        Ok(())
    }
}
