//! Owns why a data plane cannot be opened, with the remedy for each errno that has one. Never decides what to do
//! about it.

use std::io;
use std::net::SocketAddr;

/// Why the data plane could not be opened. Each message names the missing thing and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon in this network namespace holds the name, the port or the device.
    #[error(
        "{what} is already in use by another daemon in this network namespace (pid {pid}): stop it first"
    )]
    Locked {
        /// `device flannel0`, `port 192.0.2.1:8285`.
        what: String,
        /// The holder, where known (0 otherwise).
        pid: i32,
    },
    /// The address and port cannot be had.
    #[error("cannot bind {bind}: {source}{remedy}", remedy = bind_remedy(source))]
    Bind {
        /// The address and port.
        bind: SocketAddr,
        /// The kernel's error.
        source: io::Error,
    },
    /// No `/dev/net/tun`.
    #[error(
        "cannot open /dev/net/tun: {0}: load the tun module (modprobe tun), and give the container the device"
    )]
    NoTun(io::Error),
    /// The device could not be created.
    #[error("cannot create TUN device {device}: {source}{remedy}", remedy = device_remedy(source))]
    Device {
        /// The name asked for.
        device: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// Any other step.
    #[error("cannot set up the data plane: {step}: {source}")]
    Step {
        /// What was being done.
        step: String,
        /// The kernel's error.
        source: io::Error,
    },
}

impl OpenError {
    /// A TUN device that could not be created.
    pub(super) fn device(template: &str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::EACCES) => Self::NoTun(source),
            _ => Self::Device {
                device: template.to_owned(),
                source,
            },
        }
    }
}

/// What every descriptor of the data plane needs.
const FILES: &str = ": raise the limit on open files (ulimit -n, LimitNOFILE)";

/// What helps when an address and a port cannot be had.
fn bind_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => ": stop what holds the port (ss -ulnp) or set Backend.Port",
        Some(libc::EADDRNOTAVAIL) => {
            ": give this node the address (ip address), or name an interface that has one with --iface"
        }
        Some(libc::EACCES | libc::EPERM) => {
            ": grant CAP_NET_BIND_SERVICE for a port below 1024, or set Backend.Port"
        }
        Some(libc::EMFILE | libc::ENFILE) => FILES,
        _ => "",
    }
}

/// What helps when a device cannot be created.
fn device_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => ": run as root or with CAP_NET_ADMIN",
        Some(libc::EBUSY | libc::EINVAL) => ": remove what has a device of this name (ip -d link)",
        Some(libc::EMFILE | libc::ENFILE) => FILES,
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_has_the_remedy_that_helps_and_an_unknown_one_has_none() {
        let bind = "192.0.2.1:8285".parse().unwrap();
        let bound = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            OpenError::Bind { bind, source }.to_string()
        };
        for (errno, remedy) in [
            (libc::EADDRINUSE, "ss -ulnp"),
            (libc::EADDRNOTAVAIL, "--iface"),
            (libc::EACCES, "CAP_NET_BIND_SERVICE"),
            (libc::EMFILE, "ulimit -n"),
        ] {
            assert!(bound(errno).contains(remedy), "{}", bound(errno));
        }
        assert!(bound(libc::ENOMEM).ends_with("(os error 12)"));

        let made =
            |errno| OpenError::device("flannel%d", io::Error::from_raw_os_error(errno)).to_string();
        for (errno, remedy) in [
            (libc::EPERM, "CAP_NET_ADMIN"),
            (libc::EBUSY, "ip -d link"),
            (libc::ENFILE, "ulimit -n"),
            (libc::ENOENT, "modprobe tun"),
        ] {
            assert!(made(errno).contains(remedy), "{}", made(errno));
        }
        assert!(made(libc::ENOMEM).ends_with("(os error 12)"));
    }
}
