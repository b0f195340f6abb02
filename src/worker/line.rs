//! The order in which deliveries of one project came, kept until each has its place in the project's queue.
//!
//! Deliveries are handled side by side. Without this a pull that came right behind its clone could be admitted first, or
//! find the project's turn free before the clone has asked for it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::protocol::ProjectId;

/// Who stands in the line of each project, by the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Lines(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    standing: HashMap<ProjectId, (BTreeSet<u64>, Arc<Notify>)>,
    next: u64,
}

/// A place in the line of a project, given up on drop.
#[derive(Debug)]
pub(super) struct Line {
    lines: Arc<Lines>,
    project: ProjectId,
    number: u64,
    moved: Arc<Notify>,
}

impl Lines {
    /// Stands in the line of a project.
    pub(super) fn join(self: &Arc<Self>, project: ProjectId) -> Line {
        let mut inner = self.lock();
        let number = inner.next;
        inner.next += 1;
        let (standing, moved) = inner.standing.entry(project).or_default();
        standing.insert(number);
        Line { lines: Arc::clone(self), project, number, moved: Arc::clone(moved) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// Waits until everybody who came before has passed.
    pub(super) async fn turn(&self) {
        loop {
            let moved = self.moved.notified();
            let first =
                self.lines.lock().standing.get(&self.project).and_then(|(standing, _)| standing.first().copied());
            // Who has passed itself waits for nobody.
            if first.is_none_or(|first| first >= self.number) {
                return;
            }
            moved.await;
        }
    }

    /// Lets those behind it go on.
    pub(super) fn pass(&self) {
        let mut inner = self.lines.lock();
        let Some((standing, _)) = inner.standing.get_mut(&self.project) else { return };
        if !standing.remove(&self.number) {
            return;
        }
        if standing.is_empty() {
            inner.standing.remove(&self.project);
        }
        self.moved.notify_waiters();
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.pass();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn one_project_goes_in_line_and_others_pass() {
        let lines = Arc::new(Lines::default());
        let (first, second, other) = (lines.join(7), lines.join(7), lines.join(8));
        first.turn().await;
        other.turn().await;
        assert!(second.turn().now_or_never().is_none());
        first.pass();
        let third = lines.join(7);
        assert!(third.turn().now_or_never().is_none());
        drop((first, second, other));
        third.turn().await;
        drop(third);
        assert!(lines.lock().standing.is_empty());
    }

    #[tokio::test]
    async fn whoever_leaves_the_line_lets_nobody_pass_those_before_it() {
        let lines = Arc::new(Lines::default());
        let (first, second, third) = (lines.join(7), lines.join(7), lines.join(7));
        first.turn().await;
        drop(second);
        assert!(third.turn().now_or_never().is_none());
        first.pass();
        third.turn().await;
    }
}
