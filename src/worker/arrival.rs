//! A decoded delivery: step 2 of a message's path.

use std::time::Duration;

use jiff::SignedDuration;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::{
    journal::{Key, Sighting},
    protocol::{
        Kind, NodeName, Place, Priority, ProjectId, Task,
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

    /// How it waits for its turn.
    pub(super) fn waiting(&self) -> (ProjectId, Kind, Priority) {
        (self.task.project, self.task.kind(), self.task.priority)
    }

    /// What the journal needs to know of it; no copy is put off by more than `longest_wait`.
    pub(super) fn sighting(
        &self,
        mark: Option<Place>,
        boot: &str,
        now: jiff::Timestamp,
        longest_wait: Duration,
    ) -> Sighting {
        let latest = SignedDuration::try_from(longest_wait).ok().and_then(|wait| now.saturating_add(wait).ok());
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
            // A moment that is further away than any retry of ours would park the task for as long as somebody likes.
            not_before: self.headers.not_before.map(|due| latest.map_or(due, |latest| due.min(latest))),
            not_after: self.task.not_after,
            mark,
            boot: boot.to_owned(),
            now,
        }
    }
}

/// SHA-256 of a message's body, hexadecimal.
pub(super) fn digest(message: &Message) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let nibbles = Sha256::digest(&message.body).into_iter().flat_map(|byte| [byte >> 4, byte & 15]);
    nibbles.map(|nibble| char::from(DIGITS[usize::from(nibble)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::wire::header;

    #[test]
    fn a_copy_is_not_put_off_for_longer_than_a_retry_of_ours() {
        let now = jiff::Timestamp::from_second(1_800_000_000).unwrap();
        let hour = Duration::from_hours(1);
        let year_9999 = "9999-01-01T00:00:00Z".parse::<jiff::Timestamp>().unwrap().as_millisecond();
        let soon = now + SignedDuration::from_secs(5);
        for (asked, believed) in [(year_9999, now + hour), (soon.as_millisecond(), soon)] {
            let body = r#"{"v": 1, "task_id": "t", "kind": "delete", "project_id": 1}"#;
            let mut message = Message { body: body.into(), ..Message::default() };
            message.set(header::NOT_BEFORE, asked);
            let arrival = Arrival::decode(&message).unwrap();
            assert_eq!(arrival.sighting(None, "b", now, hour).not_before, Some(believed));
        }
    }
}
