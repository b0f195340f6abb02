//! How a project goes: out of view by one rename, its tombstone, its binding, and then what is left of it.

use std::{ffi::OsStr, io};

use super::{Binding, Projects, Stamp, Tombstone, remove, text};
use crate::{failure::Failure, protocol::ProjectId};

/// A project in the trash.
struct Buried {
    name: String,
    /// Whether this very attempt moved it there.
    just_now: bool,
}

impl Projects {
    /// Takes a project out of view, leaves its tombstone, and names what is left to remove in the trash.
    ///
    /// Where the tombstone cannot be written the project is put back, unless that cannot be done either: then it stays out
    /// of view, and the next attempt goes on with it.
    ///
    /// # Errors
    /// `conflict` where the directory was swapped for another; `disk` where the disk refuses.
    pub(crate) fn bury(&self, project: ProjectId, stamp: &Stamp) -> Result<Option<String>, Failure> {
        self.same_root()?;
        let _turn = self.turn();
        let (binding, former) = self.of(project);
        let buried = binding.as_ref().map(|binding| self.take_away(binding)).transpose()?.flatten();
        let applied = binding.as_ref().map(|binding| binding.applied.clone());
        let applied = applied.or(former.map(|former| former.applied));
        let mut tombstone = Tombstone { project, applied: applied.unwrap_or_default() };
        tombstone.applied.advance(stamp);
        let text = text(&tombstone)?;
        let note = || self.gone.write_durably(&project.to_string(), &text);
        match (&buried, &binding) {
            (Some(Buried { name, just_now }), Some(binding)) => {
                let moved = self.trash.sync().and_then(|()| self.root.sync());
                moved.and_then(|()| note()).or_else(|error| {
                    if error.kind() == io::ErrorKind::StorageFull {
                        // Deleting is what makes room. The project is out of view, and a start sweeps what is left of it.
                        remove::remove(&self.trash, OsStr::new(name), &mut || true)?;
                        return note();
                    }
                    // What an earlier attempt left may be half removed by now.
                    if *just_now {
                        self.put_back(binding, name);
                    }
                    Err(error)
                })?;
            }
            _ => note()?,
        }
        self.known().tombstones.insert(project, tombstone);
        if let Some(binding) = binding {
            self.owners.unlink_durably(&binding.target)?;
            self.pulls.unlink_durably(&binding.target)?;
            let mut known = self.known();
            known.targets.remove(&binding.target);
            known.bindings.remove(&project);
        }
        Ok(buried.map(|buried| buried.name))
    }

    /// Moves a project into the trash, or finds it there if an earlier attempt did.
    fn take_away(&self, binding: &Binding) -> Result<Option<Buried>, Failure> {
        if !self.stands(binding)? {
            for (name, _) in self.trash.entries()? {
                if let Some(name) = name.to_str()
                    && self.trash.identify(name)? == Some(binding.directory)
                {
                    return Ok(Some(Buried { name: name.to_owned(), just_now: false }));
                }
            }
            return Ok(None);
        }
        let name = format!("{:032x}", rand::random::<u128>());
        self.root.rename_to(&binding.target, &self.trash, &name)?;
        // The name could have been given to another directory in between.
        if self.trash.identify(&name)? != Some(binding.directory) {
            self.trash.rename_to(&name, &self.root, &binding.target)?;
            return Err(Failure::conflict(format!("{} was swapped for another directory", binding.target)));
        }
        Ok(Some(Buried { name, just_now: true }))
    }

    /// Brings a project back whose delete failed. Not while its tombstone may be there: a start would take the project
    /// for deleted and its directory for somebody else's.
    fn put_back(&self, binding: &Binding, name: &str) {
        let back = self
            .gone
            .unlink_durably(&binding.project.to_string())
            .and_then(|()| self.trash.rename_to(name, &self.root, &binding.target));
        if let Err(error) = back {
            tracing::warn!(%error, "a project whose delete failed stays out of view; the next attempt goes on with it");
        }
    }

    /// Removes what [`bury`](Self::bury) named, for as long as `go_on` says so; the rest goes at the next start.
    ///
    /// # Errors
    /// The first thing that could not be removed.
    pub(crate) fn remove(&self, buried: &str, go_on: &mut dyn FnMut() -> bool) -> io::Result<()> {
        remove::remove(&self.trash, OsStr::new(buried), go_on)
    }
}
