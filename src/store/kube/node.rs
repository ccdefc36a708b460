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
    if let Some(subnets) = Subnets::new(v4, v6) {
        return Ok(subnets);
    }
    let found = v4.map(IpNet::V4).or(v6.map(IpNet::V6));
    Err(found.map_or_else(
        || NodeFault::NoPodCidr {
            networks: networks(config),
        },
        // Of a length that is no subnet.
        |found| NodeFault::PodCidr {
            found: found.to_string(),
        },
    ))
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(text: &str) -> NetworkConfig {
        NetworkConfig::parse_assigned(text.as_bytes()).unwrap()
    }

    /// The subnets of a node with these pod CIDRs, or what is wrong with them.
    fn of(config: &NetworkConfig, one: &str, many: &[&str]) -> Result<String, String> {
        let node = json!({"spec": {"podCIDR": one, "podCIDRs": many}});
        let node: Node = serde_json::from_value(node).unwrap();
        match subnets(&node, config) {
            Ok(subnets) => Ok(subnets.to_string()),
            Err(fault) => Err(fault.to_string()),
        }
    }

    #[test]
    fn a_pod_cidr_lies_in_the_network_or_is_refused_with_both() {
        let config = config(r#"{"Network": "198.18.0.0/16", "Backend": {"Type": "udp"}}"#);
        for (cidr, expected) in [
            ("198.18.1.0/24", "198.18.1.0-24"),
            ("198.18.0.0/16", "198.18.0.0-16"),
            ("198.18.255.254/31", "198.18.255.254-31"),
        ] {
            assert_eq!(of(&config, cidr, &[]).unwrap(), expected);
        }
        for cidr in [
            "198.19.0.0/24",
            "198.18.0.0/15",
            "0.0.0.0/0",
            "10.244.1.0/24",
        ] {
            let fault = of(&config, cidr, &[]).unwrap_err();
            let said = format!("doesn't contain {cidr} PodCIDR");
            assert!(
                fault.contains("198.18.0.0/16") && fault.contains(&said),
                "{fault}"
            );
        }
    }

    #[test]
    fn each_family_of_the_network_takes_its_pod_cidr() {
        let v4 = config(r#"{"Network": "198.18.0.0/16"}"#);
        let both = config(
            r#"{"Network": "198.18.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:18::/48"}"#,
        );
        let two = ["198.18.1.0/24", "fd00:18:0:1::/64"];
        let turned = ["fd00:18:0:1::/64", "198.18.1.0/24"];
        let expected = "198.18.1.0-24&fd00:18:0:1::-64".replace(':', "-");
        for cidrs in [two, turned] {
            assert_eq!(of(&v4, cidrs[0], &cidrs).unwrap(), "198.18.1.0-24");
            let found = of(&both, cidrs[0], &cidrs).unwrap();
            assert_eq!(found.replace(':', "-"), expected);
        }
    }

    #[test]
    fn pod_cidrs_that_make_no_sense_are_named_in_few_words() {
        let config = config(r#"{"Network": "198.18.0.0/16"}"#);
        let three = ["198.18.1.0/24"; 3];
        let long = "9".repeat(10_000);
        for (one, many, said) in [
            (
                "",
                &[][..],
                "--allocate-node-cidrs=true and --cluster-cidr=198.18.0.0/16",
            ),
            ("", &["fd00:18::/64"], "pod cidr not assigned"),
            ("198.18.1.0/24", &three, "has 3 entries"),
            ("198.18.1.0", &[], r#""198.18.1.0" is not a subnet"#),
            ("198.18.1.0/33", &[], "is not a subnet"),
            ("198.18.1.0/32", &[], r#""198.18.1.0/32" is not a subnet"#),
            ("../../etc/passwd", &[], "is not a subnet"),
            (&long, &[], "is not a subnet"),
        ] {
            let fault = of(&config, one, many).unwrap_err();
            assert!(fault.contains(said) && fault.len() < 300, "{fault}");
        }
    }
}
