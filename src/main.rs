//! Dispatches to the library and decides the exit code. Owns nothing else.

use std::process::ExitCode;

use loden::{cli, telemetry};

/// The exit code for a command line that makes no sense, as clap has it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let invocation = match cli::parse() {
        Ok(invocation) => invocation,
        Err(error) => {
            // A closed stderr leaves nowhere to say so; the exit code still tells.
            let _printed = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    telemetry::log::init(invocation.verbosity());
    match invocation.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(
                clippy::print_stderr,
                reason = "the one line that says why the program ends"
            )]
            {
                eprintln!("loden: {}", cli::sentence(&error));
            }
            ExitCode::FAILURE
        }
    }
}
