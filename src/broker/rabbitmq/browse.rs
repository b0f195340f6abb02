//! Reading a queue without consuming it.

use std::sync::Arc;

use async_trait::async_trait;
use lapin::{Channel, Connection, options::BasicNackOptions};

use super::{
    convert, declare,
    link::Line,
    session::{Hold, Tag},
};
use crate::broker::{BrokerError, Browse, Delivery};

/// The delivery tag that, with `multiple`, means every message that is held.
const ALL: u64 = 0;

/// A reader with a connection of its own: whatever ends it, the broker gives back what it holds.
pub(super) struct Reader {
    queue: String,
    hold: Arc<Hold>,
    channel: Channel,
    line: Line,
    /// Whether anything was read.
    has_read: bool,
}

impl Reader {
    /// Opens `queue`, which must exist.
    pub(super) async fn open(connection: Connection, queue: &str) -> Result<Self, BrokerError> {
        let line = Line::own(connection);
        if declare::depth(&line, queue).await?.is_none() {
            let reason = "there is no such queue".to_owned();
            return Err(BrokerError::Refused { what: format!("queue {queue:?}"), reason });
        }
        let channel = line.channel().await.map_err(|error| declare::refused("a channel", &error))?;
        let hold = Hold::new(channel.clone());
        Ok(Self { queue: queue.to_owned(), hold, channel, line, has_read: false })
    }
}

#[async_trait]
impl Browse for Reader {
    async fn next(&mut self) -> Result<Option<Delivery>, BrokerError> {
        let read = self.channel.basic_get(convert::cut(&self.queue), declare::reading()).await;
        let Some(got) = read.map_err(|error| declare::refused(&format!("queue {:?}", self.queue), &error))? else {
            return Ok(None);
        };
        self.has_read = true;
        Ok(Some(Tag::deliver(got.delivery, &self.hold)))
    }

    async fn give_back(self: Box<Self>) -> Result<(), BrokerError> {
        let what = format!("queue {:?}", self.queue);
        self.hold.end();
        if self.has_read {
            // One step for all of them: so they return to their places. Those settled before are not affected, and tag
            // zero means all that are left, even if that is none; the last one's own tag is unknown once it is settled.
            let options = BasicNackOptions { multiple: true, requeue: true };
            self.channel.basic_nack(ALL, options).await.map_err(|error| declare::refused(&what, &error))?;
        }
        // The broker's answer to the close comes after it has dealt with the nack.
        self.channel.close(200, "read".into()).await.map_err(|error| declare::refused(&what, &error))?;
        self.line.close("read").await;
        Ok(())
    }
}
