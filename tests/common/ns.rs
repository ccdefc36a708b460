//! Owns single network namespaces for tests of the daemon: made by `ip netns`, gone with the guard, looked at
//! through iproute2, which shares no code with the program.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use loden::lab::NetNs;
use serde_json::Value;

/// A namespace with the loopback up and a veth pair: `eth0` with 192.0.2.1/24 and 2001:db8::1/64 as the
/// underlay, `far` as the wire's other end.
pub(crate) struct Ns {
    name: String,
}

impl Ns {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("loden-daemon-{}-{number}", std::process::id());
        let ns = Self { name };
        let made = Command::new("ip").args(["netns", "add", &ns.name]).status();
        assert!(made.unwrap().success(), "namespace tests need root");
        ns.ip("link set lo up");
        ns.ip("link add eth0 type veth peer name far");
        ns.ip("addr add 192.0.2.1/24 dev eth0");
        ns.ip("addr add 2001:db8::1/64 dev eth0 nodad");
        ns.ip("link set far up");
        ns.ip("link set eth0 up");
        ns
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `ip ARGS` inside; must succeed.
    pub(crate) fn ip(&self, args: &str) -> Output {
        let output = self.try_ip(args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {args}: {text}");
        output
    }

    /// `ip ARGS` inside.
    pub(crate) fn try_ip(&self, args: &str) -> Output {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name]).args(args.split(' '));
        command.output().unwrap()
    }

    /// `ip -j -d ARGS` inside.
    pub(crate) fn json(&self, args: &str) -> Vec<Value> {
        let output = self.ip(&format!("-j -d {args}"));
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// The one link of this name as iproute2 shows it; null if there is none.
    pub(crate) fn link(&self, name: &str) -> Value {
        let links = self.json("addr show");
        let mut links = links.into_iter();
        links
            .find(|link| link["ifname"] == name)
            .unwrap_or_default()
    }

    pub(crate) fn index(&self, name: &str) -> u32 {
        let index = self.link(name)["ifindex"].as_u64().unwrap();
        index.try_into().unwrap()
    }

    /// `ADDRESS/LEN` of both families, without link-local ones.
    pub(crate) fn addrs(&self, name: &str) -> Vec<String> {
        let link = self.link(name);
        let infos = link["addr_info"].as_array().cloned().unwrap_or_default();
        let text = |info: &Value| {
            let local = info["local"].as_str().unwrap();
            format!("{local}/{}", info["prefixlen"])
        };
        let texts = infos.iter().map(text);
        texts.filter(|addr| !addr.starts_with("fe80:")).collect()
    }

    /// Runs `work` on a thread inside.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        NetNs::named(&self.name).run(work).unwrap()
    }

    /// Runs `future` on a runtime inside.
    pub(crate) fn block_on<T, F>(&self, future: impl FnOnce() -> F + Send) -> T
    where
        T: Send,
        F: Future<Output = T>,
    {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(future())
        })
    }
}

impl Drop for Ns {
    fn drop(&mut self) {
        let status = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
        assert!(
            std::thread::panicking() || status.is_ok_and(|status| status.success()),
            "namespace {} stays behind",
            self.name
        );
    }
}
