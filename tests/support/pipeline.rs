//! A worker on the in-memory broker, with an executor that does as it is told, under virtual time.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use haul::{
    broker::{
        Broker, BrokerError, Browse, Consume, Consumer, Depth, Health, Names, Outgoing, PublishError, Topology, View,
        memory::Memory,
    },
    execute::{Execute, Job, Limits, OwedHistory, PENDING, ProjectState},
    failure::{ErrorClass, Failure},
    git::{Fence, Run},
    journal::Entry,
    protocol::{
        ControlAnswer, Event, Kind, NodeName, ProjectId, Status, Task, TaskId, TaskResult, Work,
        wire::{CONTENT_TYPE, Message, header},
    },
    retry::RetrySettings,
    store::{Journal, JournalError, MemoryRows, Rows, Write},
    worker::{Clock, Observe, Parts, Step, Worker, WorkerError, WorkerSettings},
};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// Deliveries held at a time.
pub const WINDOW: u16 = 16;
/// Tasks executing at a time.
const SLOTS: usize = 2;
/// Virtual time that anything may take; far above every wait of the worker.
const PATIENCE: Duration = Duration::from_hours(72);

/// What an execution does.
#[derive(Clone, Copy, Debug)]
pub enum Script {
    /// Succeeds at once.
    Succeed,
    /// Fails at once.
    Fail(ErrorClass),
    /// Succeeds at once, with a history that is still to be attached.
    TreeFirst,
    /// Succeeds after this time.
    Take(Duration),
    /// Goes on until it is stopped.
    UntilStopped,
    /// Panics.
    Panic,
    /// Never ends, whatever it is told.
    Stuck,
    /// Succeeds after this time and does not heed a stop.
    IgnoreStop(Duration),
}

/// A clone task as a master writes it.
pub fn clone_task(id: &str, project: i64) -> Value {
    json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project,
           "git_url": "https://git.example/team/app.git", "target_path": format!("{project}_app")})
}

/// Another task as a master writes it.
pub fn task(id: &str, kind: Kind, project: i64) -> Value {
    json!({"v": 1, "task_id": id, "kind": kind, "project_id": project})
}

/// Does as it is told, and writes down what it did.
#[derive(Default)]
pub struct Obedient {
    scripts: Mutex<HashMap<TaskId, VecDeque<Script>>>,
    histories: Mutex<HashMap<TaskId, VecDeque<Script>>>,
    projects: Mutex<HashMap<ProjectId, ProjectState>>,
    log: Mutex<Vec<TaskId>>,
    running: Mutex<HashSet<ProjectId>>,
    overlapped: AtomicBool,
}

#[async_trait]
impl Execute for Obedient {
    async fn project(&self, project: ProjectId) -> ProjectState {
        self.projects.lock().unwrap().get(&project).copied().unwrap_or_default()
    }

    fn admit(&self, task: &Task) -> Result<(), Failure> {
        match &task.work {
            Work::Clone(work) if work.submodules => Err(Failure::invalid("submodules is not supported by this agent")),
            _ => Ok(()),
        }
    }

    fn limits(&self, task: &Task) -> Limits {
        let timeout = task.timeout.unwrap_or(Duration::from_mins(25));
        Limits { timeout, stall: Duration::from_mins(1) }
    }

    async fn execute(&self, job: &Job, run: &Run<'_>) -> Result<TaskResult, Failure> {
        let project = job.task.project;
        self.log.lock().unwrap().push(job.task.id.clone());
        if !self.running.lock().unwrap().insert(project) {
            self.overlapped.store(true, Ordering::SeqCst);
        }
        let _ends = Ends(self, project);
        let script = self.scripts.lock().unwrap().get_mut(&job.task.id).and_then(VecDeque::pop_front);
        let mut result = TaskResult::default();
        match script.unwrap_or(Script::Succeed) {
            Script::TreeFirst => result.history = Some(PENDING.to_owned()),
            script => script.play(&run.cancel).await?,
        }
        if job.task.kind().changes_project() {
            let mut projects = self.projects.lock().unwrap();
            let state = projects.entry(project).or_default();
            if state.mark != Some(job.place) {
                state.seq += 1;
            }
            state.mark = Some(job.place);
            state.active = job.task.kind() != Kind::Delete;
            state.deleted = !state.active;
        }
        Ok(result)
    }

    async fn history(
        &self,
        owed: &OwedHistory,
        stop: &CancellationToken,
        fence: &dyn Fence,
    ) -> Result<Option<TaskResult>, Failure> {
        let script = self.histories.lock().unwrap().get_mut(&owed.task).and_then(VecDeque::pop_front);
        fence.check().await?;
        if !self.running.lock().unwrap().insert(owed.project) {
            self.overlapped.store(true, Ordering::SeqCst);
        }
        let _ends = Ends(self, owed.project);
        self.log.lock().unwrap().push(TaskId::new(format!("history-of-{}", owed.task)).unwrap());
        let state = self.project(owed.project).await;
        if !state.active {
            return Ok(None);
        }
        script.unwrap_or(Script::Succeed).play(stop).await?;
        Ok(Some(TaskResult { history: Some("attached".to_owned()), ..TaskResult::default() }))
    }

    async fn forget(&self, project: ProjectId) -> Result<(), Failure> {
        self.projects.lock().unwrap().remove(&project);
        Ok(())
    }
}

impl Script {
    /// Does as it says.
    async fn play(self, stop: &CancellationToken) -> Result<(), Failure> {
        let stopped = || Failure::internal("stopped");
        match self {
            Self::Succeed | Self::TreeFirst => Ok(()),
            Self::Fail(class) => Err(Failure::new(class, format!("told to fail with {class}"))),
            Self::Take(time) => tokio::select! {
                () = tokio::time::sleep(time) => Ok(()),
                () = stop.cancelled() => Err(stopped()),
            },
            Self::UntilStopped => {
                stop.cancelled().await;
                Err(stopped())
            }
            Self::Panic => panic!("told to panic"),
            Self::Stuck => std::future::pending().await,
            Self::IgnoreStop(time) => {
                tokio::time::sleep(time).await;
                Ok(())
            }
        }
    }
}

/// An execution ends however it ends.
struct Ends<'a>(&'a Obedient, ProjectId);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.running.lock().unwrap().remove(&self.1);
    }
}

/// Writes down the steps, and breaks at some.
struct Steps {
    log: Mutex<Vec<(Step, Option<TaskId>)>>,
    count: watch::Sender<usize>,
    /// Panics at these steps, of this task where the step knows one; so often.
    breaks: Mutex<Vec<(Step, TaskId, usize)>>,
}

impl Steps {
    fn breaks_at(&self, step: Step, task: Option<&TaskId>) -> bool {
        let mut breaks = self.breaks.lock().unwrap();
        let due =
            breaks.iter_mut().find(|(at, of, times)| *at == step && *times > 0 && task.is_none_or(|task| task == of));
        due.map(|(_, _, times)| *times -= 1).is_some()
    }
}

impl Observe for Steps {
    fn reached(&self, step: Step, task: Option<&TaskId>) {
        assert!(!self.breaks_at(step, task), "told to panic at {step}");
        self.log.lock().unwrap().push((step, task.cloned()));
        self.count.send_modify(|count| *count += 1);
    }
}

/// What the master saw.
#[derive(Default)]
struct Seen {
    events: Vec<Event>,
    traces: BTreeMap<String, String>,
    answers: Vec<ControlAnswer>,
}

/// A worker and everything around it.
pub struct Pipeline {
    /// The broker, with its controls for tests.
    pub broker: Memory,
    executor: Arc<Obedient>,
    steps: Arc<Steps>,
    seen: Arc<Mutex<Seen>>,
    news: watch::Sender<u64>,
    rows: Arc<tokio::sync::Mutex<MemoryRows>>,
    full: Arc<AtomicBool>,
    damaged: Arc<AtomicBool>,
    slow: Slow,
    late: Late,
    clock: Clock,
    /// Seconds that the wall clock was put forward.
    ahead: Arc<AtomicI64>,
    boots: AtomicU64,
    retry: RetrySettings,
    running: Option<Running>,
    _subscriber: JoinHandle<()>,
}

struct Running {
    worker: Arc<Worker>,
    handle: JoinHandle<Result<(), WorkerError>>,
    soft: CancellationToken,
    hard: CancellationToken,
    dead: Arc<AtomicBool>,
}

impl Pipeline {
    /// A started worker of node `n1` and a master that follows its events.
    pub async fn start() -> Self {
        Self::start_with(RetrySettings::default()).await
    }

    /// The same with other settings of retries.
    pub async fn start_with(retry: RetrySettings) -> Self {
        let broker = Memory::new();
        let names = Names::default();
        broker.declare(&names.shared_topology(&names.master_event())).await.unwrap();
        let rows = MemoryRows::default();
        let full = rows.full_switch();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let news = watch::Sender::new(0);
        let subscriber = subscribe(&broker, names.master_event(), seen.clone(), news.clone()).await;
        let (steady, ahead) = (Clock::following_tokio(Timestamp::from_second(1_800_000_000).unwrap()), Arc::default());
        let stepped = Arc::clone(&ahead);
        let clock = Clock::told_by(move || {
            let seconds: &AtomicI64 = &stepped;
            steady.now() + SignedDuration::from_secs(seconds.load(Ordering::SeqCst))
        });
        let mut pipeline = Self {
            broker,
            executor: Arc::new(Obedient::default()),
            steps: Arc::new(Steps { log: Mutex::default(), count: watch::Sender::new(0), breaks: Mutex::default() }),
            seen,
            news,
            rows: Arc::new(tokio::sync::Mutex::new(rows)),
            full,
            damaged: Arc::default(),
            slow: Arc::default(),
            late: Arc::default(),
            clock,
            ahead,
            boots: AtomicU64::new(0),
            retry,
            running: None,
            _subscriber: subscriber,
        };
        pipeline.restart().await;
        pipeline
    }

    async fn parts(&self, boot: u64, dead: Arc<AtomicBool>) -> Parts {
        Parts {
            settings: WorkerSettings {
                node: NodeName::new("n1").unwrap(),
                names: Names::default(),
                slots: SLOTS,
                window: WINDOW,
                retry: self.retry.clone(),
                results_queue: Names::default().master_event(),
                retention: Duration::from_hours(336),
                longest_wait: Duration::from_mins(4),
                ghost_limit: Duration::from_secs(12),
                force: false,
            },
            broker: Arc::new(MortalBroker {
                broker: self.broker.clone(),
                dead: dead.clone(),
                slow: self.slow.clone(),
                late: self.late.clone(),
            }),
            journal: self.journal(dead).await,
            executor: self.executor.clone(),
            observer: self.steps.clone(),
            clock: self.clock.clone(),
            boot: format!("boot-{boot}"),
        }
    }

    async fn journal(&self, dead: Arc<AtomicBool>) -> Journal {
        Journal::open(MortalRows { rows: self.rows.clone(), dead, damaged: self.damaged.clone() }).await.unwrap()
    }

    /// Starts the worker again, as a new process would.
    pub async fn restart(&mut self) {
        if self.running.is_some() {
            self.stop().await;
        }
        let (soft, hard) = (CancellationToken::new(), CancellationToken::new());
        let dead = Arc::new(AtomicBool::new(false));
        let parts = self.parts(self.boots.fetch_add(1, Ordering::SeqCst), dead.clone()).await;
        let worker = Worker::new(parts, soft.clone(), hard.clone());
        let handle = tokio::spawn(worker.clone().run());
        self.running = Some(Running { worker, handle, soft, hard, dead });
    }

    /// The worker that runs.
    pub fn worker(&self) -> Arc<Worker> {
        self.running.as_ref().unwrap().worker.clone()
    }

    /// A second agent of the same name.
    pub async fn second_agent(&self) -> Result<(), WorkerError> {
        self.until_ready(true).await;
        let parts = self.parts(99, Arc::default()).await;
        Worker::new(parts, CancellationToken::new(), CancellationToken::new()).run().await
    }

    async fn stop(&mut self) {
        let running = self.running.take().unwrap();
        running.soft.cancel();
        running.handle.await.unwrap().unwrap();
    }

    /// Two signals.
    pub async fn stop_now(&mut self) {
        let running = self.running.take().unwrap();
        running.soft.cancel();
        running.hard.cancel();
        running.handle.await.unwrap().unwrap();
    }

    /// Waits for the worker to end by itself.
    pub async fn ended(&mut self) {
        let running = self.running.take().unwrap();
        tokio::time::timeout(PATIENCE, running.handle).await.unwrap().unwrap().unwrap();
    }

    /// The process is gone between two instructions: from now on it writes nothing and publishes nothing; what it had
    /// in hand goes back to the broker.
    pub async fn crash(&mut self) {
        let running = self.running.take().unwrap();
        running.dead.store(true, Ordering::SeqCst);
        running.soft.cancel();
        running.hard.cancel();
        self.broker.cut();
        // How it ends does not matter: nobody hears of it.
        let _ = running.handle.await;
    }

    /// Says what the next executions of a task do.
    pub fn script(&self, id: &str, scripts: impl IntoIterator<Item = Script>) {
        let id = TaskId::new(id).unwrap();
        self.executor.scripts.lock().unwrap().entry(id).or_default().extend(scripts);
    }

    /// Says what attaching the history of a task does.
    pub fn script_history(&self, id: &str, scripts: impl IntoIterator<Item = Script>) {
        let id = TaskId::new(id).unwrap();
        self.executor.histories.lock().unwrap().entry(id).or_default().extend(scripts);
    }

    /// A task as a message.
    pub fn message(task: &Value) -> Message {
        Message {
            body: task.to_string().into(),
            content_type: Some(CONTENT_TYPE.to_owned()),
            message_id: task["task_id"].as_str().map(str::to_owned),
            type_: task["kind"].as_str().map(|kind| format!("task.{kind}")),
            ..Message::default()
        }
    }

    /// Publishes a task as a master does.
    pub async fn publish(&self, task: &Value) {
        self.put("haul.task", "n1", Self::message(task)).await;
    }

    /// Publishes a message.
    pub async fn put(&self, exchange: &str, routing_key: &str, message: Message) {
        let (exchange, routing_key) = (exchange.to_owned(), routing_key.to_owned());
        // The worker may still be declaring its queue.
        for _ in 0..100 {
            let outgoing = Outgoing {
                exchange: exchange.clone(),
                routing_key: routing_key.clone(),
                message: message.clone(),
                mandatory: true,
            };
            if self.broker.publish(outgoing).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("no queue takes {routing_key} on {exchange}");
    }

    /// Publishes a control message.
    pub async fn control(&self, command: Value) {
        let message = Message { body: command.to_string().into(), ..Message::default() };
        self.put("haul.control", "n1", message).await;
    }

    /// Enrols another node.
    pub async fn declare_node(&self, node: &str) {
        self.broker.declare(&Names::default().node_topology(&NodeName::new(node).unwrap())).await.unwrap();
    }

    /// Moves every dead letter to a queue through the default exchange, as the console does.
    pub async fn move_dead_letters_to(&self, queue: &str) {
        self.dead_letter().await;
        let mut browse = self.broker.browse("haul.dead").await.unwrap();
        while let Some(letter) = browse.next().await.unwrap() {
            self.put("", queue, letter.message.clone()).await;
            letter.ack().await.unwrap();
        }
        browse.give_back().await.unwrap();
    }

    /// Puts the wall clock forward, or back, by so many days.
    pub fn step_clock(&self, days: i64) {
        self.ahead.fetch_add(days * 86_400, Ordering::SeqCst);
    }

    /// What the wall clock says.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Panics whenever a step of a task is reached, so often; steps that know no task yet belong to any.
    pub fn break_at(&self, step: Step, id: &str, times: usize) {
        self.steps.breaks.lock().unwrap().push((step, TaskId::new(id).unwrap(), times));
    }

    /// The process is gone, and its journal with it.
    pub async fn crash_without_journal(&mut self) {
        self.crash().await;
        *self.rows.lock().await = MemoryRows::default();
    }

    /// Damages the journal under the running worker: what it held is lost.
    pub fn damage_journal(&self) {
        self.damaged.store(true, Ordering::SeqCst);
    }

    /// Whether a task of the project is executed now.
    pub fn is_running(&self, project: ProjectId) -> bool {
        self.executor.running.lock().unwrap().contains(&project)
    }

    /// Waits until each of these was executed since the last [`Pipeline::forget_executions`].
    pub async fn until_executions(&self, ids: &[&str]) {
        self.until(&format!("{ids:?} to run"), || ids.iter().all(|id| self.executions(id) > 0).then_some(())).await;
    }

    /// Forgets what was executed so far.
    pub fn forget_executions(&self) {
        self.executor.log.lock().unwrap().clear();
    }

    /// Makes the journal refuse to write, or not.
    pub fn journal_full(&self, full: bool) {
        self.full.store(full, Ordering::SeqCst);
    }

    /// The events of a task, in the order in which they came.
    pub fn events(&self, id: &str) -> Vec<Event> {
        let seen = self.seen.lock().unwrap();
        seen.events.iter().filter(|event| event.task_id.as_str() == id).cloned().collect()
    }

    /// The statuses of a task.
    pub fn statuses(&self, id: &str) -> Vec<Status> {
        self.events(id).into_iter().map(|event| event.status).collect()
    }

    /// The terminal events of a task, repetitions included.
    pub fn terminal_events(&self, id: &str) -> Vec<Event> {
        self.events(id).into_iter().filter(|event| event.status.is_terminal()).collect()
    }

    /// Waits until a task's terminal event was told so many times.
    pub async fn told(&self, id: &str, times: usize) -> Vec<Event> {
        self.until(&format!("{times} terminal events of {id}"), || {
            Some(self.terminal_events(id)).filter(|ends| ends.len() == times)
        })
        .await
    }

    /// Waits for a task's end, whichever it is; returns its terminal events, repetitions included.
    pub async fn ended_somehow(&self, id: &str) -> Vec<Event> {
        self.until(&format!("{id} to end"), || Some(self.terminal_events(id)).filter(|ends| !ends.is_empty())).await
    }

    /// Whether a task ended in a way that leaves a dead letter.
    pub fn must_be_dead_lettered(&self, id: &str) -> bool {
        let ends = self.terminal_events(id);
        let failed = |event: &Event| matches!(event.status, Status::Failed | Status::Rejected);
        let conflict = |event: &Event| event.error.as_ref().is_some_and(|error| error.class == ErrorClass::Conflict);
        ends.iter().any(|event| failed(event) && !conflict(event))
    }

    /// Dead letters of different tasks: a copy that was paid again after a crash has the same identity.
    pub fn distinct_dead_letters(&self) -> usize {
        let letters = self.broker.messages("haul.dead");
        letters.into_iter().map(|letter| letter.message_id).collect::<HashSet<_>>().len()
    }

    /// The trace context of a task's terminal event.
    pub fn trace_of(&self, id: &str) -> Option<String> {
        self.seen.lock().unwrap().traces.get(id).cloned()
    }

    /// Forgets what was seen so far.
    pub fn forget_events(&self) {
        *self.seen.lock().unwrap() = Seen::default();
    }

    /// Waits for a status of a task.
    pub async fn saw(&self, id: &str, status: Status) -> Event {
        self.until(&format!("{id} to be {status}"), || self.events(id).into_iter().find(|event| event.status == status))
            .await
    }

    /// Waits for a task's end, which must be this one; of the highest round that has ended.
    pub async fn ends(&self, id: &str, status: Status) -> Event {
        let event = self
            .until(&format!("{id} to end as {status}"), || {
                let ends = self.terminal_events(id);
                ends.iter().rev().find(|event| event.status == status).cloned().or_else(|| {
                    let replayed = ends.len() > 1 || ends.iter().any(|event| event.status == Status::Failed);
                    ends.into_iter().next().filter(|_| !replayed)
                })
            })
            .await;
        assert_eq!(event.status, status, "{event:?}");
        event
    }

    /// Lets every publish under routing keys that end so take a second.
    pub fn slow_down(&self, routing_keys: &str) {
        *self.slow.lock().unwrap() = Some(routing_keys.to_owned());
    }

    /// Lets every message for exchanges whose names begin so be confirmed only this much later.
    pub fn confirm_late(&self, exchanges: &str, later: Duration) {
        *self.late.lock().unwrap() = Some((exchanges.to_owned(), later));
    }

    /// The control answers so far.
    pub fn answers(&self) -> Vec<String> {
        self.seen.lock().unwrap().answers.iter().map(|answer| answer.answer.clone()).collect()
    }

    /// Waits for a control answer.
    pub async fn answered(&self, answer: &str) -> ControlAnswer {
        self.until(&format!("the answer {answer}"), || {
            let seen = self.seen.lock().unwrap();
            seen.answers.iter().rev().find(|given| given.answer == answer).cloned()
        })
        .await
    }

    /// Waits for a step of any task.
    pub async fn reached(&self, step: Step) {
        let mut count = self.steps.count.subscribe();
        let found = async {
            while !self.steps.log.lock().unwrap().iter().any(|(reached, _)| *reached == step) {
                count.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("waited for step {step}"));
    }

    /// The steps of a task, in order.
    pub fn steps(&self, id: &str) -> Vec<Step> {
        let log = self.steps.log.lock().unwrap();
        let of = |task: &Option<TaskId>| task.as_ref().is_some_and(|task| task.as_str() == id);
        log.iter().filter(|(_, task)| of(task)).map(|(step, _)| *step).collect()
    }

    /// How often a task was executed.
    pub fn executions(&self, id: &str) -> usize {
        self.executor.log.lock().unwrap().iter().filter(|task| task.as_str() == id).count()
    }

    /// The tasks in the order in which they were executed.
    pub fn start_order(&self) -> Vec<String> {
        self.executor.log.lock().unwrap().iter().map(|task| task.as_str().to_owned()).collect()
    }

    /// Whether two tasks of one project ever ran at once.
    pub fn overlapped(&self) -> bool {
        self.executor.overlapped.load(Ordering::SeqCst)
    }

    /// Messages in a queue, ready or in hand.
    pub fn depth(&self, queue: &str) -> usize {
        self.broker.messages(queue).len()
    }

    /// Waits until the node's queue has neither a ready nor an unsettled message.
    pub async fn drained(&self) {
        self.until("the queue to be drained", || self.broker.messages("haul.node.n1").is_empty().then_some(())).await;
    }

    /// Dead letters.
    pub fn dead_letters(&self) -> usize {
        self.depth("haul.dead")
    }

    /// Waits for a dead letter.
    pub async fn dead_letter(&self) -> Message {
        self.until("a dead letter", || self.broker.messages("haul.dead").into_iter().next()).await
    }

    /// Waits for the worker's readiness to be this.
    pub async fn until_ready(&self, ready: bool) {
        let mut readiness = self.running.as_ref().unwrap().worker.readiness();
        let found = readiness.wait_for(|readiness| readiness.is_ready() == ready);
        tokio::time::timeout(PATIENCE, found).await.expect("readiness in time").unwrap();
    }

    async fn until<A>(&self, what: &str, mut found: impl FnMut() -> Option<A>) -> A {
        let mut news = self.news.subscribe();
        let search = async {
            let mut pause = Duration::from_millis(100);
            loop {
                if let Some(found) = found() {
                    return found;
                }
                // News of the master, or some virtual time for what is seen elsewhere.
                if tokio::time::timeout(pause, news.changed()).await.is_err() {
                    pause = (pause * 2).min(Duration::from_mins(1));
                }
            }
        };
        let Ok(found) = tokio::time::timeout(PATIENCE, search).await else { panic!("waited for {what}") };
        found
    }
}

async fn subscribe(broker: &Memory, queue: String, seen: Arc<Mutex<Seen>>, news: watch::Sender<u64>) -> JoinHandle<()> {
    let consume = Consume { queue, tag: "master".to_owned(), prefetch: 100, declare: Topology::default() };
    let mut consumer = broker.consume(consume).await.unwrap();
    tokio::spawn(async move {
        while let Some(delivery) = consumer.next().await {
            {
                let mut seen = seen.lock().unwrap();
                if let Ok(event) = serde_json::from_slice::<Event>(&delivery.message.body) {
                    let trace = delivery.message.headers.get(header::TRACEPARENT).map(ToString::to_string);
                    seen.traces.extend(trace.map(|trace| (event.task_id.to_string(), trace)));
                    seen.events.push(event);
                } else if let Ok(answer) = serde_json::from_slice::<ControlAnswer>(&delivery.message.body) {
                    seen.answers.push(answer);
                }
            }
            let _ = delivery.ack().await;
            news.send_modify(|count| *count += 1);
        }
    })
}

/// The end of the routing keys whose publishes take long.
type Slow = Arc<Mutex<Option<String>>>;
/// The beginning of exchanges' names, and how late the broker's word comes for what was published there.
type Late = Arc<Mutex<Option<(String, Duration)>>>;

/// A broker's connection of a process that may be gone.
struct MortalBroker {
    broker: Memory,
    dead: Arc<AtomicBool>,
    slow: Slow,
    late: Late,
}

#[async_trait]
impl Broker for MortalBroker {
    async fn publish(&self, outgoing: Outgoing) -> Result<(), PublishError> {
        if self.dead.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let slow = self.slow.lock().unwrap().clone();
        if slow.is_some_and(|slow| outgoing.routing_key.ends_with(&slow)) {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let late = self.late.lock().unwrap().clone();
        let late = late.filter(|(exchanges, _)| outgoing.exchange.starts_with(exchanges));
        let published = self.broker.publish(outgoing).await;
        if let Some((_, later)) = late {
            tokio::time::sleep(later).await;
        }
        published
    }
    async fn consume(&self, consume: Consume) -> Result<Consumer, BrokerError> {
        self.broker.consume(consume).await
    }
    async fn browse(&self, queue: &str) -> Result<Box<dyn Browse>, BrokerError> {
        self.broker.browse(queue).await
    }
    async fn declare(&self, topology: &Topology) -> Result<(), BrokerError> {
        self.broker.declare(topology).await
    }
    async fn missing(&self, topology: &Topology) -> Result<Vec<String>, BrokerError> {
        self.broker.missing(topology).await
    }
    async fn depth(&self, queue: &str) -> Result<Option<Depth>, BrokerError> {
        self.broker.depth(queue).await
    }
    async fn look(&self, queue: &str, closely: bool) -> Result<Option<View>, BrokerError> {
        self.broker.look(queue, closely).await
    }
    fn health(&self) -> watch::Receiver<Health> {
        self.broker.health()
    }
    async fn close(&self) {
        self.broker.close().await;
    }
}

/// Rows that outlive a journal, as a file outlives a process that may be gone.
struct MortalRows {
    rows: Arc<tokio::sync::Mutex<MemoryRows>>,
    dead: Arc<AtomicBool>,
    damaged: Arc<AtomicBool>,
}

impl MortalRows {
    async fn alive(&self) -> Result<tokio::sync::MutexGuard<'_, MemoryRows>, JournalError> {
        if self.damaged.load(Ordering::SeqCst) {
            return Err(JournalError::Damaged { path: "memory".to_owned(), reason: "told to be".to_owned() });
        }
        if self.dead.load(Ordering::SeqCst) { Err(JournalError::Closed) } else { Ok(self.rows.lock().await) }
    }
}

#[async_trait]
impl Rows for MortalRows {
    async fn write(&mut self, batch: &[Write]) -> Result<(), JournalError> {
        self.alive().await?.write(batch).await
    }
    async fn relieve(&mut self) -> bool {
        false
    }
    async fn replenish(&mut self) -> Result<(), JournalError> {
        self.alive().await?.replenish().await
    }
    async fn renew(&mut self, _reason: &str) -> Result<(), JournalError> {
        *self.rows.lock().await = MemoryRows::default();
        self.damaged.store(false, Ordering::SeqCst);
        Ok(())
    }
    async fn entries(&mut self, task: &TaskId) -> Result<Vec<Entry>, JournalError> {
        self.alive().await?.entries(task).await
    }
    async fn owing(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.alive().await?.owing().await
    }
    async fn waiting_clones(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.alive().await?.waiting_clones().await
    }
    async fn running(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.alive().await?.running().await
    }
    async fn note(&mut self, name: &str) -> Result<Option<String>, JournalError> {
        self.alive().await?.note(name).await
    }
    async fn notes(&mut self, prefix: &str) -> Result<Vec<(String, String)>, JournalError> {
        self.alive().await?.notes(prefix).await
    }
    async fn prune(&mut self, limit: Timestamp, most: u32) -> Result<u64, JournalError> {
        self.alive().await?.prune(limit, most).await
    }
}
