//! `haul worker`: the agent of this node.

use clap::Args;

use super::error::CliError;
use crate::config::Config;

const EXAMPLES: &str = "\
Examples:
  AGENT_NODE_NAME=worker-001 AGENT_AMQP_URL=amqp://haul:secret@rabbit:5672/%2f haul worker
  haul worker --config /etc/haul/haul.toml

The first SIGTERM or SIGINT takes no more tasks and finishes what runs within shutdown.grace; the second stops at once.";

/// Arguments of `haul worker`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct WorkerArgs {
    /// Ends the process by force at a step of a message's path; for tests of crash safety.
    #[arg(long, hide = true, value_name = "STEP")]
    observe: Option<String>,
}

pub(super) fn run(config: Config, args: WorkerArgs) -> Result<u8, CliError> {
    // The AMQP library writes whole messages into its warnings.
    config.log.install("info,lapin=error");
    let _ = (config.node()?, args.observe);
    Err(CliError::Refused("the agent is not part of this build".to_owned()))
}
