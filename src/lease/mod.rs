//! Owns the lease model and the pure diff from snapshots and deltas to ordered changes. Never does I/O, never
//! reads a clock.
