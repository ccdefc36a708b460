//! Owns the set-up of the log: lines on stderr. Never called by anything but `main`.

use std::io;

use tracing::Level;

/// Logs to stderr from now on: 0 info, 1 debug, 2 and more trace. A second call changes nothing.
pub fn init(verbosity: u8) {
    let level = match verbosity {
        0 => Level::INFO,
        1 => Level::DEBUG,
        2.. => Level::TRACE,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(verbosity > 0);
    // Fails only if a log is set up already, and then that one is as good.
    let _already = subscriber.try_init();
}
