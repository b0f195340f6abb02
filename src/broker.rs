//! The message broker behind one face, with two backends: RabbitMQ and an in-memory one.
//!
//! The face speaks our own words; `lapin` is written only below this module.

pub mod address;
mod inbox;
pub mod management;
pub mod memory;
mod presence;
pub mod rabbitmq;
pub mod settings;
pub mod topology;
pub mod version;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use tokio::sync::watch;

pub use inbox::Inbox;
pub use management::ConsumerView;
pub use presence::{Counts, Ours, Presence};
pub use topology::{Names, Topology};

use crate::protocol::wire::Message;

/// A connection to a broker: publishes with confirms, consumes with reconnects.
#[async_trait]
pub trait Broker: Send + Sync + 'static {
    /// Publishes a message and waits until the broker has taken responsibility for it.
    ///
    /// # Errors
    /// See [`PublishError`]; in doubt (the connection broke) the message may have arrived.
    async fn publish(&self, outgoing: Outgoing) -> Result<(), PublishError>;

    /// Starts a consumer that survives lost connections, closed channels and cancels by the server.
    ///
    /// # Errors
    /// When the first attempt fails for a reason that waiting will not mend (access refused, no such queue).
    async fn consume(&self, consume: Consume) -> Result<Consumer, BrokerError>;

    /// Opens a queue for reading without consuming it.
    ///
    /// # Errors
    /// When the queue cannot be opened.
    async fn browse(&self, queue: &str) -> Result<Box<dyn Browse>, BrokerError>;

    /// Declares everything in `topology`; what exists and is equal stays as it is.
    ///
    /// # Errors
    /// When something exists with other arguments, or permission is missing.
    async fn declare(&self, topology: &Topology) -> Result<(), BrokerError>;

    /// Asks for each exchange and queue of `topology` whether it exists, changing nothing; returns what is missing, without
    /// what we may not ask for.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    async fn missing(&self, topology: &Topology) -> Result<Vec<String>, BrokerError>;

    /// Messages ready in a queue and its consumers, or nothing where there is no such queue.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    async fn depth(&self, queue: &str) -> Result<Option<Depth>, BrokerError>;

    /// The same as a consumer asks it every few seconds, at next to no cost and on the connection that consumes;
    /// `closely` wants to know who consumes, too, where the broker can be asked for it.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    async fn look(&self, queue: &str, closely: bool) -> Result<Option<View>, BrokerError> {
        let _ = closely;
        Ok(self.depth(queue).await?.map(|depth| View { depth, consumers: None }))
    }

    /// The version that the broker told when it was connected to, if it told one.
    fn server_version(&self) -> Option<String> {
        None
    }

    /// How the publishing side is.
    fn health(&self) -> watch::Receiver<Health>;

    /// Closes all connections.
    async fn close(&self);
}

/// A message with its route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The exchange; empty for the default one.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
    /// The message.
    pub message: Message,
    /// Whether a message that no queue takes is an error.
    pub mandatory: bool,
}

/// What to consume, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Consume {
    /// The queue.
    pub queue: String,
    /// Beginning of the consumer's tag; each session of the consumer appends a number of its own.
    pub tag: String,
    /// Unsettled deliveries at a time.
    pub prefetch: u16,
    /// What to declare again in each session before consuming: a queue that was deleted comes back.
    pub declare: Topology,
}

/// A queue as the broker sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// How much waits, and how many consume.
    pub depth: Depth,
    /// Who consumes, where that was asked for and the broker told.
    pub consumers: Option<Vec<ConsumerView>>,
}

/// Messages ready and consumers of a queue. Where only one consumer is active at a time, those that stand in line are not
/// counted; and a broker that is too busy to count says that there are none of either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Messages ready.
    pub messages: u32,
    /// Consumers.
    pub consumers: u32,
}

/// How one side of the connection is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// Not connected yet, or reconnecting.
    #[default]
    Down,
    /// Working.
    Up,
    /// Connected, but the broker stopped reading (memory or disk alarm).
    Blocked,
}

/// Why a message was not taken.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// No queue took a mandatory message.
    #[error("no queue takes messages for {routing_key:?} on exchange {exchange:?}")]
    Unroutable {
        /// The exchange.
        exchange: String,
        /// The routing key.
        routing_key: String,
    },
    /// A queue refused it: it is full.
    #[error("a queue behind exchange {exchange:?} is full and refuses messages")]
    Refused {
        /// The exchange.
        exchange: String,
    },
    /// The exchange does not exist, or we may not write to it.
    #[error("cannot publish to exchange {exchange:?}: {reason}")]
    Forbidden {
        /// The exchange.
        exchange: String,
        /// The broker's words.
        reason: String,
    },
    /// The connection broke, or no answer came in time; the message may have arrived.
    #[error("the broker did not confirm: {reason}")]
    Unconfirmed {
        /// What happened.
        reason: String,
    },
}

/// Why the broker could not be used.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// No address could be reached.
    #[error("cannot reach the broker at {address}: {reason}")]
    Unreachable {
        /// The address, without the password.
        address: String,
        /// What happened.
        reason: String,
    },
    /// The broker refused what we asked.
    #[error("the broker refused {what}: {reason}")]
    Refused {
        /// What we asked for.
        what: String,
        /// The broker's words.
        reason: String,
    },
    /// The settings cannot be used.
    #[error("{0}")]
    Settings(String),
}

/// How a delivery ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Done with: the broker forgets it.
    Ack,
    /// Given back: the broker delivers it again.
    Requeue,
    /// Refused: the broker dead-letters it. Only for foreign messages in queues of others; tasks are never rejected.
    Reject,
}

/// Why a delivery could not be settled; the broker will deliver it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the delivery's channel is gone; the broker delivers it again")]
pub struct StaleDelivery;

/// The backend's half of a delivery.
#[async_trait]
pub trait Settle: Send + Sync {
    /// Settles the delivery; fails if its channel is gone.
    async fn settle(&self, settlement: Settlement) -> Result<(), StaleDelivery>;

    /// Whether it is known already that settling would fail.
    fn is_stale(&self) -> bool {
        false
    }
}

/// One arrival of a message; settled exactly once, by value.
#[must_use = "a delivery that is not settled blocks the window until its channel closes"]
pub struct Delivery {
    /// The message.
    pub message: Message,
    /// The exchange it was published to; empty after a move through the default exchange.
    pub exchange: String,
    /// The routing key it was published with.
    pub routing_key: String,
    /// Whether the broker delivered it before.
    pub redelivered: bool,
    settle: Option<Arc<dyn Settle>>,
}

impl Delivery {
    /// Wraps a message that arrived.
    pub fn new(
        message: Message,
        exchange: String,
        routing_key: String,
        redelivered: bool,
        settle: Arc<dyn Settle>,
    ) -> Self {
        Self { message, exchange, routing_key, redelivered, settle: Some(settle) }
    }

    /// Done with it.
    ///
    /// # Errors
    /// When its channel is gone: it comes again.
    pub fn ack(self) -> impl Future<Output = Result<(), StaleDelivery>> + Send {
        self.settle(Settlement::Ack)
    }

    /// Gives it back.
    ///
    /// # Errors
    /// When its channel is gone: it comes again anyway.
    pub fn requeue(self) -> impl Future<Output = Result<(), StaleDelivery>> + Send {
        self.settle(Settlement::Requeue)
    }

    /// Settles it.
    ///
    /// # Errors
    /// When its channel is gone.
    pub fn settle(mut self, settlement: Settlement) -> impl Future<Output = Result<(), StaleDelivery>> + Send {
        // The message itself is not needed for it, and not kept while the broker is waited for.
        let settle = self.settle.take();
        async move {
            match settle {
                Some(settle) => settle.settle(settlement).await,
                None => Err(StaleDelivery),
            }
        }
    }

    /// Whether its channel is gone: the broker delivers it again, and this one is of no more use.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.settle.as_ref().is_none_or(|settle| settle.is_stale())
    }

    /// Leaves it to its channel: when that closes the broker delivers it again.
    pub fn abandon(mut self) {
        self.settle = None;
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if self.settle.is_some() {
            tracing::warn!(message.id = self.message.message_id, "a delivery was dropped unsettled");
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("message_id", &self.message.message_id)
            .field("exchange", &self.exchange)
            .field("routing_key", &self.routing_key)
            .field("redelivered", &self.redelivered)
            .finish_non_exhaustive()
    }
}

/// How a consumer is to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stop {
    /// Not at all.
    #[default]
    No,
    /// It takes no more, and what was not handed out is given back at once.
    GiveBack,
    /// It takes no more, and whatever is not settled goes back, in its order, once the last delivery in hand is settled
    /// or dropped: a broker puts what is given back one by one where it likes.
    KeepOrder,
    /// At once, with everything that is not settled: whoever is next in line gets it in its order.
    LetGo,
}

/// A running consumer: the receiving end of a session loop that the backend keeps alive.
///
/// Dropping it ends the session: what was not handed out is delivered again, to whoever consumes next. Deliveries in
/// hand can still be settled; the channel closes once the last of them is settled or dropped.
pub struct Consumer {
    inbox: Arc<Inbox>,
    presence: Arc<Presence>,
    stop: watch::Sender<Stop>,
    health: watch::Receiver<Health>,
}

impl Consumer {
    /// Ties the ends together; for backends.
    #[must_use]
    pub fn new(
        inbox: Arc<Inbox>,
        presence: Arc<Presence>,
        stop: watch::Sender<Stop>,
        health: watch::Receiver<Health>,
    ) -> Self {
        Self { inbox, presence, stop, health }
    }

    /// The next delivery; `None` once [`Consumer::stop`] took effect. Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.inbox.next().await
    }

    /// Takes no more: the consumer is cancelled, what was not handed out yet is given back; deliveries in hand can
    /// still be settled.
    pub fn stop(&self) {
        self.end(Stop::GiveBack);
    }

    /// Takes no more, in one of several ways.
    pub fn end(&self, how: Stop) {
        self.stop.send_replace(how);
    }

    /// How the consuming side is.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// What our side knows of it, to be compared with what the broker says.
    #[must_use]
    pub fn presence(&self) -> Arc<Presence> {
        Arc::clone(&self.presence)
    }
}

/// A reader of a queue that gives back what it does not take.
#[async_trait]
pub trait Browse: Send {
    /// The next message, in the order of the queue; `None` at its end.
    ///
    /// # Errors
    /// When the channel broke.
    async fn next(&mut self) -> Result<Option<Delivery>, BrokerError>;

    /// Gives back, in one step and in their old order, all that was read and not settled.
    ///
    /// # Errors
    /// When the channel broke: the broker gives them back itself.
    async fn give_back(self: Box<Self>) -> Result<(), BrokerError>;
}
