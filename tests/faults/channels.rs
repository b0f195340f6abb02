//! Channels and consumers that the broker ends on its own.

use std::time::Instant;

use haul::{broker::Broker as _, protocol::Status};

use crate::{
    CONSUMING_AGAIN, blocking,
    scene::Scene,
    support::{agent::Agent, eventually, proxy::Proxy},
    together,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_the_broker_closed() {
    let (_together, rabbit) = together().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    proxy.forge_ack(&scene.queue);
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    assert!(scene.agent.log().contains("unknown delivery tag"), "{}", scene.agent.log());
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishing_channels_that_the_broker_closed() {
    let (_together, rabbit) = together().await;
    let scene = Scene::begin(rabbit, None).await;
    let names = scene.agent.names.clone();
    let shared = names.shared_topology(&names.master_event());
    // Publishing to an exchange that is not there closes the channel.
    blocking(move || rabbit.delete_exchange(&names.event())).await;
    scene.agent.publish(&Agent::clone_task("unheard", 3, &scene.other, "3_app")).await;
    eventually("the task is done", async || scene.agent.projects().join("3_app").exists()).await;
    scene.agent.master.declare(&shared).await.unwrap();
    let usable = Instant::now();
    assert_eq!(scene.agent.end("unheard", 0).await.status, Status::Succeeded);
    scene.consumes_within(CONSUMING_AGAIN, usable).await;
    scene.ends().await;
}

/// The silent consumer: channel and connection stand as if nothing had happened, and nothing comes any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_the_broker_has_dropped_is_noticed_within_10_s() {
    let (_together, rabbit) = together().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    for _ in 0..2 {
        proxy.drop_consumer(&scene.queue);
        scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    }
    scene.ends().await;
}
