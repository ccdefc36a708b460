//! Owns having a tunnel device that is what it should be: made, kept, or made anew. Never reuses one blindly, and
//! never takes one away that is somebody else's.

use super::desired::Device;
use super::kernel::{IpipLink, Kernel, KernelError, Link, NewTunnel, TunnelLink, VxlanLink};
use super::reconcile::{self, Outcome, reconcile};

/// How the original names its devices, before the VNI; specification section 8.2.
pub const NAME_V4: &str = "flannel.";

/// Likewise, for IPv6.
pub const NAME_V6: &str = "flannel-v6.";

/// How the original names its IPIP device; specification section 8.4. The kernel's own `tunl0`, which comes with the
/// module, stays whoever's it is: a device with a local address is asked before it (`ip_tunnel_lookup` in
/// net/ipv4/ip_tunnel.c).
pub const NAME_IPIP: &str = "flannel.ipip";

/// Why there is no device. Each text names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel has no such tunnels.
    #[error(
        "this kernel makes no {kind} devices ({source}): load the module (modprobe {module}; where it is missing, install \
         the kernel's extra modules, such as linux-modules-extra-$(uname -r))"
    )]
    Lacking {
        /// Of which kind.
        kind: &'static str,
        /// The kernel's module.
        module: &'static str,
        /// What it says.
        source: KernelError,
    },
    /// The name is taken by something else.
    #[error("{name} exists and is no {kind} device: remove it (ip link del {name})")]
    OfAnotherKind {
        /// The name.
        name: String,
        /// What it should be.
        kind: &'static str,
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
    /// Another device receives what ours would.
    #[error(
        "{other} is an IPIP device for all that comes to {local}: stop whatever it belongs to, and remove it \
         (ip link del {other})"
    )]
    LocalTaken {
        /// The other device.
        other: String,
        /// The address.
        local: std::net::Ipv4Addr,
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
        let why = match (&link.tunnel, &device.tunnel) {
            (Some(TunnelLink::Vxlan(is)), TunnelLink::Vxlan(wanted)) => incompatible(is, wanted),
            (Some(TunnelLink::Ipip(is)), TunnelLink::Ipip(wanted)) => incompatible_ipip(is, wanted),
            (Some(_) | None, wanted) => {
                return Err(DeviceError::OfAnotherKind {
                    name: device.name.clone(),
                    kind: names(wanted).0,
                });
            }
        };
        let Some(why) = why else {
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
            if !is_ours(kernel, &double, device).await? {
                return Err(taken(double.name, &device.tunnel));
            }
            tracing::info!(
                "device {} is made anew: it was renamed to {}",
                device.name,
                double.name
            );
            kernel.delete_link(double.index).await?;
            make(kernel, device).await?;
        }
        Err(source) if source.is_unsupported() => {
            let (kind, module) = names(&device.tunnel);
            return Err(DeviceError::Lacking {
                kind,
                module,
                source,
            });
        }
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
        mac: device.mac,
        learning: match device.tunnel {
            TunnelLink::Vxlan(vxlan) => Some(vxlan.learning),
            TunnelLink::Ipip(_) => None,
        },
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
    let new = NewTunnel {
        name: device.name.clone(),
        mac: device.mac,
        mtu: device.mtu,
        tunnel: device.tunnel,
    };
    kernel.add_tunnel(&new).await
}

/// What a device is called, and the kernel's module.
const fn names(tunnel: &TunnelLink) -> (&'static str, &'static str) {
    match tunnel {
        TunnelLink::Vxlan(_) => ("VXLAN", "vxlan"),
        TunnelLink::Ipip(_) => ("IPIP", "ipip"),
    }
}

/// The device that keeps ours from being made: the kernel has one per VNI, port and family of the underlay, or one for
/// all IPIP to an address.
async fn double(kernel: &impl Kernel, device: &Device) -> Result<Option<Link>, KernelError> {
    let is_v6 = |vxlan: &VxlanLink| vxlan.local.is_some_and(|ip| ip.is_ipv6());
    let key = |vxlan: &VxlanLink| (vxlan.vni, vxlan.port, is_v6(vxlan));
    let same = |link: &Link| match (&link.tunnel, &device.tunnel) {
        (Some(TunnelLink::Vxlan(is)), TunnelLink::Vxlan(wanted)) => key(is) == key(wanted),
        (Some(TunnelLink::Ipip(is)), TunnelLink::Ipip(wanted)) => {
            (is.local, is.remote) == (wanted.local, wanted.remote)
        }
        (Some(_) | None, _) => false,
    };
    Ok(kernel.links().await?.into_iter().find(same))
}

/// Whether a device with another name is ours, by the address that nobody else would have given it.
async fn is_ours(
    kernel: &impl Kernel,
    double: &Link,
    device: &Device,
) -> Result<bool, KernelError> {
    Ok(match device.mac {
        Some(mac) => double.mac == Some(mac),
        None => kernel.addresses(double.index).await?.contains(&device.addr),
    })
}

fn taken(other: String, tunnel: &TunnelLink) -> DeviceError {
    match tunnel {
        TunnelLink::Vxlan(vxlan) => DeviceError::Taken {
            other,
            vni: vxlan.vni,
            port: vxlan.port,
        },
        TunnelLink::Ipip(ipip) => DeviceError::LocalTaken {
            other,
            local: ipip.local.unwrap_or(std::net::Ipv4Addr::UNSPECIFIED),
        },
    }
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

/// Why an IPIP device cannot be used as it is.
fn incompatible_ipip(is: &IpipLink, wanted: &IpipLink) -> Option<String> {
    if is.local != wanted.local {
        let local = is
            .local
            .map_or_else(|| "any address".to_owned(), |ip| ip.to_string());
        Some(format!("it sends from {local}"))
    } else if let Some(remote) = is.remote {
        Some(format!("it receives from {remote} alone"))
    } else if is.extras {
        Some("it has options that ours has not".to_owned())
    } else {
        None
    }
}

/// Whether a link is one of the original's tunnel devices, or of ours, by name and kind.
#[must_use]
pub fn is_flannels(link: &Link) -> bool {
    match link.tunnel {
        Some(TunnelLink::Vxlan(_)) => is_vxlan_name(&link.name),
        Some(TunnelLink::Ipip(_)) => link.name == NAME_IPIP,
        None => false,
    }
}

/// Whether a link is named like one.
#[must_use]
pub fn is_name(name: &str) -> bool {
    name == NAME_IPIP || is_vxlan_name(name)
}

fn is_vxlan_name(name: &str) -> bool {
    let number = name
        .strip_prefix(NAME_V4)
        .or_else(|| name.strip_prefix(NAME_V6));
    number.is_some_and(|text| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()))
}
