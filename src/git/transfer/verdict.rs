//! Where the place that knows the cause leaves its failure, for the place that sees only a library's error.

use std::sync::{Arc, Mutex, PoisonError};

use crate::failure::Failure;

/// The first failure that anybody left here.
#[derive(Clone, Debug, Default)]
pub(super) struct Verdict(Arc<Mutex<Option<Failure>>>);

impl Verdict {
    /// Leaves a failure, unless an earlier one is there: what follows from it is not the cause.
    pub(super) fn give(&self, failure: Failure) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
    }

    /// Takes it.
    pub(super) fn take(&self) -> Option<Failure> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
