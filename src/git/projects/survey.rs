//! What the files say about every project, read without opening the directory for work: an agent may be using it.

use std::{fs, io, path::Path};

use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};

use super::{Binding, Follows, LONGEST, OURS, Tombstone, at};
use crate::{
    failure::Failure,
    protocol::{Place, ProjectId},
};

/// What is recorded of one project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProjectRecord {
    /// The project.
    pub project_id: ProjectId,
    /// Its directory under the projects directory; `None` once deleted.
    pub target_path: Option<String>,
    /// Its upstream; `None` once deleted.
    pub git_url: Option<String>,
    /// The branch that pulls follow, where it was cloned as one.
    pub branch: Option<String>,
    /// The tag that it was cloned as.
    pub tag: Option<String>,
    /// The commit that it was cloned as.
    pub commit: Option<String>,
    /// How many tasks were applied to it.
    pub seq: u64,
    /// The place of the newest of them: what is older is superseded.
    pub mark: Option<Place>,
    /// When its upstream was last listed.
    pub last_fetch: Option<Timestamp>,
}

impl ProjectRecord {
    fn of(binding: Binding) -> Self {
        let (mut branch, mut tag, mut commit) = (None, None, None);
        match binding.follows {
            Follows::Branch(name) => branch = Some(name),
            Follows::Tag(name) => tag = Some(name),
            Follows::Commit(oid) => commit = Some(oid),
        }
        Self {
            project_id: binding.project,
            target_path: Some(binding.target),
            git_url: Some(binding.url),
            branch,
            tag,
            commit,
            seq: binding.applied.seq,
            mark: binding.applied.mark,
            last_fetch: binding.last_fetch,
        }
    }

    fn gone(tombstone: Tombstone) -> Self {
        Self {
            project_id: tombstone.project,
            target_path: None,
            git_url: None,
            branch: None,
            tag: None,
            commit: None,
            seq: tombstone.applied.seq,
            mark: tombstone.applied.mark,
            last_fetch: None,
        }
    }
}

/// Every project that is recorded under the projects directory `path`, by its number; nothing is changed.
///
/// # Errors
/// When the records cannot be read; where there are none, the answer is empty.
pub fn survey(path: &Path) -> Result<Vec<ProjectRecord>, Failure> {
    let ours = path.join(OURS);
    let read = |error| at(path, error);
    let bound = read_all::<Binding>(&ours.join("owners")).map_err(read)?.into_iter().map(ProjectRecord::of);
    let gone = read_all::<Tombstone>(&ours.join("gone")).map_err(read)?.into_iter().map(ProjectRecord::gone);
    let mut records: Vec<_> = bound.chain(gone).collect();
    // Of a crash between two steps: the side that was written later counts, as it does at the agent's start.
    records.sort_by_key(|record| (record.project_id, std::cmp::Reverse(record.seq)));
    records.dedup_by_key(|record| record.project_id);
    Ok(records)
}

/// Every whole file of a directory that can be read as `T`; the agent reports damaged ones when it starts.
fn read_all<T: DeserializeOwned>(directory: &Path) -> io::Result<Vec<T>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry?;
        let half_written = entry.file_name().as_encoded_bytes().starts_with(b".");
        if half_written || !entry.file_type()?.is_file() || entry.metadata()?.len() > LONGEST {
            continue;
        }
        match fs::read(entry.path()) {
            Ok(bytes) => all.extend(serde_json::from_slice(&bytes).ok()),
            // Struck off by the agent meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}
