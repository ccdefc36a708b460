//! Owns the CNI plugin that is installed as `flannel`: from `subnet.env` and the network configuration to a delegate
//! (the bridge plugin, by default) that does the work. Never touches an interface itself, never logs, and knows no
//! runtime: it lives for milliseconds.
//!
//! Specification section 12, and the CNI specification up to 1.1.0. Beyond the original: STATUS says whether the
//! daemon has written `subnet.env`, GC removes what DEL was never called for.

mod conf;
mod delegate;
mod environment;
mod error;
mod plugin;
mod state;
mod subnet_env;

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io::Read;
use std::path::Path;
use std::thread;

use serde_json::{Map, Value, json};

pub use conf::{Attachment, MAX_CONF_LEN, NetConf};
pub use delegate::config as delegate_config;
pub use environment::Environment;
pub use error::CniError;
pub use subnet_env::{PodEnv, PodEnvError};

use crate::file::read_bounded;
use crate::store::env_file::MAX_ENV_LEN;
use error::{DECODING, ENVIRONMENT, INCOMPATIBLE_VERSION, IO, NETNS, NOT_AVAILABLE};
use plugin::Call;
use state::State;

/// The versions of the protocol that the plugin speaks, oldest first.
const VERSIONS: [&str; 7] = [
    "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0",
];

/// The newest of them.
const NEWEST: &str = "1.1.0";

/// What the process is to say, and how to end.
#[derive(Debug)]
pub struct Answer {
    /// A result, an error object, or nothing.
    pub stdout: Vec<u8>,
    /// For people.
    pub stderr: String,
    /// Whether the exit code is zero.
    pub success: bool,
}

/// The error about a namespace that is the plugin's own.
fn own_netns() -> CniError {
    CniError::new(
        NETNS,
        "plugin's netns and netns from CNI_NETNS should not be the same",
    )
}

/// Does what the environment and the configuration on `stdin` ask for.
pub fn run(environment: &Environment, stdin: impl Read) -> Answer {
    let mut answer = Answer {
        stdout: Vec::new(),
        stderr: String::new(),
        success: true,
    };
    let mut version = NEWEST.to_owned();
    let done = match environment.command.as_str() {
        "" => {
            let _infallible = writeln!(
                answer.stderr,
                "CNI Plugin flannel version {} ({}/{}) loden\nCNI protocol versions supported: {}",
                env!("CARGO_PKG_VERSION"),
                std::env::consts::OS,
                std::env::consts::ARCH,
                VERSIONS.join(", ")
            );
            Ok(())
        }
        "VERSION" => {
            let json = json!({"cniVersion": NEWEST, "supportedVersions": VERSIONS});
            answer.stdout = format!("{json}\n").into_bytes();
            Ok(())
        }
        command @ ("ADD" | "DEL" | "CHECK" | "GC" | "STATUS") => {
            Plugin::new(environment, command, stdin, &mut version)
                .and_then(|plugin| plugin.run(&mut answer))
        }
        other => {
            let other: String = other.chars().take(64).collect();
            let msg = format!("unknown CNI_COMMAND: {other}");
            Err(CniError::new(ENVIRONMENT, msg))
        }
    };
    if let Err(error) = done {
        answer.stdout = error.to_json(&version);
        answer.success = false;
    }
    answer
}

/// One command with its configuration.
struct Plugin<'a> {
    environment: &'a Environment,
    command: &'a str,
    conf: NetConf,
}

impl<'a> Plugin<'a> {
    /// Checks everything that can be checked before anything is done. `version` becomes that of the configuration.
    fn new(
        environment: &'a Environment,
        command: &'a str,
        stdin: impl Read,
        version: &mut String,
    ) -> Result<Self, CniError> {
        let of_container = matches!(command, "ADD" | "DEL" | "CHECK");
        let required = [
            (
                "CNI_CONTAINERID",
                of_container && environment.container_id.is_empty(),
            ),
            (
                "CNI_NETNS",
                matches!(command, "ADD" | "CHECK") && environment.netns.is_empty(),
            ),
            ("CNI_IFNAME", of_container && environment.ifname.is_empty()),
            ("CNI_PATH", environment.path.is_empty()),
        ];
        let missing = required.iter().filter(|(_, missing)| *missing);
        let missing: Vec<&str> = missing.map(|(name, _)| *name).collect();
        if !missing.is_empty() {
            let msg = format!("required env variables [{}] missing", missing.join(","));
            return Err(CniError::new(ENVIRONMENT, msg));
        }
        let mut text = Vec::new();
        stdin
            .take(MAX_CONF_LEN as u64 + 1)
            .read_to_end(&mut text)
            .map_err(|e| CniError::new(IO, format!("error reading from stdin: {e}")))?;
        let conf = NetConf::parse(&text)?;
        let Some(rank) = VERSIONS.iter().position(|known| *known == conf.version()) else {
            let given: String = conf.version().chars().take(64).collect();
            return Err(CniError {
                code: INCOMPATIBLE_VERSION,
                msg: "incompatible CNI versions".to_owned(),
                details: format!(
                    "config is {given:?}, plugin supports [{}]",
                    VERSIONS.map(|version| format!("{version:?}")).join(" ")
                ),
            });
        };
        conf.version().clone_into(version);
        let since = match command {
            "CHECK" => "0.4.0",
            "GC" | "STATUS" => "1.1.0",
            _ => VERSIONS[0],
        };
        if VERSIONS[..rank].contains(&since) || VERSIONS[rank] == since {
            return Ok(Self {
                environment,
                command,
                conf,
            });
        }
        let msg = format!(
            "config version does not allow {command}: it needs a cniVersion of at least {since}"
        );
        Err(CniError::new(INCOMPATIBLE_VERSION, msg))
    }

    fn run(&self, answer: &mut Answer) -> Result<(), CniError> {
        match self.command {
            "ADD" => self.add(answer),
            "DEL" => self.del(answer),
            // Version 1.1.1 of the bridge plugin finds fault with every healthy pod: it does not see its own gateway
            // in the routes that we ask for. So the original's answer stands.
            "CHECK" => self.environment.attachment().map(drop),
            "GC" => self.gc(answer),
            _ => self.status(answer),
        }
    }

    fn add(&self, answer: &mut Answer) -> Result<(), CniError> {
        let of = self.environment.attachment()?;
        match self.environment.is_own_netns() {
            Ok(false) => {}
            Ok(true) => return Err(own_netns()),
            Err(e) => {
                let path = self.environment.netns.display();
                let msg = format!("CNI_NETNS: cannot open {path}: {e}");
                return Err(CniError::new(NETNS, msg));
            }
        }
        let config = self.delegate_config()?;
        let json = compact(&config);
        let _infallible = writeln!(
            answer.stderr,
            "delegateAdd: netconf sent to delegate plugin:\n{json}"
        );
        // Before the delegate makes anything that DEL would have to undo. The disk has time until it is done: what a
        // power failure takes away meanwhile, it takes with the container.
        let saved = State::new(&self.conf.data_dir).save(&of, json.as_bytes())?;
        let (synced, done) = thread::scope(|scope| {
            let synced = scope.spawn(|| saved.sync());
            let done = self.delegate(&config, json.as_bytes(), Vec::new());
            (synced.join(), done)
        });
        let done = done.map_err(|e| CniError {
            msg: format!("failed to delegate add: {}", e.msg),
            ..e
        })?;
        answer.stderr.push_str(&done.stderr);
        synced
            .unwrap_or_else(|_panic| Err(CniError::internal("the state could not be written")))?;
        answer.stdout = done.stdout;
        Ok(())
    }

    fn del(&self, answer: &mut Answer) -> Result<(), CniError> {
        let of = self.environment.attachment()?;
        // One that is gone has taken the interface with it, and the rest is to be undone all the same.
        if let Ok(true) = self.environment.is_own_netns() {
            return Err(own_netns());
        }
        self.undo(&of, Vec::new(), answer)
    }

    /// Has the delegate undo what it did for an interface; nothing, if nothing is known about it.
    fn undo(
        &self,
        of: &Attachment,
        variables: Vec<(&'static str, OsString)>,
        answer: &mut Answer,
    ) -> Result<(), CniError> {
        let state = State::new(&self.conf.data_dir);
        let Some(saved) = state.load(of)? else {
            return Ok(());
        };
        let Some(config) = parse_saved(&saved.config) else {
            // The original's answer. An error would keep the runtime from ever removing the container.
            let _infallible = writeln!(
                answer.stderr,
                "what was saved in {} for {} is not a network configuration: nothing can be undone by it",
                self.conf.data_dir.display(),
                of.container_id
            );
            return Ok(());
        };
        let done = self.delegate(&config, &saved.config, variables)?;
        answer.stderr.push_str(&done.stderr);
        state.remove(of, &saved)
    }

    fn status(&self, answer: &mut Answer) -> Result<(), CniError> {
        let config = self.delegate_config().map_err(|e| CniError {
            code: NOT_AVAILABLE,
            ..e
        })?;
        let done = self.delegate(&config, compact(&config).as_bytes(), Vec::new())?;
        answer.stderr.push_str(&done.stderr);
        Ok(())
    }

    /// Undoes what was added to this network for interfaces that the runtime no longer knows.
    fn gc(&self, answer: &mut Answer) -> Result<(), CniError> {
        let Some(valid) = &self.conf.valid_attachments else {
            let msg = "cni.dev/valid-attachments is missing: list what is still used";
            return Err(CniError::new(DECODING, msg));
        };
        let state = State::new(&self.conf.data_dir);
        let mut failed = Vec::new();
        for of in state.attachments()? {
            if valid.contains(&of) {
                continue;
            }
            let ours = match state.load(&of)? {
                Some(saved) => parse_saved(&saved.config)
                    .is_some_and(|config| config.get("name") == Some(&json!(self.conf.name))),
                None => false,
            };
            if !ours {
                continue;
            }
            let variables = vec![
                ("CNI_COMMAND", "DEL".into()),
                ("CNI_CONTAINERID", of.container_id.clone().into()),
                ("CNI_IFNAME", of.ifname.clone().into()),
                ("CNI_NETNS", OsString::new()),
            ];
            if let Err(e) = self.undo(&of, variables, answer) {
                failed.push(format!("{} {}: {}", of.container_id, of.ifname, e.msg));
            }
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(CniError::internal(failed.join("; ")))
        }
    }

    /// What the delegate is to do on this node.
    fn delegate_config(&self) -> Result<Map<String, Value>, CniError> {
        let file = &self.conf.subnet_file;
        let env = read_env(file).map_err(|reason| {
            CniError::internal(format!(
                "failed to load flannel 'subnet.env' file: {reason}. Check the flannel pod log for this node."
            ))
        })?;
        delegate_config(&self.conf, &env)
    }

    fn delegate(
        &self,
        config: &Map<String, Value>,
        json: &[u8],
        variables: Vec<(&'static str, OsString)>,
    ) -> Result<plugin::Answer, CniError> {
        let call = Call {
            plugin: delegate::plugin(config)?,
            path: OsStr::new(&self.environment.path),
            variables,
            config: json,
        };
        call.run()
    }
}

fn read_env(file: &Path) -> Result<PodEnv, String> {
    let text =
        read_bounded(file, MAX_ENV_LEN).map_err(|e| format!("open {}: {e}", file.display()))?;
    PodEnv::parse(&String::from_utf8_lossy(&text)).map_err(|e| match e {
        PodEnvError::Missing(_) => format!("{} {e}", file.display()),
        PodEnvError::NoValue { .. } | PodEnvError::Value { .. } => {
            format!("{}: {e}", file.display())
        }
    })
}

/// A saved configuration, if it is a JSON object.
fn parse_saved(text: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(text).ok()
}

fn compact(config: &Map<String, Value>) -> String {
    // A map with texts as keys is always JSON.
    serde_json::to_string(config).unwrap_or_default()
}

#[cfg(test)]
mod tests;
