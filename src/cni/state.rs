//! Owns the files that remember what a delegate was asked to do, so that DEL can ask it to undo exactly that. Never
//! runs a delegate.
//!
//! One file per interface, `<dataDir>/<container>:<interface>`; neither part may hold a colon. The original keeps one
//! file per container, `<dataDir>/<container>`: such a file is read where ours is missing, and the first interface's
//! file is linked to that name as well, so that either plugin can remove what the other has added.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::conf::{Attachment, MAX_CONF_LEN};
use super::error::CniError;
use crate::file::read_bounded;

/// The files of one `dataDir`.
#[derive(Debug)]
pub(super) struct State<'a> {
    dir: &'a Path,
}

/// What was saved for an interface.
#[derive(Debug)]
pub(super) struct Saved {
    path: PathBuf,
    /// The delegate's configuration, if nobody has damaged it.
    pub(super) config: Vec<u8>,
}

/// What was saved, and may not be on the disk yet.
#[derive(Debug)]
#[must_use = "a power failure may take it away"]
pub(super) struct Unsynced {
    file: File,
    dir: File,
    path: PathBuf,
}

impl Unsynced {
    /// Waits until it is on the disk, which takes most of the plugin's own time.
    pub(super) fn sync(self) -> Result<(), CniError> {
        let synced = self.file.sync_all().and_then(|()| self.dir.sync_all());
        synced.map_err(|e| CniError::file("write", &self.path, e))
    }
}

impl<'a> State<'a> {
    pub(super) const fn new(dir: &'a Path) -> Self {
        Self { dir }
    }

    /// Remembers `config`: whoever reads it finds nothing, or all of it. A power failure may take it away until
    /// [`Unsynced::sync`] has returned.
    pub(super) fn save(&self, of: &Attachment, config: &[u8]) -> Result<Unsynced, CniError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(self.dir);
        made.map_err(|e| CniError::file("create dataDir", self.dir, e))?;
        let path = self.path(of);
        // Never ends with a good name: the process may be killed at any point.
        let temp = self.dir.join(format!(
            ".{}:{}:{}",
            of.container_id,
            of.ifname,
            std::process::id()
        ));
        let written = self.replace(of, &path, &temp, config);
        if written.is_err() {
            // The error that matters is the one below.
            let _leftover = fs::remove_file(&temp);
        }
        written.map_err(|e| CniError::file("write", &path, e))
    }

    fn replace(
        &self,
        of: &Attachment,
        path: &Path,
        temp: &Path,
        config: &[u8],
    ) -> io::Result<Unsynced> {
        // Of a killed process with the same id.
        absent(fs::remove_file(temp))?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(temp)?;
        file.write_all(config)?;
        let shared = self.dir.join(&of.container_id);
        if same(&shared, path)? {
            absent(fs::remove_file(&shared))?;
        }
        // That name may be another interface's, or the original's; and a file system without links costs no pod
        // its network.
        let _for_the_original = fs::hard_link(temp, &shared);
        fs::rename(temp, path)?;
        Ok(Unsynced {
            file,
            dir: File::open(self.dir)?,
            path: path.to_owned(),
        })
    }

    /// What was saved for an interface, by this plugin or by the original.
    pub(super) fn load(&self, of: &Attachment) -> Result<Option<Saved>, CniError> {
        let own = self.read(self.path(of))?;
        if own.is_some() {
            return Ok(own);
        }
        let shared = self.dir.join(&of.container_id);
        // One that has another name is the file of another interface.
        match fs::symlink_metadata(&shared) {
            Ok(meta) if meta.nlink() == 1 => self.read(shared),
            _ => Ok(None),
        }
    }

    fn read(&self, path: PathBuf) -> Result<Option<Saved>, CniError> {
        match read_bounded(&path, MAX_CONF_LEN) {
            Ok(config) => Ok(Some(Saved { path, config })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(CniError::file("read", &path, e)),
        }
    }

    /// Forgets what was undone.
    pub(super) fn remove(&self, of: &Attachment, saved: &Saved) -> Result<(), CniError> {
        let shared = self.dir.join(&of.container_id);
        let removed = (|| {
            if same(&shared, &saved.path)? {
                absent(fs::remove_file(&shared))?;
            }
            absent(fs::remove_file(&saved.path))
        })();
        removed.map_err(|e| CniError::file("remove", &saved.path, e))
    }

    /// Every interface that has a file of ours.
    pub(super) fn attachments(&self) -> Result<Vec<Attachment>, CniError> {
        let failed = |e: io::Error| CniError::file("list dataDir", self.dir, e);
        let entries = match fs::read_dir(self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut all = Vec::new();
        for entry in entries {
            let name: OsString = entry.map_err(failed)?.file_name();
            let parts = name.to_str().and_then(|name| name.split_once(':'));
            let of = parts.map(|(container_id, ifname)| Attachment {
                container_id: container_id.to_owned(),
                ifname: ifname.to_owned(),
            });
            all.extend(of.filter(Attachment::is_valid));
        }
        all.sort();
        Ok(all)
    }

    fn path(&self, of: &Attachment) -> PathBuf {
        self.dir.join(format!("{}:{}", of.container_id, of.ifname))
    }
}

/// Whether both names are of one file.
fn same(a: &Path, b: &Path) -> io::Result<bool> {
    let identity = |path| match fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some((meta.dev(), meta.ino()))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    };
    let a = identity(a)?;
    Ok(a.is_some() && a == identity(b)?)
}

/// Removing what is not there is fine.
fn absent(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(container_id: &str, ifname: &str) -> Attachment {
        Attachment {
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn interfaces_of_one_container_are_kept_apart_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("made/here");
        let state = State::new(&data);
        let (eth0, net1) = (of("c", "eth0"), of("c", "net1"));
        state.save(&eth0, b"first").unwrap().sync().unwrap();
        state.save(&net1, b"second").unwrap().sync().unwrap();
        assert_eq!(names(&data), ["c", "c:eth0", "c:net1"]);
        assert_eq!(fs::read(data.join("c")).unwrap(), b"first");
        assert_eq!(fs::metadata(&data).unwrap().mode() & 0o777, 0o700);
        assert_eq!(
            fs::metadata(data.join("c:net1")).unwrap().mode() & 0o777,
            0o600
        );
        for (attachment, config) in [(&net1, b"second".as_slice()), (&eth0, b"first")] {
            let saved = state.load(attachment).unwrap().unwrap();
            assert_eq!(saved.config, config);
            state.remove(attachment, &saved).unwrap();
            assert!(state.load(attachment).unwrap().is_none());
        }
        assert!(names(&data).is_empty());
    }

    #[test]
    fn the_file_of_another_interface_does_not_stand_in() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path());
        state
            .save(&of("c", "net1"), b"config")
            .unwrap()
            .sync()
            .unwrap();
        assert!(state.load(&of("c", "eth0")).unwrap().is_none());
    }

    #[test]
    fn what_the_original_saved_is_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("c"), "config").unwrap();
        let state = State::new(dir.path());
        let saved = state.load(&of("c", "eth0")).unwrap().unwrap();
        assert_eq!(saved.config, b"config");
        state.remove(&of("c", "eth0"), &saved).unwrap();
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn saving_again_replaces_both_names() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path());
        state
            .save(&of("c", "eth0"), b"old")
            .unwrap()
            .sync()
            .unwrap();
        state
            .save(&of("c", "eth0"), b"new")
            .unwrap()
            .sync()
            .unwrap();
        assert_eq!(fs::read(dir.path().join("c")).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["c", "c:eth0"]);
        assert_eq!(state.attachments().unwrap(), [of("c", "eth0")]);
    }

    #[test]
    fn a_pipe_in_the_place_of_a_file_is_an_error_and_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c:eth0");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = State::new(dir.path()).load(&of("c", "eth0")).unwrap_err();
        assert!(error.msg.contains("not a regular file"), "{error}");
    }
}
