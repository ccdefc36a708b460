//! Owns reading the directory: every entry typed, or damaged with a reason. Never writes, never decides who
//! wins.

use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use super::files::{self, Links, ReadError, Stamp};
use super::sidecar::{MAX_SIDECAR_LEN, Sidecar, unix};
use super::{CONFIG, EXPIRY, SUBNETS};
use crate::lease::{AttrsError, Lease, LeaseAttrs, MAX_ATTRS_LEN, Subnets};
use crate::store::Cause;

/// How many names of a directory are looked at.
pub(super) const MAX_ENTRIES: usize = 20_000;

/// A lease and what is kept beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) attrs: LeaseAttrs,
    pub(super) node: IpAddr,
    /// `None`: a reservation that no node of ours has taken up.
    pub(super) sidecar: Option<Sidecar>,
}

impl Record {
    pub(super) fn expires(&self) -> Option<SystemTime> {
        self.sidecar.and_then(|sidecar| sidecar.expires)
    }

    pub(super) fn is_reservation(&self) -> bool {
        self.expires().is_none()
    }

    pub(super) fn is_live(&self, now: SystemTime) -> bool {
        self.expires().is_none_or(|at| now < at)
    }

    /// When the subnet was claimed, for deciding between two claims. A reservation comes before all others.
    pub(super) fn claim(&self) -> (u64, IpAddr) {
        let claimed = if self.is_reservation() {
            0
        } else {
            self.sidecar.map_or(0, |s| s.claimed)
        };
        (claimed, self.node)
    }

    pub(super) fn lease(&self, subnets: Subnets) -> Lease {
        Lease {
            subnets,
            attrs: self.attrs.clone(),
            expires: self.expires(),
            extension: self
                .sidecar
                .map(|sidecar| sidecar.extension)
                .unwrap_or_default(),
        }
    }
}

/// What there is under one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    Lease(Record),
    /// The lease and its sidecar name different nodes.
    Half {
        lease: Record,
        sidecar: Sidecar,
    },
    /// Not usable, but one of the two files may tell whose it is, and until when.
    Damaged {
        cause: Cause,
        node: Option<IpAddr>,
        sidecar: Option<Sidecar>,
    },
}

impl Entry {
    /// Who claims the addresses, and since when; `None` for what is over or cannot be judged. An expiry file of
    /// one node beside the lease of another announces the claim whose lease is still on its way.
    pub(super) fn claim(&self, now: SystemTime) -> Option<(u64, IpAddr)> {
        match self {
            Self::Lease(record) => record.is_live(now).then(|| record.claim()),
            Self::Half { sidecar, .. } => match sidecar.expires {
                None => Some((0, sidecar.owner)),
                Some(at) => (now < at).then_some((sidecar.claimed, sidecar.owner)),
            },
            Self::Damaged { .. } => None,
        }
    }

    /// Whether it is a reservation that no node has taken up.
    pub(super) const fn is_untaken(&self) -> bool {
        matches!(self, Self::Lease(record) if record.sidecar.is_none())
    }

    /// Whether others may take the addresses over. What cannot be judged is not given away.
    pub(super) fn is_expired(&self, now: SystemTime) -> bool {
        match self {
            Self::Lease(record) => !record.is_live(now),
            Self::Half { .. } => false,
            Self::Damaged { sidecar, .. } => {
                sidecar.and_then(|s| s.expires).is_some_and(|at| at <= now)
            }
        }
    }
}

/// A whole directory at one time.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) entries: BTreeMap<Subnets, Arc<Entry>>,
    /// By file.
    pub(super) problems: BTreeMap<String, Cause>,
    /// Whether a key that is not among the entries is known to be gone.
    pub(super) complete: bool,
    /// Whether it is incomplete only because the directory is not yet believed to be filled.
    pub(super) filling: bool,
}

impl Listing {
    pub(super) fn get(&self, key: &Subnets) -> Option<&Entry> {
        self.entries.get(key).map(AsRef::as_ref)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Subnets, &Entry)> {
        self.entries
            .iter()
            .map(|(key, entry)| (key, entry.as_ref()))
    }
}

/// Reads the directory again and again, and files only when they changed.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    seen: BTreeMap<Subnets, Seen>,
    /// The directory whose listing was last believed to be complete.
    believed: Option<Stamp>,
}

#[derive(Debug)]
struct Seen {
    lease: Stamp,
    sidecar: Option<Stamp>,
    entry: Arc<Entry>,
}

impl Scanner {
    /// Lists what is in the directory.
    ///
    /// # Errors
    ///
    /// The directory is away, or looks as if something else were mounted there: nothing can be said about any
    /// key.
    pub(super) fn scan(&mut self, dir: &Path) -> io::Result<Listing> {
        self.scan_some(dir, |_, _| true)
    }

    /// Lists only what bears on who may hold `subnets`: what overlaps them, and what may be a reservation.
    pub(super) fn scan_near(&mut self, dir: &Path, subnets: &Subnets) -> io::Result<Listing> {
        let sidecars: HashSet<OsString> = fs::read_dir(dir.join(EXPIRY))?
            .take(MAX_ENTRIES)
            .map(|name| name.map(|name| name.file_name()))
            .collect::<io::Result<_>>()?;
        self.scan_some(dir, |key, name| {
            key.overlaps(subnets) || !sidecars.contains(OsStr::new(name))
        })
    }

    fn scan_some(
        &mut self,
        dir: &Path,
        wanted: impl Fn(&Subnets, &str) -> bool,
    ) -> io::Result<Listing> {
        let subnets = dir.join(SUBNETS);
        let names = fs::read_dir(&subnets).and_then(|names| {
            // A mount point without its filesystem may hold an empty directory of that name, but not both.
            fs::symlink_metadata(dir.join(CONFIG))?;
            Ok(names)
        });
        let names = names.inspect_err(|_| self.seen.clear())?;

        let mut listing = Listing {
            complete: true,
            ..Listing::default()
        };
        let opened = Stamp::of(&subnets);
        let mut before = std::mem::take(&mut self.seen);
        for (count, name) in names.enumerate() {
            if count == MAX_ENTRIES {
                let subject = subnets.display().to_string();
                listing
                    .problems
                    .insert(subject, Cause::TooMany { limit: MAX_ENTRIES });
                listing.complete = false;
                break;
            }
            let name = name?.file_name();
            let Some(name) = name.to_str() else {
                let subject = subnets.join(&name).display().to_string();
                let form = Cause::Key(crate::lease::KeyError::Form);
                listing.problems.insert(subject, form);
                continue;
            };
            if name.starts_with('.') {
                continue;
            }
            let path = subnets.join(name);
            let key = match name.parse::<Subnets>() {
                Ok(key) => key,
                Err(e) => {
                    listing
                        .problems
                        .insert(path.display().to_string(), Cause::Key(e));
                    continue;
                }
            };
            if !wanted(&key, name) {
                continue;
            }
            let Some(seen) = look(dir, &path, name, before.remove(&key)) else {
                continue;
            };
            match &*seen.entry {
                Entry::Lease(_) => {}
                Entry::Half { lease, sidecar } => {
                    let cause = Cause::HalfSynchronised {
                        lease: lease.node,
                        sidecar: sidecar.owner,
                    };
                    listing.problems.insert(path.display().to_string(), cause);
                }
                Entry::Damaged { cause, .. } => {
                    listing
                        .problems
                        .insert(path.display().to_string(), cause.clone());
                }
            }
            listing.entries.insert(key, Arc::clone(&seen.entry));
            self.seen.insert(key, seen);
        }
        self.doubt(&mut listing, opened, Stamp::of(&subnets));
        Ok(listing)
    }

    /// A directory in the place of another may be on its way to being filled: what it lacks is not gone before
    /// nothing has been added to it for a while. `opened` and `read` are its stamps around the reading.
    fn doubt(&mut self, listing: &mut Listing, opened: Option<Stamp>, read: Option<Stamp>) {
        let is = |other: Option<Stamp>| read.zip(other).is_some_and(|(a, b)| a.is_same_file(&b));
        let settled = read.is_some_and(|stamp| stamp.is_settled(kernel_now()));
        if !is(opened) || (self.believed.is_some() && !is(self.believed) && !settled) {
            listing.complete = false;
            listing.filling = true;
        } else if listing.complete {
            self.believed = read;
        }
    }
}

/// The time in Unix seconds by the kernel's clock, for comparing with times that the kernel wrote.
fn kernel_now() -> i64 {
    i64::try_from(unix(SystemTime::now()).as_secs()).unwrap_or(i64::MAX)
}

/// Looks at one key; `None` if it went away meanwhile.
fn look(dir: &Path, path: &Path, name: &str, before: Option<Seen>) -> Option<Seen> {
    let sidecar_path = dir.join(EXPIRY).join(name);
    // Stamps first: a change between them and the read is seen next time.
    let lease = Stamp::of(path)?;
    let sidecar = Stamp::of(&sidecar_path);
    let now = kernel_now();
    let settled = lease.is_settled(now) && sidecar.is_none_or(|stamp| stamp.is_settled(now));
    match before {
        Some(seen) if settled && (seen.lease, seen.sidecar) == (lease, sidecar) => Some(seen),
        _ => Some(Seen {
            lease,
            sidecar,
            entry: Arc::new(read(path, &sidecar_path)?),
        }),
    }
}

fn read(path: &Path, sidecar_path: &Path) -> Option<Entry> {
    let attrs = match files::read(path, MAX_ATTRS_LEN, Links::Refused) {
        Ok(text) => LeaseAttrs::parse(&text).map_err(Cause::Attrs),
        Err(ReadError::Missing) => return None,
        Err(e) => Err(e.cause()),
    };
    // After the lease: who writes a new lease writes its sidecar first.
    let sidecar = match files::read(sidecar_path, MAX_SIDECAR_LEN, Links::Refused) {
        Ok(text) => Sidecar::parse(&text).map(Some).map_err(Cause::Sidecar),
        Err(ReadError::Missing) => Ok(None),
        Err(e) => Err(Cause::Sidecar(format!(
            "{}: {}",
            sidecar_path.display(),
            e.cause()
        ))),
    };
    let (attrs, sidecar) = match (attrs, sidecar) {
        (Ok(attrs), Ok(sidecar)) => (attrs, sidecar),
        (Err(cause), sidecar) => {
            let sidecar = sidecar.ok().flatten();
            return Some(Entry::Damaged {
                cause,
                node: sidecar.map(|s| s.owner),
                sidecar,
            });
        }
        (Ok(attrs), Err(cause)) => {
            return Some(Entry::Damaged {
                cause,
                node: attrs.node(),
                sidecar: None,
            });
        }
    };
    Some(match (attrs.node(), sidecar) {
        (None, sidecar) => Entry::Damaged {
            cause: Cause::Attrs(AttrsError::NoPublicIp),
            node: None,
            sidecar,
        },
        (Some(node), Some(sidecar)) if sidecar.owner != node => Entry::Half {
            lease: Record {
                attrs,
                node,
                sidecar: None,
            },
            sidecar,
        },
        (Some(node), sidecar) => Entry::Lease(Record {
            attrs,
            node,
            sidecar,
        }),
    })
}
