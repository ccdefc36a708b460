//! Owns `--print-config`: every setting with where it comes from: flag, environment, default, file or store. Never
//! shows a secret, never changes anything.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::Context as _;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args as _};

use super::flags::DaemonArgs;
use crate::addr::OverlayPrefix;
use crate::cli::go_flags::Rewritten;
use crate::config::SubnetPool;
use crate::daemon::{self, Options, StoreOptions};
use crate::store::env_file::PreviousEnv;

/// What is never shown.
const SECRET: &str = "etcd_password";

/// What may have a password in it.
const ENDPOINTS: &str = "etcd_endpoints";

/// A flag as it was understood.
#[derive(Debug)]
pub(in crate::cli) struct Understood {
    flag: String,
    value: String,
    origin: String,
}

/// Every flag of the daemon with its value and where that comes from.
pub(in crate::cli) fn understood(matches: &ArgMatches, rewritten: &Rewritten) -> Vec<Understood> {
    let command = DaemonArgs::augment_args(clap::Command::new("daemon"));
    let mut all = Vec::new();
    for arg in command.get_arguments() {
        let (id, Some(flag)) = (arg.get_id().as_str(), arg.get_long()) else {
            continue;
        };
        // Not every argument of a command is one of its matches: help, for one.
        let Ok(values) = matches.try_get_raw(id) else {
            continue;
        };
        if arg.is_hide_set() && values.is_none() {
            continue;
        }
        let values = values.into_iter().flatten().map(|value| match id {
            SECRET if !value.is_empty() => "***".to_owned(),
            ENDPOINTS => without_users(&value.to_string_lossy()),
            _ => value.to_string_lossy().into_owned(),
        });
        let values: Vec<String> = values.collect();
        let origin = match (matches.value_source(id), rewritten.from_env.get(flag)) {
            (Some(ValueSource::CommandLine), Some(variable)) => format!("environment {variable}"),
            (Some(ValueSource::CommandLine), None) => "flag".to_owned(),
            (Some(_), _) => "default".to_owned(),
            (None, _) => "not given".to_owned(),
        };
        all.push(Understood {
            flag: flag.to_owned(),
            value: values.join(" "),
            origin,
        });
    }
    all
}

/// `http://user:password@host` without the user.
fn without_users(endpoints: &str) -> String {
    let one = |endpoint: &str| match endpoint.rsplit_once('@') {
        Some((before, host)) => {
            let scheme = before.split_once("://").map(|(scheme, _)| scheme);
            scheme.map_or_else(|| host.to_owned(), |scheme| format!("{scheme}://{host}"))
        }
        None => endpoint.to_owned(),
    };
    let all: Vec<String> = endpoints.split(',').map(one).collect();
    all.join(",")
}

/// One family of the network configuration, with what was derived.
fn family<N: OverlayPrefix>(pool: &SubnetPool<N>) -> String {
    format!(
        "Network: {}, subnets of /{} from {} to {}",
        pool.network(),
        pool.subnet_len(),
        pool.first(),
        pool.last()
    )
}

/// Prints the flags, then what the files and the store say.
pub(super) fn print(options: &Options, understood: &[Understood]) -> anyhow::Result<()> {
    let mut text = String::new();
    for setting in understood {
        writeln!(
            text,
            "--{}={}  # {}",
            setting.flag, setting.value, setting.origin
        )?;
    }
    match &options.store {
        StoreOptions::Local(dir) => writeln!(text, "store: directory {}", dir.display())?,
        StoreOptions::Etcd(settings) => writeln!(
            text,
            "store: etcd at {}, keys below {}",
            without_users(&settings.endpoints),
            settings.prefix
        )?,
        StoreOptions::Kube(settings) => writeln!(
            text,
            "store: Kubernetes, as {:?}, network configuration in {}",
            settings.identity,
            settings.net_config.display()
        )?,
    }
    let file = options.subnet_file.display();
    match PreviousEnv::read(&options.subnet_file).map(|env| env.previous()) {
        Ok(Some(subnets)) => writeln!(text, "previous subnets: {subnets}  # file {file}")?,
        Ok(None) => writeln!(text, "previous subnets: none  # file {file}")?,
        Err(error) => writeln!(text, "previous subnets: {error}")?,
    }
    match daemon::network_config(options) {
        Ok(config) => {
            if let Some(pool) = &config.ipv4 {
                writeln!(text, "{}  # store", family(pool))?;
            }
            if let Some(pool) = &config.ipv6 {
                writeln!(text, "{}  # store", family(pool))?;
            }
            writeln!(text, "EnableNFTables: {}  # store", config.enable_nftables)?;
            writeln!(text, "Backend: {:?}  # store", config.backend)?;
        }
        Err(error) => writeln!(text, "network configuration: {error}")?,
    }
    std::io::stdout()
        .lock()
        .write_all(text.as_bytes())
        .context("cannot write to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_in_endpoints_are_not_shown() {
        for (given, shown) in [
            ("http://a:2379,http://b:2379", "http://a:2379,http://b:2379"),
            ("https://u:p@a:2379,b:1", "https://a:2379,b:1"),
            ("u:p@a:2379", "a:2379"),
            ("http://u:p%40@x@a:2379", "http://a:2379"),
        ] {
            assert_eq!(without_users(given), shown);
        }
    }
}
