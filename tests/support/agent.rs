//! A real agent process on a real broker, seen from outside: tasks go in, events and working trees come out.

use std::{
    fmt::Debug,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use haul::{
    broker::{Broker, Consume, Names, Outgoing, Topology, rabbitmq::RabbitMq, settings::BrokerSettings},
    protocol::{
        ControlAnswer, Event, NodeName, Status,
        wire::{CONTENT_TYPE, CopyHeaders, Message},
    },
};
use secrecy::SecretString;
use serde_json::Value;
use tokio::{sync::watch, time::Instant};

use super::{rabbit::Rabbit, repository::Repository};

/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// One node: its storage, its settings, and the process while it runs.
pub struct Agent {
    /// Names on the broker, under a prefix of this test's own.
    pub names: Names,
    /// Storage of the node.
    pub storage: tempfile::TempDir,
    /// The broker as the master sees it.
    pub master: Arc<RabbitMq>,
    node: NodeName,
    environment: Vec<(String, String)>,
    process: Option<Child>,
    begun_at: usize,
    log: PathBuf,
    seen: Arc<Mutex<Seen>>,
    news: watch::Sender<u64>,
}

#[derive(Default)]
struct Seen {
    events: Vec<Event>,
    answers: Vec<ControlAnswer>,
}

/// A process of a node beside which another was started.
pub struct Former {
    process: Child,
    log: PathBuf,
}

impl Former {
    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    /// Waits for it to write something.
    pub async fn said(&self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(what) {
            assert!(Instant::now() < deadline, "waited for {what:?}; the log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits for it to end by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the former agent did not end; its log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Former {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Settings that reach a broker at `url`.
pub fn broker_settings(url: &str) -> BrokerSettings {
    BrokerSettings { urls: vec![SecretString::from(url)], ..BrokerSettings::default() }
}

impl Agent {
    /// A node of its own on `rabbit`; nothing runs yet, and a master follows its events.
    pub async fn new(rabbit: &Rabbit) -> Self {
        Self::at(std::slice::from_ref(&rabbit.url)).await
    }

    /// A node of its own on a broker with these addresses.
    pub async fn at(urls: &[String]) -> Self {
        let prefix = format!("t{}", uuid::Uuid::new_v4().simple());
        let names = Names::new(prefix.clone());
        let settings = BrokerSettings {
            urls: urls.iter().map(|url| SecretString::from(url.as_str())).collect(),
            ..BrokerSettings::default()
        };
        let master = Arc::new(RabbitMq::connect(&settings, "test master").await.unwrap());
        master.declare(&names.shared_topology(&names.master_event())).await.unwrap();
        let storage = tempfile::tempdir().unwrap();
        let environment = [
            ("AGENT_NODE_NAME", "n1".to_owned()),
            ("AGENT_AMQP_URL", urls.join(",")),
            ("AGENT_STORAGE_PATH", storage.path().to_str().unwrap().to_owned()),
            ("AGENT_PREFIX", prefix),
            ("AGENT_GIT__ALLOW_FILE", "true".to_owned()),
            ("AGENT_GIT__ALLOW_HTTP", "true".to_owned()),
            ("AGENT_GIT__ALLOW_LOOPBACK", "true".to_owned()),
            // On a machine under load a tree would be shown first by chance.
            ("AGENT_GIT__TREE_FIRST_AFTER", "off".to_owned()),
            ("AGENT_LOG__FORMAT", "json".to_owned()),
        ];
        let seen = Arc::new(Mutex::new(Seen::default()));
        let news = watch::Sender::new(0);
        subscribe(master.clone(), names.master_event(), seen.clone(), news.clone()).await;
        Self {
            names,
            master,
            node: NodeName::new("n1").unwrap(),
            environment: environment.map(|(name, value)| (name.to_owned(), value)).into(),
            process: None,
            begun_at: 0,
            log: storage.path().join("agent.log"),
            storage,
            seen,
            news,
        }
    }

    /// Sets a variable for later starts.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// The environment of the agent, for commands that run beside it.
    pub fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// A `haul` command with the agent's settings.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
        command.env_clear().envs(self.environment.iter().cloned()).args(arguments);
        command
    }

    /// Starts the process.
    pub fn start(&mut self, arguments: &[&str]) {
        self.begun_at = self.log().len();
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = self.command(&["worker"]);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.process = Some(command.spawn().unwrap());
    }

    /// Starts another process of the same node beside the running one, which is returned; from now on this is the new one.
    pub fn start_beside(&mut self, arguments: &[&str]) -> Former {
        let process = self.process.take().expect("there is a process to start beside");
        let former = Former { process, log: self.log.clone() };
        let count = std::fs::read_dir(self.storage.path()).unwrap().count();
        self.log = self.storage.path().join(format!("agent-{count}.log"));
        self.start(arguments);
        former
    }

    /// Waits until the process that was started last says that it is ready.
    pub async fn ready(&self) {
        self.until_async("the agent to be ready", async || {
            self.log()[self.begun_at..].contains(r#""message":"readiness","ready":true"#)
        })
        .await;
    }

    /// Whether the process that was started last still runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.try_wait().unwrap().is_none())
    }

    /// Another node of the same fleet: same broker, names and settings, its own name and storage; it sees the same events.
    pub fn neighbour(&self, node: &str) -> Self {
        let storage = tempfile::tempdir().unwrap();
        let mut neighbour = Self {
            names: self.names.clone(),
            master: self.master.clone(),
            node: NodeName::new(node).unwrap(),
            environment: self.environment.clone(),
            process: None,
            begun_at: 0,
            log: storage.path().join("agent.log"),
            seen: self.seen.clone(),
            news: self.news.clone(),
            storage,
        };
        let path = neighbour.storage.path().to_str().unwrap().to_owned();
        neighbour.set("AGENT_NODE_NAME", node);
        neighbour.set("AGENT_STORAGE_PATH", &path);
        neighbour
    }

    /// The name of the node.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    /// What the process wrote so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for the process to end by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        let process = self.process.as_mut().unwrap();
        loop {
            if let Some(status) = process.try_wait().unwrap() {
                self.process = None;
                return status;
            }
            assert!(Instant::now() < deadline, "the agent did not end; its log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Kills the process as a power cut would.
    pub async fn kill(&mut self) {
        self.signal(rustix::process::Signal::KILL);
        self.ended().await;
    }

    /// Where the projects are.
    pub fn projects(&self) -> PathBuf {
        self.storage.path().join("projects")
    }

    /// Publishes a task, once the node's queue is there.
    pub async fn publish(&self, task: &Value) {
        let message = Message {
            body: task.to_string().into(),
            content_type: Some(CONTENT_TYPE.to_owned()),
            message_id: task["task_id"].as_str().map(str::to_owned),
            type_: task["kind"].as_str().map(|kind| format!("task.{kind}")),
            ..Message::default()
        };
        self.put(&self.names.task(), self.node.as_str(), message).await;
    }

    /// Publishes a control message.
    pub async fn control(&self, command: &Value) {
        let message = Message { body: command.to_string().into(), ..Message::default() };
        self.put(&self.names.control(), self.node.as_str(), message).await;
    }

    /// Publishes a message until a queue takes it.
    pub async fn put(&self, exchange: &str, routing_key: &str, message: Message) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let outgoing = Outgoing {
                exchange: exchange.to_owned(),
                routing_key: routing_key.to_owned(),
                message: message.clone(),
                mandatory: true,
            };
            match self.master.publish(outgoing).await {
                Ok(()) => return,
                Err(error) => assert!(Instant::now() < deadline, "{error}; the agent's log:\n{}", self.log()),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The events of a task, in the order in which they came.
    pub fn events(&self, id: &str) -> Vec<Event> {
        let seen = self.seen.lock().unwrap();
        seen.events.iter().filter(|event| event.task_id.as_str() == id).cloned().collect()
    }

    /// Every event seen.
    pub fn all_events(&self) -> Vec<Event> {
        self.seen.lock().unwrap().events.clone()
    }

    /// The distinct terminal events of a task and round.
    pub fn terminal_states(&self, id: &str, round: u32) -> Vec<(String, Status)> {
        let ends = self.events(id).into_iter().filter(|event| event.status.is_terminal() && event.round == round);
        let mut states: Vec<_> = ends.map(|event| (event.event_id, event.status)).collect();
        states.sort();
        states.dedup();
        states
    }

    /// Every task that was heard of has one end in its first round, and no other.
    pub fn each_ended_once(&self) {
        let ids: std::collections::BTreeSet<_> =
            self.all_events().iter().map(|event| event.task_id.to_string()).collect();
        for id in ids {
            let states = self.terminal_states(&id, 0);
            assert_eq!(states.len(), 1, "{id}: {states:?}");
        }
    }

    /// Waits for a status of a task.
    pub async fn saw(&self, id: &str, status: Status) -> Event {
        self.until(&format!("{id} to be {status}"), || {
            self.events(id).into_iter().rev().find(|event| event.status == status)
        })
        .await
    }

    /// Waits for a task's end in a round.
    pub async fn end(&self, id: &str, round: u32) -> Event {
        self.until(&format!("{id} to end in round {round}"), || {
            self.events(id).into_iter().find(|event| event.status.is_terminal() && event.round == round)
        })
        .await
    }

    /// Waits for a control answer.
    pub async fn answered(&self, answer: &str) -> ControlAnswer {
        self.until(&format!("the answer {answer}"), || {
            let seen = self.seen.lock().unwrap();
            seen.answers.iter().rev().find(|given| given.answer == answer).cloned()
        })
        .await
    }

    /// Waits until the node's queue is empty and consumed.
    pub async fn consuming(&self) {
        let queue = self.names.node(&self.node);
        self.until_async(
            "the node's queue to be consumed",
            async || matches!(self.master.depth(&queue).await, Ok(Some(depth)) if depth.consumers > 0),
        )
        .await;
    }

    /// Waits until nothing is ready in the node's queue.
    pub async fn drained(&self) {
        let queue = self.names.node(&self.node);
        self.until_async(
            "the node's queue to be drained",
            async || matches!(self.master.depth(&queue).await, Ok(Some(depth)) if depth.messages == 0),
        )
        .await;
    }

    /// Waits until this many dead letters are there.
    pub async fn dead_letters(&self, count: u32) {
        let queue = self.names.dead();
        let depth = async || self.master.depth(&queue).await.map(|depth| depth.map(|depth| depth.messages));
        let there = |seen: &Result<_, _>| matches!(seen, Ok(Some(messages)) if *messages == count);
        self.until_seen(&format!("{count} dead letters"), depth, there).await;
    }

    /// The rounds that the dead letters ask for, read and given back.
    pub async fn dead_letter_rounds(&self) -> Vec<u32> {
        let mut browse = self.master.browse(&self.names.dead()).await.unwrap();
        let mut rounds = Vec::new();
        while let Some(letter) = browse.next().await.unwrap() {
            rounds.push(CopyHeaders::read(&letter.message.headers).round);
            letter.abandon();
        }
        browse.give_back().await.unwrap();
        rounds
    }

    /// Waits for something that has to be asked for.
    pub async fn until_async(&self, what: &str, holds: impl AsyncFnMut() -> bool) {
        self.until_seen(what, holds, |holds| *holds).await;
    }

    /// The same; tells what it saw last, where that is not what is waited for.
    async fn until_seen<T: Debug>(&self, what: &str, mut look: impl AsyncFnMut() -> T, holds: impl Fn(&T) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = look().await;
            if holds(&seen) {
                return;
            }
            let late = Instant::now() >= deadline;
            assert!(!late, "waited for {what}, saw {seen:?}; the agent's log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn until<A>(&self, what: &str, mut found: impl FnMut() -> Option<A>) -> A {
        let mut news = self.news.subscribe();
        let search = async {
            loop {
                if let Some(found) = found() {
                    return found;
                }
                news.changed().await.unwrap();
            }
        };
        let Ok(found) = tokio::time::timeout(PATIENCE, search).await else {
            panic!("waited for {what}; seen: {:#?}\nthe agent's log:\n{}", self.all_events(), self.log());
        };
        found
    }

    /// A clone task of `upstream` into `target`.
    pub fn clone_task(id: &str, project: i64, upstream: &Repository, target: &str) -> Value {
        serde_json::json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project,
                           "git_url": upstream.url(), "target_path": target})
    }

    /// A task without particulars.
    pub fn task(id: &str, kind: &str, project: i64) -> Value {
        serde_json::json!({"v": 1, "task_id": id, "kind": kind, "project_id": project})
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Whether anything of a half-made project can be seen: every directory under `projects` is whole or is not there.
pub fn visible_projects(projects: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(projects).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let names = entries.into_iter().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name != ".haul").collect()
}

async fn subscribe(broker: Arc<RabbitMq>, queue: String, seen: Arc<Mutex<Seen>>, news: watch::Sender<u64>) {
    let consume = Consume { queue, tag: "test-master".to_owned(), prefetch: 100, declare: Topology::default() };
    let mut consumer = broker.consume(consume).await.unwrap();
    tokio::spawn(async move {
        while let Some(delivery) = consumer.next().await {
            {
                let mut seen = seen.lock().unwrap();
                if let Ok(event) = serde_json::from_slice::<Event>(&delivery.message.body) {
                    seen.events.push(event);
                } else if let Ok(answer) = serde_json::from_slice::<ControlAnswer>(&delivery.message.body) {
                    seen.answers.push(answer);
                }
            }
            let _ = delivery.ack().await;
            news.send_modify(|count| *count += 1);
        }
    });
}
