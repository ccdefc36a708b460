//! Owns the status socket: one line of JSON in, one line of JSON out. Never answers anybody but root and the
//! daemon's own user, and never waits for a client longer than [`PATIENCE`].

mod client;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io;
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::end::End;
use super::stream;
use crate::datapath::tap::Capture;
use crate::iface::Family;
use crate::sys::heap;

pub use client::{ask, clean, open};

/// The longest path a socket may have: `sun_path` of unix(7), less the final zero.
pub const MAX_PATH: usize = 107;

/// How long a client may take to send its request, or to read the answer.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// How long an examination of all peers may take.
pub const EXAMINATION: Duration = Duration::from_secs(60);

/// How long an explanation may take: three seconds for the names of pods, and four for following probes after it.
const EXPLAINING: Duration = Duration::from_secs(8);

/// The longest request read, in bytes.
const MAX_REQUEST: u64 = 4096;

/// An answer of more bytes than this was made of so much memory that it is worth giving back.
const LARGE: usize = 1 << 20;

/// Clients served at a time. A further one takes the place of the oldest that has not asked anything yet.
const MAX_CLIENTS: usize = 8;

/// How long a client waits for such a place.
const MAKE_ROOM: Duration = Duration::from_millis(500);

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "query", rename_all = "kebab-case")]
pub enum Request {
    /// Everything there is to know.
    Status,
    /// Packets and what becomes of them. The answer's line is followed by [`stream`] frames.
    Capture {
        /// An expression of [`Filter`](crate::datapath::tap::filter::Filter).
        filter: String,
        /// Bytes of each packet.
        snap_len: usize,
        /// Superpackets as segments.
        segments: bool,
        /// Where the kernel wraps packets, the datagrams that carry them.
        #[serde(default)]
        outer: bool,
    },
    /// What would become of a packet.
    Explain {
        /// Its source.
        from: End,
        /// Its destination.
        to: End,
        /// Of which addresses, where pods have some of both families; none for whichever both ends have.
        #[serde(default)]
        family: Option<Family>,
        /// Its length in bytes.
        len: u16,
        /// It must not be fragmented.
        whole: bool,
        /// Send marked probes after it and follow them.
        #[serde(default)]
        trace: bool,
    },
    /// How peers are reached, and why not.
    Doctor {
        /// An address of the only peer to examine; none for all, or as many as there is time for.
        peer: Option<IpAddr>,
        /// Ask every peer how it reaches the others, too.
        mesh: bool,
    },
}

impl Request {
    /// Reads a client's line; none if it makes no sense.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }

    /// How long its answer may take.
    const fn patience(&self) -> Duration {
        match self {
            Self::Status | Self::Capture { .. } => PATIENCE,
            Self::Explain { .. } => EXPLAINING,
            Self::Doctor { .. } => EXAMINATION,
        }
    }
}

/// What the daemon answers: a line of JSON, and what is captured from now on, if that was asked for.
#[derive(Debug)]
pub struct Answer {
    line: String,
    capture: Option<Capture>,
}

/// A request with the place for its answer.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Answer>,
}

impl Asked {
    /// Says that there is nothing to tell, because something is missing.
    pub fn refuse(self, missing: &[String]) {
        let why = format!("the daemon runs, and is not ready: {}", missing.join(": "));
        // The client may have given up.
        let _gone = self.answer.send(Answer::error(&why));
    }
}

/// Why there is no status socket, or no answer from it.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// No socket can have such a path.
    #[error("{}: longer than the {MAX_PATH} bytes a socket's path may have: give a shorter one with --status-socket", .0.display())]
    TooLong(PathBuf),
    /// Somebody else answers there.
    #[error("{}: another process listens there: stop it, or give another path with --status-socket", .0.display())]
    InUse(PathBuf),
    /// There is something that is no socket.
    #[error("{}: exists and is not a socket: remove it, or give another path with --status-socket", .0.display())]
    NotASocket(PathBuf),
    /// Nobody listens.
    #[error("no daemon answers at {} ({source}): is it running, with this --subnet-file or --status-socket?", path.display())]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is a socket, and it is not ours to use.
    #[error("{}: only root and the daemon's own user are answered: ask as one of them ({source})", path.display())]
    Forbidden {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The daemon says that it cannot answer, and why.
    #[error("{0}")]
    Refused(String),
    /// The daemon's answer makes no sense.
    #[error("{}: the daemon's answer cannot be read: {reason}", path.display())]
    BadAnswer {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Any other step.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

/// The socket's place by default: beside the subnet file, `subnet.sock` for `subnet.env`.
#[must_use]
pub fn beside(subnet_file: &Path) -> PathBuf {
    if subnet_file.extension().is_some_and(|ext| ext == "env") {
        return subnet_file.with_extension("sock");
    }
    let mut name = OsString::from(subnet_file.as_os_str());
    name.push(".sock");
    name.into()
}

/// Whether a socket can have this path.
///
/// # Errors
///
/// [`SocketError::TooLong`].
pub fn check_path(path: &Path) -> Result<(), SocketError> {
    if path.as_os_str().as_bytes().len() > MAX_PATH {
        return Err(SocketError::TooLong(path.to_owned()));
    }
    Ok(())
}

/// A bound socket; dropping it removes it from the file system.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    /// Device and inode, to remove only what is ours.
    identity: (u64, u64),
    serving: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Binds the socket, mode 0600, in the place of one that nobody listens to any more, and serves it in a
    /// task of the current runtime. Requests go to `asked`.
    ///
    /// # Errors
    ///
    /// [`SocketError`]; nothing is left behind.
    pub fn start(path: &Path, asked: mpsc::Sender<Asked>) -> Result<Self, SocketError> {
        check_path(path)?;
        let failed = |action| {
            move |source| SocketError::Io {
                path: path.to_owned(),
                action,
                source,
            }
        };
        match fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) if BlockingStream::connect(path).is_ok() => {
                return Err(SocketError::InUse(path.to_owned()));
            }
            Ok(_) => fs::remove_file(path).map_err(failed("remove the stale socket"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at it")(error)),
        }
        let listener = UnixListener::bind(path).map_err(failed("bind it"))?;
        // Until here the umask decides who may connect; every client's user is checked in any case.
        let restricted = fs::set_permissions(path, Permissions::from_mode(0o600))
            .and_then(|()| fs::symlink_metadata(path));
        let meta = match restricted {
            Ok(meta) => meta,
            Err(source) => {
                // The error that matters is the one above.
                let _leftover = fs::remove_file(path);
                return Err(failed("restrict it")(source));
            }
        };
        Ok(Self {
            path: path.to_owned(),
            identity: (meta.dev(), meta.ino()),
            serving: tokio::spawn(serve(listener, asked)),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "status socket stays behind");
        }
    }
}

async fn serve(listener: UnixListener, asked: mpsc::Sender<Asked>) {
    let slots = Arc::new(Semaphore::new(MAX_CLIENTS));
    // Clients that have not asked yet, oldest first.
    let mut silent: VecDeque<oneshot::Sender<Infallible>> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: there is nothing to do but let some be closed.
                tracing::debug!(%error, "status socket cannot accept");
                tokio::time::sleep(PATIENCE).await;
                continue;
            }
        };
        silent.retain(|client| !client.is_closed());
        if slots.available_permits() == 0 {
            // Dropping its end sends the client away.
            drop(silent.pop_front());
        }
        let slot = Arc::clone(&slots).acquire_owned();
        // Everybody asks something that takes its time.
        let Ok(Ok(slot)) = timeout(MAKE_ROOM, slot).await else {
            continue;
        };
        let (patience, evicted) = oneshot::channel();
        silent.push_back(patience);
        let asked = asked.clone();
        tokio::spawn(async move {
            if let Err(error) = converse(stream, &asked, evicted).await {
                tracing::debug!(%error, "status client went away");
            }
            drop(slot);
        });
    }
}

async fn converse(
    mut stream: UnixStream,
    asked: &mpsc::Sender<Asked>,
    evicted: oneshot::Receiver<Infallible>,
) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    if peer != 0 && peer != nix::unistd::geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (mut reader, mut writer) = stream.split();
    let mut line = String::new();
    let mut limited = tokio::io::BufReader::new((&mut reader).take(MAX_REQUEST));
    tokio::select! {
        read = timeout(PATIENCE, limited.read_line(&mut line)) => read??,
        _ = evicted => return Err(io::ErrorKind::TimedOut.into()),
    };
    drop(limited);
    let answer = match serde_json::from_str::<Request>(&line) {
        Ok(request) => {
            let patience = request.patience();
            let (answer, answered) = oneshot::channel();
            let waited = async {
                asked.send(Asked { request, answer }).await.ok()?;
                answered.await.ok()
            };
            let answer = timeout(patience, waited).await.ok().flatten();
            answer
                .unwrap_or_else(|| Answer::error("the daemon is busy, or has no lease: try again"))
        }
        Err(e) => Answer::error(&format!(
            "no request I know: {e}: send {{\"query\":\"status\"}}"
        )),
    };
    let Answer { line, capture } = answer;
    let written = timeout(PATIENCE, writer.write_all(line.as_bytes())).await;
    let len = line.len();
    drop(line);
    if len > LARGE {
        heap::give_back();
    }
    written??;
    match capture {
        Some(capture) => stream::serve(capture, reader, writer).await,
        None => Ok(()),
    }
}

impl Answer {
    /// A document whose every field is a number, a text or a list of them, and every key a text.
    #[must_use]
    pub fn document(document: &impl Serialize) -> Self {
        match serde_json::to_string(document) {
            Ok(mut line) => {
                line.push('\n');
                Self {
                    line,
                    capture: None,
                }
            }
            Err(e) => Self::error(&e.to_string()),
        }
    }

    /// A document, and the capture that follows it.
    #[must_use]
    pub fn capture(document: &impl Serialize, capture: Capture) -> Self {
        Self {
            capture: Some(capture),
            ..Self::document(document)
        }
    }

    /// Why there is no other answer.
    #[must_use]
    pub fn error(text: &str) -> Self {
        Self {
            line: format!("{}\n", serde_json::json!({ "error": text })),
            capture: None,
        }
    }
}

#[cfg(test)]
mod tests;
