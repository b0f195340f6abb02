//! The `haul` binary.

#[path = "main/allocator.rs"]
mod allocator;

fn main() -> std::process::ExitCode {
    // A child is this same program in a role of its own; it must not read the agent's configuration or arguments.
    let mut arguments = std::env::args();
    if arguments.nth(1).as_deref() == Some("child") {
        return haul::git::child::main(&arguments.next().unwrap_or_default());
    }
    haul::cli::main()
}
