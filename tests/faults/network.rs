//! Networks between an agent and a broker that is well.

use std::time::{Duration, Instant};

use haul::{
    broker::{Broker as _, Consume, Health, Names, Topology, rabbitmq::RabbitMq, settings::BrokerSettings},
    protocol::Status,
};
use secrecy::SecretString;

use crate::{
    CONSUMING_AGAIN, HEARTBEAT,
    scene::Scene,
    support::{
        agent::Agent,
        eventually,
        proxy::{Proxy, Weather},
        repository::Repository,
        unique,
    },
    together,
};

/// From the moment a connection is half open to the first delivery on another.
const AFTER_HALF_OPEN: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_were_reset() {
    let (_together, rabbit) = together().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    for _ in 0..2 {
        proxy.reset();
        scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    }
    scene.ends().await;
}

/// An agent is not started anew for months, and loses its connections more often than that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_were_lost_leave_no_task_behind() {
    let (_together, rabbit) = together().await;
    let proxy = Proxy::start(rabbit).await;
    let names = Names::new(unique("leave-nothing"));
    let settings = BrokerSettings { urls: vec![SecretString::from(proxy.url.as_str())], ..rabbit.settings() };
    // A runtime of its own, whose tasks can be counted.
    let own = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let begin = async move {
        let client = RabbitMq::connect(&settings, "haul test").await.unwrap();
        client.declare(&names.shared_topology(&names.master_event())).await.unwrap();
        let consume =
            Consume { queue: names.master_event(), tag: unique("tag"), prefetch: 10, declare: Topology::default() };
        let consumer = client.consume(consume).await.unwrap();
        (client, consumer)
    };
    let (client, consumer) = own.spawn(begin).await.unwrap();
    let well = || *client.health().borrow() == Health::Up && *consumer.health().borrow() == Health::Up;
    let alive = || own.metrics().num_alive_tasks();
    let before = alive();
    for _ in 0..8 {
        let opened = proxy.opened();
        proxy.reset();
        eventually("the connections are made again", async || proxy.opened() >= opened + 2 && well()).await;
    }
    eventually(&format!("no more than {before} tasks are left"), async || alive() <= before).await;
    client.close().await;
    drop((client, consumer));
    own.shutdown_background();
}

/// Given up within three heartbeats, and consuming within 15 s on another.
#[expect(clippy::print_stdout, reason = "the time is a figure that people ask for")]
async fn half_open(stall: impl Fn(&Proxy)) {
    let (_together, rabbit) = together().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    stall(&proxy);
    let stalled = Instant::now();
    let lost = async || scene.agent.log().contains("the consumer was lost");
    scene.agent.until_async("the loss to be noticed", lost).await;
    println!("given up after {:?}", stalled.elapsed());
    assert!(stalled.elapsed() < HEARTBEAT * 3, "it took {:?}", stalled.elapsed());
    scene.consumes_within(AFTER_HALF_OPEN, stalled).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_open_connections_given_up_within_three_heartbeats() {
    half_open(Proxy::stall).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_on_which_the_agent_hears_nothing_any_more() {
    half_open(Proxy::stall_towards_the_client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_on_which_the_agent_is_not_heard_any_more() {
    half_open(Proxy::stall_towards_the_broker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_that_is_over_within_a_heartbeat_is_sat_out() {
    let (_together, rabbit) = together().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    let opened = proxy.opened();
    proxy.stall();
    scene.agent.publish(&Agent::clone_task("late", 3, &scene.other, "3_app")).await;
    // The stall itself; nothing is waited for.
    tokio::time::sleep(HEARTBEAT * 3 / 4).await;
    assert!(scene.agent.events("late").is_empty());
    proxy.resume();
    assert_eq!(scene.agent.end("late", 0).await.status, Status::Succeeded);
    assert_eq!(proxy.opened(), opened, "a connection was given up; the agent's log:\n{}", scene.agent.log());
    scene.ends().await;
}

/// Publishes tasks through the weather and sees each of them end once.
async fn in_weather(weather: Weather) {
    let (_together, rabbit) = together().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    let opened = proxy.opened();
    proxy.set(weather);
    for number in 0..5 {
        let (id, target) = (format!("slowly-{number}"), format!("1{number}_app"));
        scene.agent.publish(&Agent::clone_task(&id, 10 + number, &scene.other, &target)).await;
    }
    for number in 0..5 {
        assert_eq!(scene.agent.end(&format!("slowly-{number}"), 0).await.status, Status::Succeeded);
    }
    assert_eq!(proxy.opened(), opened, "a connection was given up; the agent's log:\n{}", scene.agent.log());
    // Also a connection that is made in such weather.
    proxy.reset();
    scene.agent.publish(&Agent::clone_task("anew", 20, &scene.other, "20_app")).await;
    assert_eq!(scene.agent.end("anew", 0).await.status, Status::Succeeded);
    proxy.set(Weather::default());
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_trickle() {
    in_weather(Weather { bytes_a_second: Some(4_000), ..Weather::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_with_half_a_second_of_latency() {
    in_weather(Weather { latency: Duration::from_millis(250), ..Weather::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_loss_the_next_address_is_tried_first() {
    let (_together, rabbit) = together().await;
    let (proxies, upstream) = ([Proxy::start(rabbit).await, Proxy::start(rabbit).await], Repository::new());
    let mut agent = Agent::new(rabbit).await;
    agent.set("AGENT_AMQP_URL", &format!("{},{}", proxies[0].url, proxies[1].url));
    agent.start(&[]);
    agent.ready().await;
    assert_eq!(proxies[1].opened(), 0);
    let before = proxies[0].opened();
    proxies[0].stall();
    agent.until_async("the other address to be used", async || proxies[1].opened() >= 2).await;
    assert_eq!(proxies[0].opened(), before);
    agent.publish(&Agent::clone_task("there", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("there", 0).await.status, Status::Succeeded);
}
