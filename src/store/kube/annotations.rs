//! Owns flannel's annotations: their keys, and the texts they carry (specification section 6.2). Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use regex::Regex;

use crate::addr::UnderlayAddr;
use crate::lease::{BackendData, LeaseAttrs, MAX_ATTRS_LEN};

/// A node's annotations, as the API has them.
pub type Texts = BTreeMap<String, String>;

/// What flannel writes for a backend without data.
const NULL: &str = "null";

/// The keys of one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotations {
    /// Ends in `/` or `-`.
    prefix: String,
}

/// Why a text is no prefix of annotation keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// More than one slash.
    #[error(
        "{0:?} has more than one '/': give a domain, or a domain and one name: example.org/net"
    )]
    Slashes(String),
    /// Not of the form.
    #[error(
        "{0:?} is not of the form example.org or example.org/net: a domain of at least two parts, in lower case"
    )]
    Form(String),
}

/// What is wrong with one annotation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("annotation {key}: {reason}")]
pub struct Wrong {
    /// Its key.
    pub key: String,
    /// What is wrong.
    pub reason: String,
}

impl FromStr for Annotations {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let wrong = || PrefixError::Form(text.to_owned());
        if text.matches('/').count() > 1 {
            return Err(PrefixError::Slashes(text.to_owned()));
        }
        let mut prefix = text.to_owned();
        if !prefix.contains('/') {
            prefix.push('/');
        }
        if !prefix.ends_with(['/', '-']) {
            prefix.push('-');
        }
        let form = Regex::new(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?$")
            .map_err(|_never| wrong())?;
        if form.is_match(&prefix) {
            Ok(Self { prefix })
        } else {
            Err(wrong())
        }
    }
}

impl Annotations {
    fn key(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.prefix)
    }

    fn get<'a>(&self, texts: &'a Texts, suffix: &str) -> Option<&'a str> {
        let text = texts.get(&self.key(suffix))?;
        (!text.is_empty()).then_some(text.as_str())
    }

    /// Whether a node takes part at all.
    pub(super) fn is_member(&self, texts: &Texts) -> bool {
        self.get(texts, "kube-subnet-manager") == Some("true")
    }

    /// `node-public-ip` and `node-public-ipv6`: what an operator wants the node to use.
    pub(super) fn wanted(
        &self,
        texts: &Texts,
    ) -> Result<(Option<Ipv4Addr>, Option<Ipv6Addr>), Wrong> {
        Ok((
            self.addr(texts, "node-public-ip")?,
            self.addr(texts, "node-public-ipv6")?,
        ))
    }

    /// What a node says about itself.
    ///
    /// # Errors
    ///
    /// The first annotation that is wrong.
    pub fn read(&self, texts: &Texts) -> Result<LeaseAttrs, Wrong> {
        let public_ip = self.addr(texts, "public-ip")?;
        let public_ipv6 = self.addr(texts, "public-ipv6")?;
        if public_ip.is_none() && public_ipv6.is_none() {
            return Err(self.wrong("public-ip", "missing, and so is public-ipv6"));
        }
        let backend_type = self.get(texts, "backend-type").unwrap_or_default();
        if backend_type.len() > 64 {
            return Err(self.wrong("backend-type", "longer than 64 bytes"));
        }
        Ok(LeaseAttrs {
            public_ip,
            public_ipv6,
            backend_type: backend_type.to_owned(),
            backend_data: self.data(texts, "backend-data")?,
            backend_v6_data: self.data(texts, "backend-v6-data")?,
        })
    }

    fn addr<A>(&self, texts: &Texts, suffix: &str) -> Result<Option<A>, Wrong>
    where
        A: FromStr + Copy + Into<IpAddr>,
    {
        let Some(text) = self.get(texts, suffix) else {
            return Ok(None);
        };
        let shown: String = text.chars().take(64).collect();
        let addr: A = text
            .parse()
            .map_err(|_any| self.wrong(suffix, format!("{shown:?} is not an address")))?;
        let general: IpAddr = addr.into();
        if general.is_unspecified() {
            return Ok(None);
        }
        let reason = || format!("{shown:?} is not an address of a node: give a unicast address");
        UnderlayAddr::new(general)
            .map(|_| Some(addr))
            .ok_or_else(|| self.wrong(suffix, reason()))
    }

    fn data(&self, texts: &Texts, suffix: &str) -> Result<Option<BackendData>, Wrong> {
        let Some(text) = self.get(texts, suffix).filter(|text| *text != NULL) else {
            return Ok(None);
        };
        if text.len() > MAX_ATTRS_LEN {
            let reason = format!("larger than the {MAX_ATTRS_LEN} bytes that are read");
            return Err(self.wrong(suffix, reason));
        }
        BackendData::new(text)
            .map(Some)
            .ok_or_else(|| self.wrong(suffix, "not JSON"))
    }

    fn wrong(&self, suffix: &str, reason: impl Into<String>) -> Wrong {
        Wrong {
            key: self.key(suffix),
            reason: reason.into(),
        }
    }

    /// What has to change for the annotations to say `attrs`: the keys that differ, each with its new text. The
    /// addresses of `public-ip-overwrite` and `public-ipv6-overwrite` take the place of ours.
    ///
    /// # Errors
    ///
    /// Whichever of those two is no address.
    pub fn changes(&self, now: &Texts, attrs: &LeaseAttrs) -> Result<Texts, Wrong> {
        let overwrite: Option<Ipv4Addr> = self.addr(now, "public-ip-overwrite")?;
        let overwrite_v6: Option<Ipv6Addr> = self.addr(now, "public-ipv6-overwrite")?;
        let v4 = overwrite.or(attrs.public_ip);
        let v6 = overwrite_v6.or(attrs.public_ipv6);
        let data = |data: &Option<BackendData>| {
            data.as_ref()
                .map_or_else(|| NULL.to_owned(), |data| data.get().to_owned())
        };
        // Only vxlan has a device per family, and writes nothing for a family without one.
        let per_family = attrs.backend_type == "vxlan";
        let mut wanted = vec![
            ("kube-subnet-manager", "true".to_owned()),
            ("backend-type", attrs.backend_type.clone()),
        ];
        if attrs.backend_data.is_some() || !per_family {
            wanted.push(("backend-data", data(&attrs.backend_data)));
            let addr = v4.unwrap_or(Ipv4Addr::UNSPECIFIED);
            wanted.push(("public-ip", addr.to_string()));
        }
        if let Some(addr) = v6.filter(|_| attrs.backend_v6_data.is_some() || !per_family) {
            wanted.push(("backend-v6-data", data(&attrs.backend_v6_data)));
            wanted.push(("public-ipv6", addr.to_string()));
        }
        let wanted = wanted
            .into_iter()
            .map(|(suffix, text)| (self.key(suffix), text));
        Ok(wanted
            .filter(|(key, text)| now.get(key) != Some(text))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flannel() -> Annotations {
        "flannel.alpha.coreos.com".parse().unwrap()
    }

    fn texts(pairs: &[(&str, &str)]) -> Texts {
        let key = |suffix: &str| format!("flannel.alpha.coreos.com/{suffix}");
        pairs
            .iter()
            .map(|(suffix, text)| (key(suffix), (*text).to_owned()))
            .collect()
    }

    fn attrs(backend_type: &str, data: &str, v6_data: &str) -> LeaseAttrs {
        LeaseAttrs {
            public_ip: Some("192.0.2.7".parse().unwrap()),
            public_ipv6: Some("2001:db8::7".parse().unwrap()),
            backend_type: backend_type.to_owned(),
            backend_data: BackendData::new(data),
            backend_v6_data: BackendData::new(v6_data),
        }
    }

    #[test]
    fn prefixes_become_keys_as_in_the_original() {
        for (text, prefix) in [
            ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
            ("x.y/", "x.y/"),
            ("x.y/pre", "x.y/pre-"),
            ("x.y/pre-", "x.y/pre-"),
        ] {
            assert_eq!(text.parse::<Annotations>().unwrap().prefix, prefix);
        }
        for text in [
            "org",
            "org/",
            "org/prefix",
            "org.COM",
            "org.com/PREFIX",
            "a.b/c/d",
            "",
        ] {
            assert!(text.parse::<Annotations>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_backend_writes_what_the_original_writes() {
        let vtep = r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#;
        let common = |backend, rest: &[(&str, &str)]| {
            let mut all = vec![("kube-subnet-manager", "true"), ("backend-type", backend)];
            all.extend(rest);
            texts(&all)
        };
        let both = [("public-ip", "192.0.2.7"), ("public-ipv6", "2001:db8::7")];
        let null = [("backend-data", "null"), ("backend-v6-data", "null")];
        for (attrs, expected) in [
            (attrs("", "", ""), common("", &[both, null].concat())),
            (
                attrs("host-gw", "", ""),
                common("host-gw", &[both, null].concat()),
            ),
            (
                attrs("vxlan", vtep, ""),
                common(
                    "vxlan",
                    &[("backend-data", vtep), ("public-ip", "192.0.2.7")],
                ),
            ),
            (
                attrs("vxlan", "", vtep),
                common(
                    "vxlan",
                    &[("backend-v6-data", vtep), ("public-ipv6", "2001:db8::7")],
                ),
            ),
        ] {
            let changes = flannel().changes(&Texts::new(), &attrs).unwrap();
            assert_eq!(changes, expected);
            // What is written is read back, and nothing is left to write.
            assert_eq!(flannel().changes(&changes, &attrs).unwrap(), Texts::new());
            assert!(flannel().is_member(&changes));
            let read = flannel().read(&changes).unwrap();
            assert_eq!(read.backend_data, attrs.backend_data);
            assert_eq!(read.backend_v6_data, attrs.backend_v6_data);
        }
    }

    #[test]
    fn an_overwritten_address_is_published_in_the_place_of_ours() {
        let now = texts(&[
            ("public-ip-overwrite", "172.18.0.2"),
            ("public-ip", "192.0.2.7"),
        ]);
        let changes = flannel().changes(&now, &attrs("", "", "")).unwrap();
        assert_eq!(changes["flannel.alpha.coreos.com/public-ip"], "172.18.0.2");
    }

    #[test]
    fn hostile_texts_are_refused_by_key() {
        let long = format!("\"{}\"", "x".repeat(MAX_ATTRS_LEN));
        for (pairs, key) in [
            (vec![], "public-ip"),
            (vec![("public-ip", "0.0.0.0")], "public-ip"),
            (vec![("public-ip", "2001:db8::7")], "public-ip"),
            (vec![("public-ip", "224.0.0.1")], "public-ip"),
            (vec![("public-ip", "192.0.2.7\n")], "public-ip"),
            (
                vec![("public-ip", "192.0.2.7"), ("public-ipv6", "x")],
                "public-ipv6",
            ),
            (
                vec![("public-ip", "192.0.2.7"), ("backend-data", "{")],
                "backend-data",
            ),
            (
                vec![("public-ip", "192.0.2.7"), ("backend-v6-data", &long)],
                "backend-v6-data",
            ),
            (
                vec![("public-ip", "192.0.2.7"), ("backend-type", &long)],
                "backend-type",
            ),
        ] {
            let wrong = flannel().read(&texts(&pairs)).unwrap_err();
            assert_eq!(wrong.key, format!("flannel.alpha.coreos.com/{key}"));
            assert!(wrong.to_string().len() < 300);
        }
    }
}
