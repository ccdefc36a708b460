//! Dispatches to the library and decides the exit code. Owns nothing else.

fn main() {}
