//! `haul topology users`: a real agent, a master and an operator do their work with exactly the permissions that it prints,
//! and none of them can do more.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::BTreeMap,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use haul::{
    broker::{
        Broker as _, BrokerError, Consume, Outgoing, PublishError, Topology,
        rabbitmq::RabbitMq,
        topology::{Binding, Lifetime, Queue},
    },
    protocol::{NodeName, Status, wire::Message},
};
use serde_json::json;
use support::{
    agent::{Agent, broker_settings},
    command::Run,
    rabbit::Rabbit,
    repository::Repository,
};

/// The broker of this binary, and a directory that it can see.
struct Site {
    rabbit: Rabbit,
    directory: PathBuf,
}

async fn site() -> &'static Site {
    static SITE: OnceLock<Option<Site>> = OnceLock::new();
    let launch = || {
        let start = || {
            let directory = Rabbit::directory();
            Site { rabbit: Rabbit::start_in(directory.clone(), &[]), directory }
        };
        std::panic::catch_unwind(start).ok()
    };
    let site = tokio::task::spawn_blocking(move || SITE.get_or_init(launch).as_ref()).await.unwrap();
    site.expect("the node started; the first test that wanted it says why not")
}

impl Site {
    /// A directory with a `rabbitmqctl` that speaks to this broker.
    fn tools(&self) -> PathBuf {
        let tools = self.directory.join("tools");
        std::fs::create_dir_all(&tools).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/rabbitmq");
        let text = format!("#!/bin/sh\nexec '{}' ctl '{}' \"$@\"\n", script.display(), self.directory.display());
        let path = tools.join(format!("rabbitmqctl-{}", uuid::Uuid::new_v4().simple()));
        // Renamed into place, since another test may run it.
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&path, tools.join("rabbitmqctl")).unwrap();
        tools
    }

    /// Runs a script of commands as an operator would on the broker's machine.
    fn sh(&self, script: &Path) {
        let path = format!("{}:{}", self.tools().display(), std::env::var("PATH").unwrap());
        let mut command = Command::new("sh");
        command.arg("-e").arg(script).env("PATH", path).stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The broker's address for another user.
    fn url(&self, user: &str, password: &str) -> String {
        self.rabbit.url.replace("guest:guest@", &format!("{user}:{password}@"))
    }
}

fn run(mut command: Command) -> Run {
    command.stdin(Stdio::null()).output().unwrap().into()
}

/// What is in a file of passwords.
fn passwords(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap();
    let pair = |line: &str| line.split_once(' ').map(|(user, password)| (user.to_owned(), password.to_owned()));
    text.lines().map(|line| pair(line).unwrap()).collect()
}

async fn client(url: &str) -> RabbitMq {
    RabbitMq::connect(&broker_settings(url), "haul test").await.unwrap()
}

/// A publish that the broker refuses to this user.
async fn cannot_publish(client: &RabbitMq, exchange: &str, routing_key: &str) {
    let message = Message { body: "{}".into(), ..Message::default() };
    let outgoing =
        Outgoing { exchange: exchange.to_owned(), routing_key: routing_key.to_owned(), message, mandatory: true };
    let refused = client.publish(outgoing).await.unwrap_err();
    let is_refusal = matches!(&refused, PublishError::Forbidden { reason, .. } if reason.contains("ACCESS_REFUSED"));
    assert!(is_refusal, "{exchange} {routing_key}: {refused:?}");
}

#[track_caller]
fn refused<T>(what: &str, answer: Result<T, BrokerError>) {
    match answer {
        Ok(_) => panic!("{what} was allowed"),
        Err(BrokerError::Refused { reason, .. }) if reason.contains("ACCESS_REFUSED") => {}
        Err(other) => panic!("{what}: {other:?}"),
    }
}

async fn cannot_read(client: &RabbitMq, queue: &str) {
    let consume = Consume { queue: queue.to_owned(), tag: "spy".to_owned(), prefetch: 1, declare: Topology::default() };
    refused(queue, client.consume(consume).await);
    let browsed = match client.browse(queue).await {
        Ok(mut browse) => browse.next().await.map(drop),
        Err(error) => Err(error),
    };
    refused(queue, browsed);
}

async fn cannot_make(client: &RabbitMq, queue: &str, bindings: Vec<Binding>) {
    let queue = Queue { name: queue.to_owned(), lifetime: Lifetime::Durable, arguments: BTreeMap::new() };
    let queues = if bindings.is_empty() { vec![queue] } else { Vec::new() };
    refused("a declaration", client.declare(&Topology { exchanges: Vec::new(), queues, bindings }).await);
}

async fn cannot_remove(client: &RabbitMq, queues: &[String], exchanges: &[String]) {
    let admin = client.admin().await.unwrap();
    for queue in queues {
        refused(queue, admin.remove_queue(queue, false).await);
    }
    for exchange in exchanges {
        refused(exchange, admin.remove_exchange(exchange).await);
    }
    admin.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_a_master_and_an_operator_do_their_work_with_what_is_printed_and_no_more() {
    let site = site().await;
    let mut agent = Agent::new(&site.rabbit).await;
    agent.set("AGENT_BROKER__MANAGEMENT_URL", &site.rabbit.management_url);
    agent.set("AGENT_RETRY__MAX_ATTEMPTS", "2");
    agent.set("AGENT_RETRY__CAP", "1s");
    let (names, prefix) = (agent.names.clone(), agent.names.prefix().to_owned());
    let other = NodeName::new("n2").unwrap();
    agent.master.declare(&names.node_topology(&other).and(names.control_topology(&other))).await.unwrap();

    // Printed as commands, run as they are.
    let (file, script) =
        (site.directory.join(format!("{prefix}.passwords")), site.directory.join(format!("{prefix}.sh")));
    let words = ["topology", "users", "--node", "n1", "--master", "--operator", "--passwords", file.to_str().unwrap()];
    let printed = run(agent.command(&words)).ended(0);
    std::fs::write(&script, &printed.out).unwrap();
    let passwords = passwords(&file);
    assert!(passwords.values().all(|password| !printed.out.contains(password)), "{}", printed.out);
    tokio::task::block_in_place(|| site.sh(&script));
    let url = |role: &str| {
        let user = format!("{prefix}-{role}");
        site.url(&user, &passwords[&user])
    };

    // The node is not enrolled, and may not enrol itself.
    agent.set("AGENT_AMQP_URL", &url("node-n1"));
    agent.start(&[]);
    assert_eq!(agent.ended().await.code(), Some(3), "{}", agent.log());
    assert!(agent.log().contains("haul topology apply"), "{}", agent.log());
    // The operator enrols it, and sets the policies.
    let operator_url = url("operator");
    let operator = |agent: &Agent, words: &[&str]| {
        let mut command = agent.command(words);
        command.env("AGENT_AMQP_URL", &operator_url);
        tokio::task::block_in_place(|| run(command))
    };
    operator(&agent, &["topology", "apply", "--node", "n1"]).ended(0);
    let doctor = operator(&agent, &["topology", "doctor", "--node", "n1", "--json"]).json();
    let blind = doctor
        .as_array()
        .unwrap()
        .iter()
        .filter(|one| one["severity"] == "red" || one["problem"].as_str().unwrap().contains("could not be"));
    assert_eq!(blind.count(), 0, "{doctor:#}");
    agent.start(&[]);
    agent.ready().await;

    // The master's part, with the master's user.
    let guest = std::mem::replace(&mut agent.master, std::sync::Arc::new(client(&url("master")).await));
    let upstream = Repository::new();
    agent.publish(&Agent::clone_task("clone", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("clone", 0).await.status, Status::Succeeded);
    agent.publish(&Agent::task("pull", "pull", 1)).await;
    assert_eq!(agent.end("pull", 0).await.status, Status::Succeeded);
    let mut nowhere = Agent::clone_task("nowhere", 2, &upstream, "2_app");
    nowhere["git_url"] = json!("http://127.0.0.1:9/app.git");
    agent.publish(&nowhere).await;
    agent.saw("nowhere", Status::Retrying).await;
    assert_eq!(agent.end("nowhere", 0).await.status, Status::Failed);
    agent
        .until_async("the dead letter", async || {
            guest.depth(&names.dead()).await.unwrap().is_some_and(|depth| depth.messages == 1)
        })
        .await;
    agent.control(&json!({"v": 1, "command": "inspect"})).await;
    agent.answered("state").await;
    agent.control(&json!({"v": 1, "command": "cancel", "task_id": "later"})).await;
    agent.answered("pending").await;
    agent.publish(&Agent::task("later", "pull", 1)).await;
    assert_eq!(agent.end("later", 0).await.status, Status::Cancelled);
    // A task of another node, moved into this one's queue in the console, is forwarded.
    let mut astray = Message { body: Agent::task("astray", "pull", 1).to_string().into(), ..Message::default() };
    astray.content_type = Some("application/json".to_owned());
    astray.set("x-haul-node", "n2");
    let outgoing =
        Outgoing { exchange: String::new(), routing_key: names.node(agent.node()), message: astray, mandatory: true };
    guest.publish(outgoing).await.unwrap();
    agent
        .until_async("the forwarded task", async || {
            guest.depth(&names.node(&other)).await.unwrap().is_some_and(|depth| depth.messages == 1)
        })
        .await;
    let mut wait = agent.command(&["submit", "pull", "--node", "n1", "--project-id", "1", "--wait"]);
    wait.env("AGENT_AMQP_URL", url("master"));
    tokio::task::block_in_place(|| run(wait)).ended(0);
    // The operator's part.
    let listed = operator(&agent, &["dead", "list", "--json"]).ended(0);
    assert!(listed.out.contains("nowhere"), "{}", listed.out);
    operator(&agent, &["dead", "replay", "--all", "--dry-run"]).ended(0);
    operator(&agent, &["dead", "drop", "--task", "nowhere", "--yes"]).ended(0);
    operator(&agent, &["inspect", "--node", "n1"]).ended(0);

    // What a node cannot do.
    let node = client(&url("node-n1")).await;
    for queue in [names.node(&other), names.control_node(&other), names.dead(), names.master_event()] {
        cannot_read(&node, &queue).await;
    }
    cannot_publish(&node, &names.event(), "n2.clone.succeeded").await;
    cannot_publish(&node, &names.event(), "n1x.clone.succeeded").await;
    cannot_publish(&node, &names.control(), "n2").await;
    cannot_publish(&node, &names.returned(), "n2").await;
    cannot_publish(&node, "", &names.node(&other)).await;
    cannot_make(&node, &format!("{prefix}.node.n3"), Vec::new()).await;
    cannot_make(&node, "elsewhere", Vec::new()).await;
    let spying = Binding { exchange: names.task(), queue: names.node(agent.node()), routing_key: other.to_string() };
    cannot_make(&node, "", vec![spying.clone()]).await;
    let shared_queues = [names.dead(), names.master_event(), names.node(&other), names.node(agent.node())];
    let shared_exchanges = [names.task(), names.event(), names.dlx(), names.control()];
    cannot_remove(&node, &shared_queues, &shared_exchanges).await;

    // What a master cannot do.
    let master = &agent.master;
    for queue in [names.node(agent.node()), names.control_node(agent.node()), names.dead()] {
        cannot_read(master, &queue).await;
    }
    cannot_publish(master, &names.event(), "n1.clone.succeeded").await;
    cannot_publish(master, &names.dlx(), "n1").await;
    cannot_make(master, &format!("{prefix}.node.n3"), Vec::new()).await;
    cannot_make(master, "", vec![spying]).await;
    cannot_remove(master, &shared_queues, &shared_exchanges).await;
    // And that it can read events by itself.
    let consume =
        Consume { queue: names.master_event(), tag: "master".to_owned(), prefetch: 1, declare: Topology::default() };
    drop(master.consume(consume).await.expect("a master reads events"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_enrols_itself_makes_its_own_queues_with_a_user_from_a_definitions_file() {
    let site = site().await;
    let mut agent = Agent::new(&site.rabbit).await;
    let (names, prefix) = (agent.names.clone(), agent.names.prefix().to_owned());
    let file = site.directory.join(format!("{prefix}.passwords"));
    let words =
        ["topology", "users", "--node", "n1", "--self-enrol", "--definitions", "--passwords", file.to_str().unwrap()];
    let printed = run(agent.command(&words)).ended(0);
    let definitions = site.directory.join(format!("{prefix}.json"));
    std::fs::write(&definitions, &printed.out).unwrap();
    let script = site.directory.join(format!("{prefix}.sh"));
    std::fs::write(&script, format!("rabbitmqctl import_definitions '{}'\n", definitions.display())).unwrap();
    tokio::task::block_in_place(|| site.sh(&script));
    let user = format!("{prefix}-node-n1");
    let url = site.url(&user, &passwords(&file)[&user]);

    agent.set("AGENT_AMQP_URL", &url);
    agent.start(&[]);
    agent.ready().await;
    let upstream = Repository::new();
    agent.publish(&Agent::clone_task("clone", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("clone", 0).await.status, Status::Succeeded);
    agent.control(&json!({"v": 1, "command": "inspect"})).await;
    agent.answered("state").await;

    let node = client(&url).await;
    cannot_read(&node, &names.dead()).await;
    cannot_publish(&node, &names.event(), "n2.clone.succeeded").await;
    cannot_make(&node, &format!("{prefix}.node.n2"), Vec::new()).await;
    cannot_remove(&node, &[names.dead(), names.master_event()], &[names.task(), names.event()]).await;
    // The broker's word on the user: what was printed and nothing else.
    let doctor = |management: &str| {
        let mut command = agent.command(&["topology", "doctor", "--node", "n1", "--json"]);
        command.env("AGENT_AMQP_URL", &site.rabbit.url).env("AGENT_BROKER__MANAGEMENT_URL", management);
        let findings = run(command).json();
        let about = findings.as_array().unwrap().iter().filter(|one| one["subject"] == format!("user {user}"));
        about.map(|one| one["problem"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let management = &site.rabbit.management_url;
    assert_eq!(tokio::task::block_in_place(|| doctor(management)), Vec::<String>::new());
    tokio::task::block_in_place(|| site.rabbit.ctl(&["set_permissions", &user, ".*", ".*", ".*"]));
    let found = tokio::task::block_in_place(|| doctor(management));
    assert!(found.len() == 1 && found[0].contains("may do other things than its work needs"), "{found:?}");
}
