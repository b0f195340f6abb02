//! Deliveries held for longer than the broker's consumer timeout: before 4.3 it closes the channel, 4.3 takes the consumer
//! away and says so in a notice that wants no answer.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use haul::{
    broker::{Broker as _, Consume, Consumer, Delivery, Names, Outgoing, StaleDelivery, rabbitmq::RabbitMq},
    protocol::{NodeName, wire::Message},
};

use crate::{
    CONSUMING_AGAIN, blocking,
    scene::Scene,
    support::{self, eventually, rabbit::Rabbit, soon, unique},
};

const TIMEOUT: Duration = Duration::from_secs(6);
/// Until a delivery that was held for too long is back, on a machine that has much to do.
const BACK: Duration = Duration::from_mins(1);
/// Deliveries at a time.
const PREFETCH: u16 = 5;

/// A node with a short timeout, for these tests together: they break nothing but their own.
async fn impatient() -> &'static Rabbit {
    static NODE: OnceLock<Option<Rabbit>> = OnceLock::new();
    support::logs();
    let launch = || {
        let rabbit = Rabbit::start(&[&format!("consumer_timeout = {}", TIMEOUT.as_millis())]);
        // How often the broker looks at its channels; once a minute by default.
        rabbit.ctl(&["eval", "application:set_env(rabbit, channel_tick_interval, 1000)."]);
        rabbit
    };
    let start = move || NODE.get_or_init(|| std::panic::catch_unwind(launch).ok()).as_ref();
    let node = blocking(start).await;
    node.expect("the node started; the first test that wanted it says why not")
}

/// The queue of a node, as the contract has it, and those who consume it.
struct Bench {
    names: Names,
    node: NodeName,
    broker: RabbitMq,
}

impl Bench {
    async fn new(test: &str) -> Self {
        let (names, node) = (Names::new(unique(test)), NodeName::new("a").unwrap());
        let broker = impatient().await.client().await;
        broker.declare(&names.shared_topology("").and(names.node_topology(&node))).await.unwrap();
        Self { names, node, broker }
    }

    async fn consumer(&self, broker: &RabbitMq, tag: &str) -> Consumer {
        let (queue, declare) = (self.names.node(&self.node), self.names.node_topology(&self.node));
        broker.consume(Consume { queue, tag: tag.to_owned(), prefetch: PREFETCH, declare }).await.unwrap()
    }

    async fn publish(&self, id: &str) {
        let message = Message { body: "{}".into(), message_id: Some(id.to_owned()), ..Message::default() };
        let (exchange, routing_key) = (self.names.task(), self.node.to_string());
        self.broker.publish(Outgoing { exchange, routing_key, message, mandatory: true }).await.unwrap();
    }

    /// Waits until the broker holds nothing for anybody, and counts one active consumer.
    async fn settles(&self) {
        let queue = self.names.node(&self.node);
        eventually("the broker counts one active consumer", async || {
            self.broker.depth(&queue).await.unwrap().is_some_and(|depth| depth.consumers == 1)
        })
        .await;
        let rabbit = impatient().await;
        eventually("nothing is left with anybody", async || {
            let listed = blocking(|| rabbit.ctl(&["list_queues", "--no-table-headers", "name", "messages"])).await;
            listed.lines().any(|line| line.split_whitespace().collect::<Vec<_>>() == [queue.as_str(), "0"])
        })
        .await;
    }
}

fn id(delivery: &Delivery) -> &str {
    delivery.message.message_id.as_deref().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_runs_longer_than_the_consumer_timeout() {
    let scene = Scene::begin(impatient().await, None).await;
    let lost = async || scene.agent.log().contains("the consumer was lost");
    scene.agent.until_async("the consumer to be lost", lost).await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

/// The ghost: a consumer that 4.3 has cancelled still takes what a late ack sets free, up to its window, until its channel
/// is closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_timed_out_leaves_no_ghost_that_swallows_deliveries() {
    let bench = Bench::new("ghost").await;
    let mut consumer = bench.consumer(&bench.broker, "only").await;
    let mut held = Vec::new();
    for n in 0..PREFETCH {
        bench.publish(&format!("held-{n}")).await;
        held.push(soon("a delivery", consumer.next()).await.unwrap());
    }
    let mut again = Vec::new();
    for _ in 0..PREFETCH {
        again.push(tokio::time::timeout(BACK, consumer.next()).await.expect("it comes again").unwrap());
    }
    for late in held {
        assert_eq!(late.ack().await, Err(StaleDelivery));
    }
    for delivery in again {
        delivery.ack().await.unwrap();
    }
    for n in 0..4 * PREFETCH {
        bench.publish(&format!("more-{n}")).await;
    }
    for n in 0..4 * PREFETCH {
        let delivery = soon("what was published afterwards", consumer.next()).await.unwrap();
        assert_eq!(id(&delivery), format!("more-{n}"));
        delivery.ack().await.unwrap();
    }
    bench.settles().await;
}

/// A quorum queue of 4.3 with a single active consumer delivers nothing to anybody once all of its consumers have timed
/// out, until the channels of those are closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_active_consumers_that_all_timed_out_block_nobody() {
    let bench = Bench::new("active").await;
    let standby = impatient().await.client().await;
    let mut first = bench.consumer(&bench.broker, "first").await;
    bench.publish("slow").await;
    let held = soon("a delivery", first.next()).await.unwrap();
    let mut second = bench.consumer(&standby, "second").await;
    let mut either = async || {
        let next = async {
            tokio::select! {
                delivery = first.next() => delivery,
                delivery = second.next() => delivery,
            }
        };
        tokio::time::timeout(BACK, next).await.expect("one of them is served").unwrap()
    };
    let held_too = either().await;
    let again = either().await;
    for late in [held, held_too] {
        assert_eq!((id(&late), id(&again)), ("slow", "slow"));
        assert_eq!(late.ack().await, Err(StaleDelivery));
    }
    again.ack().await.unwrap();
    for n in 0..3 * PREFETCH {
        bench.publish(&format!("more-{n}")).await;
        let delivery = either().await;
        assert_eq!(id(&delivery), format!("more-{n}"));
        delivery.ack().await.unwrap();
    }
    bench.settles().await;
}
