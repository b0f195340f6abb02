//! Histories: what a task whose tree was shown first still owes to its project, once its end is told.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{Interrupted, Worker, reporter::About, step::Step, turns::Turn};
use crate::{
    execute::OwedHistory,
    failure::Failure,
    git::Fence,
    journal::{Entry, Key},
    protocol::{Priority, TaskResult, wire::Identity},
    retry::Next,
};

/// How long to wait where the project has too many tasks waiting to queue behind them.
const CROWDED: Duration = Duration::from_secs(1);

/// The histories in hand.
pub(super) struct Histories {
    keys: Mutex<HashSet<Key>>,
    /// So many are fetched at a time: after a start there may be many.
    places: Semaphore,
}

impl Histories {
    pub(super) fn new(slots: usize) -> Self {
        Self { keys: Mutex::default(), places: Semaphore::new(slots.max(1)) }
    }

    fn enter(&self, key: &Key) -> bool {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone())
    }

    fn leave(&self, key: &Key) {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// The fence of a history: it gives the project's turn, which is held until this is dropped.
struct TakesTurn<'a> {
    worker: &'a Worker,
    entry: &'a Entry,
    stop: &'a CancellationToken,
    turn: Mutex<Option<Turn>>,
}

#[async_trait]
impl Fence for TakesTurn<'_> {
    async fn check(&self) -> Result<(), Failure> {
        let stopped = || Failure::internal("cancelled");
        let taken = || self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        while taken().is_none() {
            let Entry { project, kind, place, .. } = *self.entry;
            let Some(mut queued) = self.worker.turns.queue_work(project, kind, Priority::Normal, place) else {
                tokio::select! {
                    () = self.stop.cancelled() => return Err(stopped()),
                    () = tokio::time::sleep(CROWDED) => continue,
                }
            };
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(stopped()),
                turn = queued.turn() => *taken() = Some(turn.ok_or_else(stopped)?),
            }
        }
        if self.stop.is_cancelled() { Err(stopped()) } else { Ok(()) }
    }
}

impl Worker {
    /// Attaches a history in the background. If the agent ends first, the next start goes on.
    pub(super) fn begin_history(self: &Arc<Self>, key: Key, entry: Entry) {
        if !self.histories.enter(&key) {
            return;
        }
        let worker = self.clone();
        self.background.spawn(async move {
            match worker.conclude_history(&key, entry).await {
                Err(Interrupted::Journal(error)) => {
                    tracing::error!(task.id = %key.task_id, error = %error, "what became of a history could not be noted; the next start tries again");
                }
                Ok(()) | Err(Interrupted::Stopping | Interrupted::Broken) => {}
            }
            worker.histories.leave(&key);
        });
    }

    /// Tries until the history is attached, its project is no more, or it is given up; then tells.
    async fn conclude_history(self: &Arc<Self>, key: &Key, entry: Entry) -> Result<(), Interrupted> {
        let Some(mut owed) = entry.owes_history else { return Ok(()) };
        let outcome = loop {
            let failure = match self.attach_history(key, &entry, owed.seq).await? {
                Ok(attached) => break attached.map(Ok),
                Err(failure) => failure,
            };
            let (now, failures) = (self.clock.now(), owed.failures + 1);
            tracing::info!(task.id = %key.task_id, error = %failure, failures, "a history could not be attached");
            let wait = match self.settings.retry.decide(failures, failure, owed.deferred_since, now, rand::random()) {
                Next::Fail(failure) => break Some(Err(failure)),
                Next::Retry(wait) => {
                    (owed.failures, owed.deferred_since) = (failures, None);
                    wait
                }
                Next::Defer(wait) => {
                    owed.deferred_since.get_or_insert(now);
                    wait
                }
            };
            let round = key.round;
            let noted = self.journal.step(&key.task_id, now, move |step| {
                step.page.put_off_history(round, owed.failures, owed.deferred_since);
            });
            noted.await?;
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.hard.cancelled() => return Err(Interrupted::Stopping),
            }
        };
        self.observer.reached(Step::HistoryDone, Some(&key.task_id));
        self.tell_history(key, &entry, outcome).await
    }

    /// One try: an outcome, or nothing where the project is no more.
    async fn attach_history(
        self: &Arc<Self>,
        key: &Key,
        entry: &Entry,
        seq: u64,
    ) -> Result<Result<Option<TaskResult>, Failure>, Interrupted> {
        let _place = tokio::select! {
            place = self.histories.places.acquire() => place.map_err(|_| Interrupted::Stopping)?,
            () = self.hard.cancelled() => return Err(Interrupted::Stopping),
        };
        let stop = self.hard.child_token();
        let fence = TakesTurn { worker: self, entry, stop: &stop, turn: Mutex::default() };
        let owed = OwedHistory { task: key.task_id.clone(), project: entry.project, seq };
        let attached = self.executor.history(&owed, &stop, &fence).await;
        if attached.is_err() && self.hard.is_cancelled() {
            return Err(Interrupted::Stopping);
        }
        Ok(attached)
    }

    /// Notes what became of a history together with the event that tells of it, and pays that.
    async fn tell_history(
        self: &Arc<Self>,
        key: &Key,
        entry: &Entry,
        outcome: Option<Result<TaskResult, Failure>>,
    ) -> Result<(), Interrupted> {
        match &outcome {
            Some(Ok(_)) => tracing::info!(task.id = %key.task_id, "history attached"),
            Some(Err(failure)) => tracing::warn!(task.id = %key.task_id, error = %failure, "history given up"),
            None => tracing::info!(task.id = %key.task_id, "the project of a history is no more; nothing is owed"),
        }
        let identity = Identity {
            task_id: key.task_id.clone(),
            kind: entry.kind,
            project_id: entry.project,
            generation: entry.place.generation,
        };
        let project = self.executor.project(entry.project).await;
        let traceparent = entry.event.as_ref().and_then(|event| event.message.traceparent());
        let about = About { identity: &identity, round: key.round, attempt: entry.attempt, project, traceparent };
        let event = outcome.map(|outcome| self.reporter.history(&about, &outcome));
        let (round, lost) = (key.round, entry.clone());
        let step = self.journal.step(&key.task_id, self.clock.now(), move |step| {
            step.page.known(round, || lost);
            step.page.history_over(round, event);
            step.page.round(round).map(Entry::debts).unwrap_or_default()
        });
        let owed = step.await?;
        self.observer.reached(Step::HistoryNoted, Some(&key.task_id));
        self.pay(key, owed).await
    }
}
