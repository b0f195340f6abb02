//! Throughput against a bare loop and Celery, and latency.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use lapin::{options::BasicConsumeOptions, types::FieldTable};
use serde_json::Value;

use crate::{
    World,
    agent::Agent,
    log, process,
    report::{Comparison, Series},
    rig::{self, Rig},
    sides,
    spread::Spread,
};

/// Celery gets fewer tasks, or its rounds would be most of the time.
const CELERY_SHARE: u64 = 5;
/// Tasks of which the idle latency is the spread, and the time between two of them.
const IDLE_TASKS: u64 = 400;
const IDLE_PAUSE: Duration = Duration::from_millis(25);
/// How long half of the load lasts.
const LOADED: Duration = Duration::from_secs(10);
/// How often tasks are published under load.
const TICK: Duration = Duration::from_millis(5);

/// Tasks a second through the whole path, with two confirmed events each.
pub(crate) async fn throughput(world: &mut World) {
    let (tasks, size) = (world.arguments.tasks, world.size());
    let place = world.place("throughput");
    let rig = Rig::new().await;
    let python = sides::python();
    let mut haul = Series::new(format!("haul, {} slots, window {}", size.0, size.1));
    let mut bare = Series::new("bare loop (consume, publish, ack)");
    let mut bare_telling = Series::new("the same loop, both events of a task");
    let mut celery = Series::new("Celery, 2 processes, acks late, tells nobody");
    let mut telling = Series::new("the same Celery, tells of begin and end");
    let (mut events, mut seconds) = (0.0, 0.0);
    for round in 0..world.arguments.rounds {
        rig.fill(tasks).await;
        let mut start = rig.agent(Some(&place), log(&place, "agent"), size);
        start.expect = tasks;
        let agent = Agent::start(&start);
        let took: f64 = agent.says("done").parse().expect("it is a number");
        seconds += process::processor_seconds(agent.pid());
        agent.end();
        assert_eq!(rig.ready(&rig.queue()).await, 0, "all tasks are acknowledged");
        events += f64::from(rig.take_events().await);
        haul.rounds.push(tasks as f64 / took * 1e9);
        bare.rounds.push(sides::bare(&rig, tasks, false).await);
        bare_telling.rounds.push(sides::bare(&rig, tasks, true).await);
        if let Some(python) = &python {
            let (tasks, log) = (tasks / CELERY_SHARE, log(&place, "celery"));
            celery.rounds.push(sides::celery(&rig, python, tasks, false, &log).await);
            telling.rounds.push(sides::celery(&rig, python, tasks, true, &log).await);
        }
        let of = |series: &Series| series.rounds.get(round).copied().unwrap_or(f64::NAN);
        let [haul, bare, both, celery, telling] = [&haul, &bare, &bare_telling, &celery, &telling].map(of);
        let round = round + 1;
        eprintln!(
            "round {round}: haul {haul:.0}/s, bare {bare:.0}/s, bare with both events {both:.0}/s, Celery {celery:.0}/s, Celery that tells {telling:.0}/s"
        );
    }
    let all = tasks as f64 * world.arguments.rounds as f64;
    world.fact(format!(
        "throughput: {tasks} tasks a round, {:.2} confirmed events a task, {:.0} µs of the agent's processor time a task",
        events / all,
        seconds / all * 1e6
    ));
    world.measured = Some(haul.median());
    let title = "Tasks that do nothing, durable journal, events confirmed".to_owned();
    let mut series = vec![haul, bare, bare_telling];
    if python.is_some() {
        series.extend([celery, telling]);
    }
    world.report.add(Comparison { name: "messages-throughput".to_owned(), title, series, rate: true });
    rig.remove(std::iter::once(rig::NODE.to_owned())).await;
}

/// From the publishing of a task to the arrival of its `started` event at the master: idle, and at half of the load.
pub(crate) async fn latency(world: &mut World) {
    let place = world.place("latency");
    let rig = Rig::new().await;
    let agent = Agent::start(&rig.agent(Some(&place), log(&place, "agent"), world.size()));
    agent.says("ready");
    let mut listener = Listener::new(&rig).await;
    // The first tasks open channels and files.
    for number in 0..20 {
        let id = rig.publish(rig::NODE, number).await;
        listener.started(&id).await;
    }
    let mut idle = Vec::new();
    for number in 0..IDLE_TASKS {
        tokio::time::sleep(IDLE_PAUSE).await;
        let begun = Instant::now();
        let id = rig.publish(rig::NODE, number).await;
        idle.push((listener.started(&id).await - begun).as_secs_f64() * 1000.0);
    }
    let idle = Spread::of(idle);
    world.fact(format!("latency: publish to started, idle: {idle}"));
    let measured = world.measured.map(|rate| (rate / 2.0) as u64);
    let rate = world.arguments.half_load.or(measured).unwrap_or(2000);
    let loaded = under_load(&rig, listener, rate, || rig::NODE.to_owned()).await;
    world.fact(format!("latency: publish to started, at {rate} tasks a second: {loaded}"));
    agent.end();
    rig.remove(std::iter::once(rig::NODE.to_owned())).await;
}

/// Publishes so many tasks a second for a while, however long they take, and follows all of them.
pub(crate) async fn under_load(
    rig: &Rig,
    mut listener: Listener,
    rate: u64,
    node: impl Fn() -> String + Send + 'static,
) -> Spread {
    let (connection, channel) = rig::connect(&rig.url).await;
    let exchange = rig.names.task();
    let (tell, mut published) = tokio::sync::mpsc::unbounded_channel();
    let publishing = tokio::spawn(async move {
        let (begun, mut sent) = (Instant::now(), 0);
        let mut confirms = Vec::new();
        while begun.elapsed() < LOADED {
            let due = (begun.elapsed().as_secs_f64() * rate as f64) as u64;
            while sent < due {
                let (id, body) = rig::task(sent);
                let _ = tell.send((id, Instant::now()));
                confirms.push(rig::publish(&channel, &exchange, &node(), &body).await);
                sent += 1;
            }
            tokio::time::sleep(TICK).await;
        }
        for confirm in confirms {
            confirm.await.expect("the broker confirms");
        }
        drop(connection);
    });
    let (mut begun, mut started) = (HashMap::new(), HashMap::new());
    let mut open = true;
    while open || begun.len() > started.len() {
        tokio::select! {
            told = published.recv(), if open => match told {
                Some((id, at)) => drop(begun.insert(id, at)),
                None => open = false,
            },
            (id, at) = listener.next_started() => drop(started.insert(id, at)),
        }
    }
    publishing.await.expect("publishing does not panic");
    let took = begun.iter().filter_map(|(id, begun)| Some((*started.get(id)? - *begun).as_secs_f64() * 1000.0));
    Spread::of(took.collect())
}

/// The master's ear.
pub(crate) struct Listener {
    events: lapin::Consumer,
    _connection: lapin::Connection,
}

impl Listener {
    pub(crate) async fn new(rig: &Rig) -> Self {
        let (connection, channel) = rig::connect(&rig.url).await;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let queue = rig.names.master_event();
        let events = channel.basic_consume(queue.into(), "ear".into(), options, FieldTable::default()).await;
        Self { events: events.expect("it is ours"), _connection: connection }
    }

    /// The next `started` event: whose it is, and when it was here.
    pub(crate) async fn next_started(&mut self) -> (String, Instant) {
        loop {
            let delivery = self.events.next().await.expect("the queue is there").expect("the channel is open");
            let at = Instant::now();
            if delivery.properties.kind().as_ref().is_some_and(|kind| kind.as_str() == "event.started") {
                let event: Value = serde_json::from_slice(&delivery.data).expect("an event is JSON");
                return (event["task_id"].as_str().expect("it is text").to_owned(), at);
            }
        }
    }

    /// When a task's `started` event was here.
    pub(crate) async fn started(&mut self, id: &str) -> Instant {
        loop {
            let (of, at) = self.next_started().await;
            if of == id {
                return at;
            }
        }
    }
}
