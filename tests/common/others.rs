//! Owns where tests find the programs that `scripts/setup --others` builds. Never builds one.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

use std::path::PathBuf;

/// A built program: `wireguard-go`, or `flannel` for the original daemon.
pub(crate) fn program(name: &str) -> PathBuf {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    let cache = set("LODEN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("loden")))
        .unwrap_or_else(|| set("HOME").unwrap().join(".cache/loden"));
    let path = cache.join("others").join(name);
    let shown = path.display();
    assert!(
        path.exists(),
        "{shown} is missing: run scripts/setup --others"
    );
    path
}
