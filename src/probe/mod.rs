//! Owns how nodes find out how they reach each other: answering probes and sending them, over ordinary UDP sockets
//! inside the overlay, so that a probe goes the way of every other packet, whatever carries it. Never on the
//! packet path, and never decides what a finding means.
//!
//! A probe goes to port [`PORT`](crate::wire::probe::PORT) of a peer's address in the overlay, the first of its
//! subnet; where routes carry the packets no node has that address, and it is the second ([`Directory`]). A peer
//! that runs this program answers; an unmodified one's kernel says that nobody listens, or nothing, and is asked
//! with ICMP echo.
//!
//! | Module | Owns |
//! |---|---|
//! | [`directory`] | who may ask, and what was heard of whom |
//! | [`responder`] | answering |
//! | [`prober`] | asking: rounds |
//! | `asking` | asking for more: reports, and what the other sees of a trace |
//! | `search` | finding the usable size |
//! | [`background`] | probing a few peers all the time |
//! | [`history`] | what the last visits say (pure) |
//! | [`past`] | proving ways past the tunnel, by marked probes |
//! | [`rounds`] | which of many ways is probed when (pure) |
//! | [`proof`] | when a way may be used (pure) |
//! | [`figures`] | what a round says (pure) |
//! | `socket`, `echo` | UDP sockets with what stood around a datagram, and ICMP echo |

mod asking;
pub mod background;
pub mod directory;
mod echo;
pub mod figures;
pub mod history;
pub mod past;
pub mod prober;
pub mod proof;
pub mod responder;
pub mod rounds;
mod search;
mod socket;

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use background::{Background, Tally};
pub use directory::{Directory, Peer, Ways};
pub use figures::{Figures, Sizes};
pub use prober::{Prober, Round};
pub use responder::Responder;

/// The way that probes take, where it is not left to the routing table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// The address they come from.
    pub local: Option<IpAddr>,
    /// The device they leave by (`SO_BINDTODEVICE`); answers have to come in by it, too.
    pub device: Option<String>,
    /// The mark that policy rules may look at (`SO_MARK`).
    pub mark: Option<u32>,
    /// Probes over IPv4 carry no UDP checksum.
    pub unchecked: bool,
}

/// Bytes of the IP and UDP headers in front of a probe. IP options and extension headers are not sent.
#[must_use]
pub const fn headers_len(addr: IpAddr) -> u16 {
    match addr {
        IpAddr::V4(_) => 20 + 8,
        IpAddr::V6(_) => 40 + 8,
    }
}

/// A number that nobody guesses: from the seed that the standard library draws for every hasher.
#[must_use]
pub fn random() -> u64 {
    RandomState::new().hash_one(SystemTime::now())
}

/// Nanoseconds since 1970 by the wall clock; 0 for a clock that stands before that.
fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    nanos(since.unwrap_or_default())
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
