//! Owns what an operator sees of a running daemon: the status socket and what comes out of it. Never changes
//! anything.

pub mod doctor;
pub mod end;
pub mod order;
pub mod pcapng;
pub mod socket;
pub mod stream;
pub mod top;
pub mod watch;
