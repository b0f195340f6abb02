//! The agent is killed at each step of a message's path, by an observer given to the real process; after a restart every
//! task has exactly one terminal state a round, nothing is lost, and projects are done or not done.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::process::ExitStatusExt as _;

use haul::{protocol::Status, worker::Step};
use serde_json::Value;
use support::{
    agent::{Agent, visible_projects},
    rabbit::Rabbit,
    repository::{Repository, assert_whole, git},
};

/// The number of `SIGKILL`.
const KILLED: i32 = 9;

/// Starts an agent that dies at `step`, gives it `task`, and checks that it died there and nowhere else.
async fn dies_at(agent: &mut Agent, step: Step, task: &Value) {
    agent.start(&["--observe", step.as_str()]);
    agent.publish(task).await;
    let status = agent.ended().await;
    assert_eq!(status.signal(), Some(KILLED), "{status}; its log:\n{}", agent.log());
    let id = task["task_id"].as_str().unwrap();
    let died = format!("killed at step {step} of task {}", if step == Step::Received { "?" } else { id });
    assert!(agent.log().contains(&died), "{died}; its log:\n{}", agent.log());
}

/// What must hold once a restarted agent is through with a task.
async fn one_end(agent: &mut Agent, id: &str, expected: Status) {
    agent.start(&[]);
    let end = agent.end(id, 0).await;
    assert_eq!(end.status, expected, "{end:?}");
    agent.ready().await;
    agent.drained().await;
    agent.signal(rustix::process::Signal::TERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
    // Whatever was delivered again in between has been answered by now: still one state.
    let states = agent.terminal_states(id, 0);
    assert_eq!(states.len(), 1, "{states:?}");
}

async fn clone_killed_at(step: Step) {
    let upstream = Repository::new();
    let head = git(&upstream.work(), &["rev-parse", "HEAD"]);
    let mut agent = Agent::new(Rabbit::shared()).await;
    dies_at(&mut agent, step, &Agent::clone_task("t", 7, &upstream, "7_app")).await;
    let project = agent.projects().join("7_app");
    if !visible_projects(&agent.projects()).is_empty() {
        assert_whole(&project, &head);
    }
    one_end(&mut agent, "t", Status::Succeeded).await;
    assert_whole(&project, &head);
    assert_eq!(visible_projects(&agent.projects()), ["7_app"]);
}

/// An agent that has cloned project 7 into `7_app`, and does not run.
async fn with_a_project(upstream: &Repository) -> Agent {
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.start(&[]);
    agent.publish(&Agent::clone_task("c", 7, upstream, "7_app")).await;
    agent.end("c", 0).await;
    agent.kill().await;
    agent
}

async fn pull_killed_at(step: Step) {
    let upstream = Repository::new();
    let mut agent = with_a_project(&upstream).await;
    let project = agent.projects().join("7_app");
    std::fs::write(project.join("mine"), "untouched").unwrap();
    let head = upstream.commit("README", "second\n");
    dies_at(&mut agent, step, &Agent::task("t", "pull", 7)).await;
    one_end(&mut agent, "t", Status::Succeeded).await;
    assert_eq!(std::fs::read_to_string(project.join("mine")).unwrap(), "untouched");
    std::fs::remove_file(project.join("mine")).unwrap();
    assert_whole(&project, &head);
}

async fn delete_killed_at(step: Step) {
    let upstream = Repository::new();
    let mut agent = with_a_project(&upstream).await;
    dies_at(&mut agent, step, &Agent::task("t", "delete", 7)).await;
    one_end(&mut agent, "t", Status::Succeeded).await;
    assert!(visible_projects(&agent.projects()).is_empty());
}

async fn failing_clone_killed_at(step: Step) {
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    let mut task = Agent::clone_task("t", 7, &upstream, "7_app");
    task["branch"] = "no-such-branch".into();
    dies_at(&mut agent, step, &task).await;
    one_end(&mut agent, "t", Status::Failed).await;
    // The copy may have been confirmed before the crash and be paid again after it, with the same identity.
    agent.start(&[]);
    agent.consuming().await;
    let letters = agent.dead_letter_rounds().await;
    assert!(!letters.is_empty() && letters.iter().all(|round| *round == 1), "{letters:?}");
    assert!(visible_projects(&agent.projects()).is_empty());
}

async fn retried_clone_killed_at(step: Step) {
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_RETRY__MAX_ATTEMPTS", "2");
    // Nobody listens on port 1: the attempt fails with class network and is retried.
    let task = serde_json::json!({"v": 1, "task_id": "t", "kind": "clone", "project_id": 7,
        "git_url": "http://127.0.0.1:1/x.git", "target_path": "7_app"});
    dies_at(&mut agent, step, &task).await;
    one_end(&mut agent, "t", Status::Failed).await;
    assert!(visible_projects(&agent.projects()).is_empty());
}

macro_rules! killed_at {
    ($($test:ident: $how:ident($step:ident);)*) => {
        $(#[tokio::test] async fn $test() { $how(Step::$step).await; })*
    };
}

killed_at! {
    a_clone_killed_when_received: clone_killed_at(Received);
    a_clone_killed_when_decoded: clone_killed_at(Decoded);
    a_clone_killed_when_admitted: clone_killed_at(Admitted);
    a_clone_killed_when_queued: clone_killed_at(Queued);
    a_clone_killed_at_its_turn: clone_killed_at(Turn);
    a_clone_killed_when_begun: clone_killed_at(Begun);
    a_clone_killed_before_its_rename: clone_killed_at(Asked);
    a_clone_killed_when_executed: clone_killed_at(Executed);
    a_clone_killed_when_settled: clone_killed_at(Settled);
    a_clone_killed_when_its_event_is_confirmed: clone_killed_at(EventConfirmed);
    a_clone_killed_when_its_event_is_struck_off: clone_killed_at(EventStruck);
    a_clone_killed_when_acknowledged: clone_killed_at(Acked);
    a_pull_killed_when_begun: pull_killed_at(Begun);
    a_pull_killed_before_it_writes: pull_killed_at(Asked);
    a_pull_killed_when_executed: pull_killed_at(Executed);
    a_pull_killed_when_settled: pull_killed_at(Settled);
    a_delete_killed_when_begun: delete_killed_at(Begun);
    a_delete_killed_before_its_rename: delete_killed_at(Asked);
    a_delete_killed_when_executed: delete_killed_at(Executed);
    a_delete_killed_when_settled: delete_killed_at(Settled);
    a_failure_killed_when_settled: failing_clone_killed_at(Settled);
    a_failure_killed_when_its_dead_letter_is_confirmed: failing_clone_killed_at(DeadLetterConfirmed);
    a_failure_killed_when_its_dead_letter_is_struck_off: failing_clone_killed_at(DeadLetterStruck);
    a_failure_killed_when_its_event_is_confirmed: failing_clone_killed_at(EventConfirmed);
    a_failure_killed_when_its_event_is_struck_off: failing_clone_killed_at(EventStruck);
    a_failure_killed_when_acknowledged: failing_clone_killed_at(Acked);
    a_retry_killed_when_its_copy_is_confirmed: retried_clone_killed_at(CopyConfirmed);
    a_retry_killed_when_its_copy_is_noted: retried_clone_killed_at(CopyNoted);
    a_retry_killed_when_acknowledged: retried_clone_killed_at(Acked);
}
