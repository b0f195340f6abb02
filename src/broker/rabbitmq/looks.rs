//! Looking at queues again and again: on the consuming connection, which no alarm blocks, and a channel that is kept.

use std::sync::atomic::{AtomicBool, Ordering};

use lapin::{Channel, protocol::AMQPSoftError};
use tokio::sync::Mutex;

use super::{declare, link::Line};
use crate::broker::{BrokerError, ConsumerView, Depth, management::Management};

/// What looking needs.
pub(super) struct Looks {
    channel: Mutex<Option<Channel>>,
    /// Where an operator gave the address of the management API.
    management: Option<Management>,
    complained: AtomicBool,
}

impl Looks {
    pub(super) fn new(management: Option<Management>) -> Self {
        Self { channel: Mutex::default(), management, complained: AtomicBool::new(false) }
    }

    /// Messages and consumers of a queue, if it exists.
    pub(super) async fn depth(&self, line: &Line, queue: &str) -> Result<Option<Depth>, BrokerError> {
        let what = || format!("queue {queue:?}");
        let mut kept = self.channel.lock().await;
        let channel = match kept.take().filter(|channel| channel.status().connected()) {
            Some(channel) => channel,
            None => line.channel().await.map_err(|error| declare::refused(&what(), &error))?,
        };
        match declare::counted(&channel, queue).await {
            Ok(depth) => {
                *kept = Some(channel);
                Ok(Some(depth))
            }
            Err(error) if declare::is(&error, &AMQPSoftError::NOTFOUND) => Ok(None),
            Err(error) => Err(declare::refused(&what(), &error)),
        }
    }

    /// Who consumes a queue, where the management API tells.
    pub(super) async fn consumers(&self, queue: &str) -> Option<Vec<ConsumerView>> {
        match self.management.as_ref()?.consumers(queue).await {
            Ok(consumers) => {
                self.complained.store(false, Ordering::Relaxed);
                consumers
            }
            Err(error) => {
                if !self.complained.swap(true, Ordering::Relaxed) {
                    tracing::warn!(error = %error, "the management API does not tell who consumes; doing without");
                }
                None
            }
        }
    }
}
