//! Dead letters on a real broker: nothing is lost by looking, and an interrupt gives everything back.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
};

use haul::{
    broker::{Broker, Consume, Names, Outgoing, Topology, management::Management},
    dead::{DeadLetters, Replay, Selection},
    doctor::wanted_policies,
    protocol::{
        NodeName,
        wire::{Message, header},
    },
};
use jiff::Timestamp;
use secrecy::SecretString;
use support::{eventually, rabbit::Rabbit, soon, unique};
use tokio_util::sync::CancellationToken;

/// A fleet of one node under a prefix of its own, with the policies of the broker's version.
struct Fleet {
    rabbit: &'static Rabbit,
    broker: Arc<dyn Broker>,
    names: Names,
}

impl Fleet {
    async fn new(test: &str) -> Self {
        let rabbit = Rabbit::shared();
        let names = Names::new(unique(test));
        let broker: Arc<dyn Broker> = Arc::new(rabbit.client().await);
        let topology = names.shared_topology("").and(names.node_topology(&NodeName::new("a").unwrap()));
        soon("the topology", broker.declare(&topology)).await.unwrap();
        Self { rabbit, broker, names }
    }

    /// Sets the policies that `haul topology apply` sets.
    async fn with_policies(self) -> Self {
        let settings = haul::broker::settings::BrokerSettings {
            management_url: Some(SecretString::from(self.rabbit.management_url.clone())),
            ..self.rabbit.settings()
        };
        let api = Management::new(&settings).unwrap();
        let version = api.version().await.unwrap().unwrap();
        for policy in wanted_policies(&self.names, "", std::time::Duration::from_mins(25), version) {
            api.set_policy(&policy).await.unwrap();
        }
        self
    }

    async fn bury(&self, task: &str, node: &str) {
        let mut message = Message { body: "{}".into(), message_id: Some(task.to_owned()), ..Message::default() };
        message.set(header::NODE, node);
        message.set(header::ERROR_CLASS, "network");
        message.set(header::ROUND, 1);
        let (exchange, routing_key) = (self.names.dlx(), node.to_owned());
        self.broker.publish(Outgoing { exchange, routing_key, message, mandatory: true }).await.unwrap();
    }

    async fn bury_some(&self, count: usize) -> Vec<String> {
        let tasks: Vec<_> = (0..count).map(|number| format!("t-{number}")).collect();
        for task in &tasks {
            self.bury(task, "a").await;
        }
        tasks
    }

    fn letters(&self) -> DeadLetters {
        DeadLetters::new(Arc::clone(&self.broker), self.names.clone())
    }

    async fn listed(&self, delivery_limit: Option<i64>) -> Vec<String> {
        let selection = Selection { delivery_limit, ..Selection::default() };
        let (letters, stop) = (self.letters(), CancellationToken::new());
        let found = soon("the list", letters.list(&selection, &stop)).await.unwrap();
        found.into_iter().filter_map(|found| found.letter.task_id).collect()
    }

    /// Waits until the broker counts this many letters: a return is not confirmed.
    async fn settles_at(&self, count: u32) {
        let queue = self.names.dead();
        eventually("all letters are back", async || {
            self.broker.depth(&queue).await.unwrap().is_some_and(|depth| depth.messages == count)
        })
        .await;
    }
}

#[tokio::test]
async fn listing_a_hundred_times_loses_nothing_and_keeps_the_order() {
    let fleet = Fleet::new("hundred").await.with_policies().await;
    let tasks = fleet.bury_some(5).await;
    for _ in 0..100 {
        fleet.settles_at(5).await;
        assert_eq!(fleet.listed(None).await, tasks);
    }
}

#[tokio::test]
async fn even_where_a_delivery_limit_is_in_force_listing_loses_nothing() {
    let fleet = Fleet::new("limited").await;
    let pattern = format!("^{}$", fleet.names.dead().replace('.', "\\."));
    let policy = format!("{}-limit", fleet.names.prefix());
    fleet.rabbit.ctl(&["set_policy", &policy, &pattern, r#"{"delivery-limit":5}"#]);
    let tasks = fleet.bury_some(3).await;
    for _ in 0..30 {
        fleet.settles_at(3).await;
        let mut listed = fleet.listed(Some(5)).await;
        listed.sort();
        assert_eq!(listed, tasks);
    }
    fleet.rabbit.ctl(&["clear_policy", &policy]);
}

#[tokio::test]
async fn a_replay_reaches_its_node_and_what_has_none_stays() {
    let fleet = Fleet::new("replay").await.with_policies().await;
    fleet.bury("t-1", "vanished").await;
    fleet.bury("t-2", "a").await;
    let stop = CancellationToken::new();
    let letters = fleet.letters();
    let (all, plain) = (Selection::default(), Replay::default());
    let mut ignore = |_: &_, _: &_| {};
    let replay = letters.replay(&all, &plain, Timestamp::now, &stop, &mut ignore);
    let summary = soon("the replay", replay).await.unwrap();
    assert_eq!((summary.done, summary.left), (1, 1));
    fleet.settles_at(1).await;
    assert_eq!(fleet.listed(None).await, ["t-1"]);
    let queue = fleet.names.node(&NodeName::new("a").unwrap());
    let consume = Consume { queue, tag: "test".to_owned(), prefetch: 1, declare: Topology::default() };
    let mut consumer = fleet.broker.consume(consume).await.unwrap();
    let replayed = soon("the replayed task", consumer.next()).await.unwrap();
    assert_eq!(replayed.message.message_id.as_deref(), Some("t-2"));
    assert_eq!(replayed.message.headers.get(header::ROUND), Some(&1.into()));
    assert!(!replayed.message.headers.contains_key(header::ERROR_CLASS));
    replayed.ack().await.unwrap();
}

#[tokio::test]
async fn an_interrupted_replay_gives_back_the_rest_in_its_order() {
    let fleet = Fleet::new("interrupt").await.with_policies().await;
    let tasks = fleet.bury_some(5).await;
    // Letters that were returned once are returned behind each other: a part of them alone would change places.
    assert_eq!(fleet.listed(None).await, tasks);
    fleet.settles_at(5).await;
    let config = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("dead-{}.toml", std::process::id()));
    let (url, management, prefix) = (&fleet.rabbit.url, &fleet.rabbit.management_url, fleet.names.prefix());
    std::fs::write(
        &config,
        format!("prefix = {prefix:?}\n[broker]\nurls = [{url:?}]\nmanagement_url = {management:?}\n"),
    )
    .unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_haul"))
        .arg("--config")
        .arg(&config)
        .args(["dead", "replay", "--all", "--rate", "6/m"])
        .env_clear()
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert!(first.starts_with("t-0 ") && first.contains("replayed"), "{first}");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    assert_eq!(status.code(), Some(130));
    fleet.settles_at(4).await;
    assert_eq!(fleet.listed(None).await, tasks[1..]);
    let _ = std::fs::remove_file(&config);
}
