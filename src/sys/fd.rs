//! Owns descriptor flags, for types that hand out only a raw descriptor. Never closes one.

#![expect(
    unsafe_code,
    reason = "fcntl on a descriptor that its owner does not lend as BorrowedFd"
)]

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Makes reads and writes return `WouldBlock` instead of waiting.
///
/// # Errors
/// The kernel's.
pub fn set_nonblocking(owner: &impl AsRawFd) -> io::Result<()> {
    let fd = owner.as_raw_fd();
    // SAFETY: F_GETFL takes no argument and touches no memory of ours; `owner` keeps the descriptor open.
    let flags = Errno::result(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    // SAFETY: F_SETFL takes its argument by value and touches no memory of ours; the descriptor is still open.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_read_that_would_wait_returns() {
        let (mut reader, _writer) = UnixStream::pair().unwrap();
        set_nonblocking(&reader).unwrap();
        let error = reader.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
