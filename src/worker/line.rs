//! The order of one project's tasks, from their delivery to their place in the schedule.
//!
//! Deliveries are handled side by side. Without this a pull that came right behind its clone could be admitted before it,
//! and find no project; of two pulls the newer could run first and outdate the older.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use crate::protocol::ProjectId;

/// The last of each project that stands in line.
#[derive(Default)]
pub(super) struct Lines {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    last: HashMap<ProjectId, (u64, oneshot::Receiver<()>)>,
    numbers: u64,
}

/// A place in a project's line; whoever is behind goes on once it is dropped.
pub(super) struct InLine {
    lines: Arc<Lines>,
    project: ProjectId,
    number: u64,
    before: Option<oneshot::Receiver<()>>,
    _passed: oneshot::Sender<()>,
}

impl Lines {
    /// Takes the place behind everybody who is there.
    pub(super) fn join(self: &Arc<Self>, project: ProjectId) -> InLine {
        let (passed, behind) = oneshot::channel();
        let mut inner = self.lock();
        inner.numbers += 1;
        let number = inner.numbers;
        let before = inner.last.insert(project, (number, behind)).map(|(_, before)| before);
        drop(inner);
        InLine { lines: self.clone(), project, number, before, _passed: passed }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InLine {
    /// Returns once nobody is before us.
    pub(super) async fn first(&mut self) {
        if let Some(before) = self.before.take() {
            // That it is dropped is what it says.
            let _ = before.await;
        }
    }
}

impl Drop for InLine {
    fn drop(&mut self) {
        let mut inner = self.lines.lock();
        if inner.last.get(&self.project).is_some_and(|(last, _)| *last == self.number) {
            inner.last.remove(&self.project);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_waits_for_the_one_before_it_in_its_project_and_for_no_other() {
        let lines = Arc::new(Lines::default());
        let (one, other) = (1, 2);
        let (mut first, mut second, mut third) = (lines.join(one), lines.join(one), lines.join(one));
        let mut elsewhere = lines.join(other);
        first.first().await;
        elsewhere.first().await;
        let waits = tokio::spawn(async move {
            second.first().await;
            third
        });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        drop(first);
        third = waits.await.unwrap();
        third.first().await;
        drop((third, elsewhere));
        assert!(lines.lock().last.is_empty(), "who has passed is forgotten");
    }
}
