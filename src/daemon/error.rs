//! Owns why the daemon ends by itself. Never decides that it does.

use std::io;
use std::net::SocketAddr;

use super::extension::CommandError;
use super::lock::LockError;
use crate::backend::device::DeviceError;
use crate::backend::kernel::KernelError;
use crate::backend::plan::PlanError;
use crate::backend::preflight::Conflict;
use crate::datapath::OpenError;
use crate::file::FileError;
use crate::iface::NoInterface;
use crate::store::StoreError;
use crate::store::etcd::EtcdSettingsError;
use crate::store::kube::KubeSettingsError;

/// Why the daemon ended by itself. Each text names the missing thing and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another daemon, or no place for the subnet file.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The process itself cannot be set up.
    #[error("cannot {action}: {source}")]
    Process {
        /// What was tried.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The kernel refuses to configure the network.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The network configuration is not valid, or no lease can be asked for.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The options for etcd contradict each other, or name files that cannot be read.
    #[error(transparent)]
    Etcd(#[from] EtcdSettingsError),
    /// The options for Kubernetes, or the credentials for it, cannot be used.
    #[error(transparent)]
    Kube(#[from] KubeSettingsError),
    /// The traffic rules that were asked for cannot be put in place.
    #[error("traffic rules: {0}")]
    Firewall(String),
    /// Nobody can ask about health.
    #[error(
        "cannot answer about health on {addr}: {source}: give another --healthz-ip or --healthz-port"
    )]
    Health {
        /// Where.
        addr: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// There is no external interface.
    #[error(transparent)]
    Interface(#[from] NoInterface),
    /// The backend cannot be run on this node.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A device that the backend needs cannot be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The kernel has no VXLAN, and nothing else may do its work.
    #[error("{0}, or let --vxlan auto carry the packets in user space")]
    NoVxlan(DeviceError),
    /// Another daemon in this network namespace has the device that ours would have.
    #[error(
        "another daemon (pid {pid}) has the device {name} of this node: stop it, or, where that is a VXLAN device, give one \
         of the two networks another Backend.VNI"
    )]
    DeviceHeld {
        /// The device.
        name: String,
        /// The other daemon.
        pid: i32,
    },
    /// A command of the `extension` backend did not do what it was to.
    #[error(transparent)]
    Extension(#[from] CommandError),
    /// Something on the node rules the overlay out.
    #[error("{0}")]
    Conflict(Conflict),
    /// The data plane cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The data plane's device vanished while it was configured.
    #[error("device {0} vanished while it was configured: find out who removes it")]
    DeviceVanished(String),
    /// A worker could not be started.
    #[error("cannot start the workers: {0}: raise the limit on threads (ulimit -u, pids.max)")]
    Workers(io::Error),
    /// `subnet.env` cannot be written or read.
    #[error(
        "{0}: make it a writable regular file, with room to write it, or give another --subnet-file"
    )]
    EnvFile(#[from] FileError),
}
