//! The master: publishes until it is confirmed, follows the events, and publishes again what a fault destroyed.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use haul::{
    broker::{Broker, Consume, Names, Outgoing, Topology, rabbitmq::RabbitMq},
    protocol::{
        Event, Kind, NodeName,
        wire::{CONTENT_TYPE, Message, header},
    },
};

use super::{
    history::{Accepted, History, Record, Told, Why, now},
    workload::Planned,
};
use crate::support::rabbit::Rabbit;

/// Before a publish that was not confirmed is tried again.
const BEFORE_TRY: Duration = Duration::from_millis(200);
/// Before what was destroyed is published once more, where it has not ended: its copy may have been destroyed too.
const BEFORE_AGAIN: Duration = Duration::from_secs(20);
/// Events in hand.
const PREFETCH: u16 = 500;

/// A task and a round.
type Key = (String, u32);

/// A task that must end.
struct Expected {
    node: String,
    project: i64,
    kind: Kind,
    generation: Option<u64>,
    message: Message,
    /// When its last publish began.
    began: Instant,
    /// When the broker had it first.
    accepted: bool,
    ended: bool,
    /// A fault may have destroyed what was published of it.
    destroyed: bool,
}

/// The master.
pub(crate) struct Master {
    /// Its way to the broker.
    pub(crate) broker: Arc<RabbitMq>,
    /// Names on the broker.
    pub(crate) names: Names,
    history: Arc<History>,
    expected: Mutex<HashMap<Key, Expected>>,
    /// Ends that were told before it was known that they are expected: a replay may be quicker than the word of it.
    /// Only looked at under the lock of what is expected.
    early: Mutex<HashSet<Key>>,
    /// Tasks that the broker has and that have not ended.
    open: AtomicUsize,
    /// Changes with every first confirm of a task and with every end.
    moved: AtomicU64,
}

impl Master {
    /// A master with its queue of events, which it follows from now on.
    pub(crate) async fn start(rabbit: &Rabbit, names: Names, history: Arc<History>) -> Result<Arc<Self>, String> {
        let broker = RabbitMq::connect(&rabbit.settings(), "check master").await.map_err(|error| error.to_string())?;
        let master = Arc::new(Self {
            broker: Arc::new(broker),
            names,
            history,
            expected: Mutex::default(),
            early: Mutex::default(),
            open: AtomicUsize::new(0),
            moved: AtomicU64::new(0),
        });
        master.declare().await?;
        let consume = Consume {
            queue: master.names.master_event(),
            tag: "check-master".to_owned(),
            prefetch: PREFETCH,
            declare: Topology::default(),
        };
        let mut consumer = master.broker.consume(consume).await.map_err(|error| error.to_string())?;
        let following = master.clone();
        tokio::spawn(async move {
            while let Some(delivery) = consumer.next().await {
                if let Ok(event) = serde_json::from_slice::<Event>(&delivery.message.body) {
                    following.heard(event);
                }
                // A delivery whose channel is gone comes again, with the same event's id.
                let _ = delivery.ack().await;
            }
        });
        Ok(master)
    }

    /// Makes what the fleet shares, where it is missing.
    pub(crate) async fn declare(&self) -> Result<(), String> {
        let shared = self.names.shared_topology(&self.names.master_event());
        self.broker.declare(&shared).await.map_err(|error| error.to_string())
    }

    fn heard(&self, event: Event) {
        let told = Told {
            at: event.at.as_microsecond(),
            event: event.event_id,
            task: event.task_id.to_string(),
            round: event.round,
            attempt: event.attempt,
            node: event.node.to_string(),
            boot: event.boot,
            project: event.project_id,
            project_seq: event.project_seq,
            status: event.status,
            project_status: event.project_status,
            class: event.error.map(|error| error.class),
            head: event.result.and_then(|result| result.head),
        };
        if told.status.is_terminal() {
            let key = (told.task.clone(), told.round);
            let mut expected = self.expected.lock().unwrap();
            if let Some(task) = expected.get_mut(&key) {
                if !std::mem::replace(&mut task.ended, true) {
                    self.moved.fetch_add(1, Ordering::Relaxed);
                    self.open.fetch_sub(usize::from(task.accepted), Ordering::Relaxed);
                }
            } else {
                self.early.lock().unwrap().insert(key);
            }
        }
        self.history.add(&Record::Event(told));
    }

    /// Publishes a planned task until the broker has it.
    pub(crate) async fn publish(&self, task: &Planned, node: &str, why: Why) {
        let key = (task.id.clone(), 0);
        let message = Message {
            body: task.body.to_string().into(),
            content_type: Some(CONTENT_TYPE.to_owned()),
            message_id: Some(task.id.clone()),
            type_: Some(format!("task.{}", task.kind)),
            priority: Some(task.priority),
            ..Message::default()
        };
        self.expected.lock().unwrap().entry(key.clone()).or_insert_with(|| Expected {
            node: node.to_owned(),
            project: task.project,
            kind: task.kind,
            generation: task.generation,
            message,
            began: Instant::now(),
            accepted: false,
            ended: false,
            destroyed: false,
        });
        self.send(&key, why).await;
    }

    /// A dead letter was sent again: its task is expected to end in this round.
    pub(crate) fn replayed(&self, node: &NodeName, round: u32, letter: &Message) {
        let Some(task) = letter.message_id.clone() else { return };
        let mut expected = self.expected.lock().unwrap();
        let Some(first) = expected.get(&(task.clone(), 0)) else { return };
        let mut message = letter.copy();
        message.set(header::NODE, node.as_str());
        let (project, kind, generation) = (first.project, first.kind, first.generation);
        let key = (task, round);
        let ended = self.early.lock().unwrap().remove(&key);
        expected.entry(key).or_insert_with(|| {
            self.open.fetch_add(usize::from(!ended), Ordering::Relaxed);
            Expected {
                node: node.to_string(),
                project,
                kind,
                generation,
                message,
                began: Instant::now(),
                accepted: true,
                ended,
                destroyed: false,
            }
        });
    }

    async fn send(&self, key: &Key, why: Why) {
        let mut tries = 0;
        let outgoing = {
            let mut expected = self.expected.lock().unwrap();
            let Some(task) = expected.get_mut(key) else { return };
            task.began = Instant::now();
            Outgoing {
                exchange: self.names.task(),
                routing_key: task.node.clone(),
                message: task.message.clone(),
                mandatory: true,
            }
        };
        loop {
            tries += 1;
            match self.broker.publish(outgoing.clone()).await {
                Ok(()) => break,
                Err(error) => {
                    tracing::debug!(task.id = key.0, error = %error, "not taken");
                    tokio::time::sleep(BEFORE_TRY).await;
                }
            }
        }
        let mut expected = self.expected.lock().unwrap();
        let Some(task) = expected.get_mut(key) else { return };
        if !std::mem::replace(&mut task.accepted, true) {
            self.moved.fetch_add(1, Ordering::Relaxed);
            self.open.fetch_add(usize::from(!task.ended), Ordering::Relaxed);
        }
        let accepted = Accepted {
            at: now(),
            task: key.0.clone(),
            round: key.1,
            node: task.node.clone(),
            project: task.project,
            kind: task.kind,
            generation: task.generation,
            why,
            tries,
        };
        drop(expected);
        self.history.add(&Record::Accepted(accepted));
    }

    /// A fault destroyed what a node's queue or journal held: everything of it that is open is published again.
    pub(crate) fn destroyed(&self, node: &str) {
        for task in self.expected.lock().unwrap().values_mut().filter(|task| task.node == node && !task.ended) {
            task.destroyed = true;
            // Long ago, so that it is due.
            task.began = task.began.checked_sub(BEFORE_AGAIN).unwrap_or(task.began);
        }
    }

    /// Publishes again what was destroyed and has not ended; never returns.
    pub(crate) async fn reconcile(&self) {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let due: Vec<Key> = {
                let expected = self.expected.lock().unwrap();
                let lost = |task: &&Expected| {
                    task.destroyed && task.accepted && !task.ended && task.began.elapsed() >= BEFORE_AGAIN
                };
                let keys = expected.iter().filter(|(_, task)| lost(task)).map(|(key, _)| key.clone());
                keys.collect()
            };
            for key in due {
                self.send(&key, Why::Destroyed).await;
            }
        }
    }

    /// Tasks that the broker has and that have not ended.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// A number that changes whenever something moves.
    pub(crate) fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }
}
