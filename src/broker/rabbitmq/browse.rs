//! Reading a queue without taking anything out of it.
//!
//! Through a consumer whose channel is closed in the end: a quorum queue returns what a lost consumer held in the order in
//! which it delivered it. What is got one by one, or returned by a `nack`, comes back in the order of an unsorted map as
//! soon as it is more than thirty-two messages. A few are returned by a `nack` all the same, since newer brokers do not count that
//! as a failed delivery.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::StreamExt as _;
use lapin::{
    Channel, Connection,
    options::{BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions},
    types::FieldTable,
};

use super::{acks::Hold, convert, declare, link::Line, session::Tag};
use crate::broker::{BrokerError, Browse, Delivery};

/// Messages that one channel may hold: as many as can be asked for. Unlimited would be two thousand for a quorum queue.
const WINDOW: u16 = u16::MAX;
/// Messages that a `nack` returns in their order.
const FEW: u32 = 32;
/// The delivery tag that, with `multiple`, means every message that is held.
const ALL: u64 = 0;
/// How long nothing has to come until the broker is asked whether anything is left.
const QUIET: Duration = Duration::from_millis(100);
/// How often that may repeat before what is left counts as out of reach: others may hold it.
const QUIETS: u32 = 100;
/// How often the broker must say that nothing is left while more is due: a leader that is busy says so too.
const BELIEVED: u32 = 5;

/// A reader with a connection of its own: whatever ends it, the broker gives back what it holds.
pub(super) struct Reader {
    queue: String,
    line: Line,
    /// The last one reads; those before it are full.
    windows: Vec<Window>,
    /// Messages that were there at the beginning and have not been read; at least one until something is known.
    due: u32,
    /// There were few at the beginning.
    few: bool,
}

/// A channel and what it may still bring.
struct Window {
    channel: Channel,
    hold: Arc<Hold>,
    stream: lapin::Consumer,
    room: u16,
}

impl Reader {
    /// Opens `queue`, which must exist.
    pub(super) async fn open(connection: Connection, queue: &str) -> Result<Self, BrokerError> {
        let line = Line::own(connection);
        let Some(depth) = declare::depth(&line, queue).await? else {
            let reason = "there is no such queue".to_owned();
            return Err(BrokerError::Refused { what: format!("queue {queue:?}"), reason });
        };
        let first = Window::open(&line, queue).await?;
        Ok(Self {
            queue: queue.to_owned(),
            line,
            windows: vec![first],
            due: depth.messages.max(1),
            few: depth.messages <= FEW,
        })
    }

    /// Whether nothing is left that could still come.
    async fn is_empty(&self) -> Result<bool, BrokerError> {
        Ok(declare::depth(&self.line, &self.queue).await?.is_none_or(|depth| depth.messages == 0))
    }
}

impl Window {
    async fn open(line: &Line, queue: &str) -> Result<Self, BrokerError> {
        let failed = |error| declare::refused(&format!("queue {queue:?}"), &error);
        let channel = line.channel().await.map_err(failed)?;
        channel.basic_qos(WINDOW, BasicQosOptions { global: false }).await.map_err(failed)?;
        let (name, tag) = (convert::cut(queue), convert::cut("haul-reading"));
        let options = BasicConsumeOptions::default();
        let stream = channel.basic_consume(name, tag, options, FieldTable::default()).await.map_err(failed)?;
        Ok(Self { hold: Hold::new(channel.clone()), channel, stream, room: WINDOW })
    }
}

#[async_trait]
impl Browse for Reader {
    async fn next(&mut self) -> Result<Option<Delivery>, BrokerError> {
        let what = format!("queue {:?}", self.queue);
        if self.windows.last().is_none_or(|window| window.room == 0) {
            self.windows.push(Window::open(&self.line, &self.queue).await?);
        }
        let mut empty = 0;
        for _ in 0..QUIETS {
            let Some(window) = self.windows.last_mut() else { break };
            match tokio::time::timeout(QUIET, window.stream.next()).await {
                Ok(Some(Ok(arrived))) => {
                    self.due = self.due.saturating_sub(1);
                    return Ok(Some(window.take(arrived)));
                }
                Ok(Some(Err(error))) => return Err(declare::refused(&what, &error)),
                Ok(None) => {
                    let reason = "the broker cancelled the reader".to_owned();
                    return Err(BrokerError::Refused { what, reason });
                }
                Err(_) => {
                    empty = if self.is_empty().await? { empty + 1 } else { 0 };
                    if empty >= BELIEVED || (empty > 0 && self.due == 0) {
                        break;
                    }
                }
            }
        }
        Ok(None)
    }

    async fn give_back(self: Box<Self>) -> Result<(), BrokerError> {
        let what = format!("queue {:?}", self.queue);
        for window in &self.windows {
            window.hold.end();
        }
        if let [window] = self.windows.as_slice()
            && self.few
            && (1..=FEW).contains(&u32::from(WINDOW - window.room))
        {
            // First nothing more may come, else the same messages come again at once. Those settled before are not affected.
            let (tag, cancel) = (window.stream.tag(), BasicCancelOptions::default());
            window.channel.basic_cancel(tag, cancel).await.map_err(|error| declare::refused(&what, &error))?;
            let options = BasicNackOptions { multiple: true, requeue: true };
            window.channel.basic_nack(ALL, options).await.map_err(|error| declare::refused(&what, &error))?;
        }
        // One after the other, since they return in this order; the answer comes after the broker has dealt with it.
        for window in &self.windows {
            window.channel.close(200, "read".into()).await.map_err(|error| declare::refused(&what, &error))?;
        }
        self.line.close("read").await;
        Ok(())
    }
}

impl Window {
    fn take(&mut self, arrived: lapin::message::Delivery) -> Delivery {
        self.room -= 1;
        Tag::deliver(arrived, &self.hold)
    }
}
