//! Owns reading and replacing the small files that others read and write too. Never knows what is in them.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Why a file could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot {action}: {source}", path.display())]
pub struct FileError {
    /// The file or directory.
    pub path: PathBuf,
    /// What was tried.
    pub action: &'static str,
    /// What the system says.
    pub source: io::Error,
}

impl FileError {
    pub(crate) fn new(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self {
            path,
            action,
            source,
        }
    }
}

/// The content of a regular file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    // Without this a pipe in the place of the file would block the start for ever.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    let mut text = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut text)?;
    if text.len() > limit {
        let message = format!("larger than {limit} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(text)
}

/// The permission bits of the regular file at `path`, or 0644.
pub(crate) fn mode_of(path: &Path) -> u32 {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => meta.permissions().mode() & 0o7777,
        _ => 0o644,
    }
}

/// Replaces the file at `path` in one step, so that a reader sees the old content or the new, also after a power
/// failure. Makes the directory, mode 0755. The file gets `mode` whatever the umask.
///
/// # Errors
///
/// The step that failed. The old file is then still there.
pub(crate) fn replace(path: &Path, content: impl Read, mode: u32) -> Result<(), FileError> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let Some(name) = path.file_name() else {
        let source = io::Error::from(io::ErrorKind::IsADirectory);
        return Err(FileError::new("write", path)(source));
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .map_err(FileError::new("create the directory", dir))?;
    // One writer per process and file: the process id keeps writers apart, and what a killed one with the
    // same id left behind is overwritten.
    let temp = dir.join(format!(".{}{}", name.to_string_lossy(), std::process::id()));
    let written = write_temp(&temp, content, mode)
        .map_err(FileError::new("write", &temp))
        .and_then(|()| fs::rename(&temp, path).map_err(FileError::new("replace", path)));
    if written.is_err() {
        // The error that matters is the one above.
        let _leftover = fs::remove_file(&temp);
    }
    written?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(FileError::new("sync", dir))
}

fn write_temp(temp: &Path, mut content: impl Read, mode: u32) -> io::Result<()> {
    match fs::remove_file(temp) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(temp)?;
    io::copy(&mut content, &mut file)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}
