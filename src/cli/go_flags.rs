//! Owns the translation of Go's flag syntax and of `FLANNELD_*` into what clap reads; flannel specification
//! sections 1.1 to 1.3. Never interprets a value.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use super::daemon::values::go_bool;

/// The flags that `FLANNELD_*` may set: those of the original, not ours; specification section 1.2.
const FROM_ENV: &[&str] = &[
    "etcd-endpoints",
    "etcd-prefix",
    "etcd-keyfile",
    "etcd-certfile",
    "etcd-cafile",
    "etcd-username",
    "etcd-password",
    "kube-subnet-mgr",
    "kube-api-url",
    "kube-annotation-prefix",
    "kubeconfig-file",
    "net-config-path",
    "set-node-network-unavailable",
    "iface",
    "iface-regex",
    "iface-can-reach",
    "public-ip",
    "public-ipv6",
    "subnet-file",
    "subnet-lease-renew-margin",
    "ip-masq",
    "ip-masq-fully-random-disable",
    "iptables-forward-rules",
    "iptables-resync",
    "ip-blackhole-route",
    "healthz-ip",
    "healthz-port",
    "v",
    "vmodule",
    "log_backtrace_at",
];

/// The long flags of `command` whose value may be the next argument; the others are switches, `-b` or `-b=false`.
pub(super) fn valued(command: &clap::Command) -> BTreeSet<String> {
    let args = command.get_arguments();
    args.filter(|arg| !arg.is_require_equals_set())
        .filter_map(|arg| arg.get_long().map(str::to_owned))
        .collect()
}

/// Arguments as clap reads them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rewritten {
    /// Flags only, each one argument.
    pub(super) args: Vec<OsString>,
    /// Which flag got its value from which variable.
    pub(super) from_env: BTreeMap<String, String>,
    /// Only the version is asked for. As in the original, the command line alone can do that.
    pub(super) version: bool,
    /// What was ignored, as the original ignores it.
    pub(super) warnings: Vec<String>,
}

/// Rewrites `given` (`-name`, `--name`, with `=value` or the value as the next argument) to `--name=value`, and
/// appends what the environment sets and the arguments do not. Empty variables count as unset.
///
/// Parsing stops at the first argument that is not a flag, and at `--`, as Go's does.
pub(super) fn rewrite(
    given: Vec<OsString>,
    valued: &BTreeSet<String>,
    env: impl Fn(&str) -> Option<OsString>,
) -> Rewritten {
    let mut out = Rewritten::default();
    let mut seen = BTreeSet::new();
    let mut given = given.into_iter();
    while let Some(arg) = given.next() {
        if arg == "--" {
            break;
        }
        let Some(flag) = Flag::split(&arg) else {
            let rest: Vec<OsString> = std::iter::once(arg).chain(given).collect();
            let rest = rest.join(OsStr::new(" "));
            out.warnings.push(format!(
                "ignored, for flags end at the first argument that is none: {}",
                rest.to_string_lossy()
            ));
            break;
        };
        if flag.name == "version"
            && let Some(asked) = flag.switch()
        {
            out.version = asked;
            continue;
        }
        let name = if flag.name == "h" {
            "help"
        } else {
            &*flag.name
        };
        seen.insert(name.to_owned());
        let takes_next = flag.value.is_none() && valued.contains(name);
        let mut rewritten = OsString::from(format!("--{name}"));
        let next = takes_next.then(|| given.next()).flatten();
        if let Some(value) = flag.value.or(next.as_deref()) {
            rewritten.push("=");
            rewritten.push(value);
        }
        out.args.push(rewritten);
    }
    for &name in FROM_ENV.iter().filter(|&&name| !seen.contains(name)) {
        let variable = variable(name);
        if let Some(value) = env(&variable).filter(|value| !value.is_empty()) {
            let mut arg = OsString::from(format!("--{name}="));
            arg.push(value);
            out.args.push(arg);
            out.from_env.insert(name.to_owned(), variable);
        }
    }
    out
}

/// The name of the variable for a flag, section 1.3.
fn variable(flag: &str) -> String {
    let name = flag.to_ascii_uppercase().replace(['.', '-'], "_");
    format!("FLANNELD_{name}")
}

/// One argument that is a flag.
struct Flag<'a> {
    /// One that is no UTF-8 is no flag's name, as it is shown here or otherwise.
    name: Cow<'a, str>,
    value: Option<&'a OsStr>,
}

impl<'a> Flag<'a> {
    /// `None` for what Go takes for the first positional argument: no dash, or a lone one.
    fn split(arg: &'a OsStr) -> Option<Self> {
        let body = arg.as_bytes().strip_prefix(b"-")?;
        let body = body.strip_prefix(b"-").unwrap_or(body);
        if body.is_empty() {
            return None;
        }
        let (name, value) = match body.iter().position(|&byte| byte == b'=') {
            Some(at) => (&body[..at], Some(OsStr::from_bytes(&body[at + 1..]))),
            None => (body, None),
        };
        Some(Self {
            name: String::from_utf8_lossy(name),
            value,
        })
    }

    /// What it means as a switch; `None` for a value that is no boolean.
    fn switch(&self) -> Option<bool> {
        let Some(value) = self.value else {
            return Some(true);
        };
        value.to_str().and_then(|text| go_bool(text).ok())
    }
}
