//! What stays free on the disks that tasks write to.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;

use super::executor::blocking;
use crate::{
    failure::Failure,
    git::{blamed, room},
};

/// The free space that no clone and no pull may begin to use up.
#[derive(Clone, Debug)]
pub(super) struct Reserve {
    bytes: u64,
    storage: PathBuf,
    /// On another disk, perhaps.
    projects: PathBuf,
}

impl Reserve {
    pub(super) fn new(reserve: ByteSize, storage: &Path, projects: &Path) -> Self {
        Self { bytes: reserve.as_u64(), storage: storage.to_owned(), projects: projects.to_owned() }
    }

    /// How many bytes are to stay free.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The failure of class `disk` in place of one that has no other explanation, where one of the disks takes nothing just
    /// now: of several children that it stops, the first to tell need not be the one that was refused.
    pub(super) async fn blamed(&self, failure: Failure) -> Failure {
        let own = self.clone();
        let looked = blocking(move || Ok(blamed(failure, &[&own.storage, &own.projects])));
        looked.await.unwrap_or_else(|lost| lost)
    }

    /// Refuses to begin where less is free already than is to stay free.
    ///
    /// # Errors
    /// `disk`, which waits without spending attempts.
    pub(super) async fn check(&self) -> Result<(), Failure> {
        let own = self.clone();
        blocking(move || {
            room(&own.storage, "mirrors", 0, own.bytes)?;
            room(&own.projects, "projects", 0, own.bytes)
        })
        .await
    }

    /// Refuses to go on with a project where less is free by now than is to stay free.
    ///
    /// # Errors
    /// `disk`, which waits without spending attempts.
    pub(super) fn still(&self) -> Result<(), Failure> {
        room(&self.projects, "projects", 0, self.bytes)
    }

    /// Refuses a project whose objects, those of `mirror`, would use up what is to stay free.
    ///
    /// Where the file system shares what it copies they need less; the caution is kept all the same.
    ///
    /// # Errors
    /// `disk`, which waits without spending attempts.
    pub(super) async fn check_copy(&self, mirror: &Path) -> Result<(), Failure> {
        let (own, packs) = (self.clone(), mirror.join("objects/pack"));
        blocking(move || {
            let mut bytes = 0_u64;
            for entry in std::fs::read_dir(packs)? {
                bytes = bytes.saturating_add(entry?.metadata()?.len());
            }
            room(&own.projects, "projects", bytes, own.bytes)
        })
        .await
    }

    /// Refuses LFS files of so many bytes where their `objects`, kept once beside the mirror and once in the project,
    /// would use up what is to stay free with them.
    ///
    /// # Errors
    /// `disk`, which waits without spending attempts.
    pub(super) async fn check_lfs(&self, objects: u64, files: u64) -> Result<(), Failure> {
        let own = self.clone();
        blocking(move || {
            room(&own.storage, "mirrors", objects, own.bytes)?;
            room(&own.projects, "projects", objects.saturating_add(files), own.bytes)
        })
        .await
    }
}
