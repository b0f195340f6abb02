//! One publish within a deadline, and what is known of it when it did not succeed.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    broker::{Broker, Health, Outgoing, PublishError},
    protocol::NodeName,
};

/// The first pause between two tries; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The broker is to be noticed soon after it is back.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why a message was not confirmed. Whatever it is, the same message may be published again: an agent does not do one task
/// twice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unpublished {
    /// No queue takes messages for the node.
    #[error("node {node} is not enrolled: start its agent, or run haul topology apply --node {node}")]
    NotEnrolled {
        /// The node.
        node: NodeName,
    },
    /// The broker was not there; nothing was sent, and nothing of it will come later.
    #[error("not sent to {node} within {within:?}: {reason}; publish it again when the broker is back")]
    NotSent {
        /// The node.
        node: NodeName,
        /// The deadline.
        within: Duration,
        /// What happened.
        reason: String,
    },
    /// It was sent, and no confirm came: the node may get it, or not.
    #[error(
        "not confirmed for {node} within {within:?}: {reason}; it may have arrived: publish it again with the same task_id"
    )]
    InDoubt {
        /// The node.
        node: NodeName,
        /// The deadline.
        within: Duration,
        /// What happened.
        reason: String,
    },
    /// The node's queue refuses messages.
    #[error(
        "the queue of {node} took nothing within {within:?}: it is full, or has no leader; see haul topology doctor"
    )]
    Refused {
        /// The node.
        node: NodeName,
        /// The deadline.
        within: Duration,
    },
    /// The exchange is not there, or this user may not write to it.
    #[error("{reason}: run haul topology apply, or give this user the permission")]
    Forbidden {
        /// The broker's words.
        reason: String,
    },
}

impl Unpublished {
    /// Whether the node may get the message all the same.
    #[must_use]
    pub fn may_have_arrived(&self) -> bool {
        matches!(self, Self::InDoubt { .. })
    }
}

/// Publishes, again and again where that may help, until the broker has it or the deadline is over.
pub(super) async fn publish(
    broker: &dyn Broker,
    node: &NodeName,
    outgoing: &Outgoing,
    within: Duration,
) -> Result<(), Unpublished> {
    let end = Instant::now() + within;
    let mut pause = FIRST_PAUSE;
    let mut doubt = false;
    loop {
        let mut health = broker.health();
        let away = *health.borrow_and_update() == Health::Down;
        let published = timeout_at(end, broker.publish(outgoing.clone())).await;
        // A link that was down and has not changed has carried nothing.
        let untouched = away && !health.has_changed().unwrap_or(true);
        let (reason, refused) = match published {
            Ok(Ok(())) => return Ok(()),
            // If an earlier try arrived after all, it was in a queue that is no more.
            Ok(Err(PublishError::Unroutable { .. })) => return Err(Unpublished::NotEnrolled { node: node.clone() }),
            Ok(Err(error @ PublishError::Forbidden { .. })) if !doubt => {
                return Err(Unpublished::Forbidden { reason: error.to_string() });
            }
            Ok(Err(error @ PublishError::Refused { .. })) => (error.to_string(), true),
            Ok(Err(error)) => {
                doubt |= !untouched;
                (error.to_string(), false)
            }
            Err(_) if untouched => ("the broker cannot be reached".to_owned(), false),
            Err(_) => {
                doubt = true;
                ("no answer".to_owned(), false)
            }
        };
        if Instant::now() + pause >= end {
            let node = node.clone();
            return Err(match (doubt, refused) {
                (true, _) => Unpublished::InDoubt { node, within, reason },
                (false, true) => Unpublished::Refused { node, within },
                (false, false) => Unpublished::NotSent { node, within, reason },
            });
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
