//! Steps 7 and 8: noting the outcome and what is owed, and paying it. Also the copies that travel on.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use super::{
    Interrupted, Worker,
    arrival::{self, Arrival},
    attempt::Again,
    copies::{CopyOf, NextAttempt},
    reporter::About,
    step::Step,
};
use crate::{
    broker::{Outgoing, PublishError, topology::RETRY_DELAYS},
    execute::{PENDING, ProjectState},
    failure::Failure,
    journal::{Concluded, Debt, Entry, Envelope, Key, Ticket},
    protocol::{
        NodeName, Outcome, Place, TaskId,
        wire::{CopyHeaders, Identity, Message, Undecodable, without_secrets},
    },
    retry,
};

/// The first wait after a publish that the broker did not take; doubles up to [`LONGEST_PATIENCE`].
const PATIENCE: Duration = Duration::from_millis(500);
/// The longest wait between two tries of the same publish.
const LONGEST_PATIENCE: Duration = Duration::from_secs(30);

impl Arrival {
    /// What an event about this task says of it.
    pub(super) fn about(&self, ticket: Ticket, project: ProjectState) -> About<'_> {
        About {
            identity: &self.identity,
            round: self.key.round,
            attempt: ticket.attempt,
            project,
            traceparent: self.message.traceparent(),
        }
    }

    fn copy_of<'a>(&'a self, node: &'a NodeName, now: jiff::Timestamp) -> CopyOf<'a> {
        CopyOf { message: &self.message, headers: &self.headers, node, now }
    }
}

impl Worker {
    /// Step 7: the journal notes the outcome with everything that is owed for it.
    pub(super) async fn settle(
        &self,
        arrival: &Arrival,
        ticket: Ticket,
        outcome: Outcome,
    ) -> Result<Vec<(Debt, Arc<Envelope>)>, Interrupted> {
        let project = self.executor.project(arrival.task.project).await;
        let event = self.reporter.terminal(&arrival.about(ticket, project), &outcome);
        let now = self.clock.now();
        let dead = outcome.dead_letter().map(|failure| {
            let attempts = if matches!(outcome, Outcome::Rejected(_)) { 0 } else { ticket.attempt };
            let copy = arrival.copy_of(&self.settings.node, now);
            self.dead_envelope(copy.dead_letter(Some(&arrival.identity), failure, attempts, Some(ticket.place)))
        });
        log_outcome(&arrival.key, &outcome);
        let (round, status) = (arrival.key.round, outcome.status());
        let tree_first = matches!(&outcome, Outcome::Succeeded(result) if result.history.as_deref() == Some(PENDING));
        let owes_history = tree_first.then_some(project.seq);
        let lost = arrival.entry(ticket.place, now);
        let step = self.journal.step(&arrival.key.task_id, now, move |step| {
            step.page.known(round, || lost);
            let concluded = step.page.settle(round, status, event, dead);
            if let Some(seq) = owes_history.filter(|_| concluded == Concluded::Now) {
                step.page.owe_history(round, seq);
            }
            let owed = step.page.round(round).map(Entry::debts).unwrap_or_default();
            (concluded, owed)
        });
        let (concluded, owed) = step.await?;
        if concluded != Concluded::Now {
            tracing::warn!(task.id = %arrival.key.task_id, "the task had been settled meanwhile; the first outcome stands");
        }
        self.observer.reached(Step::Settled, Some(&arrival.key.task_id));
        Ok(owed)
    }

    /// Step 8: each debt is published until the broker has it, then struck off.
    pub(super) async fn pay(self: &Arc<Self>, key: &Key, owed: Vec<(Debt, Arc<Envelope>)>) -> Result<(), Interrupted> {
        for (debt, envelope) in owed {
            self.deliver(envelope, debt != Debt::DeadLetter).await?;
            self.observer.reached(
                match debt {
                    Debt::DeadLetter => Step::DeadLetterConfirmed,
                    Debt::Event => Step::EventConfirmed,
                    Debt::History => Step::HistoryConfirmed,
                },
                Some(&key.task_id),
            );
            let (round, now) = (key.round, self.clock.now());
            let struck = self.journal.step(&key.task_id, now, move |step| {
                step.page.strike(round, debt, now);
                step.page.round(round).filter(|entry| entry.owes_history.is_some()).cloned()
            });
            let owing = struck.await?;
            self.observer.reached(
                match debt {
                    Debt::DeadLetter => Step::DeadLetterStruck,
                    Debt::Event => Step::EventStruck,
                    Debt::History => Step::HistoryStruck,
                },
                Some(&key.task_id),
            );
            // Only who knows that the project is there can be told more of it.
            if let Some(entry) = owing.filter(|_| debt == Debt::Event) {
                self.begin_history(key.clone(), entry);
            }
        }
        Ok(())
    }

    /// A task that had ended: what is still owed is paid; where nothing is, its terminal event is told again.
    pub(super) async fn answer(self: &Arc<Self>, key: &Key, entry: Entry) -> Result<(), Interrupted> {
        let owed = entry.debts();
        if !owed.is_empty() {
            return self.pay(key, owed).await;
        }
        match entry.event {
            Some(event) => self.deliver(event, true).await,
            None => Ok(()),
        }
    }

    /// Ends a task that nobody here holds: a cancelled one in a retry queue, a lower round.
    pub(super) async fn settle_unheld(
        self: &Arc<Self>,
        task_id: TaskId,
        entry: Entry,
        outcome: Outcome,
    ) -> Result<(), Interrupted> {
        let project = self.executor.project(entry.project).await;
        let identity = Identity {
            task_id: task_id.clone(),
            kind: entry.kind,
            project_id: entry.project,
            generation: entry.place.generation,
        };
        let about =
            About { identity: &identity, round: entry.round, attempt: entry.attempt, project, traceparent: None };
        let event = self.reporter.terminal(&about, &outcome);
        let (round, status) = (entry.round, outcome.status());
        let step = self.journal.step(&task_id, self.clock.now(), move |step| {
            step.page.known(round, || entry);
            step.page.settle(round, status, event, None);
            step.page.round(round).map(Entry::debts).unwrap_or_default()
        });
        let owed = step.await?;
        self.pay_in_background(Key { task_id, round }, owed);
        Ok(())
    }

    /// Pays what no delivery waits for. If the agent ends first, the next start pays.
    pub(super) fn pay_in_background(self: &Arc<Self>, key: Key, owed: Vec<(Debt, Arc<Envelope>)>) {
        let worker = self.clone();
        self.background.spawn(async move {
            if let Err(Interrupted::Journal(error)) = worker.pay(&key, owed).await {
                tracing::error!(task.id = %key.task_id, error = %error, "a debt could not be struck off; it is paid again");
            }
        });
    }

    /// Tells a recorded terminal event again; nobody waits for it.
    pub(super) fn tell_again(self: &Arc<Self>, event: Arc<Envelope>) {
        let worker = self.clone();
        self.background.spawn(async move {
            // A stop is the only thing that ends it early, and the event was confirmed once already.
            let _ = worker.deliver(event, true).await;
        });
    }

    /// Publishes the copy that asks for another attempt, then notes it.
    pub(super) async fn release(self: &Arc<Self>, arrival: &Arrival, again: Again) -> Result<(), Interrupted> {
        let holding = retry::holding(again.wait, &RETRY_DELAYS);
        let next = NextAttempt {
            attempt: again.attempt,
            place: again.ticket.place,
            wait: again.wait,
            left: again.wait.saturating_sub(holding),
            failure: again.failure.as_ref(),
            deferred_since: again.deferred_since,
        };
        let (message, due) = arrival.copy_of(&self.settings.node, self.clock.now()).next_attempt(&next);
        if let Some(failure) = &again.failure {
            let project = self.executor.project(arrival.task.project).await;
            self.reporter.retrying(&arrival.about(again.ticket, project), failure, due);
        }
        let exchange = self.settings.names.retry(holding);
        let copy = Envelope { exchange, routing_key: self.settings.node.to_string(), message };
        self.deliver(copy.into(), false).await?;
        self.observer.reached(Step::CopyConfirmed, Some(&arrival.key.task_id));
        let (round, attempt, now) = (arrival.key.round, again.attempt, self.clock.now());
        // Where the broker's word came late, the copy is not overdue from the start.
        let due = due.max(now);
        let lost = arrival.entry(again.ticket.place, now);
        let noted = self.journal.step(&arrival.key.task_id, now, move |step| {
            step.page.known(round, || lost);
            step.page.release(round, attempt, due)
        });
        let cancelled = noted.await?;
        self.observer.reached(Step::CopyNoted, Some(&arrival.key.task_id));
        match cancelled {
            Some(entry) => self.settle_unheld(arrival.key.task_id.clone(), entry, Outcome::Cancelled).await,
            None => Ok(()),
        }
    }

    /// Publishes a task that belongs to another node into that node's queue; a node that is not enrolled makes it a
    /// dead letter, since it can be neither run here nor lost.
    pub(super) async fn publish_forwarded(&self, arrival: &Arrival, owner: &NodeName) -> Result<(), Interrupted> {
        let message = arrival.copy_of(owner, self.clock.now()).forwarded();
        let outgoing =
            Outgoing { exchange: self.settings.names.task(), routing_key: owner.to_string(), message, mandatory: true };
        match self.broker.publish(outgoing).await {
            Ok(()) => Ok(()),
            Err(PublishError::Unroutable { .. }) => {
                let failure = Failure::new(
                    crate::failure::ErrorClass::NotFound,
                    format!("it belongs to node {owner}, which is not enrolled"),
                );
                let copy = arrival.copy_of(owner, self.clock.now());
                let message = copy.dead_letter(Some(&arrival.identity), &failure, 0, None);
                self.deliver(self.dead_envelope(message).into(), false).await
            }
            Err(error) => {
                tracing::warn!(task.id = %arrival.key.task_id, error = %error, "could not be forwarded; given back");
                tokio::time::sleep(PATIENCE).await;
                Err(Interrupted::Stopping)
            }
        }
    }

    /// A message that is no task: dead-lettered, and a `rejected` event where its identity could be read.
    pub(super) async fn reject_undecodable(
        self: &Arc<Self>,
        message: &Message,
        undecodable: Undecodable,
    ) -> Result<(), Interrupted> {
        let Undecodable { failure, identity } = undecodable;
        let headers = CopyHeaders::read(&message.headers);
        let now = self.clock.now();
        tracing::warn!(message.id = message.message_id, error = %failure, "message rejected");
        let copy = CopyOf { message, headers: &headers, node: &self.settings.node, now };
        let mut letter = copy.dead_letter(identity.as_ref(), &failure, 0, None);
        letter.body = without_secrets(&letter.body);
        let dead = self.dead_envelope(letter);
        let Some(identity) = identity else { return self.deliver(dead.into(), false).await };
        let digest = arrival::digest(message);
        let outcome = Outcome::Rejected(failure);
        let project = self.executor.project(identity.project_id).await;
        let about = About {
            identity: &identity,
            round: headers.round,
            attempt: 0,
            project,
            traceparent: message.traceparent(),
        };
        let event = self.reporter.terminal(&about, &outcome);
        let key = Key { task_id: identity.task_id.clone(), round: headers.round };
        // A place in the future would push every later arrival behind it.
        let arrived = headers.arrived.map_or(0, |arrived| arrived.min(now.as_microsecond()));
        let place = Place { generation: identity.generation, arrived };
        let (kind, project, round, dead_copy) = (identity.kind, identity.project_id, headers.round, dead.clone());
        let step = self.journal.step(&key.task_id, now, move |step| {
            match step.page.round(round) {
                Some(known) if known.digest != digest => return None,
                Some(_) => {}
                None => step.page.insert(Entry::new(round, digest, kind, project, place, now)),
            }
            step.page.settle(round, outcome.status(), event, Some(dead_copy));
            step.page.round(round).cloned()
        });
        match step.await? {
            Some(entry) => self.answer(&key, entry).await,
            // Its identity belongs to a task that is fine: only the letter tells of this one.
            None => self.deliver(dead.into(), false).await,
        }
    }

    /// The same identity came with another body: a dead letter and an answer tell of it, the first is not touched.
    pub(super) async fn dead_letter_mismatch(&self, arrival: &Arrival) -> Result<(), Interrupted> {
        let failure = Failure::invalid("another task with this task_id and another body came first");
        tracing::warn!(task.id = %arrival.key.task_id, error = %failure, "message rejected");
        let mut answer = self.reporter.answer("refused", None, Some(arrival.key.task_id.clone()));
        answer.reason = Some(failure.message.clone());
        self.reporter.send_answer(&answer);
        let copy = arrival.copy_of(&self.settings.node, self.clock.now());
        let message = copy.dead_letter(Some(&arrival.identity), &failure, 0, None);
        self.deliver(self.dead_envelope(message).into(), false).await
    }

    pub(super) fn dead_envelope(&self, message: Message) -> Envelope {
        Envelope { exchange: self.settings.names.dlx(), routing_key: self.settings.node.to_string(), message }
    }

    /// Publishes until the broker has it, however long that takes; only a stop ends it earlier.
    ///
    /// `terminal`: an event that no queue takes counts as delivered where the master has no queue.
    pub(super) async fn deliver(&self, envelope: Arc<Envelope>, terminal: bool) -> Result<(), Interrupted> {
        let mut patience = PATIENCE;
        let mut counted = None;
        loop {
            let Envelope { exchange, routing_key, message } = envelope.as_ref().clone();
            let publish = self.broker.publish(Outgoing { exchange, routing_key, message, mandatory: true });
            let published = tokio::select! {
                published = publish => published,
                () = self.hard.cancelled() => return Err(Interrupted::Stopping),
            };
            let error = match published {
                Ok(()) => return Ok(()),
                Err(PublishError::Unroutable { routing_key, .. })
                    if terminal && self.settings.results_queue.is_empty() =>
                {
                    tracing::info!(routing.key = routing_key, "no queue takes this event; none is configured");
                    return Ok(());
                }
                Err(error) => error,
            };
            tracing::warn!(error = %error, retry_in = ?patience, "owed message not taken");
            counted.get_or_insert_with(|| Owing::new(self));
            tokio::select! {
                () = tokio::time::sleep(patience) => {}
                () = self.hard.cancelled() => return Err(Interrupted::Stopping),
            }
            patience = (patience * 2).min(LONGEST_PATIENCE);
        }
    }
}

/// Counts a message that the broker does not take, while it lives.
struct Owing<'a>(&'a Worker);

impl<'a> Owing<'a> {
    fn new(worker: &'a Worker) -> Self {
        worker.owing.fetch_add(1, Ordering::Relaxed);
        Self(worker)
    }
}

impl Drop for Owing<'_> {
    fn drop(&mut self) {
        self.0.owing.fetch_sub(1, Ordering::Relaxed);
        self.0.changed.notify_one();
    }
}

fn log_outcome(key: &Key, outcome: &Outcome) {
    let (id, round, status) = (&key.task_id, key.round, outcome.status());
    match outcome {
        Outcome::Failed(failure) | Outcome::Rejected(failure) => {
            tracing::warn!(task.id = %id, task.round = round, task.status = %status, error = %failure, "task ended");
        }
        Outcome::Superseded(reason) => {
            tracing::info!(task.id = %id, task.round = round, task.status = %status, reason, "task ended");
        }
        Outcome::Succeeded(_) | Outcome::Cancelled => {
            tracing::info!(task.id = %id, task.round = round, task.status = %status, "task ended");
        }
    }
}
