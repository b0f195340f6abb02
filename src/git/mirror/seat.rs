//! The place of a transfer at its host, which others have while the transfer waits for something else.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{
    failure::Failure,
    git::{
        Run,
        hosts::{Hosts, Pass},
    },
    protocol::{GitUrl, Progress},
};

/// The place of one transfer at its host; others have it while the transfer waits for its turn.
#[derive(Clone)]
pub(super) struct Seat {
    hosts: Arc<Hosts>,
    url: GitUrl,
    pass: Arc<Mutex<Option<Pass>>>,
}

impl Seat {
    /// Takes one.
    ///
    /// # Errors
    /// Where the host is left alone or busy, or a bound of `run` is passed.
    pub(super) async fn take(hosts: Arc<Hosts>, url: GitUrl, run: &Run<'_>) -> Result<Self, Failure> {
        let seat = Self { hosts, url, pass: Arc::default() };
        seat.again(run).await?;
        Ok(seat)
    }

    /// Notes from a transfer's progress that the host has answered.
    pub(super) fn watch(&self, progress: &Progress) {
        if let Some(pass) = self.pass.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            pass.watch(progress);
        }
    }

    /// Gives it up for a while: the host has answered.
    pub(super) fn leave(&self) {
        if let Some(pass) = self.left() {
            let _ = pass.settle(Ok(()));
        }
    }

    /// Takes it again, if it was given up.
    pub(super) async fn again(&self, run: &Run<'_>) -> Result<(), Failure> {
        if self.pass.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            let pass = self.hosts.enter(&self.url, run).await?;
            *self.pass.lock().unwrap_or_else(PoisonError::into_inner) = Some(pass);
        }
        Ok(())
    }

    /// Gives it back with what became of the transfer.
    ///
    /// # Errors
    /// That of the transfer.
    pub(super) fn settle<T>(&self, result: Result<T, Failure>) -> Result<T, Failure> {
        match self.left() {
            Some(pass) => pass.settle(result),
            None => result,
        }
    }

    fn left(&self) -> Option<Pass> {
        self.pass.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
