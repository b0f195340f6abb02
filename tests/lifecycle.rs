//! How a real agent process begins and ends: signals, drain, locks, a queue that is taken.

mod support;

#[path = "support/githttp.rs"]
mod githttp;

use githttp::{Behaviour, Server, Upstream};
use haul::{broker::Broker as _, protocol::Status};
use rustix::process::Signal;
use serde_json::{Value, json};
use support::{agent::Agent, census::Census, proxy::Proxy, rabbit::Rabbit, repository::git};

/// A clone from an upstream that says nothing until it is told to.
struct Slow {
    _upstream: Upstream,
    server: Server,
    task: Value,
}

impl Slow {
    fn new() -> Self {
        let upstream = Upstream::new();
        upstream.commit("main", &[("a.txt", "hello")]);
        let server = Server::start(upstream.root());
        server.behave(Behaviour::Stall);
        let task = json!({"v": 1, "task_id": "t", "kind": "clone", "project_id": 7,
                          "git_url": server.url("app.git"), "target_path": "7_app"});
        Self { _upstream: upstream, server, task }
    }
}

#[tokio::test]
async fn the_first_signal_finishes_what_runs_and_the_rest_is_given_back() {
    let slow = Slow::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_GIT__STALL", "3s");
    agent.set("AGENT_RETRY__MAX_ATTEMPTS", "1");
    agent.start(&[]);
    agent.publish(&slow.task).await;
    agent.saw("t", Status::Started).await;
    agent.publish(&Agent::task("waits", "pull", 7)).await;
    agent.saw("waits", Status::Accepted).await;
    agent.signal(Signal::TERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
    // It ran to its own end, a stall, within the grace.
    assert_eq!(agent.end("t", 0).await.status, Status::Failed);
    assert!(agent.terminal_states("waits", 0).is_empty());
    agent.start(&[]);
    assert_eq!(agent.end("waits", 0).await.attempt, 1);
}

#[tokio::test]
async fn what_waits_at_the_end_is_taken_up_in_its_order_at_the_next_start() {
    let (slow, upstream) = (Slow::new(), support::repository::Repository::new());
    slow.server.behave(Behaviour::HoldPack);
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_SLOTS", "1");
    agent.start(&[]);
    agent.publish(&slow.task).await;
    agent.saw("t", Status::Started).await;
    let projects = 20..23;
    for project in projects.clone() {
        let target = format!("{project}_app");
        agent.publish(&Agent::clone_task(&format!("clone-{project}"), project, &upstream, &target)).await;
        agent.publish(&Agent::task(&format!("pull-{project}"), "pull", project)).await;
    }
    let last = format!("pull-{}", projects.end - 1);
    agent
        .until_async("all of them to wait", async || {
            let depth = agent.master.depth(&agent.names.node(agent.node())).await.unwrap().unwrap();
            depth.messages == 0 && !agent.events(&last).is_empty()
        })
        .await;
    agent.signal(Signal::TERM);
    agent.until_async("the first signal to be seen", async || agent.log().contains("finishing what runs")).await;
    slow.server.behave(Behaviour::Serve);
    assert!(agent.ended().await.success(), "{}", agent.log());
    agent.start(&[]);
    for project in projects {
        // A pull that overtook its clone would have found no project.
        for id in [format!("clone-{project}"), format!("pull-{project}")] {
            let end = agent.end(&id, 0).await;
            assert_eq!((end.status, end.attempt), (Status::Succeeded, 1), "{end:?}");
        }
    }
}

#[tokio::test]
async fn the_second_signal_stops_at_once_and_charges_nothing() {
    let slow = Slow::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    for _ in 0..4 {
        agent.start(&[]);
        if agent.events("t").is_empty() {
            agent.publish(&slow.task).await;
        }
        agent.ready().await;
        agent.until_async("the clone to run", async || agent_children(agent.pid()) > 0).await;
        agent.signal(Signal::TERM);
        agent.until_async("the first signal to be seen", async || agent.log().contains("finishing what runs")).await;
        agent.signal(Signal::INT);
        assert_eq!(agent.ended().await.code(), Some(130), "{}", agent.log());
    }
    slow.server.behave(Behaviour::Serve);
    agent.start(&[]);
    let end = agent.end("t", 0).await;
    assert_eq!((end.status, end.attempt), (Status::Succeeded, 1));
}

#[tokio::test]
async fn a_drain_by_control_message_ends_the_process_well() {
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.start(&[]);
    agent.ready().await;
    agent.control(&json!({"v": 1, "command": "drain", "control_id": "c"})).await;
    assert_eq!(agent.answered("draining").await.control_id.as_deref(), Some("c"));
    assert!(agent.ended().await.success(), "{}", agent.log());
}

#[tokio::test]
async fn a_running_clone_is_cancelled_and_its_children_are_gone() {
    let slow = Slow::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.start(&[]);
    agent.publish(&slow.task).await;
    agent.saw("t", Status::Started).await;
    agent.until_async("the clone to run", async || agent_children(agent.pid()) > 0).await;
    agent.control(&json!({"v": 1, "command": "cancel", "task_id": "t"})).await;
    assert_eq!(agent.end("t", 0).await.status, Status::Cancelled);
    agent.until_async("its children to be gone", async || agent_children(agent.pid()) == 0).await;
    assert!(support::agent::visible_projects(&agent.projects()).is_empty());
}

#[tokio::test]
async fn an_agent_of_the_same_name_elsewhere_is_refused_unless_it_is_forced() {
    let rabbit = Rabbit::shared();
    let mut first = Agent::new(rabbit).await;
    first.start(&[]);
    first.ready().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let mut second = first.command(&["worker"]);
    second.env("AGENT_STORAGE_PATH", elsewhere.path()).env("AGENT_BROKER__HEARTBEAT", "1s");
    let refused = tokio::task::spawn_blocking(move || second.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("another consumer is on queue"), "{said}");
}

#[tokio::test]
async fn the_agent_waits_for_a_broker_that_is_not_there_yet() {
    let rabbit = Rabbit::start(&[]);
    let upstream = support::repository::Repository::new();
    let mut agent = Agent::new(&rabbit).await;
    rabbit.ctl(&["stop_app"]);
    agent.start(&[]);
    agent.until_async("the agent to wait", async || agent.log().contains("waiting for the broker")).await;
    rabbit.ctl(&["start_app"]);
    agent.ready().await;
    agent.publish(&Agent::clone_task("t", 7, &upstream, "7_app")).await;
    assert_eq!(agent.end("t", 0).await.status, Status::Succeeded);
    assert_eq!(git(&agent.projects().join("7_app"), &["status", "--porcelain"]), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_hundred_reconnects_there_is_no_thread_descriptor_or_child_more_than_before() {
    const ROUNDS: usize = 50;
    let rabbit = tokio::task::spawn_blocking(Rabbit::shared).await.unwrap();
    let proxy = Proxy::start(rabbit).await;
    let (mut agent, upstream) = (Agent::new(rabbit).await, support::repository::Repository::new());
    agent.set("AGENT_AMQP_URL", &proxy.url);
    agent.start(&[]);
    agent.ready().await;
    agent.publish(&Agent::clone_task("before", 7, &upstream, "7_app")).await;
    agent.end("before", 0).await;
    // Both connections at a time: a hundred in all.
    let reconnect = async || {
        let log = agent.log().len();
        proxy.reset();
        agent
            .until_async("it to be ready again", async || {
                agent.log()[log..].contains(r#""message":"readiness","ready":true"#)
            })
            .await;
    };
    for _ in 0..5 {
        reconnect().await;
    }
    agent.publish(&Agent::task("between", "status", 7)).await;
    agent.end("between", 0).await;
    let before = Census::of(agent.pid());
    for _ in 0..ROUNDS {
        reconnect().await;
    }
    agent.publish(&Agent::task("after", "status", 7)).await;
    agent.end("after", 0).await;
    // A thread of the runtime that has nothing to do goes after ten seconds.
    agent.until_async("what was left over to go", async || Census::of(agent.pid()).fits_in(&before)).await;
    println!("before {before:?}, after {:?}", Census::of(agent.pid()));
    let connections = agent.log().matches(r#""message":"connected to the broker""#).count();
    assert!(connections >= 2 * ROUNDS, "{connections} connections");
}

#[tokio::test]
async fn a_drain_is_told_of_when_it_is_done_and_never_reaches_the_next_start() {
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.start(&[]);
    agent.ready().await;
    agent.control(&json!({"v": 1, "command": "drain", "control_id": "c"})).await;
    assert_eq!(agent.answered("drained").await.control_id.as_deref(), Some("c"));
    assert!(agent.ended().await.success(), "{}", agent.log());
    agent.start(&[]);
    agent.ready().await;
    agent.control(&json!({"v": 1, "command": "inspect", "control_id": "d"})).await;
    assert_eq!(agent.answered("state").await.ready, Some(true));
    assert!(agent.is_running());
}

/// Children of a process, by the kernel's own list.
fn agent_children(pid: u32) -> usize {
    Census::of(pid).children
}
