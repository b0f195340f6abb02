//! What is known of one task: a row that a master keeps, and what an event does to it. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Submission;
use crate::protocol::{Event, EventError, Kind, NodeName, Progress, ProjectId, Round, Status, TaskId, TaskResult};

/// One task, as its events tell of it.
///
/// Events may come twice, late and in any order: what a row says depends only on which of them have come
/// (`the_order_and_number_of_arrivals_change_nothing`). A master keeps the row as JSON, or the parts it searches by in
/// columns of their own beside it, and calls [`TaskRow::apply`] in the transaction that it commits before it
/// acknowledges the event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskRow {
    task_id: TaskId,
    node: NodeName,
    kind: Kind,
    project_id: ProjectId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    /// Of the upstream, where the task names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    wanted_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    confirmed_at: Option<Timestamp>,
    round: Round,
    /// The latest event of each start of the agent in this round; empty once it has ended.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    boots: BTreeMap<String, Event>,
    /// The first terminal event of this round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    end: Option<Box<Event>>,
    /// What became of the history of a clone whose tree was shown first. It may come before the end does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    history: Option<Box<Event>>,
}

/// What an event changed of its task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskChange {
    /// The task stands elsewhere than before.
    Moved,
    /// The task has ended in this round.
    Ended,
    /// What became of its history is known.
    HistoryTold,
    /// Nothing, and why.
    Nothing(Ignored),
}

/// Why an event changed nothing of its task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ignored {
    /// It was applied before.
    Again,
    /// The task was replayed since: it is of a lower round.
    OlderRound,
    /// The round has ended already.
    AfterEnd,
    /// A later event of the same start of the agent came first.
    Overtaken,
    /// It is of an earlier start of the agent than what is known.
    OlderBoot,
    /// A second, different end of one round: agents never send one. Whoever sees it has found a defect.
    SecondEnd,
    /// It tells of another task.
    OtherTask,
}

impl TaskRow {
    /// The row of a task that is about to be published to `node`: write it down first, then publish, then
    /// [`confirm`](Self::confirm).
    #[must_use]
    pub fn wanted(node: &NodeName, task: &Submission, now: Timestamp) -> Self {
        Self {
            node: node.clone(),
            generation: task.generation(),
            host: task.host(),
            wanted_at: Some(now),
            ..Self::bare(task.task_id(), node, task.kind(), task.project_id())
        }
    }

    /// The row of a task that somebody else published, with the first event that was heard of it.
    #[must_use]
    pub fn heard(event: &Event) -> Self {
        let mut row = Self::unheard(event);
        row.apply(event);
        row
    }

    /// The row of the task that an event tells of, before it is applied.
    pub(super) fn unheard(event: &Event) -> Self {
        Self::bare(&event.task_id, &event.node, event.kind, event.project_id)
    }

    fn bare(task_id: &TaskId, node: &NodeName, kind: Kind, project_id: ProjectId) -> Self {
        Self {
            task_id: task_id.clone(),
            node: node.clone(),
            kind,
            project_id,
            generation: None,
            host: None,
            wanted_at: None,
            confirmed_at: None,
            round: 0,
            boots: BTreeMap::new(),
            end: None,
            history: None,
        }
    }

    /// Notes that the broker has the task.
    pub fn confirm(&mut self, now: Timestamp) {
        self.confirmed_at = Some(now);
    }

    /// Notes what the master knows of a task whose first event was here before its row.
    pub(super) fn want(&mut self, task: &Submission, now: Timestamp) {
        self.generation = self.generation.or(task.generation());
        self.host = self.host.take().or_else(|| task.host());
        self.wanted_at.get_or_insert(now);
    }

    /// Takes in one event.
    ///
    /// The first terminal event of a round wins and beats whatever else is of that round; a higher round replaces a lower;
    /// `seq` orders the events of one start of the agent. Between starts, which `seq` does not order, the higher attempt
    /// counts, then the later moment: that only ever decides what is shown until the end comes.
    pub fn apply(&mut self, event: &Event) -> TaskChange {
        use TaskChange::{Ended, HistoryTold, Moved, Nothing};
        if event.task_id != self.task_id {
            return Nothing(Ignored::OtherTask);
        }
        if event.round < self.round {
            return Nothing(Ignored::OlderRound);
        }
        if event.round > self.round {
            self.round = event.round;
            self.boots.clear();
            (self.end, self.history) = (None, None);
        }
        let change = if event.status == Status::History {
            if self.history.is_some() {
                Nothing(Ignored::Again)
            } else {
                self.history = Some(Box::new(event.clone()));
                HistoryTold
            }
        } else if let Some(end) = &self.end {
            Nothing(match event.status.is_terminal() {
                true if end.event_id == event.event_id => Ignored::Again,
                true => Ignored::SecondEnd,
                false => Ignored::AfterEnd,
            })
        } else if event.status.is_terminal() {
            self.boots.clear();
            self.end = Some(Box::new(event.clone()));
            Ended
        } else {
            match self.boots.get(&event.boot) {
                Some(known) if known.seq == event.seq => Nothing(Ignored::Again),
                Some(known) if known.seq > event.seq => Nothing(Ignored::Overtaken),
                _ => {
                    self.boots.insert(event.boot.clone(), event.clone());
                    let shown = self.latest().is_some_and(|latest| latest.boot == event.boot);
                    if shown { Moved } else { Nothing(Ignored::OlderBoot) }
                }
            }
        };
        if let Some(latest) = self.latest() {
            self.node = latest.node.clone();
        }
        self.generation = self.generation.or(event.generation);
        change
    }

    /// The event that says where the task stands; nothing until one was heard in this round.
    #[must_use]
    pub fn latest(&self) -> Option<&Event> {
        let open = || self.boots.values().max_by_key(|event| (event.attempt, event.at, &event.boot));
        self.end.as_deref().or_else(open)
    }

    /// Identity of the task.
    #[must_use]
    pub fn task_id(&self) -> &TaskId {
        &self.task_id
    }

    /// The node that reports of it, or that it was sent to.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its project.
    #[must_use]
    pub fn project_id(&self) -> ProjectId {
        self.project_id
    }

    /// The master's own order, if it has one.
    #[must_use]
    pub fn generation(&self) -> Option<u64> {
        self.generation
    }

    /// The host of its upstream, where the task named one.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// The round: 0, and one more for each replay.
    #[must_use]
    pub fn round(&self) -> Round {
        self.round
    }

    /// Where it stands; nothing while no event of this round was heard.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        self.latest().map(|event| event.status)
    }

    /// Whether it has ended, until somebody replays it.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.end.is_some()
    }

    /// The charged attempt; 0 before the first.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.latest().map_or(0, |event| event.attempt)
    }

    /// What came out of it.
    #[must_use]
    pub fn result(&self) -> Option<&TaskResult> {
        self.end.as_ref()?.result.as_ref()
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Option<&Progress> {
        self.latest()?.progress.as_ref()
    }

    /// What went wrong, at last.
    #[must_use]
    pub fn error(&self) -> Option<&EventError> {
        self.latest()?.error.as_ref()
    }

    /// The event that tells what became of the history of a clone whose tree was shown first.
    #[must_use]
    pub fn history(&self) -> Option<&Event> {
        self.history.as_deref()
    }

    /// When the master wrote it down, if it did.
    #[must_use]
    pub fn wanted_at(&self) -> Option<Timestamp> {
        self.wanted_at
    }

    /// When the broker last confirmed it to this master, if it did.
    #[must_use]
    pub fn confirmed_at(&self) -> Option<Timestamp> {
        self.confirmed_at
    }

    /// The last moment of which anything is known; nothing of a row without any.
    #[must_use]
    pub fn last_news(&self) -> Option<Timestamp> {
        [self.latest().map(|event| event.at), self.confirmed_at, self.wanted_at].into_iter().flatten().max()
    }
}
