//! `haul topology apply`: makes what is missing.

use clap::Args;
use serde_json::json;

use super::Tools;
use crate::{
    broker::{BrokerError, management::Told},
    cli::{error::CliError, output},
    doctor::set_policy_command,
    protocol::NodeName,
    shutdown::exit,
};

const EXAMPLES: &str = "\
Examples:
  haul topology apply
  haul topology apply --node worker-001 --node worker-002
  haul topology apply --enrolled                        # also what is missing of nodes that are there

What exists and is equal stays as it is; what exists and differs is refused by the broker and left alone.";

/// Arguments of `haul topology apply`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct ApplyArgs {
    /// A node to be enrolled; may be repeated.
    #[arg(long, value_name = "NODE")]
    node: Vec<NodeName>,
    /// Also every node whose queue is on the broker: its bindings come back where an exchange was deleted.
    #[arg(long)]
    enrolled: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl ApplyArgs {
    pub(super) fn nodes(&self) -> &[NodeName] {
        &self.node
    }
}

pub(super) async fn run(tools: &Tools<'_>, args: &ApplyArgs) -> Result<u8, CliError> {
    let nodes = if args.enrolled { enrolled(tools).await? } else { args.node.clone() };
    let topology = tools.wanted.topology(&nodes);
    tools.broker.declare(&topology).await.map_err(|error| match error {
        BrokerError::Refused { what, reason } => CliError::Refused(format!(
            "the broker refused {what}: {reason}; `haul topology doctor` names what differs and what mends it"
        )),
        other => other.into(),
    })?;
    let version = match tools.management.version().await {
        Ok(version) => version.or(tools.given.version),
        Err(_) => tools.given.version,
    };
    let policies = version.map(|version| tools.wanted.policies(version)).unwrap_or_default();
    let vhost = tools.management.vhost();
    let (mut set, mut by_hand) = (Vec::new(), Vec::new());
    let mut reason = String::new();
    for policy in &policies {
        match tools.management.set_policy(policy).await {
            Ok(()) => set.push(policy.name.clone()),
            Err(error) => {
                reason = error.to_string();
                by_hand.push(set_policy_command(policy, vhost));
            }
        }
    }
    if args.json {
        output::json(&json!({
            "exchanges": topology.exchanges.len(),
            "queues": topology.queues.len(),
            "bindings": topology.bindings.len(),
            "nodes": nodes,
            "version": version,
            "policies": set,
            "run": by_hand,
        }))?;
    } else {
        output::line(&format!(
            "{} exchanges, {} queues and {} bindings are in place",
            topology.exchanges.len(),
            topology.queues.len(),
            topology.bindings.len()
        ))?;
        for name in &set {
            output::line(&format!("policy {name} is set"))?;
        }
        for command in &by_hand {
            output::line(command)?;
        }
    }
    match version {
        None => output::note("the broker does not tell its version: run `haul topology doctor` for the policies"),
        Some(version) if policies.is_empty() => output::note(&format!("version {version} needs no policies")),
        Some(_) if by_hand.is_empty() => {}
        Some(_) => output::note(&format!(
            "the policies could not be set by us ({reason}); run the {} commands above on the broker",
            by_hand.len()
        )),
    }
    Ok(if by_hand.is_empty() && version.is_some() { exit::OK } else { exit::FAILED })
}

/// The nodes that are asked for and those that the broker knows.
async fn enrolled(tools: &Tools<'_>) -> Result<Vec<NodeName>, CliError> {
    let wanted = &tools.wanted;
    let inventory = tools.management.inventory(wanted.names.prefix(), std::slice::from_ref(&wanted.results)).await?;
    Ok(wanted.nodes_with(&Told::Yes(inventory)))
}
