//! What belongs to the repositories inside a project in the making: objects of its submodules, and LFS objects.

use std::{collections::BTreeSet, path::Path};

use rustix::fs::OFlags;

use super::{
    Dir, Staging,
    objects::{self, Packs},
    staging::give,
};
use crate::{failure::Failure, git::pointer::Pointer};

impl Staging {
    /// Copies the objects of `mirror` into the git directory `git` of a submodule, which is made.
    ///
    /// # Errors
    /// When that fails, or what `moved` said.
    pub(crate) fn copy_module(
        &self,
        mirror: &Path,
        git: &str,
        moved: &mut dyn FnMut(u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let objects = self.way(&self.dir, &format!("{git}/objects"))?;
        self.await_later(objects::copy(mirror, &objects, self.owner, Packs::Copied, moved)?);
        Ok(())
    }

    /// Copies LFS objects from `store` into the git directory `git`.
    ///
    /// # Errors
    /// When that fails, or what `moved` said.
    pub(crate) fn copy_lfs(
        &self,
        store: &Path,
        git: &str,
        wanted: &BTreeSet<Pointer>,
        moved: &mut dyn FnMut(u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let from = Dir::open(&store.join("objects"))?;
        let into = self.way(&self.dir, &format!("{git}/lfs/objects"))?;
        for pointer in wanted {
            let [first, second, name] = pointer.place();
            let source = from.open_file(format!("{first}/{second}/{name}"), OFlags::RDONLY, 0)?;
            let into = self.way(&into, &format!("{first}/{second}"))?;
            let target = into.open_file(name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, 0o444)?;
            objects::copy_file(&source, &target, moved)?;
            rustix::fs::fchmod(&target, rustix::fs::Mode::from_raw_mode(0o444)).map_err(std::io::Error::from)?;
            give(&target, self.owner)?;
        }
        Ok(())
    }

    /// Makes every directory on the way to `path` beneath `dir`, its owner's, and opens the last.
    fn way(&self, dir: &Dir, path: &str) -> Result<Dir, Failure> {
        let mut at = dir.child(".")?;
        for name in path.split('/') {
            at = at.ensure(name, 0o755)?;
            give(&at, self.owner)?;
        }
        Ok(at)
    }
}
