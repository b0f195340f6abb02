//! Projects in the making, apart from view.

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Mutex, PoisonError},
};

use rustix::{
    fs::fchown,
    process::{Gid, Uid, getgid, getuid},
};

use super::{
    Dir, Projects,
    objects::{self, Packs},
    start,
};
use crate::{
    failure::Failure,
    protocol::{Owner, TaskId},
};

/// A project in the making. Dropping it leaves the directory to [`Projects::discard`] or the next start.
#[derive(Debug)]
pub(crate) struct Staging {
    pub(super) name: String,
    pub(super) dir: Dir,
    /// Whose it becomes; the agent's if not set.
    pub(crate) owner: Option<Owner>,
    /// What of its objects is on its way to the disk.
    writing: Mutex<objects::Writing>,
}

impl Staging {
    /// Takes the objects of `mirror` into it.
    ///
    /// # Errors
    /// When that fails, or what `moved` said.
    pub(crate) fn take_objects(
        &self,
        mirror: &Path,
        packs: Packs,
        moved: &mut dyn FnMut(u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let git = self.dir.ensure(".git", 0o755)?;
        let objects = git.ensure("objects", 0o755)?;
        give(&git, self.owner)?;
        give(&objects, self.owner)?;
        let writing = objects::copy(mirror, &objects, self.owner, packs, moved)?;
        self.await_later(writing);
        Ok(())
    }

    /// Leaves what is on its way to the disk to [`flush`](Self::flush).
    pub(super) fn await_later(&self, writing: objects::Writing) {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner).join(writing);
    }

    /// Writes everything of it to the disk, once for all its files.
    ///
    /// # Errors
    /// `disk` where the disk refuses.
    pub(crate) fn flush(&self) -> Result<(), Failure> {
        if self.owner.is_some() {
            // Only who owns it may change its mode, and the agent need not be all-powerful.
            let own = Owner { uid: getuid().as_raw(), gid: getgid().as_raw() };
            give(&self.dir, Some(own))?;
        }
        self.dir.set_mode(0o755)?;
        give(&self.dir, self.owner)?;
        self.writing.lock().unwrap_or_else(PoisonError::into_inner).finish()?;
        // A file system whose device failed keeps the error for this call.
        rustix::fs::syncfs(&self.dir).map_err(io::Error::from)?;
        Ok(())
    }

    /// A descriptor of it, for a child; from then on it is its owner's.
    ///
    /// # Errors
    /// When there are no descriptors left, or it cannot be given away.
    pub(crate) fn handle(&self) -> Result<OwnedFd, Failure> {
        give(&self.dir, self.owner)?;
        Ok(self.dir.handle()?)
    }
}

/// Makes what is open `owner`'s, if one is given.
pub(super) fn give(what: impl AsFd, owner: Option<Owner>) -> io::Result<()> {
    let Some(Owner { uid, gid }) = owner else { return Ok(()) };
    Ok(fchown(what, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?)
}

impl Projects {
    /// Makes a directory for a project in the making that shall be `owner`'s, entered by the agent and them alone.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn stage(&self, task: &TaskId, owner: Option<Owner>) -> Result<Staging, Failure> {
        self.same_root()?;
        let name = format!("{task}-{:032x}", rand::random::<u128>());
        let dir = self.ours.make(&name, 0o700)?;
        Ok(Staging { name, dir, owner, writing: Mutex::default() })
    }

    /// Removes a project in the making.
    pub(crate) fn discard(&self, staging: &Staging) {
        start::remove_loudly(&self.ours, OsStr::new(&staging.name));
    }
}
