//! One publish on its way to a lane.

use std::hash::{DefaultHasher, Hash, Hasher};

use lapin::message::BasicReturnMessage;
use tokio::sync::oneshot;

use super::convert;
use crate::broker::{Outgoing, PublishError};

/// A publish and who waits for it.
pub(super) struct Request {
    pub(super) outgoing: Outgoing,
    pub(super) reply: oneshot::Sender<Result<(), PublishError>>,
}

impl Request {
    /// Whether nobody waits for it any more.
    pub(super) fn abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    /// Whether a returned message is this one.
    pub(super) fn is(&self, returned: &BasicReturnMessage) -> bool {
        let id = returned.properties.message_id();
        self.outgoing.exchange == returned.exchange.as_str()
            && self.outgoing.routing_key == returned.routing_key.as_str()
            && self.outgoing.message.message_id.as_deref().map(convert::cut) == *id
    }

    /// What a return tells of it: returns cannot tell two of the same face apart.
    pub(super) fn face(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let outgoing = &self.outgoing;
        (&outgoing.message.message_id, &outgoing.exchange, &outgoing.routing_key).hash(&mut hasher);
        hasher.finish()
    }

    /// Tells who waits.
    pub(super) fn answer(self, verdict: Result<(), PublishError>) {
        // Nobody waits for it any more: the time was up.
        let _ = self.reply.send(verdict);
    }

    /// Tells who waits that it may not be published, and why.
    pub(super) fn forbidden(self, reason: &str) {
        let exchange = self.outgoing.exchange.clone();
        self.answer(Err(PublishError::Forbidden { exchange, reason: reason.to_owned() }));
    }
}
