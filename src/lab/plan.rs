//! Owns the addresses of a lab and the text of the `ip` and `bridge` batches that make it. Pure: the same
//! description always gives the same text, and nothing here runs it.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::spec::{Member, Spec, Store};

/// Where the etcd of a lab of three nodes or more is, on the underlay's bridge: no node has this address.
const BRIDGE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);

/// Where the etcd of a lab is. Two nodes have no bridge between them: the first node holds it then.
#[must_use]
pub const fn store(spec: &Spec) -> (Member, Ipv4Addr) {
    if spec.has_underlay_bridge() {
        (Member::Underlay, BRIDGE_V4)
    } else {
        (Member::Node(1), underlay_v4(1))
    }
}

/// The underlay's MTU: Ethernet's.
pub const UNDERLAY_MTU: u16 = 1500;
/// The MTU of an underlay with jumbo frames, as most switches and clouds allow.
pub const JUMBO_MTU: u16 = 9000;
/// What VXLAN over IPv4 takes of the underlay's MTU: outer IPv4, UDP, VXLAN and Ethernet headers.
pub const VXLAN_OVERHEAD: u16 = 50;
/// The overlay network of every lab, from the benchmarking range (RFC 2544).
pub const NETWORK: &str = "198.18.0.0/16";

/// Node N's underlay address, from TEST-NET-1 (RFC 5737).
#[must_use]
pub const fn underlay_v4(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, node)
}

/// Node N's IPv6 underlay address, from the documentation prefix (RFC 3849).
#[must_use]
pub fn underlay_v6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(node))
}

/// The pod network of one node: what `subnet.env` says, or what the lab chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodNet {
    /// The address of `cni0`, the pods' gateway: the first of the subnet.
    pub gateway: Ipv4Addr,
    /// The subnet's prefix length.
    pub prefix_len: u8,
    /// The MTU of `cni0` and of the pods.
    pub mtu: u16,
}

impl PodNet {
    /// The subnet that the lab chooses where no daemon does: 198.18.N.0/24.
    #[must_use]
    pub const fn chosen(node: u8, mtu: u16) -> Self {
        Self {
            gateway: Ipv4Addr::new(198, 18, node, 1),
            prefix_len: 24,
            mtu,
        }
    }

    /// The subnet's first address.
    #[must_use]
    pub fn base(&self) -> Ipv4Addr {
        let host_bits = 32 - u32::from(self.prefix_len.min(32));
        let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
        Ipv4Addr::from(u32::from(self.gateway) & mask)
    }

    /// The address of a node's pod number `pod`: the ones after the gateway, in order.
    #[must_use]
    pub fn pod(&self, pod: u8) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.gateway).saturating_add(u32::from(pod)))
    }

    /// Reads flannel's `subnet.env` (spec: `FLANNEL_SUBNET` is the gateway with the subnet's prefix
    /// length, `FLANNEL_MTU` the overlay's MTU).
    ///
    /// # Errors
    /// A text that names the key that is missing or malformed.
    pub fn from_subnet_env(text: &str) -> Result<Self, String> {
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
                .ok_or_else(|| format!("there is no {key}"))
        };
        let subnet = value("FLANNEL_SUBNET")?;
        let mtu = value("FLANNEL_MTU")?;
        let (gateway, prefix_len) = subnet
            .split_once('/')
            .and_then(|(addr, len)| Some((addr.parse().ok()?, len.parse().ok()?)))
            .ok_or_else(|| {
                format!("FLANNEL_SUBNET is {subnet:?}, not an address with a prefix length")
            })?;
        let mtu = mtu
            .parse()
            .map_err(|error| format!("FLANNEL_MTU is {mtu:?}: {error}"))?;
        Ok(Self {
            gateway,
            prefix_len,
            mtu,
        })
    }
}

/// Makes every namespace and the underlay's veth pairs, for one `ip` in the root namespace. The devices
/// come into being inside their namespaces, so their names never meet another lab's.
#[must_use]
pub fn create(spec: &Spec) -> Vec<String> {
    let ns = |member| spec.name.namespace(member);
    let mtu = spec.underlay_mtu;
    let mut lines: Vec<String> = spec
        .members()
        .map(|m| format!("netns add {}", ns(m)))
        .collect();
    if spec.has_underlay_bridge() {
        for member in spec.node_members() {
            let (node, bridge) = (ns(member), ns(Member::Underlay));
            lines.push(format!(
                "link add eth0 mtu {mtu} netns {node} type veth peer name {member} mtu {mtu} netns {bridge}"
            ));
        }
    } else if spec.nodes == 2 {
        let (first, second) = (ns(Member::Node(1)), ns(Member::Node(2)));
        lines.push(format!(
            "link add eth0 mtu {mtu} netns {first} type veth peer name eth0 mtu {mtu} netns {second}"
        ));
    } else {
        // A lone node still has an external interface that is up: a bridge needs no other end.
        lines.push(format!(
            "link add eth0 mtu {mtu} netns {} type bridge",
            ns(Member::Node(1))
        ));
    }
    lines
}

/// Inside the underlay's namespace: a bridge with one port per node.
#[must_use]
pub fn underlay_bridge(spec: &Spec) -> Vec<String> {
    let mut lines = vec![
        format!("link add br0 mtu {} type bridge", spec.underlay_mtu),
        "link set br0 up".to_owned(),
    ];
    lines.extend(
        spec.node_members()
            .map(|member| format!("link set {member} master br0 up")),
    );
    if spec.store == Store::Etcd {
        lines.push(format!("addr add {BRIDGE_V4}/24 dev br0"));
        lines.push("link set lo up".to_owned());
    }
    lines
}

/// Inside a node: loopback, and the underlay device with its addresses.
#[must_use]
pub fn node(node: u8) -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        format!("addr add {}/24 dev eth0", underlay_v4(node)),
        format!("addr add {}/64 dev eth0 nodad", underlay_v6(node)),
        "link set eth0 up".to_owned(),
    ]
}

/// Makes the veth pairs of a node's pods, for one `ip` in the root namespace.
#[must_use]
pub fn pod_links(spec: &Spec, node: u8, net: &PodNet) -> Vec<String> {
    let mtu = net.mtu;
    let here = spec.name.namespace(Member::Node(node));
    (1..=spec.pods)
        .map(|pod| {
            let there = spec.name.namespace(Member::Pod(node, pod));
            format!(
                "link add p{pod} mtu {mtu} netns {here} type veth peer name eth0 mtu {mtu} netns {there}"
            )
        })
        .collect()
}

/// Inside a node: the pods' bridge, with the subnet's first address.
#[must_use]
pub fn pod_bridge(spec: &Spec, net: &PodNet) -> Vec<String> {
    let PodNet {
        gateway,
        prefix_len,
        mtu,
    } = net;
    let mut lines = vec![
        format!("link add cni0 mtu {mtu} type bridge"),
        format!("addr add {gateway}/{prefix_len} brd + dev cni0"),
        "link set cni0 up".to_owned(),
    ];
    lines.extend((1..=spec.pods).map(|pod| format!("link set p{pod} master cni0 up")));
    lines
}

/// Inside a pod: its address, and everything else by way of the gateway.
#[must_use]
pub fn pod(pod: u8, net: &PodNet) -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        format!(
            "addr add {}/{} brd + dev eth0",
            net.pod(pod),
            net.prefix_len
        ),
        "link set eth0 up".to_owned(),
        format!("route add default via {}", net.gateway),
    ]
}

/// Inside a node of a `plain` lab: the other nodes' subnets by way of their underlay addresses.
#[must_use]
pub fn plain_routes(spec: &Spec, node: u8) -> Vec<String> {
    others(spec, node)
        .map(|peer| {
            let subnet = PodNet::chosen(peer, spec.underlay_mtu).base();
            format!("route add {subnet}/24 via {}", underlay_v4(peer))
        })
        .collect()
}

/// The MAC address of node N's VXLAN device: locally administered, as flannel's random ones are.
fn vtep_mac(node: u8) -> String {
    format!("02:00:00:00:00:{node:02x}")
}

/// Inside a node of a `by-hand` lab, for `ip`: the device `flannel.1` and, per peer, its neighbour entry and
/// on-link route, as flannel's vxlan backend sets them: VNI 1, the kernel's port 8472, no learning, a
/// transmit queue of 0, the subnet's first address as /32, and the peer's as the next hop.
#[must_use]
pub fn vxlan_links(spec: &Spec, node: u8) -> Vec<String> {
    let mtu = spec.underlay_mtu - VXLAN_OVERHEAD;
    let base = |n| PodNet::chosen(n, mtu).base();
    let mut lines = vec![
        format!(
            "link add flannel.1 mtu {mtu} txqueuelen 0 address {mac} \
             type vxlan id 1 local {local} dev eth0 dstport 8472 nolearning",
            mac = vtep_mac(node),
            local = underlay_v4(node),
        ),
        format!("addr add {}/32 dev flannel.1", base(node)),
        "link set flannel.1 up".to_owned(),
    ];
    for peer in others(spec, node) {
        let (via, mac) = (base(peer), vtep_mac(peer));
        lines.push(format!(
            "neigh add {via} lladdr {mac} dev flannel.1 nud permanent"
        ));
        lines.push(format!("route add {via}/24 via {via} dev flannel.1 onlink"));
    }
    lines
}

/// Inside a node of a `by-hand` lab, for `bridge`: one forwarding entry per peer.
#[must_use]
pub fn vxlan_fdb(spec: &Spec, node: u8) -> Vec<String> {
    others(spec, node)
        .map(|peer| {
            let (mac, dst) = (vtep_mac(peer), underlay_v4(peer));
            format!("fdb add {mac} dev flannel.1 dst {dst} self permanent")
        })
        .collect()
}

pub(super) fn others(spec: &Spec, node: u8) -> impl Iterator<Item = u8> {
    (1..=spec.nodes).filter(move |&peer| peer != node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnet_env_gives_the_gateway_the_prefix_length_and_the_mtu() {
        let text = "FLANNEL_NETWORK=198.18.0.0/16\nFLANNEL_SUBNET=198.18.77.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";
        let net = PodNet::from_subnet_env(text).unwrap();
        assert_eq!(
            net,
            PodNet {
                gateway: Ipv4Addr::new(198, 18, 77, 1),
                prefix_len: 24,
                mtu: 1472
            }
        );
        assert_eq!(net.base(), Ipv4Addr::new(198, 18, 77, 0));
        assert_eq!(net.pod(1), Ipv4Addr::new(198, 18, 77, 2));
    }

    #[test]
    fn an_unfinished_subnet_env_names_the_missing_key() {
        let error = PodNet::from_subnet_env("FLANNEL_SUBNET=198.18.77.1/24\n").unwrap_err();
        assert_eq!(error, "there is no FLANNEL_MTU");
    }

    #[test]
    fn two_nodes_are_joined_by_one_pair_and_three_by_a_bridge() {
        let links = |nodes| {
            let spec = Spec::new("x".parse().unwrap(), nodes);
            create(&spec)
                .iter()
                .filter(|line| line.contains("veth"))
                .count()
        };
        assert_eq!((links(1), links(2), links(3)), (0, 1, 3));
    }

    #[test]
    fn every_node_of_a_vxlan_lab_knows_every_other_and_not_itself() {
        let spec = Spec::new("x".parse().unwrap(), 3);
        let fdb = vxlan_fdb(&spec, 2);
        assert_eq!(
            fdb,
            [
                "fdb add 02:00:00:00:00:01 dev flannel.1 dst 192.0.2.1 self permanent",
                "fdb add 02:00:00:00:00:03 dev flannel.1 dst 192.0.2.3 self permanent",
            ]
        );
    }
}
