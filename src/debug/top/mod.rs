//! Owns `loden top`: what happens per second, from two of the daemon's answers, and how that is shown. Never
//! asks the daemon by itself, never touches a terminal.

pub mod rates;
pub mod view;

pub use rates::{Answer, Rates};
pub use view::{Order, View};
