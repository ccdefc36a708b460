//! The CNI plugin, installed as `flannel`: hands the environment and standard input to the library and decides the
//! exit code. Owns nothing else.

use std::io::{self, Write as _};
use std::process::ExitCode;

use loden::cni;

fn main() -> ExitCode {
    let environment = cni::Environment::new(|name| std::env::var_os(name));
    let answer = cni::run(&environment, io::stdin().lock());
    // Where standard error is closed, the answer still counts.
    let _said = io::stderr().write_all(answer.stderr.as_bytes());
    let printed = io::stdout().write_all(&answer.stdout);
    if answer.success && printed.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
