//! The real agent on a real broker: a task is published, its events come back.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use haul::{
    broker::{Broker, Consume, Consumer, Names, Outgoing, Topology, rabbitmq::RabbitMq, settings::BrokerSettings},
    protocol::wire::{CONTENT_TYPE, Message},
};
use secrecy::SecretString;
use serde_json::{Value, json};

/// Nothing here takes as long, also on a slow machine.
const PATIENCE: Duration = Duration::from_mins(15);

/// A running `haul worker` and the master's side of the conversation.
pub(crate) struct Agent {
    names: Names,
    master: Arc<RabbitMq>,
    events: Consumer,
    process: Child,
    pub(crate) storage: PathBuf,
    log: PathBuf,
    tasks: u64,
    /// Settings that this agent does not know, and therefore runs without.
    pub(crate) unknown: Vec<String>,
}

/// One event, and how long after the publishing it came.
pub(crate) struct Seen {
    pub(crate) after: Duration,
    pub(crate) event: Value,
}

impl Agent {
    /// Starts one with its storage in `place`; `settings` are variables, left out where the agent does not know them.
    pub(crate) async fn start(place: &Path, settings: &[(&str, &str)]) -> Self {
        let url = std::env::var("HAUL_BENCH_AMQP_URL").expect("HAUL_BENCH_AMQP_URL: run this by scripts/bench");
        let prefix = format!("b{}", uuid::Uuid::new_v4().simple());
        let names = Names::new(prefix.clone());
        let broker = BrokerSettings { urls: vec![SecretString::from(url.clone())], ..BrokerSettings::default() };
        let master = Arc::new(RabbitMq::connect(&broker, "bench master").await.expect("the broker is there"));
        master.declare(&names.shared_topology(&names.master_event())).await.expect("queues can be declared");
        let queue = names.master_event();
        let consume = Consume { queue, tag: "bench".to_owned(), prefetch: 200, declare: Topology::default() };
        let events = master.consume(consume).await.expect("events can be consumed");
        let storage = place.join("agent");
        fs::create_dir_all(&storage).expect("the place can be written");
        let log = storage.join("agent.log");
        let mut settings = settings.to_vec();
        let mut unknown = Vec::new();
        loop {
            let mut command = Command::new(program());
            command
                .arg("worker")
                .env_clear()
                .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
                .env("AGENT_NODE_NAME", "bench")
                .env("AGENT_AMQP_URL", &url)
                .env("AGENT_STORAGE_PATH", &storage)
                .env("AGENT_PREFIX", &prefix)
                .env("AGENT_GIT__ALLOW_HTTP", "true")
                .env("AGENT_GIT__ALLOW_LOOPBACK", "true")
                .env("AGENT_LOG__FORMAT", "json")
                .envs(std::env::var("RUST_LOG").map(|level| ("RUST_LOG", level)))
                .envs(settings.iter().copied())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(&log).expect("the log can be written"));
            let mut process = command.spawn().expect("the agent can be started");
            if ready(&mut process, &log).await {
                return Self { names, master, events, process, storage, log, tasks: 0, unknown };
            }
            // An older agent: what it does not know, it refuses by name.
            let text = fs::read_to_string(&log).unwrap_or_default().to_lowercase();
            let names_it = |variable: &str| {
                let key = variable.trim_start_matches("AGENT_").to_lowercase().replace("__", ".");
                text.contains(&key) || text.contains(key.rsplit('.').next().unwrap_or(&key))
            };
            let refused = settings.iter().position(|(variable, _)| names_it(variable));
            let Some(refused) = refused else { panic!("the agent did not start:\n{text}") };
            unknown.push(settings.remove(refused).0.to_owned());
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Where a project is.
    pub(crate) fn project(&self, target: &str) -> PathBuf {
        self.storage.join("projects").join(target)
    }

    /// Publishes a task and says its id.
    pub(crate) async fn publish(&mut self, kind: &str, project: u64, more: Value) -> String {
        self.tasks += 1;
        let id = format!("bench-{}", self.tasks);
        let mut task = json!({"v": 1, "task_id": id, "kind": kind, "project_id": project});
        if let (Value::Object(task), Value::Object(more)) = (&mut task, more) {
            task.extend(more);
        }
        let message = Message {
            body: task.to_string().into(),
            content_type: Some(CONTENT_TYPE.to_owned()),
            message_id: Some(id.clone()),
            type_: Some(format!("task.{kind}")),
            ..Message::default()
        };
        let outgoing =
            Outgoing { exchange: self.names.task(), routing_key: "bench".to_owned(), message, mandatory: true };
        self.master.publish(outgoing).await.expect("the broker takes the task");
        id
    }

    /// The next event of any task.
    pub(crate) async fn event(&mut self, since: Instant) -> Seen {
        let next = tokio::time::timeout(PATIENCE, self.events.next()).await;
        let Ok(Some(delivery)) = next else { panic!("no event came; the agent's log:\n{}", self.last_words()) };
        let after = since.elapsed();
        let event = serde_json::from_slice(&delivery.message.body).unwrap_or_default();
        let _ = delivery.ack().await;
        Seen { after, event }
    }

    /// Runs a task to its end, which must be a success, and to its `history` where `history` asks for it.
    pub(crate) async fn run(&mut self, kind: &str, project: u64, more: Value, history: bool) -> (Seen, Option<Seen>) {
        let begun = Instant::now();
        let id = self.publish(kind, project, more).await;
        let done = loop {
            let seen = self.event(begun).await;
            match seen.event["status"].as_str() {
                _ if seen.event["task_id"] != *id => {}
                Some("succeeded") => break seen,
                Some("failed" | "rejected" | "cancelled" | "superseded") => {
                    panic!("the task did not succeed: {}\nthe agent's log:\n{}", seen.event, self.last_words())
                }
                _ => {}
            }
        };
        if !history || done.event["result"]["history"] != "pending" {
            return (done, None);
        }
        loop {
            let seen = self.event(begun).await;
            if seen.event["task_id"] == *id && seen.event["status"] == "history" {
                assert!(seen.event["error"].is_null(), "the history was not attached: {}", seen.event);
                return (done, Some(seen));
            }
        }
    }

    /// Clones `url` into `target`.
    pub(crate) async fn clone(&mut self, project: u64, url: &str, target: &str) -> Seen {
        self.run("clone", project, json!({"git_url": url, "target_path": target}), false).await.0
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().rev().take(12).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
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

/// The agent under measurement.
pub(crate) fn program() -> PathBuf {
    std::env::var_os("HAUL_BIN").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_haul")), PathBuf::from)
}

async fn ready(process: &mut Child, log: &Path) -> bool {
    for _ in 0..1200 {
        let text = fs::read_to_string(log).unwrap_or_default();
        if text.contains(r#""message":"readiness","ready":true"#) {
            return true;
        }
        if process.try_wait().expect("it is ours").is_some() {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the agent did not become ready: {}", fs::read_to_string(log).unwrap_or_default());
}
