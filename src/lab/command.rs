//! Owns calling the system's network tools: argument vectors, never a shell; errors quote the command and
//! what it wrote to standard error. Never decides what to call.

use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output, Stdio};

use super::{Error, NetNs};

/// Runs `program` to its end, inside `netns` if one is given, and returns its standard output.
///
/// The child has a process group of its own: an interrupt typed at the terminal ends the program that
/// builds or removes the lab in an orderly way, not the tool it is just calling.
///
/// # Errors
/// [`Error::Missing`], [`Error::Io`], or [`Error::Command`] if it exits with a failure.
pub fn run(netns: Option<&NetNs>, program: &str, args: &[&str]) -> Result<String, Error> {
    let output = output(netns, program, args, "")?;
    check(output, || format!("{program} {}", args.join(" ")))
}

/// Feeds `lines` to `program -batch -` (`ip` or `bridge`): one process for many changes. With `netns`, they
/// happen in that namespace. Does nothing for an empty batch.
///
/// # Errors
/// As [`run`]; the error quotes the line that was refused.
pub fn batch(netns: Option<&NetNs>, program: &str, lines: &[String]) -> Result<(), Error> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut text = lines.join("\n");
    text.push('\n');
    let output = output(netns, program, &["-batch", "-"], &text)?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let place = netns.map_or_else(String::new, |ns| format!(" (in {})", ns.name()));
    check(output, || {
        match failed_line(&stderr).and_then(|number| lines.get(number - 1)) {
            Some(line) => format!("{program} {line}{place}"),
            None => format!("{program} -batch -{place}"),
        }
    })
    .map(drop)
}

fn output(
    netns: Option<&NetNs>,
    program: &str,
    args: &[&str],
    stdin: &str,
) -> Result<Output, Error> {
    let mut command = Command::new(program);
    command
        .args(args)
        .process_group(0)
        .stdin(if stdin.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = match netns {
        Some(netns) => netns.spawn(&mut command)?,
        None => command
            .spawn()
            .map_err(|source| Error::start(program.to_owned(), source))?,
    };
    if let Some(mut pipe) = child.stdin.take() {
        // A tool that gives up early closes the pipe; its exit status then says why.
        if let Err(source) = pipe.write_all(stdin.as_bytes())
            && source.kind() != io::ErrorKind::BrokenPipe
        {
            return Err(Error::Io {
                doing: "write to",
                thing: program.to_owned(),
                source,
            });
        }
    }
    child
        .wait_with_output()
        .map_err(Error::io("wait for", program))
}

fn check(output: Output, command: impl FnOnce() -> String) -> Result<String, Error> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Command {
        command: command(),
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// The number in iproute2's `Command failed -:7`, counted from 1.
fn failed_line(stderr: &str) -> Option<usize> {
    let (_, rest) = stderr.split_once("Command failed -:")?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok().filter(|&number| number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_named_with_the_remedy() {
        let error = run(None, "no-such-program", &[]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("no-such-program is not installed: run scripts/setup")
        );
    }

    #[test]
    fn a_refused_batch_quotes_the_line_and_the_answer() {
        let lines = [
            "link show".to_owned(),
            "link set no-such-device up".to_owned(),
        ];
        let text = batch(None, "ip", &lines).unwrap_err().to_string();
        assert!(
            text.contains("`ip link set no-such-device up` failed"),
            "{text}"
        );
        assert!(text.contains("Cannot find device"), "{text}");
    }
}
