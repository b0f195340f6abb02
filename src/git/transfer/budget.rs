//! How much more is taken from the upstream, and whether the disk still has room for it.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use gix::progress::StepShared;

use super::verdict::Verdict;
use crate::{
    failure::{ErrorClass, Failure},
    git::room,
};

/// How many bytes may come between two looks at the disk.
const LOOK: u64 = 1 << 20;

/// Bytes that the upstream may still send; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    left: Arc<AtomicU64>,
    moved: StepShared,
    verdict: Verdict,
    disk: Option<Arc<Disk>>,
}

/// Where the bytes go.
#[derive(Debug)]
struct Disk {
    place: PathBuf,
    reserve: u64,
    /// How many more may come before the next look.
    unseen: AtomicU64,
}

impl Budget {
    /// Nothing yet; what is spent is counted in `moved`.
    pub(super) fn new(verdict: Verdict, moved: StepShared) -> Self {
        Self { left: Arc::default(), moved, verdict, disk: None }
    }

    /// The same, and nothing is taken where less than `reserve` is free on the disk of `place`.
    pub(super) fn keeping_free(mut self, place: &Path, reserve: u64) -> Self {
        self.disk = Some(Arc::new(Disk { place: place.to_owned(), reserve, unseen: AtomicU64::new(0) }));
        self
    }

    /// Allows `bytes` from now on.
    pub(super) fn grant(&self, bytes: u64) {
        self.left.store(bytes, Ordering::Relaxed);
    }

    /// Takes `bytes` off.
    ///
    /// # Errors
    /// When there were not that many left, or the disk has no room; the verdict is then `quota` or `disk`.
    pub(super) fn spend(&self, bytes: usize) -> io::Result<()> {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
        let bytes = bytes as u64;
        if let Some(failure) = self.disk.as_ref().and_then(|disk| disk.look(bytes).err()) {
            let error = io::Error::other(failure.message.clone());
            self.verdict.give(failure);
            return Err(error);
        }
        if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok() {
            return Ok(());
        }
        let failure =
            Failure::new(ErrorClass::Quota, "the upstream sends more than this node takes (git.max_bytes for a pack)");
        let error = io::Error::other(failure.message.clone());
        self.verdict.give(failure);
        Err(error)
    }
}

impl Disk {
    /// Looks every now and then.
    fn look(&self, bytes: u64) -> Result<(), Failure> {
        let passed = |unseen: u64| unseen.checked_sub(bytes.max(1));
        if self.unseen.fetch_update(Ordering::Relaxed, Ordering::Relaxed, passed).is_ok() {
            return Ok(());
        }
        self.unseen.store(LOOK, Ordering::Relaxed);
        room(&self.place, "mirrors", 0, self.reserve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_was_granted_is_a_matter_of_quota() {
        let verdict = Verdict::default();
        let budget = Budget::new(verdict.clone(), StepShared::default());
        budget.grant(10);
        assert!(budget.spend(10).is_ok());
        assert!(verdict.take().is_none());
        assert!(budget.spend(1).is_err());
        assert_eq!(verdict.take().unwrap().class, ErrorClass::Quota);
    }

    #[test]
    fn a_disk_without_room_stops_what_comes() {
        let (verdict, place) = (Verdict::default(), tempfile::tempdir().unwrap());
        let budget = Budget::new(verdict.clone(), StepShared::default()).keeping_free(place.path(), u64::MAX);
        budget.grant(u64::MAX);
        assert!(budget.spend(1).is_err());
        assert_eq!(verdict.take().unwrap().class, ErrorClass::Disk);
        let budget = Budget::new(verdict.clone(), StepShared::default()).keeping_free(place.path(), 0);
        budget.grant(u64::MAX);
        assert!((0..5).all(|_| budget.spend(1 << 20).is_ok()));
    }
}
