//! Owns what a Node object means: its subnets, and whether and as whom it takes part. Pure.

use std::fmt;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;

use super::annotations::{Annotations, Wrong};
use crate::addr::OverlayPrefix;
use crate::config::{NetworkConfig, SubnetPool};
use crate::lease::{Lease, LeaseExtension, Subnets};

/// What is wrong with a Kubernetes node. Costs only that node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeFault {
    /// It has no subnet.
    #[error(
        "pod cidr not assigned: start kube-controller-manager with --allocate-node-cidrs=true and \
         --cluster-cidr={networks}, or set spec.podCIDR yourself"
    )]
    NoPodCidr {
        /// What the network configuration says.
        networks: String,
    },
    /// More subnets than families.
    #[error("spec.podCIDRs has {count} entries: pod cidrs should be IPv4/IPv6 only or dualstack")]
    PodCidrs {
        /// How many.
        count: usize,
    },
    /// A subnet that is none.
    #[error("spec.podCIDRs: {found:?} is not a subnet: expected one like 10.244.1.0/24")]
    PodCidr {
        /// The text.
        found: String,
    },
    /// A subnet that lies elsewhere.
    #[error(
        "subnet {network} specified in the flannel net config doesn't contain {subnet} PodCIDR of the node: \
         make Network in net-conf.json the --cluster-cidr of kube-controller-manager"
    )]
    Outside {
        /// The network.
        network: String,
        /// The node's subnet.
        subnet: String,
    },
    /// An annotation that is not usable.
    #[error(transparent)]
    Annotation(#[from] Wrong),
    /// Another node was there before.
    #[error(
        "its pod CIDR {subnets} is that of node {owner}, which was there before: give every node its own"
    )]
    Claimed {
        /// What both claim.
        subnets: Subnets,
        /// Who keeps it.
        owner: String,
    },
}

/// How a node takes part in the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// Not at all: it is not flannel's, or not yet.
    None,
    /// It would, but for this.
    Refused(NodeFault),
    /// With this lease.
    Member(Lease),
}

/// A node, as far as it matters. Ordered by age.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) created: Option<Timestamp>,
    pub(super) standing: Standing,
}

/// The subnets of a Node, one of each family at most.
fn pod_cidrs(node: &Node) -> Result<(Option<Ipv4Net>, Option<Ipv6Net>), NodeFault> {
    let spec = node.spec.as_ref();
    let many = spec.and_then(|spec| spec.pod_cidrs.as_deref());
    let one = spec.and_then(|spec| spec.pod_cidr.as_deref());
    let texts: Vec<&str> = match many {
        Some(many) if !many.is_empty() => many.iter().map(String::as_str).collect(),
        _ => one.into_iter().filter(|text| !text.is_empty()).collect(),
    };
    if texts.len() > 2 {
        let count = texts.len();
        return Err(NodeFault::PodCidrs { count });
    }
    let (mut v4, mut v6) = (None, None);
    for text in texts {
        match text.parse() {
            Ok(IpNet::V4(net)) => v4 = Some(net),
            Ok(IpNet::V6(net)) => v6 = Some(net),
            Err(_any) => {
                let found = text.chars().take(64).collect();
                return Err(NodeFault::PodCidr { found });
            }
        }
    }
    Ok((v4, v6))
}

/// The subnets of a Node in the families that the network has.
pub(super) fn subnets(node: &Node, config: &NetworkConfig) -> Result<Subnets, NodeFault> {
    let (v4, v6) = pod_cidrs(node)?;
    let v4 = inside(v4, config.ipv4.as_ref())?;
    let v6 = inside(v6, config.ipv6.as_ref())?;
    Subnets::new(v4, v6).ok_or_else(|| NodeFault::NoPodCidr {
        networks: networks(config),
    })
}

fn inside<N: OverlayPrefix>(
    subnet: Option<N>,
    pool: Option<&SubnetPool<N>>,
) -> Result<Option<N>, NodeFault> {
    let (Some(subnet), Some(pool)) = (subnet, pool) else {
        return Ok(None);
    };
    let network = pool.network();
    if network.holds(&subnet) {
        return Ok(Some(subnet));
    }
    Err(NodeFault::Outside {
        network: network.to_string(),
        subnet: subnet.to_string(),
    })
}

fn networks(config: &NetworkConfig) -> String {
    fn text(network: Option<impl fmt::Display>) -> Option<String> {
        network.map(|network| network.to_string())
    }
    let v4 = text(config.ipv4.as_ref().map(SubnetPool::network));
    let v6 = text(config.ipv6.as_ref().map(SubnetPool::network));
    let all: Vec<String> = v4.into_iter().chain(v6).collect();
    all.join(",")
}

impl Known {
    pub(super) fn new(node: &Node, annotations: &Annotations, config: &NetworkConfig) -> Self {
        let read = || {
            let texts = node.metadata.annotations.as_ref();
            let Some(texts) = texts.filter(|texts| annotations.is_member(texts)) else {
                return Ok(Standing::None);
            };
            Ok(Standing::Member(Lease {
                subnets: subnets(node, config)?,
                attrs: annotations.read(texts)?,
                expires: None,
                extension: LeaseExtension::default(),
            }))
        };
        let created = node.metadata.creation_timestamp.as_ref();
        Self {
            created: created.map(|time| time.0),
            standing: read().unwrap_or_else(Standing::Refused),
        }
    }

    pub(super) const fn lease(&self) -> Option<&Lease> {
        match &self.standing {
            Standing::Member(lease) => Some(lease),
            Standing::None | Standing::Refused(_) => None,
        }
    }
}

/// What the node's condition says of its network: `Some(true)` for unavailable.
pub(super) fn network_unavailable(node: &Node) -> Option<bool> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    let condition = conditions
        .iter()
        .find(|condition| condition.type_ == "NetworkUnavailable")?;
    match condition.status.as_str() {
        "True" => Some(true),
        "False" => Some(false),
        _ => None,
    }
}
