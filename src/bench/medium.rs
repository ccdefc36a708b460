//! Owns what lies between the two ends: one of a lab's wires, or a network of one's own. Pure.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::lab::Wire;

/// What figures are taken over. Those of different media do not compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Medium {
    /// A lab's [`Wire::Superpacket`].
    Superpacket,
    /// A lab's [`Wire::Packet`].
    Packet,
    /// A lab's [`Wire::PacketNoGro`].
    PacketNoGro,
    /// Whatever is between this machine and the other.
    Machines,
}

impl Medium {
    /// What to know of it when reading figures.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Superpacket => {
                "A plain veth pair: superpackets cross it whole, so what is copied per byte decides."
            }
            Self::Packet => {
                "Segmentation off and GRO on at both ends, as a physical NIC behaves: what is done per packet decides."
            }
            Self::PacketNoGro => {
                "As the packet wire, but without GRO: only what a program gathers by itself helps."
            }
            Self::Machines => {
                "Two machines and what is between them. Processor time and context switches of the machine are those \
                 of both together."
            }
        }
    }
}

impl From<Wire> for Medium {
    fn from(wire: Wire) -> Self {
        match wire {
            Wire::Superpacket => Self::Superpacket,
            Wire::Packet => Self::Packet,
            Wire::PacketNoGro => Self::PacketNoGro,
        }
    }
}

/// As it stands in a sentence.
impl fmt::Display for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Superpacket => "superpacket wire",
            Self::Packet => "packet wire",
            Self::PacketNoGro => "packet-no-gro wire",
            Self::Machines => "network between the machines",
        })
    }
}
