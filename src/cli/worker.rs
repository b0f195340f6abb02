//! `haul worker`: the agent of this node.

mod hand_over;
mod take_over;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::Args;

use super::{error::CliError, wait};
use crate::{
    broker::{Broker, address::Address, rabbitmq::RabbitMq},
    config::Config,
    execute::{Execute, GitExecutor},
    lock::{StorageLock, door::Holder},
    protocol::{NodeName, TaskId},
    shutdown::{Ended, Shutdown, exit},
    store::{Journal, SqliteRows},
    worker::{Clock, Observe, Parts, Step, Unobserved, Worker, WorkerSettings},
};

const EXAMPLES: &str = "\
Examples:
  AGENT_NODE_NAME=worker-001 AGENT_AMQP_URL=amqp://haul:secret@rabbit:5672/%2f haul worker
  haul worker --config /etc/haul/haul.toml
  haul worker --take-over                  # an upgrade: the running agent leaves as soon as this one is ready

The first SIGTERM or SIGINT takes no more tasks and finishes what runs within shutdown.grace; the second stops at once.

With --take-over this process does first what it can beside a running agent on the same storage directory: it checks the \
broker and stands in line for the queue. Then the running one begins no more tasks, finishes what runs within its \
shutdown.grace (or --grace), gives back the rest uncharged, and ends with code 0. Where none runs it simply starts. It \
ends with code 5, and the running one stays, where that one does not answer or does not leave in time.";

/// Kept free between waiting in the window, the longest deadline and the broker's consumer timeout.
const TIMEOUT_MARGIN: Duration = Duration::from_mins(1);
/// The agent itself only waits: git work is done in children.
const THREADS: usize = 2;

/// Arguments of `haul worker`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct WorkerArgs {
    /// Consume the node's queue although another consumer is on it
    #[arg(long)]
    force: bool,
    /// Have a running agent of this storage directory leave, and take its place
    #[arg(long)]
    take_over: bool,
    /// With --take-over: how long the running agent may let its tasks finish; its own shutdown.grace unless given
    #[arg(long, value_name = "DURATION", requires = "take_over", value_parser = wait::duration)]
    grace: Option<Duration>,
    /// Ends the process by force at a step of a message's path; for tests of crash safety.
    #[arg(long, hide = true, value_name = "STEP")]
    observe: Option<Step>,
}

/// Kills the process at one step, as a power cut would.
struct KilledAt(Step);

impl Observe for KilledAt {
    fn reached(&self, step: Step, task: Option<&TaskId>) {
        if step != self.0 {
            return;
        }
        super::output::complain(&format!("killed at step {step} of task {}", task.map_or("?", TaskId::as_str)));
        // Nothing can be done about a refusal, and a process may always signal itself.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

pub(super) fn run(config: Config, args: WorkerArgs) -> Result<u8, CliError> {
    // The AMQP library writes whole messages into its warnings; what matters of them is said by ourselves.
    config.log.install("info,lapin=off");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    let code = runtime.block_on(agent(config, args));
    runtime.shutdown_timeout(Duration::from_secs(1));
    code
}

/// Loads, opens, wires and waits.
async fn agent(config: Config, args: WorkerArgs) -> Result<u8, CliError> {
    let node = config.node()?;
    let shutdown = Shutdown::new(&config.shutdown);
    shutdown.on_signals().map_err(CliError::Runtime)?;
    let broker: Arc<dyn Broker> = Arc::new(RabbitMq::connect(&config.broker, &format!("haul worker {node}")).await?);
    let boot = uuid::Uuid::now_v7().to_string();
    let settings = worker_settings(&config, node.clone(), args.force);
    let Some((lock, ahead)) = take_over::storage(&config, &args, &broker, &settings, &boot, &shutdown).await? else {
        broker.close().await;
        return Ok(shutdown.ended().await.code());
    };
    let own = StorageLock::directory(&config.storage_path);
    let executor = open_executor(&config).await?;
    let journal = Journal::open(SqliteRows::open(&own.join("journal.db")).await?).await?;
    greet(&config, &node, &boot)?;
    let observer: Arc<dyn Observe> = match args.observe {
        Some(step) => Arc::new(KilledAt(step)),
        None => Arc::new(Unobserved),
    };
    let holder = holder(&config, &node, &boot);
    let parts = Parts { settings, broker: broker.clone(), journal, executor, observer, clock: Clock::system(), boot };
    let worker = Worker::new(parts, shutdown.soft().clone(), shutdown.hard().clone());
    tell_readiness(&worker);
    let door = hand_over::mind(&config.storage_path, &lock, &worker, holder);
    let mut running = shutdown.tracker().spawn(worker.run_prepared(ahead));
    let ended = tokio::select! {
        result = &mut running => {
            result.map_err(|error| CliError::Refused(format!("the agent broke down: {error}")))??;
            // It only ends well when it was asked to; how it was asked decides the exit code.
            shutdown.ended().await
        }
        ended = shutdown.ended() => ended,
    };
    broker.close().await;
    drop(lock);
    let handed_over = door.handed_over();
    tracing::info!(ended = ?ended, handed_over, "ended");
    // What was given back is not lost but somebody else's: a supervisor has nothing to start again.
    Ok(if handed_over && ended != Ended::Interrupted { exit::OK } else { ended.code() })
}

/// What is said of this process to one that wants to take over.
fn holder(config: &Config, node: &NodeName, boot: &str) -> Holder {
    Holder {
        node: node.to_string(),
        prefix: config.names().prefix().to_owned(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        boot: boot.to_owned(),
        grace_ms: u64::try_from(config.shutdown.grace.as_millis()).unwrap_or(u64::MAX),
        paused: false,
    }
}

/// Logs whether the agent can do its job, as it changes.
fn tell_readiness(worker: &Worker) {
    let mut readiness = worker.readiness();
    tokio::spawn(async move {
        while readiness.changed().await.is_ok() {
            let now = *readiness.borrow_and_update();
            tracing::info!(ready = now.is_ready(), state = ?now, "readiness");
        }
    });
}

/// Says who starts and with what, in one line without a secret, and warns of what nobody should run on for long.
fn greet(config: &Config, node: &NodeName, boot: &str) -> Result<(), CliError> {
    let addresses: Vec<_> = config.broker.urls.iter().map(Address::parse).collect::<Result<_, _>>()?;
    let brokers: Vec<_> = addresses.iter().map(Address::location).collect();
    tracing::info!(
        node = %node,
        broker.queue = config.names().node(node),
        broker.address = brokers.join(","),
        path = %config.storage_path.display(),
        slots = config.slots(),
        window = config.window(),
        version = env!("CARGO_PKG_VERSION"),
        boot,
        "haul worker starts"
    );
    for address in addresses.iter().filter(|address| !address.is_loopback()) {
        let location = address.location();
        if address.user == "guest" {
            tracing::warn!(
                broker.address = location,
                "the broker's user is guest, whom everybody knows: give this node a user of its own"
            );
        }
        if !address.tls {
            tracing::warn!(
                broker.address = location,
                "the way to the broker is not encrypted: use amqps://, or a network that nobody else sees"
            );
        }
    }
    Ok(())
}

pub(super) async fn open_executor(config: &Config) -> Result<Arc<dyn Execute>, CliError> {
    // The path of the running binary, even where it has been replaced on disk meanwhile.
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
    let projects = config.projects();
    let executor = GitExecutor::open(&config.git, &config.storage_path, &projects, program, config.disk.reserve).await;
    let refused =
        |path: &Path, error| CliError::Projects(format!("the projects at {} cannot be used: {error}", path.display()));
    Ok(Arc::new(executor.map_err(|error| refused(&projects, error))?))
}

pub(super) fn worker_settings(config: &Config, node: NodeName, force: bool) -> WorkerSettings {
    let spare = config.broker.consumer_timeout.saturating_sub(config.git.max_timeout + TIMEOUT_MARGIN);
    WorkerSettings {
        node,
        names: config.names(),
        slots: config.slots(),
        window: config.window(),
        retry: config.retry.clone(),
        results_queue: config.results_queue(),
        retention: config.journal.retention,
        longest_wait: spare.max(Duration::from_secs(30)),
        ghost_limit: config.broker.heartbeat * 4,
        force,
    }
}
