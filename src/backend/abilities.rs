//! Owns what a node says about itself beside flannel's VXLAN data, in its lease: which ways lead to it, and where it
//! answers probes. Pure. An unmodified flannel ignores the key, and says nothing of the kind itself.

use serde::Serialize;

use crate::config::{Null, Object};
use crate::lease::BackendData;

/// The key in a lease's backend data. The original reads only the keys it knows.
const KEY: &str = "Loden";

/// The name of the way past the tunnel.
const ROUTE: &str = "route";

/// The name of the tunnel, which leads to every node.
const VXLAN: &str = "vxlan";

/// Ways that are looked at; a newer program may know a few more.
const MAX_TRANSPORTS: usize = 16;

/// What a node says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abilities {
    /// It takes packets of the overlay that come past the tunnel.
    pub route: bool,
    /// Its own data plane is behind the tunnel's port, and not the kernel's device.
    pub in_user_space: bool,
    /// The tunnel's UDP port.
    pub port: u16,
    /// The UDP port on which it answers probes, if it does.
    pub probe_port: Option<u16>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Wire {
    transports: Vec<&'static str>,
    by: &'static str,
    port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    probe_port: Option<u16>,
}

impl Abilities {
    /// As a member of an object: the key and its value.
    pub(super) fn to_member(&self) -> String {
        let wire = Wire {
            transports: match self.route {
                true => vec![ROUTE, VXLAN],
                false => vec![VXLAN],
            },
            by: match self.in_user_space {
                true => "user",
                false => "kernel",
            },
            port: self.port,
            probe_port: self.probe_port,
        };
        // Neither a map with keys that are not text nor a failing writer is involved.
        let json = serde_json::to_string(&wire).unwrap_or_default();
        format!("\"{KEY}\":{json}")
    }

    /// What a lease says; none if it says nothing, as those of unmodified peers.
    ///
    /// # Errors
    ///
    /// The field that makes no sense.
    pub(super) fn parse(data: &BackendData) -> Result<Option<Self>, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let object = Object::parse(data.get().as_bytes(), "").map_err(|e| text(&e))?;
        let Some(raw) = object.values(KEY).last() else {
            return Ok(None);
        };
        let object = Object::parse(raw.get().as_bytes(), "Loden.").map_err(|e| text(&e))?;
        let transports: Vec<String> = object
            .plain("Transports", "a list of names")
            .map_err(|e| text(&e))?
            .unwrap_or_default();
        if transports.len() > MAX_TRANSPORTS {
            return Err(format!(
                "Loden.Transports: at most {MAX_TRANSPORTS} are read"
            ));
        }
        let by = object
            .text(
                "By",
                "\"kernel\" or \"user\"",
                Null::Skipped,
                |by| match by {
                    "kernel" => Some(false),
                    "user" => Some(true),
                    _ => None,
                },
            )
            .map_err(|e| text(&e))?;
        let port = |key| {
            let port: Result<Option<u16>, _> = object.plain(key, "a UDP port");
            port.map_err(|e| text(&e))
        };
        Ok(Some(Self {
            route: transports.iter().any(|name| name == ROUTE),
            in_user_space: by.unwrap_or(false),
            port: port("Port")?.unwrap_or_default(),
            probe_port: port("ProbePort")?.filter(|&port| port != 0),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_says_is_read_as_it_was_written_and_nothing_is_nothing() {
        for (route, probe_port) in [(true, Some(18285)), (false, None)] {
            let abilities = Abilities {
                route,
                in_user_space: !route,
                port: 8472,
                probe_port,
            };
            let text = format!("{{\"VNI\":1,{}}}", abilities.to_member());
            let data = BackendData::new(&text).unwrap();
            assert_eq!(Abilities::parse(&data), Ok(Some(abilities)), "{text}");
        }
        let flannels = BackendData::new(r#"{"VNI":1,"VtepMAC":"02:00:5e:10:00:01"}"#).unwrap();
        assert_eq!(Abilities::parse(&flannels), Ok(None));
        let golden = Abilities {
            route: true,
            in_user_space: false,
            port: 8472,
            probe_port: Some(18285),
        };
        assert_eq!(
            golden.to_member(),
            r#""Loden":{"Transports":["route","vxlan"],"By":"kernel","Port":8472,"ProbePort":18285}"#
        );
    }

    #[test]
    fn nonsense_is_named_and_what_is_newer_is_no_nonsense() {
        for (text, named) in [
            (r#"{"Loden":7}"#, "expected a JSON object"),
            (r#"{"Loden":{"Transports":"route"}}"#, "Loden.Transports"),
            (r#"{"Loden":{"ProbePort":70000}}"#, "Loden.ProbePort"),
            (r#"{"Loden":{"By":"magic"}}"#, "Loden.By"),
        ] {
            let error = Abilities::parse(&BackendData::new(text).unwrap()).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
        let many = vec!["\"x\""; MAX_TRANSPORTS + 1].join(",");
        let many = format!(r#"{{"Loden":{{"Transports":[{many}]}}}}"#);
        let error = Abilities::parse(&BackendData::new(&many).unwrap()).unwrap_err();
        assert!(error.contains("at most 16"), "{error}");
        let newer = r#"{"Loden":{"Transports":["quic","route"],"Colour":"green","ProbePort":1}}"#;
        let read = Abilities::parse(&BackendData::new(newer).unwrap())
            .unwrap()
            .unwrap();
        assert!(read.route && read.probe_port == Some(1));
    }
}
