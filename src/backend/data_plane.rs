//! Owns what a backend asks of our own data plane: one description per tunnel. Plain values; the daemon opens them.

use std::net::SocketAddr;

use super::reconcile;
use crate::addr::Mtu;
use crate::datapath::{Encapsulation, Local, SourceCheck, SourcePort};

/// A tunnel of ours and its device.
#[derive(Debug, Clone)]
pub struct DataPlane {
    /// How packets stand in datagrams.
    pub encapsulation: Encapsulation,
    /// Where peers reach us.
    pub bind: SocketAddr,
    /// What pods may send.
    pub mtu: Mtu,
    /// Which packets are accepted.
    pub source_check: SourceCheck,
    /// Which ports datagrams are sent from.
    pub source_port: SourcePort,
    /// What is on this node.
    pub local: Local,
    /// What the TUN device should look like.
    pub device: reconcile::Desired,
}
