//! Owns the wish to end: SIGTERM and SIGINT, once. Never ends anything itself.
//!
//! The signals are blocked in every thread but awaited in one of ours, so no handler is ever installed.
//! After the first, that thread unblocks them and stays: the second one has the kernel's default effect and
//! ends the process at once, whatever the rest is doing (flannel specification section 1.7).

use std::io;
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use tokio::sync::oneshot;

/// Receives the first SIGTERM or SIGINT.
#[derive(Debug)]
pub struct Shutdown {
    first: oneshot::Receiver<Signal>,
}

impl Shutdown {
    /// Blocks the signals in this thread. Call it before any other thread is started: threads inherit the mask,
    /// and one that does not block them would take the default effect at the first.
    ///
    /// # Errors
    ///
    /// No thread can be started.
    pub fn install() -> io::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.thread_block()?;
        let (sender, first) = oneshot::channel();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || wait(set, sender))?;
        Ok(Self { first })
    }

    /// Whether it has come, without waiting.
    pub fn is_requested(&mut self) -> bool {
        self.first.try_recv().is_ok()
    }

    /// Waits for the first signal.
    ///
    /// # Errors
    ///
    /// The kernel refuses to wait for signals.
    pub async fn requested(&mut self) -> io::Result<Signal> {
        (&mut self.first)
            .await
            .map_err(|_closed| io::Error::other("the thread that waits for signals ended"))
    }
}

fn wait(set: SigSet, sender: oneshot::Sender<Signal>) {
    let Ok(signal) = set.wait() else { return };
    // Unblocked before it is told: whoever is told may count on the second signal.
    if set.thread_unblock().is_ok() && sender.send(signal).is_ok() {
        loop {
            thread::park();
        }
    }
}
