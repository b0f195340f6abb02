//! What is known of one project on one node: a row that a master keeps, and what an event does to it. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::task::{Ignored, TaskChange, TaskRow};
use crate::protocol::{Event, EventError, EventId, Kind, NodeName, ProjectId, ProjectStatus, Status, TaskId};

/// One project on one node.
///
/// `project_seq` counts on each node for itself, so the same project on two nodes is two rows. What a row says depends only
/// on which events have come, not on their order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProjectRow {
    project_id: ProjectId,
    node: NodeName,
    /// The highest that was published or heard of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    /// What the project is while nothing is done to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    standing: Option<Latest<ProjectStatus>>,
    /// How its last task ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ending: Option<Latest<Option<EventError>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    place: Option<Latest<Place>>,
    /// Tasks that have not ended, as far as events tell.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    open: BTreeMap<TaskId, Open>,
}

/// Where a project is and what is checked out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Its directory, relative to the projects directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_path: Option<String>,
    /// The branch; absent where the head is detached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The commit; absent in an empty repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<String>,
}

/// What a task that has not ended says of its project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Open {
    project_seq: u64,
    status: ProjectStatus,
}

/// A value, and which event it is from: a later one replaces it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Latest<T> {
    age: Age,
    value: T,
}

/// How new what an event says of its project is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Age {
    /// Of a task that was applied, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    applied: Option<u64>,
    project_seq: u64,
    /// Decides between tasks of which none changed the project.
    at: Timestamp,
    event_id: EventId,
}

impl Age {
    fn of(event: &Event) -> Self {
        let applied = event.status == Status::Succeeded && event.kind.changes_project();
        Self {
            applied: event.generation.filter(|_| applied),
            project_seq: event.project_seq,
            at: event.at,
            event_id: event.event_id.clone(),
        }
    }

    /// By `project_seq`; but an applied task of a higher generation that ended later is newer all the same: its node lost
    /// its storage and counts from the beginning. Where nothing was lost both say the same.
    fn is_newer_than(&self, other: &Self) -> bool {
        let begun_anew = match (self.applied, other.applied) {
            (Some(ours), Some(theirs)) if ours != theirs => {
                Some(ours > theirs).filter(|&newer| newer == (self.at > other.at))
            }
            _ => None,
        };
        let counted = || (self.project_seq, self.at, &self.event_id) > (other.project_seq, other.at, &other.event_id);
        begun_anew.unwrap_or_else(counted)
    }
}

/// Keeps the newer of the two.
fn offer<T>(kept: &mut Option<Latest<T>>, age: &Age, value: T) {
    if kept.as_ref().is_none_or(|kept| age.is_newer_than(&kept.age)) {
        *kept = Some(Latest { age: age.clone(), value });
    }
}

impl ProjectRow {
    /// A project of which nothing is known yet.
    #[must_use]
    pub fn new(node: &NodeName, project_id: ProjectId) -> Self {
        Self {
            project_id,
            node: node.clone(),
            generation: None,
            standing: None,
            ending: None,
            place: None,
            open: BTreeMap::new(),
        }
    }

    /// Takes in one event, after its task has: `task` is the task's row since then, and `change` what it answered.
    /// Says whether anything is different now.
    ///
    /// `project_status` counts only if its `project_seq` is not older than what is known.
    pub fn apply(&mut self, event: &Event, task: &TaskRow, change: TaskChange) -> bool {
        let foreign = event.project_id != self.project_id || event.node != self.node;
        if foreign || change == TaskChange::Nothing(Ignored::SecondEnd) {
            return false;
        }
        let before = self.clone();
        self.generation = self.generation.max(event.generation);
        match task.latest().filter(|latest| !latest.status.is_terminal()) {
            Some(latest) => {
                let open = Open { project_seq: latest.project_seq, status: latest.project_status };
                self.open.insert(event.task_id.clone(), open);
            }
            None => drop(self.open.remove(&event.task_id)),
        }
        let age = Age::of(event);
        let terminal = event.status.is_terminal();
        if terminal || event.status == Status::History {
            offer(&mut self.standing, &age, event.project_status);
        }
        if terminal {
            offer(&mut self.ending, &age, event.error.clone());
        }
        if event.status == Status::Succeeded {
            let place = match (&event.result, event.kind) {
                (None, _) | (_, Kind::Delete) => Place::default(),
                (Some(result), _) => Place {
                    local_path: result.local_path.clone(),
                    branch: result.branch.clone(),
                    head: result.head.clone(),
                },
            };
            offer(&mut self.place, &age, place);
        }
        *self != before
    }

    /// Forgets what a task said of work under way: its row is no longer kept.
    pub(super) fn forget(&mut self, task: &TaskId) {
        self.open.remove(task);
    }

    /// Notes the generation of a task that is published to the project.
    pub fn published(&mut self, generation: Option<u64>) {
        self.generation = self.generation.max(generation);
    }

    /// The project.
    #[must_use]
    pub fn project_id(&self) -> ProjectId {
        self.project_id
    }

    /// The node.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// What to show: work that is under way, else what the last task left behind. Nothing while nothing was heard.
    #[must_use]
    pub fn status(&self) -> Option<ProjectStatus> {
        use ProjectStatus::{Pending, Syncing};
        let known = self.project_seq();
        let mut open = self.open.values().filter(|open| open.project_seq >= known).map(|open| open.status);
        let first = open.next();
        let under_way = open.fold(first, |shown, status| if status == Syncing { Some(status) } else { shown });
        match under_way {
            Some(Pending | Syncing) => under_way,
            other => self.standing.as_ref().map(|standing| standing.value).or(other),
        }
    }

    /// How many tasks were applied to it, as far as is known.
    #[must_use]
    pub fn project_seq(&self) -> u64 {
        self.standing.as_ref().map_or(0, |standing| standing.age.project_seq)
    }

    /// Why its last task did not succeed, if it did not.
    #[must_use]
    pub fn error(&self) -> Option<&EventError> {
        self.ending.as_ref()?.value.as_ref()
    }

    /// Where it is and what is checked out, unless it was deleted.
    #[must_use]
    pub fn place(&self) -> Option<&Place> {
        self.place.as_ref().map(|place| &place.value).filter(|place| **place != Place::default())
    }

    /// A generation for the next task of the project: higher than all that were published or heard of.
    #[must_use]
    pub fn next_generation(&self) -> u64 {
        self.generation.map_or(1, |generation| generation.saturating_add(1))
    }
}
