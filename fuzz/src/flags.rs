//! Feeds arbitrary command lines and variables to the reader of flags, and compares with a second reading of Go's
//! rules (package `flag`, and flannel's mapping of `FLANNELD_*`) that shares no code with it.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use loden::cli::{Invocation, parse_from};

/// The switches of the daemon; the value of any other flag may be the next argument.
const SWITCHES: &[&str] = &[
    "h",
    "help",
    "ip-blackhole-route",
    "ip-masq",
    "ip-masq-fully-random-disable",
    "iptables-forward-rules",
    "kube-subnet-mgr",
    "pin",
    "print-config",
    "set-node-network-unavailable",
    "version",
];

/// The flags of flannel that a variable may set, but for the password.
const VARIABLES: &[&str] = &[
    "etcd-endpoints",
    "etcd-prefix",
    "etcd-keyfile",
    "etcd-certfile",
    "etcd-cafile",
    "etcd-username",
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

/// A password that no input contains by chance.
const PASSWORD: &str = "correct-horse-battery-staple";

/// Arguments, one a line, then behind a line `%` variables, `NAME=value`.
///
/// # Panics
///
/// If the line means something else than the same line in its plainest spelling, with the variables as flags, or
/// if a password is shown.
pub fn run(data: &[u8]) {
    // The kernel passes on neither an argument nor a variable with a NUL.
    if data.contains(&0) {
        return;
    }
    let mut lines = data.split(|byte| *byte == b'\n').map(OsStr::from_bytes);
    let args: Vec<&OsStr> = lines.by_ref().take_while(|line| *line != "%").collect();
    let variables: Vec<(&OsStr, &OsStr)> = lines.filter_map(split_once).collect();
    let env = |name: &str| {
        let mut named = variables.iter().filter(|(key, _)| *key == name);
        named.next().map(|(_, value)| (*value).to_owned())
    };

    let given = parse(args.iter().map(|arg| (*arg).to_owned()), env);
    let (flags, rest) = go(&args);
    let plain = || flags.iter().map(Flag::plain);
    assert_eq!(given, parse(plain().chain(rest.clone()), env), "{args:?}");

    let seen: BTreeSet<&[u8]> = flags.iter().map(|flag| flag.name).collect();
    let from_env = VARIABLES
        .iter()
        .filter(|name| !seen.contains(name.as_bytes()));
    let from_env = from_env.filter_map(|name| {
        let variable = format!("FLANNELD_{}", name.to_uppercase().replace('-', "_"));
        let value = env(&variable).filter(|value| !value.is_empty())?;
        let mut flag = OsString::from(format!("--{name}="));
        flag.push(value);
        Some(flag)
    });
    // A last flag without its value would take what comes behind it for that.
    let last = flags.last().filter(|flag| flag.value.is_none());
    if last.is_some_and(|flag| !flag.is_switch()) {
        return;
    }
    let password = |name: &str| env(name).filter(|_| name == "FLANNELD_ETCD_PASSWORD");
    let all = parse(plain().chain(from_env).chain(rest.clone()), password);
    assert_eq!(given.0, all.0, "{args:?} {variables:?}");

    if !String::from_utf8_lossy(data).contains(PASSWORD) {
        let secret = OsString::from(format!("--etcd-password={PASSWORD}"));
        let (_, shown) = parse([secret].into_iter().chain(plain()).chain(rest), env);
        assert!(!shown.contains(PASSWORD), "{shown}");
    }
}

/// What the daemon makes of its arguments, and all that can be seen of that: with where each setting comes from, or
/// the error's text.
fn parse(
    args: impl Iterator<Item = OsString>,
    env: impl Fn(&str) -> Option<OsString>,
) -> (Result<String, i32>, String) {
    let args = [OsString::from("flanneld")].into_iter().chain(args);
    match parse_from(args.collect(), env) {
        Ok(invocation) => {
            let shown = format!("{invocation:?}");
            (Ok(settings(&invocation)), shown)
        }
        Err(error) => (Err(error.exit_code()), error.to_string()),
    }
}

/// Without where the settings come from, which is told last.
fn settings(invocation: &Invocation) -> String {
    let shown = format!("{invocation:?}");
    let settings = shown.split(", understood: ").next();
    settings.unwrap_or_default().to_owned()
}

fn split_once(line: &OsStr) -> Option<(&OsStr, &OsStr)> {
    let bytes = line.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=')?;
    let (name, value) = (&bytes[..at], &bytes[at + 1..]);
    Some((OsStr::from_bytes(name), OsStr::from_bytes(value)))
}

struct Flag<'a> {
    name: &'a [u8],
    value: Option<&'a [u8]>,
}

impl Flag<'_> {
    fn is_switch(&self) -> bool {
        SWITCHES.iter().any(|name| name.as_bytes() == self.name)
    }

    /// `--name=value`, which no rule can read otherwise.
    fn plain(&self) -> OsString {
        let mut text = b"--".to_vec();
        text.extend(self.name);
        if let Some(value) = self.value {
            text.push(b'=');
            text.extend(value);
        }
        OsString::from_vec(text)
    }
}

/// The flags of a line as Go's `FlagSet.parseOne` finds them, and the arguments from where it stops on.
fn go<'a>(args: &[&'a OsStr]) -> (Vec<Flag<'a>>, Vec<OsString>) {
    let mut flags = Vec::new();
    let mut at = 0;
    while at < args.len() {
        let arg = args[at].as_bytes();
        if arg.len() < 2 || arg[0] != b'-' {
            break;
        }
        let dashes = if arg[1] == b'-' { 2 } else { 1 };
        if dashes == arg.len() {
            break;
        }
        let body = &arg[dashes..];
        at += 1;
        let mut flag = match body.iter().position(|byte| *byte == b'=') {
            Some(end) => Flag {
                name: &body[..end],
                value: Some(&body[end + 1..]),
            },
            None => Flag {
                name: body,
                value: None,
            },
        };
        if flag.value.is_none() && !flag.is_switch() && at < args.len() {
            flag.value = Some(args[at].as_bytes());
            at += 1;
        }
        flags.push(flag);
    }
    let rest = args[at..].iter().map(|arg| (*arg).to_owned());
    (flags, rest.collect())
}
