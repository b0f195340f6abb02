//! What every broker must do: one suite, run on RabbitMQ and on the one in memory.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

mod support;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use haul::{
    broker::{
        Broker, BrokerError, Consume, Consumer, Delivery, Depth, Health, Names, Outgoing, PublishError, StaleDelivery,
        Stop, Topology,
        memory::Memory,
        topology::{Binding, Exchange, ExchangeKind, Lifetime, Queue},
    },
    protocol::{
        NodeName,
        wire::{HeaderValue, Message, header},
    },
};
use support::{eventually, rabbit::Rabbit, soon, unique};

/// A broker, another client of it, and names of the test's own.
struct Fixture {
    broker: Arc<dyn Broker>,
    other: Arc<dyn Broker>,
    prefix: String,
}

impl Fixture {
    fn memory(test: &str) -> Self {
        let memory = Memory::new();
        Self { broker: Arc::new(memory.clone()), other: Arc::new(memory), prefix: unique(test) }
    }

    async fn rabbitmq(test: &str) -> Self {
        let rabbit = tokio::task::spawn_blocking(Rabbit::shared).await.unwrap();
        let (broker, other) = (rabbit.client().await, rabbit.client().await);
        Self { broker: Arc::new(broker), other: Arc::new(other), prefix: unique(test) }
    }

    fn name(&self, last: &str) -> String {
        format!("{}.{last}", self.prefix)
    }

    /// A direct exchange `in` bound to a quorum queue `queue` by `key`, with these arguments on top.
    fn topology(&self, arguments: &[(&str, HeaderValue)]) -> Topology {
        Topology {
            exchanges: vec![exchange(self.name("in"), ExchangeKind::Direct)],
            queues: vec![queue(self.name("queue"), arguments)],
            bindings: vec![bind(self.name("in"), self.name("queue"), "key")],
        }
    }

    async fn declared(&self) -> Topology {
        let topology = self.topology(&[]);
        self.broker.declare(&topology).await.unwrap();
        topology
    }

    async fn publish(&self, id: &str) {
        self.broker.publish(self.outgoing(id)).await.unwrap();
    }

    fn outgoing(&self, id: &str) -> Outgoing {
        outgoing(&self.name("in"), "key", id)
    }

    async fn consumer(&self, prefetch: u16) -> Consumer {
        consumer(&*self.broker, &self.name("queue"), prefetch).await
    }

    async fn ready(&self, queue: &str, messages: u32) {
        let queue = self.name(queue);
        eventually(&format!("{queue} has {messages} messages"), async || {
            self.other.depth(&queue).await.unwrap().is_some_and(|depth| depth.messages == messages)
        })
        .await;
    }
}

fn exchange(name: String, kind: ExchangeKind) -> Exchange {
    Exchange { name, kind, alternate: None }
}

fn queue(name: String, arguments: &[(&str, HeaderValue)]) -> Queue {
    let mut all = BTreeMap::from([("x-queue-type".to_owned(), "quorum".into())]);
    all.extend(arguments.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    Queue { name, arguments: all, lifetime: Lifetime::Durable }
}

fn bind(exchange: String, queue: String, routing_key: &str) -> Binding {
    Binding { exchange, queue, routing_key: routing_key.to_owned() }
}

fn outgoing(exchange: &str, routing_key: &str, id: &str) -> Outgoing {
    let message = Message::json(&id, id, "task.test".to_owned(), jiff::Timestamp::UNIX_EPOCH);
    Outgoing { exchange: exchange.to_owned(), routing_key: routing_key.to_owned(), message, mandatory: true }
}

async fn consumer(broker: &dyn Broker, queue: &str, prefetch: u16) -> Consumer {
    let consume = Consume { queue: queue.to_owned(), tag: "test".to_owned(), prefetch, declare: Topology::default() };
    let consumer = broker.consume(consume).await.unwrap();
    let mut health = consumer.health();
    soon("a session", health.wait_for(|health| *health == Health::Up)).await.unwrap();
    consumer
}

async fn next(consumer: &mut Consumer) -> Delivery {
    soon("a delivery", consumer.next()).await.expect("the consumer runs")
}

fn id(delivery: &Delivery) -> String {
    delivery.message.message_id.clone().unwrap_or_default()
}

macro_rules! conformance {
    ($($name:ident,)*) => {
        mod memory {
            $(#[tokio::test] async fn $name() { super::$name(super::Fixture::memory(stringify!($name))).await; })*
        }
        mod rabbitmq {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(super::Fixture::rabbitmq(stringify!($name)).await).await; })*
        }
    };
}

conformance! {
    a_published_message_arrives_as_it_was_sent,
    an_unroutable_mandatory_message_is_an_error,
    a_message_that_is_not_mandatory_may_vanish,
    a_missing_exchange_harms_no_other_publish,
    every_concurrent_publish_is_told_the_truth,
    a_requeued_delivery_comes_again_marked,
    what_a_dropped_consumer_left_unsettled_is_delivered_again,
    a_stopped_consumer_can_settle_what_it_took_and_gives_back_the_rest,
    no_more_than_the_prefetch_window_is_out,
    a_single_active_consumer_hands_over,
    a_look_counts_who_is_served_and_not_who_stands_in_line,
    a_consumer_knows_how_much_of_its_window_is_used,
    a_consumer_that_is_made_anew_loses_nothing,
    what_a_consumer_holds_as_it_ends_goes_back_in_its_order,
    what_a_consumer_lets_go_comes_to_the_next_in_line_in_its_order,
    a_retry_queue_returns_a_message_with_its_routing_key,
    an_alternate_exchange_catches_what_no_queue_takes,
    a_rejected_delivery_is_dead_lettered_to_a_fanout,
    topic_bindings_choose_by_words,
    the_contracts_topology_can_be_declared_twice,
    other_arguments_are_refused,
    missing_names_what_does_not_exist,
    browsing_a_hundred_times_keeps_order_and_loses_nothing,
    a_message_can_be_taken_while_browsing,
    a_browse_in_which_everything_was_taken_ends_in_order,
    a_browse_that_is_dropped_gives_back,
    a_queue_that_does_not_exist_is_refused,
}

async fn a_published_message_arrives_as_it_was_sent(fixture: Fixture) {
    fixture.declared().await;
    let mut outgoing = fixture.outgoing("one");
    outgoing.message.set(header::ROUND, 2);
    outgoing.message.set(header::NODE, "worker-001");
    fixture.broker.publish(outgoing.clone()).await.unwrap();
    let delivery = next(&mut fixture.consumer(10).await).await;
    assert_eq!(delivery.message, outgoing.message);
    assert_eq!((delivery.exchange.clone(), delivery.routing_key.as_str()), (fixture.name("in"), "key"));
    assert!(!delivery.redelivered);
    delivery.ack().await.unwrap();
    fixture.ready("queue", 0).await;
}

async fn an_unroutable_mandatory_message_is_an_error(fixture: Fixture) {
    fixture.declared().await;
    let lost = outgoing(&fixture.name("in"), "nowhere", "lost");
    let error = fixture.broker.publish(lost).await.unwrap_err();
    assert!(matches!(error, PublishError::Unroutable { .. }), "{error}");
    fixture.publish("found").await;
}

async fn a_message_that_is_not_mandatory_may_vanish(fixture: Fixture) {
    fixture.declared().await;
    let lost = Outgoing { mandatory: false, ..outgoing(&fixture.name("in"), "nowhere", "lost") };
    fixture.broker.publish(lost).await.unwrap();
}

async fn a_missing_exchange_harms_no_other_publish(fixture: Fixture) {
    fixture.declared().await;
    let good = (0..40).map(async |n| fixture.broker.publish(fixture.outgoing(&format!("good-{n}"))).await.is_ok());
    let absent = fixture.name("absent");
    let bad = (0..4).map(async |n| {
        let error = fixture.broker.publish(outgoing(&absent, "key", &format!("bad-{n}"))).await.unwrap_err();
        matches!(error, PublishError::Forbidden { .. })
    });
    let (good, bad) = tokio::join!(futures_util::future::join_all(good), futures_util::future::join_all(bad));
    assert!(good.into_iter().all(|ok| ok) && bad.into_iter().all(|forbidden| forbidden));
}

async fn every_concurrent_publish_is_told_the_truth(fixture: Fixture) {
    fixture.declared().await;
    let publishes = (0..600).map(async |n| {
        let routable = n % 3 != 0;
        let key = if routable { "key" } else { "nowhere" };
        let told = fixture.broker.publish(outgoing(&fixture.name("in"), key, &format!("m-{n}"))).await;
        match told {
            Ok(()) => routable,
            Err(PublishError::Unroutable { .. }) => !routable,
            Err(error) => panic!("{error}"),
        }
    });
    let truths = futures_util::future::join_all(publishes).await;
    assert_eq!(truths.into_iter().filter(|&truth| !truth).count(), 0);
    fixture.ready("queue", 400).await;
}

async fn a_requeued_delivery_comes_again_marked(fixture: Fixture) {
    fixture.declared().await;
    fixture.publish("one").await;
    let mut consumer = fixture.consumer(10).await;
    next(&mut consumer).await.requeue().await.unwrap();
    let again = next(&mut consumer).await;
    assert!(again.redelivered && id(&again) == "one");
    again.ack().await.unwrap();
}

async fn what_a_dropped_consumer_left_unsettled_is_delivered_again(fixture: Fixture) {
    fixture.declared().await;
    fixture.publish("one").await;
    fixture.publish("two").await;
    let mut first = fixture.consumer(10).await;
    let kept = next(&mut first).await;
    drop(first);
    kept.abandon();
    let mut second = fixture.consumer(10).await;
    let (one, two) = (next(&mut second).await, next(&mut second).await);
    let mut ids = [id(&one), id(&two)];
    ids.sort();
    assert_eq!(ids, ["one", "two"]);
    one.ack().await.unwrap();
    two.ack().await.unwrap();
}

async fn a_stopped_consumer_can_settle_what_it_took_and_gives_back_the_rest(fixture: Fixture) {
    fixture.declared().await;
    for n in 0..5 {
        fixture.publish(&format!("m-{n}")).await;
    }
    let mut consumer = fixture.consumer(10).await;
    let (first, second) = (next(&mut consumer).await, next(&mut consumer).await);
    consumer.stop();
    fixture.ready("queue", 3).await;
    assert!(soon("the end", consumer.next()).await.is_none());
    first.ack().await.unwrap();
    drop(consumer);
    second.requeue().await.unwrap();
    fixture.ready("queue", 4).await;
    let mut rest = fixture.consumer(10).await;
    let mut ids = Vec::new();
    for _ in 1..5 {
        let delivery = next(&mut rest).await;
        ids.push(id(&delivery));
        delivery.ack().await.unwrap();
    }
    // A quorum queue delivers what came back before the rest, in the order in which it came back.
    ids.sort();
    assert_eq!(ids, ["m-1", "m-2", "m-3", "m-4"]);
}

async fn no_more_than_the_prefetch_window_is_out(fixture: Fixture) {
    fixture.declared().await;
    for n in 0..5 {
        fixture.publish(&format!("m-{n}")).await;
    }
    let mut consumer = fixture.consumer(2).await;
    let (first, second) = (next(&mut consumer).await, next(&mut consumer).await);
    fixture.ready("queue", 3).await;
    assert!(tokio::time::timeout(Duration::from_millis(300), consumer.next()).await.is_err());
    first.ack().await.unwrap();
    let third = next(&mut consumer).await;
    assert_eq!(id(&third), "m-2");
    third.ack().await.unwrap();
    second.ack().await.unwrap();
}

async fn a_single_active_consumer_hands_over(fixture: Fixture) {
    let topology = fixture.topology(&[("x-single-active-consumer", HeaderValue::Bool(true))]);
    fixture.broker.declare(&topology).await.unwrap();
    let mut first = fixture.consumer(1).await;
    let mut second = consumer(&*fixture.other, &fixture.name("queue"), 1).await;
    for n in 0..3 {
        fixture.publish(&format!("m-{n}")).await;
    }
    let delivery = next(&mut first).await;
    assert!(tokio::time::timeout(Duration::from_millis(300), second.next()).await.is_err());
    delivery.ack().await.unwrap();
    drop(first);
    let taken = next(&mut second).await;
    taken.ack().await.unwrap();
    next(&mut second).await.ack().await.unwrap();
}

async fn a_look_counts_who_is_served_and_not_who_stands_in_line(fixture: Fixture) {
    let topology = fixture.topology(&[("x-single-active-consumer", HeaderValue::Bool(true))]);
    fixture.broker.declare(&topology).await.unwrap();
    let queue = fixture.name("queue");
    let look = async || fixture.broker.look(&queue, false).await.unwrap().unwrap().depth;
    assert_eq!(look().await, Depth { messages: 0, consumers: 0 });
    fixture.publish("one").await;
    fixture.ready("queue", 1).await;
    assert_eq!(look().await, Depth { messages: 1, consumers: 0 });
    let first = fixture.consumer(10).await;
    assert_eq!(first.presence().now().before, 0);
    let second = consumer(&*fixture.other, &queue, 1).await;
    assert!(second.presence().now().stands_in_line(), "{:?}", second.presence().now());
    assert_eq!(look().await, Depth { messages: 0, consumers: 1 });
    assert_eq!(fixture.broker.look(&fixture.name("no-queue"), false).await.unwrap(), None);
    assert_eq!(look().await.consumers, 1);
    drop((first, second));
    eventually("nobody consumes", async || look().await.consumers == 0).await;
}

async fn a_consumer_knows_how_much_of_its_window_is_used(fixture: Fixture) {
    fixture.declared().await;
    let mut consumer = fixture.consumer(10).await;
    let presence = consumer.presence();
    assert_eq!((presence.now().arrived, presence.now().unsettled), (0, 0));
    for id in ["one", "two", "three"] {
        fixture.publish(id).await;
    }
    let (one, two) = (next(&mut consumer).await, next(&mut consumer).await);
    eventually("all have come", async || presence.now().arrived == 3).await;
    assert_eq!(presence.now().unsettled, 3);
    one.ack().await.unwrap();
    two.ack().await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
    assert_eq!((presence.now().arrived, presence.now().unsettled), (3, 0));
}

async fn what_a_consumer_holds_as_it_ends_goes_back_in_its_order(fixture: Fixture) {
    fixture.declared().await;
    for n in 0..6 {
        fixture.publish(&format!("m-{n}")).await;
    }
    let mut first = fixture.consumer(10).await;
    let (running, waiting) = (next(&mut first).await, next(&mut first).await);
    eventually("all have come", async || first.presence().now().arrived == 6).await;
    first.end(Stop::KeepOrder);
    while let Some(delivery) = soon("the end", first.next()).await {
        delivery.abandon();
    }
    drop(first);
    waiting.abandon();
    running.ack().await.unwrap();
    let mut second = fixture.consumer(10).await;
    for n in 1..6 {
        let delivery = next(&mut second).await;
        assert_eq!(id(&delivery), format!("m-{n}"));
        delivery.ack().await.unwrap();
    }
}

async fn what_a_consumer_lets_go_comes_to_the_next_in_line_in_its_order(fixture: Fixture) {
    let topology = fixture.topology(&[("x-single-active-consumer", HeaderValue::Bool(true))]);
    fixture.broker.declare(&topology).await.unwrap();
    for n in 0..8 {
        fixture.publish(&format!("m-{n}")).await;
    }
    let mut first = fixture.consumer(4).await;
    let held = [next(&mut first).await, next(&mut first).await];
    let mut second = consumer(&*fixture.other, &fixture.name("queue"), 20).await;
    first.end(Stop::LetGo);
    for n in 0..8 {
        let delivery = next(&mut second).await;
        assert_eq!(id(&delivery), format!("m-{n}"));
        delivery.ack().await.unwrap();
    }
    for delivery in held {
        assert_eq!(delivery.requeue().await, Err(StaleDelivery));
    }
}

async fn a_consumer_that_is_made_anew_loses_nothing(fixture: Fixture) {
    fixture.declared().await;
    let mut consumer = fixture.consumer(10).await;
    let presence = consumer.presence();
    let first = presence.now().tag.unwrap();
    fixture.publish("one").await;
    let held = next(&mut consumer).await;
    presence.rebuild();
    let again = next(&mut consumer).await;
    assert!(again.redelivered && id(&again) == "one");
    assert_eq!(held.ack().await, Err(StaleDelivery));
    again.ack().await.unwrap();
    assert_ne!(presence.now().tag.unwrap(), first);
    fixture.publish("two").await;
    next(&mut consumer).await.ack().await.unwrap();
    // An idle one leaves nothing behind that the next would stand in line for.
    presence.rebuild();
    let second = presence.now();
    eventually("a third session", async || {
        let now = presence.now();
        now.tag.is_some() && now.tag != second.tag
    })
    .await;
    assert_eq!(presence.now().before, 0);
}

async fn a_retry_queue_returns_a_message_with_its_routing_key(fixture: Fixture) {
    let (retry, back) = (fixture.name("retry.1s"), fixture.name("return"));
    let node = fixture.name("node");
    let topology = Topology {
        exchanges: vec![exchange(retry.clone(), ExchangeKind::Fanout), exchange(back.clone(), ExchangeKind::Direct)],
        queues: vec![
            queue(
                retry.clone(),
                &[
                    ("x-message-ttl", HeaderValue::Int(500)),
                    ("x-dead-letter-exchange", back.clone().into()),
                    ("x-dead-letter-strategy", "at-least-once".into()),
                    ("x-overflow", "reject-publish".into()),
                ],
            ),
            queue(node.clone(), &[]),
        ],
        bindings: vec![bind(retry.clone(), retry.clone(), ""), bind(back.clone(), node.clone(), "worker-001")],
    };
    fixture.broker.declare(&topology).await.unwrap();
    let begun = tokio::time::Instant::now();
    fixture.broker.publish(outgoing(&retry, "worker-001", "again")).await.unwrap();
    let delivery = next(&mut consumer(&*fixture.broker, &node, 1).await).await;
    assert!(begun.elapsed() >= Duration::from_millis(500));
    assert_eq!((delivery.exchange.as_str(), delivery.routing_key.as_str()), (back.as_str(), "worker-001"));
    let Some(HeaderValue::List(deaths)) = delivery.message.headers.get(header::DEATH) else { panic!("no deaths") };
    let Some(HeaderValue::Table(death)) = deaths.first() else { panic!("no table") };
    assert_eq!((death.get("queue"), death.get("reason")), (Some(&retry.into()), Some(&"expired".into())));
    assert_eq!(death.get("routing-keys"), Some(&HeaderValue::List(vec!["worker-001".into()])));
    delivery.ack().await.unwrap();
}

async fn an_alternate_exchange_catches_what_no_queue_takes(fixture: Fixture) {
    let (main, alternate, caught) = (fixture.name("return"), fixture.name("dlx"), fixture.name("dead"));
    let topology = Topology {
        exchanges: vec![
            exchange(alternate.clone(), ExchangeKind::Fanout),
            Exchange { name: main.clone(), kind: ExchangeKind::Direct, alternate: Some(alternate.clone()) },
        ],
        queues: vec![queue(caught.clone(), &[])],
        bindings: vec![bind(alternate, caught.clone(), "")],
    };
    fixture.broker.declare(&topology).await.unwrap();
    fixture.broker.publish(outgoing(&main, "vanished", "caught")).await.unwrap();
    let delivery = next(&mut consumer(&*fixture.broker, &caught, 1).await).await;
    assert_eq!((id(&delivery).as_str(), delivery.routing_key.as_str()), ("caught", "vanished"));
    delivery.ack().await.unwrap();
}

async fn a_rejected_delivery_is_dead_lettered_to_a_fanout(fixture: Fixture) {
    let (dlx, dead) = (fixture.name("dlx"), fixture.name("dead"));
    let topology = fixture.topology(&[("x-dead-letter-exchange", dlx.clone().into())]).and(Topology {
        exchanges: vec![exchange(dlx.clone(), ExchangeKind::Fanout)],
        queues: vec![queue(dead.clone(), &[])],
        bindings: vec![bind(dlx, dead.clone(), "")],
    });
    fixture.broker.declare(&topology).await.unwrap();
    fixture.publish("bad").await;
    let delivery = next(&mut fixture.consumer(1).await).await;
    delivery.settle(haul::broker::Settlement::Reject).await.unwrap();
    let letter = next(&mut consumer(&*fixture.broker, &dead, 1).await).await;
    assert_eq!((id(&letter).as_str(), letter.routing_key.as_str()), ("bad", "key"));
    letter.ack().await.unwrap();
}

async fn topic_bindings_choose_by_words(fixture: Fixture) {
    let (events, done) = (fixture.name("event"), fixture.name("done"));
    let topology = Topology {
        exchanges: vec![exchange(events.clone(), ExchangeKind::Topic)],
        queues: vec![queue(done.clone(), &[])],
        bindings: vec![bind(events.clone(), done.clone(), "*.*.succeeded"), bind(events.clone(), done, "node-1.#")],
    };
    fixture.broker.declare(&topology).await.unwrap();
    for (key, taken) in
        [("node-2.clone.succeeded", true), ("node-2.clone.progress", false), ("node-1.pull.failed", true)]
    {
        let told = fixture.broker.publish(outgoing(&events, key, key)).await;
        assert_eq!(told.is_ok(), taken, "{key}: {told:?}");
    }
    fixture.ready("done", 2).await;
}

async fn the_contracts_topology_can_be_declared_twice(fixture: Fixture) {
    let names = Names::new(fixture.prefix.clone());
    let node = NodeName::new("worker-001").unwrap();
    let all =
        names.shared_topology(&names.master_event()).and(names.node_topology(&node)).and(names.control_topology(&node));
    assert!(!fixture.broker.missing(&all).await.unwrap().is_empty());
    for _ in 0..2 {
        fixture.broker.declare(&all).await.unwrap();
    }
    assert_eq!(fixture.broker.missing(&all).await.unwrap(), Vec::<String>::new());
    fixture.broker.publish(outgoing(&names.task(), "worker-001", "task")).await.unwrap();
    let unknown = fixture.broker.publish(outgoing(&names.task(), "worker-002", "task")).await.unwrap_err();
    assert!(matches!(unknown, PublishError::Unroutable { .. }), "{unknown}");
    let delivery = next(&mut consumer(&*fixture.broker, &names.node(&node), 1).await).await;
    delivery.ack().await.unwrap();
}

async fn other_arguments_are_refused(fixture: Fixture) {
    fixture.declared().await;
    let other = fixture.topology(&[("x-single-active-consumer", HeaderValue::Bool(true))]);
    let error = fixture.broker.declare(&other).await.unwrap_err();
    let BrokerError::Refused { what, reason } = &error else { panic!("{error}") };
    assert!(what.contains(&fixture.name("queue")) && reason.contains("PRECONDITION_FAILED"), "{error}");
    let consume = Consume { queue: fixture.name("queue"), tag: "test".to_owned(), prefetch: 1, declare: other };
    assert!(matches!(fixture.broker.consume(consume).await, Err(BrokerError::Refused { .. })));
    fixture.publish("still works").await;
}

async fn missing_names_what_does_not_exist(fixture: Fixture) {
    let there = fixture.declared().await;
    let absent = Topology {
        exchanges: vec![exchange(fixture.name("no-exchange"), ExchangeKind::Topic)],
        queues: vec![queue(fixture.name("no-queue"), &[])],
        bindings: Vec::new(),
    };
    let missing = fixture.broker.missing(&there.and(absent)).await.unwrap();
    assert_eq!(missing, [fixture.name("no-exchange"), fixture.name("no-queue")]);
    assert_eq!(fixture.broker.depth(&fixture.name("no-queue")).await.unwrap(), None);
}

async fn browsing_a_hundred_times_keeps_order_and_loses_nothing(fixture: Fixture) {
    fixture.declared().await;
    let expected: Vec<_> = (0..10).map(|n| format!("m-{n}")).collect();
    for id in &expected {
        fixture.publish(id).await;
    }
    for round in 0..100 {
        let mut browse = fixture.broker.browse(&fixture.name("queue")).await.unwrap();
        let mut ids = Vec::new();
        let mut read = Vec::new();
        // What was given back is there again a moment later.
        eventually("everything is there again", async || {
            while ids.len() < expected.len()
                && let Some(delivery) = browse.next().await.unwrap()
            {
                ids.push(id(&delivery));
                read.push(delivery);
            }
            ids.len() == expected.len()
        })
        .await;
        assert_eq!(ids, expected, "round {round}");
        assert!(round < 99 || browse.next().await.unwrap().is_none());
        browse.give_back().await.unwrap();
        read.into_iter().for_each(Delivery::abandon);
    }
    fixture.ready("queue", 10).await;
}

async fn a_message_can_be_taken_while_browsing(fixture: Fixture) {
    fixture.declared().await;
    for id in ["one", "two", "three"] {
        fixture.publish(id).await;
    }
    let mut browse = fixture.broker.browse(&fixture.name("queue")).await.unwrap();
    let mut read = Vec::new();
    while let Some(delivery) = browse.next().await.unwrap() {
        if id(&delivery) == "two" {
            delivery.ack().await.unwrap();
        } else {
            read.push(delivery);
        }
    }
    browse.give_back().await.unwrap();
    for delivery in read {
        assert_eq!(delivery.ack().await, Err(StaleDelivery));
    }
    fixture.ready("queue", 2).await;
    let mut consumer = fixture.consumer(10).await;
    for expected in ["one", "three"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(id(&delivery), expected);
        delivery.ack().await.unwrap();
    }
}

async fn a_browse_in_which_everything_was_taken_ends_in_order(fixture: Fixture) {
    fixture.declared().await;
    // What the broker makes of the end is told in time only now and then.
    for _ in 0..20 {
        fixture.publish("one").await;
        fixture.ready("queue", 1).await;
        let mut browse = fixture.broker.browse(&fixture.name("queue")).await.unwrap();
        browse.next().await.unwrap().unwrap().ack().await.unwrap();
        browse.give_back().await.unwrap();
    }
    fixture.ready("queue", 0).await;
}

async fn a_browse_that_is_dropped_gives_back(fixture: Fixture) {
    fixture.declared().await;
    fixture.publish("one").await;
    let mut browse = fixture.broker.browse(&fixture.name("queue")).await.unwrap();
    let read = browse.next().await.unwrap().unwrap();
    drop(browse);
    read.abandon();
    fixture.ready("queue", 1).await;
}

async fn a_queue_that_does_not_exist_is_refused(fixture: Fixture) {
    let absent = fixture.name("absent");
    let consume = Consume { queue: absent.clone(), tag: "test".to_owned(), prefetch: 1, declare: Topology::default() };
    assert!(matches!(fixture.broker.consume(consume).await, Err(BrokerError::Refused { .. })));
    assert!(matches!(fixture.broker.browse(&absent).await, Err(BrokerError::Refused { .. })));
}
