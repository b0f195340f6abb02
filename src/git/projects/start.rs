//! What an agent does with its projects directory when it starts: reads what is known, sweeps what a crash left.

use std::ffi::OsStr;

use rustix::fs::FileType;
use serde::de::DeserializeOwned;

use super::{Binding, Dir, FIXED, LONGEST, Projects, Tombstone, remove};
use crate::failure::Failure;

impl Projects {
    /// Reads every binding and tombstone.
    pub(super) fn read(&self) -> Result<(), Failure> {
        let mut known = self.known();
        for tombstone in read_all::<Tombstone>(&self.gone)? {
            known.tombstones.insert(tombstone.project, tombstone);
        }
        for binding in read_all::<Binding>(&self.owners)? {
            // Of a crash between two steps: the side that was written later counts.
            let later = known.tombstones.get(&binding.project).map(|tombstone| tombstone.applied.seq);
            let other = known.bindings.get(&binding.project).map(|other| other.applied.seq);
            if later.max(other).is_some_and(|seq| seq > binding.applied.seq) {
                self.owners.unlink_durably(&binding.target)?;
                continue;
            }
            if let Some(stale) = known.bindings.remove(&binding.project) {
                self.owners.unlink_durably(&stale.target)?;
                known.targets.remove(&stale.target);
            }
            known.targets.insert(binding.target.clone(), binding.project);
            known.bindings.insert(binding.project, binding);
        }
        Ok(())
    }

    /// Removes projects in the making and trash, and notes of pulls whose project is gone.
    pub(super) fn sweep(&self) -> Result<(), Failure> {
        for (name, _) in self.ours.entries()? {
            if !FIXED.iter().any(|fixed| OsStr::new(fixed) == name) {
                remove_loudly(&self.ours, &name);
            }
        }
        for (name, _) in self.trash.entries()? {
            remove_loudly(&self.trash, &name);
        }
        let known = self.known();
        for (name, _) in self.pulls.entries()? {
            if !name.to_str().is_some_and(|target| known.targets.contains_key(target)) {
                remove_loudly(&self.pulls, &name);
            }
        }
        Ok(())
    }
}

/// Every file of `dir` that can be read as `T`; half-written ones are removed, unreadable ones left and reported.
fn read_all<T: DeserializeOwned>(dir: &Dir) -> Result<Vec<T>, Failure> {
    let mut all = Vec::new();
    for (name, kind) in dir.entries()? {
        if name.as_encoded_bytes().starts_with(b".") {
            remove_loudly(dir, &name);
        } else if kind == FileType::RegularFile {
            let read = dir.read(&name, LONGEST)?;
            match read.map(|bytes| serde_json::from_slice(&bytes)) {
                Some(Ok(value)) => all.push(value),
                Some(Err(error)) => {
                    tracing::warn!(file.name = %name.display(), %error, "a file of the projects directory is damaged");
                }
                None => {}
            }
        }
    }
    Ok(all)
}

/// Removes what is left over; what cannot be removed is tried again at the next start.
pub(super) fn remove_loudly(dir: &Dir, name: &OsStr) {
    if let Err(error) = remove::remove(dir, name, &mut || true) {
        tracing::warn!(file.name = %name.display(), %error, "a leftover of the projects directory cannot be removed");
    }
}
