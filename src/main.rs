//! The `haul` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    // Before anything else is set up: a child of the agent.
    if arguments.next().as_deref() == Some("child") {
        return haul::git::child::main(&arguments.next().unwrap_or_default());
    }
    ExitCode::SUCCESS
}
