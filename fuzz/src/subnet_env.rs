//! Feeds arbitrary text to the reader of an earlier `subnet.env`.

use loden::store::env_file::PreviousEnv;

/// Parses `data`.
///
/// # Panics
///
/// If subnets are proposed that the file does not list.
pub fn run(data: &[u8]) {
    let env = PreviousEnv::parse(&String::from_utf8_lossy(data));
    if let Some(previous) = env.previous() {
        assert_eq!(previous.v4().as_slice(), env.subnets);
        assert_eq!(previous.v6().as_slice(), env.ipv6_subnets);
    }
}
