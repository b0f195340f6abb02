//! Following the results exchange: a queue of one's own that ends with the connection.

use std::sync::Arc;

use super::error::CliError;
use crate::{
    broker::{Broker, Names},
    master::{self, Heard, Live},
    protocol::{ControlAnswer, Event},
};

/// What arrives on the results exchange, for people: what cannot be read is passed over.
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
pub(super) struct Following(Live);

impl Following {
    /// Subscribes to `patterns`; once this returns, nothing that is published under them is missed.
    pub(super) async fn start(broker: &Arc<dyn Broker>, names: &Names, patterns: &[String]) -> Result<Self, CliError> {
        Ok(Self(Live::start(broker, names, patterns).await?))
    }

    /// The next piece of news; `None` when the subscription has ended.
    ///
    /// Safe to drop while it waits.
    pub(super) async fn next(&mut self) -> Option<News> {
        loop {
            match self.0.next().await? {
                Heard::News(master::News::Event(event)) => return Some(News::Event(event)),
                Heard::News(master::News::Answer(answer)) => return Some(News::Answer(answer)),
                Heard::News(master::News::Unreadable { message, reason }) => {
                    tracing::warn!(message.id = message.message_id, reason, "passing over a message that is no event");
                }
                Heard::Gap => return Some(News::Gap),
            }
        }
    }
}
