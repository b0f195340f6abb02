//! The agent's process: put together as `haul worker` is, but for its executor.

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use haul::{
    broker::{Broker, Names, rabbitmq::RabbitMq, settings::BrokerSettings},
    lock::StorageLock,
    protocol::NodeName,
    retry::RetrySettings,
    shutdown::{Shutdown, ShutdownSettings},
    store::{Journal, SqliteRows},
    worker::{Clock, Parts, Unobserved, Worker, WorkerSettings},
};
use secrecy::SecretString;

use super::ledger::Ledger;

/// Found half as quickly as by default, so that a run with many faults is over sooner.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(2);
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
const SLOTS: usize = 8;
const WINDOW: u16 = 64;

/// What an agent is told by its command line.
#[derive(Clone, Debug)]
pub(crate) struct AgentArgs {
    pub(crate) node: String,
    pub(crate) url: String,
    pub(crate) prefix: String,
    pub(crate) storage: PathBuf,
}

type Broken = Box<dyn std::error::Error>;

impl AgentArgs {
    /// Reads what [`AgentArgs::write`] wrote.
    pub(crate) fn read(arguments: &[String]) -> Option<Self> {
        let [node, url, prefix, storage] = arguments else { return None };
        Some(Self { node: node.clone(), url: url.clone(), prefix: prefix.clone(), storage: storage.into() })
    }

    /// The arguments.
    pub(crate) fn write(&self) -> [String; 4] {
        [self.node.clone(), self.url.clone(), self.prefix.clone(), self.storage.to_string_lossy().into_owned()]
    }
}

/// Runs until it is told to end.
pub(crate) fn run(args: AgentArgs) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HAUL_CHECK_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,haul::worker::settle=error,lapin=off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let ended = runtime.map_err(Broken::from).and_then(|runtime| {
        let ended = runtime.block_on(agent(args));
        runtime.shutdown_timeout(Duration::from_secs(1));
        ended
    });
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!(error = %error, "ended by itself");
            ExitCode::FAILURE
        }
    }
}

async fn agent(args: AgentArgs) -> Result<u8, Broken> {
    tokio::spawn(end_with_the_checker());
    let shutdown = Shutdown::new(&ShutdownSettings { grace: Duration::from_secs(10) });
    shutdown.on_signals()?;
    let lock = StorageLock::take(&args.storage)?;
    let journal = StorageLock::directory(&args.storage).join("journal.db");
    let journal = Journal::open(SqliteRows::open(&journal).await?).await?;
    let settings = BrokerSettings {
        urls: vec![SecretString::from(args.url)],
        heartbeat: HEARTBEAT,
        confirm_timeout: CONFIRM_TIMEOUT,
        ..BrokerSettings::default()
    };
    let broker: Arc<dyn Broker> = Arc::new(RabbitMq::connect(&settings, &format!("check {}", args.node)).await?);
    let boot = uuid::Uuid::now_v7().to_string();
    let executor = Ledger::open(&args.node, &boot, &args.storage)?;
    let names = Names::new(args.prefix);
    tracing::info!(boot, "agent starts");
    let parts = Parts {
        settings: WorkerSettings {
            node: NodeName::new(args.node)?,
            results_queue: names.master_event(),
            names,
            slots: SLOTS,
            window: WINDOW,
            retry: RetrySettings { cap: Duration::from_secs(5), ..RetrySettings::default() },
            retention: Duration::from_hours(336),
            longest_wait: Duration::from_mins(1),
            ghost_limit: HEARTBEAT * 4,
            force: false,
        },
        broker: broker.clone(),
        journal,
        executor: Arc::new(executor),
        observer: Arc::new(Unobserved),
        clock: Clock::system(),
        boot,
    };
    let worker = Worker::new(parts, shutdown.soft().clone(), shutdown.hard().clone());
    let mut readiness = worker.readiness();
    tokio::spawn(async move {
        while readiness.changed().await.is_ok() {
            let state = *readiness.borrow_and_update();
            tracing::info!(ready = state.is_ready(), state = ?state, "readiness");
        }
    });
    let mut running = shutdown.tracker().spawn(worker.run());
    let ended = tokio::select! {
        result = &mut running => {
            result??;
            shutdown.ended().await
        }
        ended = shutdown.ended() => ended,
    };
    broker.close().await;
    drop(lock);
    tracing::info!(ended = ?ended, "agent ended");
    Ok(ended.code())
}

/// An agent never outlives the checker that started it, however that ended.
async fn end_with_the_checker() {
    let parent = rustix::process::getppid();
    while rustix::process::getppid() == parent {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    std::process::exit(2);
}
