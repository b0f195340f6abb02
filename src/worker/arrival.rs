//! A decoded delivery: step 2 of a message's path.

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::{
    journal::{Key, Sighting},
    protocol::{
        NodeName, Place, Task,
        wire::{self, CopyHeaders, Identity, Message, Undecodable},
    },
};

/// A task that arrived, with the message it arrived in.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) key: Key,
    pub(super) digest: String,
    pub(super) task: Task,
    pub(super) identity: Identity,
    pub(super) headers: CopyHeaders,
    pub(super) message: Message,
    /// Triggered when the master cancels the task.
    pub(super) cancel: CancellationToken,
}

impl Arrival {
    /// Reads a delivered message.
    pub(super) fn decode(message: &Message) -> Result<Self, Undecodable> {
        let task = wire::decode_task(message)?;
        let headers = CopyHeaders::read(&message.headers);
        Ok(Self {
            key: Key { task_id: task.id.clone(), round: headers.round },
            digest: digest(message),
            identity: Identity::from(&task),
            task,
            headers,
            message: message.clone(),
            cancel: CancellationToken::new(),
        })
    }

    /// The node that the task belongs to, if it is another one.
    pub(super) fn belongs_elsewhere(&self, node: &NodeName) -> Option<&NodeName> {
        self.headers.node.as_ref().filter(|owner| *owner != node)
    }

    /// What the journal needs to know of it.
    pub(super) fn sighting(&self, mark: Option<Place>, boot: &str, now: jiff::Timestamp) -> Sighting {
        Sighting {
            round: self.key.round,
            digest: self.digest.clone(),
            kind: self.task.kind(),
            project: self.task.project,
            generation: self.task.generation,
            // A place in the future would make everything that comes until then stale.
            arrived: self.headers.arrived.map(|arrived| arrived.min(now.as_microsecond())),
            next_arrival: 0,
            attempt: self.headers.attempt,
            not_before: self.headers.not_before,
            not_after: self.task.not_after,
            mark,
            boot: boot.to_owned(),
            now,
        }
    }
}

/// SHA-256 of a message's body, hexadecimal.
pub(super) fn digest(message: &Message) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(&message.body) {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
