//! The broker's view of our consumer against our own: what the broker dropped, starves or gives to another is noticed
//! within ten seconds, shown, and mended where a new consumer mends it.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

#[path = "support/githttp.rs"]
mod githttp;
mod support;

use std::time::{Duration, Instant};

use githttp::{Behaviour, Server, Upstream};
use haul::{
    broker::{Broker as _, Consume, Consumer, Topology},
    protocol::{ControlAnswer, Status},
};
use serde_json::json;
use support::{
    agent::Agent,
    pipeline::{Pipeline, Script, clone_task},
    proxy::Proxy,
    rabbit::Rabbit,
    repository::Repository,
};

/// What is promised.
const NOTICED: Duration = Duration::from_secs(10);

async fn rabbit() -> &'static Rabbit {
    tokio::task::spawn_blocking(Rabbit::shared).await.unwrap()
}

/// Takes the consumer out of a quorum queue: the queue forgets it, and nobody else hears of that.
async fn take_out_consumer(rabbit: &'static Rabbit, queue: String) {
    let erlang = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)), \
         Leader = amqqueue:get_pid(Q), \
         {{ok, {{_, Consumers}}, _}} = try ra:leader_query(Leader, {{rabbit_fifo, query_consumers, []}}) \
         catch _:_ -> ra:leader_query(Leader, fun rabbit_fifo:query_consumers/1) end, \
         [begin Id = {{element(2, C), element(1, C)}}, \
          {{ok, _, _}} = ra:process_command(Leader, rabbit_fifo:make_checkout(Id, cancel, #{{}})) end \
         || C <- maps:values(Consumers)], length(maps:values(Consumers))."
    );
    let said = tokio::task::spawn_blocking(move || rabbit.ctl(&["eval", &erlang])).await.unwrap();
    assert_eq!(said.trim(), "1", "one consumer was taken out");
}

/// How often the agent made its consumer anew.
fn rebuilds(agent: &Agent) -> usize {
    agent.log().matches(r#""message":"consuming anew""#).count()
}

async fn says(agent: &Agent, what: &str) {
    agent.until_async(what, async || agent.log().contains(what)).await;
}

/// How the agent says that it is, when asked.
async fn state(agent: &Agent, control_id: &str) -> ControlAnswer {
    agent.control(&json!({"v": 1, "command": "inspect", "control_id": control_id})).await;
    loop {
        let answer = agent.answered("state").await;
        if answer.control_id.as_deref() == Some(control_id) {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_taken_out_of_an_idle_queue_is_noticed_and_made_anew() {
    let rabbit = rabbit().await;
    let (mut agent, upstream) = (Agent::new(rabbit).await, Repository::new());
    agent.start(&[]);
    agent.ready().await;
    agent.consuming().await;
    let queue = agent.names.node(agent.node());
    take_out_consumer(rabbit, queue.clone()).await;
    let taken = Instant::now();
    assert_eq!(agent.master.depth(&queue).await.unwrap().unwrap().consumers, 0);
    agent.consuming().await;
    println!("consumed again after {:?}", taken.elapsed());
    assert!(taken.elapsed() < NOTICED, "{:?}", taken.elapsed());
    says(&agent, "the broker has no consumer of ours").await;
    says(&agent, r#""message":"readiness","ready":false"#).await;
    says(&agent, "the broker serves our consumer again").await;
    agent.publish(&Agent::clone_task("t", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("t", 0).await.status, Status::Succeeded);
    assert_eq!(state(&agent, "after").await.ready, Some(true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_lives_on_as_a_ghost_is_noticed_by_what_it_does_not_get() {
    let rabbit = rabbit().await;
    let (repository, other) = (Upstream::new(), Repository::new());
    repository.commit("main", &[("a.txt", "hello\n")]);
    let upstream = Server::start(repository.root());
    upstream.behave(Behaviour::HoldPack);
    let mut agent = Agent::new(rabbit).await;
    agent.set("AGENT_SLOTS", "4");
    agent.start(&[]);
    agent.ready().await;
    agent
        .publish(&json!({"v": 1, "task_id": "held", "kind": "clone", "project_id": 1,
                          "git_url": upstream.url("app.git"), "target_path": "1_app"}))
        .await;
    agent.saw("held", Status::Started).await;
    // The held delivery keeps the consumer in the broker's books, where it gets nothing any more.
    let queue = agent.names.node(agent.node());
    take_out_consumer(rabbit, queue.clone()).await;
    assert_eq!(agent.master.depth(&queue).await.unwrap().unwrap().consumers, 1);
    let published = Instant::now();
    agent.publish(&Agent::clone_task("starved", 2, &other, "2_app")).await;
    assert_eq!(agent.end("starved", 0).await.status, Status::Succeeded);
    println!("done after {:?}", published.elapsed());
    assert!(published.elapsed() < NOTICED, "{:?}", published.elapsed());
    says(&agent, "and the broker delivers none").await;
    upstream.behave(Behaviour::Serve);
    assert_eq!(agent.end("held", 0).await.status, Status::Succeeded);
    agent.drained().await;
    let starts = agent.events("held").into_iter().filter(|event| event.status == Status::Started).count();
    assert_eq!((starts, upstream.counts().packs), (1, 1), "it ran on and was not run again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consuming_connection_that_stalls_makes_the_agent_not_ready_until_it_is_back() {
    let rabbit = rabbit().await;
    let proxy = Proxy::start(rabbit).await;
    let mut agent = Agent::new(rabbit).await;
    agent.set("AGENT_AMQP_URL", &proxy.url);
    agent.set("AGENT_BROKER__HEARTBEAT", "1s");
    agent.start(&[]);
    agent.ready().await;
    proxy.stall();
    let (stalled, before) = (Instant::now(), agent.log().len());
    let readiness = |ready: bool| format!(r#""message":"readiness","ready":{ready}"#);
    let turned = async |ready: bool| {
        let line = readiness(ready);
        agent.until_async(&line, async || agent.log()[before..].contains(&line)).await;
    };
    turned(false).await;
    turned(true).await;
    assert!(stalled.elapsed() < NOTICED, "{:?}", stalled.elapsed());
}

/// A consumer of the agent's queue that was there first.
async fn rival(agent: &Agent) -> Consumer {
    let names = &agent.names;
    agent.master.declare(&names.node_topology(agent.node())).await.unwrap();
    let queue = names.node(agent.node());
    let consume = Consume { queue, tag: "rival".to_owned(), prefetch: 10, declare: Topology::default() };
    let rival = agent.master.consume(consume).await.unwrap();
    agent.consuming().await;
    rival
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rival_that_is_served_is_told_of_and_not_fought() {
    let mut agent = Agent::new(rabbit().await).await;
    let (rival, upstream) = (rival(&agent).await, Repository::new());
    agent.start(&["--force"]);
    says(&agent, "another consumer has the queue: an agent of the same name elsewhere").await;
    let first = Instant::now();
    agent.until_async("the third rebuild", async || rebuilds(&agent) >= 3).await;
    assert!(first.elapsed() > Duration::from_secs(4), "three rebuilds within {:?}", first.elapsed());
    assert!(!agent.log().contains(r#""message":"readiness","ready":true"#), "{}", agent.log());
    let said = state(&agent, "behind").await;
    assert_eq!((said.ready, said.consuming), (Some(false), Some(false)));
    assert!(said.not_ready.unwrap().concat().contains("another consumer has the queue"));
    drop(rival);
    agent.publish(&Agent::clone_task("t", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("t", 0).await.status, Status::Succeeded);
    agent.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_management_url_a_rival_is_named_and_no_consumer_is_made_anew_for_it() {
    let rabbit = rabbit().await;
    let mut agent = Agent::new(rabbit).await;
    let rival = rival(&agent).await;
    agent.set("AGENT_BROKER__MANAGEMENT_URL", &rabbit.management_url);
    agent.start(&["--force"]);
    says(&agent, "another consumer has the queue: rival-1 on connection ").await;
    let known = rebuilds(&agent);
    let said = state(&agent, "behind").await;
    assert!(said.not_ready.unwrap().concat().contains("rival-1 on connection "));
    drop(rival);
    agent.ready().await;
    assert!(rebuilds(&agent) <= known + 1, "{}", agent.log());
}

/// The same rules on the broker in memory, where hours pass at once.
mod memory {
    use super::*;

    const QUEUE: &str = "haul.node.n1";

    #[tokio::test(start_paused = true)]
    async fn a_consumer_that_the_broker_forgot_is_made_anew() {
        let pipeline = Pipeline::start().await;
        pipeline.until_ready(true).await;
        for queue in [QUEUE, "haul.control.n1"] {
            pipeline.broker.drop_consumers(queue);
            let dropped = tokio::time::Instant::now();
            pipeline.until_ready(false).await;
            pipeline.until_ready(true).await;
            assert!(dropped.elapsed() < NOTICED, "{queue}: {:?}", dropped.elapsed());
        }
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.ends("t", Status::Succeeded).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_consumer_that_is_given_nothing_is_made_anew_and_what_runs_goes_on() {
        let pipeline = Pipeline::start().await;
        pipeline.until_ready(true).await;
        pipeline.script("runs", [Script::Take(Duration::from_mins(5))]);
        pipeline.publish(&clone_task("runs", 1)).await;
        pipeline.saw("runs", Status::Started).await;
        pipeline.broker.serve_consumers(QUEUE, false);
        let starved = tokio::time::Instant::now();
        pipeline.publish(&clone_task("t", 2)).await;
        pipeline.ends("t", Status::Succeeded).await;
        assert!(starved.elapsed() < NOTICED, "{:?}", starved.elapsed());
        pipeline.ends("runs", Status::Succeeded).await;
        assert_eq!(pipeline.executions("runs"), 1);
        pipeline.drained().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_queue_is_not_looked_at_and_a_full_window_is_no_fault() {
        let pipeline = Pipeline::start().await;
        pipeline.until_ready(true).await;
        let (looks, sessions) = pipeline.broker.looks_and_sessions(QUEUE);
        for number in 0..100 {
            pipeline.publish(&clone_task(&format!("t{number}"), number)).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(pipeline.broker.looks_and_sessions(QUEUE), (looks, sessions));
        for number in 100..200 {
            pipeline.script(&format!("t{number}"), [Script::Take(Duration::from_mins(3))]);
            pipeline.publish(&clone_task(&format!("t{number}"), number)).await;
        }
        tokio::time::sleep(Duration::from_mins(30)).await;
        let (looked, since) = pipeline.broker.looks_and_sessions(QUEUE);
        assert_eq!(since, sessions, "nothing was taken for a fault");
        assert!(looked - looks < 700, "{looked} looks");
    }

    /// Puts a rival before the agent: it comes while the agent is paused.
    async fn behind_a_rival(tell: bool) -> (Pipeline, Consumer) {
        let pipeline = Pipeline::start().await;
        pipeline.broker.tell_consumers(tell);
        pipeline.until_ready(true).await;
        pipeline.control(json!({"v": 1, "command": "pause"})).await;
        pipeline.until_ready(false).await;
        let queue = QUEUE.to_owned();
        let consume = Consume { queue, tag: "rival".to_owned(), prefetch: 10, declare: Topology::default() };
        let rival = pipeline.broker.consume(consume).await.unwrap();
        pipeline.control(json!({"v": 1, "command": "resume"})).await;
        pipeline.answered("resumed").await;
        (pipeline, rival)
    }

    async fn reasons(pipeline: &Pipeline) -> String {
        pipeline.control(json!({"v": 1, "command": "inspect"})).await;
        let state = pipeline.answered("state").await;
        assert_eq!(state.ready, Some(false));
        state.not_ready.unwrap().concat()
    }

    #[tokio::test(start_paused = true)]
    async fn behind_a_rival_the_agent_is_not_ready_and_tries_ever_more_rarely() {
        let (pipeline, rival) = behind_a_rival(false).await;
        let (_, before) = pipeline.broker.looks_and_sessions(QUEUE);
        tokio::time::sleep(Duration::from_mins(10)).await;
        let (_, after) = pipeline.broker.looks_and_sessions(QUEUE);
        assert!((5..16).contains(&(after - before)), "{} sessions in ten minutes", after - before);
        assert!(reasons(&pipeline).await.contains("an agent of the same name elsewhere"));
        drop(rival);
        pipeline.until_ready(true).await;
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.ends("t", Status::Succeeded).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_rival_whom_the_broker_names_is_waited_for_in_line() {
        let (pipeline, rival) = behind_a_rival(true).await;
        tokio::time::sleep(Duration::from_secs(10)).await;
        let (_, before) = pipeline.broker.looks_and_sessions(QUEUE);
        assert!(reasons(&pipeline).await.contains("rival-"));
        tokio::time::sleep(Duration::from_mins(10)).await;
        assert_eq!(pipeline.broker.looks_and_sessions(QUEUE).1, before);
        drop(rival);
        pipeline.until_ready(true).await;
        assert_eq!(pipeline.broker.looks_and_sessions(QUEUE).1, before);
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.ends("t", Status::Succeeded).await;
    }
}
