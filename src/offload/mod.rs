//! Owns segmentation and coalescing as pure functions over byte slices. Never does I/O, never allocates
//! after construction, never panics whatever bytes it is given.
//!
//! Smallest to largest, one word each:
//!
//! * a **segment** is one packet produced from, or merged into, a superpacket;
//! * a **superpacket** is one buffer that holds several segments behind one header, up to 64 KiB;
//! * a **run** is several datagrams for one `UDP_SEGMENT` message;
//! * a **burst** is what one wake-up processes, and what [`coalesce::Coalescer`] and [`gso::Planner`] hold.
//!
//! Encap: [`vnet_hdr::VnetHdr::parse`], then [`split::Split`] (or [`split::finish_checksum`] for a plain
//! packet), then [`gso::Planner`]. Decap: [`unfinished`], then [`coalesce::Coalescer`], whose writes carry their
//! vnet header.

pub mod coalesce;
pub mod gso;
mod header;
pub mod split;
mod table;
pub mod unfinished;
pub mod vnet_hdr;

pub use header::HeaderError;
