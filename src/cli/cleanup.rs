//! Owns `loden cleanup`: removes the traffic rules, devices and routes that a daemon, ours or flannel's, leaves behind
//! on purpose. Never touches anything else.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::Context as _;

use super::daemon::search_path;
use crate::backend::settle;
use crate::firewall;
use crate::netlink::Netlink;

/// Removes every chain and table of ours, every route that is marked as ours and every VXLAN device that is named like
/// flannel's, and says which. A daemon that runs would only put them back.
pub(super) fn run() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let (removed, (entries, refused)) = runtime.block_on(async {
        let kernel = Netlink::connect()?;
        let removed = firewall::remove(search_path()).await;
        anyhow::Ok((removed, settle::remove(&kernel).await))
    })?;
    let mut text = String::new();
    let mut errors: Vec<String> = removed.errors.iter().map(ToString::to_string).collect();
    errors.extend(refused.iter().map(ToString::to_string));
    let places: Vec<String> = removed.places.iter().map(ToString::to_string).collect();
    for place in places.iter().chain(&entries) {
        writeln!(text, "removed {place}")?;
    }
    if text.is_empty() && errors.is_empty() {
        text.push_str("nothing to remove\n");
    }
    std::io::stdout()
        .lock()
        .write_all(text.as_bytes())
        .context("cannot write to standard output")?;
    anyhow::ensure!(
        errors.is_empty(),
        "not all is removed: {}",
        errors.join("; ")
    );
    Ok(())
}
