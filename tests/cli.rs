//! The command line as an operator uses it, against a real agent on a real RabbitMQ: what it prints, and its codes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use haul::protocol::Status;
use serde_json::Value;
use support::{agent::Agent, rabbit::Rabbit, repository::Repository};

/// What a command ended with.
struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl Ended {
    /// The JSON of each line of the standard output.
    fn json(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect()
    }

    #[track_caller]
    fn is(&self, code: i32, said: &str) -> &Self {
        assert_eq!(self.code, code, "{}{}", self.out, self.err);
        assert!(self.out.contains(said) || self.err.contains(said), "{said:?} is not in {}{}", self.out, self.err);
        self
    }
}

fn run(mut command: Command) -> Ended {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code().unwrap_or(-1), out: text(&output.stdout), err: text(&output.stderr) }
}

/// Runs `haul` with the agent's settings and these words; no argument has a space in it.
fn haul(agent: &Agent, line: &str) -> Ended {
    run(agent.command(&line.split(' ').collect::<Vec<_>>()))
}

/// The same with a variable of its own.
fn haul_with(agent: &Agent, name: &str, value: &str, line: &str) -> Ended {
    let mut command = agent.command(&line.split(' ').collect::<Vec<_>>());
    command.env(name, value);
    run(command)
}

async fn started() -> Agent {
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.start(&[]);
    agent.ready().await;
    agent
}

fn stop(agent: &Agent) {
    agent.signal(rustix::process::Signal::TERM);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_submitted_followed_and_ends_with_the_code_of_its_outcome() {
    let (agent, upstream) = (started().await, Repository::new());
    let clone = format!("submit clone --node n1 --project-id 42 --git-url {} --target-path 7_app", upstream.url());
    haul(&agent, &format!("{clone} --wait")).is(0, "clone of project 42 on n1 succeeded: 7_app, main at ");
    assert!(agent.projects().join("7_app/README").exists());
    let status = haul(&agent, "submit status --node n1 --project-id 42 --wait --json");
    let events = status.is(0, "").json();
    let last = events.last().unwrap();
    assert_eq!((last["status"].as_str(), last["result"]["dirty"].as_bool()), (Some("succeeded"), Some(false)));
    let published = haul(&agent, "submit pull --node n1 --project-id 42 --json --task-id p1").is(0, "").json();
    assert_eq!((published[0]["task_id"].as_str(), published.len()), (Some("p1"), 1));
    agent.end("p1", 0).await;
    haul(&agent, "submit clone --node n1 --project-id 43 --git-url file:///no/such --target-path x --wait")
        .is(4, "clone of project 43 on n1 failed: not_found: ");
    haul(&agent, "submit delete --node n1 --project-id 42 --wait").is(0, "delete of project 42 on n1 succeeded");
    assert!(!agent.projects().join("7_app").exists());
    haul(&agent, "submit pull --node n2 --project-id 42")
        .is(4, "node n2 is not enrolled: start its agent, or run haul topology apply --node n2");
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_are_cancelled_wherever_they_are() {
    let agent = started().await;
    // Somebody listens and never answers: the clone runs until it is told not to.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/x.git", silent.local_addr().unwrap());
    haul(&agent, &format!("submit clone --node n1 --project-id 50 --git-url {url} --target-path x --task-id runs"));
    agent.saw("runs", Status::Started).await;
    haul(&agent, "submit pull --node n1 --project-id 50 --task-id waits").is(0, "published to n1: task waits");
    agent.saw("waits", Status::Accepted).await;
    let state = haul(&agent, "inspect --node n1 --json").is(0, "").json();
    assert_eq!((state[0]["running"].as_u64(), state[0]["waiting"].as_u64()), (Some(1), Some(1)));
    haul(&agent, "cancel waits --node n1").is(0, "cancel cancelling waits");
    assert_eq!(agent.end("waits", 0).await.status, Status::Cancelled);
    haul(&agent, "cancel runs --node n1 --wait").is(0, "clone of project 50 on n1 was cancelled");
    haul(&agent, "cancel runs --node n1").is(0, "has ended already");
    haul(&agent, "cancel runs --node n1 --wait --json").is(0, r#""status":"cancelled""#).json();
    haul(&agent, "cancel unknown --node n1").is(0, "the node does not know it; it is cancelled when it comes");
    haul(&agent, "cancel unknown --node n1 --wait --timeout 1s").is(6, "did not come to its node within 1s");
    haul(&agent, "submit status --node n1 --project-id 50 --task-id unknown --wait").is(4, "was cancelled");
    let end = haul(&agent, "submit status --node n1 --project-id 50 --task-id ended --wait");
    assert_ne!(end.code, 0);
    haul(&agent, "cancel ended --node n1 --wait").is(4, "status of project 50 on n1 ");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_is_paused_resumed_and_drained() {
    let mut agent = started().await;
    haul(&agent, "pause n1 --wait")
        .is(0, "pause paused")
        .is(0, "0 running, 0 waiting, not ready, paused (it is paused");
    haul(&agent, "inspect --node n1").is(0, ", paused");
    assert_eq!(haul(&agent, "inspect n1 --json").is(0, "").json()[0]["ready"], false);
    haul(&agent, "inspect n1 --wait --timeout 1s").is(6, "n1 heard the inspect, which had not taken effect within 1s");
    haul(&agent, "submit status --node n1 --project-id 1 --wait --timeout 1s")
        .is(6, "haul events --task")
        .is(6, "the node's agent is paused and takes no tasks; run haul resume --node n1");
    haul(&agent, "resume n1 --wait").is(0, "resume resumed").is(0, "0 running, 0 waiting, ready");
    assert_eq!(haul(&agent, "inspect --node n1 --json").is(0, "").json()[0]["paused"], false);
    let mut other = agent.neighbour("n3");
    other.start(&[]);
    other.ready().await;
    let both = haul(&agent, "inspect n1 n3 --json").is(0, "").json();
    assert_eq!(both.len(), 2, "{both:?}");
    let drained = haul(&agent, "drain n1 --wait --json").is(0, "").json();
    let answers: Vec<_> = drained.iter().map(|answer| answer["answer"].as_str().unwrap()).collect();
    assert_eq!(answers, ["draining", "drained"]);
    assert!(agent.ended().await.success(), "{}", agent.log());
    haul(&agent, "inspect --node n1 --timeout 1s").is(6, "n1 did not answer within 1s");
    // One that is away, or not enrolled, keeps nobody from the others.
    let three = haul(&agent, "inspect n1 n2 n3 --timeout 1s");
    three.is(6, "n3 inspect state").is(6, "n1 did not answer within 1s").is(6, "node n2 is not enrolled");
    haul(&agent, "drain n1 --timeout 1s").is(6, "the command is forgotten");
    haul(&agent, "inspect --node n2").is(4, "node n2 is not enrolled");
    haul(&agent, "inspect").is(2, "required");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_followed_by_people_and_by_machines() {
    let (agent, upstream) = (started().await, Repository::new());
    let mut follow = agent.command(&["events", "--json", "--node", "n1", "--status", "succeeded", "--kind", "clone"]);
    let mut follow = follow.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    // Before it has subscribed nothing is shown; a duplicate is answered again until it has.
    let clone =
        format!("submit clone --node n1 --project-id 1 --git-url {} --target-path a --task-id c", upstream.url());
    let (seen, shown) = std::sync::mpsc::channel();
    std::thread::spawn(move || seen.send(lines.next().unwrap().unwrap()));
    let line = loop {
        haul(&agent, &clone).is(0, "");
        if let Ok(line) = shown.recv_timeout(std::time::Duration::from_secs(2)) {
            break line;
        }
    };
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((event["status"].as_str(), event["task_id"].as_str()), (Some("succeeded"), Some("c")));
    let pid = rustix::process::Pid::from_child(&follow);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(follow.wait().unwrap().code(), Some(0), "Ctrl-C is how following ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_and_the_topology_have_their_commands() {
    let agent = started().await;
    haul(&agent, "topology plan --node n1").is(0, " 0 missing, 0 differ");
    // RabbitMQ 4 needs policies, which are set over its management API.
    let management = &Rabbit::shared().management_url;
    let apply = "topology apply --node n1 --node n7";
    haul_with(&agent, "AGENT_BROKER__MANAGEMENT_URL", management, apply).is(0, "are in place");
    let plan = haul(&agent, "topology plan --node n7 --json").is(0, "").json();
    assert!(plan[0].as_array().unwrap().len() > 30);
    haul(&agent, "topology doctor --json").json();
    haul(&agent, "dead list").is(0, "no dead letters");
    haul(&agent, "dead show t").is(4, "task t has no dead letter");
    haul(&agent, "submit clone --node n1 --project-id 1 --git-url file:///no --target-path x --task-id t --wait");
    agent.dead_letters(1).await;
    haul(&agent, "dead list").is(0, "not_found");
    let listed = haul(&agent, "dead list --json").is(0, "").json();
    assert_eq!((listed.len(), listed[0]["class"].as_str()), (1, Some("not_found")));
    haul(&agent, "dead show t --json").is(0, "x-haul-error").json();
    haul(&agent, "dead replay").is(2, "say which dead letters to replay");
    haul(&agent, "dead replay --all --dry-run").is(0, "1 of 1 dead letters would be replayed");
    haul(&agent, "dead replay --task t").is(0, "1 of 1 dead letters replayed");
    agent.end("t", 1).await;
    agent.dead_letters(1).await;
    haul(&agent, "dead drop --all").is(2, "say --yes, or look with --dry-run");
    haul(&agent, "dead drop --all --yes --json").is(0, r#""outcome":"dropped""#).json();
    haul(&agent, "dead list").is(0, "no dead letters");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_work_is_said_in_a_sentence_with_its_code() {
    let agent = Agent::new(Rabbit::shared()).await;
    let down = "amqp://user:hunter2@127.0.0.1:1/%2f";
    let wrong = Rabbit::shared().url.replace("guest:guest", "guest:hunter2");
    let vhost = Rabbit::shared().url.replace("%2f", "nowhere");
    let url = "AGENT_AMQP_URL";
    let sentences = [
        haul_with(&agent, url, down, "inspect --node n1").is(3, "is it running, and is broker.urls").err.clone(),
        haul_with(&agent, url, &wrong, "inspect --node n1").is(3, "check user and password").err.clone(),
        haul_with(&agent, url, &wrong, "worker").is(3, "check user and password").err.clone(),
        haul_with(&agent, url, &vhost, "dead list").is(3, "check the virtual host").err.clone(),
        haul_with(&agent, url, "hunter2", "events").is(2, "does not begin with amqp://").err.clone(),
        haul_with(&agent, "AGENT_GIT__TIMOUT", "1", "events").is(2, "did you mean AGENT_GIT__TIMEOUT?").err.clone(),
        haul_with(&agent, "AGENT_NODE_NAME", "a.b", "worker").is(2, "a node name must be").err.clone(),
        haul(&agent, "events --config /no/such").is(2, "cannot read the configuration /no/such").err.clone(),
        haul(&agent, "submit clone --node n1 --project-id 1 --git-url https://u:hunter2@h/x --target-path a")
            .is(2, "name a credential of the node instead")
            .err
            .clone(),
    ];
    for sentence in sentences {
        assert!(!sentence.contains("hunter2"), "{sentence}");
        assert_eq!(sentence.lines().filter(|line| line.starts_with("haul: ")).count(), 1, "{sentence}");
    }
    haul(&agent, "frob").is(2, "unrecognized subcommand");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_is_refused_on_the_same_storage_and_under_the_same_name() {
    let mut agent = started().await;
    agent.consuming().await;
    haul(&agent, "worker").is(5, "another agent (process ");
    agent.set("AGENT_BROKER__HEARTBEAT", "1s");
    let elsewhere = tempfile::tempdir().unwrap();
    let other = elsewhere.path().to_str().unwrap();
    haul_with(&agent, "AGENT_STORAGE_PATH", other, "worker").is(1, "an agent of the same name runs elsewhere");
    let mut forced = agent.command(&["worker", "--force"]);
    let mut forced = forced.env("AGENT_STORAGE_PATH", other).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(forced.stderr.take().unwrap()).lines();
    let consumes = lines.map_while(Result::ok).any(|line| line.contains(r#""message":"consuming""#));
    forced.kill().unwrap();
    forced.wait().unwrap();
    assert!(consumes, "with --force it stands in line for the queue");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_start_is_one_line_that_says_who_and_where_without_the_password() {
    let agent = started().await;
    let log = agent.log();
    let line = log.lines().find(|line| line.contains("haul worker starts")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((line["node"].as_str(), line["version"].as_str()), (Some("n1"), Some(env!("CARGO_PKG_VERSION"))));
    assert_eq!(line["path"].as_str(), agent.storage.path().to_str());
    assert_eq!(line["broker.queue"].as_str(), Some(format!("{}.node.n1", agent.names.prefix()).as_str()));
    assert!(line["broker.address"].as_str().unwrap().starts_with("amqp://127.0.0.1:"));
    assert!(!log.contains("guest:guest"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_whose_mark_is_forgotten_takes_an_older_generation_again() {
    let (mut agent, upstream) = (started().await, Repository::new());
    let clone = format!("submit clone --node n1 --project-id 42 --git-url {} --target-path 7_app", upstream.url());
    haul(&agent, &format!("{clone} --generation 9 --wait")).is(0, "succeeded");
    let pull = "submit pull --node n1 --project-id 42 --generation 3 --wait";
    haul(&agent, pull).is(4, "was superseded");
    haul(&agent, "project list").is(0, "generation 9");
    haul(&agent, "project forget 42").is(5, "stop the agent first");
    stop(&agent);
    agent.ended().await;
    haul(&agent, "project forget 43").is(1, "no project 43 in ");
    haul(&agent, "project forget 42").is(0, "its next task counts as the newest");
    let listed = haul(&agent, "project list --json").is(0, "").json();
    assert_eq!((listed[0]["project_id"].as_i64(), &listed[0]["mark"]), (Some(42), &Value::Null));
    assert_eq!((listed[0]["target_path"].as_str(), listed[0]["branch"].as_str()), (Some("7_app"), Some("main")));
    let nowhere = agent.storage.path().join("nowhere");
    haul_with(&agent, "AGENT_STORAGE_PATH", nowhere.to_str().unwrap(), "project forget 42").is(1, "no project 42 in ");
    assert!(!nowhere.exists(), "a mistaken path does not become a storage directory");
    agent.start(&[]);
    agent.ready().await;
    haul(&agent, pull).is(0, "pull of project 42 on n1 succeeded");
    haul(&agent, "submit delete --node n1 --project-id 42 --generation 10 --wait").is(0, "succeeded");
    haul(&agent, "project list").is(0, "(deleted)");
}

#[test]
fn completions_are_a_script_that_bash_takes() {
    let mut haul = Command::new(env!("CARGO_BIN_EXE_haul"));
    haul.args(["completions", "bash"]);
    let script = run(haul);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("haul.bash");
    std::fs::write(&file, &script.out).unwrap();
    let mut bash = Command::new("bash");
    let words =
        r#". "$0" && COMP_WORDS=(haul project "") COMP_CWORD=2 && _haul haul "" project && echo "${COMPREPLY[@]}""#;
    bash.args(["-c", words]).arg(&file);
    let completed = run(bash);
    assert!(completed.out.contains("forget"), "{}{}", completed.out, completed.err);
}

#[test]
fn the_allocator_has_the_settings_of_the_program() {
    let mut haul = Command::new(env!("CARGO_BIN_EXE_haul"));
    haul.arg("--version").env("_RJEM_MALLOC_CONF", "stats_print:true");
    let ended = run(haul);
    for set in ["narenas: 2", "dirty_decay_ms: 1000", "muzzy_decay_ms: 0", "oversize_threshold: 2097152"] {
        ended.is(0, &format!("opt.{set}"));
    }
}
