//! Owns the lock that keeps a second daemon off the same subnet file. Never waits for a daemon that runs.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::kill;
use nix::unistd::Pid;

/// Why the subnet file is not ours to write.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon runs.
    #[error(
        "another daemon{} writes {}: stop it first, or give this one another --subnet-file", holder(pid), subnet_file.display()
    )]
    Held {
        /// The subnet file.
        subnet_file: PathBuf,
        /// The other daemon's process id, as it wrote it.
        pid: String,
    },
    /// The directory or the lock file cannot be made.
    #[error("{}: cannot {action}: {source}: make its directory writable, or give another --subnet-file", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

/// A daemon that was killed while it started a program leaves a child that holds the lock for the moment that the
/// child takes to become that program; looked at again so often.
const LEFT_BEHIND: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

fn holder(pid: &str) -> String {
    if pid.is_empty() {
        return String::new();
    }
    format!(" (pid {pid})")
}

/// The lock on a subnet file: `.subnet.env.lock` beside it, with our process id in it. Dropping it removes it.
#[derive(Debug)]
pub(super) struct SubnetLock {
    path: PathBuf,
    /// Held, and removed while held, so that nobody locks a file that is about to vanish.
    file: Flock<File>,
}

impl SubnetLock {
    /// Takes the lock. Makes the directory, mode 0755, as writing the subnet file would.
    ///
    /// # Errors
    ///
    /// [`LockError`]; nothing but the directory is left behind.
    pub(super) async fn take(subnet_file: &Path) -> Result<Self, LockError> {
        let dir = match subnet_file.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let failed = |path: &Path, action| {
            let path = path.to_owned();
            move |source| LockError::Io {
                path,
                action,
                source,
            }
        };
        let mut name = OsString::from(".");
        name.push(subnet_file.file_name().unwrap_or_default());
        name.push(".lock");
        let path = dir.join(name);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .map_err(failed(dir, "create the directory"))?;
        let mut left_behind_for = Duration::ZERO;
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)
                .map_err(failed(&path, "create the lock file"))?;
            let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((mut file, Errno::EWOULDBLOCK)) => {
                    let mut pid = String::new();
                    // Best effort: the message is complete without it.
                    let _unreadable = (&mut file).take(16).read_to_string(&mut pid);
                    if is_gone(&pid) && left_behind_for < LEFT_BEHIND {
                        left_behind_for += LOOK_AGAIN;
                        tokio::time::sleep(LOOK_AGAIN).await;
                        continue;
                    }
                    return Err(LockError::Held {
                        subnet_file: subnet_file.to_owned(),
                        pid: pid.trim().to_owned(),
                    });
                }
                Err((_, errno)) => return Err(failed(&path, "lock the lock file")(errno.into())),
            };
            // Whoever held it may have removed it between our opening and our locking it.
            let opened = file
                .metadata()
                .map_err(failed(&path, "look at the lock file"))?;
            let there = fs::symlink_metadata(&path);
            if !there.is_ok_and(|meta| (meta.dev(), meta.ino()) == (opened.dev(), opened.ino())) {
                continue;
            }
            // From here on it goes with the value, also if it cannot be written.
            let mut lock = Self { path, file };
            let file = &mut lock.file;
            let written = file
                .set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| writeln!(file, "{}", std::process::id()));
            written.map_err(failed(&lock.path, "write the lock file"))?;
            return Ok(lock);
        }
    }
}

/// Whether the process that wrote its id is known to have ended.
fn is_gone(pid: &str) -> bool {
    let pid = pid.trim().parse().map(Pid::from_raw);
    pid.is_ok_and(|pid| kill(pid, None) == Err(Errno::ESRCH))
}

impl Drop for SubnetLock {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "lock file stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn second_daemon_is_refused_by_pid_until_the_first_is_gone_and_no_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let subnet_file = dir.path().join("run").join("subnet.env");
        let first = SubnetLock::take(&subnet_file).await.unwrap();
        let refused = SubnetLock::take(&subnet_file)
            .await
            .unwrap_err()
            .to_string();
        let pid = format!("(pid {})", std::process::id());
        assert!(refused.contains(&pid), "{refused}");
        assert!(refused.contains("subnet.env"), "{refused}");
        let other = SubnetLock::take(&dir.path().join("run").join("other.env"))
            .await
            .unwrap();
        drop(first);
        drop(SubnetLock::take(&subnet_file).await.unwrap());
        drop(other);
        let left = fs::read_dir(dir.path().join("run")).unwrap().count();
        assert_eq!(left, 0);
    }

    #[tokio::test]
    async fn lock_left_behind_by_a_killed_daemon_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".subnet.env.lock"), "4194304 and more").unwrap();
        let _lock = SubnetLock::take(&dir.path().join("subnet.env"))
            .await
            .unwrap();
        let text = fs::read_to_string(dir.path().join(".subnet.env.lock")).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
    }

    #[tokio::test]
    async fn symbolic_link_in_the_place_of_the_lock_is_refused_and_its_target_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("precious");
        fs::write(&target, "data").unwrap();
        std::os::unix::fs::symlink(&target, dir.path().join(".subnet.env.lock")).unwrap();
        SubnetLock::take(&dir.path().join("subnet.env"))
            .await
            .unwrap_err();
        assert_eq!(fs::read_to_string(&target).unwrap(), "data");
    }

    #[tokio::test]
    async fn what_a_killed_daemon_was_about_to_start_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let path = dir.path().join(".subnet.env.lock");
        fs::write(&path, format!("{}\n", ended.id())).unwrap();
        let file = File::open(&path).unwrap();
        let child = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
        let releases = tokio::spawn(async move {
            tokio::time::sleep(3 * LOOK_AGAIN).await;
            drop(child);
        });
        SubnetLock::take(&dir.path().join("subnet.env"))
            .await
            .unwrap();
        releases.await.unwrap();
    }
}
