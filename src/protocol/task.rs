//! A task: what to do, to which project.

mod message;

use std::time::Duration;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::message::TaskMessage;
use super::{CredentialName, GitUrl, Owner, ProjectId, RefName, TargetPath, TaskId, names::is_unprintable};

/// The kinds of task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Make the project.
    Clone,
    /// Bring the project up to date.
    Pull,
    /// Remove the project.
    Delete,
    /// Report the project's state; changes nothing.
    Status,
}

/// How urgent a task is; the agent's own window is ordered by it, and a broker that can orders its queue too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// AMQP priority 0.
    Idle,
    /// AMQP priority 2.
    Low,
    /// AMQP priority 4.
    #[default]
    Normal,
    /// AMQP priority 7.
    High,
    /// AMQP priority 9.
    Critical,
}

/// What a pull does about files of the user that stand in its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnConflict {
    /// Keep them and report `conflict`.
    #[default]
    Keep,
    /// Save them as a commit under `refs/haul/backup/`, then overwrite them.
    Reset,
}

/// A checked task.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Identity of the task.
    pub id: TaskId,
    /// The project it is about.
    pub project: ProjectId,
    /// The master's own order.
    pub generation: Option<u64>,
    /// How urgent it is.
    pub priority: Priority,
    /// Do not start after this moment.
    pub not_after: Option<Timestamp>,
    /// Deadline of one attempt.
    pub timeout: Option<Duration>,
    /// How long nothing may move.
    pub stall: Option<Duration>,
    /// What to do.
    pub work: Work,
}

/// What a task does; each kind has its own file under `execute/`.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Make the project.
    Clone(Box<CloneTask>),
    /// Bring the project up to date.
    Pull(PullTask),
    /// Remove the project.
    Delete(DeleteTask),
    /// Report the project's state.
    Status(StatusTask),
}

/// Which state of the upstream a clone checks out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Revision {
    /// The branch that the upstream's `HEAD` points to.
    Default,
    /// A branch; the project follows it.
    Branch(RefName),
    /// A tag; the project's head is detached.
    Tag(RefName),
    /// A commit, 40 lower-case hexadecimal digits; the project's head is detached.
    Commit(String),
}

/// The particulars of a clone.
#[derive(Clone, Debug, PartialEq)]
pub struct CloneTask {
    /// Upstream.
    pub url: GitUrl,
    /// What to check out.
    pub revision: Revision,
    /// The commit that the revision must resolve to.
    pub expect_commit: Option<String>,
    /// Where to put it.
    pub target: TargetPath,
    /// Name of a credential on the node.
    pub credential: Option<CredentialName>,
    /// Number of commits of history.
    pub depth: Option<u32>,
    /// Fetch the wanted branch only.
    pub single_branch: bool,
    /// Materialise submodules too.
    pub submodules: bool,
    /// Fetch LFS objects too.
    pub lfs: bool,
    /// User and group of the project.
    pub owner: Option<Owner>,
}

/// The particulars of a pull.
#[derive(Clone, Debug, PartialEq)]
pub struct PullTask {
    /// Must match the project's own, where given.
    pub target: Option<TargetPath>,
    /// Must match the project's own, where given.
    pub url: Option<GitUrl>,
    /// Credential to use instead of the one the project was cloned with.
    pub credential: Option<CredentialName>,
    /// What to do about files that stand in its way.
    pub on_conflict: OnConflict,
}

/// The particulars of a delete.
#[derive(Clone, Debug, PartialEq)]
pub struct DeleteTask {
    /// Must match the project's own, where given.
    pub target: Option<TargetPath>,
}

/// The particulars of a status.
#[derive(Clone, Debug, PartialEq)]
pub struct StatusTask {
    /// Must match the project's own, where given.
    pub target: Option<TargetPath>,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Clone, Self::Pull, Self::Delete, Self::Status];

    /// The kind's name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Clone => "clone",
            Self::Pull => "pull",
            Self::Delete => "delete",
            Self::Status => "status",
        }
    }

    /// Whether it changes its project: only such tasks supersede and are superseded.
    #[must_use]
    pub const fn changes_project(self) -> bool {
        !matches!(self, Self::Status)
    }

    /// Whether it waits for an earlier clone of its project: a later clone or delete makes that one pointless.
    #[must_use]
    pub const fn needs_clone(self) -> bool {
        matches!(self, Self::Pull | Self::Status)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Priority {
    /// The AMQP message priority. RabbitMQ 4.3 orders by it strictly, 4.0–4.2 see two levels, older ones none.
    #[must_use]
    pub const fn amqp(self) -> u8 {
        match self {
            Self::Critical => 9,
            Self::High => 7,
            Self::Normal => 4,
            Self::Low => 2,
            Self::Idle => 0,
        }
    }
}

impl Work {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Clone(_) => Kind::Clone,
            Self::Pull(_) => Kind::Pull,
            Self::Delete(_) => Kind::Delete,
            Self::Status(_) => Kind::Status,
        }
    }

    /// The directory that the task names, if it names one.
    #[must_use]
    pub fn target(&self) -> Option<&TargetPath> {
        match self {
            Self::Clone(work) => Some(&work.target),
            Self::Pull(work) => work.target.as_ref(),
            Self::Delete(work) => work.target.as_ref(),
            Self::Status(work) => work.target.as_ref(),
        }
    }
}

impl Task {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.work.kind()
    }

    /// Whether its `not_after` has passed.
    #[must_use]
    pub fn expired(&self, now: Timestamp) -> bool {
        self.not_after.is_some_and(|limit| now > limit)
    }
}

/// Text from a message, made fit for a log line or an event.
#[must_use]
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if is_unprintable(c) { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_map_to_the_broker_s_numbers() {
        use Priority::{Critical, High, Idle, Low, Normal};
        assert_eq!([Critical, High, Normal, Low, Idle].map(Priority::amqp), [9, 7, 4, 2, 0]);
    }
}
