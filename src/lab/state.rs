//! Owns the directory of a lab: its lock, its description, and the files of its processes. Never removes
//! anything; [`teardown`](super::teardown) does.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Error, LabName, Member, Spec};

/// Where labs keep their state: gone after a reboot, as the namespaces are.
pub const RUN_DIR: &str = "/run/loden-lab";

/// One pod, as the description of a lab tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRecord {
    /// Which pod.
    pub member: Member,
    /// Its overlay address.
    pub addr: Ipv4Addr,
}

/// The description of a lab that is up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// What was asked for.
    pub spec: Spec,
    /// Whether it outlives the program that built it.
    pub detached: bool,
    /// The pods and their addresses, node by node.
    pub pods: Vec<PodRecord>,
    /// What the wire should do but cannot on this kernel: `device: feature`.
    pub wire_gaps: Vec<String>,
}

impl Layout {
    /// Reads the description of the lab called `name`.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is none.
    pub fn load(name: &LabName) -> Result<Self, Error> {
        let path = directory(name).join("lab.json");
        if !path.exists() {
            return Err(Error::NotFound {
                thing: format!("lab {name}"),
            });
        }
        read_json(&path)
    }

    pub(crate) fn save(&self) -> Result<(), Error> {
        write_json(&directory(&self.spec.name).join("lab.json"), self)
    }
}

/// The directory of the lab called `name`.
pub(crate) fn directory(name: &LabName) -> PathBuf {
    Path::new(RUN_DIR).join(name.as_str())
}

/// Holds a lab's name for one program. The kernel lets go of it when the program ends, however it ends.
#[derive(Debug)]
pub(crate) struct Claim {
    _lock: File,
}

impl Claim {
    /// Makes the lab's directory and takes its lock.
    ///
    /// # Errors
    /// [`Error::InUse`] if another program holds it.
    pub(crate) fn take(name: &LabName) -> Result<Self, Error> {
        let dir = directory(name);
        let path = dir.join("lock");
        let shown = path.display().to_string();
        loop {
            create(&dir).map_err(Error::io("create", dir.display().to_string()))?;
            let lock = match OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
            {
                // A teardown removed the directory just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(Error::io("open", &shown))?,
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::InUse {
                        name: name.to_string(),
                    });
                }
                Err(TryLockError::Error(source)) => return Err(Error::io("lock", &shown)(source)),
            }
            // A lock on a file that a teardown has unlinked meanwhile keeps no one out.
            let held = lock.metadata().map_err(Error::io("examine", &shown))?.ino();
            if fs::metadata(&path).is_ok_and(|named| named.ino() == held) {
                return Ok(Self { _lock: lock });
            }
        }
    }
}

/// Makes a directory and the one that all labs share, which goes with the last of them: perhaps between the two steps.
fn create(dir: &Path) -> io::Result<()> {
    // Nobody loses so often; whoever does has another reason.
    const TRIES: u32 = 10_000;
    let mut made = Ok(());
    for _ in 0..TRIES {
        made = fs::create_dir_all(dir);
        match made.as_ref().map_err(io::Error::kind) {
            Err(io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {}
            _ => break,
        }
    }
    made
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| malformed(path, &error))?;
    fs::write(path, text).map_err(Error::io("write", path.display().to_string()))
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let text = fs::read(path).map_err(Error::io("read", path.display().to_string()))?;
    serde_json::from_slice(&text).map_err(|error| malformed(path, &error))
}

fn malformed(path: &Path, error: &serde_json::Error) -> Error {
    Error::Malformed {
        path: path.to_owned(),
        expected: "a record of the lab",
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_lab_that_begins_while_the_last_one_ends_gets_its_directory() {
        let top = tempfile::tempdir().unwrap();
        let shared = top.path().join("labs");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // Refused while the other's is in it.
                    let _gone = fs::remove_dir(&shared);
                }
            });
            for round in 0..200 {
                let dir = shared.join(round.to_string());
                let made = create(&dir).and_then(|()| fs::remove_dir(&dir));
                if round == 199 || made.is_err() {
                    done.store(true, Ordering::Relaxed);
                }
                made.unwrap();
            }
        });
    }
}
