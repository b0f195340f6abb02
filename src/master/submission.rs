//! A task that was checked and may be published: there is no other way to one than through the agent's own checks.

use std::{marker::PhantomData, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    failure::Failure,
    protocol::{
        GitUrl, Kind, OnConflict, Priority, ProjectId, Task, TaskId, TaskMessage,
        wire::{Message, header},
    },
};

/// A task as it is published: always one that an agent takes.
///
/// It is kept as JSON beside its row: published again with the same bytes it is a duplicate, which an agent answers with
/// what it knows and never does twice; with other bytes under the same `task_id` it is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Kept", into = "Kept")]
pub struct Submission {
    task: TaskMessage,
    traceparent: String,
}

/// A submission as it is kept.
#[derive(Clone, Serialize, Deserialize)]
struct Kept {
    task: TaskMessage,
    traceparent: String,
}

/// A task of one kind in the making; [`Draft::build`] checks it as the agent would.
#[derive(Clone, Debug)]
#[must_use = "a draft is nothing until it is built"]
pub struct Draft<K> {
    task: TaskMessage,
    traceparent: Option<String>,
    kind: PhantomData<K>,
}

/// [`Draft`] of a clone.
#[derive(Clone, Copy, Debug)]
pub enum OfClone {}
/// [`Draft`] of a pull.
#[derive(Clone, Copy, Debug)]
pub enum OfPull {}
/// [`Draft`] of a delete.
#[derive(Clone, Copy, Debug)]
pub enum OfDelete {}
/// [`Draft`] of a status.
#[derive(Clone, Copy, Debug)]
pub enum OfStatus {}

impl Submission {
    /// Make a project of `git_url`, in the directory `target_path` of the node.
    pub fn clone(project: ProjectId, git_url: impl Into<String>, target_path: impl Into<String>) -> Draft<OfClone> {
        let mut draft = Draft::new(Kind::Clone, project);
        draft.task.git_url = Some(git_url.into());
        draft.task.target_path = Some(target_path.into());
        draft
    }

    /// Bring a project up to date.
    pub fn pull(project: ProjectId) -> Draft<OfPull> {
        Draft::new(Kind::Pull, project)
    }

    /// Remove a project.
    pub fn delete(project: ProjectId) -> Draft<OfDelete> {
        Draft::new(Kind::Delete, project)
    }

    /// Ask for the state of a project.
    pub fn status(project: ProjectId) -> Draft<OfStatus> {
        Draft::new(Kind::Status, project)
    }

    /// A task that was written by other means, checked.
    ///
    /// # Errors
    /// `invalid`, with the sentence that the agent would reject it with.
    pub fn checked(task: TaskMessage) -> Result<Self, Failure> {
        Task::try_from(task.clone())?;
        Ok(Self { task, traceparent: traceparent() })
    }

    /// The task as it is written on the wire.
    #[must_use]
    pub fn task(&self) -> &TaskMessage {
        &self.task
    }

    /// Its identity.
    #[must_use]
    pub fn task_id(&self) -> &TaskId {
        &self.task.task_id
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.task.kind
    }

    /// Its project.
    #[must_use]
    pub fn project_id(&self) -> ProjectId {
        self.task.project_id
    }

    /// The master's own order, if it has one.
    #[must_use]
    pub fn generation(&self) -> Option<u64> {
        self.task.generation
    }

    /// The W3C trace context that every event of the task carries.
    #[must_use]
    pub fn traceparent(&self) -> &str {
        &self.traceparent
    }

    /// The host of the upstream, where the task names one.
    #[must_use]
    pub fn host(&self) -> Option<String> {
        let url = GitUrl::parse(self.task.git_url.as_deref()?).ok()?;
        Some(url.host().to_owned()).filter(|host| !host.is_empty())
    }

    /// The message to publish.
    pub(super) fn message(&self, now: Timestamp) -> Message {
        let mut message = Message::task(&self.task, now);
        message.set(header::TRACEPARENT, self.traceparent.as_str());
        message
    }
}

impl TryFrom<Kept> for Submission {
    type Error = Failure;

    fn try_from(kept: Kept) -> Result<Self, Failure> {
        Ok(Self { traceparent: well_formed(kept.traceparent)?, ..Self::checked(kept.task)? })
    }
}

impl From<Submission> for Kept {
    fn from(submission: Submission) -> Self {
        Self { task: submission.task, traceparent: submission.traceparent }
    }
}

impl<K> Draft<K> {
    fn new(kind: Kind, project_id: ProjectId) -> Self {
        let task = TaskMessage::new(kind, project_id, TaskId::random());
        Self { task, traceparent: None, kind: PhantomData }
    }

    /// An identity of the master's own, instead of a new one.
    pub fn task_id(mut self, id: TaskId) -> Self {
        self.task.task_id = id;
        self
    }

    /// The master's own order of tasks of one project; higher is newer.
    pub fn generation(mut self, generation: u64) -> Self {
        self.task.generation = Some(generation);
        self
    }

    /// How urgent it is. A clone, pull or delete that is not `normal` needs a generation: priority overtakes.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.task.priority = Some(priority);
        self
    }

    /// Deadline of one attempt; in whole seconds, rounded up.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.task.timeout_secs = Some(seconds(timeout));
        self
    }

    /// How long nothing may move; in whole seconds, rounded up.
    pub fn stall(mut self, stall: Duration) -> Self {
        self.task.stall_secs = Some(seconds(stall));
        self
    }

    /// Do not start after this moment.
    pub fn not_after(mut self, moment: Timestamp) -> Self {
        self.task.not_after = Some(moment);
        self
    }

    /// The W3C trace context of whoever asked for the task, instead of a new one.
    pub fn traceparent(mut self, traceparent: impl Into<String>) -> Self {
        self.traceparent = Some(traceparent.into());
        self
    }

    /// The task, if an agent would take it.
    ///
    /// # Errors
    /// `invalid`, with the sentence that the agent would reject it with.
    pub fn build(self) -> Result<Submission, Failure> {
        let submission = Submission::checked(self.task)?;
        Ok(match self.traceparent {
            Some(traceparent) => Submission { traceparent: well_formed(traceparent)?, ..submission },
            None => submission,
        })
    }
}

impl Draft<OfClone> {
    /// The branch to check out and to follow.
    pub fn branch(mut self, branch: impl Into<String>) -> Self {
        self.task.branch = Some(branch.into());
        self
    }

    /// The tag to check out, instead of a branch.
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.task.tag = Some(tag.into());
        self
    }

    /// The commit to check out, instead of a branch.
    pub fn commit(mut self, oid: impl Into<String>) -> Self {
        self.task.commit = Some(oid.into());
        self
    }

    /// The commit that the branch or tag must point to.
    pub fn expect_commit(mut self, oid: impl Into<String>) -> Self {
        self.task.expect_commit = Some(oid.into());
        self
    }

    /// Number of commits of history.
    pub fn depth(mut self, depth: u32) -> Self {
        self.task.depth = Some(depth);
        self
    }

    /// Fetch the wanted branch only.
    pub fn single_branch(mut self) -> Self {
        self.task.single_branch = Some(true);
        self
    }

    /// Materialise submodules too.
    pub fn submodules(mut self) -> Self {
        self.task.submodules = Some(true);
        self
    }

    /// Fetch LFS objects too.
    pub fn lfs(mut self) -> Self {
        self.task.lfs = Some(true);
        self
    }

    /// User and group that shall own the project.
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.task.owner = Some(format!("{uid}:{gid}"));
        self
    }

    /// Name of a credential on the node.
    pub fn credential(mut self, name: impl Into<String>) -> Self {
        self.task.credential = Some(name.into());
        self
    }
}

impl Draft<OfPull> {
    /// Name of a credential on the node, instead of the one that the project was cloned with.
    pub fn credential(mut self, name: impl Into<String>) -> Self {
        self.task.credential = Some(name.into());
        self
    }

    /// What to do about files of the user that stand in its way.
    pub fn on_conflict(mut self, what: OnConflict) -> Self {
        self.task.on_conflict = Some(what);
        self
    }
}

fn seconds(time: Duration) -> u64 {
    time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0))
}

/// A new W3C trace context, so that one task can be followed through the logs of all.
fn traceparent() -> String {
    let trace = rand::random::<u128>() | 1;
    let span = rand::random::<u64>() | 1;
    format!("00-{trace:032x}-{span:016x}-01")
}

/// What is not of the form of the standard would not be carried.
fn well_formed(traceparent: String) -> Result<String, Failure> {
    let lengths: Vec<_> = traceparent.split('-').map(str::len).collect();
    let digits = traceparent.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b'-'));
    if digits && lengths == [2, 32, 16, 2] {
        return Ok(traceparent);
    }
    Err(Failure::invalid("traceparent is not of the form 00-<32 hexadecimal digits>-<16>-<2>"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clone() -> Draft<OfClone> {
        Submission::clone(42, "https://git.example/team/app.git", "7_app")
    }

    #[test]
    fn what_an_agent_would_reject_is_not_built_and_says_why() {
        for (draft, why) in [
            (clone().branch("main").tag("v1"), "one of branch, tag and commit"),
            (clone().branch("a..b"), "not a valid name of a ref"),
            (clone().priority(Priority::High), "needs a generation"),
            (clone().depth(0), "depth must be at least 1"),
            (clone().timeout(Duration::ZERO), "timeout_secs must be at least 1"),
            (clone().owner(0, 0), "must not be root"),
            (clone().commit("abc"), "40 hexadecimal digits"),
            (clone().traceparent("mine"), "traceparent"),
            (Submission::clone(1, "https://user:secret@h/x", "a"), "git_url"),
            (Submission::clone(1, "https://h/x", "../a"), "target_path"),
        ] {
            let refusal = draft.build().unwrap_err().message;
            assert!(refusal.contains(why), "{refusal}");
            assert!(!refusal.contains("secret"), "{refusal}");
        }
    }

    #[test]
    fn every_kind_is_built_with_what_it_takes() {
        let urgent = clone().priority(Priority::High).generation(3).timeout(Duration::from_millis(1500));
        let built = urgent.branch("main").credential("team").depth(1).single_branch().build().unwrap();
        assert_eq!((built.task().timeout_secs, built.generation()), (Some(2), Some(3)));
        assert_eq!(built.host().as_deref(), Some("git.example"));
        assert!(Submission::pull(1).on_conflict(OnConflict::Reset).credential("c").build().is_ok());
        assert!(Submission::delete(1).build().is_ok() && Submission::status(1).build().is_ok());
    }

    #[test]
    fn a_kept_submission_is_published_again_with_the_same_bytes_and_trace() {
        let built = clone().not_after("2026-11-20T12:00:00.5Z".parse().unwrap()).lfs().build().unwrap();
        let kept = serde_json::to_value(&built).unwrap();
        let again: Submission = serde_json::from_value(kept.clone()).unwrap();
        let now = Timestamp::UNIX_EPOCH;
        assert_eq!(again.message(now), built.message(now));
        assert_eq!(built.message(now).traceparent(), Some(built.traceparent()));
        let mut altered = kept;
        altered["task"]["target_path"] = "..".into();
        assert!(serde_json::from_value::<Submission>(altered).is_err());
    }
}
