//! Owns captures where the kernel carries the packets: packet sockets on its links, read by a thread per capture, which
//! shows what passes to a tap as workers do. Never says of a packet what only the kernel knows: it shows that one was
//! handed to it, or came from it.
//!
//! Nobody waits for the thread. What does not fit the sockets' buffers meanwhile is the capture's loss, as the kernel
//! counts it.

mod program;
pub mod scene;
mod show;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread;
use std::time::Duration;

use tokio::sync::watch;

use crate::datapath::tap::{self, Capture, Tap, Taps, TooMany, Wanted};
use crate::sys::packet::{FrameBatch, PacketSocket};
use scene::{Place, Scene};
use show::Shower;

/// How often the sockets are emptied, and how often those are looked for whose link was gone.
const EVERY: Duration = Duration::from_millis(2);
const ROUNDS_PER_LOOK: u32 = 50;

/// What a socket holds meanwhile, with what the kernel adds to each frame: 40 ms at 1 Gb/s even of small packets.
const BUFFER: i32 = 16 << 20;

/// Frames fetched by one system call.
const BATCH: usize = 32;

/// Batches of one socket before it is another one's turn.
const BATCHES_PER_TURN: usize = 32;

/// Why packet sockets cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// Captures are limited.
    #[error(transparent)]
    TooMany(#[from] TooMany),
    /// The daemon may not.
    #[error("a packet socket on {0} is refused: give the daemon CAP_NET_RAW")]
    Forbidden(String),
    /// The kernel cannot.
    #[error("this kernel has no packet sockets: it needs CONFIG_PACKET")]
    Lacking,
    /// Any other reason.
    #[error("cannot open a packet socket on {link}: {source}")]
    Socket {
        /// Where.
        link: String,
        /// What the system says.
        source: io::Error,
    },
    /// There is no thread to be had.
    #[error("cannot start a thread: {0}: raise the limit on threads (ulimit -u, pids.max)")]
    Thread(io::Error),
}

/// Begins a capture on the links that `choose` picks from the scene: those that it picks now are watched for as long as
/// there are links of these names, and when it picks other names the capture ends. `running` counts captures.
///
/// # Errors
/// [`WatchError`].
pub fn start(
    mut scenes: watch::Receiver<Scene>,
    choose: fn(&Place) -> bool,
    wanted: Wanted,
    running: &Arc<AtomicUsize>,
) -> Result<(Capture, Vec<Place>), WatchError> {
    let scene = scenes.borrow_and_update().clone();
    let places: Vec<Place> = scene
        .places
        .iter()
        .filter(|it| choose(it))
        .cloned()
        .collect();
    let transports = places.iter().map(Place::transport).collect();
    let taps = Arc::new(Taps::beside(transports, Arc::clone(running)));
    let keep = show::keep(&wanted);
    let segments = wanted.segments;
    let capture = taps.capture(wanted)?;
    let begun = tap::now_ns();
    let mut watched = Vec::with_capacity(places.len());
    for (number, place) in places.iter().enumerate() {
        let mut one = Watched {
            tap: Tap::new(&taps, number),
            socket: None,
            place: place.clone(),
        };
        one.tap.begin_at(begun);
        one.open(keep)?;
        watched.push(one);
    }
    drop(taps);
    let watcher = Watcher {
        watched,
        scenes,
        choose,
        keep,
        begun,
        shower: Shower::new(scene, segments),
    };
    thread::Builder::new()
        .name("watch".to_owned())
        .spawn(move || watcher.run())
        .map_err(WatchError::Thread)?;
    Ok((capture, places))
}

/// One link that is watched.
struct Watched {
    tap: Tap,
    /// None while there is no such link.
    socket: Option<PacketSocket>,
    place: Place,
}

impl Watched {
    fn open(&mut self, keep: u32) -> Result<(), WatchError> {
        let filter = self.place.program(keep);
        let socket = PacketSocket::open(self.place.index, &filter, BUFFER).map_err(|source| {
            let link = self.place.device.clone();
            match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => WatchError::Forbidden(link),
                Some(libc::EAFNOSUPPORT) => WatchError::Lacking,
                _ => WatchError::Socket { link, source },
            }
        })?;
        self.socket = Some(socket);
        Ok(())
    }

    /// Counts what the kernel could not keep.
    fn count_lost(&self) {
        if let Some(Ok(lost)) = self.socket.as_ref().map(PacketSocket::lost)
            && lost > 0
        {
            self.tap.lose(lost);
        }
    }

    /// Shows what has come. Whether all of it is shown.
    fn empty(&self, batch: &mut FrameBatch, shower: &Shower) -> bool {
        let Some(socket) = &self.socket else {
            return true;
        };
        for turn in 0..BATCHES_PER_TURN {
            let received = batch.receive(socket, |frame, bytes| {
                shower.show(&self.tap, &self.place, &frame, bytes);
            });
            let emptied = match received {
                Ok(emptied) => emptied,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) if turn == 0 => return true,
                    Some(libc::EAGAIN) => true,
                    // The link is down or gone, which is told once; frames that came before are still there.
                    Some(libc::EINTR | libc::ENETDOWN | libc::ENXIO | libc::ENODEV) => false,
                    // A frame that this kernel cannot describe in a vnet header is gone.
                    _ => {
                        self.tap.lose(1);
                        false
                    }
                },
            };
            if emptied {
                // Told before what came in the place of what was lost is settled.
                self.count_lost();
                return true;
            }
        }
        false
    }
}

/// The thread of one capture.
struct Watcher {
    watched: Vec<Watched>,
    scenes: watch::Receiver<Scene>,
    choose: fn(&Place) -> bool,
    keep: u32,
    /// Nothing is older.
    begun: u64,
    shower: Shower,
}

impl Watcher {
    /// Runs until nobody reads the capture, or the daemon watches otherwise.
    fn run(mut self) {
        let mut batch = FrameBatch::new(BATCH);
        let mut round = 0;
        // What passed before the round before last began has been shown: between a frame's time and its place in the
        // queue is a moment.
        let (mut last, mut before_last) = (self.begun, self.begun);
        while !self.watched.is_empty() {
            match self.scenes.has_changed() {
                Ok(false) => {}
                Ok(true) if self.follow() => {}
                Ok(true) | Err(_) => return,
            }
            let now = tap::now_ns();
            let mut emptied = true;
            for one in &self.watched {
                one.tap.begin_at(before_last);
                if !one.tap.is_on() {
                    return;
                }
                emptied &= one.empty(&mut batch, &self.shower);
            }
            round += 1;
            if round % ROUNDS_PER_LOOK == 0 {
                self.reopen();
            }
            if emptied {
                (before_last, last) = (last, now);
                rest();
            }
        }
    }

    /// Opens what could not be opened when its link was made anew.
    fn reopen(&mut self) {
        for one in &mut self.watched {
            if one.socket.is_none() {
                // The next look tries again.
                let _absent = one.open(self.keep);
            }
        }
    }

    /// Takes over what there is to watch now. Not if it has other names.
    fn follow(&mut self) -> bool {
        let scene = self.scenes.borrow_and_update().clone();
        let places: Vec<&Place> = scene.places.iter().filter(|it| (self.choose)(it)).collect();
        let same = places.len() == self.watched.len()
            && places
                .iter()
                .zip(&self.watched)
                .all(|(now, was)| now.is_called_as(&was.place));
        if !same {
            return false;
        }
        for (now, was) in places.into_iter().zip(&mut self.watched) {
            if *now != was.place {
                was.count_lost();
                was.place = now.clone();
                was.socket = None;
                // The link may be gone again; the next look tries again.
                let _absent = was.open(self.keep);
            }
        }
        self.shower.take(scene);
        true
    }
}

/// Lets packets gather, so that one system call fetches many.
#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own that nobody waits for; a wake-up per packet would cost more than the packet"
)]
fn rest() {
    thread::sleep(EVERY);
}

impl Drop for Watcher {
    fn drop(&mut self) {
        for one in &self.watched {
            one.count_lost();
        }
    }
}
