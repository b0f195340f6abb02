//! The worker's life: when it takes messages, when it stops, and what it looks after meanwhile.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::{
    Worker, WorkerError,
    enrol::{Ahead, ensure_topology, refuse_an_occupied_queue, tasks, wait_for_a_migration},
    poison::IN_HAND,
    readiness::Readiness,
    watch::{Verdict, Watched},
};
use crate::{
    broker::{BrokerError, Consume, Consumer, Stop, Topology},
    journal::Key,
    store::JournalError,
};

/// How often a journal that could not be written is tried again.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// How long a publish of a non-terminal event may hold up the end.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long it may take until what was not handed out is back at the broker.
const GIVING_BACK: Duration = Duration::from_secs(5);
/// Starts in a row that did not end cleanly, after which one delivery is taken at a time.
const UNCLEAN_LIMIT: u32 = 2;
/// The note that counts unclean starts.
const UNCLEAN: &str = "unclean_starts";
/// Control messages in hand at a time.
pub(super) const CONTROL_WINDOW: u16 = 16;
/// The note that remembers a pause.
pub(super) const PAUSED: &str = "paused";

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
        self.run_prepared(Ahead::default()).await
    }

    /// The same where the way to the broker was made ready before.
    ///
    /// # Errors
    /// See [`Worker::run`].
    pub async fn run_prepared(self: Arc<Self>, ahead: Ahead) -> Result<(), WorkerError> {
        self.prepared(ahead.enrolled).await?;
        if self.soft.is_cancelled() {
            return Ok(());
        }
        let control = tokio::spawn(self.clone().control());
        let upkeep = tokio::spawn(self.clone().upkeep());
        let sparing = tokio::spawn(self.clone().spare_the_journal());
        let result = self.take_messages(ahead.consumer).await;
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
    async fn prepared(self: &Arc<Self>, mut enrolled: bool) -> Result<(), WorkerError> {
        loop {
            match self.prepare(&mut enrolled).await {
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
    async fn prepare(self: &Arc<Self>, enrolled: &mut bool) -> Result<(), WorkerError> {
        if !*enrolled {
            wait_for_a_migration(&*self.broker, &self.settings, &self.soft).await?;
            if self.soft.is_cancelled() {
                return Ok(());
            }
            ensure_topology(&*self.broker, &self.settings).await?;
            refuse_an_occupied_queue(&*self.broker, &self.settings, &self.soft).await?;
            *enrolled = true;
        }
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

    /// Consumes while it may; with the consumer that stands in line for it, if one does.
    async fn take_messages(self: &Arc<Self>, in_line: Option<Consumer>) -> Result<(), WorkerError> {
        // What a pause, or caution, would keep from it must not lie in its window.
        let mut in_line = in_line.filter(|_| !*self.paused.borrow() && !self.caution.is_on());
        while self.until_it_may_consume().await {
            let prefetch = if self.caution.is_on() { 1 } else { self.settings.window };
            let consume = tasks(&self.settings, &self.boot, prefetch);
            let queue = consume.queue.clone();
            let mut consumer = match in_line.take() {
                Some(consumer) => {
                    // Who was before it has left: that is how the storage came to be ours.
                    consumer.presence().leads();
                    consumer
                }
                None => self.broker.consume(consume).await?,
            };
            tracing::info!(prefetch, "consuming");
            self.verdict.send_replace(Verdict::Well);
            let watch = self.watched(&consumer, queue, prefetch, true).watch(self.verdict.clone());
            let watch = AbortOnDropHandle::new(tokio::spawn(watch));
            let ended = self.take_until(&mut consumer).await;
            drop(watch);
            if ended == Ended::CautionOver {
                // The one delivery is settled, and with it nothing more is in hand.
                self.handling.close();
                self.handling.wait().await;
                self.handling.reopen();
            }
            // What was not handed out goes back by this; what is in hand can still be settled.
            consumer.end(match ended {
                // Nothing runs, and somebody is next in line.
                Ended::Stopping if self.left.load(Ordering::SeqCst) => Stop::LetGo,
                // Nothing runs here either, and we are next ourselves. A consumer that is cancelled may be given one more
                // that it never sees, and the next would be served before that is back.
                Ended::CautionOver => Stop::LetGo,
                // A pull that waits behind its clone must not come first at the next start.
                Ended::Stopping => Stop::KeepOrder,
                Ended::Paused | Ended::Trouble => Stop::GiveBack,
            });
            if ended != Ended::Stopping {
                // Before it is back the next consumer would be given what is behind it.
                let mut session = consumer.health();
                let _ = tokio::time::timeout(GIVING_BACK, async { while session.changed().await.is_ok() {} }).await;
            }
            drop(consumer);
            self.readiness.send_modify(|readiness| readiness.consuming = false);
            tracing::info!(reason = ?ended, "not consuming");
        }
        // Its writer broke down. Nothing can be done for it in this process: the next one begins anew.
        if self.journal.is_closed() { Err(JournalError::Closed.into()) } else { Ok(()) }
    }

    /// A consumer of ours, to be compared with what the broker says of it.
    pub(super) fn watched(&self, consumer: &Consumer, queue: String, window: u16, single: bool) -> Watched {
        Watched { broker: self.broker.clone(), queue, presence: consumer.presence(), window, single }
    }

    /// Takes deliveries until something forbids it.
    async fn take_until(self: &Arc<Self>, consumer: &mut Consumer) -> Ended {
        let (mut consuming, mut publishing) = (consumer.health(), self.broker.health());
        let (presence, mut verdict) = (consumer.presence(), self.verdict.subscribe());
        let cautious = self.caution.is_on();
        loop {
            self.note_readiness(*consuming.borrow_and_update(), *publishing.borrow_and_update(), &presence.now());
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
                // An error would mean that the worker itself is gone.
                _ = verdict.changed() => {}
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
                if !running.is_empty() {
                    tracing::warn!("ending what runs, giving it back");
                }
                self.handling.wait().await;
            }
        }
        self.hard.cancel();
        self.say_drained();
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
            prefetch: CONTROL_WINDOW,
            declare,
        }
    }
}
