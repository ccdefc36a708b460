//! Owns what the firewall's tests share: namespaces, the three programs that can hold the rules, and looks at
//! the kernel's rules from outside. Never asserts anything about the program under test.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use ipnet::{Ipv4Net, Ipv6Net};
use loden::firewall::{FamilyRules, Firewall, Masquerade, Mode, Rules};
use loden::lab::NetNs;
use tempfile::TempDir;

/// A network namespace that goes with the value.
pub(crate) struct Namespace(pub(crate) NetNs);

impl Namespace {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("loden-fw-{}-{number}", std::process::id());
        let made = Command::new("ip").args(["netns", "add", &name]).status();
        assert!(made.unwrap().success(), "namespace tests need root");
        let namespace = Self(NetNs::named(name));
        namespace.run("ip link set lo up");
        namespace
    }

    /// Runs a program inside; words are separated by blanks. Returns what it printed.
    pub(crate) fn run(&self, command: &str) -> String {
        self.feed(command, "")
    }

    /// As `run`, with standard input.
    pub(crate) fn feed(&self, command: &str, input: &str) -> String {
        let (ok, stdout, stderr) = self.attempt(command, input);
        assert!(ok, "{command}: {stderr}");
        stdout
    }

    /// As `feed`, and may fail.
    pub(crate) fn attempt(&self, command: &str, input: &str) -> (bool, String, String) {
        let mut words = command.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        command
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.0.spawn(&mut command).unwrap();
        let fed = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        (
            output.status.success() && fed.is_ok(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    /// Runs a future on a runtime whose only thread is inside.
    pub(crate) fn block_on<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        let inside = || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(work())
        };
        self.0.run(inside).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let removed = Command::new("ip")
            .args(["netns", "del", self.0.name()])
            .status();
        if !removed.is_ok_and(|status| status.success()) && !std::thread::panicking() {
            panic!("cannot remove namespace {}", self.0.name());
        }
    }
}

/// A program that can hold the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Nft,
    IptablesNft,
    IptablesLegacy,
}

impl Program {
    pub(crate) const ALL: [Self; 3] = [Self::Nft, Self::IptablesNft, Self::IptablesLegacy];
    pub(crate) const IPTABLES: [Self; 2] = [Self::IptablesNft, Self::IptablesLegacy];

    pub(crate) const fn mode(self) -> Mode {
        match self {
            Self::Nft => Mode::Nftables,
            Self::IptablesNft | Self::IptablesLegacy => Mode::Iptables,
        }
    }

    /// `-nft` or `-legacy`.
    pub(crate) const fn suffix(self) -> &'static str {
        match self {
            Self::Nft | Self::IptablesNft => "-nft",
            Self::IptablesLegacy => "-legacy",
        }
    }
}

/// Where Debian has them all.
pub(crate) fn system_path() -> Vec<PathBuf> {
    ["/usr/sbin", "/sbin", "/usr/bin"]
        .map(PathBuf::from)
        .to_vec()
}

/// A search path on which plain `iptables` is the wanted one, in front of the system's.
pub(crate) struct Path {
    dir: TempDir,
    rest: Vec<PathBuf>,
}

impl Path {
    /// All programs are there.
    pub(crate) fn preferring(program: Program) -> Self {
        let dir = TempDir::new().unwrap();
        for family in ["iptables", "ip6tables"] {
            for tool in ["", "-restore", "-save"] {
                let target = format!("/usr/sbin/{family}{}{tool}", program.suffix());
                symlink(target, dir.path().join(format!("{family}{tool}"))).unwrap();
            }
        }
        for program in [
            "nft",
            "iptables-nft",
            "ip6tables-nft",
            "iptables-legacy",
            "ip6tables-legacy",
        ] {
            symlink(format!("/usr/sbin/{program}"), dir.path().join(program)).unwrap();
            // Without its -restore, a variant cannot be chosen, but plain `iptables` can.
        }
        for family in ["iptables", "ip6tables"] {
            let other = match program {
                Program::IptablesLegacy => "-nft",
                Program::Nft | Program::IptablesNft => "-legacy",
            };
            let name = format!("{family}{other}-restore");
            symlink(format!("/usr/sbin/{name}"), dir.path().join(name)).unwrap();
        }
        Self {
            dir,
            rest: Vec::new(),
        }
    }

    /// Only these programs are there.
    pub(crate) fn only(programs: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        for program in programs {
            symlink(format!("/usr/sbin/{program}"), dir.path().join(program)).unwrap();
        }
        Self {
            dir,
            rest: Vec::new(),
        }
    }

    pub(crate) fn list(&self) -> Vec<PathBuf> {
        let mut list = vec![self.dir.path().to_owned()];
        list.extend(self.rest.iter().cloned());
        list
    }
}

/// The firewall with this program, opened inside.
pub(crate) async fn open(program: Program, path: &Path) -> Firewall {
    Firewall::open(path.list(), program.mode()).await.unwrap()
}

/// The rules of the golden files.
pub(crate) fn golden_rules() -> Rules {
    Rules::none()
        .with(v4("10.244.0.0/16", "10.244.1.0/24", true, true))
        .with(v6(true, true))
}

pub(crate) fn v4(network: &str, subnet: &str, masquerade: bool, forward: bool) -> FamilyRules {
    let masquerade = masquerade.then(|| Masquerade::<Ipv4Net> {
        fully_random: true,
        exempt: Vec::new(),
    });
    let (network, subnet) = (network.parse().unwrap(), subnet.parse().unwrap());
    FamilyRules::new(network, subnet, masquerade, forward).unwrap()
}

pub(crate) fn v6(masquerade: bool, forward: bool) -> FamilyRules {
    let masquerade = masquerade.then(|| Masquerade::<Ipv6Net> {
        fully_random: true,
        exempt: Vec::new(),
    });
    let network = "fd00:10:244::/56".parse().unwrap();
    let subnet = "fd00:10:244:1::/64".parse().unwrap();
    FamilyRules::new(network, subnet, masquerade, forward).unwrap()
}

/// What upstream's end-to-end tests print of the rules that `program` holds.
pub(crate) fn listing(namespace: &Namespace, program: Program) -> String {
    if program == Program::Nft {
        return ["ip flannel-ipv4", "ip6 flannel-ipv6"]
            .map(|table| namespace.attempt(&format!("nft list table {table}"), "").1)
            .concat();
    }
    let mut text = String::new();
    for family in ["iptables", "ip6tables"] {
        for (table, hook, chain) in [
            ("nat", "POSTROUTING", "FLANNEL-POSTRTG"),
            ("filter", "FORWARD", "FLANNEL-FWD"),
        ] {
            let list = format!("{family}{} -t {table} -S", program.suffix());
            let jumps = namespace.run(&format!("{list} {hook}"));
            for line in jumps.lines().filter(|line| line.contains("FLANNEL")) {
                text.push_str(&format!("{line}\n"));
            }
            text.push_str(&namespace.attempt(&format!("{list} {chain}"), "").1);
        }
    }
    text
}

/// The recorded listing.
pub(crate) fn golden(program: Program) -> String {
    let [v4, v6] = match program {
        Program::Nft => [
            include_str!("../golden/firewall/nft-list-v4.txt"),
            include_str!("../golden/firewall/nft-list-v6.txt"),
        ],
        Program::IptablesNft | Program::IptablesLegacy => [
            include_str!("../golden/firewall/list-iptables-v4.txt"),
            include_str!("../golden/firewall/list-iptables-v6.txt"),
        ],
    };
    format!("{v4}{v6}")
}

/// Every line of every ruleset, of all programs and families.
pub(crate) fn everything(namespace: &Namespace) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for command in [
        "nft list ruleset",
        "iptables-nft-save",
        "ip6tables-nft-save",
        "iptables-legacy-save",
        "ip6tables-legacy-save",
    ] {
        let listing = namespace.run(command);
        let kept = listing.lines().filter(|line| !line.starts_with('#'));
        lines.extend(kept.map(|line| format!("{command}: {line}")));
    }
    lines
}

/// The lines of `everything` that are ours.
pub(crate) fn traces(namespace: &Namespace) -> Vec<String> {
    let ours = ["FLANNEL", "flannel", "LODEN", "loden"];
    let mut lines = everything(namespace);
    lines.retain(|line| ours.iter().any(|word| line.contains(word)));
    lines
}
