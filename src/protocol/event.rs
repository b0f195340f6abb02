//! An event: one status message on the results exchange.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{EventId, Kind, NodeName, ProjectId, Round, TaskId};
use crate::failure::{ErrorClass, Failure};

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The agent has the task; it waits for a slot or for its project.
    Accepted,
    /// An attempt has begun.
    Started,
    /// Something moved; at most one a second, transient.
    Progress,
    /// The attempt failed; another follows at `error.retry_at`.
    Retrying,
    /// Done. Terminal.
    Succeeded,
    /// After `succeeded` of a tree-first clone: the full history is attached, or why not.
    History,
    /// Failed for good. Terminal.
    Failed,
    /// Never executed: the task itself is wrong, or not for this agent. Terminal.
    Rejected,
    /// Cancelled by the master. Terminal.
    Cancelled,
    /// Something newer was applied to the project first. Terminal.
    Superseded,
}

/// What the master should show for the project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum ProjectStatus {
    /// A task waits.
    Pending,
    /// A task works on it.
    Syncing,
    /// A usable working tree is on the node.
    Active,
    /// There is no usable project.
    Error,
    /// It was removed.
    Deleted,
}

/// One status message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Version of the contract: 1.
    #[schemars(range(min = 1, max = 1))]
    pub v: u32,
    /// Identity of the event; the same when it is sent again.
    pub event_id: EventId,
    /// When it happened.
    pub at: Timestamp,
    /// The node that reports.
    pub node: NodeName,
    /// Identity of this start of the agent.
    pub boot: String,
    /// Orders the events of one task and one boot only.
    pub seq: u64,
    /// The task.
    pub task_id: TaskId,
    /// Its kind.
    pub kind: Kind,
    /// Its project.
    pub project_id: ProjectId,
    /// The task's generation, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// How many tasks were applied to the project; `project_status` counts only if this is not older than known.
    pub project_seq: u64,
    /// 0, and one more for each replay.
    pub round: Round,
    /// The charged attempt it speaks of; 0 before the first.
    pub attempt: u32,
    /// Where the task stands.
    pub status: Status,
    /// What to show for the project.
    pub project_status: ProjectStatus,
    /// What came out, with `succeeded` and `history`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<TaskResult>,
    /// How far it is, with `progress`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What went wrong, with `retrying`, `failed`, `rejected` and `superseded`, and with `history` that was given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<EventError>,
}

/// What came out of a task; which fields are there depends on its kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TaskResult {
    /// The project's directory, relative to the projects directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_path: Option<String>,
    /// The branch that is checked out; absent where the head is detached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The commit that is checked out; absent in an empty repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<String>,
    /// Where the objects came from: `upstream`, or `mirror` where the node had them already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Objects received from the upstream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects: Option<u64>,
    /// Bytes received from the upstream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_bytes: Option<u64>,
    /// How long the attempt took, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// For `clone`: `pending` where the tree was shown first and its history is still to come, which a `history` event
    /// tells of; there it is `attached`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<String>,
    /// For `pull`: whether anything was new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated: Option<bool>,
    /// For `pull` with `on_conflict: reset`: the ref that keeps what was overwritten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup_ref: Option<String>,
    /// For `pull`: submodules whose commit changed; a pull leaves them as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub submodules_changed: Option<u64>,
    /// For `pull`: LFS files that changed; their pointers are in the project, what they point to is not fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lfs_changed: Option<u64>,
    /// For `status`: commits of the project that its upstream branch lacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ahead: Option<u64>,
    /// For `status`: commits of the upstream branch, as last fetched, that the project lacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind: Option<u64>,
    /// For `status`: whether tracked files differ from the head, or untracked ones exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty: Option<bool>,
    /// For `status`: when the project was last fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_fetch: Option<Timestamp>,
}

/// How far a running task is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// What is being done: `waiting` (for a place at the upstream's host), `connecting`, `listing`, `receiving`,
    /// `resolving`, `copying`, `checkout`, `removing`. More may follow.
    pub phase: String,
    /// Units done.
    #[serde(default)]
    pub done: u64,
    /// Units in all, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Bytes so far.
    #[serde(default)]
    pub bytes: u64,
    /// Bytes a second, smoothed, where bytes move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// Seconds until this phase is done, as far as that can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_secs: Option<u64>,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventError {
    /// What decided.
    pub class: ErrorClass,
    /// One sentence for people.
    pub message: String,
    /// When the next attempt is due, with `retrying`.
    #[serde(default)]
    pub retry_at: Option<Timestamp>,
}

/// Who reports: the same in every event of one start of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The node.
    pub node: NodeName,
    /// This start of the agent.
    pub boot: String,
}

/// How a task ended.
#[expect(clippy::large_enum_variant, reason = "there is one for a task, and it is moved a few times")]
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Done.
    Succeeded(TaskResult),
    /// Failed for good.
    Failed(Failure),
    /// Never executed, and never will be.
    Rejected(Failure),
    /// Cancelled by the master.
    Cancelled,
    /// Something newer was applied to the project first; the sentence says what.
    Superseded(String),
}

impl Status {
    /// Every status.
    pub const ALL: [Self; 10] = [
        Self::Accepted,
        Self::Started,
        Self::Progress,
        Self::Retrying,
        Self::Succeeded,
        Self::History,
        Self::Failed,
        Self::Rejected,
        Self::Cancelled,
        Self::Superseded,
    ];

    /// The status's name on the wire and in the routing key.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Started => "started",
            Self::Progress => "progress",
            Self::Retrying => "retrying",
            Self::Succeeded => "succeeded",
            Self::History => "history",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
            Self::Cancelled => "cancelled",
            Self::Superseded => "superseded",
        }
    }

    /// Whether a task (in its round) ends with it.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Rejected | Self::Cancelled | Self::Superseded)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Event {
    /// The routing key on the results exchange: `<node>.<kind>.<status>`.
    #[must_use]
    pub fn routing_key(&self) -> String {
        format!("{}.{}.{}", self.node, self.kind, self.status)
    }
}

impl EventError {
    /// What the event says of a failure.
    #[must_use]
    pub fn new(failure: &Failure, retry_at: Option<Timestamp>) -> Self {
        Self { class: failure.class, message: super::task::printable(&failure.message), retry_at }
    }
}

impl Outcome {
    /// The terminal status it is reported as.
    #[must_use]
    pub const fn status(&self) -> Status {
        match self {
            Self::Succeeded(_) => Status::Succeeded,
            Self::Failed(_) => Status::Failed,
            Self::Rejected(_) => Status::Rejected,
            Self::Cancelled => Status::Cancelled,
            Self::Superseded(_) => Status::Superseded,
        }
    }

    /// Whether a copy goes to the dead-letter queue: failed and rejected tasks, but not a conflict in the
    /// workspace, which its user can see and mend.
    #[must_use]
    pub fn dead_letter(&self) -> Option<&Failure> {
        match self {
            Self::Failed(failure) | Self::Rejected(failure) if failure.class != ErrorClass::Conflict => Some(failure),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_print_as_they_are_written_on_the_wire() {
        for status in Status::ALL {
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
        }
    }

    #[test]
    fn a_conflict_is_not_dead_lettered_and_a_cancel_is_not_either() {
        let failed = |class| Outcome::Failed(Failure::new(class, "x"));
        assert!(failed(ErrorClass::Auth).dead_letter().is_some());
        assert!(failed(ErrorClass::Conflict).dead_letter().is_none());
        assert!(Outcome::Cancelled.dead_letter().is_none());
        assert!(Outcome::Superseded(String::new()).dead_letter().is_none());
    }
}
