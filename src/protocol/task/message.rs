//! A task as it is written on the wire, and the checks that stand between it and a [`Task`].

use std::time::Duration;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{CloneTask, DeleteTask, Kind, OnConflict, Priority, PullTask, Revision, StatusTask, Task, Work};
use crate::{
    failure::Failure,
    protocol::{
        CredentialName, GitUrl, Owner, ProjectId, RefName, TargetPath, TaskId, VERSION,
        names::{self, quoted},
    },
};

/// A task as it is written on the wire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "Task")]
#[schemars(extend("allOf" = [
    {"if": {"properties": {"kind": {"const": "clone"}}},
     "then": {"required": ["git_url", "target_path"],
              "properties": {"git_url": {"type": "string"}, "target_path": {"type": "string"}}}},
    {"if": {"properties": {"kind": {"enum": ["clone", "pull", "delete"]},
                           "priority": {"enum": ["critical", "high", "low", "idle"]}}, "required": ["priority"]},
     "then": {"required": ["generation"], "properties": {"generation": {"type": "integer"}}}},
    {"not": {"required": ["branch", "tag"],
             "properties": {"branch": {"type": "string"}, "tag": {"type": "string"}}}},
    {"not": {"required": ["branch", "commit"],
             "properties": {"branch": {"type": "string"}, "commit": {"type": "string"}}}},
    {"not": {"required": ["tag", "commit"],
             "properties": {"tag": {"type": "string"}, "commit": {"type": "string"}}}},
]))]
pub struct TaskMessage {
    /// Version of the contract: 1.
    #[schemars(range(min = 1, max = 1))]
    pub v: u32,
    /// Identity of the task, chosen by the master.
    pub task_id: TaskId,
    /// What to do.
    pub kind: Kind,
    /// Identity of the project, chosen by the master.
    #[schemars(extend("minimum" = i64::MIN, "maximum" = i64::MAX))]
    pub project_id: ProjectId,
    /// The master's own order of tasks of one project; higher is newer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maximum" = u64::MAX))]
    pub generation: Option<u64>,
    /// Upstream; required for `clone`. Never with a user, password or token in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(https|http|ssh|file)://[^\s\\?#]+$"))]
    pub git_url: Option<String>,
    /// Branch to clone; the upstream's default branch where none of `branch`, `tag`, `commit` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 250), regex(pattern = names::REF_PATTERN))]
    pub branch: Option<String>,
    /// Tag to clone, instead of `branch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 250), regex(pattern = names::REF_PATTERN))]
    pub tag: Option<String>,
    /// Commit to clone, 40 hexadecimal digits, instead of `branch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^(?!0{40}$)[0-9A-Fa-f]{40}$"))]
    pub commit: Option<String>,
    /// The commit that `branch` or `tag` must point to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^(?!0{40}$)[0-9A-Fa-f]{40}$"))]
    pub expect_commit: Option<String>,
    /// Number of commits of history to fetch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = u32::MAX))]
    pub depth: Option<u32>,
    /// Fetch the wanted branch only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub single_branch: Option<bool>,
    /// Materialise submodules too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub submodules: Option<bool>,
    /// Fetch LFS objects too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lfs: Option<bool>,
    /// User and group that shall own the project, `"uid:gid"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^(?!0+:)[0-9]{1,10}:(?!0+$)[0-9]{1,10}$"))]
    pub owner: Option<String>,
    /// Directory of the project, one component under the projects directory; required for `clone`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255), regex(pattern = names::TARGET_PATTERN))]
    pub target_path: Option<String>,
    /// Name of a credential that the agent resolves on its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"))]
    pub credential: Option<String>,
    /// Deadline of one attempt, in seconds; at most the operator's `git.max_timeout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_secs: Option<u64>,
    /// How long nothing may move, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub stall_secs: Option<u64>,
    /// How urgent it is; a `clone`, `pull` or `delete` that is not `normal` needs a `generation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    /// Do not start after this moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Timestamp>,
    /// For `pull`: what to do about files that stand in its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_conflict: Option<OnConflict>,
}

impl TaskMessage {
    /// A task of the current version that asks for nothing but its kind.
    #[must_use]
    pub fn new(kind: Kind, project_id: ProjectId, task_id: TaskId) -> Self {
        Self {
            v: VERSION,
            task_id,
            kind,
            project_id,
            generation: None,
            git_url: None,
            branch: None,
            tag: None,
            commit: None,
            expect_commit: None,
            depth: None,
            single_branch: None,
            submodules: None,
            lfs: None,
            owner: None,
            target_path: None,
            credential: None,
            timeout_secs: None,
            stall_secs: None,
            priority: None,
            not_after: None,
            on_conflict: None,
        }
    }
}

impl TryFrom<TaskMessage> for Task {
    type Error = Failure;

    /// Checks every field; what this version does not support is refused by name.
    fn try_from(message: TaskMessage) -> Result<Self, Failure> {
        if message.v != VERSION {
            return Err(Failure::invalid(format!(
                "the task is of version {}, this agent speaks version {VERSION}",
                message.v
            )));
        }
        let priority = message.priority.unwrap_or_default();
        if priority != Priority::Normal && message.generation.is_none() && message.kind.changes_project() {
            return Err(Failure::invalid(
                "a clone, pull or delete whose priority is not normal needs a generation: priority overtakes",
            ));
        }
        let seconds = |field: &str, value: Option<u64>| match value {
            Some(0) => Err(Failure::invalid(format!("{field} must be at least 1"))),
            other => Ok(other.map(Duration::from_secs)),
        };
        Ok(Self {
            id: message.task_id.clone(),
            project: message.project_id,
            generation: message.generation,
            priority,
            not_after: message.not_after,
            timeout: seconds("timeout_secs", message.timeout_secs)?,
            stall: seconds("stall_secs", message.stall_secs)?,
            work: work(message)?,
        })
    }
}

fn work(message: TaskMessage) -> Result<Work, Failure> {
    let kind = message.kind;
    let target = message.target_path.clone().map(TargetPath::new).transpose()?;
    let url = message.git_url.as_deref().map(GitUrl::parse).transpose()?;
    let credential = message.credential.clone().map(CredentialName::new).transpose()?;
    // Checked for every kind, so that the schema and this program refuse the same.
    let revision = revision(&message)?;
    let expect_commit = message.expect_commit.clone().map(|oid| commit("expect_commit", oid)).transpose()?;
    let owner = message.owner.as_deref().map(Owner::parse).transpose()?;
    if message.depth == Some(0) {
        return Err(Failure::invalid("depth must be at least 1"));
    }
    let missing = |field: &str| Failure::invalid(format!("a {kind} task needs {field}"));
    Ok(match kind {
        Kind::Clone => Work::Clone(Box::new(CloneTask {
            url: url.ok_or_else(|| missing("git_url"))?,
            revision,
            expect_commit,
            target: target.ok_or_else(|| missing("target_path"))?,
            credential,
            depth: message.depth,
            // As git does: a clone of some depth has one branch, unless it asks for all.
            single_branch: message.single_branch.unwrap_or(message.depth.is_some()),
            submodules: message.submodules.unwrap_or(false),
            lfs: message.lfs.unwrap_or(false),
            owner,
        })),
        Kind::Pull => {
            Work::Pull(PullTask { target, url, credential, on_conflict: message.on_conflict.unwrap_or_default() })
        }
        Kind::Delete => Work::Delete(DeleteTask { target }),
        Kind::Status => Work::Status(StatusTask { target }),
    })
}

fn revision(message: &TaskMessage) -> Result<Revision, Failure> {
    match (&message.branch, &message.tag, &message.commit) {
        (None, None, None) => Ok(Revision::Default),
        (Some(branch), None, None) => Ok(Revision::Branch(RefName::new("branch", branch)?)),
        (None, Some(tag), None) => Ok(Revision::Tag(RefName::new("tag", tag)?)),
        (None, None, Some(oid)) => Ok(Revision::Commit(commit("commit", oid.clone())?)),
        _ => Err(Failure::invalid("a task takes one of branch, tag and commit")),
    }
}

fn commit(field: &str, oid: String) -> Result<String, Failure> {
    if oid.len() == 40 && oid.bytes().all(|b| b.is_ascii_hexdigit()) && oid.bytes().any(|b| b != b'0') {
        return Ok(oid.to_ascii_lowercase());
    }
    Err(Failure::invalid(format!("{field} {} is not a commit id of 40 hexadecimal digits", quoted(&oid))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: serde_json::Value) -> Result<Task, Failure> {
        let message: TaskMessage = serde_json::from_value(value).map_err(|e| Failure::invalid(e.to_string()))?;
        Task::try_from(message)
    }

    fn clone_with(extra: serde_json::Value) -> Result<Task, Failure> {
        let mut task = json!({"v": 1, "task_id": "t", "kind": "clone", "project_id": 42,
            "git_url": "https://git.example/team/app.git", "target_path": "7_app"});
        task.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        parse(task)
    }

    #[test]
    fn a_plain_clone_follows_the_default_branch() {
        let task = clone_with(json!({})).unwrap();
        let Work::Clone(work) = task.work else { panic!("not a clone") };
        assert_eq!(work.revision, Revision::Default);
        assert_eq!(work.target.as_str(), "7_app");
    }

    #[test]
    fn a_higher_version_is_refused_with_the_reason() {
        assert!(clone_with(json!({"v": 2})).unwrap_err().message.contains("version 2"));
    }

    #[test]
    fn unknown_fields_are_ignored() {
        assert!(clone_with(json!({"colour": "blue", "nested": {"a": [1]}})).is_ok());
    }

    #[test]
    fn a_priority_needs_a_generation_unless_nothing_changes() {
        assert!(clone_with(json!({"priority": "high"})).is_err());
        assert!(clone_with(json!({"priority": "high", "generation": 1})).is_ok());
        let status = json!({"v": 1, "task_id": "t", "kind": "status", "project_id": 1, "priority": "critical"});
        assert!(parse(status).is_ok());
    }

    #[test]
    fn only_one_of_branch_tag_and_commit_is_taken() {
        assert!(clone_with(json!({"branch": "main", "tag": "v1"})).is_err());
        assert!(clone_with(json!({"commit": "0123456789012345678901234567890123456789"})).is_ok());
        for bad in ["abc", "0000000000000000000000000000000000000000", "g123456789012345678901234567890123456789"] {
            assert!(clone_with(json!({"commit": bad})).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_clone_needs_its_url_and_its_path() {
        assert!(clone_with(json!({"git_url": null})).unwrap_err().message.contains("git_url"));
        assert!(clone_with(json!({"target_path": null})).unwrap_err().message.contains("target_path"));
    }

    #[test]
    fn zero_and_negative_limits_are_refused() {
        for bad in [json!({"timeout_secs": 0}), json!({"stall_secs": 0}), json!({"depth": 0}), json!({"depth": -1})] {
            assert!(clone_with(bad.clone()).is_err(), "{bad}");
        }
    }
}
