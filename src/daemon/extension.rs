//! Owns running the commands of the `extension` backend: argument vectors, never a shell; what they are to know is in
//! their environment and on their standard input; bounded in time and output. Never decides what they do.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::DaemonError;
use super::register::Registration;
use super::served::Served;
use crate::backend::outside::{EXTENSION, Outside};
use crate::config::{Argv, NetworkConfig};
use crate::lease::{Lease, LeaseAttrs, Subnets};

/// How long a command may take. Peers wait for each other.
const LIMIT: Duration = Duration::from_secs(60);

/// How long the output of a command that has ended is waited for, where something it started holds on to it.
const LINGER: Duration = Duration::from_millis(200);

/// What a command may print. The first one's output goes into the lease.
const MAX_OUTPUT: usize = 8 << 10;

/// What failed for a peer is tried again after this long.
const AGAIN: Duration = Duration::from_secs(30);

/// Why a command did not do what it was to.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It was not there, or not to be run.
    #[error(
        "cannot run {program}: {source}: Backend.{key} is a program and its arguments, without a shell"
    )]
    Start {
        /// The key of the configuration.
        key: &'static str,
        /// The program.
        program: String,
        /// What the system says.
        source: io::Error,
    },
    /// It ended otherwise than with success.
    #[error(
        "Backend.{key} failed ({status}): {}", if output.is_empty() { "it printed nothing" } else { output }
    )]
    Failed {
        /// The key of the configuration.
        key: &'static str,
        /// How.
        status: ExitStatus,
        /// What it printed.
        output: String,
    },
    /// It took too long.
    #[error(
        "Backend.{key} did not end within {LIMIT:?}, and was killed with all that it had started"
    )]
    Timeout {
        /// The key of the configuration.
        key: &'static str,
    },
    /// It printed too much.
    #[error(
        "Backend.{key} printed more than {MAX_OUTPUT} bytes, and was killed with all that it had started"
    )]
    TooMuchOutput {
        /// The key of the configuration.
        key: &'static str,
    },
}

/// Everything that a command starts is in one group, which goes with this unless the command has ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended just now.
            let _gone = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Runs a command to its end; what it printed on both outputs, without white space at the ends.
async fn run(
    key: &'static str,
    argv: &Argv,
    variables: &[(&str, String)],
    input: &str,
) -> Result<String, CommandError> {
    let failed = |source| CommandError::Start {
        key,
        program: argv.program().to_owned(),
        source,
    };
    let mut command = Command::new(argv.program());
    command
        .args(argv.arguments())
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(failed)?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let mut group = Group(pid.map(Pid::from_raw));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut stdin = child.stdin.take();
    let input = format!("{input}\n");
    let ended = async {
        let feed = async {
            if let Some(mut pipe) = stdin.take() {
                // One that does not read closes it, which is its own affair.
                let _unread = pipe.write_all(input.as_bytes()).await;
            }
        };
        let mut output = Vec::new();
        let mut errors = Vec::new();
        let mut both =
            Box::pin(async { tokio::join!(read(stdout, &mut output), read(stderr, &mut errors)) });
        let waiting = async { tokio::join!(feed, child.wait()).1 };
        tokio::pin!(waiting);
        let status = tokio::select! {
            status = &mut waiting => {
                // Whatever it started may keep the pipe open for ever.
                let read = timeout(LINGER, &mut both).await;
                if matches!(read, Ok((Err(()), _) | (_, Err(())))) {
                    return Err(CommandError::TooMuchOutput { key });
                }
                status
            }
            read = &mut both => {
                if read.0.is_err() || read.1.is_err() {
                    return Err(CommandError::TooMuchOutput { key });
                }
                waiting.await
            }
        };
        let status = status.map_err(failed)?;
        drop(both);
        output.append(&mut errors);
        Ok((status, String::from_utf8_lossy(&output).trim().to_owned()))
    };
    let (status, output) = timeout(LIMIT, ended)
        .await
        .map_err(|_elapsed| CommandError::Timeout { key })??;
    // What it leaves running on purpose goes on.
    group.0 = None;
    if status.success() {
        Ok(output)
    } else {
        Err(CommandError::Failed {
            key,
            status,
            output,
        })
    }
}

/// Everything up to [`MAX_OUTPUT`] bytes; an error if there is more.
async fn read(pipe: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) -> Result<(), ()> {
    let Some(pipe) = pipe else { return Ok(()) };
    let limit = u64::try_from(MAX_OUTPUT).unwrap_or(u64::MAX);
    let mut pipe = pipe.take(limit.saturating_add(1));
    // What a broken pipe would tell, the exit status tells.
    let _read = pipe.read_to_end(into).await;
    if into.len() > MAX_OUTPUT {
        return Err(());
    }
    Ok(())
}

/// Runs the command that comes before the lease, and has the plan publish what it says.
pub(super) async fn before_lease(outside: &mut Outside) -> Result<(), DaemonError> {
    let command = outside.commands().and_then(|it| it.pre_startup.clone());
    if let Some(command) = command {
        let output = run("PreStartupCommand", &command, &[], "").await?;
        outside.publish(&output);
    }
    Ok(())
}

/// Runs the command that comes after the lease.
pub(super) async fn after_lease(
    outside: &Outside,
    config: &NetworkConfig,
    lease: &Lease,
) -> Result<(), DaemonError> {
    let command = outside.commands().and_then(|it| it.post_startup.as_ref());
    if let Some(command) = command {
        let network = config.ipv4.as_ref().map(|pool| pool.network());
        let mut variables = of_lease(&lease.subnets, &lease.attrs);
        let network = network.map_or_else(|| "0.0.0.0/0".to_owned(), |net| net.to_string());
        variables.push(("NETWORK", network));
        run("PostStartupCommand", command, &variables, "").await?;
    }
    Ok(())
}

/// What the original says of a lease, in its words for what is not there.
fn of_lease(subnets: &Subnets, attrs: &LeaseAttrs) -> Vec<(&'static str, String)> {
    fn text<T: ToString>(value: Option<T>, none: &str) -> String {
        value.map_or_else(|| none.to_owned(), |value| value.to_string())
    }
    vec![
        ("SUBNET", text(subnets.v4(), "0.0.0.0/0")),
        ("IPV6SUBNET", text(subnets.v6(), "::/0")),
        ("PUBLIC_IP", text(attrs.public_ip, "0.0.0.0")),
        ("PUBLIC_IPV6", text(attrs.public_ipv6, "<nil>")),
    ]
}

/// Runs commands for peers that come and go. Dropping it ends the one that runs, and runs no other: what was set up
/// for peers stays, as the original leaves it.
pub(super) struct Peers {
    wanted: watch::Sender<Option<Vec<Lease>>>,
    failures: watch::Receiver<Arc<BTreeMap<Subnets, String>>>,
    task: JoinHandle<()>,
}

impl Peers {
    /// For the backends that have commands.
    pub(super) fn start(registration: &Registration, subnet_file: &Path) -> Option<Self> {
        let outside = registration.plan.outside()?;
        let commands = outside.commands()?;
        let (add, remove) = (commands.subnet_add.clone(), commands.subnet_remove.clone());
        let (wanted, receiver) = watch::channel(None);
        let (sender, failures) = watch::channel(Arc::default());
        let file = Served::beside(subnet_file);
        Some(Self {
            wanted,
            failures,
            task: tokio::spawn(async move { follow(add, remove, file, receiver, sender).await }),
        })
    }

    /// Says who the peers are.
    pub(super) fn want<'a>(&self, leases: impl Iterator<Item = &'a Lease>) {
        let ours = leases.filter(|lease| lease.attrs.backend_type == EXTENSION);
        let leases: Vec<Lease> = ours.cloned().collect();
        self.wanted.send_if_modified(|before| {
            let differs = before.as_ref() != Some(&leases);
            *before = Some(leases);
            differs
        });
    }

    /// What failed for which peer.
    pub(super) fn failures(&self) -> Arc<BTreeMap<Subnets, String>> {
        Arc::clone(&self.failures.borrow())
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(
    add: Option<Argv>,
    remove: Option<Argv>,
    mut file: Served,
    mut wanted: watch::Receiver<Option<Vec<Lease>>>,
    failures: watch::Sender<Arc<BTreeMap<Subnets, String>>>,
) {
    // Who is gone is not known before the store has listed who is there.
    if wanted.wait_for(Option::is_some).await.is_err() {
        return;
    }
    let mut served: BTreeMap<Subnets, LeaseAttrs> = BTreeMap::new();
    // Those of the run before: whoever stayed is served again, as by a first start.
    let mut left = file.read();
    loop {
        let leases = wanted.borrow_and_update().clone().unwrap_or_default();
        let mut failed = BTreeMap::new();
        let same = |subnets: &Subnets, attrs: &LeaseAttrs| {
            let mut leases = leases.iter();
            leases.any(|lease| lease.subnets == *subnets && lease.attrs == *attrs)
        };
        // Before the commands run: one that is killed in the middle has done some of its work.
        remember(&mut file, &leases, &left, &served);
        let is_gone = |subnets: &Subnets, attrs: &mut LeaseAttrs| !same(subnets, attrs);
        let mut gone: Vec<(Subnets, LeaseAttrs)> = left.extract_if(.., is_gone).collect();
        gone.extend(served.extract_if(.., is_gone));
        for (subnets, attrs) in gone {
            // What is gone is gone, whether its removal succeeds or not.
            if let Err(error) = one("SubnetRemoveCommand", remove.as_ref(), &subnets, &attrs).await
            {
                tracing::warn!("lease {subnets}: {error}");
            }
        }
        // Before the others, which may take long: whoever is removed is not removed again by the next run.
        remember(&mut file, &leases, &left, &served);
        for lease in &leases {
            if wanted.has_changed().unwrap_or(false) {
                break;
            }
            if served.contains_key(&lease.subnets) {
                continue;
            }
            match one(
                "SubnetAddCommand",
                add.as_ref(),
                &lease.subnets,
                &lease.attrs,
            )
            .await
            {
                Ok(()) => {
                    left.remove(&lease.subnets);
                    served.insert(lease.subnets, lease.attrs.clone());
                }
                Err(error) => {
                    tracing::warn!("lease {}: {error}", lease.subnets);
                    failed.insert(lease.subnets, error.to_string());
                }
            }
        }
        file.write(left.iter().chain(&served));
        let any = !failed.is_empty();
        failures.send_replace(Arc::new(failed));
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(AGAIN), if any => {}
        }
    }
}

/// All for whom a command has been run or is about to be; of a peer that changes, what it was.
fn remember(
    file: &mut Served,
    coming: &[Lease],
    left: &BTreeMap<Subnets, LeaseAttrs>,
    served: &BTreeMap<Subnets, LeaseAttrs>,
) {
    let coming = coming.iter().map(|lease| (&lease.subnets, &lease.attrs));
    let all: BTreeMap<_, _> = coming.chain(left).chain(served).collect();
    file.write(all.into_iter());
}

async fn one(
    key: &'static str,
    command: Option<&Argv>,
    subnets: &Subnets,
    attrs: &LeaseAttrs,
) -> Result<(), CommandError> {
    let Some(command) = command else {
        return Ok(());
    };
    // What the peer's first command has said.
    let said = attrs.backend_data.as_ref();
    let said = said.map_or_else(String::new, |data| {
        serde_json::from_str(data.get()).unwrap_or_else(|_other| data.get().to_owned())
    });
    let output = run(key, command, &of_lease(subnets, attrs), &said).await?;
    tracing::debug!(key, %subnets, output, "command");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(words: &[&str]) -> Argv {
        Argv::new(words.iter().map(|word| (*word).to_owned()).collect()).unwrap()
    }

    #[tokio::test]
    async fn words_are_arguments_and_nothing_is_expanded_or_interpreted() {
        let words = ["printf", "%s|", "a b", "*", "`id`", ";", "&&"];
        let said = run("K", &argv(&words), &[], "").await.unwrap();
        assert_eq!(said, "a b|*|`id`|;|&&|");
    }

    #[tokio::test]
    async fn variables_are_in_the_environment_and_data_on_standard_input() {
        let subnets: Subnets = "198.18.2.0-24".parse().unwrap();
        let attrs = LeaseAttrs::parse(br#"{"PublicIP":"192.0.2.2","PublicIPv6":null}"#).unwrap();
        let variables = of_lease(&subnets, &attrs);
        let said = run("K", &argv(&["env"]), &variables, "").await.unwrap();
        for line in [
            "SUBNET=198.18.2.0/24",
            "IPV6SUBNET=::/0",
            "PUBLIC_IP=192.0.2.2",
            "PUBLIC_IPV6=<nil>",
        ] {
            assert!(said.lines().any(|it| it == line), "{line} in {said}");
        }
        let said = run("K", &argv(&["cat"]), &[], "from the peer")
            .await
            .unwrap();
        assert_eq!(said, "from the peer");
    }

    #[tokio::test]
    async fn failures_say_what_was_printed_and_what_is_missing() {
        let error = run("K", &argv(&["ls", "/no/such/place"]), &[], "")
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/no/such/place"), "{error}");
        let error = run("K", &argv(&["false"]), &[], "").await.unwrap_err();
        assert!(error.to_string().ends_with("it printed nothing"), "{error}");
        let error = run("K", &argv(&["/no/such/program"]), &[], "")
            .await
            .unwrap_err();
        assert!(error.to_string().contains("without a shell"), "{error}");
    }

    #[tokio::test]
    async fn whoever_is_removed_is_forgotten_while_another_is_being_added() {
        let dir = tempfile::tempdir().unwrap();
        let beside = || Served::beside(&dir.path().join("subnet.env"));
        let lease = |n: u8| Lease {
            subnets: format!("198.18.{n}.0-24").parse().unwrap(),
            attrs: LeaseAttrs::parse(br#"{"PublicIP":"192.0.2.2","PublicIPv6":null}"#).unwrap(),
            expires: None,
            extension: crate::lease::LeaseExtension::default(),
        };
        let (gone, comes) = (lease(9), lease(2));
        beside().write([(&gone.subnets, &gone.attrs)].into_iter());
        let (_wanted, wanted) = watch::channel(Some(vec![comes.clone()]));
        let (failures, _) = watch::channel(Arc::default());
        let (add, remove) = (argv(&["sleep", "60"]), argv(&["true"]));
        let task = tokio::spawn(follow(Some(add), Some(remove), beside(), wanted, failures));
        let forgotten = async {
            while beside().read().into_keys().ne([comes.subnets]) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = timeout(Duration::from_secs(30), forgotten).await;
        assert!(waited.is_ok() && !task.is_finished());
        task.abort();
    }

    #[tokio::test]
    async fn endless_output_ends_the_command() {
        let error = run("K", &argv(&["yes"]), &[], "").await.unwrap_err();
        assert!(
            matches!(error, CommandError::TooMuchOutput { .. }),
            "{error}"
        );
    }

    #[tokio::test]
    async fn command_that_is_given_up_takes_what_it_started_along_and_one_that_ended_does_not_wait()
    {
        // The test's own script: what a shell does is its own business. Nobody else sleeps for so long.
        let time = format!("987.{}", std::process::id());
        let command = argv(&["sh", "-c", &format!("sleep {time} & echo $!; wait")]);
        let running = run("K", &command, &[], "");
        assert!(timeout(Duration::from_millis(500), running).await.is_err());
        let left = || {
            let read = |entry: std::fs::DirEntry| std::fs::read(entry.path().join("cmdline")).ok();
            let all = std::fs::read_dir("/proc")
                .unwrap()
                .flatten()
                .filter_map(read);
            let sleeps = format!("sleep\0{time}\0");
            all.into_iter().any(|line| line == sleeps.as_bytes())
        };
        let gone = async {
            while left() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        assert!(timeout(Duration::from_secs(60), gone).await.is_ok());
        // It leaves something running that holds its output: no reason to wait for that.
        let said = run("K", &argv(&["sh", "-c", "sleep 5 & echo done"]), &[], "").await;
        assert_eq!(said.unwrap(), "done");
    }
}
