//! Queues that are deleted, and made again.

use std::time::Instant;

use haul::{
    broker::{Broker as _, topology::RETRY_DELAYS},
    protocol::Status,
};
use rustix::process::Signal;
use serde_json::json;

use crate::{
    CONSUMING_AGAIN, blocking,
    githttp::{Behaviour, Server, Upstream},
    scene::Scene,
    support::{agent::Agent, repository::Repository},
    together,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_queue_that_was_deleted() {
    let (_together, rabbit) = together().await;
    let scene = Scene::begin(rabbit, None).await;
    let queue = scene.queue.clone();
    blocking(move || rabbit.ctl(&["delete_queue", &queue])).await;
    // Until the agent has declared it again, masters are told that their tasks could not be routed and try again.
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

/// What was in a queue is gone with it: its master publishes again, what came through and what did not, and each task
/// ends once all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_that_are_published_again_after_their_queue_was_deleted() {
    let (_together, rabbit) = together().await;
    let mut agent = Agent::new(rabbit).await;
    let upstream = Repository::new();
    agent.start(&[]);
    agent.ready().await;
    let tasks: Vec<_> =
        (0..6).map(|n| Agent::clone_task(&format!("t-{n}"), n, &upstream, &format!("{n}_app"))).collect();
    for task in &tasks[..2] {
        agent.publish(task).await;
    }
    for id in ["t-0", "t-1"] {
        agent.end(id, 0).await;
    }
    agent.signal(Signal::TERM);
    agent.ended().await;
    for task in &tasks[2..] {
        agent.publish(task).await;
    }
    let queue = agent.names.node(agent.node());
    blocking(move || rabbit.ctl(&["delete_queue", &queue])).await;
    agent.start(&[]);
    for task in &tasks {
        agent.publish(task).await;
    }
    for n in 0..6 {
        assert_eq!(agent.end(&format!("t-{n}"), 0).await.status, Status::Succeeded);
    }
    agent.drained().await;
    agent.each_ended_once();
    let starts = |id: &str| agent.events(id).iter().filter(|event| event.status == Status::Started).count();
    assert_eq!([starts("t-0"), starts("t-1")], [1, 1]);
}

/// A copy that no queue takes is owed; its task comes to its end once there is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delay_queues_that_were_deleted() {
    let (_together, rabbit) = together().await;
    let mut agent = Agent::new(rabbit).await;
    agent.start(&[]);
    agent.ready().await;
    let queues: Vec<_> = RETRY_DELAYS[..2].iter().map(|&delay| agent.names.retry(delay)).collect();
    blocking(move || queues.iter().for_each(|queue| drop(rabbit.ctl(&["delete_queue", queue])))).await;
    let repository = Upstream::new();
    repository.commit("main", &[("a.txt", "hello\n")]);
    let server = Server::start(repository.root());
    server.behave(Behaviour::status(503));
    agent
        .publish(&json!({"v": 1, "task_id": "t", "kind": "clone", "project_id": 1,
                         "git_url": server.url("app.git"), "target_path": "1_app"}))
        .await;
    let owed = async || agent.log().contains("owed message not taken");
    agent.until_async("the copy not to be taken", owed).await;
    server.behave(Behaviour::Serve);
    agent.master.declare(&agent.names.shared_topology(&agent.names.master_event())).await.unwrap();
    let end = agent.end("t", 0).await;
    assert_eq!((end.status, end.attempt), (Status::Succeeded, 2));
    agent.drained().await;
    agent.each_ended_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_queue_that_was_deleted() {
    let (_together, rabbit) = together().await;
    let scene = Scene::begin(rabbit, None).await;
    let queue = scene.agent.names.control_node(scene.agent.node());
    blocking(move || rabbit.ctl(&["delete_queue", &queue])).await;
    let deleted = Instant::now();
    scene.agent.control(&json!({"v": 1, "command": "cancel", "task_id": "unknown"})).await;
    scene.agent.answered("pending").await;
    assert!(deleted.elapsed() < CONSUMING_AGAIN, "it took {:?}", deleted.elapsed());
    scene.consumes_within(CONSUMING_AGAIN, deleted).await;
    scene.ends().await;
}
