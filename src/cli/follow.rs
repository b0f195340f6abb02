//! Following the results exchange: a queue of one's own that ends with the connection.

use std::sync::Arc;

use serde_json::Value;
use tokio::sync::watch;

use super::error::CliError;
use crate::{
    broker::{Broker, Consume, Consumer, Health, Names},
    protocol::{ControlAnswer, Event, wire::Message},
};

/// What arrives on the results exchange.
#[derive(Debug)]
pub(super) enum News {
    /// A task's event.
    Event(Box<Event>),
    /// An agent's answer to a control message.
    Answer(Box<ControlAnswer>),
    /// We were away from the broker and are back: what happened meanwhile was missed.
    Gap,
}

/// A running subscription.
pub(super) struct Following {
    consumer: Consumer,
    health: watch::Receiver<Health>,
    away: bool,
}

impl Following {
    /// Subscribes to `patterns`; once this returns, nothing that is published under them is missed.
    pub(super) async fn start(broker: &Arc<dyn Broker>, names: &Names, patterns: &[String]) -> Result<Self, CliError> {
        let unique = crate::protocol::new_event_id();
        let queue = names.follow(&unique);
        let consumer = broker
            .consume(Consume {
                declare: names.follow_topology(&queue, patterns),
                tag: format!("follow-{unique}"),
                prefetch: 100,
                queue,
            })
            .await?;
        let health = consumer.health();
        Ok(Self { consumer, health, away: false })
    }

    /// The next piece of news; `None` when the subscription has ended.
    ///
    /// Safe to drop while it waits.
    pub(super) async fn next(&mut self) -> Option<News> {
        loop {
            tokio::select! {
                // What has arrived is older than what the connection does now.
                biased;
                delivery = self.consumer.next() => {
                    let delivery = delivery?;
                    let news = read(&delivery.message);
                    // The queue is ours alone: a stale acknowledgement harms nobody.
                    let _ = delivery.ack().await;
                    if let Some(news) = news {
                        return Some(news);
                    }
                }
                changed = self.health.changed() => {
                    changed.ok()?;
                    let up = *self.health.borrow_and_update() != Health::Down;
                    let back = up && self.away;
                    self.away = !up;
                    if back {
                        return Some(News::Gap);
                    }
                }
            }
        }
    }
}

/// Reads an event or an answer; foreign messages and later versions are passed over.
fn read(message: &Message) -> Option<News> {
    let value: Value = serde_json::from_slice(&message.body).ok()?;
    if value.get("answer").is_some() {
        return serde_json::from_value(value).ok().map(|answer| News::Answer(Box::new(answer)));
    }
    match serde_json::from_value(value) {
        Ok(event) => Some(News::Event(Box::new(event))),
        Err(error) => {
            tracing::warn!(message.id = message.message_id, error = %error, "passing over a message that is no event");
            None
        }
    }
}
