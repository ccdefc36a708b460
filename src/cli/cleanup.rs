//! Owns `loden cleanup`: removes the traffic rules that a daemon, ours or flannel's, leaves behind on purpose.
//! Never touches anything else.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::Context as _;

use super::daemon::search_path;
use crate::firewall;

/// Removes every chain and table of ours, and says which.
pub(super) fn run() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let removed = runtime.block_on(firewall::remove(search_path()));
    let mut text = String::new();
    for place in &removed.places {
        writeln!(text, "removed {place}")?;
    }
    if removed.places.is_empty() && removed.errors.is_empty() {
        text.push_str("nothing to remove\n");
    }
    std::io::stdout()
        .lock()
        .write_all(text.as_bytes())
        .context("cannot write to standard output")?;
    let errors: Vec<String> = removed.errors.iter().map(ToString::to_string).collect();
    anyhow::ensure!(
        errors.is_empty(),
        "not all is removed: {}",
        errors.join("; ")
    );
    Ok(())
}
