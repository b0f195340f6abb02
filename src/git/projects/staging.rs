//! Projects in the making, apart from view.

use std::{
    ffi::OsStr,
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::{Mutex, PoisonError},
};

use super::{Dir, Projects, objects, start};
use crate::{failure::Failure, protocol::TaskId};

/// A project in the making. Dropping it leaves the directory to [`Projects::discard`] or the next start.
#[derive(Debug)]
pub(crate) struct Staging {
    pub(super) name: String,
    pub(super) dir: Dir,
    /// What of its objects is on its way to the disk.
    writing: Mutex<objects::Writing>,
}

impl Staging {
    /// Copies the objects of `mirror` into it.
    ///
    /// # Errors
    /// When that fails, or what `moved` said.
    pub(crate) fn copy_objects(
        &self,
        mirror: &Path,
        moved: &mut dyn FnMut(u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let git = self.dir.ensure(".git", 0o755)?;
        let writing = objects::copy(mirror, &git.ensure("objects", 0o755)?, moved)?;
        *self.writing.lock().unwrap_or_else(PoisonError::into_inner) = writing;
        Ok(())
    }

    /// Writes everything of it to the disk, once for all its files.
    ///
    /// # Errors
    /// `disk` where the disk refuses.
    pub(crate) fn flush(&self) -> Result<(), Failure> {
        self.dir.set_mode(0o755)?;
        self.writing.lock().unwrap_or_else(PoisonError::into_inner).finish()?;
        // A file system whose device failed keeps the error for this call.
        rustix::fs::syncfs(&self.dir).map_err(io::Error::from)?;
        Ok(())
    }

    /// A descriptor of it, for a child.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn handle(&self) -> Result<OwnedFd, Failure> {
        Ok(self.dir.handle()?)
    }
}

impl Projects {
    /// Makes a directory for a project in the making, entered by the agent alone.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn stage(&self, task: &TaskId) -> Result<Staging, Failure> {
        self.same_root()?;
        let name = format!("{task}-{:032x}", rand::random::<u128>());
        let dir = self.ours.make(&name, 0o700)?;
        Ok(Staging { name, dir, writing: Mutex::default() })
    }

    /// Removes a project in the making.
    pub(crate) fn discard(&self, staging: &Staging) {
        start::remove_loudly(&self.ours, OsStr::new(&staging.name));
    }
}
