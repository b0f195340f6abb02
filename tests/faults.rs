//! A broker that goes away, resets, stalls, closes and cancels, under a real agent: it consumes again within ten seconds
//! of the broker's return and without a restart; what ran meanwhile is executed once and ends once, and nothing is lost.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

#[path = "support/githttp.rs"]
mod githttp;
mod support;

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use githttp::{Behaviour, Server, Upstream};
use haul::{broker::Broker as _, protocol::Status};
use serde_json::json;
use support::{
    agent::Agent,
    eventually,
    proxy::Proxy,
    rabbit::Rabbit,
    repository::{Repository, assert_whole},
};
use tokio::sync::{Mutex, MutexGuard};

/// What is promised, counted from the moment the broker can be used.
const CONSUMING_AGAIN: Duration = Duration::from_secs(10);
/// The heartbeat that agents have here, which is the default.
const HEARTBEAT: Duration = Duration::from_secs(4);

/// The node of this binary, to oneself: these tests break it for everybody.
async fn rabbit() -> (MutexGuard<'static, ()>, &'static Rabbit) {
    static ALONE: Mutex<()> = Mutex::const_new(());
    static NODE: OnceLock<Option<Rabbit>> = OnceLock::new();
    support::logs();
    let alone = ALONE.lock().await;
    let start = || NODE.get_or_init(|| std::panic::catch_unwind(|| Rabbit::start(&[])).ok()).as_ref();
    let node = blocking(start).await;
    (alone, node.expect("the node started; the first test that wanted it says why not"))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// An agent with a clone that runs, held by its upstream, and a status task that waits behind it.
struct Scene {
    agent: Agent,
    upstream: Server,
    head: String,
    other: Repository,
    queue: String,
    _repository: Upstream,
}

impl Scene {
    async fn begin(rabbit: &Rabbit, proxy: Option<&Proxy>) -> Self {
        let repository = Upstream::new();
        let head = repository.commit("main", &[("a.txt", "hello\n")]);
        let upstream = Server::start(repository.root());
        upstream.behave(Behaviour::HoldPack);
        let mut agent = Agent::new(rabbit).await;
        agent.set("AGENT_SLOTS", "4");
        if let Some(proxy) = proxy {
            agent.set("AGENT_AMQP_URL", &proxy.url);
        }
        agent.start(&[]);
        agent.ready().await;
        let clone = json!({"v": 1, "task_id": "held", "kind": "clone", "project_id": 1,
                           "git_url": upstream.url("app.git"), "target_path": "1_app"});
        agent.publish(&clone).await;
        eventually("the clone waits for its pack", async || upstream.counts().packs == 1).await;
        agent.publish(&Agent::task("behind", "status", 1)).await;
        agent.saw("behind", Status::Accepted).await;
        let queue = agent.names.node(agent.node());
        Self { agent, upstream, head, other: Repository::new(), queue, _repository: repository }
    }

    /// A task that is published now ends within `limit` of `since`.
    #[expect(clippy::print_stdout, reason = "the time it took is a figure that people ask for")]
    async fn consumes_within(&self, limit: Duration, since: Instant) {
        let id = format!("probe-{}", self.agent.all_events().len());
        self.agent.publish(&Agent::clone_task(&id, 2, &self.other, "2_app")).await;
        let end = self.agent.end(&id, 0).await;
        let took = since.elapsed();
        println!("consuming again after {took:?}");
        assert_eq!(end.status, Status::Succeeded, "{end:?}");
        assert!(took < limit, "it took {took:?}; the agent's log:\n{}", self.agent.log());
    }

    /// Everything ends once, was executed once, by the process that was there from the beginning, and nothing is left.
    async fn ends(mut self) {
        self.upstream.behave(Behaviour::Serve);
        for id in ["held", "behind"] {
            let end = self.agent.end(id, 0).await;
            assert_eq!(end.status, Status::Succeeded, "{end:?}");
        }
        assert_whole(&self.agent.projects().join("1_app"), &self.head);
        self.agent.drained().await;
        assert!(self.agent.is_running(), "{}", self.agent.log());
        self.agent.signal(rustix::process::Signal::TERM);
        assert!(self.agent.ended().await.success(), "{}", self.agent.log());
        // What had not been acknowledged would be ready again now.
        self.agent.drained().await;
        for id in self.agent.all_events().iter().map(|event| event.task_id.to_string()) {
            let states = self.agent.terminal_states(&id, 0);
            assert_eq!(states.len(), 1, "{id}: {states:?}");
        }
        let mut starts: Vec<_> =
            self.agent.events("held").into_iter().filter(|event| event.status == Status::Started).collect();
        starts.dedup_by(|a, b| a.event_id == b.event_id);
        assert_eq!(starts.len(), 1, "{starts:?}");
        assert_eq!(self.upstream.counts().packs, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_was_stopped_and_started() {
    let (_alone, rabbit) = rabbit().await;
    let scene = Scene::begin(rabbit, None).await;
    blocking(|| rabbit.restart()).await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_was_killed_and_started() {
    let (_alone, rabbit) = rabbit().await;
    let scene = Scene::begin(rabbit, None).await;
    blocking(|| {
        // A queue that is younger than the broker's own tables on disk may not survive a kill.
        rabbit.ctl(&["eval", "catch mnesia:dump_log(), ok."]);
        rabbit.kill();
        rabbit.restart();
    })
    .await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_the_broker_closed() {
    let (_alone, rabbit) = rabbit().await;
    let scene = Scene::begin(rabbit, None).await;
    blocking(|| rabbit.ctl(&["close_all_connections", "a test"])).await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_were_reset() {
    let (_alone, rabbit) = rabbit().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    for _ in 0..2 {
        proxy.reset();
        scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    }
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_open_connections_given_up_within_three_heartbeats() {
    let (_alone, rabbit) = rabbit().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    proxy.stall();
    let stalled = Instant::now();
    let lost = async || scene.agent.log().contains("the consumer was lost");
    scene.agent.until_async("the loss to be noticed", lost).await;
    println!("given up after {:?}", stalled.elapsed());
    assert!(stalled.elapsed() < HEARTBEAT * 3, "it took {:?}", stalled.elapsed());
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_the_broker_closed() {
    let (_alone, rabbit) = rabbit().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    proxy.forge_ack(&scene.queue);
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    assert!(scene.agent.log().contains("unknown delivery tag"), "{}", scene.agent.log());
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishing_channels_that_the_broker_closed() {
    let (_alone, rabbit) = rabbit().await;
    let scene = Scene::begin(rabbit, None).await;
    let names = scene.agent.names.clone();
    let shared = names.shared_topology(&names.master_event());
    // Publishing to an exchange that is not there closes the channel.
    let delete = format!(
        "rabbit_exchange:delete(rabbit_misc:r(<<\"/\">>, exchange, <<\"{}\">>), false, <<\"test\">>).",
        names.event()
    );
    blocking(move || rabbit.ctl(&["eval", &delete])).await;
    scene.agent.publish(&Agent::clone_task("unheard", 3, &scene.other, "3_app")).await;
    eventually("the task is done", async || scene.agent.projects().join("3_app").exists()).await;
    scene.agent.master.declare(&shared).await.unwrap();
    let usable = Instant::now();
    assert_eq!(scene.agent.end("unheard", 0).await.status, Status::Succeeded);
    scene.consumes_within(CONSUMING_AGAIN, usable).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_queue_that_was_deleted() {
    let (_alone, rabbit) = rabbit().await;
    let scene = Scene::begin(rabbit, None).await;
    let queue = scene.queue.clone();
    blocking(move || rabbit.ctl(&["delete_queue", &queue])).await;
    // Until the agent has declared it again, masters are told that their tasks could not be routed and try again.
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_queue_that_was_deleted() {
    let (_alone, rabbit) = rabbit().await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_the_broker_has_dropped_is_noticed_within_10_s() {
    let (_alone, rabbit) = rabbit().await;
    let proxy = Proxy::start(rabbit).await;
    let scene = Scene::begin(rabbit, Some(&proxy)).await;
    for _ in 0..2 {
        // Channel and connection stand as if nothing had happened.
        proxy.drop_consumer(&scene.queue);
        scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    }
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_runs_longer_than_the_consumer_timeout() {
    let timeout = Duration::from_secs(6);
    let configuration = format!("consumer_timeout = {}", timeout.as_millis());
    let rabbit = blocking(move || {
        let rabbit = Rabbit::start(&[&configuration]);
        // How often the broker looks at its channels; once a minute by default.
        rabbit.ctl(&["eval", "application:set_env(rabbit, channel_tick_interval, 1000)."]);
        rabbit
    })
    .await;
    let scene = Scene::begin(&rabbit, None).await;
    scene
        .agent
        .until_async("the consumer to be lost", async || scene.agent.log().contains("the consumer was lost"))
        .await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_alarm_while_tasks_end() {
    let (_alone, rabbit) = rabbit().await;
    let scene = Scene::begin(rabbit, None).await;
    blocking(|| rabbit.ctl(&["set_vm_memory_high_watermark", "0.00001"])).await;
    // What it publishes when the clone ends is what blocks its connection.
    scene.upstream.behave(Behaviour::Serve);
    let project = scene.agent.projects().join("1_app/a.txt");
    eventually("the clone is done", async || project.exists()).await;
    scene.agent.until_async("the alarm to be seen", async || scene.agent.log().contains("has an alarm")).await;
    assert!(scene.agent.terminal_states("held", 0).is_empty());
    blocking(|| rabbit.ctl(&["set_vm_memory_high_watermark", "0.4"])).await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

/// Here it is the upstream that is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_of_a_dead_host_wait_uncharged_and_a_probe_finds_it_back() {
    let (_alone, rabbit) = rabbit().await;
    let upstream = Upstream::new();
    let head = upstream.commit("main", &[("a.txt", "hello\n")]);
    let mut agent = Agent::new(rabbit).await;
    for (name, value) in
        [("AGENT_RETRY__MAX_ATTEMPTS", "3"), ("AGENT_GIT__BREAKER_AFTER", "2"), ("AGENT_GIT__BREAKER_PAUSE", "1s")]
    {
        agent.set(name, value);
    }
    agent.start(&[]);
    agent.ready().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let clone = |id: &str, project: i64, url: &str| {
        json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project, "git_url": url,
            "target_path": format!("{project}_app")})
    };
    agent.publish(&clone("dead", 1, &format!("http://localhost:{port}/app.git"))).await;
    let retries =
        || agent.events("dead").into_iter().filter(|event| event.status == Status::Retrying).collect::<Vec<_>>();
    // More often than it has attempts.
    eventually("it was put off four times", async || retries().len() >= 4).await;
    let attempts: Vec<_> = retries().iter().map(|event| event.attempt).collect();
    assert!(attempts.iter().all(|&attempt| attempt <= 2), "{attempts:?}");
    assert_eq!(agent.terminal_states("dead", 0), []);
    agent.control(&json!({"v": 1, "command": "inspect", "control_id": "c"})).await;
    let hosts = agent.answered("state").await.hosts.unwrap();
    assert_eq!((hosts[0].host.as_str(), hosts[0].paused.as_deref()), ("localhost", Some("down")));
    // Another host, here another port, is as quick as ever.
    let alive = Server::start(upstream.root());
    agent.publish(&clone("alive", 2, &alive.url("app.git"))).await;
    assert_eq!(agent.end("alive", 0).await.status, Status::Succeeded);
    let back = Server::start_at(upstream.root(), port);
    let end = agent.end("dead", 0).await;
    assert_eq!((end.status, end.attempt), (Status::Succeeded, 2), "{}", agent.log());
    assert_whole(&agent.projects().join("1_app"), &head);
    assert!(back.counts().packs == 1 && agent.log().contains("the host is back"), "{}", agent.log());
}
