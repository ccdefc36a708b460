//! Owns the lease model and the pure diff from snapshots and deltas to ordered changes. Never does I/O, never
//! reads a clock.

mod attrs;
mod key;
mod set;

use std::time::SystemTime;

pub use attrs::{AttrsError, BackendData, LeaseAttrs, MAX_ATTRS_LEN};
pub use key::{KeyError, Subnets};
pub use set::{Applied, LeaseChange, LeaseDelta, LeaseSet, Refusal, Refused};

/// The store's record that a node owns its subnets until an expiry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// What is leased; identifies the lease.
    pub subnets: Subnets,
    /// Who leases it, and how to reach it.
    pub attrs: LeaseAttrs,
    /// When the lease ends unless renewed, by the wall clock; `None` for a reservation, which never ends.
    ///
    /// Whoever schedules a renewal compares with the wall clock at least every minute: a clock that is stepped
    /// moves the due time.
    pub expires: Option<SystemTime>,
    /// What only peers that run this program publish.
    pub extension: LeaseExtension,
}

/// Facts about a node that flannel's lease has no field for. The default is what is assumed of a node that
/// publishes none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeaseExtension {
    /// The node decapsulates with the normal mode of RFC 6040, so that ECN may be set in the outer header.
    pub ecn: bool,
}

impl Lease {
    /// Whether a peer has to be programmed anew after the lease changed from `self` to `new`: anything but the
    /// expiry differs.
    #[must_use]
    pub fn differs(&self, new: &Self) -> bool {
        self.subnets != new.subnets || self.attrs != new.attrs || self.extension != new.extension
    }
}
