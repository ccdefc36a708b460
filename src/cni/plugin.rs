//! Owns finding and running another plugin. Never looks into what it is asked or answers, but for an error.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use super::error::{CniError, ENVIRONMENT};

/// How often a program that is just being written is started again, and how far apart: libcni's numbers.
const BUSY_RETRIES: u32 = 5;
const BUSY_WAIT: Duration = Duration::from_secs(1);

/// One call of a plugin.
#[derive(Debug)]
pub(super) struct Call<'a> {
    /// The name of its program.
    pub(super) plugin: &'a str,
    /// Where to look for it: `CNI_PATH`.
    pub(super) path: &'a OsStr,
    /// What differs from the environment that we were called with.
    pub(super) variables: Vec<(&'static str, OsString)>,
    /// The configuration.
    pub(super) config: &'a [u8],
}

/// What a plugin that succeeded has said.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
}

impl Call<'_> {
    /// Runs it to its end.
    ///
    /// # Errors
    ///
    /// The plugin's own error object, or why there is none.
    pub(super) fn run(&self) -> Result<Answer, CniError> {
        let program = self.find()?;
        let failed = |e: io::Error| CniError::file("run the delegate", &program, e);
        let mut command = Command::new(&program);
        command
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = start(&mut command).map_err(failed)?;
        let output = thread::scope(|scope| {
            if let Some(mut stdin) = child.stdin.take() {
                // A plugin that does not read its configuration says why itself.
                scope.spawn(move || stdin.write_all(self.config));
            }
            child.wait_with_output()
        });
        self.judge(output.map_err(failed)?)
    }

    fn judge(&self, output: Output) -> Result<Answer, CniError> {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            return Ok(Answer {
                stdout: output.stdout,
                stderr,
            });
        }
        if let Ok(error) = serde_json::from_slice(&output.stdout) {
            return Err(error);
        }
        let how = match output.status.signal() {
            Some(signal) => format!("ended by signal {signal}"),
            None => format!("{}", output.status),
        };
        let said = if output.stdout.is_empty() {
            stderr
        } else {
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let said: String = said.trim().chars().take(1024).collect();
        let plugin = self.plugin;
        Err(CniError::internal(format!(
            "{plugin} failed, {how}: {said}"
        )))
    }

    fn find(&self) -> Result<PathBuf, CniError> {
        let wrong = |msg| Err(CniError::new(ENVIRONMENT, msg));
        let plugin = self.plugin;
        if plugin.is_empty() || plugin.contains('/') || plugin == "." || plugin == ".." {
            return wrong(format!(
                "invalid plugin name: {plugin:?}: name a program in CNI_PATH, without a directory"
            ));
        }
        let mut candidates = env::split_paths(self.path)
            .filter(|dir| !dir.as_os_str().is_empty())
            .map(|dir| dir.join(plugin));
        match candidates.find(|path| path.is_file()) {
            Some(path) => Ok(path),
            None => wrong(format!(
                "failed to find plugin {plugin:?} in path {}: install the standard CNI plugins there",
                self.path.to_string_lossy()
            )),
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a short program of one thread, which has nothing else to do"
)]
fn start(command: &mut Command) -> io::Result<Child> {
    let mut retries = 0;
    loop {
        match command.spawn() {
            Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && retries < BUSY_RETRIES => {
                retries += 1;
                thread::sleep(BUSY_WAIT);
            }
            other => return other,
        }
    }
}
