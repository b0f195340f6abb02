//! One pass over the queue: each letter taken once, what is left given back together.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{DeadError, Filter, Letter, Selection};
use crate::{
    broker::{Broker, BrokerError, Browse, Delivery, Outgoing},
    protocol::wire::{HeaderValue, Message},
};

/// How long letters are held before they are given back and taken anew: brokers close a channel that holds a message
/// for longer than their consumer timeout (30 minutes by default).
const LONGEST_HOLD: Duration = Duration::from_mins(10);
/// How long an interrupted command may still read, to keep the order.
const HURRY: Duration = Duration::from_secs(5);
/// How long the broker may take to count what was given back; whoever reads before that misses some.
const COUNTED: Duration = Duration::from_mins(1);
/// How long its count may stand still below that: somebody else takes letters too.
const STEADY: Duration = Duration::from_secs(2);
/// How often none at all are counted until that is believed: a leader that is busy with a large return answers so.
const NONE_AT_ALL: u32 = 3;
/// Between those.
const BELIEVED: Duration = Duration::from_millis(300);
/// Between two questions for its count.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// The broker's own count of a message's returns.
const DELIVERY_COUNT: &str = "x-delivery-count";

/// One pass over the queue.
pub(super) struct Reading {
    browse: Box<dyn Browse>,
    broker: Arc<dyn Broker>,
    queue: String,
    filter: Filter,
    delivery_limit: Option<i64>,
    /// Letters that were there at the beginning and are not read yet.
    unread: usize,
    /// How many of those that are meant may still be handed out.
    wanted: usize,
    position: usize,
    /// Letters read and not removed: at the head of the queue once given back.
    kept: usize,
    since: Instant,
}

impl Reading {
    /// Opens the queue for the letters that are there now.
    pub(super) async fn open(broker: &Arc<dyn Broker>, queue: &str, selection: &Selection) -> Result<Self, DeadError> {
        let letters = count(broker, queue).await?;
        Ok(Self {
            browse: broker.browse(queue).await?,
            broker: Arc::clone(broker),
            queue: queue.to_owned(),
            filter: selection.filter.clone(),
            delivery_limit: selection.delivery_limit,
            unread: letters,
            wanted: selection.limit.unwrap_or(usize::MAX),
            position: 0,
            kept: 0,
            since: Instant::now(),
        })
    }

    /// Gives back all that was left, in one step.
    ///
    /// What is given back goes behind what was given back before, so the rest is read first: only all of it together
    /// keeps its order. `hurried`, it is given back out of order rather than late.
    pub(super) async fn give_back(mut self, hurried: bool) -> Result<(), BrokerError> {
        let rest = self.read_rest(hurried.then(|| Instant::now() + HURRY)).await?;
        let held = self.kept + rest;
        return_all(self.browse, &self.broker, &self.queue, held).await
    }

    /// Reads what is behind; how much of it is left to the common return.
    async fn read_rest(&mut self, until: Option<Instant>) -> Result<usize, BrokerError> {
        let kept = self.kept;
        for _ in 0..self.unread {
            if until.is_some_and(|until| Instant::now() >= until) {
                break;
            }
            let Some(delivery) = self.browse.next().await? else { break };
            self.leave(delivery).await;
        }
        Ok(std::mem::replace(&mut self.kept, kept) - kept)
    }

    /// Whether letters have been held for so long that the pass should be [`renewed`](Self::renewed).
    pub(super) fn is_long(&self) -> bool {
        self.since.elapsed() > LONGEST_HOLD
    }

    /// The next letter that is meant; nothing at the end, and once `stop` is set.
    pub(super) async fn next(&mut self, stop: &CancellationToken) -> Result<Option<(Letter, Delivery)>, BrokerError> {
        // Not raced against `stop`: a read that is dropped half-way could leave a letter out of the common return.
        while self.unread > 0 && self.wanted > 0 && !stop.is_cancelled() {
            let Some(delivery) = self.browse.next().await? else { break };
            self.unread -= 1;
            self.position += 1;
            let letter = Letter::read(&delivery.message, self.position);
            if self.filter.matches(&letter) {
                self.wanted -= 1;
                return Ok(Some((letter, delivery)));
            }
            self.leave(delivery).await;
        }
        Ok(None)
    }

    /// Leaves a letter to the common return; one that would not survive another return is put anew at the queue's end.
    pub(super) async fn leave(&mut self, delivery: Delivery) {
        if self.is_spent(&delivery.message) {
            let mut message = delivery.message.clone();
            message.headers.remove(DELIVERY_COUNT);
            let (exchange, routing_key) = (String::new(), self.queue.clone());
            let anew = Outgoing { exchange, routing_key, message, mandatory: true };
            match self.broker.publish(anew).await {
                Ok(()) => {
                    if delivery.ack().await.is_err() {
                        tracing::warn!("a dead letter that was put anew is there twice");
                    }
                    return;
                }
                Err(error) => {
                    tracing::warn!(error = %error, "a dead letter near its delivery limit could not be put anew");
                }
            }
        }
        delivery.abandon();
        self.kept += 1;
    }

    /// Whether the broker may drop a letter when it is returned once or twice more.
    fn is_spent(&self, message: &Message) -> bool {
        let count = message.headers.get(DELIVERY_COUNT).and_then(HeaderValue::as_int).unwrap_or(0);
        self.delivery_limit.is_some_and(|limit| count.saturating_add(2) >= limit)
    }

    /// Gives back what is held and goes on behind it: what was left is again at the head of the queue.
    pub(super) async fn renewed(mut self) -> Result<Self, DeadError> {
        let rest = self.read_rest(None).await?;
        return_all(self.browse, &self.broker, &self.queue, self.kept + rest).await?;
        let mut browse = self.broker.browse(&self.queue).await?;
        for _ in 0..self.kept {
            let Some(delivery) = browse.next().await? else { break };
            delivery.abandon();
        }
        Ok(Self { browse, since: Instant::now(), ..self })
    }
}

/// How many letters there are.
async fn count(broker: &Arc<dyn Broker>, queue: &str) -> Result<usize, DeadError> {
    for _ in 0..NONE_AT_ALL {
        let depth = broker.depth(queue).await?.ok_or_else(|| DeadError::NoQueue(queue.to_owned()))?;
        if depth.messages > 0 {
            return Ok(depth.messages as usize);
        }
        tokio::time::sleep(BELIEVED).await;
    }
    Ok(0)
}

/// Gives back `held` letters and waits until the broker counts them again: it takes them back on its own time, and the next
/// reader would miss those it has not got to.
async fn return_all(
    browse: Box<dyn Browse>,
    broker: &Arc<dyn Broker>,
    queue: &str,
    held: usize,
) -> Result<(), BrokerError> {
    let count = async || broker.depth(queue).await.ok().flatten().map(|depth| depth.messages as usize);
    let others = count().await.unwrap_or(0);
    browse.give_back().await?;
    let until = Instant::now() + COUNTED;
    let (mut last, mut since) = (0, Instant::now());
    while held > 0
        && Instant::now() < until
        && let Some(counted) = count().await
        && counted < others + held
    {
        if counted != last {
            (last, since) = (counted, Instant::now());
        }
        if counted > 0 && since.elapsed() > STEADY {
            break;
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
    Ok(())
}
