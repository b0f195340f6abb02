//! Copies of a task that travel on: the next attempt, the dead letter, the forwarded one. Pure.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::{
    failure::Failure,
    protocol::{
        NodeName, Place,
        wire::{CopyHeaders, Identity, LONGEST_HISTORY, Message, header, truncate},
    },
};

/// The longest line of history, in bytes.
const LONGEST_LINE: usize = 300;

/// What a copy says of its task.
#[derive(Clone, Debug)]
pub(super) struct CopyOf<'a> {
    /// The delivered message.
    pub(super) message: &'a Message,
    /// What its headers said.
    pub(super) headers: &'a CopyHeaders,
    /// This node.
    pub(super) node: &'a NodeName,
    /// Now.
    pub(super) now: Timestamp,
}

/// When and why the next attempt is due.
#[derive(Clone, Debug)]
pub(super) struct NextAttempt<'a> {
    /// The attempt that the copy asks for.
    pub(super) attempt: u32,
    /// The task's place.
    pub(super) place: Place,
    /// How long to wait.
    pub(super) wait: Duration,
    /// What is left of that wait when the copy comes back from where it is held.
    pub(super) left: Duration,
    /// Why, if an attempt failed.
    pub(super) failure: Option<&'a Failure>,
    /// Since when it is deferred, if it is.
    pub(super) deferred_since: Option<Timestamp>,
}

impl CopyOf<'_> {
    /// The copy that asks for the next attempt, and when it is due.
    pub(super) fn next_attempt(&self, next: &NextAttempt<'_>) -> (Message, Timestamp) {
        let wait = SignedDuration::try_from(next.wait).unwrap_or(SignedDuration::from_hours(24));
        let due = self.now.saturating_add(wait).unwrap_or(Timestamp::MAX);
        let mut copy = self.base(next.place);
        copy.priority = self.message.priority;
        copy.set(header::ATTEMPT, i64::from(next.attempt));
        copy.set(header::NOT_BEFORE, due.as_millisecond());
        copy.set(header::LEFT, i64::try_from(next.left.as_millis()).unwrap_or(i64::MAX));
        match next.deferred_since {
            Some(since) => copy.set(header::DEFERRED, since.as_millisecond()),
            None => drop(copy.headers.remove(header::DEFERRED)),
        }
        if let Some(failure) = next.failure {
            copy.set(header::HISTORY, self.history(failure));
        }
        copy.limit_headers();
        (copy, due)
    }

    /// The copy for the dead-letter queue, ready to be replayed as it is: the attempt is reset and the round is one
    /// higher, so that a replay runs while a duplicate is answered from the journal.
    pub(super) fn dead_letter(
        &self,
        identity: Option<&Identity>,
        failure: &Failure,
        attempts: u32,
        place: Option<Place>,
    ) -> Message {
        let mut copy = match place {
            Some(place) => self.base(place),
            None => self.message.copy(),
        };
        let mut error = failure.message.clone();
        truncate(&mut error, 1024);
        copy.headers.remove(header::ATTEMPT);
        copy.headers.remove(header::DEFERRED);
        copy.set(header::NODE, self.node.as_str());
        copy.set(header::ROUND, i64::from(self.headers.round.saturating_add(1)));
        copy.set(header::ERROR_CLASS, failure.class.as_str());
        copy.set(header::ERROR, error);
        copy.set(header::ATTEMPTS, i64::from(attempts));
        copy.set(header::DEAD_AT, self.now.as_millisecond());
        copy.set(header::HISTORY, self.history(failure));
        if let Some(identity) = identity {
            copy.set(header::KIND, identity.kind.as_str());
            copy.set(header::PROJECT, identity.project_id);
        }
        copy.limit_headers();
        copy
    }

    /// The copy that goes to the node it belongs to.
    pub(super) fn forwarded(&self) -> Message {
        let mut copy = self.message.copy();
        copy.priority = self.message.priority;
        copy
    }

    fn base(&self, place: Place) -> Message {
        let mut copy = self.message.copy();
        copy.set(header::NODE, self.node.as_str());
        copy.set(header::ARRIVED, place.arrived);
        copy
    }

    /// The failures so far and this one, one a line, the newest last.
    fn history(&self, failure: &Failure) -> String {
        let mut line = format!(
            "{} round {} attempt {}: {failure}",
            self.now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            self.headers.round,
            self.headers.attempt
        );
        truncate(&mut line, LONGEST_LINE);
        let line = line.replace('\n', " ");
        let kept = self.headers.history.len().saturating_sub(LONGEST_HISTORY - 1);
        let mut lines: Vec<&str> = self.headers.history.iter().skip(kept).map(String::as_str).collect();
        lines.push(&line);
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        failure::ErrorClass,
        protocol::wire::{HeaderValue, LARGEST_HEADERS},
    };

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn delivered() -> Message {
        let mut message = Message { body: "{}".into(), priority: Some(9), ..Message::default() };
        message.expiration_ms = Some(1);
        message.set("x-death", "forged");
        message.set("CC", "elsewhere");
        message.set("x-haul-unknown", "x");
        message.set(header::ATTEMPT, 3);
        message
    }

    fn with<A>(message: &Message, check: impl FnOnce(CopyOf<'_>) -> A) -> A {
        let headers = CopyHeaders::read(&message.headers);
        let node = NodeName::new("n1").unwrap();
        check(CopyOf { message, headers: &headers, node: &node, now: now() })
    }

    fn next(failure: &Failure) -> NextAttempt<'_> {
        NextAttempt {
            attempt: 4,
            place: Place { generation: None, arrived: 77 },
            wait: Duration::from_secs(5),
            left: Duration::ZERO,
            failure: Some(failure),
            deferred_since: None,
        }
    }

    #[test]
    fn a_retry_carries_what_is_ours_and_nothing_else() {
        let message = delivered();
        let failure = Failure::new(ErrorClass::Network, "no route");
        let (copy, due) = with(&message, |of| of.next_attempt(&next(&failure)));
        let names: Vec<_> = copy.headers.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            ["x-haul-arrived", "x-haul-attempt", "x-haul-history", "x-haul-left", "x-haul-node", "x-haul-not-before"]
        );
        assert_eq!((copy.priority, copy.expiration_ms), (Some(9), None));
        assert_eq!(due, now() + SignedDuration::from_secs(5));
        assert_eq!(copy.headers[header::ATTEMPT], HeaderValue::Int(4));
    }

    #[test]
    fn a_dead_letter_is_ready_to_be_replayed() {
        let mut message = delivered();
        message.set(header::ROUND, 2);
        let failure = Failure::new(ErrorClass::Auth, "refused");
        let copy = with(&message, |of| of.dead_letter(None, &failure, 3, None));
        let read = CopyHeaders::read(&copy.headers);
        assert_eq!((read.round, read.attempt), (3, 1));
        assert_eq!(read.node.unwrap().as_str(), "n1");
        assert_eq!(copy.headers[header::ERROR_CLASS], HeaderValue::from("auth"));
        assert_eq!(copy.priority, None, "returned messages lose their priority");
    }

    #[test]
    fn history_keeps_the_last_ten_lines_and_the_headers_stay_small() {
        let mut message = delivered();
        let failure = Failure::new(ErrorClass::Network, "x".repeat(5000));
        for _ in 0..25 {
            message = with(&message, |of| of.next_attempt(&next(&failure))).0;
        }
        let read = CopyHeaders::read(&message.headers);
        assert!(read.history.len() <= LONGEST_HISTORY);
        let weight: usize = message.headers.iter().map(|(name, value)| name.len() + value.to_string().len()).sum();
        assert!(weight <= LARGEST_HEADERS);
    }
}
