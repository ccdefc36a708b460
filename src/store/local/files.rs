//! Owns how the local store touches files: bounded reads that never block, writes that are whole or absent, and
//! the lock. Never interprets content.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::LOCK;
use crate::store::{Cause, StoreError};

/// How long an operation waits for other processes. They hold the lock for milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// Why a file could not be read.
#[derive(Debug)]
pub(super) enum ReadError {
    Missing,
    NotRegular,
    TooLarge { limit: usize },
    Io(io::Error),
}

impl From<io::Error> for ReadError {
    fn from(e: io::Error) -> Self {
        match e.raw_os_error() {
            Some(libc::ENOENT) => Self::Missing,
            // `O_NOFOLLOW` met a link, or a pipe nobody writes to.
            Some(libc::ELOOP | libc::ENXIO) => Self::NotRegular,
            _ => Self::Io(e),
        }
    }
}

impl ReadError {
    /// As a named problem.
    pub(super) fn cause(self) -> Cause {
        match self {
            Self::Missing => Cause::Unreadable("it is missing".to_owned()),
            Self::NotRegular => Cause::NotRegular,
            Self::TooLarge { limit } => Cause::TooLarge { limit },
            Self::Io(e) => Cause::Unreadable(e.to_string()),
        }
    }
}

/// Whether a link in the place of a file is followed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Links {
    Followed,
    Refused,
}

/// Reads a whole regular file of at most `limit` bytes. Pipes, devices and sockets are neither waited for nor
/// opened.
pub(super) fn read(path: &Path, limit: usize, links: Links) -> Result<Vec<u8>, ReadError> {
    let (meta, no_follow) = match links {
        Links::Followed => (fs::metadata(path)?, 0),
        Links::Refused => (fs::symlink_metadata(path)?, libc::O_NOFOLLOW),
    };
    if !meta.is_file() {
        return Err(ReadError::NotRegular);
    }
    // The file may be another by now: neither block on it, nor take it for regular before looking again.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | no_follow;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(ReadError::NotRegular);
    }
    let mut content = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut content)?;
    if content.len() > limit {
        return Err(ReadError::TooLarge { limit });
    }
    Ok(content)
}

/// What tells one state of a file from the next without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of what is at `path`; `None` if nothing can be learned about it.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let meta = fs::symlink_metadata(path).ok()?;
        Some(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }

    /// Whether both are of one file or directory, in whatever states.
    pub(super) const fn is_same_file(&self, other: &Self) -> bool {
        self.device == other.device && self.inode == other.inode
    }

    /// Whether the next change is certain to have another stamp: times are counted in ticks of some
    /// milliseconds, so a file changed just before `now` may change again unnoticed. `now` in Unix seconds.
    pub(super) const fn is_settled(&self, now: i64) -> bool {
        self.changed.0 < now.saturating_sub(1)
    }
}

/// Makes a directory and its parents, mode 0755.
pub(super) fn make_dir(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(unavailable(path))
}

/// Replaces the file `dir/name`, or makes it, in one step.
pub(super) fn replace(dir: &Path, name: &str, content: &[u8]) -> Result<(), StoreError> {
    let target = dir.join(name);
    let temp = write_temp(dir, name, content)?;
    fs::rename(&temp, &target).map_err(|e| {
        // The error that matters is the one in hand.
        let _leftover = fs::remove_file(&temp);
        unavailable(&target)(e)
    })
}

/// Makes the file `dir/name` in one step; `false` if something is there already.
pub(super) fn create(dir: &Path, name: &str, content: &[u8]) -> Result<bool, StoreError> {
    let target = dir.join(name);
    let temp = write_temp(dir, name, content)?;
    let made = match fs::hard_link(&temp, &target) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        // A filesystem without hard links. The lock keeps other daemons out between the two steps.
        Err(_no_links) => match fs::symlink_metadata(&target) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => fs::rename(&temp, &target)
                .map(|()| true)
                .map_err(unavailable(&target)),
            Ok(_) => Ok(false),
            Err(e) => Err(unavailable(&target)(e)),
        },
    };
    // Gone already if it was renamed.
    let _leftover = fs::remove_file(&temp);
    made
}

/// Removes the file `dir/name` if it is there.
pub(super) fn remove(dir: &Path, name: &str) -> Result<(), StoreError> {
    let path = dir.join(name);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(unavailable(&path)(e)),
        _ => Ok(()),
    }
}

/// Writes a file whose name starts with a dot, which readers ignore. Called with the lock held, so one name per
/// process is enough, and what a killed one left behind is replaced.
fn write_temp(dir: &Path, name: &str, content: &[u8]) -> Result<PathBuf, StoreError> {
    let temp = dir.join(format!(".{name}.{}", std::process::id()));
    let write = || {
        match fs::remove_file(&temp) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&temp)?;
        file.write_all(content)?;
        // Without this, a power failure may leave an empty file under the final name.
        file.sync_all()
    };
    write().map_err(|e| {
        let _leftover = fs::remove_file(&temp);
        unavailable(&temp)(e)
    })?;
    Ok(temp)
}

pub(super) fn unavailable(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let location = path.display().to_string();
    move |source| StoreError::Unavailable { location, source }
}

/// Held by whoever writes to the store. Released when dropped, also by the end of the process.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "closing the file releases the lock")] File);

impl Lock {
    /// Takes the lock if it is free.
    pub(super) fn try_take(dir: &Path) -> Result<Option<Self>, StoreError> {
        let path = dir.join(LOCK);
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
        let open = || {
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .custom_flags(flags)
                .open(&path)
        };
        let file = open().map_err(unavailable(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(e)) => return Err(unavailable(&path)(e)),
        }
        // Whoever replaced the file meanwhile (a whole directory was swapped) made others lock the new one.
        let held = file.metadata().map_err(unavailable(&path))?;
        let there = fs::symlink_metadata(&path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (held.dev(), held.ino()));
        Ok(there.then_some(Self(file)))
    }

    /// Waits for the lock.
    pub(super) async fn take(dir: &Path) -> Result<Self, StoreError> {
        let mut waited = Duration::ZERO;
        loop {
            if let Some(lock) = Self::try_take(dir)? {
                return Ok(lock);
            }
            if waited >= LOCK_PATIENCE {
                let location = dir.join(LOCK).display().to_string();
                return Err(StoreError::Locked { location, waited });
            }
            tokio::time::sleep(LOCK_RETRY).await;
            waited += LOCK_RETRY;
        }
    }
}
