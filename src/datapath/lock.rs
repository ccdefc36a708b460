//! Owns the exclusion of a second daemon in one network namespace. Never waits.
//!
//! A TUN attach to an existing multi-queue device and a bind with `SO_REUSEPORT` would both succeed and take
//! half of the other daemon's traffic. So a name is taken first: an abstract Unix socket, which belongs to the
//! network namespace as devices and ports do, and goes with its process however that ends.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// Holds a name until dropped.
#[derive(Debug)]
pub struct NameLock(#[expect(dead_code, reason = "held for its existence")] UnixListener);

/// Why the name was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody holds it.
    #[error("held by process {pid}")]
    Held {
        /// The holder; 0 when it cannot be told.
        pid: i32,
    },
    /// Anything else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl NameLock {
    /// Takes `loden/<what>`, for example `loden/port/192.0.2.1:8285`.
    ///
    /// # Errors
    /// [`LockError::Held`] with the holder's process id.
    pub fn take(what: &str) -> Result<Self, LockError> {
        let name = SocketAddr::from_abstract_name(format!("loden/{what}"))?;
        match UnixListener::bind_addr(&name) {
            Ok(listener) => Ok(Self(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                // The credentials of a listening socket are its creator's.
                let pid = UnixStream::connect_addr(&name)
                    .ok()
                    .and_then(|stream| getsockopt(&stream, PeerCredentials).ok())
                    .map_or(0, |credentials| credentials.pid());
                Err(LockError::Held { pid })
            }
            Err(error) => Err(LockError::Io(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{Interrupt, wait};
    use std::time::Duration;

    /// Only a failing test waits this long.
    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn the_second_is_told_who_is_first_and_succeeds_once_it_is_gone() {
        let name = format!("test/{}", std::process::id());
        let first = NameLock::take(&name).unwrap();
        let Err(LockError::Held { pid }) = NameLock::take(&name) else {
            panic!("taken twice")
        };
        assert_eq!(pid, i32::try_from(std::process::id()).unwrap());
        drop(first);
        // A child that another test has just forked has it, too, until it becomes a program.
        wait::until("the name", LIMIT, &Interrupt::default(), || {
            Ok(NameLock::take(&name).ok())
        })
        .unwrap();
    }
}
