//! Owns segmentation and coalescing as pure functions over byte slices. Never does I/O.
