//! Owns a [`Lab`] from its first namespace to its last: the order of building, and the guard that removes
//! everything when it is dropped. Never measures.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::plan::{self, PodNet};
use super::process::Tracked;
use super::state::{self, Claim, Layout, PodRecord};
use super::wait::{self, Interrupt};
use super::{
    Backend, Error, Member, NetNs, Spec, Store, agent, command, teardown, wireguard, wiring,
};

/// Leases spread to every daemon within this time, or something is wrong.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// A node forwards between its pods and the underlay. Loose reverse-path filtering is what current Debian
/// sets, and stricter than the kernel's default.
const NODE_SYSCTLS: [(&str, &str); 3] = [
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "2"),
    ("ipv4/conf/default/rp_filter", "2"),
];

/// A lab that is up. Dropping it removes it.
#[derive(Debug)]
pub struct Lab {
    layout: Layout,
    dir: PathBuf,
    daemons: Vec<Tracked>,
    store: Option<Tracked>,
    interrupt: Interrupt,
    // Declared last, so that the name is free only after everything else is gone.
    claim: Option<Claim>,
}

impl Lab {
    /// Builds the lab that `spec` describes, and removes what an unfinished earlier one of that name left.
    ///
    /// # Errors
    /// [`Error::Exists`] if a detached lab has that name, [`Error::InUse`] if another program's has; any
    /// other error means that building failed, and that what had been built is gone again.
    pub fn build(spec: Spec, interrupt: &Interrupt) -> Result<Self, Error> {
        spec.validate()?;
        let claim = Claim::take(&spec.name)?;
        if Layout::load(&spec.name).is_ok_and(|layout| layout.detached) {
            return Err(Error::Exists {
                name: spec.name.to_string(),
            });
        }
        teardown::sweep(&spec.name)?;
        let mut lab = Self {
            dir: state::directory(&spec.name),
            layout: Layout {
                spec,
                detached: false,
                pods: Vec::new(),
                wire_gaps: Vec::new(),
            },
            daemons: Vec::new(),
            store: None,
            interrupt: interrupt.clone(),
            claim: Some(claim),
        };
        lab.populate()?;
        lab.layout.save()?;
        Ok(lab)
    }

    fn populate(&mut self) -> Result<(), Error> {
        self.create_underlay()?;
        let nets = match self.spec().backend {
            Backend::None => self.chosen_nets(0),
            Backend::Plain => {
                self.on_every_node("ip", plan::plain_routes)?;
                self.chosen_nets(0)
            }
            Backend::ByHand => {
                self.on_every_node("ip", plan::vxlan_links)?;
                self.on_every_node("bridge", plan::vxlan_fdb)?;
                self.chosen_nets(plan::VXLAN_OVERHEAD)
            }
            Backend::WireguardGo => {
                self.start_wireguard()?;
                self.chosen_nets(wireguard::OVERHEAD)
            }
            Backend::Udp
            | Backend::Vxlan
            | Backend::UserVxlan
            | Backend::HostGw
            | Backend::Ipip => self.start_daemons()?,
        };
        for (node, net) in (1..).zip(&nets) {
            self.attach_pods(node, net)?;
        }
        self.await_connected()
    }

    fn create_underlay(&mut self) -> Result<(), Error> {
        self.interrupt.check()?;
        command::batch(None, "ip", &plan::create(self.spec()))?;
        if self.spec().has_underlay_bridge() {
            let bridge = self.netns(Member::Underlay);
            command::batch(Some(&bridge), "ip", &plan::underlay_bridge(self.spec()))?;
        }
        for node in 1..=self.spec().nodes {
            self.interrupt.check()?;
            let netns = self.netns(Member::Node(node));
            netns.set_sysctls(&NODE_SYSCTLS)?;
            command::batch(Some(&netns), "ip", &plan::node(node))?;
            self.wire(Member::Node(node), "eth0")?;
            if self.spec().has_underlay_bridge() {
                self.wire(Member::Underlay, &Member::Node(node).to_string())?;
            }
        }
        Ok(())
    }

    fn wire(&mut self, member: Member, device: &str) -> Result<(), Error> {
        let gaps = wiring::apply(&self.netns(member), device, self.spec().wire)?;
        self.layout
            .wire_gaps
            .extend(gaps.iter().map(|gap| format!("{member} {device}: {gap}")));
        Ok(())
    }

    /// What the lab chooses where no daemon does, under `overhead` bytes of headers.
    fn chosen_nets(&self, overhead: u16) -> Vec<PodNet> {
        let mtu = self.spec().underlay_mtu - overhead;
        (1..=self.spec().nodes)
            .map(|node| PodNet::chosen(node, mtu))
            .collect()
    }

    fn on_every_node(&self, tool: &str, lines: fn(&Spec, u8) -> Vec<String>) -> Result<(), Error> {
        for node in 1..=self.spec().nodes {
            let netns = self.netns(Member::Node(node));
            command::batch(Some(&netns), tool, &lines(self.spec(), node))?;
        }
        Ok(())
    }

    /// Starts them all before waiting for any: they take their leases side by side, as real nodes do.
    fn start_daemons(&mut self) -> Result<Vec<PodNet>, Error> {
        match self.spec().store {
            Store::Local => agent::create_store(&self.layout.spec, &self.dir)?,
            Store::Etcd => {
                let (member, _) = plan::store(self.spec());
                let netns = self.netns(member);
                self.store = Some(agent::start_etcd(
                    &self.layout.spec,
                    &netns,
                    &self.dir,
                    &self.interrupt,
                )?);
            }
        }
        for node in 1..=self.layout.spec.nodes {
            let daemon = agent::start(&self.layout.spec, &self.dir, node)?;
            self.daemons.push(daemon);
        }
        (1..)
            .zip(&mut self.daemons)
            .map(|(node, daemon)| agent::await_subnet(daemon, &self.dir, node, &self.interrupt))
            .collect()
    }

    fn start_wireguard(&mut self) -> Result<(), Error> {
        for node in 1..=self.layout.spec.nodes {
            let daemon = wireguard::start(&self.layout.spec, &self.dir, node)?;
            self.daemons.push(daemon);
        }
        for (node, daemon) in (1..).zip(&mut self.daemons) {
            wireguard::configure(&self.layout.spec, node, daemon, &self.interrupt)?;
        }
        Ok(())
    }

    fn attach_pods(&mut self, node: u8, net: &PodNet) -> Result<(), Error> {
        self.interrupt.check()?;
        command::batch(None, "ip", &plan::pod_links(self.spec(), node, net))?;
        let netns = self.netns(Member::Node(node));
        command::batch(Some(&netns), "ip", &plan::pod_bridge(self.spec(), net))?;
        for pod in 1..=self.spec().pods {
            let member = Member::Pod(node, pod);
            command::batch(Some(&self.netns(member)), "ip", &plan::pod(pod, net))?;
            self.layout.pods.push(PodRecord {
                member,
                addr: net.pod(pod),
            });
        }
        Ok(())
    }

    /// Waits until every pod answers the first one of its node, and, if there is a backend, the first pod of
    /// every node answers that of every other: the kernel takes up to a second until a new link carries packets.
    ///
    /// # Errors
    /// [`Error::Timeout`] names the first pair without a connection, [`Error::Ended`] a daemon that gave up.
    pub fn await_connected(&mut self) -> Result<(), Error> {
        let interrupt = self.interrupt.clone();
        for (from, to) in self.connections() {
            let netns = self.netns(from);
            let what = format!("an answer to a ping from {from} to {}", to.member);
            wait::until(&what, CONNECT_LIMIT, &interrupt, || {
                self.check_daemons()?;
                ping(&netns, to.addr)
            })?;
        }
        Ok(())
    }

    /// Which pods have to reach which.
    fn connections(&self) -> Vec<(Member, PodRecord)> {
        let joined = self.spec().backend != Backend::None;
        let mut pairs = Vec::new();
        for node in 1..=self.spec().nodes {
            let first = Member::Pod(node, 1);
            let others = self.layout.pods.iter().filter(|to| match to.member {
                Member::Pod(n, pod) if n == node => pod > 1,
                Member::Pod(_, pod) => joined && pod == 1,
                Member::Node(_) | Member::Underlay => false,
            });
            pairs.extend(others.map(|to| (first, *to)));
        }
        pairs
    }

    /// # Errors
    /// [`Error::Ended`] if a daemon has ended by itself.
    pub fn check_daemons(&mut self) -> Result<(), Error> {
        self.daemons.iter_mut().try_for_each(Tracked::check_running)
    }

    /// What it was built from.
    #[must_use]
    pub const fn spec(&self) -> &Spec {
        &self.layout.spec
    }

    /// Its description: the pods' addresses, and what the wire cannot do.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its directory: logs, pid files, and the store that the daemons share.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The namespace of a member.
    #[must_use]
    pub fn netns(&self, member: Member) -> NetNs {
        NetNs::named(self.spec().name.namespace(member))
    }

    /// A pod's overlay address.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the lab has no such pod.
    pub fn pod_addr(&self, node: u8, pod: u8) -> Result<Ipv4Addr, Error> {
        let member = Member::Pod(node, pod);
        let found = self
            .layout
            .pods
            .iter()
            .find(|record| record.member == member);
        found
            .map(|record| record.addr)
            .ok_or_else(|| Error::NotFound {
                thing: format!("pod {member} in lab {}", self.spec().name),
            })
    }

    /// A node's overlay address, which is its pods' gateway.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the node has no pod.
    pub fn node_addr(&self, node: u8) -> Result<Ipv4Addr, Error> {
        // The first pod's address is the next one after the gateway's (`PodNet::pod`).
        self.pod_addr(node, 1)
            .map(|addr| Ipv4Addr::from(u32::from(addr).saturating_sub(1)))
    }

    /// The process numbers of the daemons, in the order of their nodes.
    #[must_use]
    pub fn daemon_pids(&self) -> Vec<i32> {
        self.daemons.iter().filter_map(Tracked::pid).collect()
    }

    /// The log of a node's daemon.
    #[must_use]
    pub fn daemon_log(&self, node: u8) -> PathBuf {
        agent::node_dir(&self.dir, node).join("daemon.log")
    }

    /// The socket on which a node's daemon answers `loden status`.
    #[must_use]
    pub fn status_socket(&self, node: u8) -> PathBuf {
        agent::status_socket(&self.dir, node)
    }

    /// The token that ends this lab's waits.
    #[must_use]
    pub const fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Runs a program to its end inside a member and returns its standard output.
    ///
    /// # Errors
    /// [`Error::Command`] quotes a failure.
    pub fn run(&self, member: Member, program: &str, args: &[&str]) -> Result<String, Error> {
        command::run(Some(&self.netns(member)), program, args)
    }

    /// Starts a program inside a member; it ends when dropped, or at the latest with the lab. `label`, of
    /// letters, digits and dashes, names its files in [`Lab::dir`].
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Missing`].
    pub fn spawn(
        &self,
        member: Member,
        label: &str,
        command: &mut Command,
    ) -> Result<Tracked, Error> {
        Tracked::spawn(&self.netns(member), &self.dir, label, command)
    }

    /// Lets the lab outlive this program; [`teardown::down`] removes it then.
    ///
    /// # Errors
    /// [`Error::Io`] if that cannot be recorded; the lab is removed then.
    pub fn detach(mut self) -> Result<Layout, Error> {
        self.layout.detached = true;
        self.layout.save()?;
        self.daemons
            .drain(..)
            .chain(self.store.take())
            .for_each(Tracked::detach);
        self.claim = None;
        Ok(self.layout.clone())
    }

    /// Removes the lab, and tells what could not be removed, which dropping can only log.
    ///
    /// # Errors
    /// [`Error::Teardown`] lists what is left.
    pub fn down(mut self) -> Result<(), Error> {
        self.remove()
    }

    fn remove(&mut self) -> Result<(), Error> {
        // A lab without a claim was detached, or is removed already.
        let Some(_claim) = self.claim.take() else {
            return Ok(());
        };
        let mut problems: Vec<Error> = self
            .daemons
            .iter_mut()
            .chain(&mut self.store)
            .filter_map(|process| process.stop().err())
            .collect();
        match teardown::remove(&self.layout.spec.name) {
            Err(Error::Teardown { problems: more, .. }) => problems.extend(more),
            Err(error) => problems.push(error),
            Ok(_) => {}
        }
        teardown::verdict(&self.layout.spec.name, problems)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::error!(%error, "the lab was not removed: run `loden lab down --all`");
        }
    }
}

/// One ping; `None` without an answer.
fn ping(netns: &NetNs, to: Ipv4Addr) -> Result<Option<()>, Error> {
    match command::run(
        Some(netns),
        "ping",
        &["-n", "-q", "-c1", "-W1", &to.to_string()],
    ) {
        Ok(_) => Ok(Some(())),
        Err(Error::Command { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
