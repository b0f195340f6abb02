//! Why a task has not ended: each cause on a real worker and a broker in memory where it can be had there, and what heals it.

use std::time::Duration;

use haul::{
    broker::{Broker as _, Consume, Depth, Topology},
    failure::ErrorClass,
    master::{
        AgentSeen, Mend, NodeSeen, Patience, Reconciler, ReconcilerSettings, Seen, Stuck, Submission, TaskRow, Why,
        diagnose,
    },
    protocol::{Control, ControlAnswer, Event, HostState, Status, TaskId},
    retry::RetrySettings,
};
use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::{
    client, fleet, node,
    runs::{Sim, Step},
    support::pipeline::{Pipeline, Script},
};

/// Longer than a reconciler's patience, shorter than any retry of these tests.
const A_WHILE: Duration = Duration::from_mins(2);

/// A worker on a broker in memory, and a master beside it.
struct Scene {
    pipeline: Pipeline,
    client: haul::master::Client,
    begun: Instant,
}

impl Scene {
    async fn new() -> Self {
        let base = Duration::from_mins(10);
        let begun = Instant::now();
        let pipeline = Pipeline::start_with(RetrySettings { base, ..RetrySettings::default() }).await;
        pipeline.until_ready(true).await;
        Self { client: client(pipeline.broker.clone()), pipeline, begun }
    }

    fn now(&self) -> Timestamp {
        let elapsed = SignedDuration::try_from(self.begun.elapsed()).unwrap();
        Timestamp::from_second(1_800_000_000).unwrap() + elapsed
    }

    fn task(id: &str, project: i64) -> Submission {
        let draft = Submission::clone(project, "https://git.example/team/app.git", format!("{project}_app"));
        draft.task_id(TaskId::new(id).unwrap()).build().unwrap()
    }

    /// Publishes a task and notes it.
    async fn publish(&self, task: &Submission) -> TaskRow {
        let mut row = TaskRow::wanted(&node("n1"), task, self.now());
        self.client.publish(&node("n1"), task).await.unwrap();
        row.confirm(self.now());
        row
    }

    /// Lets the master hear some of what was told.
    fn hear(&self, row: &mut TaskRow, wanted: impl Fn(Status) -> bool) {
        for event in self.pipeline.events(row.task_id().as_str()).iter().filter(|event| wanted(event.status)) {
            row.apply(event);
        }
    }

    fn reconciler(&self, reads_dead_letters: bool) -> Reconciler {
        Reconciler::new(self.client.clone(), ReconcilerSettings { reads_dead_letters, ..ReconcilerSettings::default() })
    }

    /// What is said of a task after a while.
    async fn explained(&self, row: &TaskRow) -> Stuck {
        tokio::time::sleep(A_WHILE).await;
        self.reconciler(false).reconcile([row], self.now()).await.unwrap().remove(0)
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_that_nobody_has_is_lost_and_publishing_it_again_ends_it() {
    let scene = Scene::new().await;
    let task = Scene::task("t", 1);
    let mut row = TaskRow::wanted(&node("n1"), &task, scene.now());
    row.confirm(scene.now());
    let stuck = scene.explained(&row).await;
    assert_eq!((&stuck.why, &stuck.mend), (&Why::Lost, &Mend::PublishAgain));
    assert!(stuck.to_string().contains("task t on n1: neither a queue nor the agent has it"), "{stuck}");
    scene.client.publish(&node("n1"), &task).await.unwrap();
    scene.pipeline.ends("t", Status::Succeeded).await;
    scene.hear(&mut row, |_| true);
    assert!(row.is_done());
    assert!(scene.reconciler(false).reconcile([&row], scene.now()).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_end_that_was_missed_is_told_again_when_the_task_is_published_again() {
    let scene = Scene::new().await;
    let task = Scene::task("t", 1);
    let mut row = scene.publish(&task).await;
    scene.pipeline.ends("t", Status::Succeeded).await;
    scene.hear(&mut row, |status| status == Status::Started);
    let stuck = scene.explained(&row).await;
    assert_eq!((&stuck.why, &stuck.mend), (&Why::EndMissed, &Mend::PublishAgain));
    scene.client.publish(&node("n1"), &task).await.unwrap();
    scene.pipeline.told("t", 2).await;
    scene.hear(&mut row, |_| true);
    assert_eq!(row.status(), Some(Status::Succeeded));
    assert_eq!(scene.pipeline.executions("t"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_whose_end_was_missed_is_found_and_stays_where_it_is() {
    let scene = Scene::new().await;
    let task = Scene::task("t", 1);
    scene.pipeline.script("t", [Script::Fail(ErrorClass::Auth)]);
    let mut row = scene.publish(&task).await;
    scene.pipeline.ends("t", Status::Failed).await;
    scene.hear(&mut row, |status| status == Status::Started);
    tokio::time::sleep(A_WHILE).await;
    let stuck = scene.reconciler(true).reconcile([&row], scene.now()).await.unwrap().remove(0);
    assert!(matches!(&stuck.why, Why::DeadLettered(dead) if dead.class == "auth" && dead.round == 1), "{stuck}");
    assert_eq!(scene.pipeline.dead_letters(), 1);
    scene.client.publish(&node("n1"), &task).await.unwrap();
    scene.pipeline.told("t", 2).await;
    scene.hear(&mut row, |_| true);
    assert_eq!(row.status(), Some(Status::Failed));
    assert_eq!(scene.pipeline.dead_letters(), 1, "asking again does not bury it twice");
}

#[tokio::test(start_paused = true)]
async fn a_task_in_retry_says_until_when_and_why() {
    let scene = Scene::new().await;
    scene.pipeline.script("t", [Script::Fail(ErrorClass::Disk)]);
    let mut row = scene.publish(&Scene::task("t", 1)).await;
    let event = scene.pipeline.saw("t", Status::Retrying).await;
    scene.hear(&mut row, |_| true);
    let due = event.error.unwrap().retry_at.unwrap();
    let now = due - SignedDuration::from_secs(1);
    let patience = Patience { quiet: Duration::ZERO, ..Patience::default() };
    let settings = ReconcilerSettings { patience, ..ReconcilerSettings::default() };
    let stuck = Reconciler::new(scene.client.clone(), settings).reconcile([&row], now).await.unwrap().remove(0);
    assert!(matches!(stuck.why, Why::InRetry { until, class: ErrorClass::Disk, .. } if until == due), "{stuck}");
    assert_eq!(stuck.mend, Mend::Wait);
}

#[tokio::test(start_paused = true)]
async fn a_pull_that_may_not_overtake_its_clone_may_be_held_and_is_not_called_lost() {
    let scene = Scene::new().await;
    scene.pipeline.script("clone", [Script::Fail(ErrorClass::Network); 2]);
    scene.publish(&Scene::task("clone", 1)).await;
    scene.pipeline.saw("clone", Status::Retrying).await;
    let pull = Submission::pull(1).task_id(TaskId::new("pull").unwrap()).build().unwrap();
    let mut row = scene.publish(&pull).await;
    scene.hear(&mut row, |_| true);
    let stuck = scene.explained(&row).await;
    assert!(matches!(stuck.why, Why::MayBeHeld { copies: 2 }), "{stuck}");
}

#[tokio::test(start_paused = true)]
async fn a_running_task_says_for_how_long_it_was_silent() {
    let scene = Scene::new().await;
    scene.pipeline.script("t", [Script::UntilStopped]);
    let mut row = scene.publish(&Scene::task("t", 1)).await;
    scene.pipeline.saw("t", Status::Started).await;
    scene.hear(&mut row, |_| true);
    let stuck = scene.explained(&row).await;
    assert!(matches!(stuck.why, Why::Running { silent_secs } if silent_secs >= 120), "{stuck}");
}

#[tokio::test(start_paused = true)]
async fn a_task_that_waits_for_a_slot_says_behind_how_many() {
    let scene = Scene::new().await;
    for (id, project) in [("a", 1), ("b", 2)] {
        scene.pipeline.script(id, [Script::UntilStopped]);
        scene.publish(&Scene::task(id, project)).await;
        scene.pipeline.saw(id, Status::Started).await;
    }
    let row = scene.publish(&Scene::task("t", 3)).await;
    let stuck = scene.explained(&row).await;
    assert_eq!(stuck.why, Why::InWindow { waiting: 1, running: 2 });
}

#[tokio::test(start_paused = true)]
async fn a_paused_agent_is_named_and_resuming_it_ends_the_task() {
    let scene = Scene::new().await;
    assert_eq!(scene.client.tell(&node("n1"), Control::Pause).await.unwrap().answer, "paused");
    while scene.client.broker().depth("haul.node.n1").await.unwrap().unwrap().consumers > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let row = scene.publish(&Scene::task("t", 1)).await;
    let stuck = scene.explained(&row).await;
    assert_eq!((&stuck.why, &stuck.mend), (&Why::Paused, &Mend::Resume));
    assert!(stuck.to_string().contains("haul resume"), "{stuck}");
    scene.client.tell(&node("n1"), Control::Resume).await.unwrap();
    scene.pipeline.ends("t", Status::Succeeded).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_down_keeps_its_tasks_and_a_node_without_a_queue_lost_them() {
    let (memory, names) = fleet().await;
    let client = client(memory.clone());
    let task = Scene::task("t", 1);
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    let mut row = TaskRow::wanted(&node("n1"), &task, now);
    client.publish(&node("n1"), &task).await.unwrap();
    row.confirm(now);
    let reconciler = Reconciler::new(client, ReconcilerSettings::default());
    let late = now + SignedDuration::from_mins(5);
    let explain = async || reconciler.reconcile([&row], late).await.unwrap().remove(0);
    let down = explain().await;
    assert_eq!((&down.why, &down.mend), (&Why::NodeDown { waiting: 1 }, &Mend::StartAgent));
    memory.delete_queue(&names.node(&node("n1")));
    let gone = explain().await;
    assert_eq!((&gone.why, &gone.mend), (&Why::NoQueue, &Mend::EnrolAndPublishAgain));
    assert!(gone.to_string().contains("haul topology apply --node n1"), "{gone}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_connected_and_does_not_answer_is_named() {
    let (memory, names) = fleet().await;
    let mut held = Vec::new();
    for queue in [names.node(&node("n1")), names.control_node(&node("n1"))] {
        let consume = Consume { queue, tag: "deaf".to_owned(), prefetch: 1, declare: Topology::default() };
        held.push(memory.consume(consume).await.unwrap());
    }
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    let mut row = TaskRow::wanted(&node("n1"), &Scene::task("t", 1), now);
    row.confirm(now);
    let reconciler = Reconciler::new(client(memory), ReconcilerSettings::default());
    let stuck = reconciler.reconcile([&row], now + SignedDuration::from_mins(5)).await.unwrap().remove(0);
    assert_eq!((&stuck.why, &stuck.mend), (&Why::AgentSilent, &Mend::LookAfterAgent));
}

#[tokio::test(start_paused = true)]
async fn a_task_that_was_written_down_and_not_confirmed_is_to_be_published() {
    let scene = Scene::new().await;
    let row = TaskRow::wanted(&node("n1"), &Scene::task("t", 1), scene.now());
    let stuck = scene.explained(&row).await;
    assert_eq!((&stuck.why, &stuck.mend), (&Why::NotConfirmed, &Mend::PublishAgain));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_answers_and_takes_nothing_is_named() {
    let seen = seen(Depth { messages: 3, consumers: 0 }, said(|_| ()));
    assert_eq!(only(&confirmed(), &seen).why, Why::NotConsuming { waiting: 3 });
}

fn base() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

/// Ten minutes after the tasks of these tests.
fn later() -> Timestamp {
    base() + SignedDuration::from_mins(10)
}

fn confirmed() -> TaskRow {
    let mut row = TaskRow::wanted(&node("n1"), &Scene::task("t", 1), base());
    row.confirm(base());
    row
}

fn said(change: impl FnOnce(&mut ControlAnswer)) -> AgentSeen {
    let mut answer: ControlAnswer = serde_json::from_value(serde_json::json!({"v": 1, "event_id": "e",
        "at": "2026-01-02T03:04:05Z", "node": "n1", "boot": "b", "answer": "state", "running": 0, "waiting": 0,
        "paused": false}))
    .unwrap();
    change(&mut answer);
    AgentSeen::Said(Box::new(answer))
}

fn seen(queue: Depth, agent: AgentSeen) -> Seen {
    Seen { nodes: [(node("n1"), NodeSeen { queue: Some(queue), agent })].into(), ..Seen::default() }
}

fn idle() -> Depth {
    Depth { messages: 0, consumers: 1 }
}

fn only(row: &TaskRow, seen: &Seen) -> Stuck {
    diagnose([row], seen, &Patience::default(), later()).remove(0)
}

/// A row that heard these steps of its task.
fn heard(steps: &[Step], change: impl Fn(&mut Event)) -> TaskRow {
    let mut sim = Sim::new([(haul::protocol::Kind::Clone, 1, None)]);
    for &step in steps {
        sim.step(0, step);
    }
    let mut row: Option<TaskRow> = None;
    for mut event in sim.events {
        event.task_id = TaskId::new("t").unwrap();
        change(&mut event);
        match &mut row {
            Some(row) => drop(row.apply(&event)),
            unheard => *unheard = Some(TaskRow::heard(&event)),
        }
    }
    row.unwrap()
}

#[test]
fn a_task_in_a_long_queue_says_how_long_it_is() {
    let stuck = only(&confirmed(), &seen(Depth { messages: 17, consumers: 1 }, said(|_| ())));
    assert_eq!((&stuck.why, &stuck.mend), (&Why::Queued { waiting: 17 }, &Mend::Wait));
    assert!(stuck.to_string().contains("in which 17 tasks are; nothing needs to be done"), "{stuck}");
}

#[test]
fn a_host_that_is_down_is_the_reason_and_costs_nothing() {
    let due = later() + SignedDuration::from_mins(1);
    let retrying = heard(&[Step::Start, Step::Retry], |event| {
        if let Some(error) = &mut event.error {
            error.retry_at = Some(due);
        }
    });
    let down = |host: &str| HostState {
        host: host.to_owned(),
        paused: Some("down".to_owned()),
        paused_secs: Some(30),
        ..HostState::default()
    };
    let hosts = |hosts: Vec<HostState>| said(|answer| answer.hosts = Some(hosts));
    let stuck = only(&retrying, &seen(idle(), hosts(vec![down("git.example:443")])));
    assert!(
        matches!(&stuck.why, Why::HostPaused { host, until, .. } if host == "git.example:443" && *until == due),
        "{stuck}"
    );
    assert_eq!(stuck.mend, Mend::Wait);
    // Of two it cannot be told which one is the task's, and it is in retry in any case.
    let stuck = only(&retrying, &seen(idle(), hosts(vec![down("a"), down("b")])));
    assert!(matches!(stuck.why, Why::InRetry { .. }), "{stuck}");
}

#[test]
fn before_anything_is_published_again_the_events_that_wait_are_read() {
    let unread = Seen { unread: 9, ..seen(idle(), said(|_| ())) };
    for row in [confirmed(), heard(&[Step::Start], |_| ())] {
        let stuck = only(&row, &unread);
        assert_eq!((&stuck.why, &stuck.mend), (&Why::EventsUnread { waiting: 9 }, &Mend::ReadEvents));
    }
}

#[test]
fn a_retry_that_is_long_overdue_is_no_longer_expected() {
    let due = |due: Timestamp| {
        heard(&[Step::Start, Step::Retry], |event| {
            if let Some(error) = &mut event.error {
                error.retry_at = Some(due);
            }
        })
    };
    let held = Seen { retrying: 4, ..seen(idle(), said(|_| ())) };
    let soon = only(&due(later() - SignedDuration::from_mins(5)), &held);
    assert_eq!(soon.why, Why::MayBeHeld { copies: 4 });
    let never = only(&due(later() - SignedDuration::from_hours(2)), &held);
    assert_eq!((&never.why, &never.mend), (&Why::EndMissed, &Mend::PublishAgain));
}

#[test]
fn a_task_whose_project_is_busy_with_another_waits_for_it() {
    let busy = said(|answer| (answer.running, answer.busy_projects) = (Some(1), Some(vec![1])));
    assert_eq!(only(&confirmed(), &seen(idle(), busy.clone())).why, Why::InWindow { waiting: 0, running: 1 });
    let begun = heard(&[Step::Start], |_| ());
    assert!(matches!(only(&begun, &seen(idle(), busy)).why, Why::Running { .. }));
}

#[test]
fn a_dead_letter_of_an_earlier_round_explains_nothing() {
    let replayed = heard(&[Step::Start, Step::Fail, Step::Replay, Step::Start], |_| ());
    assert_eq!(replayed.round(), 1);
    let dead = |round| haul::master::DeadSeen { round, class: "auth".to_owned(), error: "refused".to_owned() };
    let with = |round| Seen { dead: [(TaskId::new("t").unwrap(), dead(round))].into(), ..seen(idle(), said(|_| ())) };
    assert_eq!(only(&replayed, &with(1)).why, Why::EndMissed);
    assert_eq!(only(&replayed, &with(2)).why, Why::DeadLettered(dead(2)));
}

#[test]
fn what_has_ended_or_was_heard_of_just_now_is_left_alone() {
    let seen = seen(idle(), said(|_| ()));
    let done = heard(&[Step::Start, Step::Succeed], |_| ());
    assert!(diagnose([&done], &seen, &Patience::default(), later()).is_empty());
    let fresh = confirmed();
    let soon = base() + SignedDuration::from_secs(59);
    assert!(diagnose([&fresh], &seen, &Patience::default(), soon).is_empty());
    assert_eq!(diagnose([&fresh], &seen, &Patience::default(), later()).len(), 1);
    let elsewhere = Seen::default();
    assert_eq!(only(&fresh, &elsewhere).why, Why::NotSeen);
}

#[test]
fn a_sentence_is_one_line_whatever_a_stranger_wrote() {
    let retrying = heard(&[Step::Start, Step::Retry], |event| {
        if let Some(error) = &mut event.error {
            error.retry_at = Some(later() + SignedDuration::from_mins(1));
            error.message = "reset\n\u{1b}[31mby peer".to_owned();
        }
    });
    let sentence = only(&retrying, &seen(idle(), said(|_| ()))).to_string();
    assert!(!sentence.chars().any(char::is_control), "{sentence}");
}
