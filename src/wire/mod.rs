//! Owns how headers look on the wire: views over `&[u8]`, checksums. Never does I/O, allocates or
//! uses
//! `unsafe`.

pub mod checksum;
