//! What pulls were about to write: small durable files, struck off when a pull is done.

use serde::{Deserialize, Serialize};

use super::{Binding, LONGEST, Projects, text};
use crate::{failure::Failure, protocol::ProjectId};

/// What a pull was about to write when it was interrupted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PullNote {
    /// The project.
    pub(crate) project: ProjectId,
    /// The commit that was checked out; `None` where there was none yet.
    pub(crate) old: Option<String>,
    /// The commit that was being checked out.
    pub(crate) new: String,
}

impl Projects {
    /// Notes what a pull is about to write, durably.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn note_pull(&self, target: &str, note: &PullNote) -> Result<(), Failure> {
        Ok(self.pulls.write_durably(target, &text(note)?)?)
    }

    /// What an interrupted pull of a project noted.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn noted_pull(&self, binding: &Binding) -> Result<Option<PullNote>, Failure> {
        let note = self.pulls.read(&binding.target, LONGEST)?;
        let note = note.and_then(|bytes| serde_json::from_slice::<PullNote>(&bytes).ok());
        Ok(note.filter(|note| note.project == binding.project))
    }

    /// Strikes the note off.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn strike_pull(&self, target: &str) -> Result<(), Failure> {
        Ok(self.pulls.unlink_durably(target)?)
    }
}
