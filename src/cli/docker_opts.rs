//! Owns `loden docker-opts`: from `subnet.env` to the file with Docker's options, as flannel's `mk-docker-opts.sh`
//! writes it (specification section 13.5). Reads `subnet.env` and never runs it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use ipnet::{IpNet, Ipv4Net};

use super::daemon::SUBNET_FILE;
use crate::backend::kernel::Kernel as _;
use crate::file::{mode_of, read_bounded, replace};
use crate::netlink::Netlink;
use crate::store::env_file::{MAX_ENV_LEN, variables};

/// What names of individual options begin with.
const OPTION: &str = "DOCKER_OPT_";

const USAGE: &str =
    "usage: mk-docker-opts.sh [-f FLANNEL-ENV-FILE] [-d DOCKER-ENV-FILE] [-i] [-c] [-m] [-k KEY]
  -f FILE  flannel's environment file [default: /run/flannel/subnet.env]
  -d FILE  Docker's environment file, which is written [default: /run/docker_opts.env]
  -i       write each option as a variable of its own, such as DOCKER_OPT_MTU
  -c       write all options as one variable; without -i and -c, both are written
  -k KEY   name of that one variable [default: DOCKER_OPTS]
  -m       leave out --ip-masq, for old versions of Docker";

/// Flags of `loden docker-opts`.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub(super) struct DockerOptsArgs {
    /// Flannel's environment file
    #[arg(short = 'f', value_name = "FILE", default_value = SUBNET_FILE)]
    env_file: PathBuf,

    /// Docker's environment file, which is written
    #[arg(
        short = 'd',
        value_name = "FILE",
        default_value = "/run/docker_opts.env"
    )]
    output: PathBuf,

    /// Write each option as a variable of its own
    #[arg(short = 'i')]
    individual: bool,

    /// Write all options as one variable; without -i and -c, both are written
    #[arg(short = 'c')]
    combined: bool,

    /// Name of that one variable
    #[arg(short = 'k', value_name = "KEY", default_value = "DOCKER_OPTS", value_parser = key)]
    key: String,

    /// Leave out --ip-masq, for old versions of Docker
    #[arg(short = 'm')]
    no_ip_masq: bool,

    /// Print the usage
    #[arg(short = 'h', short_alias = '?', long)]
    help: bool,
}

/// The name of a variable. The script would run anything else as a command.
fn key(text: &str) -> Result<String, &'static str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let named = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if named && text.chars().all(is_name) {
        Ok(text.to_owned())
    } else {
        Err("not the name of a variable: use letters, digits and '_'")
    }
}

pub(super) fn run(args: &DockerOptsArgs) -> anyhow::Result<()> {
    if args.help {
        bail!(USAGE);
    }
    // What is in the file counts more.
    let mut known: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let text = match read_bounded(&args.env_file, MAX_ENV_LEN) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read.with_context(|| format!("cannot read {}", args.env_file.display()))?,
    };
    let text = String::from_utf8_lossy(&text);
    let mut skipped = Vec::new();
    let assigned = variables(&text, &mut skipped);
    for skipped in &skipped {
        tracing::warn!("{}: {skipped}: ignored", args.env_file.display());
    }
    known.extend(assigned.into_iter().map(|(k, v)| (k.to_owned(), v)));
    let content = render(args, &known)?;
    write(&args.output, &content)
        .with_context(|| format!("cannot write {}", args.output.display()))?;
    let subnet = known.get("FLANNEL_SUBNET").map(|text| text.parse());
    match subnet {
        Some(Ok(subnet)) => check_routes(subnet),
        _ => Ok(()),
    }
}

/// The file's content.
fn render(args: &DockerOptsArgs, known: &BTreeMap<String, String>) -> anyhow::Result<String> {
    let value = |key: &str| known.get(key).filter(|value| !value.is_empty());
    let mut options: BTreeMap<&str, String> = known
        .iter()
        .filter(|(name, _)| name.starts_with(OPTION))
        .map(|(name, value)| (name.as_str(), value.clone()))
        .collect();
    if let Some(subnet) = value("FLANNEL_SUBNET") {
        options.insert("DOCKER_OPT_BIP", format!("--bip={subnet}"));
    }
    if let Some(mtu) = value("FLANNEL_MTU") {
        options.insert("DOCKER_OPT_MTU", format!("--mtu={mtu}"));
    }
    if let Some(ip_masq) = value("FLANNEL_IPMASQ").filter(|_| !args.no_ip_masq) {
        let inverse = match ip_masq.as_str() {
            "true" => false,
            "false" => true,
            other => bail!("Invalid value of FLANNEL_IPMASQ: {other}: use true or false"),
        };
        options.insert("DOCKER_OPT_IPMASQ", format!("--ip-masq={inverse}"));
    }
    let before = value(&args.key).map(|before| (args.key.as_str(), before));
    let all = options.iter().map(|(name, option)| (*name, option));
    for (name, option) in all.chain(before) {
        ensure!(
            !option.contains(['"', '\n', '$', '`', '\\']),
            "{name}: a quotation mark or line break would end the value early, and $, ` and \\ mean something to a shell \
             that reads the file: leave them out"
        );
    }
    let mut combined = before.map_or_else(String::new, |(_, before)| format!("{before} "));
    let both = !args.individual && !args.combined;
    let mut content = String::new();
    for (name, option) in &options {
        if args.individual || both {
            writeln!(content, "{name}=\"{option}\"")?;
        }
        write!(combined, " {option}")?;
    }
    if args.combined || both {
        writeln!(content, "{}=\"{combined}\"", args.key)?;
    }
    Ok(content)
}

/// Replaces a file in one step, or writes into what is none: a pipe, or /dev/stdout.
fn write(path: &Path, content: &str) -> anyhow::Result<()> {
    match fs::metadata(path) {
        Ok(meta) if !meta.is_file() => Ok(fs::write(path, content)?),
        Ok(_) => {
            let target = fs::canonicalize(path)?;
            Ok(replace(&target, content.as_bytes(), mode_of(&target))?)
        }
        Err(_) => Ok(replace(path, content.as_bytes(), mode_of(path))?),
    }
}

/// Complains if the node's own subnet lies behind a router: Docker's bridge would never see its packets.
fn check_routes(own: Ipv4Net) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let routes = runtime.block_on(async { Netlink::connect()?.routes().await });
    let own = IpNet::V4(own.trunc());
    for route in routes? {
        if let Some(gateway) = route.gateway.filter(|_| route.net == own) {
            bail!(
                "there is a route to the local subnet {own} via {gateway}: remove it before Docker is \
                 started: ip route del {own} via {gateway}"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: DockerOptsArgs,
    }

    const SAMPLE: [(&str, &str); 4] = [
        ("FLANNEL_NETWORK", "10.1.0.0/16"),
        ("FLANNEL_SUBNET", "10.1.74.1/24"),
        ("FLANNEL_MTU", "1472"),
        ("FLANNEL_IPMASQ", "false"),
    ];

    fn lines(flags: &str, more: &[(&str, &str)]) -> anyhow::Result<String> {
        let words = ["docker-opts"].into_iter().chain(flags.split_whitespace());
        let args = Line::try_parse_from(words)?.args;
        let known = SAMPLE.iter().chain(more);
        let known = known.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        render(&args, &known.collect())
    }

    #[test]
    fn the_sample_of_the_specification_comes_out_to_the_byte() {
        let each = "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\n\
                    DOCKER_OPT_MTU=\"--mtu=1472\"\n";
        let all = "DOCKER_OPTS=\" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472\"\n";
        let both = format!("{each}{all}");
        for (flags, expected) in [
            ("", both.as_str()),
            ("-i -c", &both),
            ("-ic", &both),
            ("-i", each),
            ("-c", all),
            ("-c -m", "DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n"),
            (
                "-c -k OTHER",
                "OTHER=\" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472\"\n",
            ),
        ] {
            assert_eq!(lines(flags, &[]).unwrap(), expected, "{flags}");
        }
    }

    #[test]
    fn options_that_are_there_already_are_kept() {
        let more = [
            ("DOCKER_OPT_ZZ", "--zz"),
            ("DOCKER_OPTS", "--log-level=warn"),
            ("DOCKER_OPT_MTU", "--mtu=9000"),
        ];
        assert_eq!(
            lines("-c", &more).unwrap(),
            "DOCKER_OPTS=\"--log-level=warn  --bip=10.1.74.1/24 --ip-masq=true --mtu=1472 --zz\"\n"
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(lines("", &[("FLANNEL_IPMASQ", "yes")]).is_err());
        assert!(lines("-m", &[("FLANNEL_IPMASQ", "yes")]).is_ok());
        for name in ["DOCKER_OPT_X", "DOCKER_OPTS", "FLANNEL_SUBNET"] {
            for value in ["a\"b", "$(reboot)", "`reboot`", "a\\"] {
                assert!(lines("", &[(name, value)]).is_err(), "{name}={value}");
            }
        }
        for flags in ["-k a-b", "-k $(reboot)", "-k 1a", "-x"] {
            assert!(lines(flags, &[]).is_err(), "{flags}");
        }
    }
}
