//! Owns the node's traffic rules: masquerading, forwarding, and keeping the tunnel out of connection tracking,
//! in the chains and tables that flannel uses. Never touches a rule, chain or table of anyone else, and never
//! removes its own when the daemon ends.
//!
//! [`Rules`] says what should be in place and is pure. [`Firewall`] compares it with what the kernel has and
//! changes the difference, each table in one transaction; [`Keeper`] does so again whenever somebody changes
//! the ruleset. [`remove`] takes out everything that any of this ever made, whichever program made it.
//!
//! Two programs can hold the rules, as flannel's `EnableNFTables` chooses:
//!
//! | | nftables | iptables |
//! |---|---|---|
//! | masquerade | chain `postrtg` of `flannel-ipv4`, `flannel-ipv6` | chain `FLANNEL-POSTRTG` of `nat` |
//! | forward | chain `forward` of the same tables | chain `FLANNEL-FWD` of `filter` |
//! | tunnel untracked | table `inet loden-notrack` | chain `LODEN-NOTRACK` of `raw` |
//! | senders to the kernel's VXLAN | table `inet loden-vxlan-VNI` | likewise in nftables |
//! | senders to the kernel's IPIP | table `inet loden-ipip` | likewise in nftables |
//!
//! The first two rows are flannel's, to the byte as `iptables -S` and `nft list chain` show them; the others are
//! ours. In nftables an `accept` does not overrule a drop in another table, so there the forward rules cannot
//! open a node whose own policy is to drop; in iptables they can.

mod admission;
mod error;
mod iptables;
mod keeper;
mod kernel_events;
mod nft;
mod rules;
mod senders;
mod tool;
mod variant;

mod apply;

pub use admission::{Admission, Arrival, Refusal};
pub use apply::{Applied, Firewall, Removed, remove};
pub use error::{Difference, Error, What};
pub use keeper::{Keeper, KeeperStatus, ResyncInterval};
pub use rules::{Family, FamilyRules, Masquerade, Notrack, Rules, Underlay};
pub use senders::{
    Scope as SenderScope, SenderCheck, SenderStatus, Senders, TableOf, Tunnel, TunnelKind,
    sweep as sweep_senders,
};
pub use variant::{Flavor, Mode};
