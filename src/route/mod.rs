//! Owns the forwarding table the workers read and how a new one is published. Never does I/O.
