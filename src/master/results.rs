//! The durable subscription: every event but progress, kept by the broker until the application has committed it.

use std::sync::Arc;

use tokio::sync::watch;

use super::news::News;
use crate::{
    broker::{Broker, BrokerError, Consume, Consumer, Delivery, Health, StaleDelivery, Topology},
    protocol::wire::Message,
};

/// A consumer of the master's queue of events. Several may share one queue.
pub struct Results {
    consumer: Consumer,
}

/// One message of the queue, which the broker keeps until it is acknowledged.
#[must_use = "what is not acknowledged blocks the window, and comes again"]
#[derive(Debug)]
pub struct Received {
    /// What it says.
    pub news: News,
    delivery: Delivery,
}

impl Results {
    pub(super) async fn start(broker: &Arc<dyn Broker>, queue: String, prefetch: u16) -> Result<Self, BrokerError> {
        // The queue's arguments are the fleet's business; ours is to read it.
        let declare = Topology::default();
        let consumer = broker.consume(Consume { queue, tag: "master".to_owned(), prefetch, declare }).await?;
        Ok(Self { consumer })
    }

    /// The next message; nothing once [`stop`](Self::stop) took effect or the broker was closed. Safe to drop while it
    /// waits.
    pub async fn next(&mut self) -> Option<Received> {
        let delivery = self.consumer.next().await?;
        Some(Received { news: News::read(&delivery.message), delivery })
    }

    /// Takes no more; what is in hand may still be settled.
    pub fn stop(&self) {
        self.consumer.stop();
    }

    /// Whether the subscription stands.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.consumer.health()
    }
}

impl Received {
    /// The message as it came, with its headers.
    #[must_use]
    pub fn message(&self) -> &Message {
        &self.delivery.message
    }

    /// The trace context of the task that it tells of.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        self.delivery.message.traceparent()
    }

    /// Done with it: to be called after what it changed has been committed, never before.
    ///
    /// # Errors
    /// When its channel is gone: it comes again, which changes nothing once it is committed.
    pub async fn ack(self) -> Result<(), StaleDelivery> {
        self.delivery.ack().await
    }

    /// Gives it back, to come again: for when it could not be committed. What cannot be read is acknowledged instead, since
    /// it would come again for ever.
    ///
    /// # Errors
    /// When its channel is gone: it comes again anyway.
    pub async fn give_back(self) -> Result<(), StaleDelivery> {
        match self.news {
            News::Unreadable { reason, .. } => {
                tracing::warn!(
                    message.id = self.delivery.message.message_id,
                    reason,
                    "an unreadable message is dropped"
                );
                self.delivery.ack().await
            }
            News::Event(_) | News::Answer(_) => self.delivery.requeue().await,
        }
    }
}
