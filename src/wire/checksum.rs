//! Owns the Internet checksum (RFC 1071) and its incremental update (RFC 1624). Never touches a packet's
//! layout.

/// Sums a byte string as big-endian 16-bit words in one's-complement arithmetic, an odd last byte padded with
/// zero, folded to 16 bits and *not* inverted. `sys::simd::sum()` returns the fastest one this CPU has.
pub type SumFn = fn(&[u8]) -> u16;
