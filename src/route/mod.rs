//! Owns the forwarding table the workers read and how a new one is published. Never does I/O, never reads a
//! clock.

pub mod fib;
pub mod publish;

pub use fib::Fib;
pub use publish::{Publisher, Reader};
