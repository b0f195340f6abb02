//! A broker that can be away: nothing that is published then is answered.

use async_trait::async_trait;
use haul::broker::{
    Broker, BrokerError, Browse, Consume, Consumer, Depth, Health, Outgoing, PublishError, Topology, memory::Memory,
};
use tokio::sync::watch;

/// How the broker treats publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// It takes them.
    Up,
    /// It cannot be reached: nothing is sent.
    Down,
    /// It takes them, and its confirms are lost.
    Mute,
    /// It cannot be reached at first, takes them when it is back, and its confirms are lost.
    BackMute,
}

/// A broker in memory behind a link.
#[derive(Clone)]
pub(crate) struct Away {
    memory: Memory,
    link: watch::Sender<Link>,
    health: watch::Sender<Health>,
}

impl Away {
    pub(crate) fn new(memory: Memory, link: Link) -> Self {
        let down = matches!(link, Link::Down | Link::BackMute);
        let health = watch::Sender::new(if down { Health::Down } else { Health::Up });
        Self { memory, link: watch::Sender::new(link), health }
    }

    pub(crate) fn is_now(&self, link: Link) {
        self.health.send_replace(if link == Link::Down { Health::Down } else { Health::Up });
        self.link.send_replace(link);
    }
}

#[async_trait]
impl Broker for Away {
    async fn publish(&self, outgoing: Outgoing) -> Result<(), PublishError> {
        let mut link = self.link.subscribe();
        let reached = *link.wait_for(|link| *link != Link::Down).await.unwrap();
        match reached {
            Link::Up | Link::Down => self.memory.publish(outgoing).await,
            Link::Mute | Link::BackMute => {
                if reached == Link::BackMute {
                    self.health.send_replace(Health::Up);
                }
                self.memory.publish(outgoing).await?;
                std::future::pending().await
            }
        }
    }
    async fn consume(&self, consume: Consume) -> Result<Consumer, BrokerError> {
        self.memory.consume(consume).await
    }
    async fn browse(&self, queue: &str) -> Result<Box<dyn Browse>, BrokerError> {
        self.memory.browse(queue).await
    }
    async fn declare(&self, topology: &Topology) -> Result<(), BrokerError> {
        self.memory.declare(topology).await
    }
    async fn missing(&self, topology: &Topology) -> Result<Vec<String>, BrokerError> {
        self.memory.missing(topology).await
    }
    async fn depth(&self, queue: &str) -> Result<Option<Depth>, BrokerError> {
        self.memory.depth(queue).await
    }
    fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }
    async fn close(&self) {
        self.memory.close().await;
    }
}
