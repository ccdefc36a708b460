//! (stub)
/// Placeholder
pub struct LocalStore;
