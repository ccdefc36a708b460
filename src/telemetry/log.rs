//! Owns the set-up of the log: lines on stderr. Never called by anything but `main`.

use std::io;

use tracing::Level;
use tracing_subscriber::EnvFilter;

/// Libraries that log what they return as an error, too. Ours says what it means and what to do.
const TALKATIVE: [&str; 2] = ["kube_client", "kube_runtime"];

/// Logs to stderr from now on: 0 info, 1 debug, 2 and more trace. A second call changes nothing.
pub fn init(verbosity: u8) {
    let level = match verbosity {
        0 => Level::INFO,
        1 => Level::DEBUG,
        2.. => Level::TRACE,
    };
    let mut filter = EnvFilter::default().add_directive(level.into());
    for library in TALKATIVE.iter().filter(|_| verbosity == 0) {
        filter = filter.add_directive(format!("{library}=off").parse().unwrap_or(level.into()));
    }
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(verbosity > 0);
    // Fails only if a log is set up already, and then that one is as good.
    let _already = subscriber.try_init();
}
