//! Waiting for a slot and for the project's turn: the schedule, with somebody to wake.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use crate::{
    protocol::{Kind, Place, Priority, ProjectId},
    schedule::{Number, Schedule, Waiting},
};

/// The schedule and who waits on it.
pub(super) struct Turns {
    inner: Mutex<Inner>,
}

struct Inner {
    schedule: Schedule,
    wake: HashMap<Number, oneshot::Sender<Turn>>,
    next: Number,
    /// Nobody is woken.
    held: bool,
}

/// A slot and a project's turn, given back on drop.
pub(super) struct Turn {
    turns: Arc<Turns>,
    project: ProjectId,
    armed: bool,
}

/// A place in the queue, given up on drop.
pub(super) struct Queued {
    turns: Arc<Turns>,
    project: ProjectId,
    number: Number,
    granted: oneshot::Receiver<Turn>,
}

impl Turns {
    pub(super) fn new(slots: usize) -> Arc<Self> {
        let inner = Inner { schedule: Schedule::new(slots), wake: HashMap::new(), next: 0, held: false };
        Arc::new(Self { inner: Mutex::new(inner) })
    }

    /// Queues work on a project; nothing if its project has too many waiting.
    pub(super) fn queue_work(
        self: &Arc<Self>,
        (project, kind, priority): (ProjectId, Kind, Priority),
        place: Place,
    ) -> Option<Queued> {
        let (wake, granted) = oneshot::channel();
        let mut inner = self.lock();
        let number = inner.next;
        let waiting = Waiting { number, project, kind, priority, place };
        if !inner.schedule.enqueue(waiting) {
            return None;
        }
        inner.next += 1;
        inner.wake.insert(number, wake);
        self.grant(&mut inner);
        drop(inner);
        Some(Queued { turns: self.clone(), project, number, granted })
    }

    /// Tasks that wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().schedule.waiting()
    }

    /// Whether a clone of the project waits that comes before `place`.
    pub(super) fn clone_waits_before(&self, project: ProjectId, place: Place) -> bool {
        self.lock().schedule.clone_waits_before(project, place)
    }

    /// Gives no turn any more, or again.
    pub(super) fn hold(self: &Arc<Self>, hold: bool) {
        let mut inner = self.lock();
        inner.held = hold;
        self.grant(&mut inner);
    }

    /// Wakes everybody who may run now.
    fn grant(self: &Arc<Self>, inner: &mut Inner) {
        if inner.held {
            return;
        }
        while let Some(task) = inner.schedule.start_next() {
            let turn = Turn { turns: self.clone(), project: task.project, armed: true };
            let refused = match inner.wake.remove(&task.number) {
                Some(wake) => wake.send(turn).err(),
                None => Some(turn),
            };
            // Who waited is gone: the turn goes on. It is disarmed first, since its drop would lock again.
            if let Some(mut turn) = refused {
                turn.armed = false;
                inner.schedule.finish(turn.project);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queued {
    /// The turn, if it was given at once.
    pub(super) fn at_once(&mut self) -> Option<Turn> {
        self.granted.try_recv().ok()
    }

    /// Waits for the turn.
    pub(super) async fn turn(&mut self) -> Option<Turn> {
        (&mut self.granted).await.ok()
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        let mut inner = self.turns.lock();
        inner.wake.remove(&self.number);
        inner.schedule.withdraw(self.project, self.number);
        drop(inner);
        // A turn that was granted but never taken gives itself back when the receiver drops.
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.armed {
            let mut inner = self.turns.lock();
            inner.schedule.finish(self.project);
            self.turns.grant(&mut inner);
        }
    }
}
