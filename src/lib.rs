//! loden: a flannel-compatible overlay network whose own data plane is the point.
//!
//! # The packet path
//!
//! *Encap* (TUN to underlay): a worker reads superpackets from its TUN queue, validates them, decrements the
//! TTL, looks the destination up in the [`route::Fib`], describes one segment per MTU-sized packet, groups
//! segments into runs and hands the runs to the kernel with one `sendmmsg` per source socket.
//! [`datapath::encap`] is that path, top to bottom.
//!
//! *Decap* (underlay to TUN): a worker receives a burst of datagrams (each possibly a GRO buffer of many),
//! checks their source against the leases, decrements the TTL, coalesces neighbours of one flow into
//! superpackets and writes those to the TUN. [`datapath::decap`] is that path.
//!
//! Every packet read is sent, answered, dropped with a [`datapath::DropReason`], or still queued.
//!
//! # Layers
//!
//! [`wire`], [`offload`], [`route`] and [`lease`] are pure: no sockets, no `libc`, no `tokio`, no clock, no
//! logger. [`sys`] is the only module with `unsafe`. [`datapath`] never imports `tokio`, [`store`] or
//! [`backend`]. `scripts/check-layers` enforces all of it.

pub mod addr;
pub mod backend;
pub mod bench;
pub mod cli;
pub mod cni;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod debug;
pub mod file;
pub mod firewall;
pub mod iface;
pub mod lab;
pub mod lease;
pub mod netlink;
pub mod offload;
pub mod probe;
pub mod route;
pub mod shutdown;
pub mod store;
pub mod sys;
pub mod telemetry;
pub mod tun;
pub mod underlay;
pub mod wire;
