//! The program `git`: found, judged by its version, started with nothing of the agent's surroundings.

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use super::{
    said::{Heard, Listening},
    version::Version,
};
use crate::{failure::Failure, git::program::git, protocol::Scheme};

/// A git that can be used.
#[derive(Debug)]
pub(super) struct Program {
    scheme: Scheme,
    /// Read by every process of it through the descriptor, which all of them inherit.
    settings: Option<File>,
}

impl Program {
    /// Asks the program for its version.
    ///
    /// # Errors
    /// `internal` where there is none or it is refused.
    pub(super) fn find(scheme: Scheme) -> Result<Self, Failure> {
        let program = Self { scheme, settings: None };
        let output = program
            .bare()
            .arg("version")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| Failure::internal(format!("the program git cannot be started: {error}")))?;
        Version::read(&String::from_utf8_lossy(&output.stdout))?.check()?;
        Ok(program)
    }

    /// The same with settings.
    pub(super) fn with(self, settings: File) -> Self {
        Self { settings: Some(settings), ..self }
    }

    /// One of its commands, on the repository `git_dir`.
    pub(super) fn command(&self, name: &str, git_dir: &Path) -> Command {
        let mut command = self.bare();
        // A path, not the settings themselves: what is in an environment can be read from outside.
        if let Some(file) = &self.settings {
            command.env("GIT_CONFIG_COUNT", "1").env("GIT_CONFIG_KEY_0", "include.path");
            command.env("GIT_CONFIG_VALUE_0", format!("/proc/self/fd/{}", file.as_raw_fd()));
        }
        // Without a repository it would look for one around itself.
        command.env("GIT_DIR", git_dir).arg(name);
        command
    }

    fn bare(&self) -> Command {
        let mut command = git();
        command.envs([
            ("GIT_ALLOW_PROTOCOL", allowed(self.scheme)),
            // Tells on the standard error what no other word of it does: whether the upstream spoke the protocol, and
            // how many bytes a pack had.
            ("GIT_TRACE2_EVENT", "2"),
            ("GIT_TRACE2_EVENT_BRIEF", "1"),
        ]);
        command
    }
}

/// What git calls a scheme.
const fn allowed(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::Https => "https",
        Scheme::Http => "http",
        Scheme::Ssh => "ssh",
        Scheme::File => "file",
    }
}

/// Starts `command`, whose words are listened to.
///
/// # Errors
/// `internal` where that fails.
pub(super) fn start(command: &mut Command) -> Result<Child, Failure> {
    command
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Failure::internal(format!("the program git cannot be started: {error}")))
}

/// Waits until a process and all that it started have fallen silent, and returns what they said.
///
/// # Errors
/// When the process cannot be waited for.
pub(super) fn end(mut child: Child, listening: Listening) -> Result<(ExitStatus, Heard), Failure> {
    let status = child.wait()?;
    Ok((status, listening.heard()))
}
