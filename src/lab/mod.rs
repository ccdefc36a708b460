//! Network-namespace topologies for the demo, the benchmark, the tests and by hand: what a lab is made of
//! and how it is named, built, entered and removed. Never measures anything, and never touches a namespace,
//! a process or a file that does not carry a lab's own name.
//!
//! A *node* is a namespace with an underlay device `eth0` and a bridge `cni0`; a *pod* is a namespace behind
//! a veth pair on that bridge, as the CNI bridge plugin would make it:
//!
//! ```text
//!  pod n1p1                node n1                               node n2                pod n2p1
//! ┌─────────┐  veth  ┌────────────────────┐  the wire (veth) ┌────────────────────┐  veth  ┌─────────┐
//! │ eth0 .2 ├────────┤ p1 cni0 .1    eth0 ├──────────────────┤ eth0    cni0 .1 p1 ├────────┤ eth0 .2 │
//! └─────────┘        └────────────────────┘                  └────────────────────┘        └─────────┘
//! ```
//!
//! With more than two nodes the wires meet in a bridge in a namespace of its own. Underlay addresses are
//! 192.0.2.N/24 and 2001:db8::N/64, the overlay network is 198.18.0.0/16, and nothing leads out of a lab.
//!
//! [`Lab::build`] is the entry point. A [`Lab`] removes itself when dropped unless [`Lab::detach`]ed;
//! [`teardown::down`] removes what an earlier program left, found by its name.
//!
//! | Module | Owns |
//! |---|---|
//! | [`spec`] | what to build: names, wires, backends (pure) |
//! | [`plan`] | addresses and the text of the `ip` batches (pure) |
//! | [`build`] | [`Lab`]: the order of building |
//! | [`agent`] | the daemons of a `udp` lab and the files they share |
//! | `wireguard` | wireguard-go and its configuration |
//! | [`teardown`] | removal, and finding what was left |
//! | [`netns`] | entering a namespace from safe code |
//! | [`process`] | processes that are only ended when they are still themselves |
//! | [`command`] | `ip`, `bridge` and `ethtool` as argument vectors |
//! | [`wait`] | the bounded condition waits, and interruption by a signal |

pub mod agent;
pub mod build;
pub mod command;
mod error;
pub mod netns;
pub mod plan;
pub mod process;
pub mod spec;
mod state;
pub mod teardown;
pub mod wait;
mod wireguard;
mod wiring;

pub use build::Lab;
pub use error::Error;
pub use netns::NetNs;
pub use spec::{Backend, Dialect, Engine, LabName, Member, Spec, Store, Wire};
pub use state::{Layout, PodRecord, RUN_DIR};
pub use wait::Interrupt;
