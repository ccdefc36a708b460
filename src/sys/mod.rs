//! Owns every `unsafe` block of the program: system calls that no safe library covers in the shape the packet
//! path needs, and SIMD. Takes borrowed descriptors and slices, returns owned descriptors and `io::Result`.
//! Never decides policy.

pub mod ethtool;
pub mod fd;
pub mod heap;
pub mod iov;
pub mod mmsg;
pub mod packet;
pub mod simd;
pub mod socket;
pub mod tun;
