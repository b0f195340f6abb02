//! The program `git`, where something of it is used: found by its path and started with nothing of the agent's
//! surroundings.

use std::{path::Path, process::Command};

/// Where it may be.
const PLACES: [&str; 3] = ["/usr/local/bin/git", "/usr/bin/git", "/bin/git"];

/// The program, without arguments: no settings of anybody, no prompts, no help from outside.
///
/// By its path: where a name has to be looked up in another `PATH` than ours, the standard library starts a program with
/// the help of a pair of sockets, which the sandbox forbids.
pub(super) fn git() -> Command {
    let found = PLACES.into_iter().find(|place| Path::new(place).is_file());
    let mut command = Command::new(found.unwrap_or(PLACES[1]));
    command.env_clear().current_dir("/").envs([
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("HOME", "/nonexistent"),
        ("LC_ALL", "C"),
        ("GIT_CONFIG_NOSYSTEM", "1"),
        ("GIT_CONFIG_GLOBAL", "/dev/null"),
        ("GIT_ATTR_NOSYSTEM", "1"),
        ("GIT_TERMINAL_PROMPT", "0"),
        ("GIT_ASKPASS", "/bin/false"),
        ("GIT_NO_REPLACE_OBJECTS", "1"),
        ("GIT_NO_LAZY_FETCH", "1"),
    ]);
    command
}
