//! A decoded delivery: step 2 of a message's path.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::line::{Line, Lines};
use crate::{
    journal::{Key, Sighting},
    protocol::{
        NodeName, Place, Task,
        wire::{self, CopyHeaders, Identity, Message, Undecodable},
    },
};

/// A copy that is overdue by more than this did not wait for what its task was deferred for.
const UNTRIED: SignedDuration = SignedDuration::from_mins(10);

/// A task that arrived, with the message it arrived in.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) key: Key,
    pub(super) digest: String,
    pub(super) task: Task,
    pub(super) identity: Identity,
    pub(super) headers: CopyHeaders,
    pub(super) message: Message,
    /// Its place among the deliveries of its project, until it is queued.
    pub(super) line: Line,
    /// Triggered when the master cancels the task.
    pub(super) cancel: CancellationToken,
}

impl Arrival {
    /// Reads a message that was delivered at `now`, and takes its place in the line of its project.
    pub(super) fn decode(message: &Message, now: Timestamp, lines: &Arc<Lines>) -> Result<Self, Undecodable> {
        let task = wire::decode_task(message)?;
        let mut headers = CopyHeaders::read(&message.headers);
        headers.deferred_since = headers.deferred_since.map(|since| tried_since(since, headers.not_before, now));
        Ok(Self {
            key: Key { task_id: task.id.clone(), round: headers.round },
            digest: digest(message),
            identity: Identity::from(&task),
            line: lines.join(task.project),
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

    /// What the journal needs to know of it; no copy is put off by more than `longest_wait`.
    pub(super) fn sighting(&self, mark: Option<Place>, boot: &str, now: Timestamp, longest_wait: Duration) -> Sighting {
        // A moment that is further away than any retry of ours would park the task for as long as somebody likes; one that
        // is further away than what was left of its wait is by a clock that was put back since.
        let longest = self.headers.left.map_or(longest_wait, |left| left.min(longest_wait));
        let latest = SignedDuration::try_from(longest).ok().and_then(|wait| now.saturating_add(wait).ok());
        Sighting {
            round: self.key.round,
            digest: self.digest.clone(),
            kind: self.task.kind(),
            project: self.task.project,
            generation: self.task.generation,
            arrived: self.headers.arrived,
            next_arrival: 0,
            attempt: self.headers.attempt,
            not_before: self.headers.not_before.map(|due| latest.map_or(due, |latest| due.min(latest))),
            not_after: self.task.not_after,
            mark,
            boot: boot.to_owned(),
            now,
        }
    }
}

/// Since when a task is deferred, without the time in which nobody tried it: an agent that was away, a queue that was
/// long, a clock that was put forward. One that was put back makes it begin now.
fn tried_since(since: Timestamp, due: Option<Timestamp>, now: Timestamp) -> Timestamp {
    let idle = due.map_or(SignedDuration::ZERO, |due| now.duration_since(due));
    let tried = if idle > UNTRIED { since.saturating_add(idle).unwrap_or(now) } else { since };
    tried.min(now)
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
            let arrival = Arrival::decode(&message, now, &Arc::default()).unwrap();
            assert_eq!(arrival.sighting(None, "b", now, hour).not_before, Some(believed));
        }
    }

    #[test]
    fn a_copy_is_not_put_off_for_longer_than_what_was_left_of_its_wait() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let mut message = Message {
            body: r#"{"v": 1, "task_id": "t", "kind": "delete", "project_id": 1}"#.into(),
            ..Message::default()
        };
        message.set(header::NOT_BEFORE, (now + SignedDuration::from_hours(72)).as_millisecond());
        message.set(header::LEFT, 4000);
        let arrival = Arrival::decode(&message, now, &Arc::default()).unwrap();
        let due = arrival.sighting(None, "b", now, Duration::from_hours(24)).not_before;
        assert_eq!(due, Some(now + SignedDuration::from_secs(4)));
    }

    #[test]
    fn a_task_is_deferred_only_while_somebody_tries_it() {
        let at = |minutes: i64| Timestamp::from_second(1_800_000_000 + 60 * minutes).unwrap();
        let cases = [
            // Deferred since, due, now, counted since.
            (0, Some(30), 31, 0),
            (0, None, 31, 0),
            (0, Some(30), 30 + 3000, 3000),
            (0, Some(30), -5000, -5000),
            (9_000_000, Some(30), 31, 31),
        ];
        for (since, due, now, counted) in cases {
            assert_eq!(tried_since(at(since), due.map(at), at(now)), at(counted), "{since} {due:?} {now}");
        }
    }
}
