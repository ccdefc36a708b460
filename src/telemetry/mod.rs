//! Owns logging and its rate limits. Never decides what is worth a line.

pub mod log;
pub mod rate_limit;
