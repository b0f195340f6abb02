//! The tasks that are being handled in this process, with every delivery of each.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

use crate::{broker::Delivery, journal::Key, protocol::ProjectId};

/// The tasks in hand.
#[derive(Default)]
pub(super) struct Active {
    tasks: Mutex<HashMap<Key, InHand>>,
}

struct InHand {
    digest: String,
    deliveries: Vec<Delivery>,
    cancel: CancellationToken,
    running: Option<ProjectId>,
}

/// What became of a delivery that entered.
pub(super) enum Entered {
    /// The first of its task: to be handled, with a token that a cancel triggers.
    First(CancellationToken),
    /// Its task is being handled here already; it is settled together with it.
    Joined,
    /// Its task is being handled here, but with another body.
    Mismatch(Box<Delivery>),
}

impl Active {
    /// Puts a delivery into its task's hands.
    pub(super) fn enter(&self, key: &Key, digest: &str, delivery: Delivery) -> Entered {
        let mut tasks = self.lock();
        if let Some(task) = tasks.get_mut(key) {
            if task.digest != digest {
                return Entered::Mismatch(Box::new(delivery));
            }
            task.deliveries.push(delivery);
            return Entered::Joined;
        }
        let cancel = CancellationToken::new();
        let in_hand =
            InHand { digest: digest.to_owned(), deliveries: vec![delivery], cancel: cancel.clone(), running: None };
        tasks.insert(key.clone(), in_hand);
        Entered::First(cancel)
    }

    /// Takes a task out, with every delivery that belongs to it.
    pub(super) fn leave(&self, key: &Key) -> Vec<Delivery> {
        self.lock().remove(key).map(|task| task.deliveries).unwrap_or_default()
    }

    /// Triggers a task's cancel; false if it is not in hand.
    pub(super) fn cancel(&self, key: &Key) -> bool {
        let tasks = self.lock();
        let found = tasks.get(key);
        if let Some(task) = found {
            task.cancel.cancel();
        }
        found.is_some()
    }

    /// Notes that a task's attempt runs.
    pub(super) fn running(&self, key: &Key, project: ProjectId) {
        if let Some(task) = self.lock().get_mut(key) {
            task.running = Some(project);
        }
    }

    /// How many tasks are in hand, and the projects of those that run.
    pub(super) fn counts(&self) -> (usize, Vec<ProjectId>) {
        let tasks = self.lock();
        let running = tasks.values().filter_map(|task| task.running).collect();
        (tasks.len(), running)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, InHand>> {
        // Nothing panics while the lock is held; if it did, the map would still be whole.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
