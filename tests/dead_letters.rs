//! Failing upstreams, dead letters and their return, with real agents, the real command and a real RabbitMQ.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

#[path = "support/githttp.rs"]
mod githttp;
mod support;

use std::{collections::BTreeMap, sync::OnceLock, time::Duration};

use githttp::{Behaviour, Server, Upstream};
use haul::{
    broker::Broker as _,
    failure::ErrorClass,
    protocol::{
        Event, NodeName, Status,
        wire::{CONTENT_TYPE, CopyHeaders, Message, header},
    },
};
use jiff::SignedDuration;
use serde_json::{Value, json};
use support::{agent::Agent, rabbit::Rabbit, repository::assert_whole};

/// What a copy may be late: one hop through the shortest delay queue, and what a loaded machine needs for it.
const LATE: SignedDuration = SignedDuration::from_secs(3);

/// The node of this binary.
async fn rabbit() -> &'static Rabbit {
    static NODE: OnceLock<Option<Rabbit>> = OnceLock::new();
    support::logs();
    let launch = || std::panic::catch_unwind(|| Rabbit::start_with_plugins("rabbitmq_shovel")).ok();
    let node = tokio::task::spawn_blocking(move || NODE.get_or_init(launch).as_ref()).await.unwrap();
    node.expect("the node started; the first test that wanted it says why not")
}

/// An upstream with one commit, and its server.
struct Origin {
    repository: Upstream,
    server: Server,
    head: String,
}

impl Origin {
    fn answering(behaviour: Behaviour) -> Self {
        let repository = Upstream::new();
        let head = repository.commit("main", &[("a.txt", "hello\n")]);
        let server = Server::start(repository.root());
        server.behave(behaviour);
        Self { repository, server, head }
    }

    fn clone_task(&self, id: &str, project: i64) -> Value {
        assert!(self.repository.path().exists());
        clone_task(id, project, &self.server.url("app.git"))
    }
}

fn clone_task(id: &str, project: i64, url: &str) -> Value {
    json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project,
           "git_url": url, "target_path": format!("{project}_app")})
}

/// Runs `haul` with the agent's settings; its exit code and the JSON values it printed.
async fn haul(agent: &Agent, arguments: &[&str]) -> (i32, Vec<Value>) {
    let mut command = agent.command(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let printed = serde_json::Deserializer::from_slice(&output.stdout).into_iter().collect::<Result<_, _>>();
    let said = String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), printed.unwrap_or_else(|error| panic!("{arguments:?}: {error}; it said {said}")))
}

/// The events of a task with a status, in order, once each.
fn events(agent: &Agent, id: &str, round: u32, status: Status) -> Vec<Event> {
    let mut events = agent.events(id);
    events.retain(|event| event.round == round && event.status == status);
    events.sort_by_key(|event| event.at);
    events.dedup_by(|one, other| one.event_id == other.event_id);
    events
}

/// When the attempts of a task were due, and that each began then.
fn waits(agent: &Agent, id: &str, round: u32) -> Vec<SignedDuration> {
    let starts = events(agent, id, round, Status::Started);
    let retries = events(agent, id, round, Status::Retrying);
    let seen = agent.events(id);
    assert_eq!(starts.len(), retries.len() + 1, "{id}: {seen:#?}");
    let pairs = retries.iter().zip(&starts[1..]);
    let waits = pairs.map(|(retry, start)| {
        let due = retry.error.as_ref().unwrap().retry_at.unwrap();
        let late = start.at.duration_since(due);
        assert!(!late.is_negative() && late < LATE, "attempt {} came {late} after it was due", start.attempt);
        due.duration_since(retry.at)
    });
    waits.collect()
}

fn seconds(from: f64, to: f64) -> std::ops::RangeInclusive<SignedDuration> {
    // Moments in headers have milliseconds.
    SignedDuration::from_secs_f64(from - 0.1)..=SignedDuration::from_secs_f64(to + 0.1)
}

async fn letters(agent: &Agent) -> BTreeMap<String, Value> {
    let (code, letters) = haul(agent, &["dead", "list", "--json"]).await;
    assert_eq!(code, 0);
    letters.into_iter().map(|letter| (letter["task_id"].as_str().unwrap().to_owned(), letter)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_upstream_is_tried_as_configured_and_dead_lettered_with_its_reasons() {
    let mut agent = Agent::new(rabbit().await).await;
    agent.set("AGENT_RETRY__MAX_ATTEMPTS", "3");
    agent.set("AGENT_RETRY__BASE", "1s");
    agent.set("AGENT_RETRY__CAP", "1500ms");
    agent.start(&[]);
    let ailing = Origin::answering(Behaviour::status(503));
    let throttling = Origin::answering(Behaviour::status(429).header("Retry-After", "2"));
    let missing = Origin::answering(Behaviour::status(404));
    let locked = Origin::answering(Behaviour::status(401));
    let forbidden = Origin::answering(Behaviour::status(403));
    agent.publish(&ailing.clone_task("network", 1)).await;
    agent.publish(&throttling.clone_task("throttled", 2)).await;
    agent.publish(&missing.clone_task("not_found", 3)).await;
    agent.publish(&locked.clone_task("auth", 4)).await;
    agent.publish(&forbidden.clone_task("forbidden", 5)).await;
    // Nobody listens on port 1.
    agent.publish(&clone_task("refused", 6, "http://127.0.0.1:1/app.git")).await;
    let expected = [
        ("network", ErrorClass::Network, 3),
        ("throttled", ErrorClass::Throttled, 3),
        ("not_found", ErrorClass::NotFound, 1),
        ("auth", ErrorClass::Auth, 1),
        ("forbidden", ErrorClass::Forbidden, 1),
        ("refused", ErrorClass::Network, 3),
    ];
    for (id, class, attempts) in expected {
        let end = agent.end(id, 0).await;
        assert_eq!((end.status, end.attempt), (Status::Failed, attempts), "{end:?}");
        assert_eq!(end.error.unwrap().class, class);
        let waits = waits(&agent, id, 0);
        assert_eq!(waits.len(), usize::try_from(attempts).unwrap() - 1);
        // Exponential and capped, with a quarter of jitter; a Retry-After comes on top.
        let asked = if id == "throttled" { 2.0 } else { 0.0 };
        for (wait, base) in waits.iter().zip([1.0, 1.5]) {
            let due = seconds(base * 0.75 + asked, base * 1.25 + asked);
            assert!(due.contains(wait), "{id}: {wait} is not in {due:?}");
        }
        assert_eq!(agent.terminal_states(id, 0).len(), 1);
    }
    agent.dead_letters(6).await;
    let letters = letters(&agent).await;
    for (id, class, attempts) in expected {
        let letter = &letters[id];
        assert_eq!((&letter["class"], &letter["attempts"]), (&json!(class.as_str()), &json!(attempts)), "{letter}");
        assert_eq!((&letter["node"], &letter["kind"], &letter["round"]), (&json!("n1"), &json!("clone"), &json!(1)));
        assert_eq!(letter["history"].as_array().unwrap().len(), usize::try_from(attempts).unwrap(), "{letter}");
    }
    assert!(letters["network"]["error"].as_str().unwrap().contains("503"), "{letters:?}");
    let (_, shown) = haul(&agent, &["dead", "show", "network", "--json"]).await;
    let headers = &shown[0]["headers"];
    for (name, value) in [
        (header::ERROR_CLASS, json!("network")),
        (header::ATTEMPTS, json!(3)),
        (header::NODE, json!("n1")),
        (header::ROUND, json!(1)),
        (header::PROJECT, json!(1)),
    ] {
        assert_eq!(headers[name], value, "{name} in {headers}");
    }
    assert_eq!(headers[header::HISTORY].as_str().unwrap().lines().count(), 3, "{headers}");
    assert!(headers.get(header::ATTEMPT).is_none() && headers.get("x-death").is_none(), "{headers}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_by_task_some_by_class_and_all_are_replayed_by_the_command() {
    let mut agent = Agent::new(rabbit().await).await;
    agent.set("AGENT_RETRY__MAX_ATTEMPTS", "1");
    agent.start(&[]);
    let origins: Vec<_> =
        [404, 404, 401, 403, 503, 503].map(|status| Origin::answering(Behaviour::status(status))).into();
    let ids = ["lost-1", "lost-2", "locked", "forbidden", "ailing-1", "ailing-2"];
    for (project, (id, origin)) in (1..).zip(ids.iter().zip(&origins)) {
        agent.publish(&origin.clone_task(id, project)).await;
    }
    for id in ids {
        assert_eq!(agent.end(id, 0).await.status, Status::Failed);
    }
    agent.dead_letters(6).await;
    let (code, told) = haul(&agent, &["dead", "replay", "--all", "--dry-run", "--json"]).await;
    assert_eq!((code, told.len()), (0, 6), "{told:?}");
    agent.dead_letters(6).await;
    for origin in &origins {
        origin.server.behave(Behaviour::Serve);
    }
    for (arguments, meant) in [
        (&["--task", "locked"][..], &["locked"][..]),
        (&["--class", "not_found"], &["lost-1", "lost-2"]),
        (&["--all"], &["forbidden", "ailing-1", "ailing-2"]),
    ] {
        let (code, told) = haul(&agent, &[&["dead", "replay", "--json"], arguments].concat()).await;
        assert_eq!(code, 0, "{told:?}");
        let mut replayed: Vec<_> = told.iter().map(|letter| letter["task_id"].as_str().unwrap()).collect();
        assert!(told.iter().all(|letter| letter["outcome"] == "replayed"), "{told:?}");
        let mut meant = meant.to_vec();
        replayed.sort_unstable();
        meant.sort_unstable();
        assert_eq!(replayed, meant);
        for id in meant {
            let end = agent.end(id, 1).await;
            assert_eq!(end.status, Status::Succeeded, "{end:?}");
        }
    }
    for (project, origin) in (1..).zip(&origins) {
        assert_whole(&agent.projects().join(format!("{project}_app")), &origin.head);
    }
    assert!(letters(&agent).await.is_empty());
    for id in ids {
        assert_eq!((agent.terminal_states(id, 0).len(), agent.terminal_states(id, 1).len()), (1, 1), "{id}");
    }
}

/// How a person moves messages from one queue to another.
#[derive(Clone, Copy)]
enum Move {
    /// A client of their own that publishes what it read, as it is, to the queue's name.
    DefaultExchange,
    /// The console's "Move messages", which is a shovel.
    Shovel,
}

impl Move {
    async fn all(self, rabbit: &'static Rabbit, agent: &Agent, queue: &str) {
        let dead = agent.names.dead();
        match self {
            Self::DefaultExchange => {
                let mut browse = agent.master.browse(&dead).await.unwrap();
                while let Some(letter) = browse.next().await.unwrap() {
                    let message = letter.message.clone();
                    agent.put("", queue, message).await;
                    letter.ack().await.unwrap();
                }
                browse.give_back().await.unwrap();
            }
            Self::Shovel => {
                let name = format!("Move from {dead}");
                let shovel = json!({
                    "src-protocol": "amqp091", "src-uri": "amqp:///%2f", "src-queue": dead,
                    "src-prefetch-count": 1000, "src-delete-after": "queue-length",
                    "dest-protocol": "amqp091", "dest-uri": "amqp:///%2f", "dest-queue": queue,
                    "dest-add-forward-headers": false, "ack-mode": "on-confirm",
                });
                let set = move || rabbit.ctl(&["set_parameter", "shovel", &name, &shovel.to_string()]);
                tokio::task::spawn_blocking(set).await.unwrap();
            }
        }
    }
}

async fn moved_with_letters_of_two_nodes_mixed(how: Move) {
    let rabbit = rabbit().await;
    let mut near = Agent::new(rabbit).await;
    near.set("AGENT_RETRY__MAX_ATTEMPTS", "3");
    near.set("AGENT_RETRY__BASE", "1s");
    let mut far = near.neighbour("n2");
    near.start(&[]);
    far.start(&[]);
    let origins = [404, 404, 404].map(|status| Origin::answering(Behaviour::status(status)));
    let [mine, theirs, flaky] = &origins;
    far.publish(&theirs.clone_task("theirs", 2)).await;
    near.publish(&mine.clone_task("mine", 1)).await;
    far.publish(&flaky.clone_task("flaky", 3)).await;
    near.dead_letters(3).await;
    mine.server.behave(Behaviour::Serve);
    theirs.server.behave(Behaviour::Serve);
    flaky.server.behave(Behaviour::status(503));
    how.all(rabbit, &near, &near.names.node(near.node())).await;
    // It fails again where it belongs, and its copy comes back there through the delay queues.
    let retrying = near.saw("flaky", Status::Retrying).await;
    assert_eq!((retrying.round, retrying.node.as_str()), (1, "n2"));
    flaky.server.behave(Behaviour::Serve);
    for (id, node, agent, project, origin) in
        [("mine", "n1", &near, 1, mine), ("theirs", "n2", &far, 2, theirs), ("flaky", "n2", &far, 3, flaky)]
    {
        let end = near.end(id, 1).await;
        assert_eq!((end.status, end.node.as_str()), (Status::Succeeded, node), "{end:?}");
        assert_whole(&agent.projects().join(format!("{project}_app")), &origin.head);
        assert_eq!(near.terminal_states(id, 1).len(), 1);
        assert!(near.events(id).iter().all(|event| event.node.as_str() == node));
    }
    assert!(near.end("flaky", 1).await.attempt >= 2);
    near.dead_letters(0).await;
    near.drained().await;
    far.drained().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_of_two_nodes_moved_through_the_default_exchange_succeed_where_they_belong() {
    moved_with_letters_of_two_nodes_mixed(Move::DefaultExchange).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_of_two_nodes_moved_by_the_console_succeed_where_they_belong() {
    moved_with_letters_of_two_nodes_mixed(Move::Shovel).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_dead_node_never_delays_anothers_retries() {
    let delay = Duration::from_secs(5);
    let mut agent = Agent::new(rabbit().await).await;
    agent.set("AGENT_RETRY__BASE", "7s");
    agent.start(&[]);
    agent.ready().await;
    // Another node is enrolled and has forty copies in the queue that our retry will use; then its queue is deleted.
    let gone = NodeName::new("gone").unwrap();
    let queue = agent.names.node(&gone);
    agent.master.declare(&agent.names.node_topology(&gone)).await.unwrap();
    for n in 0..40 {
        let id = format!("gone-{n}");
        let mut message = Message {
            body: clone_task(&id, n, "http://127.0.0.1:1/app.git").to_string().into(),
            content_type: Some(CONTENT_TYPE.to_owned()),
            message_id: Some(id),
            type_: Some("task.clone".to_owned()),
            ..Message::default()
        };
        message.set(header::NODE, gone.as_str());
        message.set(header::ATTEMPT, 2);
        agent.put(&agent.names.retry(delay), gone.as_str(), message).await;
    }
    let waiting = agent.names.retry(delay);
    agent
        .until_async("the copies to wait", async || {
            agent.master.depth(&waiting).await.unwrap().is_some_and(|depth| depth.messages == 40)
        })
        .await;
    let rabbit = rabbit().await;
    tokio::task::spawn_blocking(move || rabbit.ctl(&["delete_queue", &queue])).await.unwrap();
    // Between 5 and 9 seconds: through the same delay queue, behind all forty.
    let origin = Origin::answering(Behaviour::status(503));
    agent.publish(&origin.clone_task("mine", 1)).await;
    agent.saw("mine", Status::Retrying).await;
    let depth = agent.master.depth(&waiting).await.unwrap().unwrap();
    assert!(depth.messages > 0, "they wait still");
    origin.server.behave(Behaviour::Serve);
    let end = agent.end("mine", 0).await;
    assert_eq!((end.status, end.attempt), (Status::Succeeded, 2), "{end:?}");
    // That the second attempt began when it was due is checked here.
    assert!(seconds(5.25, 8.75).contains(&waits(&agent, "mine", 0)[0]));
    agent.dead_letters(40).await;
    let mut browse = agent.master.browse(&agent.names.dead()).await.unwrap();
    while let Some(letter) = browse.next().await.unwrap() {
        let owner = CopyHeaders::read(&letter.message.headers).node;
        letter.abandon();
        assert_eq!(owner, Some(gone.clone()));
    }
    browse.give_back().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_finds_an_agents_broker_in_order_once_its_policies_are_applied() {
    let rabbit = rabbit().await;
    let mut agent = Agent::new(rabbit).await;
    agent.set("AGENT_BROKER__MANAGEMENT_URL", &rabbit.management_url);
    agent.start(&[]);
    agent.ready().await;
    // Limits of a broker's own, from 4.0, are lifted by policies, which no agent may set: an administrator does, once.
    let mended = |finding: &Value| finding["mend"].as_str().unwrap().starts_with("rabbitmqctl set_policy");
    let (_, findings) = haul(&agent, &["topology", "doctor", "--json"]).await;
    let findings = findings[0].as_array().unwrap();
    let mut reds = findings.iter().filter(|finding| finding["severity"] == "red");
    assert!(reds.all(mended), "{findings:#?}");
    let (code, applied) = haul(&agent, &["topology", "apply", "--json"]).await;
    assert_eq!(code, 0, "{applied:#?}");
    let (code, findings) = haul(&agent, &["topology", "doctor", "--json"]).await;
    let findings = findings[0].as_array().unwrap();
    assert_eq!(code, 0, "{findings:#?}");
    // What a broker older than the one that is recommended is told, and that alone.
    let known = |finding: &Value| finding["severity"] == "yellow" && finding["subject"] == "broker";
    assert!(findings.iter().all(known), "{findings:#?}");
}
