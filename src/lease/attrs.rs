//! Owns the value of a lease: flannel's JSON, byte for byte. Never interprets a backend's data.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;
use serde_json::value::RawValue;

use crate::addr::UnderlayAddr;
use crate::config::{FieldError, Null, Object};

/// The largest lease value read. The largest that flannel writes has about 300 bytes.
pub const MAX_ATTRS_LEN: usize = 16 * 1024;

/// Who leases a subnet and how to reach it; specification section 5.2.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LeaseAttrs {
    /// The node's IPv4 address on the underlay.
    pub public_ip: Option<Ipv4Addr>,
    /// The node's IPv6 address on the underlay.
    pub public_ipv6: Option<Ipv6Addr>,
    /// The backend the node uses; empty for those that publish none (`udp`).
    pub backend_type: String,
    /// What the backend publishes for IPv4.
    pub backend_data: Option<BackendData>,
    /// What the backend publishes for IPv6.
    pub backend_v6_data: Option<BackendData>,
}

/// JSON that only the backend understands, compact as Go writes it.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct BackendData(Box<RawValue>);

/// Why a text is not a lease value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttrsError {
    /// The value is larger than [`MAX_ATTRS_LEN`].
    #[error("the lease value has {len} bytes; at most {MAX_ATTRS_LEN} are read")]
    TooLarge {
        /// Bytes of the value.
        len: usize,
    },
    /// The value is not one JSON object.
    #[error("the lease value is not one JSON object: {reason}")]
    Syntax {
        /// What the JSON parser says, with line and column.
        reason: String,
    },
    /// A field has a value of the wrong type or text.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// Neither address is there, so nobody can reach the node.
    #[error("PublicIP and PublicIPv6 are both missing or unspecified")]
    NoPublicIp,
}

impl LeaseAttrs {
    /// The address that identifies the node to others: `PublicIP`, or `PublicIPv6` for a node without it.
    #[must_use]
    pub fn node(&self) -> Option<IpAddr> {
        self.public_ip
            .map(IpAddr::V4)
            .or(self.public_ipv6.map(IpAddr::V6))
    }

    /// Whether both name one address of one family.
    #[must_use]
    pub fn shares_address(&self, other: &Self) -> bool {
        (self.public_ip.is_some() && self.public_ip == other.public_ip)
            || (self.public_ipv6.is_some() && self.public_ipv6 == other.public_ipv6)
    }

    /// Parses a lease value. Unknown fields are ignored.
    ///
    /// # Errors
    ///
    /// The first field that is wrong, by name.
    pub fn parse(text: &[u8]) -> Result<Self, AttrsError> {
        const V4: &str = "a unicast IPv4 address, or 0.0.0.0 for none";
        const V6: &str = "a unicast IPv6 address, or null for none";
        if text.len() > MAX_ATTRS_LEN {
            return Err(AttrsError::TooLarge { len: text.len() });
        }
        let object = Object::parse(text, "").map_err(|e| AttrsError::Syntax {
            reason: e.to_string(),
        })?;
        let public_ip = object
            .text("PublicIP", V4, Null::Refused, |t| {
                unicast_or_none(t, Ipv4Addr::is_unspecified)
            })?
            .flatten();
        let public_ipv6 = object
            .text("PublicIPv6", V6, Null::Unset, |t| {
                unicast_or_none(t, Ipv6Addr::is_unspecified)
            })?
            .flatten();
        if public_ip.is_none() && public_ipv6.is_none() {
            return Err(AttrsError::NoPublicIp);
        }
        let data = |key| object.values(key).last().and_then(BackendData::from_raw);
        Ok(Self {
            public_ip,
            public_ipv6,
            backend_type: object
                .plain("BackendType", "a backend's name")?
                .unwrap_or_default(),
            backend_data: data("BackendData"),
            backend_v6_data: data("BackendV6Data"),
        })
    }

    /// The value as flannel writes it: its order of fields, compact, `PublicIP` and `PublicIPv6` always there,
    /// the others only when not empty.
    #[must_use]
    pub fn to_json(&self) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Wire<'a> {
            #[serde(rename = "PublicIP")]
            public_ip: Ipv4Addr,
            #[serde(rename = "PublicIPv6")]
            public_ipv6: Option<Ipv6Addr>,
            #[serde(skip_serializing_if = "str::is_empty")]
            backend_type: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            backend_data: Option<&'a BackendData>,
            #[serde(rename = "BackendV6Data", skip_serializing_if = "Option::is_none")]
            backend_v6_data: Option<&'a BackendData>,
        }
        let wire = Wire {
            public_ip: self.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED),
            public_ipv6: self.public_ipv6,
            backend_type: &self.backend_type,
            backend_data: self.backend_data.as_ref(),
            backend_v6_data: self.backend_v6_data.as_ref(),
        };
        // Neither a map with keys that are not text nor a failing writer is involved.
        serde_json::to_string(&wire)
            .map(|json| go_compact(&json))
            .unwrap_or_default()
    }
}

/// `Some(None)` for the unspecified address, `None` for what is not a unicast address.
#[expect(clippy::option_option, reason = "outer: acceptable; inner: given")]
fn unicast_or_none<A>(text: &str, is_unspecified: fn(&A) -> bool) -> Option<Option<A>>
where
    A: std::str::FromStr + Copy + Into<IpAddr>,
{
    let addr: A = text.parse().ok()?;
    if is_unspecified(&addr) {
        return Some(None);
    }
    UnderlayAddr::new(addr.into()).map(|_| Some(addr))
}

impl BackendData {
    /// Takes any JSON value but `null`, which stands for nothing.
    #[must_use]
    pub fn new(json: &str) -> Option<Self> {
        serde_json::from_str::<&RawValue>(json)
            .ok()
            .and_then(Self::from_raw)
    }

    fn from_raw(raw: &RawValue) -> Option<Self> {
        if raw.get() == "null" {
            return None;
        }
        RawValue::from_string(go_compact(raw.get())).ok().map(Self)
    }

    /// The JSON text.
    #[must_use]
    pub fn get(&self) -> &str {
        self.0.get()
    }
}

impl PartialEq for BackendData {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl Eq for BackendData {}

/// Rewrites valid JSON the way Go's `json.Marshal` emits raw values: no white space between tokens, and in
/// strings the characters that HTML or JavaScript could trip over escaped.
fn go_compact(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut in_string = false;
    let mut escaped = false;
    for c in json.chars() {
        if !in_string {
            in_string = c == '"';
            if !matches!(c, ' ' | '\t' | '\n' | '\r') {
                out.push(c);
            }
            continue;
        }
        match c {
            '<' => out.push_str("\\u003c"),
            '>' => out.push_str("\\u003e"),
            '&' => out.push_str("\\u0026"),
            '\u{2028}' => out.push_str("\\u2028"),
            '\u{2029}' => out.push_str("\\u2029"),
            other => out.push(other),
        }
        in_string = escaped || c != '"';
        escaped = !escaped && c == '\\';
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_values_of_the_specification_survive_to_the_byte() {
        for golden in include_str!("../../tests/golden/store/lease-values.jsonl").lines() {
            assert_eq!(
                LeaseAttrs::parse(golden.as_bytes()).unwrap().to_json(),
                golden
            );
        }
    }

    #[test]
    fn white_space_and_raw_html_come_out_as_go_writes_them() {
        let read = b" { \"publicip\" : \"192.0.2.7\" ,\n \"BackendData\": [ 1 , \" <&> \\\\\" ] } ";
        assert_eq!(
            LeaseAttrs::parse(read).unwrap().to_json(),
            r#"{"PublicIP":"192.0.2.7","PublicIPv6":null,"BackendData":[1," \u003c\u0026\u003e \\"]}"#,
        );
    }

    #[test]
    fn unknown_fields_are_ignored_and_wrong_ones_named() {
        let attrs = LeaseAttrs::parse(br#"{"PublicIP":"192.0.2.7","Colour":{"x":[]}}"#).unwrap();
        assert_eq!(attrs.node(), Some("192.0.2.7".parse().unwrap()));
        for (text, named) in [
            (r#"{"PublicIP":"192.0.2"}"#, "PublicIP:"),
            (r#"{"PublicIP":null}"#, "PublicIP:"),
            (r#"{"PublicIP":"224.0.0.1"}"#, "PublicIP:"),
            (r#"{"PublicIP":"2001:db8::7"}"#, "PublicIP:"),
            (
                r#"{"PublicIP":"192.0.2.7","PublicIPv6":"192.0.2.7"}"#,
                "PublicIPv6:",
            ),
            (
                r#"{"PublicIP":"192.0.2.7","BackendType":1}"#,
                "BackendType:",
            ),
            (
                r#"{"PublicIP":"0.0.0.0","PublicIPv6":null}"#,
                "PublicIP and PublicIPv6",
            ),
            ("{}", "PublicIP and PublicIPv6"),
            ("[]", "one JSON object"),
            ("", "one JSON object"),
        ] {
            let error = LeaseAttrs::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        let long = vec![b' '; MAX_ATTRS_LEN + 1];
        assert_eq!(
            LeaseAttrs::parse(&long),
            Err(AttrsError::TooLarge {
                len: MAX_ATTRS_LEN + 1
            })
        );
    }
}
