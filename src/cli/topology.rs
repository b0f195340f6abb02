//! `haul topology`: what the broker should have, what it has, and the command that mends it.

use std::{sync::Arc, time::Duration};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{connect, error::CliError, output, table::Table};
use crate::{
    broker::{Broker, BrokerError, address::Address, management::Management, version::Version},
    config::Config,
    doctor::{Facts, Finding, Given, Severity, State, Wanted, examine, look, plan, set_policy_command},
    protocol::{NodeName, printable},
    shutdown::exit,
};

/// How long the broker's statistics may follow a change, and how often they are looked at meanwhile.
const STATISTICS_LAG: Duration = Duration::from_secs(12);
const STATISTICS_PERIOD: Duration = Duration::from_secs(2);

const PLAN_EXAMPLES: &str = "\
Examples:
  haul topology plan
  haul topology plan --node worker-001 --json

Marks: = as it should be, + missing, ~ differs, ? there, but only the management API could tell the rest.";

const APPLY_EXAMPLES: &str = "\
Examples:
  haul topology apply
  haul topology apply --node worker-001 --node worker-002

What exists and is equal stays as it is; what exists and differs is refused by the broker and left alone.";

const DOCTOR_EXAMPLES: &str = "\
Examples:
  haul topology doctor
  haul topology doctor --json | jq -r '.[] | select(.severity == \"red\") | .mend'

Ends with 0 where nothing is red, else with 1.";

/// The commands of `haul topology`.
#[derive(Debug, Subcommand)]
pub(super) enum TopologyCommand {
    /// Show everything that should be on the broker, and whether it is
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(TopologyArgs),
    /// Make what is missing: what the fleet shares, policies, and nodes by --node
    #[command(after_help = APPLY_EXAMPLES)]
    Apply(TopologyArgs),
    /// Name each unsafe or missing thing with the command that mends it
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(TopologyArgs),
}

/// Arguments of each of them.
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
    let broker = connect(&config).await?;
    let code = match command {
        TopologyCommand::Plan(args) => show_plan(&Tools::new(&config, &broker, &args)?, &args).await,
        TopologyCommand::Apply(args) => apply(&Tools::new(&config, &broker, &args)?, &args).await,
        TopologyCommand::Doctor(args) => doctor(&Tools::new(&config, &broker, &args)?, &args).await,
    };
    broker.close().await;
    code
}

/// What each of the commands works with.
struct Tools<'a> {
    broker: &'a Arc<dyn Broker>,
    management: Management,
    wanted: Wanted,
    given: Given,
}

impl<'a> Tools<'a> {
    fn new(config: &Config, broker: &'a Arc<dyn Broker>, args: &TopologyArgs) -> Result<Self, CliError> {
        Ok(Self {
            broker,
            management: Management::new(&config.broker)?,
            wanted: Wanted {
                names: config.names(),
                results: config.results_queue(),
                nodes: args.node.clone(),
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

async fn show_plan(tools: &Tools<'_>, args: &TopologyArgs) -> Result<u8, CliError> {
    let facts = tools.look().await?;
    let items = plan(&tools.wanted, &facts);
    if args.json {
        output::json(&items)?;
        return Ok(exit::OK);
    }
    let mut table = Table::new(["", "WHAT", "NAME", "DETAIL"]);
    for item in &items {
        let (mark, detail) = match &item.state {
            State::Equal => ("=", item.detail.clone()),
            State::Missing => ("+", item.detail.clone()),
            State::Differs { how } => ("~", how.clone()),
            State::Unknown => ("?", item.detail.clone()),
        };
        table.row([mark.to_owned(), item.what.to_owned(), item.name.clone(), detail]);
    }
    table.lines().iter().try_for_each(|line| output::line(line))?;
    let count = |wanted: fn(&State) -> bool| items.iter().filter(|item| wanted(&item.state)).count();
    output::note(&format!(
        "{} as they should be, {} missing, {} differ, {} unknown; `haul topology apply` makes what is missing",
        count(|state| *state == State::Equal),
        count(|state| *state == State::Missing),
        count(|state| matches!(state, State::Differs { .. })),
        count(|state| *state == State::Unknown),
    ));
    Ok(exit::OK)
}

async fn apply(tools: &Tools<'_>, args: &TopologyArgs) -> Result<u8, CliError> {
    let topology = tools.wanted.topology(&args.node);
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
            "nodes": args.node,
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

async fn doctor(tools: &Tools<'_>, args: &TopologyArgs) -> Result<u8, CliError> {
    let findings = settled(tools).await?;
    let red = findings.iter().filter(|finding| finding.severity == Severity::Red).count();
    if args.json {
        output::json(&findings)?;
    } else if findings.is_empty() {
        output::line("✓ everything is as it should be")?;
    } else {
        for finding in &findings {
            let mark = finding.severity.mark();
            let Finding { subject, problem, mend, .. } = finding;
            output::line(&printable(&format!("{mark} {subject}: {problem} — mend: {mend}")))?;
        }
        if red == 0 {
            output::line("✓ nothing is red")?;
        }
    }
    Ok(if red == 0 { exit::OK } else { exit::FAILED })
}

/// The findings, once the broker's statistics had time to follow a recent change.
async fn settled(tools: &Tools<'_>) -> Result<Vec<Finding>, CliError> {
    let begin = tokio::time::Instant::now();
    loop {
        let findings = examine(&tools.wanted, &tools.look().await?);
        let lagging = findings.iter().any(|finding| finding.lagging && finding.severity > Severity::Info);
        if !lagging || begin.elapsed() >= STATISTICS_LAG {
            return Ok(findings);
        }
        tokio::time::sleep(STATISTICS_PERIOD).await;
    }
}
