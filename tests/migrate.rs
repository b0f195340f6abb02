//! `haul topology migrate` against a real broker: queues with wrong arguments are made anew under traffic, also by runs that
//! are killed at every step, and no message is lost.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use haul::{
    broker::{
        Broker as _, Consume, Names, Outgoing, Topology,
        rabbitmq::RabbitMq,
        topology::{Lifetime, Queue},
    },
    doctor::MigrateStep,
    protocol::{
        NodeName, Status,
        wire::{HeaderValue, Message},
    },
};
use serde_json::{Value, json};
use support::{
    agent::Agent,
    command::{Haul, Run},
    eventually,
    rabbit::Rabbit,
    soon, unique,
};

/// The node's statistics are this old at most.
const LAG: &str = "2s";
/// Tasks that wait when the migration begins.
const BACKLOG: usize = 30;

/// The node of this binary; its statistics follow quickly.
async fn rabbit() -> &'static Rabbit {
    static NODE: OnceLock<Option<Rabbit>> = OnceLock::new();
    let launch = || {
        let start = || {
            let rabbit = Rabbit::start(&["collect_statistics_interval = 500"]);
            rabbit.ctl(&["eval", "application:set_env(rabbit, quorum_tick_interval, 500)."]);
            rabbit
        };
        std::panic::catch_unwind(start).ok()
    };
    let node = tokio::task::spawn_blocking(move || NODE.get_or_init(launch).as_ref()).await.unwrap();
    node.expect("the node started; the first test that wanted it says why not")
}

/// Ways in which the queue of the node `a` may have been declared.
fn wrong_queues() -> [(&'static str, Value); 3] {
    [
        ("classic", json!({"x-queue-type": "classic"})),
        (
            "strategy",
            json!({"x-queue-type": "quorum", "x-single-active-consumer": true, "x-overflow": "reject-publish"}),
        ),
        ("limit", json!({"x-queue-type": "quorum", "x-overflow": "reject-publish", "x-delivery-limit": 50})),
    ]
}

/// A broker with a node whose queue is wrong, and a master that never stops publishing to it.
struct Scene {
    haul: Haul,
    names: Names,
    client: Arc<RabbitMq>,
    stop: Arc<AtomicBool>,
    publisher: tokio::task::JoinHandle<Vec<String>>,
    backlog: Vec<String>,
}

impl Scene {
    async fn new(test: &str, arguments: &Value) -> Self {
        let rabbit = rabbit().await;
        let haul = Haul::new(rabbit, test);
        let names = Names::new(haul.prefix.clone());
        let client = Arc::new(rabbit.client().await);
        let mut arguments = arguments.clone();
        if arguments.get("x-delivery-limit").is_some() || arguments["x-queue-type"] == "quorum" {
            arguments["x-dead-letter-exchange"] = json!(names.dlx());
        }
        let own = names.node_topology(&node());
        let wrong = Queue { arguments: table(&arguments), ..own.queues[0].clone() };
        let exchanges = names.shared_topology("").exchanges;
        client.declare(&Topology { exchanges, queues: vec![wrong], bindings: own.bindings }).await.unwrap();
        let mut backlog = Vec::new();
        for number in 0..BACKLOG {
            let id = format!("old-{number}");
            publish(&client, &names.task(), "a", message(&id)).await;
            backlog.push(id);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let publisher = tokio::spawn(keep_publishing(client.clone(), names.task(), stop.clone()));
        Self { haul, names, client, stop, publisher, backlog }
    }

    async fn migrate(&self, more: &[&str]) -> Run {
        let mut command = self.haul.command(&["topology", "migrate", "--lag", LAG]);
        command.args(more);
        tokio::task::spawn_blocking(move || command.output().unwrap().into()).await.unwrap()
    }

    /// The master has seen no refusal, the queue is as it should be, and every message is in it, the old ones first.
    async fn ends_whole(self) -> String {
        self.stop.store(true, Ordering::SeqCst);
        let published = self.publisher.await.expect("a mandatory publish never came back");
        let rabbit = self.haul.rabbit;
        let queue = self.names.node(&node());
        let found = rabbit.api("GET", &format!("queues/%2F/{queue}"), None);
        let wanted = &self.names.node_topology(&node()).queues[0];
        assert_eq!(table(&found["arguments"]), wanted.arguments);
        let bindings = rabbit.api("GET", &format!("queues/%2F/{queue}/bindings"), None);
        let mut sources: Vec<_> =
            bindings.as_array().unwrap().iter().map(|one| one["source"].as_str().unwrap()).collect();
        sources.sort_unstable();
        assert_eq!(sources, ["", self.names.returned().as_str(), self.names.task().as_str()]);
        for kind in ["queues", "exchanges"] {
            let all = rabbit.api("GET", &format!("{kind}/%2F"), None);
            let aside = self.names.migration();
            let names = all.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap());
            // The lock ends with its connection, some time later.
            let lock = format!("{aside}lock");
            let left = names.filter(|name| name.starts_with(&aside) && *name != lock);
            assert_eq!(left.collect::<Vec<_>>(), Vec::<&str>::new());
        }
        let expected: HashSet<_> = self.backlog.iter().chain(&published).cloned().collect();
        let first = first_arrivals(&self.client, &queue, &expected).await;
        assert_eq!(first[..BACKLOG], self.backlog, "what waited is first, and in its order");
        let mut latest = 0;
        let mut late = 0;
        for id in &first[BACKLOG..] {
            let number = published.iter().position(|one| one == id).unwrap();
            late += usize::from(number < latest);
            latest = latest.max(number);
        }
        let told = format!("{}: {} published meanwhile, {late} overtaken", self.haul.prefix, published.len());
        assert!(late * 20 < published.len(), "{told}");
        told
    }
}

/// The queues under a prefix.
fn queues(haul: &Haul) -> Vec<String> {
    let all = haul.api("GET", "queues/%2F", None);
    let names = all.as_array().unwrap().iter().map(|queue| queue["name"].as_str().unwrap());
    // The lock ends with its connection, some time later.
    let ours = |name: &&str| name.starts_with(&haul.name("")) && *name != haul.name("migrate.lock");
    let mut names: Vec<_> = names.filter(ours).map(str::to_owned).collect();
    names.sort();
    names
}

fn node() -> NodeName {
    NodeName::new("a").unwrap()
}

fn table(json: &Value) -> BTreeMap<String, HeaderValue> {
    serde_json::from_value(json.clone()).unwrap()
}

fn message(id: &str) -> Message {
    let mut message =
        Message { body: format!("body of {id}").into(), message_id: Some(id.to_owned()), ..Message::default() };
    message.set("x-haul-round", 3);
    message
}

async fn publish(client: &RabbitMq, exchange: &str, key: &str, message: Message) {
    let outgoing = Outgoing { exchange: exchange.to_owned(), routing_key: key.to_owned(), message, mandatory: true };
    client.publish(outgoing).await.unwrap_or_else(|error| panic!("a publish failed: {error}"));
}

/// One mandatory task after the other; what was confirmed.
async fn keep_publishing(client: Arc<RabbitMq>, exchange: String, stop: Arc<AtomicBool>) -> Vec<String> {
    let mut published = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let id = format!("new-{}", published.len());
        publish(&client, &exchange, "a", message(&id)).await;
        published.push(id);
        // A pace; no effect is waited for.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    published
}

/// The messages of a queue by their first arrival, once all that are expected have come.
async fn first_arrivals(client: &RabbitMq, queue: &str, expected: &HashSet<String>) -> Vec<String> {
    let consume =
        Consume { queue: queue.to_owned(), tag: "test".to_owned(), prefetch: 200, declare: Topology::default() };
    let mut consumer = client.consume(consume).await.unwrap();
    let (mut first, mut seen) = (Vec::new(), HashSet::new());
    while seen.len() < expected.len() {
        let next = tokio::time::timeout(support::PATIENCE, consumer.next()).await;
        let Ok(Some(delivery)) = next else {
            panic!("lost: {:?}", expected.difference(&seen).collect::<Vec<_>>());
        };
        let id = delivery.message.message_id.clone().unwrap();
        assert_eq!(delivery.message.body, format!("body of {id}").as_bytes());
        assert_eq!(delivery.message.headers, message(&id).headers);
        assert_eq!(delivery.routing_key, "a", "the routing key is the node's still");
        assert!(expected.contains(&id), "{id} was never published");
        delivery.ack().await.unwrap();
        if seen.insert(id.clone()) {
            first.push(id);
        }
    }
    first
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_queue_is_made_anew_under_a_master_that_publishes_and_nothing_is_lost() {
    let scenes = stream::iter(wrong_queues()).map(|(name, arguments)| async move {
        let scene = Scene::new(name, &arguments).await;
        let run = scene.migrate(&["--json"]).await.ended(0);
        assert_eq!(run.json()["queues"][0]["outcome"], "migrated", "{run:?}");
        scene.migrate(&[]).await.ended(0);
        println!("{}", scene.ends_whole().await);
    });
    scenes.buffer_unordered(3).collect::<()>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_killed_at_any_step_is_completed_by_the_next_and_nothing_is_lost() {
    let scenes = stream::iter(MigrateStep::ALL).enumerate().map(|(number, step)| async move {
        let (_, arguments) = &wrong_queues()[number % 3];
        let scene = Scene::new(&step.to_string(), arguments).await;
        let killed = scene.migrate(&["--observe", &step.to_string()]).await;
        assert_eq!(killed.code, None, "{killed:?}");
        assert!(killed.err.contains(&format!("killed after step {step}")), "{killed:?}");
        scene.migrate(&[]).await.ended(0);
        println!("{}", scene.ends_whole().await);
    });
    scenes.buffer_unordered(6).collect::<()>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_killed_again_and_again_is_completed_in_the_end() {
    let scene = Scene::new("again", &wrong_queues()[1].1).await;
    for step in
        [MigrateStep::Copied, MigrateStep::Copied, MigrateStep::Drained, MigrateStep::CopiedBack, MigrateStep::Bound]
    {
        let killed = scene.migrate(&["--observe", &step.to_string()]).await;
        assert_eq!(killed.code, None, "{killed:?}");
    }
    scene.migrate(&[]).await.ended(0);
    println!("{}", scene.ends_whole().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_queues_keep_what_they_hold_and_its_way() {
    let haul = Haul::new(rabbit().await, "shared");
    tokio::task::block_in_place(|| haul.apply());
    let names = Names::new(haul.prefix.clone());
    let client = haul.rabbit.client().await;
    let minute = names.retry(Duration::from_mins(1));
    // A retry queue that would hold its copies for a day, results and dead letters as classic queues, and so on.
    tokio::task::block_in_place(|| {
        haul.replace_queue(
            "retry.1m",
            &json!({"x-queue-type": "quorum", "x-message-ttl": 86_400_000, "x-dead-letter-exchange": names.returned(),
                    "x-overflow": "reject-publish", "x-dead-letter-strategy": "at-least-once"}),
        );
        for queue in ["master.event", "dead"] {
            haul.replace_queue(queue, &json!({"x-queue-type": "classic"}));
        }
        haul.replace_queue("control.a", &json!({"x-queue-type": "classic", "x-max-length": 10}));
    });
    let mut letter = message("letter");
    let death = BTreeMap::from([("queue".to_owned(), HeaderValue::from("q"))]);
    letter.set("x-haul-history", "1: network\n2: network");
    letter.headers.insert("x-note".to_owned(), HeaderValue::List(vec![HeaderValue::Table(death)]));
    publish(&client, &minute, "a", message("retry")).await;
    publish(&client, &names.dlx(), "a", letter.clone()).await;
    publish(&client, &names.event(), "a.clone.succeeded", message("event")).await;
    publish(&client, &names.control(), "a", message("command")).await;
    let run = tokio::task::block_in_place(|| haul.run(&["topology", "migrate", "--lag", LAG, "--json"])).ended(0);
    assert_eq!(run.json()["queues"].as_array().unwrap().len(), 4, "{run:?}");
    let plan = tokio::task::block_in_place(|| haul.run(&["topology", "plan", "--json"])).json();
    let other: Vec<_> = plan.as_array().unwrap().iter().filter(|item| item["state"] != "equal").collect();
    assert!(other.is_empty(), "{other:#?}");
    for (queue, key, wanted) in [
        (names.dead(), "a", &letter),
        (names.master_event(), "a.clone.succeeded", &message("event")),
        (names.control_node(&node()), "a", &message("command")),
        (minute.clone(), "a", &message("retry")),
    ] {
        let mut browse = client.browse(&queue).await.unwrap();
        let mut found = browse.next().await.unwrap().unwrap_or_else(|| panic!("{queue} is empty"));
        // The broker's own, at this reading.
        found.message.headers.remove("x-delivery-count");
        assert_eq!((found.routing_key.as_str(), &found.message), (key, wanted), "{queue}");
        found.abandon();
        browse.give_back().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_use_or_could_lose_something_is_left_alone_with_a_sentence() {
    let haul = Haul::new(rabbit().await, "refused");
    tokio::task::block_in_place(|| haul.apply());
    let client = haul.rabbit.client().await;
    tokio::task::block_in_place(|| {
        haul.replace_queue("node.a", &json!({"x-queue-type": "classic"}));
        haul.replace_queue("retry.5s", &json!({"x-queue-type": "quorum", "x-delivery-limit": 2}));
        haul.replace_queue("retry.15s", &json!({"x-queue-type": "stream"}));
        let event = haul.name("event");
        haul.api("DELETE", &format!("exchanges/%2F/{event}"), None);
        haul.api("PUT", &format!("exchanges/%2F/{event}"), Some(json!({"type": "fanout", "durable": true})));
    });
    // The agent is seen on its other queue.
    let consume =
        Consume { queue: haul.name("control.a"), tag: "agent".to_owned(), prefetch: 1, declare: Topology::default() };
    let consumer = client.consume(consume).await.unwrap();
    let before = queues(&haul);
    let run = tokio::task::block_in_place(|| haul.run(&["topology", "migrate", "--lag", LAG])).ended(1);
    for said in [
        "control.a is in use: stop who consumes it",
        "retry.5s is left alone: it drops a message that was delivered 2 times",
        "set_policy",
        "retry.15s is left alone: it is a stream",
        "event is left alone (its type is fanout, not topic): stop masters and agents",
        "haul topology apply --enrolled",
    ] {
        assert!(run.out.contains(said), "{said:?} is not in {}", run.out);
    }
    assert_eq!(queues(&haul), before, "nothing was begun");
    drop(consumer);
    let dry = tokio::task::block_in_place(|| haul.run(&["topology", "migrate", "--dry-run"])).ended(1);
    assert!(dry.out.contains("node.a") && dry.out.contains("made anew"), "{}", dry.out);
    assert_eq!(queues(&haul), before, "a dry run changes nothing");
    haul.configure("http://127.0.0.1:9", "");
    let blind = tokio::task::block_in_place(|| haul.run(&["topology", "migrate"]));
    assert!(blind.code == Some(4) && blind.err.contains("management"), "{blind:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_in_somebody_s_hands_are_waited_for() {
    let haul = Haul::new(rabbit().await, "hands");
    tokio::task::block_in_place(|| haul.apply());
    tokio::task::block_in_place(|| haul.replace_queue("dead", &json!({"x-queue-type": "quorum"})));
    let client = haul.rabbit.client().await;
    publish(&client, &haul.name("dlx"), "a", message("letter")).await;
    let mut browse = client.browse(&haul.name("dead")).await.unwrap();
    let held = browse.next().await.unwrap().unwrap();
    let run = tokio::task::block_in_place(|| haul.run(&["topology", "migrate", "--lag", LAG])).ended(1);
    assert!(run.out.contains("is in use") || run.out.contains("in somebody's hands"), "{run:?}");
    held.abandon();
    browse.give_back().await.unwrap();
    tokio::task::block_in_place(|| haul.run(&["topology", "migrate", "--lag", LAG])).ended(0);
    let mut browse = client.browse(&haul.name("dead")).await.unwrap();
    let letter = browse.next().await.unwrap().expect("the letter is there");
    assert_eq!(letter.message.message_id.as_deref(), Some("letter"));
    letter.abandon();
    browse.give_back().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_starts_in_the_middle_of_a_migration_waits_for_its_end_and_loses_no_task() {
    let rabbit = rabbit().await;
    let mut agent = Agent::new(rabbit).await;
    agent.set("AGENT_BROKER__MANAGEMENT_URL", &rabbit.management_url);
    let own = agent.names.node_topology(agent.node());
    let wrong = Queue {
        name: own.queues[0].name.clone(),
        lifetime: Lifetime::Durable,
        arguments: table(&json!({"x-queue-type": "classic"})),
    };
    agent
        .master
        .declare(&Topology { exchanges: Vec::new(), queues: vec![wrong], bindings: own.bindings })
        .await
        .unwrap();
    let ids: Vec<_> = (0..20).map(|number| format!("task-{number}-{}", unique("m"))).collect();
    let (early, late) = ids.split_at(15);
    for (id, project) in early.iter().zip(1..) {
        agent.publish(&Agent::task(id, "delete", project)).await;
    }
    let migrate = |agent: &Agent, more: &'static [&'static str]| {
        let mut command = agent.command(&["topology", "migrate", "--lag", LAG]);
        command.args(more);
        tokio::task::spawn_blocking(move || Run::from(command.output().unwrap()))
    };
    let killed = migrate(&agent, &["--observe", "deleted"]).await.unwrap();
    assert_eq!(killed.code, None, "{killed:?}");
    // Their queue is gone, and yet the master can publish.
    for (id, project) in late.iter().zip(101..) {
        agent.publish(&Agent::task(id, "delete", project)).await;
    }
    agent.start(&[]);
    agent.until_async("the agent to wait", async || agent.log().contains("our queue is being made anew")).await;
    migrate(&agent, &[]).await.unwrap().ended(0);
    agent.ready().await;
    for id in &ids {
        let event = agent.end(id, 0).await;
        assert_eq!(event.status, Status::Succeeded, "{event:?}");
        assert_eq!(agent.terminal_states(id, 0).len(), 1);
    }
    let queue = agent.names.node(agent.node());
    eventually("the queue is drained", async || {
        soon("the depth", agent.master.depth(&queue)).await.unwrap().is_some_and(|depth| depth.messages == 0)
    })
    .await;
}
