//! The broker of a run and the master's side of it.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::Command,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use haul::{
    broker::{Broker, Names, rabbitmq::RabbitMq},
    protocol::{NodeName, TaskId},
};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::json;

use crate::agent::{self, broker_settings};

/// Publishes in flight while a queue is filled.
const FILL_WINDOW: usize = 1000;
/// The node of the cases that have one.
pub(crate) const NODE: &str = "bench";

/// A broker, names of one's own on it, and a connection.
pub(crate) struct Rig {
    pub(crate) url: String,
    pub(crate) names: Names,
    pub(crate) master: RabbitMq,
    pub(crate) channel: Channel,
    _connection: Connection,
    /// Which other sides have queues here.
    sides: Mutex<BTreeSet<&'static str>>,
}

impl Rig {
    /// Declares what all nodes share, and one node's queues.
    pub(crate) async fn new() -> Self {
        let url = url();
        let names = Names::new(format!("b{}", uuid::Uuid::new_v4().simple()));
        let master = RabbitMq::connect(&broker_settings(&url), "bench master").await.expect("the broker is there");
        let node = NodeName::new(NODE).expect("a node name");
        let topology = names.shared_topology(&names.master_event()).and(names.node_topology(&node));
        master.declare(&topology).await.expect("queues can be declared");
        let (connection, channel) = connect(&url).await;
        Self { url, names, master, channel, _connection: connection, sides: Mutex::default() }
    }

    /// How an agent for it is started; `storage` below the scratch directory.
    pub(crate) fn agent<'a>(
        &'a self,
        storage: Option<&'a PathBuf>,
        log: PathBuf,
        size: (usize, u16),
    ) -> agent::Start<'a> {
        agent::Start {
            url: &self.url,
            prefix: self.names.prefix(),
            node: NODE,
            storage: storage.map(PathBuf::as_path),
            log,
            slots: size.0,
            window: size.1,
            expect: 0,
            hold: Duration::ZERO,
            agents: 1,
        }
    }

    /// The node's queue.
    pub(crate) fn queue(&self) -> String {
        self.names.node(&NodeName::new(NODE).expect("a node name"))
    }

    /// Puts so many tasks, each of another project, into the node's queue.
    pub(crate) async fn fill(&self, tasks: u64) {
        let exchange = self.names.task();
        let bodies = (0..tasks).map(|number| task(number).1);
        publish_all(&self.channel, &exchange, NODE, bodies).await;
    }

    /// Publishes one task and says its identity.
    pub(crate) async fn publish(&self, node: &str, number: u64) -> String {
        let (id, body) = task(number);
        let confirm = publish(&self.channel, &self.names.task(), node, &body).await;
        drop(confirm.await.expect("the broker takes it"));
        id
    }

    /// Messages ready in a queue.
    pub(crate) async fn ready(&self, queue: &str) -> u32 {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = self.channel.queue_declare(queue.into(), options, FieldTable::default()).await;
        queue.expect("the queue is there").message_count()
    }

    /// Counts and forgets the events that wait for the master.
    pub(crate) async fn take_events(&self) -> u32 {
        self.purge(&self.names.master_event()).await
    }

    /// Counts and forgets what is in a queue.
    pub(crate) async fn purge(&self, queue: &str) -> u32 {
        self.channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await.expect("it is ours")
    }

    /// The queues of another side: its tasks, and what is told of them; empty, and the same in each round. RabbitMQ 3.10 may
    /// break down where many queues are deleted in a short time.
    pub(crate) async fn queues_of(&self, side: &'static str) -> [String; 2] {
        let tasks = format!("{}.{side}", self.names.prefix());
        let queues = [tasks.clone(), format!("{tasks}.told")];
        for queue in &queues {
            quorum_queue(&self.channel, queue).await;
            self.purge(queue).await;
        }
        self.sides.lock().unwrap_or_else(PoisonError::into_inner).insert(side);
        queues
    }

    /// Removes what this rig made.
    pub(crate) async fn remove(self, nodes: impl Iterator<Item = String>) {
        let names = &self.names;
        let retries = haul::broker::topology::RETRY_DELAYS.map(|delay| names.retry(delay));
        let own = nodes.filter_map(|node| NodeName::new(node).ok());
        let own = own.flat_map(|node| [names.node(&node), names.control_node(&node)]);
        let sides = self.sides.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter();
        let sides =
            sides.flat_map(|side| [format!("{}.{side}", names.prefix()), format!("{}.{side}.told", names.prefix())]);
        for queue in [names.master_event(), names.dead()].into_iter().chain(retries).chain(own).chain(sides) {
            let _ = self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await;
        }
        self.master.close().await;
    }
}

/// The broker's address.
pub(crate) fn url() -> String {
    std::env::var("HAUL_BENCH_AMQP_URL").expect("HAUL_BENCH_AMQP_URL: run this by scripts/bench-messages")
}

/// A task that a master might send: its identity and its body.
pub(crate) fn task(project: u64) -> (String, Vec<u8>) {
    let id = TaskId::random().to_string();
    let body = json!({"v": 1, "task_id": id, "kind": "pull", "project_id": project});
    (id, body.to_string().into_bytes())
}

/// A connection with a channel that confirms.
pub(crate) async fn connect(url: &str) -> (Connection, Channel) {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.expect("the broker is there");
    let channel = connection.create_channel().await.expect("a channel can be opened");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("channels confirm");
    (connection, channel)
}

/// A queue as a node's, without its extras.
pub(crate) async fn quorum_queue(channel: &Channel, name: &str) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.into(), options, arguments).await.expect("queues can be declared");
}

/// Publishes one persistent message; its confirm is still to come.
pub(crate) async fn publish(
    channel: &Channel,
    exchange: &str,
    routing_key: &str,
    body: &[u8],
) -> impl Future<Output = lapin::Result<lapin::Confirmation>> + use<> {
    let properties = BasicProperties::default().with_delivery_mode(2).with_content_type("application/json".into());
    // As Haul publishes its events: what no queue takes comes back.
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let sent = channel.basic_publish(exchange.into(), routing_key.into(), options, body, properties).await;
    sent.expect("the channel is open")
}

/// Publishes messages, many at a time, until all are confirmed.
pub(crate) async fn publish_all(
    channel: &Channel,
    exchange: &str,
    routing_key: &str,
    bodies: impl Iterator<Item = Vec<u8>>,
) {
    let mut flying = FuturesUnordered::new();
    for body in bodies {
        flying.push(publish(channel, exchange, routing_key, &body).await);
        if flying.len() >= FILL_WINDOW {
            flying.next().await.expect("something flies").expect("the broker confirms");
        }
    }
    while let Some(confirmed) = flying.next().await {
        confirmed.expect("the broker confirms");
    }
}

/// Ends the broker as a power cut would, but with what it knows of its queues on disk.
pub(crate) fn kill_broker() {
    broker("kill", &["--synced"]);
}

/// `scripts/rabbitmq` on the broker of this run.
pub(crate) fn broker(verb: &str, arguments: &[&str]) {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scripts/rabbitmq");
    let output = Command::new(script).arg(verb).arg(broker_directory()).args(arguments).output();
    let output = output.expect("the script can be run");
    assert!(output.status.success(), "scripts/rabbitmq {verb}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Where the broker of this run lives.
pub(crate) fn broker_directory() -> PathBuf {
    let directory = std::env::var_os("HAUL_BENCH_RABBITMQ");
    PathBuf::from(directory.expect("HAUL_BENCH_RABBITMQ: run this by scripts/bench-messages"))
}

/// The broker's process, where it is one of this machine.
pub(crate) fn broker_pid() -> Option<u32> {
    let text = std::fs::read_to_string(broker_directory().join("beam.pid")).ok()?;
    text.trim().trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok()
}

/// Waits until a queue has nothing ready.
pub(crate) async fn until_empty(rig: &Rig, queue: &str, patience: Duration) {
    let end = Instant::now() + patience;
    while rig.ready(queue).await > 0 {
        assert!(Instant::now() < end, "{queue} is not emptied");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
