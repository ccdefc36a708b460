//! Owns the ways in which packets cross the underlay: what each needs from the kernel, and how the kernel is
//! brought there. Reaches the kernel only through [`kernel::Kernel`].

pub mod abilities;
pub mod data_plane;
pub mod desired;
pub mod device;
pub mod diff;
pub mod ends;
pub mod host_gw;
pub mod ipip;
pub mod kernel;
mod on_link;
pub mod outside;
pub mod plan;
pub mod preflight;
pub mod reconcile;
pub mod settle;
pub mod udp;
pub mod vxlan;

#[cfg(test)]
pub(crate) mod fake;
