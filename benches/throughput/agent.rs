//! An agent in a process of its own whose executor does nothing: everything else is the real thing.
//!
//! It is this very program, started again. It is spoken to in lines: `ready` when it consumes, `done NANOSECONDS` when it
//! has acknowledged as many tasks as it was told to expect, `received UNIX_NANOSECONDS` for the first delivery after
//! `next`, `acked COUNT` when asked `count`. It ends when its standard input does.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use clap::Args;
use haul::{
    broker::{Broker, Names, rabbitmq::RabbitMq, settings::BrokerSettings},
    execute::{Execute, Job, Limits, OwedHistory, ProjectState},
    failure::Failure,
    git::{Fence, Run},
    protocol::{NodeName, ProjectId, Task, TaskId, TaskResult},
    retry::RetrySettings,
    store::{Journal, MemoryRows, SqliteRows},
    telemetry::LogSettings,
    worker::{Clock, Observe, Parts, Step, Worker, WorkerSettings},
};
use secrecy::SecretString;
use tokio_util::sync::CancellationToken;

/// As many as `haul worker` has.
const THREADS: usize = 2;
/// Nothing here takes as long, also on a slow machine.
const PATIENCE: Duration = Duration::from_mins(15);

/// What the agent is told.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Orders {
    /// Be the agent
    #[arg(long, hide = true)]
    pub(crate) agent: bool,
    #[arg(long, hide = true, default_value = "")]
    url: String,
    #[arg(long, hide = true, default_value = "")]
    prefix: String,
    #[arg(long, hide = true, default_value = "")]
    node: String,
    #[arg(long, hide = true)]
    storage: Option<PathBuf>,
    #[arg(long, hide = true, default_value_t = 0)]
    pub(crate) expect: u64,
    #[arg(long, hide = true, default_value_t = 0)]
    hold_ms: u64,
    /// So many agents at once, with journals in memory
    #[arg(long, hide = true, default_value_t = 1)]
    agents: usize,
}

impl Orders {
    /// The broker's address.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }
}

/// What it does to a task: nothing, for as long as it was told.
struct Nothing(Duration);

#[async_trait]
impl Execute for Nothing {
    async fn project(&self, _: ProjectId) -> ProjectState {
        ProjectState { active: true, ..ProjectState::default() }
    }

    fn admit(&self, _: &Task) -> Result<(), Failure> {
        Ok(())
    }

    fn limits(&self, _: &Task) -> Limits {
        Limits { timeout: Duration::from_hours(1), stall: Duration::from_hours(1) }
    }

    async fn execute(&self, _: &Job, run: &Run<'_>) -> Result<TaskResult, Failure> {
        if !self.0.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(self.0) => {}
                () = run.cancel.cancelled() => return Err(Failure::internal("stopped")),
            }
        }
        Ok(TaskResult::default())
    }

    async fn history(
        &self,
        _: &OwedHistory,
        _: &CancellationToken,
        _: &dyn Fence,
    ) -> Result<Option<TaskResult>, Failure> {
        Ok(None)
    }

    async fn forget(&self, _: ProjectId) -> Result<(), Failure> {
        Ok(())
    }
}

/// Counts deliveries and acknowledgements.
#[derive(Default)]
struct Counts {
    received: AtomicU64,
    acked: AtomicU64,
    expect: u64,
    first: Mutex<Option<Instant>>,
    tell_next: AtomicBool,
}

impl Observe for Counts {
    fn reached(&self, step: Step, _: Option<&TaskId>) {
        match step {
            Step::Received => {
                if self.received.fetch_add(1, Ordering::Relaxed) == 0 {
                    *self.first.lock().expect("nobody panicked") = Some(Instant::now());
                }
                if self.tell_next.swap(false, Ordering::Relaxed) {
                    say(&format!("received {}", unix_nanos()));
                }
            }
            Step::Acked if self.acked.fetch_add(1, Ordering::Relaxed) + 1 == self.expect => {
                let first = self.first.lock().expect("nobody panicked").expect("it was received before");
                say(&format!("done {}", first.elapsed().as_nanos()));
            }
            _ => {}
        }
    }
}

fn say(line: &str) {
    // Nobody listens any more: then the end is near.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Now, as other processes see it too.
pub(crate) fn unix_nanos() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos())
}

/// Is the agent until its standard input ends.
pub(crate) fn be(orders: &Orders, slots: usize, window: u16) {
    LogSettings::default().install("info,lapin=off");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .expect("a runtime can be started");
    runtime.block_on(agents(orders, slots, window));
    runtime.shutdown_timeout(Duration::from_secs(1));
}

async fn agents(orders: &Orders, slots: usize, window: u16) {
    let (soft, hard) = (CancellationToken::new(), CancellationToken::new());
    let counts = Arc::new(Counts { expect: orders.expect, ..Counts::default() });
    let (listening, stopping) = (counts.clone(), soft.clone());
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            match line.as_str() {
                "next" => listening.tell_next.store(true, Ordering::Relaxed),
                "count" => say(&format!("acked {}", listening.acked.load(Ordering::Relaxed))),
                _ => {}
            }
        }
        stopping.cancel();
    });
    let mut running = Vec::new();
    for number in 0..orders.agents {
        let node = if orders.agents == 1 { orders.node.clone() } else { node_name(&orders.node, number) };
        let settings = broker_settings(&orders.url);
        let broker = RabbitMq::connect(&settings, "bench agent").await.expect("the settings can be used");
        let broker: Arc<dyn Broker> = Arc::new(broker);
        let journal = match &orders.storage {
            Some(storage) => {
                fs::create_dir_all(storage).expect("the storage can be written");
                let rows = SqliteRows::open(&storage.join("journal.db")).await.expect("the journal can be opened");
                Journal::open(rows).await
            }
            None => Journal::open(MemoryRows::default()).await,
        };
        let names = Names::new(orders.prefix.clone());
        let parts = Parts {
            settings: WorkerSettings {
                node: NodeName::new(node).expect("a node name"),
                results_queue: names.master_event(),
                names,
                slots,
                window,
                retry: RetrySettings::default(),
                retention: Duration::from_hours(24 * 14),
                longest_wait: Duration::from_mins(4),
                ghost_limit: settings.heartbeat * 4,
                force: false,
            },
            broker: broker.clone(),
            journal: journal.expect("the journal can be read"),
            executor: Arc::new(Nothing(Duration::from_millis(orders.hold_ms))),
            observer: counts.clone(),
            clock: Clock::system(),
            boot: uuid::Uuid::now_v7().to_string(),
        };
        let worker = Worker::new(parts, soft.clone(), hard.clone());
        let mut readiness = worker.readiness();
        running.push((tokio::spawn(worker.run()), broker));
        while !readiness.borrow_and_update().is_ready() {
            readiness.changed().await.expect("the worker runs");
        }
    }
    say("ready");
    soft.cancelled().await;
    if orders.hold_ms > 0 {
        hard.cancel();
    }
    for (worker, broker) in running {
        worker.await.expect("the worker does not panic").expect("the worker ends well");
        if orders.agents == 1 {
            broker.close().await;
        }
    }
}

/// The name of one of many nodes.
pub(crate) fn node_name(stem: &str, number: usize) -> String {
    format!("{stem}-{number:05}")
}

pub(crate) fn broker_settings(url: &str) -> BrokerSettings {
    BrokerSettings { urls: vec![SecretString::from(url)], ..BrokerSettings::default() }
}

/// A running agent, seen from outside.
pub(crate) struct Agent {
    process: Child,
    orders: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
    log: PathBuf,
}

/// What an agent is started with.
#[derive(Clone)]
pub(crate) struct Start<'a> {
    pub(crate) url: &'a str,
    pub(crate) prefix: &'a str,
    pub(crate) node: &'a str,
    /// Without one the journal is in memory.
    pub(crate) storage: Option<&'a Path>,
    pub(crate) log: PathBuf,
    pub(crate) slots: usize,
    pub(crate) window: u16,
    pub(crate) expect: u64,
    pub(crate) hold: Duration,
    pub(crate) agents: usize,
}

impl Agent {
    /// Starts one.
    pub(crate) fn start(start: &Start<'_>) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
        command
            .args(["--agent", "--url", start.url, "--prefix", start.prefix, "--node", start.node])
            .args(["--slots", &start.slots.to_string(), "--window", &start.window.to_string()])
            .args(["--expect", &start.expect.to_string(), "--hold-ms", &start.hold.as_millis().to_string()])
            .args(["--agents", &start.agents.to_string()])
            .args(start.storage.map(|storage| vec!["--storage".as_ref(), storage.as_os_str()]).unwrap_or_default())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&start.log).expect("the log can be written"));
        let mut process = command.spawn().expect("this program can be started again");
        let output = BufReader::new(process.stdout.take().expect("it is piped"));
        let (tell, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        let orders = process.stdin.take();
        Self { process, orders, lines, log: start.log.clone() }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Tells it something.
    pub(crate) fn order(&mut self, order: &str) {
        let orders = self.orders.as_mut().expect("it was not ended yet");
        writeln!(orders, "{order}").expect("the agent runs");
    }

    /// Waits until it says a line that begins with `word`; what follows there.
    pub(crate) fn says(&self, word: &str) -> String {
        self.says_within(word, PATIENCE)
            .unwrap_or_else(|| panic!("the agent did not say {word}; its log:\n{}", last_words(&self.log)))
    }

    /// The same, for so long.
    pub(crate) fn says_within(&self, word: &str, patience: Duration) -> Option<String> {
        let end = Instant::now() + patience;
        loop {
            let line = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())).ok()?;
            if let Some(rest) = line.strip_prefix(word) {
                return Some(rest.trim().to_owned());
            }
        }
    }

    /// How many tasks it has acknowledged.
    pub(crate) fn acked(&mut self) -> u64 {
        self.order("count");
        self.says("acked").parse().expect("it is a number")
    }

    /// Ends it in order.
    pub(crate) fn end(mut self) {
        drop(self.orders.take());
        let status = self.process.wait().expect("it is ours");
        assert!(status.success(), "the agent ended badly; its log:\n{}", last_words(&self.log));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.orders.take());
        for _ in 0..100 {
            if matches!(self.process.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn last_words(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(12).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}
