//! `haul dead`: reads dead letters, sends them again, or drops them.

mod report;

use std::{io::IsTerminal, sync::Arc, time::Duration};

use clap::{Args, Subcommand, builder::PossibleValuesParser};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

pub(super) use self::report::print_table;
use self::report::{Report, print_whole};
use super::{connect, error::CliError, interrupted, output, words::KINDS};
use crate::{
    broker::{
        Broker, BrokerError,
        management::{DeliveryLimit, Management},
        version::Version,
    },
    config::Config,
    dead::{DeadError, DeadLetters, Fate, Filter, Found, Letter, Rate, Replay, Selection, UNKNOWN},
    failure::ErrorClass,
    protocol::ProjectId,
    shutdown::exit,
};

/// How long the management API may take to tell the delivery limit.
const LIMIT_PATIENCE: Duration = Duration::from_secs(5);

const LIST_EXAMPLES: &str = "\
Examples:
  haul dead list
  haul dead list --class network --node worker-001
  haul dead list --json | jq -r .error

Reading changes nothing: all letters are given back together, in their order, also after Ctrl-C.";

const REPLAY_EXAMPLES: &str = "\
Examples:
  haul dead replay --task 01994e2c-4a55
  haul dead replay --class network --rate 5/s
  haul dead replay --all --dry-run

A letter is removed once its copy is confirmed by the node's queue; what cannot be sent stays. A task whose not_after \
has passed would be refused by its agent: --not-after gives such tasks a later moment, and rewrites that one field.";

const DROP_EXAMPLES: &str = "\
Examples:
  haul dead drop --class invalid --dry-run
  haul dead drop --task 01994e2c-4a55 --yes

What is dropped is gone for ever.";

/// The commands of `haul dead`.
#[derive(Debug, Subcommand)]
pub(super) enum DeadCommand {
    /// List dead letters
    #[command(after_help = LIST_EXAMPLES)]
    List(ListArgs),
    /// Show all of a task's dead letters, with headers and body
    Show(ShowArgs),
    /// Send dead letters to their nodes again
    #[command(after_help = REPLAY_EXAMPLES)]
    Replay(ReplayArgs),
    /// Drop dead letters for ever
    #[command(after_help = DROP_EXAMPLES)]
    Drop(DropArgs),
}

/// Which letters are meant.
#[derive(Debug, Args)]
struct FilterArgs {
    /// Only letters of this task; may be repeated.
    #[arg(long, value_name = "TASK")]
    task: Vec<String>,
    /// Only letters of this node; may be repeated.
    #[arg(long, value_name = "NODE")]
    node: Vec<String>,
    /// Only letters of tasks of this kind; may be repeated.
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(KINDS))]
    kind: Vec<String>,
    /// Only letters with this error class; may be repeated.
    #[arg(long, value_name = "CLASS", value_parser = classes())]
    class: Vec<String>,
    /// Only letters of this project; may be repeated.
    #[arg(long, value_name = "ID", allow_negative_numbers = true)]
    project: Vec<ProjectId>,
    /// At most so many letters, the oldest first.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

/// Which letters a command that changes something is for, and whether it only says so.
#[derive(Debug, Args)]
struct ChangeArgs {
    #[command(flatten)]
    filter: FilterArgs,
    /// Every letter.
    #[arg(long, conflicts_with_all = ["task", "node", "kind", "class", "project"])]
    all: bool,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `haul dead list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    filter: FilterArgs,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Arguments of `haul dead show`.
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The task.
    task: String,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Arguments of `haul dead replay`.
#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    #[command(flatten)]
    which: ChangeArgs,
    /// How fast: 5/s, 30/m or 100/h.
    #[arg(long, value_name = "RATE")]
    rate: Option<Rate>,
    /// The new `not_after` of tasks whose old one has passed.
    #[arg(long, value_name = "TIME")]
    not_after: Option<Timestamp>,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Arguments of `haul dead drop`.
#[derive(Debug, Args)]
pub(super) struct DropArgs {
    #[command(flatten)]
    which: ChangeArgs,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

fn classes() -> PossibleValuesParser {
    PossibleValuesParser::new(ErrorClass::ALL.iter().map(|class| class.as_str()).chain([UNKNOWN]))
}

impl FilterArgs {
    fn selection(self, delivery_limit: Option<i64>) -> Selection {
        let filter = Filter {
            tasks: self.task,
            nodes: self.node,
            kinds: self.kind,
            classes: self.class,
            projects: self.project,
        };
        Selection { filter, limit: self.limit, delivery_limit }
    }
}

impl ChangeArgs {
    /// Refuses a command that does not say what it shall change.
    fn named(&self, what: &str) -> Result<(), CliError> {
        let FilterArgs { task, node, kind, class, project, limit: _ } = &self.filter;
        let any = !(task.is_empty() && node.is_empty() && kind.is_empty() && class.is_empty() && project.is_empty());
        if any || self.all {
            return Ok(());
        }
        Err(CliError::Usage(format!(
            "say which dead letters to {what}: --task, --node, --kind, --class, --project, or --all"
        )))
    }
}

impl From<DeadError> for CliError {
    fn from(error: DeadError) -> Self {
        match error {
            DeadError::Broker(error) => error.into(),
            error @ DeadError::NoQueue(_) => Self::Refused(error.to_string()),
        }
    }
}

/// Runs a command to its end, or to an end in order at the first signal; the second signal ends it at once.
pub(super) fn run(config: Config, command: DeadCommand) -> Result<u8, CliError> {
    config.log.install(super::CLIENT_FILTER);
    match &command {
        DeadCommand::Replay(args) => args.which.named("replay")?,
        DeadCommand::Drop(args) => args.which.named("drop")?,
        DeadCommand::List(_) | DeadCommand::Show(_) => {}
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    let stop = CancellationToken::new();
    let asked = stop.clone();
    runtime.spawn(async move {
        interrupted().await;
        asked.cancel();
        output::note("giving back what was read; once more to end at once");
        interrupted().await;
        std::process::exit(i32::from(exit::INTERRUPTED));
    });
    let code = runtime.block_on(execute(&config, command, &stop));
    runtime.shutdown_background();
    code
}

async fn execute(config: &Config, command: DeadCommand, stop: &CancellationToken) -> Result<u8, CliError> {
    let broker = connect(config).await?;
    let limit = delivery_limit(config, &broker).await;
    let letters = DeadLetters::new(Arc::clone(&broker), config.names());
    let code = match command {
        DeadCommand::List(args) => list(&letters, args, limit, stop).await,
        DeadCommand::Show(args) => show(&letters, args, limit, stop).await,
        DeadCommand::Replay(args) => replay(&letters, args, limit, stop).await,
        DeadCommand::Drop(args) => remove(&letters, args, limit, stop).await,
    };
    broker.close().await;
    code
}

async fn list(
    letters: &DeadLetters,
    args: ListArgs,
    limit: Option<i64>,
    stop: &CancellationToken,
) -> Result<u8, CliError> {
    let found = letters.list(&args.filter.selection(limit), stop).await?;
    if args.json {
        for found in &found {
            output::json(&found.letter)?;
        }
    } else if found.is_empty() {
        output::note("no dead letters");
    } else {
        print_table(&found, Timestamp::now())?;
    }
    Ok(ended(stop))
}

async fn show(
    letters: &DeadLetters,
    args: ShowArgs,
    limit: Option<i64>,
    stop: &CancellationToken,
) -> Result<u8, CliError> {
    let filter = Filter { tasks: vec![args.task.clone()], ..Filter::default() };
    let found = letters.list(&Selection { filter, limit: None, delivery_limit: limit }, stop).await?;
    if stop.is_cancelled() {
        return Ok(exit::INTERRUPTED);
    }
    if found.is_empty() {
        return Err(CliError::Refused(format!("task {} has no dead letter; `haul dead list` shows all", args.task)));
    }
    for found in &found {
        print_whole(found, args.json)?;
    }
    Ok(exit::OK)
}

async fn replay(
    letters: &DeadLetters,
    args: ReplayArgs,
    limit: Option<i64>,
    stop: &CancellationToken,
) -> Result<u8, CliError> {
    let dry_run = args.which.dry_run;
    let replay = Replay { dry_run, rate: args.rate, not_after: args.not_after };
    let mut report = Report::new(args.json);
    let selection = args.which.filter.selection(limit);
    let mut tell = |letter: &Letter, fate: &Fate| report.tell(letter, fate);
    let summary = letters.replay(&selection, &replay, Timestamp::now, stop, &mut tell).await?;
    report.end(summary, if dry_run { "would be replayed" } else { "replayed" })
}

async fn remove(
    letters: &DeadLetters,
    args: DropArgs,
    limit: Option<i64>,
    stop: &CancellationToken,
) -> Result<u8, CliError> {
    let dry_run = args.which.dry_run;
    let mut selection = args.which.filter.selection(limit);
    if !dry_run && !args.yes {
        let found = letters.list(&selection, stop).await?;
        if stop.is_cancelled() {
            return Ok(exit::INTERRUPTED);
        }
        if found.is_empty() {
            output::note("no dead letters");
            return Ok(exit::OK);
        }
        confirm(&found).await?;
        // What has come meanwhile was not shown: it stands behind what was.
        selection.limit = Some(found.len());
    }
    let mut report = Report::new(args.json);
    let mut tell = |letter: &Letter, fate: &Fate| report.tell(letter, fate);
    let summary = letters.remove(&selection, dry_run, stop, &mut tell).await?;
    report.end(summary, if dry_run { "would be dropped" } else { "dropped" })
}

/// Asks the person at the terminal; without one, refuses.
async fn confirm(found: &[Found]) -> Result<(), CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::Usage(format!(
            "{} dead letters would be dropped for ever: say --yes, or look with --dry-run",
            found.len()
        )));
    }
    print_table(found, Timestamp::now())?;
    output::note(&format!("drop these {} dead letters for ever? Type yes:", found.len()));
    let answer = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map(|_| answer)
    });
    match answer.await {
        Ok(Ok(answer)) if answer.trim().eq_ignore_ascii_case("yes") => Ok(()),
        _ => Err(CliError::Refused("nothing was dropped".to_owned())),
    }
}

fn ended(stop: &CancellationToken) -> u8 {
    if stop.is_cancelled() { exit::INTERRUPTED } else { exit::OK }
}

/// The delivery limit of the dead letters' queue; warns where one is in force or cannot be excluded.
async fn delivery_limit(config: &Config, broker: &Arc<dyn Broker>) -> Option<i64> {
    let queue = config.names().dead();
    let told = tokio::time::timeout(LIMIT_PATIENCE, ask_limit(config, &queue)).await;
    let silent = match told {
        Ok(Ok((DeliveryLimit::None, _))) => return None,
        Ok(Ok((DeliveryLimit::Of(limit), _))) => {
            output::note(&format!(
                "warning: a delivery limit of {limit} is in force on {queue}: each reading spends it, and a letter near \
                 its limit is put anew at the queue's end; `haul topology doctor` names the command that lifts it"
            ));
            return Some(limit);
        }
        Ok(Ok((DeliveryLimit::Unknown, _))) => "the management API does not tell yet".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the management API does not answer within {} s", LIMIT_PATIENCE.as_secs()),
    };
    let version = super::topology::told_version(broker);
    // Where nothing is known the default of newer brokers is assumed; older ones have none.
    if version.is_some_and(|version| !version.limits_deliveries()) {
        return None;
    }
    output::note(&format!(
        "warning: whether a delivery limit is in force on {queue} could not be seen ({silent}); a letter that was read \
         often is put anew at the queue's end"
    ));
    Some(20)
}

async fn ask_limit(config: &Config, queue: &str) -> Result<(DeliveryLimit, Option<Version>), BrokerError> {
    let api = Management::new(&config.broker)?;
    let version = api.version().await?;
    let limit = api.queue(queue).await?.map_or(DeliveryLimit::Unknown, |queue| queue.delivery_limit(version));
    Ok((limit, version))
}
