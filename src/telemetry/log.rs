//! Owns the set-up of the log: lines on stderr. Never called by anything but `main`.

use std::io;

use tracing::Level;
use tracing_subscriber::EnvFilter;

/// Libraries that log what they return as an error, too. Ours says what it means and what to do.
const TALKATIVE: [&str; 2] = ["kube_client", "kube_runtime"];

/// Logs to stderr from now on: 0 info, 1 debug, 2 trace, 3 and more what the libraries trace, too. A second call
/// changes nothing.
pub fn init(verbosity: u8) {
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter(verbosity))
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(verbosity > 0);
    // Fails only if a log is set up already, and then that one is as good.
    let _already = subscriber.try_init();
}

/// What is logged. The libraries tell of every frame that they send, between which our reasons would not be found.
fn filter(verbosity: u8) -> EnvFilter {
    let (ours, theirs) = match verbosity {
        0 => (Level::INFO, Level::INFO),
        1 => (Level::DEBUG, Level::INFO),
        2 => (Level::TRACE, Level::INFO),
        3.. => (Level::TRACE, Level::TRACE),
    };
    let mut text = format!("{theirs},{}={ours}", env!("CARGO_CRATE_NAME"));
    for library in TALKATIVE.iter().filter(|_| verbosity < 3) {
        text.push_str(&format!(",{library}=off"));
    }
    EnvFilter::new(text)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged of one event at each level, ours and of a library, and of one of a talkative one.
    fn logged(verbosity: u8) -> Vec<String> {
        let log = Log::default();
        let to = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter(verbosity))
            .with_writer(move || to.clone())
            .without_time()
            .with_ansi(false);
        tracing::subscriber::with_default(subscriber.finish(), || {
            tracing::info!(target: "loden::daemon", "said");
            tracing::debug!(target: "loden::daemon", "said");
            tracing::trace!(target: "loden::daemon", "said");
            tracing::info!(target: "h2::client", "said");
            tracing::debug!(target: "h2::client", "said");
            tracing::trace!(target: "h2::client", "said");
            tracing::error!(target: "kube_client::client", "said");
        });
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let words = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().take(2).collect();
            words.join(" ")
        };
        text.lines().map(words).collect()
    }

    #[test]
    fn our_reasons_are_not_lost_among_those_of_the_libraries() {
        let info = ["INFO loden::daemon:", "INFO h2::client:"];
        let debug = [info[0], "DEBUG loden::daemon:", info[1]];
        let trace = [info[0], debug[1], "TRACE loden::daemon:", info[1]];
        assert_eq!(logged(0), info);
        assert_eq!(logged(1), debug);
        assert_eq!(logged(2), trace);
        assert_eq!(logged(3).len(), 7);
        assert_eq!(logged(255), logged(3));
    }
}
