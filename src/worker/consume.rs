//! The worker's life: when it takes messages, when it stops, and what it looks after meanwhile.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{Worker, WorkerError, poison::IN_HAND};
use crate::{
    broker::{BrokerError, Consume, Consumer, Health, Topology},
    journal::Key,
    store::JournalError,
};

/// How often a journal that could not be written is tried again.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// How long a publish of a non-terminal event may hold up the end.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Starts in a row that did not end cleanly, after which one delivery is taken at a time.
const UNCLEAN_LIMIT: u32 = 2;
/// The note that counts unclean starts.
const UNCLEAN: &str = "unclean_starts";
/// The note that remembers a pause.
pub(super) const PAUSED: &str = "paused";

/// Whether the worker can do its job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// The queue of tasks is consumed.
    pub consuming: bool,
    /// Events and copies can be published.
    pub publishing: bool,
    /// Control messages can be received.
    pub control: bool,
    /// The journal can be written.
    pub journal: bool,
}

impl Readiness {
    /// Whether all of it works.
    #[must_use]
    pub fn is_ready(self) -> bool {
        self.consuming && self.publishing && self.control && self.journal
    }
}

/// Why consumption ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Stopping,
    Paused,
    Trouble,
    CautionOver,
}

impl Worker {
    /// Runs until the soft token asks it to stop: what waits is given back, what runs is finished, unless the hard token
    /// comes first.
    ///
    /// # Errors
    /// When it could not begin: the queue is taken, the broker refuses, the journal cannot be read.
    pub async fn run(self: Arc<Self>) -> Result<(), WorkerError> {
        self.prepared().await?;
        if self.soft.is_cancelled() {
            return Ok(());
        }
        let control = tokio::spawn(self.clone().control());
        let upkeep = tokio::spawn(self.clone().upkeep());
        let sparing = tokio::spawn(self.clone().spare_the_journal());
        let result = self.take_messages().await;
        self.finish_up().await;
        control.abort();
        upkeep.abort();
        sparing.abort();
        self.journal.close().await;
        result
    }

    /// Whether the worker can do its job, as it changes.
    #[must_use]
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.subscribe()
    }

    /// Prepares, however long the broker is away; a refusal is an error.
    async fn prepared(self: &Arc<Self>) -> Result<(), WorkerError> {
        loop {
            match self.prepare().await {
                Err(WorkerError::Broker(error @ BrokerError::Unreachable { .. })) => {
                    tracing::warn!(error = %error, "waiting for the broker");
                    tokio::select! {
                        () = tokio::time::sleep(PROBE_INTERVAL) => {}
                        () = self.soft.cancelled() => return Ok(()),
                    }
                }
                prepared => return prepared,
            }
        }
    }

    /// Everything before the first message.
    async fn prepare(self: &Arc<Self>) -> Result<(), WorkerError> {
        self.ensure_topology().await?;
        self.refuse_an_occupied_queue().await?;
        let unclean = self.journal.note(UNCLEAN).await?.and_then(|text| text.parse().ok()).unwrap_or(0_u32);
        self.journal.set_note(UNCLEAN, Some(&(unclean + 1).to_string())).await?;
        if unclean >= UNCLEAN_LIMIT {
            tracing::warn!(starts.unclean = unclean, "the last starts did not end cleanly: one delivery at a time");
            let suspects = self.journal.running().await?.into_iter();
            let suspects = suspects.map(|(task_id, entry)| Key { task_id, round: entry.round });
            self.caution.begin(suspects, usize::from(self.settings.window));
        }
        self.paused.send_replace(self.journal.note(PAUSED).await?.is_some());
        self.readiness.send_modify(|readiness| readiness.journal = true);
        for (task_id, entry) in self.journal.owing().await? {
            tracing::info!(task.id = %task_id, task.round = entry.round, "paying what an earlier start owed");
            let (key, owed) = (Key { task_id, round: entry.round }, entry.debts());
            if owed.is_empty() {
                self.begin_history(key, entry);
            } else {
                self.pay_in_background(key, owed);
            }
        }
        Ok(())
    }

    /// Makes what is missing where we may; an agent without the right to configure shared objects only checks them.
    async fn ensure_topology(&self) -> Result<(), WorkerError> {
        let names = &self.settings.names;
        let shared = names.shared_topology(&self.settings.results_queue);
        let missing = self.broker.missing(&shared).await?;
        if !missing.is_empty() {
            tracing::info!(missing = ?missing, "making shared exchanges and queues");
            if let Err(error) = self.broker.declare(&shared).await {
                tracing::error!(error = %error, "shared exchanges and queues could not be made");
                return Err(WorkerError::Topology { missing: missing.join(", ") });
            }
        }
        self.broker.declare(&names.node_topology(&self.settings.node)).await?;
        self.broker.declare(&names.control_topology(&self.settings.node)).await?;
        Ok(())
    }

    /// A consumer on our queue while we hold the storage lock is another agent of the same name, or the ghost of a
    /// lost connection of our own, which the broker drops once its heartbeats are missed.
    async fn refuse_an_occupied_queue(&self) -> Result<(), WorkerError> {
        let queue = self.settings.names.node(&self.settings.node);
        if self.settings.force {
            return Ok(());
        }
        let patience = tokio::time::Instant::now() + self.settings.ghost_limit;
        let mut said = false;
        loop {
            match self.broker.depth(&queue).await? {
                Some(depth) if depth.consumers > 0 => {}
                _ => return Ok(()),
            }
            if tokio::time::Instant::now() >= patience {
                return Err(WorkerError::Occupied { queue });
            }
            if !std::mem::replace(&mut said, true) {
                let patience_ms = u64::try_from(self.settings.ghost_limit.as_millis()).unwrap_or(u64::MAX);
                tracing::warn!(
                    broker.queue = queue,
                    wait_ms = patience_ms,
                    "another consumer is on our queue; waiting, since it may be a lost connection of our own"
                );
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = self.soft.cancelled() => return Ok(()),
            }
        }
    }

    /// Consumes while it may.
    async fn take_messages(self: &Arc<Self>) -> Result<(), WorkerError> {
        while self.until_it_may_consume().await {
            let names = &self.settings.names;
            let prefetch = if self.caution.is_on() { 1 } else { self.settings.window };
            let consume = Consume {
                queue: names.node(&self.settings.node),
                tag: format!("haul-{}-{}", self.settings.node, self.boot),
                prefetch,
                declare: names.node_topology(&self.settings.node),
            };
            let mut consumer = self.broker.consume(consume).await?;
            tracing::info!(prefetch, "consuming");
            let ended = self.take_until(&mut consumer).await;
            // What was not handed out goes back by this; what is in hand can still be settled.
            consumer.stop();
            drop(consumer);
            self.readiness.send_modify(|readiness| readiness.consuming = false);
            tracing::info!(reason = ?ended, "not consuming");
            if ended == Ended::CautionOver {
                // The one delivery is settled; its channel can close before the next, wider one opens.
                self.handling.close();
                self.handling.wait().await;
                self.handling.reopen();
            }
        }
        // Its writer broke down. Nothing can be done for it in this process: the next one begins anew.
        if self.journal.is_closed() { Err(JournalError::Closed.into()) } else { Ok(()) }
    }

    /// Takes deliveries until something forbids it.
    async fn take_until(self: &Arc<Self>, consumer: &mut Consumer) -> Ended {
        let (mut consuming, mut publishing) = (consumer.health(), self.broker.health());
        let cautious = self.caution.is_on();
        loop {
            self.readiness.send_if_modified(|readiness| {
                let before = *readiness;
                readiness.consuming = *consuming.borrow_and_update() == Health::Up;
                readiness.publishing = *publishing.borrow_and_update() == Health::Up;
                before != *readiness
            });
            if self.soft.is_cancelled() {
                return Ended::Stopping;
            }
            if *self.paused.borrow() {
                return Ended::Paused;
            }
            if *self.trouble.borrow() {
                return Ended::Trouble;
            }
            if cautious && !self.caution.is_on() {
                return Ended::CautionOver;
            }
            let room = self.owing() * 2 < usize::from(self.settings.window);
            tokio::select! {
                biased;
                () = self.soft.cancelled() => {}
                () = self.changed.notified() => {}
                changed = consuming.changed() => if changed.is_err() { return Ended::Trouble },
                changed = publishing.changed() => if changed.is_err() { return Ended::Trouble },
                delivery = consumer.next(), if room => match delivery {
                    Some(delivery) => {
                        // Read here, in the order in which they come: what is spawned runs in any order.
                        let read = (!self.caution.is_on()).then(|| self.read(&delivery.message));
                        self.handling.spawn(self.clone().handle(delivery, read));
                    }
                    None => return Ended::Trouble,
                },
            }
        }
    }

    /// Waits out a pause and a journal that cannot be written; false once the worker stops.
    async fn until_it_may_consume(&self) -> bool {
        loop {
            if self.soft.is_cancelled() || self.journal.is_closed() {
                return false;
            }
            if *self.trouble.borrow() && !self.journal_is_back().await {
                self.readiness.send_if_modified(|readiness| std::mem::replace(&mut readiness.journal, false));
                tokio::select! {
                    () = tokio::time::sleep(PROBE_INTERVAL) => {}
                    () = self.soft.cancelled() => {}
                }
                continue;
            }
            if !*self.paused.borrow() {
                return true;
            }
            tokio::select! {
                () = self.changed.notified() => {}
                () = self.soft.cancelled() => {}
            }
        }
    }

    async fn journal_is_back(&self) -> bool {
        let written = self.journal.probe().await;
        if written.is_ok() {
            self.trouble.send_replace(false);
            self.readiness.send_modify(|readiness| readiness.journal = true);
        }
        written.is_ok()
    }

    /// The end: what runs may finish, then everything is stopped and given back.
    async fn finish_up(&self) {
        self.handling.close();
        let (in_hand, running) = self.active.counts();
        tracing::info!(tasks.in_hand = in_hand, tasks.running = running.len(), "stopping");
        tokio::select! {
            () = self.handling.wait() => {}
            () = self.hard.cancelled() => {
                tracing::warn!("ending what runs, giving it back");
                self.handling.wait().await;
            }
        }
        self.hard.cancel();
        self.background.close();
        if tokio::time::timeout(LAST_WORDS, self.background.wait()).await.is_err() {
            tracing::warn!("some events were not confirmed before the end");
        }
        for note in [IN_HAND, UNCLEAN] {
            if let Err(error) = self.journal.set_note(note, None).await {
                tracing::warn!(error = %error, "this end could not be noted as clean");
            }
        }
    }

    /// What an agent needs of the broker for control messages.
    pub(super) fn control_consume(&self) -> Consume {
        let names = &self.settings.names;
        let declare: Topology = names.control_topology(&self.settings.node);
        Consume {
            queue: names.control_node(&self.settings.node),
            tag: format!("haul-control-{}-{}", self.settings.node, self.boot),
            prefetch: 16,
            declare,
        }
    }
}
