//! Owns logging and its rate limits, metrics and health. Never decides what is worth a line.

pub mod health;
pub mod histogram;
pub mod log;
pub mod metrics;
pub mod rate_limit;
