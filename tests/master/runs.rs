//! Runs of tasks as agents would tell of them: the truth, and the events in the order in which they happened.

use std::collections::BTreeMap;

use haul::{
    failure::ErrorClass,
    protocol::{
        Event, EventError, Kind, Place, Progress, ProjectId, ProjectStatus, Status, TaskId, TaskResult, VERSION,
    },
};
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

use crate::node;

/// One thing that may happen to a task of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    Accept,
    Start,
    Progress,
    Retry,
    Succeed,
    Fail,
    Cancel,
    History,
    Replay,
    /// The agent begins anew; its clock may have been set meanwhile.
    Restart,
}

/// A task of a run.
#[derive(Clone, Debug)]
pub(crate) struct Truth {
    pub(crate) id: TaskId,
    pub(crate) kind: Kind,
    pub(crate) project: ProjectId,
    pub(crate) generation: Option<u64>,
    pub(crate) round: u32,
    pub(crate) end: Option<Status>,
    attempt: u32,
    running: bool,
    place: Option<Place>,
    history_told: bool,
    succeeded_clone: bool,
}

/// A project of a run.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProjectTruth {
    pub(crate) seq: u64,
    pub(crate) active: bool,
    pub(crate) deleted: bool,
    pub(crate) head: Option<String>,
    mark: Option<Place>,
}

/// An agent that does nothing but tell.
#[derive(Clone, Debug)]
pub(crate) struct Sim {
    pub(crate) tasks: Vec<Truth>,
    pub(crate) projects: BTreeMap<ProjectId, ProjectTruth>,
    pub(crate) events: Vec<Event>,
    boot: u32,
    seq: u64,
    clock: Timestamp,
}

impl Sim {
    pub(crate) fn new(tasks: impl IntoIterator<Item = (Kind, ProjectId, Option<u64>)>) -> Self {
        let truth = |(number, (kind, project, generation))| Truth {
            id: TaskId::new(format!("t{number}")).unwrap(),
            kind,
            project,
            generation,
            round: 0,
            end: None,
            attempt: 0,
            running: false,
            place: None,
            history_told: false,
            succeeded_clone: false,
        };
        Self {
            tasks: tasks.into_iter().enumerate().map(truth).collect(),
            projects: BTreeMap::new(),
            events: Vec::new(),
            boot: 0,
            seq: 0,
            clock: Timestamp::from_second(1_800_000_000).unwrap(),
        }
    }

    /// The events of one clone that goes well.
    pub(crate) fn one_clone() -> Vec<Event> {
        let mut sim = Self::new([(Kind::Clone, 42, None)]);
        for step in [Step::Accept, Step::Start, Step::Succeed] {
            sim.step(0, step);
        }
        sim.events
    }

    /// The agent's clock is set; it begins anew, as it does in tests that are fair to it.
    pub(crate) fn set_clock(&mut self, by: SignedDuration) {
        self.clock += by;
    }

    /// Lets something happen, where it may.
    pub(crate) fn step(&mut self, task: usize, step: Step) {
        self.clock += SignedDuration::from_millis(7);
        let index = task % self.tasks.len();
        if let Step::Restart = step {
            self.boot += 1;
            self.seq = 0;
            for task in &mut self.tasks {
                task.running = false;
            }
            return;
        }
        let task = &mut self.tasks[index];
        let ended = task.end.is_some();
        match step {
            Step::Accept if !ended && !task.running => {
                self.admit(index);
                self.tell(index, Status::Accepted, ProjectStatus::Pending);
            }
            Step::Start if !ended && !task.running => {
                self.admit(index);
                self.tasks[index].running = true;
                self.tell(index, Status::Started, ProjectStatus::Syncing);
            }
            Step::Progress if task.running => {
                self.tell(index, Status::Progress, ProjectStatus::Syncing);
                let phase = "receiving".to_owned();
                let done = self.seq;
                self.last().progress = Some(Progress { phase, done, ..Progress::default() });
            }
            Step::Retry if task.running => {
                task.running = false;
                self.tell(index, Status::Retrying, ProjectStatus::Syncing);
                self.fail(ErrorClass::Network);
                self.tasks[index].attempt += 1;
            }
            Step::Succeed if task.running => self.succeed(index),
            Step::Fail if task.running => self.end(index, Status::Failed),
            Step::Cancel if !ended => {
                self.admit(index);
                self.end(index, Status::Cancelled);
            }
            // None is told of a project that was deleted meanwhile.
            Step::History if task.succeeded_clone && !task.history_told && self.projects[&task.project].active => {
                task.history_told = true;
                self.tell(index, Status::History, ProjectStatus::Active);
                self.last().result = Some(TaskResult { history: Some("attached".to_owned()), ..TaskResult::default() });
            }
            Step::Replay if matches!(task.end, Some(Status::Failed)) => {
                task.round += 1;
                (task.end, task.attempt) = (None, 1);
            }
            _ => {}
        }
    }

    /// Ends every task that has not ended.
    pub(crate) fn finish(&mut self) {
        for index in 0..self.tasks.len() {
            self.step(index, Step::Start);
            self.step(index, Step::Succeed);
        }
    }

    fn admit(&mut self, index: usize) {
        let arrived = self.clock.as_microsecond();
        let task = &mut self.tasks[index];
        task.attempt = task.attempt.max(1);
        let generation = task.generation;
        task.place.get_or_insert(Place { generation, arrived });
    }

    fn succeed(&mut self, index: usize) {
        let (kind, project, place) = {
            let task = &self.tasks[index];
            (task.kind, task.project, task.place.unwrap())
        };
        let state = self.projects.entry(project).or_default();
        if kind.changes_project() && state.mark.is_some_and(|mark| place.is_older_than(mark)) {
            return self.end(index, Status::Superseded);
        }
        if kind != Kind::Clone && !state.active {
            return self.end(index, Status::Failed);
        }
        if kind.changes_project() {
            state.seq += 1;
            state.mark = Some(place);
            state.active = kind != Kind::Delete;
            state.deleted = !state.active;
            state.head = state.active.then(|| format!("{:040x}", self.clock.as_microsecond()));
        }
        let head = state.head.clone();
        self.tasks[index].succeeded_clone = kind == Kind::Clone;
        self.end(index, Status::Succeeded);
        self.last().result = Some(TaskResult {
            local_path: Some(format!("{project}_app")),
            branch: head.as_ref().map(|_| "main".to_owned()),
            head,
            ..TaskResult::default()
        });
    }

    fn end(&mut self, index: usize, status: Status) {
        let task = &mut self.tasks[index];
        (task.end, task.running) = (Some(status), false);
        let shown = self.projects.entry(task.project).or_default().shown();
        self.tell(index, status, shown);
        if !matches!(status, Status::Succeeded | Status::Cancelled) {
            self.fail(ErrorClass::Auth);
        }
    }

    fn fail(&mut self, class: ErrorClass) {
        let retry_at = (class == ErrorClass::Network).then(|| self.clock + SignedDuration::from_secs(5));
        self.last().error = Some(EventError { class, message: format!("at {}", self.clock), retry_at });
    }

    fn last(&mut self) -> &mut Event {
        self.events.last_mut().unwrap()
    }

    fn tell(&mut self, index: usize, status: Status, project_status: ProjectStatus) {
        self.seq += 1;
        let task = &self.tasks[index];
        self.events.push(Event {
            v: VERSION,
            event_id: format!("e{}", self.events.len()),
            at: self.clock,
            node: node("n1"),
            boot: format!("boot-{}", self.boot),
            seq: self.seq,
            task_id: task.id.clone(),
            kind: task.kind,
            project_id: task.project,
            generation: task.generation,
            project_seq: self.projects.get(&task.project).map_or(0, |project| project.seq),
            round: task.round,
            attempt: task.attempt,
            status,
            project_status,
            result: None,
            progress: None,
            error: None,
        });
    }
}

impl ProjectTruth {
    /// What a master should show once nothing is under way.
    pub(crate) fn shown(&self) -> ProjectStatus {
        match (self.active, self.deleted) {
            (true, _) => ProjectStatus::Active,
            (_, true) => ProjectStatus::Deleted,
            _ => ProjectStatus::Error,
        }
    }
}

fn a_step() -> impl Strategy<Value = (usize, Step, i64)> {
    let step = prop_oneof![
        3 => Just(Step::Accept),
        6 => Just(Step::Start),
        2 => Just(Step::Progress),
        2 => Just(Step::Retry),
        4 => Just(Step::Succeed),
        2 => Just(Step::Fail),
        1 => Just(Step::Cancel),
        1 => Just(Step::History),
        2 => Just(Step::Replay),
        1 => Just(Step::Restart),
    ];
    (0_usize..8, step, -100_000_i64..100_000)
}

/// A run of some tasks, and the seconds by which a clock would be set at each of its steps.
pub(crate) fn a_run() -> impl Strategy<Value = (Sim, Vec<(usize, Step, i64)>)> {
    let kind =
        prop_oneof![4 => Just(Kind::Clone), 2 => Just(Kind::Pull), 2 => Just(Kind::Delete), 1 => Just(Kind::Status)];
    let task = (kind, 1_i64..3, proptest::option::of(1_u64..6));
    (proptest::collection::vec(task, 1..6).prop_map(Sim::new), proptest::collection::vec(a_step(), 1..60))
}
