//! `haul topology`: what the broker should have, what it has, and the command that mends it.

mod apply;
mod doctor;
mod migrate;
mod plan;
mod users;

use std::sync::Arc;

use clap::{Args, Subcommand};

use super::{connect, error::CliError};
use crate::{
    broker::{Broker, BrokerError, address::Address, management::Management, version::Version},
    config::Config,
    doctor::{Facts, Given, Wanted, look},
    protocol::NodeName,
};

/// The commands of `haul topology`.
#[derive(Debug, Subcommand)]
pub(super) enum TopologyCommand {
    /// Show everything that should be on the broker, and whether it is
    #[command(after_help = plan::EXAMPLES)]
    Plan(TopologyArgs),
    /// Make what is missing: what the fleet shares, policies, and nodes by --node
    Apply(apply::ApplyArgs),
    /// Name each unsafe or missing thing with the command that mends it
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(TopologyArgs),
    /// Make queues with wrong arguments anew, without losing a message
    Migrate(migrate::MigrateArgs),
    /// Print users for nodes, masters and operators that may do their work and no more
    Users(users::UsersArgs),
}

/// Arguments of several of them.
#[derive(Debug, Args)]
pub(super) struct TopologyArgs {
    /// A node that is, or is to be, enrolled; may be repeated. Those on the broker are found where it can be asked.
    #[arg(long, value_name = "NODE")]
    node: Vec<NodeName>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(config: Config, command: TopologyCommand) -> Result<u8, CliError> {
    if let TopologyCommand::Users(args) = command {
        return users::run(&config, &args);
    }
    let broker = connect(&config).await?;
    let tools = |nodes: &[NodeName]| Tools::new(&config, &broker, nodes);
    let code = match command {
        TopologyCommand::Plan(args) => plan::run(&tools(&args.node)?, &args).await,
        TopologyCommand::Apply(args) => apply::run(&tools(args.nodes())?, &args).await,
        TopologyCommand::Doctor(args) => doctor::run(&tools(&args.node)?, &args).await,
        TopologyCommand::Migrate(args) => migrate::run(&config, &tools(args.nodes())?, &args).await,
        TopologyCommand::Users(_) => unreachable!("it needs no broker and was run above"),
    };
    broker.close().await;
    code
}

/// What the commands that ask the broker work with.
struct Tools<'a> {
    broker: &'a Arc<dyn Broker>,
    management: Management,
    wanted: Wanted,
    given: Given,
}

impl<'a> Tools<'a> {
    fn new(config: &Config, broker: &'a Arc<dyn Broker>, nodes: &[NodeName]) -> Result<Self, CliError> {
        Ok(Self {
            broker,
            management: Management::new(&config.broker)?,
            wanted: Wanted {
                names: config.names(),
                results: config.results_queue(),
                nodes: nodes.to_vec(),
                longest_deadline: config.git.max_timeout,
            },
            given: Given {
                addresses: config.broker.urls.iter().map(Address::parse).collect::<Result<_, _>>()?,
                version: told_version(broker),
                consumer_timeout: config.broker.consumer_timeout,
            },
        })
    }

    async fn look(&self) -> Result<Facts, BrokerError> {
        look(&self.wanted, self.given.clone(), self.broker.as_ref(), Some(&self.management)).await
    }
}

/// The version that the broker told when it was connected to.
pub(super) fn told_version(broker: &Arc<dyn Broker>) -> Option<Version> {
    broker.server_version()?.parse().ok()
}
