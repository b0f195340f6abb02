//! The agent as seen by somebody who knows only the files under `schemas/`: tasks and commands go in by `amqp-publish`
//! (Debian package amqp-tools), and all that comes out is held against the schemas. It fails where that program is missing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use jsonschema::Validator;
use lapin::{
    Channel, Connection, ConnectionProperties,
    options::{BasicGetOptions, QueueBindOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};
use serde_json::{Value, json};
use support::{
    PATIENCE,
    agent::Agent,
    rabbit::Rabbit,
    repository::{Repository, git},
};

/// A master that has nothing but the schemas.
struct Outsider {
    agent: Agent,
    _connection: Connection,
    channel: Channel,
    queue: ShortString,
    schemas: BTreeMap<&'static str, Validator>,
    seen: Vec<(String, Value)>,
}

impl Outsider {
    async fn new() -> Self {
        let mut agent = Agent::new(Rabbit::shared()).await;
        agent.set("AGENT_RETRY__MAX_ATTEMPTS", "2");
        let connection = Connection::connect(&Rabbit::shared().url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
        let declared = channel.queue_declare("".into(), options, FieldTable::default()).await.unwrap();
        let (queue, exchange) = (declared.name().clone(), ShortString::from(agent.names.event()));
        let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
        channel.queue_bind(queue.clone(), exchange, "#".into(), options, arguments).await.unwrap();
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas");
        let schemas = ["task", "event", "control", "control-answer"].map(|name| {
            let text = fs::read_to_string(directory.join(format!("{name}.schema.json"))).unwrap();
            let schema = serde_json::from_str(&text).unwrap();
            (name, jsonschema::options().should_validate_formats(true).build(&schema).unwrap())
        });
        agent.start(&[]);
        agent.ready().await;
        Self { agent, _connection: connection, channel, queue, schemas: schemas.into(), seen: Vec::new() }
    }

    fn assert_fits(&self, schema: &str, message: &Value) {
        let errors: Vec<_> = self.schemas[schema].iter_errors(message).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{message} is no {schema}: {errors:?}");
    }

    /// Publishes a message with `amqp-publish`, the body on its standard input.
    fn publish(exchange: &str, body: &str) {
        let mut child = Command::new("amqp-publish")
            .args(["--url", &Rabbit::shared().url, "--exchange", exchange, "--routing-key", "n1"])
            .args(["--persistent", "--content-type", "application/json"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("the program amqp-publish is needed; install the package amqp-tools");
        child.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "amqp-publish did not publish {body}");
    }

    fn task(&self, task: &Value) {
        self.assert_fits("task", task);
        Self::publish(&self.agent.names.task(), &task.to_string());
    }

    fn control(&self, command: &Value) {
        self.assert_fits("control", command);
        Self::publish(&self.agent.names.control(), &command.to_string());
    }

    /// Waits for the first message that `wanted` takes; each that came is held against its schema.
    async fn until(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            if let Some((_, found)) = self.seen.iter().find(|(_, message)| wanted(message)) {
                return found.clone();
            }
            let options = BasicGetOptions { no_ack: true };
            if let Some(got) = self.channel.basic_get(self.queue.clone(), options).await.unwrap() {
                let message: Value = serde_json::from_slice(&got.delivery.data).unwrap();
                let key = got.delivery.routing_key.to_string();
                let properties = &got.delivery.properties;
                assert_eq!(
                    properties.content_type().as_ref().map(ToString::to_string).as_deref(),
                    Some("application/json")
                );
                assert_eq!(
                    properties.message_id().as_ref().map(ToString::to_string).as_deref(),
                    message["event_id"].as_str()
                );
                if key.contains(".control.") {
                    self.assert_fits("control-answer", &message);
                } else {
                    self.assert_fits("event", &message);
                    let words = ["kind", "status"].map(|field| message[field].as_str().unwrap());
                    assert_eq!(key, format!("n1.{}.{}", words[0], words[1]));
                }
                self.seen.push((key, message));
                continue;
            }
            assert!(begun.elapsed() < PATIENCE, "{what} did not come; the agent's log:\n{}", self.agent.log());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// The terminal event of a task, which must be of this status.
    async fn end(&mut self, id: &str, status: &str) -> Value {
        let terminal = ["succeeded", "failed", "rejected", "cancelled", "superseded"];
        let is_end = |event: &Value| {
            event["task_id"] == id && event["status"].as_str().is_some_and(|status| terminal.contains(&status))
        };
        let end = self.until(&format!("the end of {id}"), is_end).await;
        assert_eq!(end["status"], status, "{end}");
        end
    }

    async fn answer(&mut self, control_id: &str, answer: &str) -> Value {
        let given =
            self.until(&format!("the answer to {control_id}"), |message| message["control_id"] == control_id).await;
        assert_eq!(given["answer"], answer, "{given}");
        given
    }

    fn saw(&self, id: &str, status: &str) -> bool {
        self.seen.iter().any(|(_, event)| event["task_id"] == id && event["status"] == status)
    }
}

/// Everything in a working tree: kind, rights and content.
fn tree(directory: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap).filter(|entry| entry.file_name() != ".git") {
            let (path, metadata) = (entry.path(), entry.metadata().unwrap());
            let name = path.strip_prefix(directory).unwrap().display().to_string();
            // Whether anybody may run it is all that git keeps of a file's rights.
            let kind = metadata.permissions().mode() & 0o170_100;
            if metadata.is_symlink() {
                found.insert(name, (0, fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()));
            } else if metadata.is_dir() {
                found.insert(name, (kind, Vec::new()));
                left.push(path);
            } else {
                found.insert(name, (kind, fs::read(&path).unwrap()));
            }
        }
    }
    found
}

/// The project is what `git clone` makes of the upstream.
fn assert_cloned(upstream: &Repository, project: &Path) {
    let scratch = tempfile::tempdir().unwrap();
    git(scratch.path(), &["clone", "-q", upstream.bare().to_str().unwrap(), "expected"]);
    let expected = scratch.path().join("expected");
    assert_eq!(tree(project), tree(&expected));
    for question in [
        &["rev-parse", "HEAD"][..],
        &["symbolic-ref", "HEAD"],
        &["ls-files", "--stage"],
        &["status", "--porcelain"],
        &["for-each-ref", "--format=%(refname) %(objectname)", "refs/tags"],
        &["rev-parse", "--abbrev-ref", "main@{upstream}"],
        &["rev-list", "--all", "--count"],
    ] {
        assert_eq!(git(project, question), git(&expected, question), "{question:?}");
    }
}

#[tokio::test]
async fn a_client_with_the_schemas_alone_clones_pulls_asks_cancels_and_deletes() {
    let upstream = Repository::new();
    fs::create_dir_all(upstream.work().join("deep/er")).unwrap();
    fs::write(upstream.work().join("deep/er/b\u{fc}n\u{e4}r"), [0_u8, 255, 10, 13]).unwrap();
    fs::write(upstream.work().join("run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(upstream.work().join("run"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("deep/er", upstream.work().join("link")).unwrap();
    upstream.commit("empty", "");
    git(&upstream.work(), &["tag", "-a", "-m", "one", "v1"]);
    git(&upstream.work(), &["push", "-q", "origin", "v1"]);
    let mut master = Outsider::new().await;
    let project = master.agent.projects().join("7_app");

    let clone = json!({"v": 1, "task_id": "clone", "kind": "clone", "project_id": 7, "git_url": upstream.url(),
        "branch": "main", "target_path": "7_app", "generation": 1, "priority": "high", "timeout_secs": 600});
    master.task(&clone);
    let end = master.end("clone", "succeeded").await;
    assert_eq!(end["result"]["head"], git(&upstream.work(), &["rev-parse", "HEAD"]));
    assert!(master.saw("clone", "started"));
    assert_cloned(&upstream, &project);

    let head = upstream.commit("README", "second\n");
    master.task(&json!({"v": 1, "task_id": "pull", "kind": "pull", "project_id": 7, "generation": 2}));
    assert_eq!(master.end("pull", "succeeded").await["result"]["head"], head);
    assert_cloned(&upstream, &project);

    master.task(&json!({"v": 1, "task_id": "status", "kind": "status", "project_id": 7}));
    let status = master.end("status", "succeeded").await["result"].clone();
    assert_eq!((&status["head"], &status["branch"], &status["dirty"]), (&head.into(), &"main".into(), &false.into()));

    // One that fails at once, one that is tried again before it fails, one that is refused.
    let absent = json!({"v": 1, "task_id": "absent", "kind": "clone", "project_id": 8, "git_url": upstream.url(),
        "branch": "no-such-branch", "target_path": "8_app"});
    master.task(&absent);
    assert_eq!(master.end("absent", "failed").await["error"]["class"], "not_found");
    let down = json!({"v": 1, "task_id": "down", "kind": "clone", "project_id": 8,
        "git_url": "http://127.0.0.1:1/x.git", "target_path": "8_app"});
    master.task(&down);
    assert_eq!(master.end("down", "failed").await["error"]["class"], "network");
    assert!(master.saw("down", "retrying"));
    Outsider::publish(
        &master.agent.names.task(),
        &clone
            .to_string()
            .replace("7_app", "..")
            .replace("\"clone\"", "\"bad\"")
            .replace("\"kind\":\"bad\"", "\"kind\":\"clone\""),
    );
    assert_eq!(master.end("bad", "rejected").await["error"]["class"], "invalid");

    // A cancel before its task, and the other commands.
    master.control(&json!({"v": 1, "command": "cancel", "control_id": "c1", "task_id": "early"}));
    master.answer("c1", "pending").await;
    master.task(&json!({"v": 1, "task_id": "early", "kind": "pull", "project_id": 7}));
    master.end("early", "cancelled").await;
    master.control(&json!({"v": 1, "command": "cancel", "control_id": "c2", "task_id": "clone"}));
    master.answer("c2", "settled").await;
    for (command, answer) in [("pause", "paused"), ("inspect", "state"), ("resume", "resumed")] {
        master.control(&json!({"v": 1, "command": command, "control_id": command}));
        master.answer(command, answer).await;
    }
    Outsider::publish(&master.agent.names.control(), r#"{"v": 1, "command": "reboot"}"#);
    master.until("the refusal", |message| message["answer"] == "refused").await;

    // Older than what was applied.
    master.task(&json!({"v": 1, "task_id": "old", "kind": "pull", "project_id": 7, "generation": 1}));
    master.end("old", "superseded").await;
    master.task(&json!({"v": 1, "task_id": "delete", "kind": "delete", "project_id": 7, "generation": 3}));
    assert_eq!(master.end("delete", "succeeded").await["project_status"], "DELETED");
    assert!(!project.exists());
    master.control(&json!({"v": 1, "command": "drain", "control_id": "last"}));
    master.answer("last", "draining").await;
    assert!(master.agent.ended().await.success());
}

/// Long enough to be seen at work: a server that says nothing.
#[tokio::test]
async fn a_running_task_is_cancelled() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut master = Outsider::new().await;
    let url = format!("http://127.0.0.1:{}/x.git", silent.local_addr().unwrap().port());
    master.task(
        &json!({"v": 1, "task_id": "slow", "kind": "clone", "project_id": 7, "git_url": url, "target_path": "7_app"}),
    );
    let started = |event: &Value| event["task_id"] == "slow" && event["status"] == "started";
    master.until("the start", started).await;
    master.control(&json!({"v": 1, "command": "cancel", "control_id": "c", "task_id": "slow"}));
    master.answer("c", "cancelling").await;
    master.end("slow", "cancelled").await;
    assert!(!master.agent.projects().join("7_app").exists());
}
