//! `haul submit`: publishes one task and, with `--wait`, follows it to its end.

use std::{sync::Arc, time::Duration};

use clap::{
    Args, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::{connect, error::CliError, follow::Following, output, wait};
use crate::{
    config::Config,
    master::{Client, ClientSettings, Interest, Patience, Reconciler, ReconcilerSettings, Submission, TaskRow},
    protocol::{Kind, NodeName, OnConflict, Priority, ProjectId, TaskId, TaskMessage},
    shutdown::exit,
};

const EXAMPLES: &str = "\
Examples:
  haul submit clone --node worker-001 --project-id 42 --git-url https://git.example/team/app.git --target-path 7_app --wait
  haul submit pull --node worker-001 --project-id 42 --wait --timeout 5m
  haul submit status --node worker-001 --project-id 42 --wait --json
  haul submit delete --node worker-001 --project-id 42 --priority high --generation 4";

const AFTER: &str = "\
Without --wait it ends once the broker has the task. With --wait it ends with the task: code 0 if it succeeded, \
4 if it did not, 6 if --timeout was over first (the task goes on).";

/// How long the broker and the agent may take to tell why a task has not ended.
const EXPLAINED_WITHIN: Duration = Duration::from_secs(8);

/// What to submit.
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum SubmitCommand {
    /// Make a project on a node
    #[command(after_help = AFTER)]
    Clone(CloneArgs),
    /// Bring a project up to date
    #[command(after_help = AFTER)]
    Pull(PullArgs),
    /// Remove a project from its node
    #[command(after_help = AFTER)]
    Delete(DeleteArgs),
    /// Ask for the state of a project
    #[command(after_help = AFTER)]
    Status(StatusArgs),
}

/// What every task has, and how it is followed.
#[derive(Debug, Args)]
pub(super) struct TaskArgs {
    /// The node that shall do it.
    #[arg(long)]
    node: NodeName,
    /// The project, by the master's number.
    #[arg(long, visible_alias = "project", value_name = "ID", allow_negative_numbers = true)]
    project_id: ProjectId,
    /// Identity of the task; a new one by default. The same task again is answered with the same outcome.
    #[arg(long, value_name = "TASK")]
    task_id: Option<TaskId>,
    /// The master's own order of tasks of one project; higher is newer.
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
    /// How urgent it is; for anything but normal a clone, pull or delete needs --generation.
    #[arg(long, value_parser = words::<Priority>(["critical", "high", "normal", "low", "idle"]))]
    priority: Option<Priority>,
    /// Deadline of one attempt, in seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout_secs: Option<u64>,
    /// How long nothing may move, in seconds.
    #[arg(long, value_name = "SECONDS")]
    stall_secs: Option<u64>,
    /// Do not start after this moment, e.g. 2026-11-20T12:00:00Z.
    #[arg(long, value_name = "TIME")]
    not_after: Option<Timestamp>,
    /// Follow the task to its end.
    #[arg(long)]
    wait: bool,
    /// How long to follow it, e.g. 90s or 10m; without it, to the end.
    #[arg(long, value_name = "DURATION", requires = "wait", value_parser = wait::duration)]
    timeout: Option<Duration>,
    /// Print JSON: the published task or, with --wait, each event on a line of its own.
    #[arg(long)]
    json: bool,
    /// Print the message instead of publishing it.
    #[arg(long, conflicts_with = "wait")]
    dry_run: bool,
}

/// Where a project is, for tasks that need not say so.
#[derive(Debug, Args)]
pub(super) struct TargetArgs {
    /// Directory of the project under the projects directory; must match where it is given.
    #[arg(long, visible_alias = "path", value_name = "NAME")]
    target_path: Option<String>,
}

/// Arguments of `haul submit clone`.
#[derive(Debug, Args)]
pub(super) struct CloneArgs {
    #[command(flatten)]
    task: TaskArgs,
    /// Upstream, without a user, password or token.
    #[arg(long, visible_alias = "url", value_name = "URL")]
    git_url: String,
    /// Directory of the project: one component under the projects directory.
    #[arg(long, visible_alias = "path", value_name = "NAME")]
    target_path: String,
    /// Branch to clone; the upstream's default branch without --branch, --tag and --commit.
    #[arg(long, group = "revision")]
    branch: Option<String>,
    /// Tag to clone.
    #[arg(long, group = "revision")]
    tag: Option<String>,
    /// Commit to clone: 40 hexadecimal digits.
    #[arg(long, group = "revision", value_name = "OID")]
    commit: Option<String>,
    /// The commit that the branch or tag must point to.
    #[arg(long, value_name = "OID")]
    expect_commit: Option<String>,
    /// Number of commits of history.
    #[arg(long, value_name = "N")]
    depth: Option<u32>,
    /// Fetch the wanted branch only.
    #[arg(long)]
    single_branch: bool,
    /// Materialise submodules too.
    #[arg(long)]
    submodules: bool,
    /// Fetch LFS objects too.
    #[arg(long)]
    lfs: bool,
    /// User and group that shall own the project.
    #[arg(long, value_name = "UID:GID")]
    owner: Option<String>,
    /// Name of a credential on the node.
    #[arg(long, value_name = "NAME")]
    credential: Option<String>,
}

/// Arguments of `haul submit pull`.
#[derive(Debug, Args)]
pub(super) struct PullArgs {
    #[command(flatten)]
    task: TaskArgs,
    #[command(flatten)]
    target: TargetArgs,
    /// Upstream; must match the project's own where it is given.
    #[arg(long, visible_alias = "url", value_name = "URL")]
    git_url: Option<String>,
    /// Name of a credential on the node, instead of the one it was cloned with.
    #[arg(long, value_name = "NAME")]
    credential: Option<String>,
    /// What to do about the user's files that stand in the way: keep them, or save them in a ref and overwrite them.
    #[arg(long, value_parser = words::<OnConflict>(["keep", "reset"]))]
    on_conflict: Option<OnConflict>,
}

/// Arguments of `haul submit delete`.
#[derive(Debug, Args)]
pub(super) struct DeleteArgs {
    #[command(flatten)]
    task: TaskArgs,
    #[command(flatten)]
    target: TargetArgs,
}

/// Arguments of `haul submit status`.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    task: TaskArgs,
    #[command(flatten)]
    target: TargetArgs,
}

/// A parser for a closed set of words of the contract.
pub(super) fn words<T: DeserializeOwned + Clone + Send + Sync + 'static>(
    words: impl IntoIterator<Item = &'static str>,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(words).try_map(|word| serde_json::from_value::<T>(json!(word)))
}

impl TaskArgs {
    fn message(&self, kind: Kind) -> TaskMessage {
        let task_id = self.task_id.clone().unwrap_or_else(TaskId::random);
        TaskMessage {
            generation: self.generation,
            timeout_secs: self.timeout_secs,
            stall_secs: self.stall_secs,
            priority: self.priority,
            not_after: self.not_after,
            ..TaskMessage::new(kind, self.project_id, task_id)
        }
    }
}

impl SubmitCommand {
    fn into_parts(self) -> (TaskArgs, TaskMessage) {
        let flag = |given: bool| given.then_some(true);
        match self {
            Self::Clone(args) => {
                let message = TaskMessage {
                    git_url: Some(args.git_url),
                    branch: args.branch,
                    tag: args.tag,
                    commit: args.commit,
                    expect_commit: args.expect_commit,
                    depth: args.depth,
                    single_branch: flag(args.single_branch),
                    submodules: flag(args.submodules),
                    lfs: flag(args.lfs),
                    owner: args.owner,
                    target_path: Some(args.target_path),
                    credential: args.credential,
                    ..args.task.message(Kind::Clone)
                };
                (args.task, message)
            }
            Self::Pull(args) => {
                let message = TaskMessage {
                    git_url: args.git_url,
                    target_path: args.target.target_path,
                    credential: args.credential,
                    on_conflict: args.on_conflict,
                    ..args.task.message(Kind::Pull)
                };
                (args.task, message)
            }
            Self::Delete(args) => {
                let message = TaskMessage { target_path: args.target.target_path, ..args.task.message(Kind::Delete) };
                (args.task, message)
            }
            Self::Status(args) => {
                let message = TaskMessage { target_path: args.target.target_path, ..args.task.message(Kind::Status) };
                (args.task, message)
            }
        }
    }
}

pub(super) async fn run(config: Config, command: SubmitCommand) -> Result<u8, CliError> {
    let (args, task) = command.into_parts();
    // The agent would refuse it with the same words, later.
    let task = Submission::checked(task).map_err(|failure| CliError::Usage(failure.message))?;
    if args.dry_run {
        output::json(task.task())?;
        return Ok(exit::OK);
    }
    let broker = connect(&config).await?;
    let settings = ClientSettings {
        // It follows live: what waits in a master's queue says nothing of what it has heard.
        results_queue: Some(String::new()),
        deadline: config.broker.confirm_timeout,
        ..ClientSettings::default()
    };
    let client = Client::new(Arc::clone(&broker), config.names(), settings);
    let code = submit(&client, &args, &task).await;
    broker.close().await;
    code
}

async fn submit(client: &Client, args: &TaskArgs, task: &Submission) -> Result<u8, CliError> {
    let (id, kind) = (task.task_id(), task.kind());
    if !args.wait {
        client.publish(&args.node, task).await?;
        if args.json {
            output::json(&json!({"task_id": id, "node": args.node, "kind": kind}))?;
        } else {
            let project = task.project_id();
            output::line(&format!("{kind} of project {project} published to {}: task {id}", args.node))?;
        }
        return Ok(exit::OK);
    }
    // Subscribed before the task is published: no event of it can be missed.
    let interest = Interest::all().node(&args.node).kind(kind);
    let mut following = Following::start(client.broker(), client.names(), &interest.patterns()).await?;
    let mut row = TaskRow::wanted(&args.node, task, Timestamp::now());
    client.publish(&args.node, task).await?;
    row.confirm(Timestamp::now());
    // A duplicate is answered with what is known: nothing is done twice.
    let again = || async { Ok(client.publish(&args.node, task).await?) };
    let view = wait::View::new(args.json);
    match wait::outcome(&mut following, id, args.timeout, &view, again).await {
        Ok(event) => {
            view.end(&event)?;
            Ok(wait::code(event.status))
        }
        Err(CliError::TimedOut(sentence)) => {
            let why = explain(client, view.row().unwrap_or(row)).await;
            Err(CliError::TimedOut(why.map_or(sentence.clone(), |why| format!("{sentence}; {why}"))))
        }
        Err(error) => Err(error),
    }
}

/// Why the task has not ended, as far as the broker and the agent tell.
async fn explain(client: &Client, row: TaskRow) -> Option<String> {
    let settings = ReconcilerSettings {
        patience: Patience { quiet: Duration::ZERO, ..Patience::default() },
        ..ReconcilerSettings::default()
    };
    let reconciler = Reconciler::new(client.clone(), settings);
    let asking = reconciler.reconcile([&row], Timestamp::now());
    let stuck = tokio::time::timeout(EXPLAINED_WITHIN, asking).await.ok()?.ok()?;
    stuck.first().map(ToString::to_string)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{
        broker::{Broker as _, Names, Outgoing, memory::Memory},
        protocol::{Event, ProjectStatus, Status, Task, wire::Message},
    };

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        command: SubmitCommand,
    }

    fn parse(line: &str) -> Result<TaskMessage, clap::Error> {
        let words = format!("submit {line}");
        Line::try_parse_from(words.split(' ')).map(|line| line.command.into_parts().1)
    }

    const CLONE: &str = "clone --node n --project-id 42 --git-url https://h/x.git --target-path 7_app";

    #[test]
    fn every_field_of_a_task_has_an_option() {
        let all = parse(&format!(
            "{CLONE} --task-id t --generation 3 --branch main --expect-commit 0123456789012345678901234567890123456789 \
             --depth 1 --single-branch --submodules --lfs --owner 1000:1000 --credential c --timeout-secs 600 \
             --stall-secs 30 --priority high --not-after 2026-11-20T12:00:00Z"
        ))
        .unwrap();
        let value = serde_json::to_value(&all).unwrap();
        let missing = ["tag", "commit", "on_conflict"];
        let schema = crate::protocol::schema::task();
        for field in schema["properties"].as_object().unwrap().keys() {
            assert_eq!(value.get(field).is_none(), missing.contains(&field.as_str()), "{field}");
        }
        assert!(Task::try_from(all).is_ok());
        let pull = parse("pull --node n --project 42 --on-conflict reset --path 7_app --url https://h/x.git").unwrap();
        assert_eq!(pull.on_conflict, Some(OnConflict::Reset));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_the_command_line() {
        for bad in [
            "clone --node n --project-id 42".to_owned(),
            format!("{CLONE} --branch a --tag b"),
            format!("{CLONE} --priority urgent"),
            format!("{CLONE} --timeout 1m"),
            format!("{CLONE} --wait --dry-run"),
            "pull --node a.b --project-id 1".to_owned(),
            "pull --node n --project-id x".to_owned(),
            "delete --node n --project-id 1 --git-url https://h/x".to_owned(),
        ] {
            assert!(parse(&bad).is_err(), "{bad}");
        }
    }

    fn submission(line: &str) -> (TaskArgs, Submission) {
        let words = format!("submit {line}");
        let (args, task) = Line::try_parse_from(words.split(' ')).unwrap().command.into_parts();
        (args, Submission::checked(task).unwrap())
    }

    async fn enrolled(node: &str) -> (Client, Memory, Names) {
        let (memory, names) = (Memory::new(), Names::default());
        let node = NodeName::new(node).unwrap();
        let topology = names.shared_topology(&names.master_event()).and(names.node_topology(&node));
        memory.declare(&topology).await.unwrap();
        (Client::new(Arc::new(memory.clone()), names.clone(), ClientSettings::default()), memory, names)
    }

    fn event(task: &TaskMessage, status: Status) -> Message {
        let event = Event {
            v: 1,
            event_id: crate::protocol::new_event_id(),
            at: Timestamp::now(),
            node: NodeName::new("n").unwrap(),
            boot: "b".to_owned(),
            seq: 1,
            task_id: task.task_id.clone(),
            kind: task.kind,
            project_id: task.project_id,
            generation: None,
            project_seq: 0,
            round: 0,
            attempt: 1,
            status,
            project_status: ProjectStatus::Active,
            result: None,
            progress: None,
            error: None,
        };
        Message::event(&event, None)
    }

    async fn report(memory: &Memory, names: &Names, task: &TaskMessage, status: Status) {
        let (exchange, routing_key) = (names.event(), format!("n.{}.{status}", task.kind));
        let message = event(task, status);
        memory.publish(Outgoing { exchange, routing_key, message, mandatory: false }).await.unwrap();
    }

    #[tokio::test]
    async fn a_task_for_a_node_without_a_queue_says_how_to_enrol_it() {
        let (client, _, _) = enrolled("other").await;
        let (args, task) = submission("pull --node n --project-id 42");
        let error = submit(&client, &args, &task).await.unwrap_err();
        assert_eq!(error.code(), exit::TASK);
        assert_eq!(error.to_string(), "node n is not enrolled: start its agent, or run haul topology apply --node n");
    }

    #[tokio::test]
    async fn waiting_ends_with_the_terminal_event_of_this_task_only() {
        for (status, code) in [(Status::Succeeded, exit::OK), (Status::Failed, exit::TASK)] {
            let (client, memory, names) = enrolled("n").await;
            let (args, task) = submission("pull --node n --project-id 42 --wait --json");
            let agent = async {
                // Published only after the subscription: what is reported from here on is seen.
                while memory.published().is_empty() {
                    tokio::task::yield_now().await;
                }
                let stranger = TaskMessage { task_id: TaskId::random(), ..task.task().clone() };
                report(&memory, &names, &stranger, Status::Rejected).await;
                report(&memory, &names, task.task(), Status::Started).await;
                report(&memory, &names, task.task(), status).await;
            };
            let (ended, ()) = tokio::join!(submit(&client, &args, &task), agent);
            assert_eq!(ended.unwrap(), code);
            let followers = |outgoing: &Outgoing| outgoing.exchange == names.task();
            assert_eq!(memory.published().into_iter().filter(followers).count(), 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_lost_connection_it_asks_again_since_the_end_may_have_been_missed() {
        let (client, memory, names) = enrolled("n").await;
        let (args, task) = submission("pull --node n --project-id 42 --wait --json");
        let tasks = || memory.published().into_iter().filter(|outgoing| outgoing.exchange == names.task()).count();
        let agent = async {
            while tasks() < 1 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            memory.cut();
            while tasks() < 2 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            report(&memory, &names, task.task(), Status::Succeeded).await;
        };
        let (ended, ()) = tokio::join!(submit(&client, &args, &task), agent);
        assert_eq!(ended.unwrap(), exit::OK);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_no_longer_than_asked_leaves_the_task_alone_and_says_why_it_has_not_ended() {
        let (client, _, _) = enrolled("n").await;
        let (args, task) = submission("pull --node n --project-id 42 --wait --timeout 1m");
        let error = submit(&client, &args, &task).await.unwrap_err();
        assert_eq!(error.code(), exit::TIMED_OUT);
        let sentence = error.to_string();
        assert!(sentence.contains("haul events --task"), "{sentence}");
        assert!(sentence.contains("no agent consumes the node's queue, in which 1 tasks wait"), "{sentence}");
    }
}
