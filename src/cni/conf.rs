//! Owns the network configuration that a runtime hands to the plugin on standard input (specification section
//! 12.2), read by Go's rules. Never looks at files.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::environment::{is_container_id, is_interface_name};
use super::error::{CONFIGURATION, CniError, DECODING};
use crate::config::Object;

/// The largest configuration read. Runtimes send a few kilobytes, most of it port mappings and the result so far.
pub const MAX_CONF_LEN: usize = 1024 * 1024;

/// What a configuration without `cniVersion` means.
const OLDEST: &str = "0.1.0";

const OBJECT: &str = "a JSON object";
const TEXT: &str = "a text";

/// A network configuration; the parts that every command needs are valid.
#[derive(Debug, Clone, PartialEq)]
pub struct NetConf {
    /// The network's name.
    pub name: String,
    /// `cniVersion`, unless empty.
    pub cni_version: Option<String>,
    /// `subnetFile`.
    pub subnet_file: PathBuf,
    /// `dataDir`.
    pub data_dir: PathBuf,
    /// `delegate`: what the delegate's configuration starts from.
    pub delegate: Map<String, Value>,
    /// `ipam`: what the delegate's address management starts from.
    pub ipam: Map<String, Value>,
    /// `runtimeConfig`.
    pub runtime_config: Option<Map<String, Value>>,
    /// `cni.dev/valid-attachments`: what a runtime that collects garbage still uses.
    pub valid_attachments: Option<Vec<Attachment>>,
}

/// One interface of one container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Attachment {
    /// The container.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// The name of the interface inside.
    pub ifname: String,
}

impl Attachment {
    /// Whether both parts are ones that a runtime may give, and that can therefore be part of a file name.
    pub(super) fn is_valid(&self) -> bool {
        is_container_id(&self.container_id) && is_interface_name(&self.ifname).is_ok()
    }
}

impl NetConf {
    /// Parses a configuration. Unknown keys are ignored.
    ///
    /// # Errors
    ///
    /// The first field that is wrong, by name.
    pub fn parse(text: &[u8]) -> Result<Self, CniError> {
        let decoding = |reason: String| {
            CniError::new(
                DECODING,
                format!("failed to load flannel netconf file: failed to load netconf: {reason}"),
            )
        };
        if text.len() > MAX_CONF_LEN {
            let reason = format!("larger than the {MAX_CONF_LEN} bytes that are read");
            return Err(decoding(reason));
        }
        let object = Object::parse(text, "").map_err(|e| decoding(e.to_string()))?;
        let text = |key| object.plain::<String>(key, TEXT);
        let map = |key| object.plain::<Map<String, Value>>(key, OBJECT);
        let read = || {
            let given = |key: &'static str, default: &str| {
                let value = text(key)?.filter(|value| !value.is_empty());
                Ok(value.map_or_else(|| PathBuf::from(default), PathBuf::from))
            };
            Ok(Self {
                name: text("name")?.unwrap_or_default(),
                cni_version: text("cniVersion")?.filter(|version| !version.is_empty()),
                subnet_file: given("subnetFile", "/run/flannel/subnet.env")?,
                data_dir: given("dataDir", "/var/lib/cni/flannel")?,
                delegate: map("delegate")?.unwrap_or_default(),
                ipam: map("ipam")?.unwrap_or_default(),
                runtime_config: map("runtimeConfig")?,
                valid_attachments: object.plain(
                    "cni.dev/valid-attachments",
                    "a list of objects with containerID and ifname",
                )?,
            })
        };
        let conf = read().map_err(|e: crate::config::FieldError| decoding(e.to_string()))?;
        let invalid = |msg: &str| Err(CniError::new(CONFIGURATION, msg));
        if conf.name.is_empty() {
            return invalid("missing network name: give the configuration a \"name\"");
        }
        // Names of networks are made of what names of containers are made of.
        if !is_container_id(&conf.name) {
            return invalid(
                "invalid characters found in network name: use letters, digits, '_', '.' and '-', \
                 and begin with a letter or digit",
            );
        }
        Ok(conf)
    }

    /// The version of the protocol that the configuration is written for.
    #[must_use]
    pub fn version(&self) -> &str {
        self.cni_version.as_deref().unwrap_or(OLDEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_original() {
        let conf = NetConf::parse(br#"{"name":"cbr0","type":"flannel"}"#).unwrap();
        assert_eq!(conf.version(), "0.1.0");
        assert_eq!(conf.subnet_file.to_str(), Some("/run/flannel/subnet.env"));
        assert_eq!(conf.data_dir.to_str(), Some("/var/lib/cni/flannel"));
        assert!(conf.delegate.is_empty() && conf.ipam.is_empty());
    }

    #[test]
    fn wrong_fields_are_named() {
        for (text, code, named) in [
            ("", 6, "failed to load netconf"),
            ("[]", 6, "failed to load netconf"),
            ("{}", 7, "name"),
            (r#"{"name":"../x"}"#, 7, "network name"),
            (r#"{"name":"a","delegate":[]}"#, 6, "delegate: expected"),
            (r#"{"name":"a","dataDir":1}"#, 6, "dataDir: expected"),
            (
                r#"{"name":"a","cni.dev/valid-attachments":[{}]}"#,
                6,
                "valid-attachments",
            ),
        ] {
            let error = NetConf::parse(text.as_bytes()).unwrap_err();
            assert_eq!(error.code, code, "{text}: {error}");
            assert!(error.msg.contains(named), "{text}: {error}");
        }
        let long = vec![b' '; MAX_CONF_LEN + 1];
        assert!(
            NetConf::parse(&long)
                .unwrap_err()
                .msg
                .contains("larger than")
        );
    }
}
