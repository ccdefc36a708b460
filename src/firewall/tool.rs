//! Owns running the firewall programs: argument vectors with standard input, never a shell; bounded in time
//! and output; errors that quote the command, the rule and the answer. Never decides what to run.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use super::Error;

/// Long enough for an `iptables-restore` of somebody else that holds the lock on a node with very many
/// services; short enough to report a stuck one.
const LIMIT: Duration = Duration::from_secs(15);

/// What is read of standard output: 50 bytes a rule, 300,000 rules.
const MAX_OUTPUT: usize = 16 << 20;

/// What is read of standard error, and quoted of it.
const MAX_ERROR: usize = 4 << 10;

/// Where programs are looked for: the directories of PATH, in order.
#[derive(Clone, Debug)]
pub(super) struct SearchPath(pub(super) Vec<PathBuf>);

impl SearchPath {
    pub(super) fn find(&self, program: &str) -> Option<PathBuf> {
        let runs = |path: &PathBuf| {
            path.metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        };
        self.0.iter().map(|dir| dir.join(program)).find(runs)
    }

    pub(super) fn require(&self, program: &str, package: &'static str) -> Result<PathBuf, Error> {
        self.find(program).ok_or_else(|| Error::Missing {
            program: program.to_owned(),
            package,
            searched: self.0.clone(),
        })
    }
}

/// How a program ended.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) code: Option<i32>,
    pub(super) stdout: String,
    pub(super) stderr: String,
    command: String,
    status: String,
}

impl Ended {
    /// The output of a program that succeeded.
    pub(super) fn success(self, input: &str) -> Result<String, Error> {
        if self.code == Some(0) {
            return Ok(self.stdout);
        }
        Err(self.refused(input))
    }

    /// The error that this end is; `input` is what the program was fed.
    pub(super) fn refused(self, input: &str) -> Error {
        let line = complained_line(&self.stderr)
            .and_then(|number| input.lines().nth(number.checked_sub(1)?))
            .map(str::to_owned);
        Error::Refused {
            command: self.command,
            status: self.status,
            stderr: self.stderr,
            line,
        }
    }
}

/// The line of the input that `iptables-restore` ("Error occurred at line: 3", "line 3 failed") or nft
/// ("-:3:1-20: Error", "/dev/stdin:3:1-20: Error") names, counted from 1.
fn complained_line(stderr: &str) -> Option<usize> {
    let marks = ["at line: ", "line ", "/dev/stdin:", "-:"];
    marks.iter().find_map(|mark| {
        let (_, rest) = stderr.split_once(mark)?;
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse().ok()
    })
}

/// Runs `program` and waits for its end. It inherits the network namespace of the calling thread and is killed
/// if the caller gives up.
pub(super) async fn run(program: &Path, args: &[&str], input: &str) -> Result<Ended, Error> {
    let name = program.file_name().unwrap_or(program.as_os_str());
    let command = std::iter::once(name.to_string_lossy().as_ref())
        .chain(args.iter().copied())
        .collect::<Vec<_>>()
        .join(" ");
    let end = tokio::time::timeout(LIMIT, converse(program, args, input, &command)).await;
    end.unwrap_or(Err(Error::Timeout {
        command,
        limit: LIMIT,
    }))
}

async fn converse(
    program: &Path,
    args: &[&str],
    input: &str,
    command: &str,
) -> Result<Ended, Error> {
    let failed = |source: io::Error| Error::Start {
        program: program.to_owned(),
        source,
    };
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut pipe) = stdin {
            // A program that gives up early closes the pipe; its exit status then says why.
            match pipe.write_all(input.as_bytes()).await {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        Ok(())
    };
    // The error text is read to its end, so that the program never waits for us, and then shortened.
    let (fed, stdout, stderr) =
        tokio::join!(feed, read(stdout, MAX_OUTPUT), read(stderr, MAX_OUTPUT));
    fed.map_err(failed)?;
    let too_much = |()| Error::TooMuchOutput {
        command: command.to_owned(),
        limit: MAX_OUTPUT,
    };
    let stdout = stdout.map_err(failed)?.map_err(too_much)?;
    let mut stderr = stderr.map_err(failed)?.map_err(too_much)?;
    stderr.truncate(MAX_ERROR);
    let status = child.wait().await.map_err(failed)?;
    Ok(Ended {
        code: status.code(),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).trim().to_owned(),
        command: command.to_owned(),
        status: status.to_string(),
    })
}

/// Everything up to `limit` bytes; `Err(())` if there is more.
async fn read(
    pipe: Option<impl AsyncRead + Unpin>,
    limit: usize,
) -> io::Result<Result<Vec<u8>, ()>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        let limit = u64::try_from(limit).unwrap_or(u64::MAX);
        pipe.take(limit.saturating_add(1))
            .read_to_end(&mut bytes)
            .await?;
    }
    Ok(if bytes.len() > limit {
        Err(())
    } else {
        Ok(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system() -> SearchPath {
        SearchPath(["/usr/bin", "/bin"].map(PathBuf::from).to_vec())
    }

    #[tokio::test]
    async fn a_program_reads_its_input_and_its_output_comes_back() {
        let cat = system().require("cat", "coreutils").unwrap();
        let text = "line\n".repeat(100_000);
        let ended = run(&cat, &[], &text).await.unwrap();
        assert!(ended.success("").unwrap() == text);
    }

    #[tokio::test]
    async fn endless_output_is_cut_off_with_an_error() {
        let yes = system().require("yes", "coreutils").unwrap();
        let error = run(&yes, &[], "").await.unwrap_err();
        assert!(matches!(error, Error::TooMuchOutput { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_failure_names_the_command_its_answer_and_the_line() {
        let shell = system().require("sh", "dash").unwrap();
        let script = "echo 'Error occurred at line: 2' >&2; exit 3";
        let ended = run(&shell, &["-c", script], "").await.unwrap();
        let text = ended.success("*nat\n-A BAD\nCOMMIT\n").unwrap_err();
        let text = text.to_string();
        for part in ["sh -c", "exit status: 3", "at line: 2", "rule: -A BAD"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_missing_program_is_named_with_where_it_was_looked_for() {
        let error = system().require("no-such", "nftables").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("no-such") && text.contains("/usr/bin:/bin"),
            "{text}"
        );
        assert!(text.contains("nftables"), "{text}");
    }

    #[test]
    fn the_line_complained_about_is_found_in_either_programs_words() {
        for (stderr, line) in [
            ("iptables-restore: line 7 failed", Some(7)),
            ("Error occurred at line: 3\nTry `-h'", Some(3)),
            ("/dev/stdin:4:1-9: Error: syntax error", Some(4)),
            ("-:5:1-9: Error: syntax error", Some(5)),
            ("Permission denied", None),
        ] {
            assert_eq!(complained_line(stderr), line, "{stderr}");
        }
    }
}
