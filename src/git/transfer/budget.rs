//! How much more is taken from the upstream.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use gix::progress::StepShared;

use super::verdict::Verdict;
use crate::failure::{ErrorClass, Failure};

/// Bytes that the upstream may still send; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    left: Arc<AtomicU64>,
    moved: StepShared,
    verdict: Verdict,
}

impl Budget {
    /// Nothing yet; what is spent is counted in `moved`.
    pub(super) fn new(verdict: Verdict, moved: StepShared) -> Self {
        Self { left: Arc::default(), moved, verdict }
    }

    /// Allows `bytes` from now on.
    pub(super) fn grant(&self, bytes: u64) {
        self.left.store(bytes, Ordering::Relaxed);
    }

    /// Takes `bytes` off.
    ///
    /// # Errors
    /// When there were not that many left; the verdict is then `quota`.
    pub(super) fn spend(&self, bytes: usize) -> io::Result<()> {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
        let bytes = bytes as u64;
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
}
