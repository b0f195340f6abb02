//! Dead letters: what failed for good, read, sent again or dropped by an operator.
//!
//! Reading takes every letter once and gives all back in one step, so the order of the queue stays. The number of
//! letters is fixed at the beginning: a replayed task that fails again at once is not replayed for ever.

mod letter;
mod reading;
mod select;

use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use reading::Reading;

pub use letter::{Letter, UNKNOWN};
pub use select::{Filter, Rate};

use crate::{
    broker::{Broker, BrokerError, Delivery, Names, Outgoing, PublishError},
    protocol::wire::{Message, header},
};

/// Why the dead letters could not be worked on.
#[derive(Debug, thiserror::Error)]
pub enum DeadError {
    /// There is no queue of dead letters.
    #[error("there is no queue {0} on this broker: run `haul topology apply`")]
    NoQueue(String),
    /// The broker could not be used.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// What to do with which letters.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Which letters are meant.
    pub filter: Filter,
    /// At most so many of them.
    pub limit: Option<usize>,
    /// How often the queue delivers one letter before it drops it; nothing where there is no such limit.
    pub delivery_limit: Option<i64>,
}

/// How letters are replayed.
#[derive(Clone, Debug, Default)]
pub struct Replay {
    /// Say what would be done, and do nothing.
    pub dry_run: bool,
    /// How fast.
    pub rate: Option<Rate>,
    /// The new `not_after` of letters whose old one has passed.
    pub not_after: Option<Timestamp>,
}

/// What became of one letter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Fate {
    /// Sent to its node, and gone from here.
    Replayed,
    /// Would be sent (`--dry-run`).
    WouldReplay,
    /// Gone.
    Dropped,
    /// Would be dropped (`--dry-run`).
    WouldDrop,
    /// Still here.
    Left {
        /// Why, and what to do.
        reason: String,
    },
    /// Sent, but still here too, since the channel closed before it could be removed; replaying it again is
    /// harmless: the agent knows task and round.
    SentAndLeft,
}

/// What a command did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Letters that were meant.
    pub matched: usize,
    /// Letters that were, or would be, replayed or dropped.
    pub done: usize,
    /// Letters that are still here against the wish.
    pub left: usize,
    /// Whether it ended before its time.
    pub interrupted: bool,
}

/// A letter with the message it was read from.
#[derive(Clone, Debug)]
pub struct Found {
    /// As people see it.
    pub letter: Letter,
    /// As it is.
    pub message: Message,
}

/// The fleet's dead letters.
pub struct DeadLetters {
    broker: Arc<dyn Broker>,
    names: Names,
}

impl DeadLetters {
    /// The dead letters of a broker.
    #[must_use]
    pub fn new(broker: Arc<dyn Broker>, names: Names) -> Self {
        Self { broker, names }
    }

    /// Reads the letters that are meant and gives all back, also when `stop` ends it early.
    ///
    /// # Errors
    /// When there is no queue, or the broker fails; it then gives the letters back itself.
    pub async fn list(&self, selection: &Selection, stop: &CancellationToken) -> Result<Vec<Found>, DeadError> {
        let mut reading = self.open(selection).await?;
        let mut found = Vec::new();
        while let Some((letter, delivery)) = reading.next(stop).await? {
            found.push(Found { letter, message: delivery.message.clone() });
            reading.leave(delivery).await;
        }
        reading.give_back().await?;
        Ok(found)
    }

    /// Sends the letters that are meant to their nodes again, and removes each once its copy is confirmed.
    ///
    /// A letter that cannot be sent is reported and stays; the rest go on. `report` hears of each at once.
    ///
    /// # Errors
    /// When there is no queue, or the broker fails; what was not confirmed is then still in the queue.
    pub async fn replay(
        &self,
        selection: &Selection,
        replay: &Replay,
        now: fn() -> Timestamp,
        stop: &CancellationToken,
        report: &mut (dyn FnMut(&Letter, &Fate) + Send),
    ) -> Result<Summary, DeadError> {
        let mut reading = self.open(selection).await?;
        let mut pace = replay.rate.filter(|_| !replay.dry_run).map(pace);
        let mut summary = Summary::default();
        while let Some((letter, delivery)) = reading.next(stop).await? {
            summary.matched += 1;
            let (fate, go_on) = match self.outgoing(&letter, &delivery.message, replay, now()) {
                Err(reason) => {
                    reading.leave(delivery).await;
                    (Fate::Left { reason }, true)
                }
                Ok(_) if replay.dry_run => {
                    reading.leave(delivery).await;
                    (Fate::WouldReplay, true)
                }
                Ok(outgoing) => {
                    if !wait_for_turn(pace.as_mut(), stop).await {
                        summary.matched -= 1;
                        reading.leave(delivery).await;
                        break;
                    }
                    self.send(&mut reading, outgoing, delivery).await
                }
            };
            match fate {
                Fate::Left { .. } | Fate::SentAndLeft => summary.left += 1,
                _ => summary.done += 1,
            }
            report(&letter, &fate);
            if !go_on {
                // The channel may be gone with the rest of the connection; the broker then gives them back itself.
                if let Err(error) = reading.give_back().await {
                    tracing::warn!(error.message = %error, "could not give dead letters back");
                }
                summary.interrupted = true;
                return Ok(summary);
            }
            if reading.is_long() {
                reading = reading.renewed().await?;
            }
        }
        summary.interrupted = stop.is_cancelled();
        reading.give_back().await?;
        Ok(summary)
    }

    /// Removes the letters that are meant, for ever.
    ///
    /// # Errors
    /// When there is no queue, or the broker fails; what was not removed is then still in the queue.
    pub async fn remove(
        &self,
        selection: &Selection,
        dry_run: bool,
        stop: &CancellationToken,
        report: &mut (dyn FnMut(&Letter, &Fate) + Send),
    ) -> Result<Summary, DeadError> {
        let mut reading = self.open(selection).await?;
        let mut summary = Summary::default();
        while let Some((letter, delivery)) = reading.next(stop).await? {
            summary.matched += 1;
            let fate = if dry_run {
                reading.leave(delivery).await;
                Fate::WouldDrop
            } else if delivery.ack().await.is_ok() {
                Fate::Dropped
            } else {
                Fate::Left { reason: "the channel closed before it could be removed".to_owned() }
            };
            match fate {
                Fate::Left { .. } => summary.left += 1,
                _ => summary.done += 1,
            }
            report(&letter, &fate);
        }
        summary.interrupted = stop.is_cancelled();
        reading.give_back().await?;
        Ok(summary)
    }

    async fn open(&self, selection: &Selection) -> Result<Reading, DeadError> {
        Reading::open(&self.broker, &self.names.dead(), selection).await
    }

    /// The message that replays a letter, or why it cannot be.
    fn outgoing(&self, letter: &Letter, dead: &Message, replay: &Replay, now: Timestamp) -> Result<Outgoing, String> {
        let node = letter.node.as_ref().ok_or_else(|| {
            format!("no node is known: it has neither {} nor the broker's notes; publish it anew", header::NODE)
        })?;
        let mut message = dead.copy();
        // The patience of a deferred task begins anew with its replay.
        message.headers.remove(header::DEFERRED);
        message.set(header::NODE, node.as_str());
        if letter.is_expired(now) {
            let last = letter.not_after.unwrap_or(now);
            let fresh = replay.not_after.ok_or_else(|| {
                format!("its not_after {last} has passed: the agent would refuse it; give --not-after a later moment")
            })?;
            if fresh <= now {
                return Err(format!("the new not_after {fresh} has passed too"));
            }
            message.body = with_not_after(&message.body, fresh)?.into();
        }
        Ok(Outgoing { exchange: self.names.task(), routing_key: node.to_string(), message, mandatory: true })
    }

    /// Publishes a replay and then removes its letter; whether the rest may go on.
    async fn send(&self, reading: &mut Reading, outgoing: Outgoing, delivery: Delivery) -> (Fate, bool) {
        let node = outgoing.routing_key.clone();
        let (reason, go_on) = match self.broker.publish(outgoing).await {
            Ok(()) => {
                let removed = delivery.ack().await.is_ok();
                return if removed { (Fate::Replayed, true) } else { (Fate::SentAndLeft, false) };
            }
            Err(PublishError::Unroutable { .. }) => {
                let mend = format!("run `haul topology apply --node {node}` or start its agent");
                (format!("node {node} is not enrolled: {mend}"), true)
            }
            Err(error @ PublishError::Refused { .. }) => (error.to_string(), true),
            Err(error @ (PublishError::Forbidden { .. } | PublishError::Unconfirmed { .. })) => {
                (error.to_string(), false)
            }
        };
        reading.leave(delivery).await;
        (Fate::Left { reason }, go_on)
    }
}

/// Rewrites the one field and leaves the others, known to us or not, as they are.
fn with_not_after(body: &[u8], not_after: Timestamp) -> Result<Vec<u8>, String> {
    let mut body: Value = serde_json::from_slice(body).map_err(|error| format!("its body is not JSON: {error}"))?;
    let fields = body.as_object_mut().ok_or("its body is not a JSON object")?;
    fields.insert("not_after".to_owned(), Value::String(not_after.to_string()));
    serde_json::to_vec(&body).map_err(|error| error.to_string())
}

fn pace(rate: Rate) -> Interval {
    let mut interval = tokio::time::interval(rate.period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// Whether the turn came before `stop`.
async fn wait_for_turn(pace: Option<&mut Interval>, stop: &CancellationToken) -> bool {
    let Some(pace) = pace else { return true };
    tokio::select! {
        biased;
        () = stop.cancelled() => false,
        _ = pace.tick() => true,
    }
}
