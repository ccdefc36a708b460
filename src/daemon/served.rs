//! Owns what is remembered, from one run to the next, of the peers for whom a command has been run: whoever is gone by then
//! is taken down by the next run. Never runs a command.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use crate::debug::socket;
use crate::file;
use crate::lease::{LeaseAttrs, Subnets};

/// The largest file that is read or written: thousands of leases with all that a command may say.
const MAX_LEN: usize = 64 << 20;

/// Peers by their leases, in a file beside the subnet file: a line each, with key and value as etcd has them.
#[derive(Debug)]
pub(super) struct Served {
    path: PathBuf,
    /// What the file holds; none if that is not known.
    written: Option<String>,
    /// What was last told of it.
    told: Option<String>,
}

impl Served {
    /// The file that belongs to a subnet file: `subnet.peers` for `subnet.env`.
    pub(super) fn beside(subnet_file: &Path) -> Self {
        Self {
            path: socket::beside(subnet_file).with_extension("peers"),
            written: None,
            told: None,
        }
    }

    /// What the run before has left; nothing where there was none, and nothing of what makes no sense.
    pub(super) fn read(&mut self) -> BTreeMap<Subnets, LeaseAttrs> {
        let text = match file::read_bounded(&self.path, MAX_LEN) {
            Ok(text) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.written = Some(String::new());
                return BTreeMap::new();
            }
            Err(error) => {
                self.tell(format!(
                    "{}: {error}: whoever has left meanwhile gets no SubnetRemoveCommand",
                    self.path.display()
                ));
                return BTreeMap::new();
            }
        };
        let mut peers = BTreeMap::new();
        for (at, line) in text.lines().enumerate() {
            match parse(line) {
                Ok((subnets, attrs)) => drop(peers.insert(subnets, attrs)),
                Err(why) => self.tell(format!("{}: line {}: {why}", self.path.display(), at + 1)),
            }
        }
        self.written = Some(text);
        peers
    }

    /// Remembers these peers, and no others. A daemon that cannot goes on without.
    pub(super) fn write<'a>(&mut self, peers: impl Iterator<Item = (&'a Subnets, &'a LeaseAttrs)>) {
        let line =
            |(subnets, attrs): (&Subnets, &LeaseAttrs)| format!("{subnets} {}\n", attrs.to_json());
        let text: String = peers.map(line).collect();
        if self.written.as_ref() == Some(&text) {
            return;
        }
        let written = match text.len() {
            0..=MAX_LEN => {
                file::replace(&self.path, text.as_bytes(), 0o600).map_err(|e| e.to_string())
            }
            len => Err(format!("{}: {len} bytes are too many", self.path.display())),
        };
        match written {
            Ok(()) => (self.written, self.told) = (Some(text), None),
            Err(error) => {
                self.written = None;
                self.tell(format!(
                    "{error}: whoever leaves while the daemon is down gets no SubnetRemoveCommand"
                ));
            }
        }
    }

    /// Once per text.
    fn tell(&mut self, text: String) {
        if self.told.as_ref() != Some(&text) {
            tracing::warn!("{text}");
            self.told = Some(text);
        }
    }
}

fn parse(line: &str) -> Result<(Subnets, LeaseAttrs), String> {
    let (key, value) = line
        .split_once(' ')
        .ok_or("expected a lease's key, a space and its value")?;
    let subnets = key.parse().map_err(|error| format!("{key:.64}: {error}"))?;
    let attrs = LeaseAttrs::parse(value.as_bytes()).map_err(|error| error.to_string())?;
    Ok((subnets, attrs))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8, data: &str) -> (Subnets, LeaseAttrs) {
        let value = format!(
            r#"{{"PublicIP":"192.0.2.{n}","PublicIPv6":"2001:db8::{n}","BackendType":"extension","BackendData":{data}}}"#
        );
        let key = format!("198.18.{n}.0-24&fd00:18:0:{n}::-64");
        (
            key.parse().unwrap(),
            LeaseAttrs::parse(value.as_bytes()).unwrap(),
        )
    }

    #[test]
    fn peers_are_as_they_were_after_another_run() {
        let dir = tempfile::tempdir().unwrap();
        let env = dir.path().join("subnet.env");
        let mut served = Served::beside(&env);
        assert!(served.read().is_empty());
        let peers: BTreeMap<_, _> = [peer(2, r#""a \" b\nc""#), peer(3, "7")].into();
        served.write(peers.iter());
        let path = dir.path().join("subnet.peers");
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
        assert_eq!(Served::beside(&env).read(), peers);
        served.write([].into_iter());
        assert!(Served::beside(&env).read().is_empty());
    }

    #[test]
    fn what_makes_no_sense_costs_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let env = dir.path().join("subnet.env");
        let (subnets, attrs) = peer(2, "null");
        let good = format!("{subnets} {}", attrs.to_json());
        let text = format!("{good}\n\u{0}\nx y\n198.18.7.0-24 {{}}\n198.18.8.0-24\n{good}");
        std::fs::write(dir.path().join("subnet.peers"), text).unwrap();
        let read = Served::beside(&env).read();
        assert_eq!(read.keys().collect::<Vec<_>>(), [&subnets]);
        // Something else in its place is told, and neither followed nor waited for.
        std::fs::remove_file(dir.path().join("subnet.peers")).unwrap();
        std::fs::create_dir(dir.path().join("subnet.peers")).unwrap();
        let mut served = Served::beside(&env);
        assert!(served.read().is_empty());
        served.write([(&subnets, &attrs)].into_iter());
        assert!(served.told.unwrap().contains("subnet.peers"));
    }

    proptest::proptest! {
        #[test]
        fn no_line_makes_the_reader_fail(line in "\\PC{0,80}") {
            let _told = parse(&line);
        }
    }
}
