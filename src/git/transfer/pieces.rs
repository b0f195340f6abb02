//! A unit of history that no cut between commits makes small enough, taken between its files.
//!
//! Its commits and trees come first, without what the files contain, into a place of their own: in the mirror they
//! would pass for whole. The files follow by their ids, so many at a time, straight into the mirror, where a file is
//! complete by itself. When the last is there, the commits and trees move over. What is taken this way is as small as
//! the largest file, or as all trees of one commit.

use std::{
    collections::{BTreeSet, HashSet},
    fs::{self, File},
    io,
    path::PathBuf,
};

use gix::{ObjectId, objs::Kind};

use super::bare::{self, Bare, Found, hole};
use crate::{failure::Failure, git::mirror};

/// Where the commits and trees wait for their files, in the mirror's directory.
const PLACE: &str = "outline";

/// The commits and trees of a unit whose files are not all here.
pub(super) struct Outline {
    bare: Bare,
}

impl Outline {
    /// The one that leads to `wants`, if an earlier try brought it; whatever else is there goes.
    pub(super) fn find(mirror: &Bare, wants: &BTreeSet<String>) -> Result<Option<Self>, Failure> {
        if let Ok(Found::Whole(bare)) = Bare::find(&place(mirror))
            && wants.iter().all(|oid| bare.has(oid))
        {
            return Ok(Some(Self { bare }));
        }
        Self::remove(mirror)?;
        Ok(None)
    }

    /// An empty one where [`find`](Self::find) found none, for [`Transport::outline`](super::Transport::outline) to fill.
    pub(super) fn create(mirror: &Bare) -> Result<Self, Failure> {
        Ok(Self { bare: Bare::create(&place(mirror))? })
    }

    /// Removes whichever is there.
    pub(super) fn remove(mirror: &Bare) -> Result<(), Failure> {
        match fs::remove_dir_all(place(mirror)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The repository that holds it.
    pub(super) fn bare(&self) -> &Bare {
        &self.bare
    }

    /// Looks again, after it was filled.
    pub(super) fn refresh(&mut self) -> Result<(), Failure> {
        self.bare.refresh()
    }

    /// The files that `wants` lead to and that `mirror` lacks, in the order of the trees.
    ///
    /// # Errors
    /// `corrupt` if a commit or a tree is neither here nor in the mirror, or is none.
    pub(super) fn lacking(&self, mirror: &Bare, wants: &BTreeSet<String>) -> Result<Vec<String>, Failure> {
        let here = |id: ObjectId| mirror.repository.has_object(id);
        let mut waiting: Vec<ObjectId> = wants.iter().filter_map(|oid| bare::id(oid)).collect();
        let mut seen: HashSet<ObjectId> = waiting.iter().copied().collect();
        let mut lacking = Vec::new();
        while let Some(id) = waiting.pop() {
            // What the mirror has it has with all that belongs to it.
            if here(id) {
                continue;
            }
            let object = self.bare.repository.find_object(id).map_err(|error| hole(id, &error))?;
            let (data, format) = (&object.data, object.id.kind());
            match object.kind {
                Kind::Commit => {
                    let mut commit = gix::objs::CommitRefIter::from_bytes(data, format);
                    let tree = commit.tree_id().map_err(|error| hole(id, &error))?;
                    waiting.extend(commit.parent_ids().chain([tree]).filter(|id| seen.insert(*id)));
                }
                Kind::Tag => {
                    let tag = gix::objs::TagRef::from_bytes(data, format).map_err(|error| hole(id, &error))?;
                    let target = tag.target();
                    match tag.target_kind {
                        Kind::Blob if here(target) => {}
                        Kind::Blob => lacking.push(target.to_string()),
                        _ => waiting.extend(seen.insert(target).then_some(target)),
                    }
                }
                Kind::Tree => {
                    for entry in gix::objs::TreeRefIter::from_bytes(data, format) {
                        let entry = entry.map_err(|error| hole(id, &error))?;
                        let child = entry.oid.to_owned();
                        // A submodule's commit is not of this repository.
                        if entry.mode.is_commit() || !seen.insert(child) {
                            continue;
                        }
                        if entry.mode.is_tree() {
                            waiting.push(child);
                        } else if !here(child) {
                            lacking.push(child.to_string());
                        }
                    }
                }
                Kind::Blob => {}
            }
        }
        Ok(lacking)
    }

    /// Moves it into `mirror`, which has all of its files; there is none after that.
    pub(super) fn settle(self, mirror: &Bare) -> Result<(), Failure> {
        let (from, to) = (self.bare.packs_at(), mirror.packs_at());
        for name in mirror::packs(self.bare.path())? {
            // The index comes last: with it the pack is there.
            for end in ["pack", "idx"] {
                let file = format!("{name}.{end}");
                fs::rename(from.join(&file), to.join(&file))?;
            }
        }
        File::open(&to)?.sync_all()?;
        Self::remove(mirror)
    }
}

fn place(mirror: &Bare) -> PathBuf {
    mirror.path().join(PLACE)
}
