//! What the agent itself knows of a project, durable and apart from anything inside it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::dir::Identity;
use crate::git::mirror;
use crate::protocol::{Owner, Place, ProjectId, Revision, Round, TaskId};

/// Which task applied itself to a project, and where it stands in the project's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The task.
    pub(crate) task: TaskId,
    /// Its round.
    pub(crate) round: Round,
    /// Its place.
    pub(crate) place: Place,
}

/// How many tasks were applied, and the newest of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Applied {
    /// How many.
    pub(crate) seq: u64,
    /// The place of the newest; `None` once forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<Place>,
    /// The one that was counted last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    task: Option<TaskId>,
    /// Its round.
    #[serde(default)]
    round: Round,
}

impl Applied {
    /// Counts a task that succeeded; one that runs again after a crash is counted once. The mark never goes back.
    pub(crate) fn advance(&mut self, stamp: &Stamp) {
        if self.task.as_ref() != Some(&stamp.task) || self.round != stamp.round {
            self.seq += 1;
            self.task = Some(stamp.task.clone());
            self.round = stamp.round;
        }
        if self.mark.is_none_or(|mark| !stamp.place.is_older_than(mark)) {
            self.mark = Some(stamp.place);
        }
    }
}

/// What a project was cloned as; a later pull follows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Follows {
    /// A branch of the upstream.
    Branch(String),
    /// A tag.
    Tag(String),
    /// A commit.
    Commit(String),
}

impl Follows {
    /// Whether a clone that asks for `revision` asks for this.
    pub(crate) fn answers(&self, revision: &Revision) -> bool {
        match (self, revision) {
            (_, Revision::Default) => true,
            (Self::Branch(ours), Revision::Branch(theirs)) | (Self::Tag(ours), Revision::Tag(theirs)) => {
                ours == theirs.as_str()
            }
            (Self::Commit(ours), Revision::Commit(theirs)) => ours == theirs,
            _ => false,
        }
    }
}

impl std::fmt::Display for Follows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Branch(name) => write!(f, "branch {name}"),
            Self::Tag(name) => write!(f, "tag {name}"),
            Self::Commit(oid) => write!(f, "commit {oid}"),
        }
    }
}

/// Says whose directory it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Binding {
    /// The project.
    pub(crate) project: ProjectId,
    /// Its directory's name.
    pub(crate) target: String,
    /// Its upstream.
    pub(crate) url: String,
    /// The credential it was cloned with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) credential: Option<String>,
    /// What it was cloned as.
    pub(crate) follows: Follows,
    /// Whose it is and as whom children work in it; the agent's own user if not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) owner: Option<Owner>,
    /// Whether only the wanted branch was fetched.
    #[serde(default)]
    pub(crate) single_branch: bool,
    /// The number of the task that made the directory; a later one means that it was cloned anew.
    #[serde(default)]
    pub(crate) placed: u64,
    /// The commits at which the history of a clone ends whose tree came first, until the rest is attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) history: Option<Vec<String>>,
    /// The very directory: another one under the same name is not the project.
    pub(crate) directory: Identity,
    /// When its upstream was last listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) last_fetch: Option<Timestamp>,
    /// The tasks applied to it.
    #[serde(flatten)]
    pub(crate) applied: Applied,
}

impl Binding {
    /// The key of the mirror that it is cloned from and pulls from.
    pub(crate) fn mirror(&self) -> String {
        mirror::key(&self.url, self.credential.as_deref())
    }
}

/// What is kept of a deleted project: its order goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tombstone {
    /// The project.
    pub(crate) project: ProjectId,
    /// The tasks applied to it.
    #[serde(flatten)]
    pub(crate) applied: Applied,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(task: &str, round: Round, arrived: i64) -> Stamp {
        Stamp { task: TaskId::new(task).unwrap(), round, place: Place { generation: None, arrived } }
    }

    #[test]
    fn a_task_that_runs_again_is_counted_once() {
        let mut applied = Applied::default();
        applied.advance(&stamp("a", 0, 1));
        applied.advance(&stamp("a", 0, 1));
        assert_eq!(applied.seq, 1);
        applied.advance(&stamp("a", 1, 1));
        applied.advance(&stamp("b", 0, 2));
        assert_eq!((applied.seq, applied.mark.unwrap().arrived), (3, 2));
    }

    #[test]
    fn a_mark_never_goes_back() {
        let mut applied = Applied::default();
        applied.advance(&stamp("a", 0, 5));
        applied.advance(&stamp("b", 0, 4));
        assert_eq!(applied.mark.unwrap().arrived, 5);
    }

    #[test]
    fn a_binding_survives_its_own_text() {
        let mut binding = Binding {
            project: 7,
            target: "7_app".to_owned(),
            url: "https://git.example/a".to_owned(),
            credential: None,
            owner: Some(Owner { uid: 1000, gid: 100 }),
            follows: Follows::Branch("main".to_owned()),
            single_branch: false,
            placed: 1,
            history: Some(vec!["1".repeat(40)]),
            directory: Identity { device: u64::MAX, inode: 3, born: Some(5) },
            last_fetch: None,
            applied: Applied::default(),
        };
        binding.applied.advance(&stamp("a", 2, 9));
        let text = serde_json::to_string(&binding).unwrap();
        assert_eq!(serde_json::from_str::<Binding>(&text).unwrap(), binding);
    }
}
