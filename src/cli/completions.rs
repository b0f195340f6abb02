//! `haul completions`: scripts that let a shell complete commands and options.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, error::CliError, output};
use crate::shutdown::exit;

const EXAMPLES: &str = "\
Examples:
  haul completions bash > /etc/bash_completion.d/haul
  haul completions zsh > ~/.zfunc/_haul
  haul completions fish > ~/.config/fish/completions/haul.fish";

/// Arguments of `haul completions`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs) -> Result<u8, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "haul", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())?;
    Ok(exit::OK)
}
