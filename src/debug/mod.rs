//! Owns what an operator sees of a running daemon: the status socket. Never changes anything.

pub mod socket;
