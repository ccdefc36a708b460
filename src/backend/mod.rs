//! Owns the ways in which packets cross the underlay: what each needs from the kernel, and how the kernel is
//! brought there. Reaches the kernel only through [`kernel::Kernel`].

pub mod kernel;
pub mod preflight;
pub mod reconcile;
pub mod udp;

#[cfg(test)]
pub(crate) mod fake;
