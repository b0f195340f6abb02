//! `haul project`: what this node's storage knows of its projects, and forgetting a place in their order.

use std::{os::unix::fs::MetadataExt as _, path::Path};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{error::CliError, output, table::Table, worker::open_executor};
use crate::{
    config::Config,
    git::{ProjectRecord, survey},
    lock::{LockError, StorageLock},
    protocol::ProjectId,
    shutdown::exit,
};

const LIST_EXAMPLES: &str = "\
Examples:
  haul project list
  haul project list --json | jq -r 'select(.branch == \"main\") | .target_path'

It reads the storage directory of this machine and needs no broker; the agent may be running.";

const FORGET_EXAMPLES: &str = "\
Examples:
  systemctl stop haul-worker
  sudo -u haul haul project forget 42
  systemctl start haul-worker

An agent answers a task that is older than what it applied last with superseded. A master that was restored from a \
backup counts from an earlier number: forget lets its next task count as the newest. The project stays as it is.";

/// The commands of `haul project`.
#[derive(Debug, Subcommand)]
pub(super) enum ProjectCommand {
    /// List the projects of this node, with the place of what was applied last
    #[command(after_help = LIST_EXAMPLES)]
    List(ListArgs),
    /// Let a project's next task count as its newest, for a master restored from backup
    #[command(after_help = FORGET_EXAMPLES)]
    Forget(ForgetArgs),
}

/// Arguments of `haul project list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Arguments of `haul project forget`.
#[derive(Debug, Args)]
pub(super) struct ForgetArgs {
    /// The project, by the master's number.
    #[arg(value_name = "ID", allow_negative_numbers = true)]
    project_id: ProjectId,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(config: Config, command: ProjectCommand) -> Result<u8, CliError> {
    config.log.install(super::CLIENT_FILTER);
    match command {
        ProjectCommand::List(args) => list(&config, &args),
        ProjectCommand::Forget(args) => forget(&config, &args),
    }
}

/// What is recorded under the projects directory of the configuration.
fn records(config: &Config) -> Result<Vec<ProjectRecord>, CliError> {
    survey(&config.projects()).map_err(|failure| CliError::Projects(failure.message))
}

fn list(config: &Config, args: &ListArgs) -> Result<u8, CliError> {
    let records = records(config)?;
    if args.json {
        records.iter().try_for_each(output::json)?;
        return Ok(exit::OK);
    }
    if records.is_empty() {
        output::note(&format!("no projects in {}", config.projects().display()));
        return Ok(exit::OK);
    }
    let mut table = Table::new(["PROJECT", "PATH", "FOLLOWS", "APPLIED", "MARK", "UPSTREAM"]);
    for record in &records {
        table.row([
            record.project_id.to_string(),
            record.target_path.clone().unwrap_or_else(|| "(deleted)".to_owned()),
            follows(record),
            record.seq.to_string(),
            mark(record),
            record.git_url.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.lines().iter().try_for_each(|line| output::line(line))?;
    Ok(exit::OK)
}

fn follows(record: &ProjectRecord) -> String {
    let named = |kind: &str, name: &Option<String>| name.as_ref().map(|name| format!("{kind} {name}"));
    let tag = named("tag", &record.tag);
    record.branch.clone().or(tag).or(named("commit", &record.commit)).unwrap_or_else(|| "-".to_owned())
}

/// The place of what was applied last: its generation, else the time of its arrival.
fn mark(record: &ProjectRecord) -> String {
    let Some(mark) = record.mark else { return "none".to_owned() };
    if let Some(generation) = mark.generation {
        return format!("generation {generation}");
    }
    match jiff::Timestamp::from_microsecond(mark.arrived) {
        Ok(at) => at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        Err(_) => mark.arrived.to_string(),
    }
}

fn forget(config: &Config, args: &ForgetArgs) -> Result<u8, CliError> {
    let id = args.project_id;
    let known = |records: Vec<ProjectRecord>| records.into_iter().find(|record| record.project_id == id);
    let unknown = || {
        let place = config.projects();
        CliError::Projects(format!("no project {id} in {}; haul project list shows what is there", place.display()))
    };
    // Asked first: a mistaken storage_path must not become a storage directory.
    known(records(config)?).ok_or_else(unknown)?;
    same_user(&config.projects())?;
    let _lock = StorageLock::take(&config.storage_path).map_err(|error| match error {
        LockError::Held { path, holder } => CliError::AgentRuns { path, holder },
        other @ LockError::Unusable { .. } => other.into(),
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    runtime.block_on(async {
        let executor = open_executor(config).await?;
        executor.forget(id).await.map_err(|failure| CliError::Projects(failure.message))
    })?;
    // Read again, from the disk: what is said is what is so.
    let record = known(records(config)?).filter(|record| record.mark.is_none()).ok_or_else(unknown)?;
    if args.json {
        output::json(&json!({"project_id": id, "seq": record.seq, "mark": record.mark}))?;
    } else {
        output::line(&format!("project {id} has no mark any more: its next task counts as the newest"))?;
    }
    Ok(exit::OK)
}

/// Refuses to write files that the agent could not read.
fn same_user(projects: &Path) -> Result<(), CliError> {
    let Ok(owner) = std::fs::metadata(projects.join(".haul")).map(|found| found.uid()) else { return Ok(()) };
    let ours = rustix::process::geteuid().as_raw();
    if owner == ours {
        return Ok(());
    }
    Err(CliError::Projects(format!(
        "{} belongs to the user with the number {owner} and this is {ours}: run it as the agent's user (sudo -u '#{owner}')",
        projects.display()
    )))
}
