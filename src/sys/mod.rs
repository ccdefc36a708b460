//! Owns the boundary to the kernel and the CPU: the only place with `unsafe`. Never decides what to
//! send where.

pub mod simd;
