//! Owns the asking end of the status socket. Never waits for a daemon longer than its request may take.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use serde_json::Value;

use super::{PATIENCE, Request, SocketError, check_path};

/// The longest answer a client reads: 5000 peers at about 400 bytes, with room to spare.
const MAX_ANSWER: usize = 16 << 20;

/// Asks the daemon at `path`.
///
/// # Errors
///
/// [`SocketError`]; also if the daemon answers with an error.
pub fn ask(path: &Path, request: &Request) -> Result<Value, SocketError> {
    open(path, request).map(|(answer, _)| answer)
}

/// Asks the daemon at `path`, and keeps the connection for what follows the answer.
///
/// # Errors
///
/// [`SocketError`]; also if the daemon answers with an error.
pub fn open(path: &Path, request: &Request) -> Result<(Value, BlockingStream), SocketError> {
    check_path(path)?;
    let failed = |action| {
        move |source| SocketError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    let bad = |reason: String| SocketError::BadAnswer {
        path: path.to_owned(),
        reason,
    };
    let connected = BlockingStream::connect(path);
    let mut stream = connected.map_err(|source| {
        let path = path.to_owned();
        if source.kind() == io::ErrorKind::PermissionDenied {
            SocketError::Forbidden { path, source }
        } else {
            SocketError::NoDaemon { path, source }
        }
    })?;
    // The daemon's own patience, and as much again for what it does in between.
    let patience = Some(PATIENCE + request.patience());
    stream
        .set_read_timeout(patience)
        .and_then(|()| stream.set_write_timeout(patience))
        .map_err(failed("limit the wait for it"))?;
    let mut line = serde_json::to_string(request).map_err(|e| bad(e.to_string()))?;
    line.push('\n');
    stream
        .write_all(line.as_bytes())
        .map_err(failed("send the request"))?;
    let answer = read_line(&mut stream).map_err(failed("read the answer"))?;
    let answer: Value = serde_json::from_str(&answer).map_err(|e| {
        bad(if answer.is_empty() {
            "it hung up: only root and its own user are answered, a few at a time".to_owned()
        } else {
            e.to_string()
        })
    })?;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => Err(SocketError::Refused(error.to_owned())),
        None => Ok((answer, stream)),
    }
}

/// A text of an answer, for a terminal. Names come from files that others write: nothing in them gets there as a command.
#[must_use]
pub fn clean(text: &str) -> String {
    let safe = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(safe).collect()
}

/// Reads up to the first line's end and not a byte further: what follows may not be text.
fn read_line(stream: &mut BlockingStream) -> io::Result<String> {
    let (mut line, mut buffer) = (Vec::new(), [0; 1 << 14]);
    loop {
        let count = match recv(stream.as_raw_fd(), &mut buffer, MsgFlags::MSG_PEEK) {
            // Where there is a limit, the kernel does not go on waiting after a stop and a continue (signal(7)).
            Err(Errno::EINTR) => continue,
            count => count?,
        };
        let seen = buffer.get(..count).unwrap_or_default();
        let end = seen.iter().position(|&byte| byte == b'\n');
        let wanted = buffer.get_mut(..end.map_or(count, |end| end + 1));
        let wanted = wanted.unwrap_or_default();
        stream.read_exact(wanted)?;
        line.extend_from_slice(wanted);
        if count == 0 || end.is_some() || line.len() > MAX_ANSWER {
            return String::from_utf8(line).map_err(io::Error::other);
        }
    }
}
