//! One agent takes over from another on the same storage directory: nothing runs twice, no event is doubled, and the
//! queue has a consumer all the time.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

#[path = "support/githttp.rs"]
mod githttp;
mod support;

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use githttp::{Behaviour, Server, Upstream};
use haul::{
    broker::{Broker as _, rabbitmq::RabbitMq},
    protocol::{Kind, Status},
};
use rustix::process::Signal;
use serde_json::json;
use support::{
    agent::{Agent, Former},
    pipeline::{self, Pipeline, Script},
    rabbit::Rabbit,
    repository::Repository,
};
use tokio::{sync::watch, task::JoinHandle};

/// What is promised.
const WITHOUT_A_CONSUMER: Duration = Duration::from_secs(2);
/// What the running agent logs when it is asked to leave.
const ASKED: &str = "another process takes over";

async fn agent() -> Agent {
    Agent::new(tokio::task::spawn_blocking(Rabbit::shared).await.unwrap()).await
}

async fn started() -> Agent {
    let mut agent = agent().await;
    agent.set("AGENT_SLOTS", "4");
    agent.start(&[]);
    agent.ready().await;
    agent
}

/// Has the running agent leave; with it out of the way the new one is ready.
async fn taken_over(agent: &mut Agent) -> Former {
    let mut former = agent.start_beside(&["--take-over"]);
    let status = former.ended().await;
    assert_eq!(status.code(), Some(0), "{}", former.log());
    agent.ready().await;
    former
}

/// Looks at the queue as fast as the broker answers, and keeps the longest time in which it had no consumer.
struct Sampler {
    stop: watch::Sender<bool>,
    longest: JoinHandle<Duration>,
}

impl Sampler {
    fn start(agent: &Agent) -> Self {
        let (master, queue) = (agent.master.clone(), agent.names.node(agent.node()));
        let (stop, stopped) = watch::channel(false);
        let longest = tokio::spawn(Self::sample(master, queue, stopped));
        Self { stop, longest }
    }

    async fn sample(master: Arc<RabbitMq>, queue: String, stopped: watch::Receiver<bool>) -> Duration {
        let (mut seen, mut longest) = (Instant::now(), Duration::ZERO);
        while !*stopped.borrow() {
            if master.depth(&queue).await.unwrap().is_some_and(|depth| depth.consumers > 0) {
                longest = longest.max(seen.elapsed());
                seen = Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        longest.max(seen.elapsed())
    }

    async fn longest(self) -> Duration {
        self.stop.send_replace(true);
        self.longest.await.unwrap()
    }
}

/// A clone that waits for its upstream.
struct Held {
    server: Server,
    _repository: Upstream,
}

impl Held {
    async fn begin(agent: &Agent) -> Self {
        let repository = Upstream::new();
        repository.commit("main", &[("a.txt", "hello\n")]);
        let server = Server::start(repository.root());
        server.behave(Behaviour::HoldPack);
        let clone = json!({"v": 1, "task_id": "held", "kind": "clone", "project_id": 1,
                           "git_url": server.url("app.git"), "target_path": "1_app"});
        agent.publish(&clone).await;
        agent.until_async("the pack to be asked for", async || server.counts().packs == 1).await;
        Self { server, _repository: repository }
    }

    fn go_on(&self) {
        self.server.behave(Behaviour::Serve);
    }
}

fn starts(agent: &Agent, id: &str) -> usize {
    agent.events(id).into_iter().filter(|event| event.status == Status::Started).count()
}

async fn output(mut command: Command) -> (Option<i32>, String) {
    command.stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_agent_is_taken_over_from_and_the_queue_keeps_a_consumer() {
    let (mut agent, upstream) = (started().await, Repository::new());
    agent.publish(&Agent::clone_task("before", 1, &upstream, "1_app")).await;
    agent.end("before", 0).await;
    let sampler = Sampler::start(&agent);
    taken_over(&mut agent).await;
    let longest = sampler.longest().await;
    println!("longest time without a consumer: {longest:?}");
    assert!(longest < WITHOUT_A_CONSUMER, "{longest:?}");
    // What the old one did is known to the new one.
    agent.publish(&Agent::clone_task("before", 1, &upstream, "1_app")).await;
    agent.publish(&Agent::task("after", "status", 1)).await;
    assert_eq!(agent.end("after", 0).await.status, Status::Succeeded);
    agent.drained().await;
    assert_eq!((starts(&agent, "before"), agent.terminal_states("before", 0).len()), (1, 1));
    assert!(!agent.log().contains("what the broker says of our consumer differs"), "{}", agent.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_no_task_runs_twice_no_event_is_doubled_and_the_queue_keeps_a_consumer() {
    const TASKS: usize = 120;
    const PROJECTS: usize = 8;
    /// So many are out at a time: with more of one project some would go round through a delay queue.
    const OUT: usize = 12;
    let (mut agent, upstream) = (started().await, Repository::new());
    for project in 0..PROJECTS {
        let id = format!("clone-{project}");
        let project = i64::try_from(project).unwrap();
        agent.publish(&Agent::clone_task(&id, project, &upstream, &format!("{project}_app"))).await;
        assert_eq!(agent.end(&id, 0).await.status, Status::Succeeded);
    }
    let sampler = Sampler::start(&agent);
    let mut former = None;
    for number in 0..TASKS {
        let kind = if number % 3 == 0 { "pull" } else { "status" };
        let project = i64::try_from(number % PROJECTS).unwrap();
        agent.publish(&Agent::task(&format!("t{number}"), kind, project)).await;
        if number == TASKS / 4 {
            former = Some(agent.start_beside(&["--take-over"]));
        }
        if let Some(earlier) = number.checked_sub(OUT) {
            agent.end(&format!("t{earlier}"), 0).await;
        }
    }
    let mut former = former.unwrap();
    assert_eq!(former.ended().await.code(), Some(0), "{}", former.log());
    for number in 0..TASKS {
        let end = agent.end(&format!("t{number}"), 0).await;
        assert_eq!(end.status, Status::Succeeded, "{end:?}");
    }
    let longest = sampler.longest().await;
    println!("longest time without a consumer: {longest:?}");
    assert!(longest < WITHOUT_A_CONSUMER, "{longest:?}");
    agent.drained().await;
    let events = agent.all_events();
    let mut seen = BTreeMap::new();
    let mut boots = BTreeMap::<_, usize>::new();
    let mut begun: Vec<_> = Vec::new();
    for event in &events {
        *seen.entry(event.event_id.clone()).or_insert(0) += 1;
        if event.status == Status::Started {
            *boots.entry(event.boot.clone()).or_default() += 1;
            begun.push(event.at);
        }
    }
    assert!(seen.values().all(|&times| times == 1), "an event came twice");
    for number in 0..TASKS {
        let id = format!("t{number}");
        assert_eq!((starts(&agent, &id), agent.terminal_states(&id, 0).len()), (1, 1), "{id}");
    }
    assert_eq!(boots.len(), 2, "both agents had their part: {boots:?}");
    begun.sort();
    let pause = begun.windows(2).map(|pair| pair[1].duration_since(pair[0])).max().unwrap();
    println!("longest time in which no task began: {pause}; tasks begun by each agent: {boots:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_is_finished_by_the_old_one_what_comes_meanwhile_waits_and_is_done_by_the_new_one() {
    let mut agent = started().await;
    let held = Held::begin(&agent).await;
    let mut former = agent.start_beside(&["--take-over"]);
    former.said(ASKED).await;
    agent.publish(&Agent::task("meanwhile", "status", 2)).await;
    agent.saw("meanwhile", Status::Accepted).await;
    assert!(former.is_running() && starts(&agent, "meanwhile") == 0, "{}", former.log());
    agent.consuming().await;
    held.go_on();
    let end = agent.end("held", 0).await;
    assert_eq!(former.ended().await.code(), Some(0), "{}", former.log());
    let later = agent.end("meanwhile", 0).await;
    assert_eq!((end.status, starts(&agent, "held"), held.server.counts().packs), (Status::Succeeded, 1, 1));
    assert_ne!(end.boot, later.boot);
    assert_eq!(starts(&agent, "meanwhile"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_end_in_time_is_given_back_uncharged() {
    let mut agent = started().await;
    let held = Held::begin(&agent).await;
    let mut former = agent.start_beside(&["--take-over", "--grace", "500ms"]);
    assert_eq!(former.ended().await.code(), Some(0), "{}", former.log());
    assert!(agent.terminal_states("held", 0).is_empty());
    held.go_on();
    let end = agent.end("held", 0).await;
    assert_eq!((end.status, end.attempt), (Status::Succeeded, 1));
    agent.drained().await;
    assert_eq!(agent.terminal_states("held", 0).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_hangs_is_named_and_keeps_what_it_has() {
    let (mut agent, upstream) = (started().await, Repository::new());
    agent.signal(Signal::STOP);
    let (code, said) = output(agent.command(&["worker", "--take-over"])).await;
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains(&format!("the process {} that uses the storage directory", agent.pid())), "{said}");
    assert!(said.contains("does not answer") && said.contains("kill -9"), "{said}");
    agent.signal(Signal::CONT);
    agent.publish(&Agent::clone_task("t", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("t", 0).await.status, Status::Succeeded);
    assert!(agent.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_dies_calls_the_hand_over_off_and_a_second_one_is_refused() {
    let mut agent = started().await;
    let held = Held::begin(&agent).await;
    let mut former = agent.start_beside(&["--take-over"]);
    former.said(ASKED).await;
    let (code, said) = output(agent.command(&["worker", "--take-over"])).await;
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("another process takes over already"), "{said}");
    agent.kill().await;
    former.said("going on").await;
    agent.publish(&Agent::task("after", "status", 2)).await;
    let after = agent.end("after", 0).await;
    held.go_on();
    let end = agent.end("held", 0).await;
    assert_eq!((end.status, &end.boot), (Status::Succeeded, &after.boot));
    assert!(former.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_no_agent_runs_it_simply_starts() {
    let (mut agent, upstream) = (agent().await, Repository::new());
    agent.start(&["--take-over"]);
    agent.publish(&Agent::clone_task("t", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("t", 0).await.status, Status::Succeeded);
    // One that was killed leaves its door behind, and nobody behind the door.
    agent.kill().await;
    agent.start(&["--take-over"]);
    agent.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_of_another_storage_or_another_name_is_not_taken_over_from() {
    let mut agent = started().await;
    agent.consuming().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let mut command = agent.command(&["worker", "--take-over"]);
    command.env("AGENT_STORAGE_PATH", elsewhere.path()).env("AGENT_BROKER__HEARTBEAT", "1s");
    let (code, said) = output(command).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("another consumer is on queue") && said.contains("--force"), "{said}");
    let mut command = agent.command(&["worker", "--take-over"]);
    command.env("AGENT_NODE_NAME", "n2");
    let (code, said) = output(command).await;
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("is node n1 under the prefix"), "{said}");
    assert!(agent.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_broker_nothing_is_taken_over() {
    let mut agent = started().await;
    let mut command = agent.command(&["worker", "--take-over"]);
    command.env("AGENT_AMQP_URL", "amqp://guest:guest@127.0.0.1:1/%2f");
    let (code, said) = output(command).await;
    assert_eq!(code, Some(3), "{said}");
    assert!(agent.is_running());
    agent.publish(&Agent::task("t", "status", 1)).await;
    agent.end("t", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_agent_is_taken_over_from_and_stays_paused() {
    let mut agent = started().await;
    agent.control(&json!({"v": 1, "command": "pause"})).await;
    agent.answered("paused").await;
    let mut former = agent.start_beside(&["--take-over"]);
    assert_eq!(former.ended().await.code(), Some(0), "{}", former.log());
    agent.publish(&Agent::task("t", "status", 1)).await;
    agent.control(&json!({"v": 1, "command": "inspect"})).await;
    assert_eq!(agent.answered("state").await.paused, Some(true));
    assert!(agent.events("t").is_empty());
    agent.control(&json!({"v": 1, "command": "resume"})).await;
    agent.end("t", 0).await;
}

/// What the worker itself does, on the broker in memory.
mod memory {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_hand_over_begins_nothing_finishes_what_runs_and_gives_back_the_rest() {
        let mut pipeline = Pipeline::start().await;
        pipeline.script("runs", [Script::Take(Duration::from_secs(20))]);
        pipeline.publish(&pipeline::clone_task("runs", 1)).await;
        pipeline.saw("runs", Status::Started).await;
        let worker = pipeline.worker();
        let left = tokio::spawn(async move { worker.hand_over(Duration::from_secs(30), std::future::pending()).await });
        tokio::task::yield_now().await;
        pipeline.publish(&pipeline::clone_task("comes", 2)).await;
        pipeline.publish(&pipeline::task("status", Kind::Status, 3)).await;
        pipeline.saw("comes", Status::Accepted).await;
        assert_eq!(pipeline.terminal_events("runs").len(), 0);
        assert!(left.await.unwrap());
        pipeline.ended().await;
        assert_eq!((pipeline.terminal_events("runs").len(), pipeline.executions("runs")), (1, 1));
        assert_eq!((pipeline.executions("comes"), pipeline.depth("haul.node.n1")), (0, 2));
        pipeline.restart().await;
        assert_eq!(pipeline.ends("comes", Status::Succeeded).await.attempt, 1);
        pipeline.ends("status", Status::Succeeded).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_outlives_the_grace_is_stopped_and_charged_nothing() {
        let mut pipeline = Pipeline::start().await;
        pipeline.script("runs", [Script::UntilStopped, Script::Succeed]);
        pipeline.publish(&pipeline::clone_task("runs", 1)).await;
        pipeline.saw("runs", Status::Started).await;
        assert!(pipeline.worker().hand_over(Duration::from_secs(5), std::future::pending()).await);
        pipeline.ended().await;
        assert_eq!(pipeline.terminal_events("runs").len(), 0);
        pipeline.restart().await;
        assert_eq!(pipeline.ends("runs", Status::Succeeded).await.attempt, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hand_over_that_is_called_off_changes_nothing() {
        let pipeline = Pipeline::start().await;
        pipeline.script("runs", [Script::Take(Duration::from_mins(2))]);
        pipeline.publish(&pipeline::clone_task("runs", 1)).await;
        pipeline.saw("runs", Status::Started).await;
        let called_off = tokio::time::sleep(Duration::from_secs(10));
        pipeline.publish(&pipeline::clone_task("waits", 2)).await;
        assert!(!pipeline.worker().hand_over(Duration::from_mins(5), called_off).await);
        pipeline.ends("waits", Status::Succeeded).await;
        pipeline.ends("runs", Status::Succeeded).await;
        assert_eq!((pipeline.executions("runs"), pipeline.executions("waits")), (1, 1));
    }
}
