//! Brokers that stop, die and come back.

use std::{
    net::TcpStream,
    time::{Duration, Instant},
};

use haul::{
    broker::{Broker as _, Consume, Consumer, Delivery, Names, Outgoing, StaleDelivery},
    protocol::{NodeName, wire::Message},
};

use crate::{
    CONSUMING_AGAIN, alone, blocking,
    scene::Scene,
    support::{rabbit::Rabbit, soon, unique},
};

/// From the moment a restarted broker's listener accepts to the first delivery.
const FIRST_DELIVERY: Duration = Duration::from_secs(3);
/// The same after a kill: however often it is asked, RabbitMQ 3.10 has no leader for a quorum queue for up to 5 s.
const FIRST_AFTER_KILL: Duration = Duration::from_secs(10);
/// How long a restart may take on a machine that has much to do.
const RESTART: Duration = Duration::from_mins(2);
/// How often the broker is restarted, unless `HAUL_RESTARTS` says otherwise.
const RESTARTS: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_was_stopped_and_started() {
    let (_alone, rabbit) = alone().await;
    let scene = Scene::begin(rabbit, None).await;
    blocking(|| rabbit.restart()).await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_was_killed_and_started() {
    let (_alone, rabbit) = alone().await;
    let scene = Scene::begin(rabbit, None).await;
    blocking(|| {
        rabbit.kill();
        rabbit.restart();
    })
    .await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_was_restarted_in_its_own_process() {
    let (_alone, rabbit) = alone().await;
    let scene = Scene::begin(rabbit, None).await;
    blocking(|| {
        rabbit.ctl(&["stop_app"]);
        rabbit.ctl(&["start_app"]);
    })
    .await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_the_broker_closed() {
    let (_alone, rabbit) = alone().await;
    let scene = Scene::begin(rabbit, None).await;
    blocking(|| rabbit.ctl(&["close_all_connections", "a test"])).await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

/// The suite leaves no broker behind: a test may end in the moment in which its broker has just been restarted.
#[tokio::test(flavor = "multi_thread")]
async fn a_tests_broker_ends_though_the_test_was_over_before_it_was_watched() {
    let mut owner = std::process::Command::new("true").spawn().unwrap();
    owner.wait().unwrap();
    let rabbit = blocking(move || Rabbit::start_owned_by(owner.id())).await;
    let address = rabbit.address();
    let gone = async {
        while TcpStream::connect(&address).is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon("the end of the broker", gone).await;
}

/// What was unsettled when the broker went comes again: that is the first delivery, and nobody has to publish it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_delivery_after_a_restart_comes_soon() {
    let (_alone, rabbit) = alone().await;
    let restarts = std::env::var("HAUL_RESTARTS").map_or(RESTARTS, |text| text.parse().expect("a number"));
    let (broker, names, node) = (rabbit.client().await, Names::new(unique("first")), NodeName::new("a").unwrap());
    broker.declare(&names.shared_topology("").and(names.node_topology(&node))).await.unwrap();
    let declare = names.node_topology(&node);
    let consume = Consume { queue: names.node(&node), tag: "test".to_owned(), prefetch: 16, declare };
    let mut consumer = broker.consume(consume).await.unwrap();
    let mut times = Vec::new();
    for round in 0..restarts {
        let message = Message { body: "{}".into(), message_id: Some(round.to_string()), ..Message::default() };
        let (exchange, routing_key) = (names.task(), node.to_string());
        broker.publish(Outgoing { exchange, routing_key, message, mandatory: true }).await.unwrap();
        let held = next(&mut consumer).await;
        // A stop in order first: a queue that is younger than the broker's own tables on disk may not survive a kill.
        let killed = round % 2 == 1;
        let delivered = async {
            let again = tokio::time::timeout(RESTART, consumer.next()).await;
            (again.expect("it comes again").expect("the consumer runs"), Instant::now())
        };
        let (accepted, (again, came)) = tokio::join!(blocking(move || restarted(rabbit, killed)), delivered);
        let took = came.saturating_duration_since(accepted);
        println!("{}: the first delivery came after {took:?}", if killed { "killed" } else { "stopped" });
        times.push((took, killed));
        assert_eq!(again.message.message_id.as_deref(), Some(round.to_string().as_str()));
        assert_eq!(held.ack().await, Err(StaleDelivery));
        again.ack().await.unwrap();
    }
    times.sort();
    println!("of {restarts} restarts: median {:?}, worst {:?}", times[restarts / 2].0, times[restarts - 1].0);
    for (took, killed) in times {
        assert!(took < if killed { FIRST_AFTER_KILL } else { FIRST_DELIVERY }, "{took:?}, killed: {killed}");
    }
}

async fn next(consumer: &mut Consumer) -> Delivery {
    soon("a delivery", consumer.next()).await.expect("the consumer runs")
}

/// Restarts the node; when its listener accepted again.
fn restarted(rabbit: &'static Rabbit, kill: bool) -> Instant {
    if kill {
        rabbit.kill();
    }
    let address = rabbit.address().parse().unwrap();
    let accepts = move || TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok();
    let restarting = std::thread::spawn(|| rabbit.restart());
    let deadline = Instant::now() + RESTART;
    let mut gone = kill;
    let accepted = loop {
        assert!(Instant::now() < deadline, "the broker did not come back");
        match accepts() {
            true if gone => break Instant::now(),
            true => {}
            false => gone = true,
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    restarting.join().unwrap();
    accepted
}
