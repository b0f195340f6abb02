//! Step 9: deliveries leave, acknowledged or given back.

use std::time::Duration;

use super::{Interrupted, Worker, arrival::Arrival, step::Step};
use crate::{
    broker::{Delivery, StaleDelivery},
    protocol::wire::CopyHeaders,
};

/// How long a delivery may take to be settled: a connection that breaks at that moment may never tell.
const SETTLING: Duration = Duration::from_secs(10);

/// How a message's path was gone to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Through {
    /// Its task has ended.
    Ended,
    /// Its task goes on in a copy that asks for this attempt, or for a later one.
    GoesOn(u32),
}

impl Worker {
    /// Step 9: everything that belongs to the task is acknowledged; a delivery whose channel is gone comes again and is
    /// answered from the journal.
    ///
    /// The copy in which the task goes on may have joined the delivery that it replaces: one that overtook it on its way here,
    /// or one whose confirm came later than it did itself. It goes back to be looked at.
    pub(super) async fn acknowledge(&self, arrival: &Arrival, through: Through) {
        let key = &arrival.key;
        for (number, delivery) in self.active.leave(key).into_iter().enumerate() {
            // The first is the one that was handled.
            let copy = number > 0
                && matches!(through, Through::GoesOn(next) if CopyHeaders::read(&delivery.message.headers).attempt >= next);
            let done = if copy { Box::pin(settled(delivery.requeue())).await } else { settled(delivery.ack()).await };
            if !done {
                tracing::debug!(task.id = %key.task_id, "the delivery's channel is gone; it comes again");
            }
        }
        self.observer.reached(Step::Acked, Some(&key.task_id));
        self.settled_one(Some(key)).await;
    }

    /// The path was cut short: the broker keeps the task.
    pub(super) async fn give_back(&self, arrival: &Arrival, why: Interrupted) {
        match why {
            Interrupted::Journal(error) => {
                tracing::error!(task.id = %arrival.key.task_id, error = %error, "given back: the journal cannot be written");
                self.trouble.send_replace(true);
                self.changed.notify_one();
            }
            Interrupted::Stopping | Interrupted::Broken => {
                // An attempt that we ended ourselves is charged neither as an attempt nor as a crash.
                let (round, now) = (arrival.key.round, self.clock.now());
                let noted = self.journal.step(&arrival.key.task_id, now, move |step| {
                    step.page.give_back(round, now);
                });
                if let Err(error) = noted.await {
                    tracing::warn!(task.id = %arrival.key.task_id, error = %error, "given back without a note");
                }
            }
        }
        let ending = self.soft.is_cancelled() || self.hard.is_cancelled();
        for delivery in self.active.leave(&arrival.key) {
            if ending {
                // It goes back with its channel, in its order with all the others.
                delivery.abandon();
            } else {
                // A delivery whose channel is gone is back at the broker already.
                settled(delivery.requeue()).await;
            }
        }
    }

    /// Settles a delivery that never became a task in hand.
    pub(super) async fn finish(&self, delivery: Delivery, done: Result<(), Interrupted>) {
        // A delivery whose channel is gone comes again.
        match done {
            Ok(()) => settled(delivery.ack()).await,
            Err(_) => settled(delivery.requeue()).await,
        };
        self.settled_one(None).await;
    }
}

/// Waits until a delivery is settled; false where its channel is gone, or nobody answers any more: it comes again.
async fn settled(settling: impl Future<Output = Result<(), StaleDelivery>>) -> bool {
    matches!(tokio::time::timeout(SETTLING, settling).await, Ok(Ok(())))
}
