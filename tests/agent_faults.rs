//! Signals to a real agent and its children while tasks are under way: killed, told to end, stopped for longer than its
//! heartbeat, children killed and stopped role by role, and messages that take the agent down with them. Every task ends,
//! once; what broke the agent three times is given up, and its neighbours are not.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

#[path = "support/githttp.rs"]
mod githttp;
mod support;

use std::{
    os::unix::process::ExitStatusExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use githttp::{Behaviour, Server, Upstream};
use haul::{
    broker::Broker as _,
    failure::ErrorClass,
    protocol::{Event, Status},
    worker::Step,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support::{
    agent::Agent,
    eventually,
    rabbit::Rabbit,
    repository::{Repository, assert_whole, git},
};

/// An upstream behind a server that can hold back its packs.
struct Held {
    repository: Upstream,
    server: Server,
    head: String,
}

impl Held {
    fn new() -> Self {
        let repository = Upstream::new();
        let head = repository.commit("main", &[("a.txt", "hello\n")]);
        let server = Server::start(repository.root());
        server.behave(Behaviour::HoldPack);
        Self { repository, server, head }
    }

    fn clone(&self, id: &str, project: i64) -> Value {
        json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project,
               "git_url": self.server.url("app.git"), "target_path": format!("{project}_app")})
    }

    /// Waits until so many packs were asked for in all.
    async fn asked(&self, packs: usize) {
        eventually("a pack is asked for", async || self.server.counts().packs >= packs).await;
    }
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        let _ = kill_process(pid, signal);
    }
}

/// The children of a role.
fn children(agent: u32, role: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{agent}/task")).into_iter().flatten().flatten() {
        let pids = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for pid in pids.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if matches!(command.split('\0').collect::<Vec<_>>()[..], [.., "child", of, ""] if of == role) {
                found.push(pid);
            }
        }
    }
    found
}

/// How often a task was begun.
fn starts(agent: &Agent, id: &str) -> usize {
    let mut ids: Vec<_> = agent
        .events(id)
        .into_iter()
        .filter(|event| event.status == Status::Started)
        .map(|event| event.event_id)
        .collect();
    ids.sort();
    ids.dedup();
    ids.len()
}

/// Waits for the end of each, and checks that nothing is left and each ended once.
async fn all_end_once(agent: &mut Agent, ids: &[String]) -> Vec<Event> {
    let mut ends = Vec::new();
    for id in ids {
        ends.push(agent.end(id, 0).await);
    }
    agent.ready().await;
    agent.drained().await;
    agent.signal(Signal::TERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
    for id in ids {
        let states = agent.terminal_states(id, 0);
        assert_eq!(states.len(), 1, "{id}: {states:?}");
    }
    ends
}

/// Numbers that only the seed decides (xorshift64).
struct Chance(u64);

impl Chance {
    fn millis(&mut self, limit: u64) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Duration::from_millis(self.0 % limit)
    }
}

/// Publishes some of many small tasks; their ids.
async fn publish_some(agent: &Agent, upstream: &Repository, round: i64, count: i64) -> Vec<String> {
    let mut ids = Vec::new();
    for number in 0..count {
        let project = round * 100 + number / 2;
        let id = format!("{round}-{number}");
        let task = match number % 2 {
            0 => Agent::clone_task(&id, project, upstream, &format!("{project}_app")),
            _ => Agent::task(&id, "pull", project),
        };
        agent.publish(&task).await;
        ids.push(id);
    }
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_killed_at_any_moment_ends_every_task_once() {
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    let (mut chance, mut ids) = (Chance(7), Vec::new());
    for round in 0..4 {
        agent.start(&[]);
        ids.extend(publish_some(&agent, &upstream, round, 8).await);
        // It gets something done in between: a task that is the first each time would be taken for the culprit.
        let done = ids.len() - 6;
        let ended = || ids.iter().filter(|id| !agent.terminal_states(id, 0).is_empty()).count();
        eventually("some have ended", async || ended() >= done).await;
        // A moment of no importance, which is the point.
        tokio::time::sleep(chance.millis(60)).await;
        agent.kill().await;
    }
    agent.start(&[]);
    for end in all_end_once(&mut agent, &ids).await {
        assert_eq!(end.status, Status::Succeeded, "{end:?}");
    }
    agent.dead_letters(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_that_comes_right_behind_its_clone_never_overtakes_it() {
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_SLOTS", "8");
    agent.start(&[]);
    agent.ready().await;
    agent.signal(Signal::TERM);
    agent.ended().await;
    // All at once at the next start.
    let ids = publish_some(&agent, &upstream, 1, 60).await;
    agent.start(&[]);
    for end in all_end_once(&mut agent, &ids).await {
        assert_eq!(end.status, Status::Succeeded, "{end:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_told_to_end_at_any_moment_ends_every_task_once_and_charges_nothing() {
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    let (mut chance, mut ids) = (Chance(8), Vec::new());
    for round in 0..4 {
        agent.start(&[]);
        agent.ready().await;
        ids.extend(publish_some(&agent, &upstream, round, 8).await);
        tokio::time::sleep(chance.millis(250)).await;
        agent.signal(Signal::TERM);
        if round % 2 == 1 {
            agent.signal(Signal::INT);
        }
        let code = agent.ended().await.code();
        assert!(matches!(code, Some(0 | 130)), "{code:?}: {}", agent.log());
    }
    agent.start(&[]);
    for end in all_end_once(&mut agent, &ids).await {
        assert_eq!((end.status, end.attempt), (Status::Succeeded, 1), "{end:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_stands_still_for_longer_than_its_heartbeat_ends_every_task_once() {
    let held = Held::new();
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_BROKER__HEARTBEAT", "1s");
    agent.set("AGENT_SLOTS", "4");
    agent.start(&[]);
    agent.publish(&held.clone("held", 1)).await;
    held.asked(1).await;
    agent.publish(&Agent::task("behind", "status", 1)).await;
    agent.saw("behind", Status::Accepted).await;
    agent.signal(Signal::STOP);
    let queue = agent.names.node(agent.node());
    agent
        .until_async("the broker to give it up", async || {
            matches!(agent.master.depth(&queue).await, Ok(Some(depth)) if depth.consumers == 0 && depth.messages == 2)
        })
        .await;
    // Meanwhile the clone is done, and more has come.
    held.server.behave(Behaviour::Serve);
    let mut ids = publish_some(&agent, &upstream, 3, 4).await;
    agent.signal(Signal::CONT);
    ids.extend(["held".to_owned(), "behind".to_owned()]);
    for end in all_end_once(&mut agent, &ids).await {
        assert_eq!(end.status, Status::Succeeded, "{end:?}");
    }
    // What was delivered again joined what ran.
    assert_eq!((starts(&agent, "held"), held.server.counts().packs), (1, 1));
    assert_whole(&agent.projects().join("1_app"), &held.head);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_stopped_at_any_moment_ends_every_task_once() {
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_BROKER__HEARTBEAT", "1s");
    agent.start(&[]);
    let (mut chance, mut ids) = (Chance(9), Vec::new());
    let queue = agent.names.node(agent.node());
    for round in 0..3 {
        agent.consuming().await;
        ids.extend(publish_some(&agent, &upstream, round, 6).await);
        tokio::time::sleep(chance.millis(120)).await;
        agent.signal(Signal::STOP);
        agent
            .until_async(
                "the broker to give it up",
                async || matches!(agent.master.depth(&queue).await, Ok(Some(depth)) if depth.consumers == 0),
            )
            .await;
        agent.signal(Signal::CONT);
    }
    for end in all_end_once(&mut agent, &ids).await {
        assert_eq!((end.status, end.attempt), (Status::Succeeded, 1), "{end:?}");
    }
    for id in &ids {
        assert_eq!(starts(&agent, id), 1, "{id} was executed again although it ran here");
    }
}

/// Does to every child of a role what `signal` does, until it is dropped; or to the first one only.
struct Hunter {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<usize>>,
}

impl Hunter {
    fn after(agent: u32, role: &'static str, with: Signal, once: bool) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut met = Vec::new();
            while !told.load(Ordering::Relaxed) {
                for child in children(agent, role) {
                    if !met.contains(&child) {
                        signal(child, with);
                        met.push(child);
                        if once {
                            return 1;
                        }
                    }
                }
                std::thread::sleep(Duration::from_micros(300));
            }
            met.len()
        });
        Self { over, thread: Some(thread) }
    }

    /// Ends it; how many it met.
    fn over(mut self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Hunter {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// An agent with a project that has something to pull, and a task in which children of `role` work.
async fn scene_of(role: &str, settings: &[(&str, &str)]) -> (Agent, Repository, Value, String) {
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    for (name, value) in settings {
        agent.set(name, value);
    }
    agent.start(&[]);
    let head = git(&upstream.work(), &["rev-parse", "HEAD"]);
    if role == "transfer" {
        agent.ready().await;
        let task = Agent::clone_task("t", 1, &upstream, "1_app");
        return (agent, upstream, task, head);
    }
    agent.publish(&Agent::clone_task("first", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("first", 0).await.status, Status::Succeeded);
    let head = upstream.commit("README", "second\n");
    (agent, upstream, Agent::task("t", "pull", 1), head)
}

async fn one_child_killed(role: &'static str) {
    let (mut agent, _upstream, task, head) = scene_of(role, &[]).await;
    let hunter = Hunter::after(agent.pid(), role, Signal::KILL, true);
    agent.publish(&task).await;
    let ends = all_end_once(&mut agent, &["t".to_owned()]).await;
    assert_eq!((hunter.over(), ends[0].status, ends[0].attempt), (1, Status::Succeeded, 2), "{ends:?}");
    assert_whole(&agent.projects().join("1_app"), &head);
}

async fn every_child_killed(role: &'static str) {
    let (mut agent, upstream, task, _) = scene_of(role, &[("AGENT_RETRY__MAX_ATTEMPTS", "3")]).await;
    let hunter = Hunter::after(agent.pid(), role, Signal::KILL, false);
    agent.publish(&task).await;
    let end = agent.end("t", 0).await;
    assert_eq!((end.status, end.attempt), (Status::Failed, 3), "{end:?}");
    assert!(hunter.over() >= 3);
    agent.dead_letters(1).await;
    // The agent itself is as well as ever.
    agent.publish(&Agent::clone_task("fine", 2, &upstream, "2_app")).await;
    all_end_once(&mut agent, &["t".to_owned(), "fine".to_owned()]).await;
}

async fn a_child_stopped(role: &'static str) {
    let settings = [("AGENT_GIT__STALL", "2s"), ("AGENT_GIT__TRANSPORT_FALLBACK", "false")];
    let (mut agent, _upstream, task, head) = scene_of(role, &settings).await;
    let hunter = Hunter::after(agent.pid(), role, Signal::STOP, true);
    agent.publish(&task).await;
    let ends = all_end_once(&mut agent, &["t".to_owned()]).await;
    assert_eq!((hunter.over(), ends[0].status), (1, Status::Succeeded), "{ends:?}");
    assert_whole(&agent.projects().join("1_app"), &head);
}

macro_rules! children {
    ($($test:ident: $how:ident($role:literal);)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $test() { $how($role).await; })*
    };
}

children! {
    a_transfer_child_that_is_killed_costs_one_attempt: one_child_killed("transfer");
    a_workspace_child_that_is_killed_costs_one_attempt: one_child_killed("workspace");
    a_pack_child_that_is_killed_costs_one_attempt: one_child_killed("pack");
    a_task_whose_transfer_children_are_always_killed_is_given_up: every_child_killed("transfer");
    a_task_whose_workspace_children_are_always_killed_is_given_up: every_child_killed("workspace");
    a_task_whose_pack_children_are_always_killed_is_given_up: every_child_killed("pack");
    a_transfer_child_that_is_stopped_is_found_stalled: a_child_stopped("transfer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_runs_at_three_kills_is_given_up_and_those_beside_and_behind_it_are_not() {
    let (poison, innocent) = (Held::new(), Held::new());
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_SLOTS", "2");
    agent.start(&[]);
    agent.publish(&poison.clone("poison", 1)).await;
    agent.publish(&innocent.clone("beside", 2)).await;
    poison.asked(1).await;
    innocent.asked(1).await;
    // No slot for this one, and no turn for that one.
    agent.publish(&Agent::clone_task("waits", 3, &upstream, "3_app")).await;
    agent.publish(&Agent::task("behind", "status", 1)).await;
    for id in ["waits", "behind"] {
        agent.saw(id, Status::Accepted).await;
    }
    agent.kill().await;
    agent.start(&[]);
    poison.asked(2).await;
    innocent.asked(2).await;
    agent.kill().await;
    // From the third start on one delivery is taken at a time.
    agent.start(&[]);
    poison.asked(3).await;
    assert!(agent.log().contains("one delivery at a time"), "{}", agent.log());
    assert_eq!(innocent.server.counts().packs, 2);
    agent.kill().await;
    innocent.server.behave(Behaviour::Serve);
    agent.start(&[]);
    let end = agent.end("poison", 0).await;
    assert_eq!((end.status, end.error.unwrap().class), (Status::Failed, ErrorClass::Crashed));
    let ids = ["poison", "beside", "waits", "behind"].map(str::to_owned);
    let ends = all_end_once(&mut agent, &ids).await;
    for end in &ends[1..3] {
        assert_eq!((end.status, end.attempt), (Status::Succeeded, 1), "{end:?}");
    }
    // It asked for a project that never came to be, and was told so.
    assert_eq!(ends[3].error.as_ref().unwrap().class, ErrorClass::NotFound, "{:?}", ends[3]);
    assert_whole(&agent.projects().join("2_app"), &innocent.head);
    assert_eq!(poison.server.counts().packs, 3, "it did not run a fourth time");
    drop((poison.repository, innocent.repository));
}

/// Starts the agent until it no longer dies at `step`; how often it died.
async fn deaths_at(agent: &mut Agent, step: Step) -> usize {
    for deaths in 0..9 {
        agent.start(&["--observe", step.as_str()]);
        let dead = agent.names.dead();
        loop {
            if !agent.is_running() {
                let status = agent.ended().await;
                assert_eq!(status.signal(), Some(9), "{status}; {}", agent.log());
                break;
            }
            if matches!(agent.master.depth(&dead).await, Ok(Some(depth)) if depth.messages == 1) {
                return deaths;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    panic!("it dies of it for ever:\n{}", agent.log());
}

/// An agent that has ended, with a task in its queue that shall be the death of it.
async fn with_poison_ahead(upstream: &Repository) -> Agent {
    let mut agent = Agent::new(Rabbit::shared()).await;
    // Makes the node's queue.
    agent.start(&[]);
    agent.ready().await;
    agent.signal(Signal::TERM);
    agent.ended().await;
    agent.publish(&Agent::clone_task("poison", 1, upstream, "1_app")).await;
    agent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_kills_the_agent_before_it_is_read_is_dead_lettered_after_a_few_starts() {
    let upstream = Repository::new();
    let mut agent = with_poison_ahead(&upstream).await;
    // Two until one delivery is taken at a time, and three of those.
    assert_eq!(deaths_at(&mut agent, Step::Received).await, 5);
    assert!(agent.log().contains("without a look"), "{}", agent.log());
    agent.kill().await;
    agent.start(&[]);
    agent.publish(&Agent::clone_task("fine", 2, &upstream, "2_app")).await;
    all_end_once(&mut agent, &["fine".to_owned()]).await;
    assert_eq!(starts(&agent, "poison"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_kills_the_agent_before_it_runs_ends_as_crashed_after_a_few_starts() {
    let upstream = Repository::new();
    let mut agent = with_poison_ahead(&upstream).await;
    assert_eq!(deaths_at(&mut agent, Step::Admitted).await, 5);
    let end = agent.end("poison", 0).await;
    assert_eq!((end.status, end.error.unwrap().class), (Status::Failed, ErrorClass::Crashed));
    all_end_once(&mut agent, &["poison".to_owned()]).await;
}
