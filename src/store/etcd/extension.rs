//! Owns the value beside a lease: what flannel's value has no field for. Never decides whether it counts.

use crate::config::Object;
use crate::lease::LeaseExtension;

/// The largest extension read; one takes 12 bytes.
const MAX_EXTENSION_LEN: usize = 1024;

/// What [`to_json`] wrote, or a later version of it.
pub(super) fn parse(text: &[u8]) -> Result<LeaseExtension, String> {
    if text.len() > MAX_EXTENSION_LEN {
        return Err(format!(
            "the extension is larger than {MAX_EXTENSION_LEN} bytes"
        ));
    }
    let object = Object::parse(text, "").map_err(|e| format!("the extension is no object: {e}"))?;
    let ecn = object
        .plain::<bool>("Ecn", "true or false")
        .map_err(|e| e.to_string())?;
    Ok(LeaseExtension {
        ecn: ecn.unwrap_or_default(),
    })
}

/// The value beside a lease; none for what is assumed anyway.
pub(super) fn to_json(extension: LeaseExtension) -> Option<String> {
    let LeaseExtension { ecn } = extension;
    (extension != LeaseExtension::default()).then(|| format!(r#"{{"Ecn":{ecn}}}"#))
}
