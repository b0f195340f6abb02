//! `haul topology migrate`: queues with wrong arguments are made anew.

use std::time::Duration;

use clap::Args;
use futures_util::{StreamExt as _, stream};
use serde_json::json;

use super::Tools;
use crate::{
    broker::rabbitmq::{Admin, RabbitMq},
    cli::{error::CliError, output, table::Table, wait},
    config::Config,
    doctor::{MigrateStep, Migrated, Migration, Migrations, Stage, Surgeon, migrations},
    protocol::{NodeName, printable},
    shutdown::exit,
};

/// Queues at a time: most of the time is waiting for statistics.
const AT_A_TIME: usize = 16;
/// How long the lock of a run that was killed may outlive it, and how often it is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_PERIOD: Duration = Duration::from_millis(500);

const EXAMPLES: &str = "\
Examples:
  haul topology migrate --dry-run
  haul topology migrate --queue haul.node.worker-001
  haul topology migrate --json

Masters may go on publishing: no task is returned and none is lost, some may arrive twice, which agents know by their
journals. Nobody may consume a queue meanwhile: stop its agent (or, for events, the master) first. Interrupted at any
moment, it is completed by running it again. Ends with 0 where nothing is left to do, else with 1.";

/// Arguments of `haul topology migrate`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct MigrateArgs {
    /// Only this queue; may be repeated.
    #[arg(long, value_name = "QUEUE")]
    queue: Vec<String>,
    /// A node that should be enrolled; may be repeated. Those on the broker are found.
    #[arg(long, value_name = "NODE")]
    node: Vec<NodeName>,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// How long the broker's statistics may follow a change.
    #[arg(long, value_name = "DURATION", default_value = "12s", value_parser = wait::duration)]
    lag: Duration,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Ends the process by force after a step; for tests of crash safety.
    #[arg(long, hide = true, value_name = "STEP")]
    observe: Option<MigrateStep>,
}

impl MigrateArgs {
    pub(super) fn nodes(&self) -> &[NodeName] {
        &self.node
    }
}

/// What became of one queue.
struct Ended<'a> {
    migration: &'a Migration,
    outcome: Result<Migrated, String>,
}

pub(super) async fn run(config: &Config, tools: &Tools<'_>, args: &MigrateArgs) -> Result<u8, CliError> {
    let mut found = sighted(tools, args).await?;
    if args.dry_run {
        return show(&found, args.json);
    }
    let mut ended = Vec::new();
    let admin = if found.queues.iter().any(|migration| migration.blocked.is_none()) {
        let admin = RabbitMq::connect(&config.broker, "haul topology migrate").await?.admin().await?;
        lock(&admin, tools).await?;
        // Somebody else may have worked on them until now.
        found = sighted(tools, args).await?;
        Some(admin)
    } else {
        None
    };
    if let Some(admin) = admin {
        let ready: Vec<_> = found.queues.iter().filter(|migration| migration.blocked.is_none()).collect();
        ended = work(&admin, tools, args, ready).await?;
        admin.close().await;
    }
    let is_left = ended.iter().any(|one| one.outcome.is_err()) || untouched(&found) > 0;
    if args.json {
        ended.sort_by(|a, b| a.migration.queue.cmp(&b.migration.queue));
        let queues: Vec<_> = ended.iter().map(Ended::json).chain(blocked(&found).map(refused)).collect();
        output::json(&json!({ "queues": queues, "exchanges": found.exchanges }))?;
    } else {
        for migration in blocked(&found) {
            tell_blocked(migration)?;
        }
        tell_exchanges(&found)?;
        if found.queues.is_empty() && found.exchanges.is_empty() {
            output::note("nothing has to be made anew; `haul topology plan` shows everything");
        }
    }
    Ok(if is_left { exit::FAILED } else { exit::OK })
}

/// Makes queues anew, several at a time, and tells of each as it ends.
async fn work<'a>(
    admin: &Admin,
    tools: &Tools<'_>,
    args: &MigrateArgs,
    ready: Vec<&'a Migration>,
) -> Result<Vec<Ended<'a>>, CliError> {
    let told = |step| observed(args.observe, step);
    let surgeon = &Surgeon { admin, management: &tools.management, lag: args.lag, told: &told };
    let work = stream::iter(ready).map(async |migration| {
        let outcome = surgeon.migrate(migration).await.map_err(|error| error.to_string());
        Ended { migration, outcome }
    });
    let mut work = std::pin::pin!(work.buffer_unordered(AT_A_TIME));
    let mut ended = Vec::new();
    while let Some(one) = work.next().await {
        if !args.json {
            tell(&one)?;
        }
        ended.push(one);
    }
    Ok(ended)
}

/// What has to be made anew, of what is asked for.
async fn sighted(tools: &Tools<'_>, args: &MigrateArgs) -> Result<Migrations, CliError> {
    let mut found = migrations(&tools.wanted, &tools.look().await?).map_err(|reason| {
        CliError::Refused(format!(
            "only the management API tells arguments, and it could not be asked ({reason}); rabbitmq-plugins enable \
             rabbitmq_management, or set broker.management_url"
        ))
    })?;
    if !args.queue.is_empty() {
        found.queues.retain(|migration| args.queue.contains(&migration.queue));
        found.exchanges.clear();
    }
    Ok(found)
}

/// Two at a time would carry the same messages; the broker lets go of the lock with the connection.
async fn lock(admin: &Admin, tools: &Tools<'_>) -> Result<(), CliError> {
    let patience = tokio::time::Instant::now() + LOCK_PATIENCE;
    while !admin.lock(&format!("{}lock", tools.wanted.names.migration())).await? {
        if tokio::time::Instant::now() >= patience {
            return Err(CliError::Refused("another migration runs on this broker: wait for its end".to_owned()));
        }
        tokio::time::sleep(LOCK_PERIOD).await;
    }
    Ok(())
}

fn observed(fatal: Option<MigrateStep>, step: MigrateStep) {
    if fatal != Some(step) {
        return;
    }
    output::complain(&format!("killed after step {step}"));
    // Nothing can be done about a refusal, and a process may always signal itself.
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    loop {
        std::thread::park();
    }
}

impl Ended<'_> {
    fn json(&self) -> serde_json::Value {
        let queue = &self.migration.queue;
        match &self.outcome {
            Ok(done) => json!({ "queue": queue, "outcome": "migrated", "messages": done }),
            Err(reason) => json!({ "queue": queue, "outcome": "unfinished", "reason": reason }),
        }
    }
}

fn refused(migration: &Migration) -> serde_json::Value {
    json!({ "queue": migration.queue, "outcome": "refused", "reason": migration.blocked })
}

fn blocked(found: &Migrations) -> impl Iterator<Item = &Migration> {
    found.queues.iter().filter(|migration| migration.blocked.is_some())
}

/// How much is left alone.
fn untouched(found: &Migrations) -> usize {
    blocked(found).count() + found.exchanges.len()
}

/// What would be done.
fn show(found: &Migrations, json: bool) -> Result<u8, CliError> {
    if json {
        output::json(found)?;
    } else {
        let mut table = Table::new(["QUEUE", "WOULD BE", "BECAUSE"]);
        for migration in found.queues.iter().filter(|migration| migration.blocked.is_none()) {
            let what = match migration.stage {
                Stage::Replace => "made anew",
                Stage::Remake => "made again",
                Stage::Return => "completed",
            };
            table.row([migration.queue.clone(), what.to_owned(), migration.how.clone()]);
        }
        table.lines().iter().try_for_each(|line| output::line(line))?;
        for migration in blocked(found) {
            tell_blocked(migration)?;
        }
        tell_exchanges(found)?;
    }
    Ok(if untouched(found) > 0 { exit::FAILED } else { exit::OK })
}

fn tell(ended: &Ended<'_>) -> Result<(), CliError> {
    let queue = &ended.migration.queue;
    output::line(&printable(&match &ended.outcome {
        Ok(Migrated { set_aside, returned }) => {
            format!("✓ {queue} is as it should be; {set_aside} messages were put aside, {returned} put into it")
        }
        Err(reason) => format!("✗ {queue} is not finished, nothing of it is lost: {reason}"),
    }))
}

fn tell_blocked(migration: &Migration) -> Result<(), CliError> {
    let reason = migration.blocked.as_deref().unwrap_or_default();
    output::line(&printable(&format!("✗ {} is left alone: {reason}", migration.queue)))
}

fn tell_exchanges(found: &Migrations) -> Result<(), CliError> {
    found.exchanges.iter().try_for_each(|other| {
        let text = format!("✗ exchange {} is left alone ({}): {}", other.exchange, other.how, other.mend);
        output::line(&printable(&text))
    })
}
