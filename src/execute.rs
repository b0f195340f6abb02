//! Doing the work: one file per kind of task.

mod clone;
mod delete;
mod executor;
mod extras;
mod history;
mod obtain;
mod pace;
mod pull;
mod reserve;
mod status;

use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::{
    failure::Failure,
    git::{Fence, Run},
    protocol::{HostState, Place, ProjectId, Round, Task, TaskId, TaskResult},
};

pub use self::{executor::GitExecutor, history::PENDING, pace::Pace};

/// One execution of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The task.
    pub task: Task,
    /// Its round.
    pub round: Round,
    /// The attempt, from 1.
    pub attempt: u32,
    /// Its place in the order of its project; a success advances the project's mark to it.
    pub place: Place,
}

/// A history that a clone whose tree came first still lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwedHistory {
    /// The clone.
    pub task: TaskId,
    /// Its project.
    pub project: ProjectId,
    /// How many tasks were applied to the project when its tree was shown.
    pub seq: u64,
}

/// What is known of a project, from what outlives the journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProjectState {
    /// How many tasks were applied to it.
    pub seq: u64,
    /// The place of the newest of them.
    pub mark: Option<Place>,
    /// Whether a usable project is there.
    pub active: bool,
    /// Whether it was deleted by a task (`seq` and `mark` are those of its tombstone).
    pub deleted: bool,
}

/// The bounds that an executor puts on one attempt of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long it may take.
    pub timeout: Duration,
    /// How long nothing may move.
    pub stall: Duration,
}

/// What executes tasks. The real one is [`GitExecutor`]; benchmarks and pipeline tests bring their own.
#[async_trait]
pub trait Execute: Send + Sync + 'static {
    /// What is known of a project.
    async fn project(&self, project: ProjectId) -> ProjectState;

    /// Refuses by name what this agent does not support or allow, before anything is done.
    ///
    /// # Errors
    /// `invalid` or `forbidden`: the task is `rejected`.
    fn admit(&self, task: &Task) -> Result<(), Failure>;

    /// The bounds of one attempt of `task`: its own wishes within the operator's maximum.
    fn limits(&self, task: &Task) -> Limits;

    /// The hosts of upstreams that it talks to, waits for or leaves alone.
    fn hosts(&self) -> Vec<HostState> {
        Vec::new()
    }

    /// Executes a task once. Idempotent: running it again after any interruption ends in the same state.
    ///
    /// # Errors
    /// A failure that carries its decision.
    async fn execute(&self, job: &Job, run: &Run<'_>) -> Result<TaskResult, Failure>;

    /// Attaches a history, and says what to report; nothing where the project was deleted or made anew since.
    ///
    /// Idempotent. `fence` is asked before the project is touched: it gives the project's turn.
    ///
    /// # Errors
    /// A failure that carries its decision.
    async fn history(
        &self,
        owed: &OwedHistory,
        stop: &CancellationToken,
        fence: &dyn Fence,
    ) -> Result<Option<TaskResult>, Failure>;

    /// Clears a project's mark (a master restored from backup).
    ///
    /// # Errors
    /// When it cannot be written.
    async fn forget(&self, project: ProjectId) -> Result<(), Failure>;
}
