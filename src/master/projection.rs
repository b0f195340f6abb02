//! Tasks and projects, as the events tell of them: rows in memory. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{
    Submission,
    project::ProjectRow,
    task::{TaskChange, TaskRow},
};
use crate::protocol::{Event, NodeName, ProjectId, ProjectStatus, TaskId};

/// Every task and project that was published or heard of.
///
/// A master with a database keeps [`TaskRow`] and [`ProjectRow`] there and does what [`Projection::apply`] does to the two
/// rows of an event; this is the whole of it in memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Projection {
    tasks: BTreeMap<TaskId, TaskRow>,
    projects: BTreeMap<(ProjectId, NodeName), ProjectRow>,
}

/// What an event changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Of its task.
    pub task: TaskChange,
    /// Whether anything is different of its project.
    pub project: bool,
    /// What to show for the project now.
    pub project_status: Option<ProjectStatus>,
}

impl Applied {
    /// Whether anything is different now.
    #[must_use]
    pub fn is_news(&self) -> bool {
        self.project || !matches!(self.task, TaskChange::Nothing(_))
    }
}

impl Projection {
    /// Nothing known yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes a task that is about to be published. Its first event may have been here before: then that stays.
    pub fn want(&mut self, node: &NodeName, task: &Submission, now: Timestamp) -> &mut TaskRow {
        self.project_mut(node, task.project_id()).published(task.generation());
        let row = self.tasks.entry(task.task_id().clone()).or_insert_with(|| TaskRow::wanted(node, task, now));
        row.want(task, now);
        row
    }

    /// Notes that the broker has a task.
    pub fn confirm(&mut self, task: &TaskId, now: Timestamp) {
        if let Some(row) = self.tasks.get_mut(task) {
            row.confirm(now);
        }
    }

    /// Takes in one event; to be repeated at will, in any order.
    pub fn apply(&mut self, event: &Event) -> Applied {
        let (task, change) = match self.tasks.entry(event.task_id.clone()) {
            std::collections::btree_map::Entry::Occupied(known) => {
                let row = known.into_mut();
                let change = row.apply(event);
                (row, change)
            }
            std::collections::btree_map::Entry::Vacant(new) => {
                // What the first event of all does is the same as for a row of which nothing is known.
                let row = new.insert(TaskRow::unheard(event));
                let change = row.apply(event);
                (row, change)
            }
        };
        let key = (event.project_id, event.node.clone());
        let project = self.projects.entry(key).or_insert_with(|| ProjectRow::new(&event.node, event.project_id));
        let changed = project.apply(event, task, change);
        Applied { task: change, project: changed, project_status: project.status() }
    }

    /// A task.
    #[must_use]
    pub fn task(&self, task: &TaskId) -> Option<&TaskRow> {
        self.tasks.get(task)
    }

    /// All tasks.
    pub fn tasks(&self) -> impl Iterator<Item = &TaskRow> {
        self.tasks.values()
    }

    /// A project on a node.
    #[must_use]
    pub fn project(&self, node: &NodeName, project: ProjectId) -> Option<&ProjectRow> {
        self.projects.get(&(project, node.clone()))
    }

    /// All projects.
    pub fn projects(&self) -> impl Iterator<Item = &ProjectRow> {
        self.projects.values()
    }

    /// Forgets a task, and what it said of its project's work under way.
    pub fn forget(&mut self, task: &TaskId) -> Option<TaskRow> {
        let row = self.tasks.remove(task)?;
        for project in self.projects.values_mut().filter(|project| project.project_id() == row.project_id()) {
            project.forget(task);
        }
        Some(row)
    }

    fn project_mut(&mut self, node: &NodeName, project: ProjectId) -> &mut ProjectRow {
        self.projects.entry((project, node.clone())).or_insert_with(|| ProjectRow::new(node, project))
    }
}
