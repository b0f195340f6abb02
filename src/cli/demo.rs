//! `haul demo`: a project's whole walk in one process, for machines without RabbitMQ.
//!
//! The agent is the real one, with its journal, its executor and its children; only the broker is the one in memory. So
//! that a failure can be shown, and be mended, the second project is cloned through a [`Gate`] before the upstream.

mod gate;

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use url::Url;

use self::gate::Gate;
use super::{
    dead::print_table,
    error::CliError,
    follow::{Following, News},
    output,
    words::event_line,
    worker::{open_executor, worker_settings},
};
use crate::{
    broker::{Broker, Names, Outgoing, PublishError, memory::Memory},
    config::Config,
    dead::{DeadLetters, Fate, Filter, Letter, Replay, Selection},
    lock::StorageLock,
    protocol::{Event, NodeName, Status, Task, TaskId, TaskMessage, wire::Message},
    retry::RetrySettings,
    shutdown::exit,
    store::{Journal, MemoryRows},
    worker::{Clock, Parts, Unobserved, Worker, WorkerError},
};

/// The longest that one step takes, with a large project on a slow machine.
const STEP_PATIENCE: Duration = Duration::from_mins(3);
/// How long the agent may take to begin, and to end.
const AGENT_PATIENCE: Duration = Duration::from_secs(30);
/// The project that goes well.
const APP: &str = "7_app";
/// The project that fails at first.
const LIB: &str = "8_lib";
/// The task that fails.
const FAILING: &str = "demo-failing";
/// Entries of a directory that are shown.
const SHOWN: usize = 25;

/// Arguments of `haul demo`.
#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// The project to use, as an http URL on this machine; scripts/demo serves any project like that
    #[arg(long, value_name = "URL")]
    upstream: Url,
    /// A program that adds a commit to the upstream; run before the pull
    #[arg(long, value_name = "PROGRAM")]
    add_commit: Option<PathBuf>,
}

/// What the walk needs at each of its steps.
struct Walk {
    node: NodeName,
    names: Names,
    broker: Arc<dyn Broker>,
    following: Following,
    projects: PathBuf,
    next_task: u32,
}

pub(super) fn run(mut config: Config, args: DemoArgs) -> Result<u8, CliError> {
    let upstream = (args.upstream.host_str(), args.upstream.port_or_known_default());
    let (Some(host), Some(port), "http") = (upstream.0, upstream.1, args.upstream.scheme()) else {
        return Err(CliError::Usage(
            "--upstream must be an http URL; scripts/demo serves any project like that".into(),
        ));
    };
    let target = format!("{host}:{port}");
    let own = std::env::var_os("AGENT_STORAGE_PATH").is_none();
    if own {
        let unique = crate::protocol::new_event_id();
        config.storage_path = std::env::temp_dir().join(format!("haul-demo-{unique}"));
    }
    // The upstream is this machine, and nobody wants to wait for a retry.
    config.git.allow_http = true;
    config.git.allow_loopback = true;
    config.retry = RetrySettings { max_attempts: 3, cap: Duration::from_secs(5), ..RetrySettings::default() };
    config.log.install("error");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    let code = runtime.block_on(async {
        tokio::select! {
            code = agent_and_walk(&config, &args, target) => code,
            () = super::interrupted() => Ok(exit::INTERRUPTED),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    if own {
        // Made above for this walk alone; a rest of it in the directory of temporary files harms nobody.
        let _ = std::fs::remove_dir_all(&config.storage_path);
    }
    code
}

/// Starts the agent, takes the walk, ends the agent.
async fn agent_and_walk(config: &Config, args: &DemoArgs, target: String) -> Result<u8, CliError> {
    let node = NodeName::new("worker-001").map_err(|error| CliError::Usage(error.to_string()))?;
    let _lock = StorageLock::take(&config.storage_path)?;
    let broker: Arc<dyn Broker> = Arc::new(Memory::new());
    let (soft, hard) = (CancellationToken::new(), CancellationToken::new());
    let parts = Parts {
        settings: worker_settings(config, node.clone(), false),
        broker: broker.clone(),
        journal: Journal::open(MemoryRows::default()).await?,
        executor: open_executor(config).await?,
        observer: Arc::new(Unobserved),
        clock: Clock::system(),
        boot: crate::protocol::new_event_id(),
    };
    let worker = Worker::new(parts, soft.clone(), hard.clone());
    let mut readiness = worker.readiness();
    let agent = tokio::spawn(worker.run());
    let ready = tokio::time::timeout(AGENT_PATIENCE, readiness.wait_for(|readiness| readiness.is_ready()));
    ready.await.map_err(|_| late("the agent's start"))?.map_err(|_| CliError::Refused("the agent is gone".into()))?;

    let following = Following::start(&broker, &config.names(), &["#".to_owned()]).await?;
    let projects = config.projects();
    let mut walk = Walk { node, names: config.names(), broker: broker.clone(), following, projects, next_task: 1 };
    let walked = walk.whole(args, target).await;

    soft.cancel();
    let ended = tokio::time::timeout(AGENT_PATIENCE, agent).await;
    hard.cancel();
    broker.close().await;
    walked?;
    let broke_down = |error: tokio::task::JoinError| CliError::Refused(format!("the agent broke down: {error}"));
    ended
        .map_err(|_| late("the agent's end"))?
        .map_err(broke_down)?
        .map_err(|error: WorkerError| error.into())
        .map(|()| exit::OK)
}

impl Walk {
    async fn whole(&mut self, args: &DemoArgs, target: String) -> Result<(), CliError> {
        let upstream = args.upstream.as_str();
        title("1. Clone")?;
        self.submit("clone", 42, json!({"git_url": upstream, "target_path": APP})).await?;
        self.show(APP)?;

        if let Some(program) = &args.add_commit {
            title("2. Pull after a new commit")?;
            add_commit(program).await?;
        } else {
            title("2. Pull")?;
        }
        self.submit("pull", 42, json!({})).await?;
        self.submit("status", 42, json!({})).await?;

        title("3. A clone from an upstream that fails: three attempts, then the dead letters")?;
        let gate = Gate::open(target).await.map_err(CliError::Runtime)?;
        let through = gate.before(&args.upstream);
        let ends = json!({"git_url": through.as_str(), "target_path": LIB, "task_id": FAILING});
        let failed = self.publish_and_follow("clone", 43, ends).await?;
        expect(&failed, Status::Failed)?;
        self.show_letters(1).await?;

        title("4. The upstream is mended, the letter replayed")?;
        gate.mend();
        self.replay().await?;
        let replayed = self.until_end(&failed.task_id, failed.round + 1).await?;
        expect(&replayed, Status::Succeeded)?;
        self.show(LIB)?;
        self.show_letters(0).await?;

        title("5. Delete")?;
        self.submit("delete", 42, json!({})).await?;
        if self.projects.join(APP).exists() {
            return Err(CliError::Refused(format!("{} is still there", self.projects.join(APP).display())));
        }
        self.show(LIB)
    }

    /// Publishes a task that has to succeed, and shows its events.
    async fn submit(&mut self, kind: &str, project: i64, more: Value) -> Result<(), CliError> {
        expect(&self.publish_and_follow(kind, project, more).await?, Status::Succeeded)
    }

    /// Publishes a task and shows its events up to its end.
    async fn publish_and_follow(&mut self, kind: &str, project: i64, more: Value) -> Result<Event, CliError> {
        let mut task = json!({"v": 1, "task_id": format!("demo-{}-{kind}", self.next_task), "kind": kind,
                              "project_id": project});
        self.next_task += 1;
        if let (Some(task), Value::Object(more)) = (task.as_object_mut(), more) {
            task.extend(more);
        }
        output::line(&format!("task  | to {}: {task}", self.node))?;
        let task: TaskMessage = serde_json::from_value(task).map_err(|error| CliError::Usage(error.to_string()))?;
        Task::try_from(task.clone()).map_err(|failure| CliError::Usage(failure.message))?;
        let outgoing = Outgoing {
            exchange: self.names.task(),
            routing_key: self.node.to_string(),
            message: Message::task(&task, Timestamp::now()),
            mandatory: true,
        };
        self.broker.publish(outgoing).await.map_err(|error: PublishError| CliError::from(error))?;
        self.until_end(&task.task_id, 0).await
    }

    /// Shows every event up to the end of a task's round.
    async fn until_end(&mut self, task: &TaskId, round: u32) -> Result<Event, CliError> {
        let end = tokio::time::Instant::now() + STEP_PATIENCE;
        loop {
            let news = tokio::time::timeout_at(end, self.following.next());
            let news = news.await.map_err(|_| late(&format!("the end of task {task}")))?;
            match news {
                Some(News::Event(event)) => {
                    output::line(&format!("event | {}", event_line(&event)))?;
                    if event.task_id == *task && event.round == round && event.status.is_terminal() {
                        return Ok(*event);
                    }
                }
                Some(News::Answer(_) | News::Gap) => {}
                None => return Err(CliError::Refused("the events have ended".into())),
            }
        }
    }

    /// Shows the dead letters, of which there must be so many.
    async fn show_letters(&self, expected: usize) -> Result<(), CliError> {
        let letters = DeadLetters::new(self.broker.clone(), self.names.clone());
        let found = letters.list(&Selection::default(), &CancellationToken::new()).await?;
        if found.len() != expected {
            return Err(CliError::Refused(format!("{} dead letters instead of {expected}", found.len())));
        }
        if found.is_empty() { output::line("no dead letters") } else { print_table(&found, Timestamp::now()) }
    }

    /// Sends the failed task to its node again.
    async fn replay(&self) -> Result<(), CliError> {
        let letters = DeadLetters::new(self.broker.clone(), self.names.clone());
        let filter = Filter { tasks: vec![FAILING.to_owned()], ..Filter::default() };
        let selection = Selection { filter, ..Selection::default() };
        let replay = Replay { dry_run: false, rate: None, not_after: None };
        let mut report = |_: &Letter, _: &Fate| {};
        let stop = CancellationToken::new();
        let summary = letters.replay(&selection, &replay, Timestamp::now, &stop, &mut report).await?;
        output::line(&format!("{} of {} dead letters replayed", summary.done, summary.matched))
    }

    /// Shows the top of a project's working tree.
    fn show(&self, project: &str) -> Result<(), CliError> {
        let directory = self.projects.join(project);
        let unreadable = |error| CliError::Refused(format!("no working tree at {}: {error}", directory.display()));
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&directory).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let slash = if entry.path().is_dir() { "/" } else { "" };
            names.push(format!("{}{slash}", entry.file_name().to_string_lossy()));
        }
        names.sort();
        output::line(&format!("on disk: {}", directory.display()))?;
        for name in names.iter().filter(|name| *name != ".git/").take(SHOWN) {
            output::line(&format!("  {}", crate::protocol::printable(name)))?;
        }
        Ok(())
    }
}

fn title(text: &str) -> Result<(), CliError> {
    output::line(&format!("\n{text}"))
}

fn late(what: &str) -> CliError {
    CliError::TimedOut(format!("{what} did not come in time"))
}

fn expect(event: &Event, status: Status) -> Result<(), CliError> {
    if event.status == status {
        return Ok(());
    }
    Err(CliError::Refused(format!("task {} ended as {} instead of {status}", event.task_id, event.status)))
}

/// Runs the program that adds a commit to the upstream.
async fn add_commit(program: &Path) -> Result<(), CliError> {
    let status = tokio::process::Command::new(program).stdin(Stdio::null()).status().await;
    let failed = |reason: String| CliError::Refused(format!("{} did not add a commit: {reason}", program.display()));
    let status = status.map_err(|error| failed(error.to_string()))?;
    if status.success() { Ok(()) } else { Err(failed(status.to_string())) }
}
