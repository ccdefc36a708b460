//! Owns gathered writes over a prebuilt vector array, so that a write of many slices allocates nothing.

#![expect(unsafe_code, reason = "writev over an array that outlives many bursts")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The kernel's limit of slices in one call (`UIO_MAXIOV`, include/uapi/linux/uio.h).
pub const MAX_SLICES: usize = 1024;

/// An empty kernel vector; arrays are filled with it at construction.
pub(super) const EMPTY: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// A slice as the kernel's vector. The kernel only reads through it; `iov_base` is `*mut` by history.
pub(super) const fn iovec(slice: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: slice.as_ptr().cast_mut().cast(),
        iov_len: slice.len(),
    }
}

/// A reusable array of [`MAX_SLICES`] vectors.
pub struct Gather {
    iovs: Box<[libc::iovec]>,
}

impl Gather {
    /// Allocates the array, once.
    #[must_use]
    pub fn new() -> Self {
        Self {
            iovs: vec![EMPTY; MAX_SLICES].into_boxed_slice(),
        }
    }

    /// Begins a write; the slices pushed must outlive it, which `'b` says.
    #[must_use]
    pub const fn start<'b>(&mut self) -> Gathered<'_, 'b> {
        Gathered {
            iovs: &mut self.iovs,
            used: 0,
            slices: PhantomData,
        }
    }
}

impl Default for Gather {
    fn default() -> Self {
        Self::new()
    }
}

/// A write being put together.
pub struct Gathered<'a, 'b> {
    iovs: &'a mut [libc::iovec],
    used: usize,
    slices: PhantomData<&'b [u8]>,
}

impl<'b> Gathered<'_, 'b> {
    /// Appends a slice; `false` when [`MAX_SLICES`] are in.
    pub fn push(&mut self, slice: &'b [u8]) -> bool {
        let Some(entry) = self.iovs.get_mut(self.used) else {
            return false;
        };
        *entry = iovec(slice);
        self.used += 1;
        true
    }

    /// Writes all slices with one `writev`.
    ///
    /// # Errors
    /// The kernel's; a TUN device takes a packet whole or not at all.
    pub fn write(self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let count = libc::c_int::try_from(self.used).unwrap_or(libc::c_int::MAX);
        // SAFETY: the first `used` vectors were filled by `push` from slices that live for 'b, which is not
        // over while `self` exists; the kernel only reads through them; `fd` is open by its type.
        let written = unsafe { libc::writev(fd.as_raw_fd(), self.iovs.as_ptr(), count) };
        usize::try_from(written).map_err(|_negative| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn slices_arrive_in_order_as_one_string() {
        let (writer, mut reader) = UnixStream::pair().unwrap();
        let mut gather = Gather::new();
        for _ in 0..2 {
            let mut gathered = gather.start();
            assert!(gathered.push(b"wa") && gathered.push(b"") && gathered.push(b"ter"));
            assert_eq!(gathered.write(writer.as_fd()).unwrap(), 5);
            let mut read = [0; 5];
            reader.read_exact(&mut read).unwrap();
            assert_eq!(&read, b"water");
        }
    }

    #[test]
    fn one_slice_too_many_is_refused() {
        let mut gather = Gather::new();
        let mut gathered = gather.start();
        assert!((0..MAX_SLICES).all(|_| gathered.push(b"x")));
        assert!(!gathered.push(b"x"));
    }
}
