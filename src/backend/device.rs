//! Owns having a VXLAN device that is what it should be: made, kept, or made anew. Never reuses one blindly, and
//! never takes one away that is somebody else's.

use super::desired::Device;
use super::kernel::{Kernel, KernelError, Link, NewVxlan, VxlanLink};
use super::reconcile::{self, Outcome, reconcile};

/// How the original names its devices, before the VNI; specification section 8.2.
pub const NAME_V4: &str = "flannel.";

/// Likewise, for IPv6.
pub const NAME_V6: &str = "flannel-v6.";

/// Why there is no device. Each text names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel has no VXLAN.
    #[error(
        "this kernel makes no VXLAN devices ({0}): load the module (modprobe vxlan; where it is missing, install \
         the kernel's extra modules, such as linux-modules-extra-$(uname -r))"
    )]
    NoVxlan(KernelError),
    /// The name is taken by something else.
    #[error("{name} exists and is not a VXLAN device: remove it (ip link del {name})")]
    NotVxlan {
        /// The name.
        name: String,
    },
    /// Another device has the VNI.
    #[error(
        "{other} has VNI {vni} on UDP port {port}: remove it (ip link del {other}), or choose another Backend.VNI \
         for all nodes"
    )]
    Taken {
        /// The other device.
        other: String,
        /// The VNI.
        vni: u32,
        /// The port.
        port: u16,
    },
    /// It was there, and is not.
    #[error("device {0} vanished while it was configured: find out who removes it")]
    Vanished(String),
    /// The kernel refuses.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// A device that is there.
#[derive(Debug)]
pub struct Present {
    /// As it was found or made.
    pub link: Link,
    /// It was made now.
    pub made: bool,
}

/// Makes sure that the device exists with the attributes that cannot be changed later.
///
/// # Errors
///
/// It cannot be.
pub async fn ensure(kernel: &impl Kernel, device: &Device) -> Result<Present, DeviceError> {
    let vanished = || DeviceError::Vanished(device.name.clone());
    if let Some(link) = kernel.link(&device.name).await? {
        let Some(vxlan) = link.vxlan else {
            let name = device.name.clone();
            return Err(DeviceError::NotVxlan { name });
        };
        let Some(why) = incompatible(&vxlan, &device.vxlan) else {
            return Ok(Present { link, made: false });
        };
        tracing::info!("device {} is made anew: {why}", device.name);
        kernel.delete_link(link.index).await?;
    }
    match make(kernel, device).await {
        Err(error) if error.is_taken() => {
            let double = double(kernel, device).await?;
            let double = double.ok_or_else(|| DeviceError::from(error))?;
            // Our address on it says that somebody has renamed ours.
            if double.mac != Some(device.mac) {
                return Err(DeviceError::Taken {
                    other: double.name,
                    vni: device.vxlan.vni,
                    port: device.vxlan.port,
                });
            }
            tracing::info!(
                "device {} is made anew: it was renamed to {}",
                device.name,
                double.name
            );
            kernel.delete_link(double.index).await?;
            make(kernel, device).await?;
        }
        Err(error) if error.is_unsupported() => return Err(DeviceError::NoVxlan(error)),
        made => made?,
    }
    let link = kernel.link(&device.name).await?.ok_or_else(vanished)?;
    Ok(Present { link, made: true })
}

/// Brings an existing device's changeable attributes and its address to what they should be; returns what was
/// changed.
///
/// # Errors
///
/// The kernel refuses, or the device is gone.
pub async fn configure(
    kernel: &impl Kernel,
    index: u32,
    device: &Device,
    networks: &[ipnet::IpNet],
) -> Result<Vec<reconcile::Action>, DeviceError> {
    let desired = reconcile::Desired {
        mtu: device.mtu,
        tx_queue_len: 0,
        mac: Some(device.mac),
        learning: Some(device.vxlan.learning),
        addrs: vec![device.addr],
        networks: networks.to_vec(),
        routed: Vec::new(),
    };
    match reconcile(kernel, index, &desired).await? {
        Outcome::Gone => Err(DeviceError::Vanished(device.name.clone())),
        Outcome::Done(actions) => Ok(actions),
    }
}

async fn make(kernel: &impl Kernel, device: &Device) -> Result<(), KernelError> {
    let new = NewVxlan {
        name: device.name.clone(),
        mac: device.mac,
        mtu: device.mtu,
        vxlan: device.vxlan,
    };
    kernel.add_vxlan(&new).await
}

/// The device that keeps ours from being made: the kernel has one per VNI, port and family of the underlay.
async fn double(kernel: &impl Kernel, device: &Device) -> Result<Option<Link>, KernelError> {
    let wanted = &device.vxlan;
    let is_v6 = |vxlan: &VxlanLink| vxlan.local.is_some_and(|ip| ip.is_ipv6());
    let same = |link: &Link| {
        link.vxlan.is_some_and(|vxlan| {
            (vxlan.vni, vxlan.port, is_v6(&vxlan)) == (wanted.vni, wanted.port, is_v6(wanted))
        })
    };
    Ok(kernel.links().await?.into_iter().find(same))
}

/// Why a device cannot be used as it is; specification section 8.2, and what is changed in place does not count.
fn incompatible(is: &VxlanLink, wanted: &VxlanLink) -> Option<String> {
    if is.vni != wanted.vni {
        Some(format!("it has VNI {}", is.vni))
    } else if is.port != wanted.port {
        Some(format!("it uses UDP port {}", is.port))
    } else if is.link != wanted.link {
        Some(format!("it sends by link number {}", is.link))
    } else if is.local != wanted.local {
        let local = is
            .local
            .map_or_else(|| "any address".to_owned(), |ip| ip.to_string());
        Some(format!("it sends from {local}"))
    } else if is.gbp != wanted.gbp {
        Some("its Group Based Policy differs".to_owned())
    } else if is.extras {
        Some("it has a group, a default remote or upcalls".to_owned())
    } else {
        None
    }
}

/// Whether a link is one of the original's VXLAN devices, or of ours, by name and kind.
#[must_use]
pub fn is_flannels(link: &Link) -> bool {
    is_name(&link.name) && link.vxlan.is_some()
}

/// Whether a link is named like one.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let number = name
        .strip_prefix(NAME_V4)
        .or_else(|| name.strip_prefix(NAME_V6));
    number.is_some_and(|text| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()))
}
