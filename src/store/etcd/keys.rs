//! Owns where things are in etcd: the keys of flannel, specification section 5.1, and the one of ours beside
//! them. Never talks to etcd.

use crate::lease::{KeyError, Subnets};

/// The keys below one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Keys {
    config: String,
    subnets: String,
    extensions: String,
}

/// What a key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning<'a> {
    /// A lease.
    Lease(Subnets),
    /// What is published beside a lease.
    Extension(Subnets),
    /// It is where leases are, but no lease key.
    NoLease(&'a [u8], KeyError),
    /// None of ours.
    Foreign,
}

impl Keys {
    /// Joins as flannel does: double and trailing slashes, `.` and `..` do not count.
    pub(super) fn new(prefix: &str) -> Self {
        let mut parts: Vec<&str> = Vec::new();
        for part in prefix.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop();
                }
                name => parts.push(name),
            }
        }
        let mut base = parts.join("/");
        if prefix.starts_with('/') {
            base.insert(0, '/');
        }
        if !base.is_empty() && base != "/" {
            base.push('/');
        }
        Self {
            config: format!("{base}config"),
            subnets: format!("{base}subnets/"),
            // Flannel watches everything that starts with `subnets`, which this must not. It sorts next to
            // it, so that one range holds both, and one watch sees both in one piece.
            extensions: format!("{base}subnet-extensions/"),
        }
    }

    /// The network configuration.
    pub(super) fn config(&self) -> &str {
        &self.config
    }

    /// What all lease keys start with.
    pub(super) fn subnets(&self) -> &str {
        &self.subnets
    }

    /// The end of the range of lease keys: the first key behind them.
    pub(super) fn subnets_end(&self) -> String {
        let stem = self.subnets.strip_suffix('/').unwrap_or(&self.subnets);
        // What follows `/` in ASCII.
        format!("{stem}0")
    }

    /// The start of the range that holds the extensions and ends with [`Self::subnets_end`].
    pub(super) fn extensions(&self) -> &str {
        &self.extensions
    }

    /// The key of a lease.
    pub(super) fn lease(&self, subnets: &Subnets) -> String {
        format!("{}{subnets}", self.subnets)
    }

    /// The key of what is published beside a lease.
    pub(super) fn extension(&self, subnets: &Subnets) -> String {
        format!("{}{subnets}", self.extensions)
    }

    /// What a key stands for.
    pub(super) fn meaning<'a>(&self, key: &'a [u8]) -> Meaning<'a> {
        let parse = |rest: &[u8]| {
            std::str::from_utf8(rest)
                .map_err(|_not_text| KeyError::Form)
                .and_then(str::parse)
        };
        if let Some(rest) = key.strip_prefix(self.subnets.as_bytes()) {
            return parse(rest).map_or_else(|e| Meaning::NoLease(rest, e), Meaning::Lease);
        }
        key.strip_prefix(self.extensions.as_bytes())
            .and_then(|rest| parse(rest).ok())
            .map_or(Meaning::Foreign, Meaning::Extension)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_joined_as_flannel_joins_them() {
        for (prefix, config) in [
            ("/coreos.com/network", "/coreos.com/network/config"),
            ("/coreos.com//network/", "/coreos.com/network/config"),
            ("/a/../b/./c", "/b/c/config"),
            ("/../a", "/a/config"),
            ("a/b", "a/b/config"),
            ("/", "/config"),
            ("", "config"),
        ] {
            assert_eq!(Keys::new(prefix).config(), config, "{prefix:?}");
        }
        let keys = Keys::new("/coreos.com/network");
        let subnets = "10.12.13.0-24&fd00:12:13::-56".parse().unwrap();
        assert_eq!(
            keys.lease(&subnets),
            "/coreos.com/network/subnets/10.12.13.0-24&fd00:12:13::-56"
        );
    }

    #[test]
    fn one_range_holds_leases_and_extensions_and_no_neighbour() {
        let keys = Keys::new("/n");
        let subnets: Subnets = "10.12.13.0-24".parse().unwrap();
        let range = keys.extensions().to_owned()..keys.subnets_end();
        assert!(range.contains(&keys.lease(&subnets)));
        assert!(range.contains(&keys.extension(&subnets)));
        for outside in [
            "/n/config",
            "/n/subnetsX",
            "/n/subnets0",
            "/n/loden",
            "/n/z",
        ] {
            assert!(!range.contains(&outside.to_owned()), "{outside}");
        }
        // What an unmodified flannel watches.
        assert!(!keys.extension(&subnets).starts_with("/n/subnets"));
    }

    #[test]
    fn keys_say_what_they_stand_for() {
        let keys = Keys::new("/n");
        let subnets = "10.12.13.0-24".parse().unwrap();
        assert_eq!(
            keys.meaning(b"/n/subnets/10.12.13.0-24"),
            Meaning::Lease(subnets)
        );
        assert_eq!(
            keys.meaning(b"/n/subnet-extensions/10.12.13.0-24"),
            Meaning::Extension(subnets)
        );
        assert_eq!(
            keys.meaning(b"/n/subnets/\xff"),
            Meaning::NoLease(b"\xff", KeyError::Form)
        );
        for foreign in [
            &b"/n/subnets"[..],
            b"/n/subnetsX/10.12.13.0-24",
            b"/n/subnet-extensions/x",
            b"",
        ] {
            assert_eq!(keys.meaning(foreign), Meaning::Foreign);
        }
    }
}
