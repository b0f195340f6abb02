//! The live subscription: progress too, from now on, and gone with the connection.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::news::News;
use crate::broker::{Broker, BrokerError, Consume, Consumer, Health, Names};

/// Events held for a follower that is slow.
const PREFETCH: u16 = 100;
/// For the first session to stand.
const OPENED_WITHIN: Duration = Duration::from_secs(15);

/// A queue of one's own on the results exchange, which ends with its connection.
pub struct Live {
    consumer: Consumer,
    health: watch::Receiver<Health>,
    /// As it was last looked at.
    last: Health,
}

/// What a follower hears.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// A message.
    News(News),
    /// We were away from the broker and are back: what happened meanwhile was missed.
    Gap,
}

impl Live {
    /// Subscribes to the routing keys of `patterns`, which [`Interest`](super::Interest) makes; once this returns, nothing
    /// that is published under them is missed.
    ///
    /// # Errors
    /// When the broker cannot be reached, or refuses the queue.
    pub async fn start(broker: &Arc<dyn Broker>, names: &Names, patterns: &[String]) -> Result<Self, BrokerError> {
        let unique = crate::protocol::new_event_id();
        let queue = names.follow(&unique);
        let consumer = broker
            .consume(Consume {
                declare: names.follow_topology(&queue, patterns),
                tag: format!("follow-{unique}"),
                prefetch: PREFETCH,
                queue,
            })
            .await?;
        let mut health = consumer.health();
        let stands = tokio::time::timeout(OPENED_WITHIN, health.wait_for(|health| *health != Health::Down));
        let Ok(Ok(last)) = stands.await.map(|stands| stands.map(|health| *health)) else {
            let reason = format!("no subscription within {OPENED_WITHIN:?}");
            return Err(BrokerError::Unreachable { address: "the broker".to_owned(), reason });
        };
        Ok(Self { consumer, health, last })
    }

    /// The next that is heard; nothing when the subscription has ended. Safe to drop while it waits.
    pub async fn next(&mut self) -> Option<Heard> {
        loop {
            tokio::select! {
                // What has arrived is older than what the connection does now.
                biased;
                delivery = self.consumer.next() => {
                    let delivery = delivery?;
                    let news = News::read(&delivery.message);
                    // The queue is ours alone: a stale acknowledgement harms nobody.
                    let _ = delivery.ack().await;
                    return Some(Heard::News(news));
                }
                changed = self.health.changed() => {
                    changed.ok()?;
                    let now = *self.health.borrow_and_update();
                    // The same as before, yet changed: it was down in between and nobody looked.
                    let back = now != Health::Down && (self.last == Health::Down || self.last == now);
                    self.last = now;
                    if back {
                        return Some(Heard::Gap);
                    }
                }
            }
        }
    }
}
