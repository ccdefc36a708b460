//! Owns the difference between what a device of ours should look like and what it does: a pure [`plan`], and its
//! application. Level-triggered: the same plan serves the start, every notification and the periodic look.

use ipnet::IpNet;

use super::kernel::{Kernel, KernelError, Link, LinkChange, PROTOCOL_BOOT, Route};
use crate::addr::{Mac, Mtu};

/// What a device should look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Its MTU.
    pub mtu: Mtu,
    /// Its transmit queue length in packets.
    pub tx_queue_len: u32,
    /// Its MAC address; `None` for a device that has none.
    pub mac: Option<Mac>,
    /// Whether it learns, for a VXLAN device.
    pub learning: Option<bool>,
    /// Its addresses. Others inside `networks` are removed, those outside are somebody else's.
    pub addrs: Vec<IpNet>,
    /// The overlay networks.
    pub networks: Vec<IpNet>,
    /// What is routed to it as a whole.
    pub routed: Vec<IpNet>,
}

/// What it looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// The device.
    pub link: Link,
    /// Its addresses.
    pub addrs: Vec<IpNet>,
    /// All routes of the main table.
    pub routes: Vec<Route>,
}

/// One step towards the desired state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Keep the kernel from configuring IPv6 by itself. Nothing depends on it, so it may fail.
    SilenceIpv6,
    /// Change the link.
    SetLink(LinkChange),
    /// Take an address away.
    DeleteAddress(IpNet),
    /// Add an address.
    AddAddress(IpNet),
    /// Add a route.
    AddRoute(Route),
}

/// The steps that lead from `observed` to `desired`, in an order that works: the kernel makes its own addresses
/// when the link comes up, a route needs a link that is up, and taking an address away may take routes with it.
#[must_use]
pub fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let link = &observed.link;
    let differs = LinkChange {
        mtu: (link.mtu != u32::from(desired.mtu.get())).then_some(desired.mtu),
        tx_queue_len: (link.tx_queue_len != desired.tx_queue_len).then_some(desired.tx_queue_len),
        mac: desired.mac.filter(|&mac| link.mac != Some(mac)),
        learning: desired
            .learning
            .filter(|&learning| link.vxlan().is_some_and(|vxlan| vxlan.learning != learning)),
        up: !link.up,
    };
    let mut actions = Vec::new();
    if link.makes_ipv6_addresses {
        actions.push(Action::SilenceIpv6);
    }
    if differs != LinkChange::default() {
        actions.push(Action::SetLink(differs));
    }
    let stale = observed.addrs.iter().filter(|addr| {
        let overlay = desired
            .networks
            .iter()
            .any(|net| net.contains(&addr.addr()));
        overlay && !desired.addrs.contains(addr)
    });
    actions.extend(stale.copied().map(Action::DeleteAddress));
    let missing = |addr: &&IpNet| !observed.addrs.contains(addr);
    let missing = desired.addrs.iter().filter(missing);
    actions.extend(missing.copied().map(Action::AddAddress));
    let unrouted = desired.routed.iter().filter(|&&net| {
        let routed =
            |route: &Route| route.net == net && route.link == link.index && route.gateway.is_none();
        !observed.routes.iter().any(routed)
    });
    actions.extend(unrouted.map(|&net| {
        Action::AddRoute(Route {
            net,
            link: link.index,
            gateway: None,
            onlink: false,
            metric: None,
            protocol: PROTOCOL_BOOT,
        })
    }));
    actions
}

/// What a look at the device led to.
#[derive(Debug)]
pub enum Outcome {
    /// There is no device any more.
    Gone,
    /// It is as it should be, after these steps that had to succeed.
    Done(Vec<Action>),
}

/// Looks at the device and brings it to the desired state.
///
/// # Errors
///
/// The first step that the kernel refuses; the ones before it remain.
pub async fn reconcile(
    kernel: &impl Kernel,
    index: u32,
    desired: &Desired,
) -> Result<Outcome, KernelError> {
    let Some(link) = kernel.link_at(index).await? else {
        return Ok(Outcome::Gone);
    };
    let observed = Observed {
        link,
        addrs: kernel.addresses(index).await?,
        routes: match desired.routed.is_empty() {
            true => Vec::new(),
            false => kernel.routes().await?,
        },
    };
    let mut actions = plan(desired, &observed);
    for action in &actions {
        match *action {
            Action::SilenceIpv6 => {
                if let Err(error) = kernel.silence_ipv6(&observed.link).await {
                    tracing::debug!(%error, "the kernel may configure IPv6 on the device by itself");
                }
            }
            Action::SetLink(change) => kernel.set_link(index, change).await?,
            Action::DeleteAddress(addr) => kernel.delete_address(index, addr).await?,
            Action::AddAddress(addr) => kernel.add_address(index, addr).await?,
            Action::AddRoute(route) => kernel.add_route(route).await?,
        }
    }
    actions.retain(|action| *action != Action::SilenceIpv6);
    Ok(Outcome::Done(actions))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::fake::FakeKernel;
    use proptest::prelude::*;

    const INDEX: u32 = 7;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn desired() -> Desired {
        Desired {
            mtu: Mtu::new(1472).unwrap(),
            tx_queue_len: 1000,
            mac: None,
            learning: None,
            addrs: vec![net("198.18.3.0/32"), net("fd00:1:0:3::/128")],
            networks: vec![net("198.18.0.0/16"), net("fd00:1::/48")],
            routed: vec![net("198.18.0.0/16"), net("fd00:1::/48")],
        }
    }

    /// As TUNSETIFF leaves it.
    fn fresh() -> Link {
        Link {
            index: INDEX,
            name: "flannel0".to_owned(),
            mtu: 1500,
            tx_queue_len: 500,
            up: false,
            makes_ipv6_addresses: true,
            tx_dropped: 0,
            mac: None,
            tunnel: None,
        }
    }

    fn kernel() -> FakeKernel {
        let kernel = FakeKernel::default();
        kernel.state().links.push(fresh());
        kernel
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    fn settle(kernel: &FakeKernel) -> Vec<Action> {
        match run(reconcile(kernel, INDEX, &desired())).unwrap() {
            Outcome::Done(actions) => actions,
            Outcome::Gone => panic!("the device is there"),
        }
    }

    /// The whole of what is desired, spelt out, and nothing of ours beside it.
    fn assert_settled(kernel: &FakeKernel) {
        let state = kernel.state();
        let link = &state.links[0];
        assert_eq!((link.mtu, link.tx_queue_len, link.up), (1472, 1000, true));
        assert!(!link.makes_ipv6_addresses);
        for addr in ["198.18.3.0/32", "fd00:1:0:3::/128"] {
            assert!(state.addrs.contains(&(INDEX, net(addr))), "{addr}");
        }
        for network in ["198.18.0.0/16", "fd00:1::/48"] {
            let network = net(network);
            let routes = state.routes.iter().filter(|route| route.net == network);
            let routes: Vec<&Route> = routes.collect();
            assert_eq!(routes.len(), 1, "{network}");
            let route = routes[0];
            assert_eq!((route.link, route.gateway), (INDEX, None));
            assert_eq!(route.protocol, PROTOCOL_BOOT);
            let strays = state.addrs.iter().filter(|(_, addr)| {
                network.contains(&addr.addr()) && !desired().addrs.contains(addr)
            });
            assert_eq!(strays.count(), 0, "{network}");
        }
    }

    #[test]
    fn fresh_device_is_silenced_before_it_comes_up_and_routed_after() {
        let kernel = kernel();
        settle(&kernel);
        assert_settled(&kernel);
        let log = kernel.state().log.join(", ");
        assert_eq!(
            log,
            "silence, set link, add address 198.18.3.0/32, add address fd00:1:0:3::/128, \
             add route 198.18.0.0/16, add route fd00:1::/48"
        );
        assert_eq!(settle(&kernel), []);
    }

    #[test]
    fn addresses_and_routes_of_others_stay() {
        let kernel = kernel();
        let foreign_addr = (INDEX, net("203.0.113.1/24"));
        let foreign_route = Route {
            net: net("198.18.9.0/24"),
            link: 2,
            gateway: None,
            onlink: false,
            metric: None,
            protocol: 4,
        };
        kernel.state().addrs.push(foreign_addr);
        kernel.state().routes.push(foreign_route);
        settle(&kernel);
        assert_settled(&kernel);
        assert!(kernel.state().addrs.contains(&foreign_addr));
        assert!(kernel.state().routes.contains(&foreign_route));
    }

    #[test]
    fn same_network_routed_elsewhere_is_an_error_that_names_it() {
        let kernel = kernel();
        kernel.state().routes.push(Route {
            net: net("198.18.0.0/16"),
            link: 2,
            gateway: None,
            onlink: false,
            metric: None,
            protocol: PROTOCOL_BOOT,
        });
        let error = run(reconcile(&kernel, INDEX, &desired())).unwrap_err();
        assert!(error.to_string().contains("198.18.0.0/16"), "{error}");
        assert_eq!(error.source.raw_os_error(), Some(libc::EEXIST));
    }

    #[test]
    fn kernel_without_ipv6_silence_is_good_enough_and_other_refusals_are_not() {
        let kernel = kernel();
        kernel.state().refuse = Some("silence");
        settle(&kernel);
        assert!(kernel.state().links[0].up);
        kernel.state().set_down(INDEX);
        kernel.state().refuse = Some("set link");
        let error = run(reconcile(&kernel, INDEX, &desired())).unwrap_err();
        assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
    }

    #[test]
    fn device_that_is_gone_is_reported_and_nothing_is_tried() {
        let kernel = FakeKernel::default();
        let outcome = run(reconcile(&kernel, INDEX, &desired())).unwrap();
        assert!(matches!(outcome, Outcome::Gone));
        assert!(kernel.state().log.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Meddling {
        Down,
        Mtu(u32),
        Queue(u32),
        FlushAddresses,
        FlushRoutes,
        StrayAddress(u8),
        Autoconf,
    }

    fn meddling() -> impl Strategy<Value = Meddling> {
        prop_oneof![
            Just(Meddling::Down),
            (68_u32..9000).prop_map(Meddling::Mtu),
            (0_u32..9000).prop_map(Meddling::Queue),
            Just(Meddling::FlushAddresses),
            Just(Meddling::FlushRoutes),
            any::<u8>().prop_map(Meddling::StrayAddress),
            Just(Meddling::Autoconf),
        ]
    }

    proptest! {
        #[test]
        fn whatever_was_done_to_the_device_one_look_repairs_it(
            deeds in proptest::collection::vec(meddling(), 0..12)
        ) {
            let kernel = kernel();
            settle(&kernel);
            for deed in deeds {
                let mut state = kernel.state();
                match deed {
                    Meddling::Down => state.set_down(INDEX),
                    Meddling::Mtu(mtu) => state.link_mut(INDEX).unwrap().mtu = mtu,
                    Meddling::Queue(len) => state.link_mut(INDEX).unwrap().tx_queue_len = len,
                    Meddling::FlushAddresses => state.addrs.clear(),
                    Meddling::FlushRoutes => state.routes.clear(),
                    Meddling::StrayAddress(host) => {
                        let stray = net(&format!("198.18.3.{host}/24"));
                        state.addrs.push((INDEX, stray));
                    }
                    Meddling::Autoconf => {
                        state.link_mut(INDEX).unwrap().makes_ipv6_addresses = true;
                    }
                }
            }
            settle(&kernel);
            assert_settled(&kernel);
            prop_assert_eq!(settle(&kernel), []);
        }
    }
}
