//! One dead letter, as people and filters see it.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use crate::protocol::{
    NodeName, ProjectId, Round,
    wire::{CopyHeaders, HeaderValue, Headers, Message, header},
};

/// What stands where a letter has no error class: it was not one of our agents that gave it up.
pub const UNKNOWN: &str = "unknown";

/// A dead letter, read from headers first, since the body may be anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Letter {
    /// Its place in the queue, from 1.
    pub position: usize,
    /// The task's id.
    pub task_id: Option<String>,
    /// The round that a replay will be.
    pub round: Round,
    /// Whose task it is: where a replay goes.
    pub node: Option<NodeName>,
    /// The task's kind.
    pub kind: Option<String>,
    /// The task's project.
    pub project_id: Option<ProjectId>,
    /// Class of the failure, or [`UNKNOWN`].
    pub class: String,
    /// Attempts charged.
    pub attempts: Option<i64>,
    /// Sentence of the failure, or what the broker noted.
    pub error: String,
    /// The last failures, the oldest first.
    pub history: Vec<String>,
    /// When it was dead-lettered.
    pub dead_at: Option<Timestamp>,
    /// The task must not start after this moment.
    pub not_after: Option<Timestamp>,
}

impl Letter {
    /// Reads a letter; nothing in it is believed to be well-formed.
    #[must_use]
    pub fn read(message: &Message, position: usize) -> Self {
        let headers = &message.headers;
        let copy = CopyHeaders::read(headers);
        let body: Value = serde_json::from_slice(&message.body).unwrap_or(Value::Null);
        let text = |name: &str| headers.get(name).and_then(HeaderValue::as_text).map(str::to_owned);
        let field = |name: &str| body.get(name).and_then(Value::as_str).map(str::to_owned);
        let of_type = || message.type_.as_deref()?.strip_prefix("task.").map(str::to_owned);
        Self {
            position,
            task_id: message.message_id.clone().or_else(|| field("task_id")),
            round: copy.round,
            node: copy.node,
            kind: text(header::KIND).or_else(of_type).or_else(|| field("kind")),
            project_id: headers
                .get(header::PROJECT)
                .and_then(HeaderValue::as_int)
                .or_else(|| body.get("project_id").and_then(Value::as_i64)),
            class: text(header::ERROR_CLASS).unwrap_or_else(|| UNKNOWN.to_owned()),
            attempts: headers.get(header::ATTEMPTS).and_then(HeaderValue::as_int),
            error: text(header::ERROR).unwrap_or_else(|| noted(headers)),
            history: copy.history,
            dead_at: headers.get(header::DEAD_AT).and_then(moment),
            not_after: body.get("not_after").and_then(Value::as_str).and_then(|text| text.parse().ok()),
        }
    }

    /// How long it has been dead.
    #[must_use]
    pub fn age(&self, now: Timestamp) -> Option<std::time::Duration> {
        self.dead_at.map(|at| now.duration_since(at).try_into().unwrap_or_default())
    }

    /// Whether the task may not start any more.
    #[must_use]
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.not_after.is_some_and(|last| last <= now)
    }
}

/// A moment as text, or in seconds or milliseconds since the epoch.
fn moment(value: &HeaderValue) -> Option<Timestamp> {
    const SECONDS_END: i64 = 100_000_000_000;
    match value.as_int() {
        Some(number) if number.abs() < SECONDS_END => Timestamp::from_second(number).ok(),
        Some(number) => Timestamp::from_millisecond(number).ok(),
        None => value.as_text()?.parse().ok(),
    }
}

/// What the broker noted when it dead-lettered a message by itself.
fn noted(headers: &Headers) -> String {
    let Some(HeaderValue::List(deaths)) = headers.get(header::DEATH) else {
        return "it carries no reason: neither ours nor the broker's".to_owned();
    };
    let notes = deaths.iter().filter_map(|death| {
        let HeaderValue::Table(death) = death else { return None };
        let text = |name: &str| death.get(name).and_then(HeaderValue::as_text);
        let count = death.get("count").and_then(HeaderValue::as_int).unwrap_or(1);
        Some(format!("{} in {} ×{count}", text("reason")?, text("queue")?))
    });
    let notes: Vec<_> = notes.take(8).collect();
    format!("dead-lettered by the broker: {}", if notes.is_empty() { "no note".to_owned() } else { notes.join(", ") })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_letter_of_ours_reads_from_its_headers() {
        let mut message = Message { message_id: Some("t-1".to_owned()), ..Message::default() };
        message.set(header::ERROR_CLASS, "auth");
        message.set(header::ERROR, "the upstream refused the credential");
        message.set(header::ATTEMPTS, 3);
        message.set(header::ROUND, 2);
        message.set(header::NODE, "worker-001");
        message.set(header::KIND, "clone");
        message.set(header::PROJECT, 42);
        message.set(header::HISTORY, "1 network\n2 network\n3 auth");
        message.set(header::DEAD_AT, "2026-11-20T12:00:00Z");
        let letter = Letter::read(&message, 7);
        assert_eq!((letter.class.as_str(), letter.attempts, letter.round), ("auth", Some(3), 2));
        assert_eq!((letter.kind.as_deref(), letter.project_id), (Some("clone"), Some(42)));
        assert_eq!(letter.node.as_ref().map(NodeName::as_str), Some("worker-001"));
        assert_eq!(letter.history.len(), 3);
        let now: Timestamp = "2026-11-20T12:01:00Z".parse().unwrap();
        assert_eq!(letter.age(now), Some(std::time::Duration::from_mins(1)));
    }

    #[test]
    fn a_foreign_message_is_unknown_with_what_the_broker_noted() {
        let death = BTreeMap::from([
            ("reason".to_owned(), "rejected".into()),
            ("queue".to_owned(), "haul.node.a".into()),
            ("count".to_owned(), 2.into()),
            ("routing-keys".to_owned(), HeaderValue::List(vec!["a".into()])),
        ]);
        let mut message = Message { body: "not json".into(), ..Message::default() };
        message.headers.insert(header::DEATH.to_owned(), HeaderValue::List(vec![HeaderValue::Table(death)]));
        let letter = Letter::read(&message, 1);
        assert_eq!((letter.class.as_str(), letter.task_id.as_deref()), (UNKNOWN, None));
        assert_eq!(letter.error, "dead-lettered by the broker: rejected in haul.node.a ×2");
        assert_eq!(letter.node.map(|node| node.to_string()).as_deref(), Some("a"));
    }

    #[test]
    fn a_moment_reads_as_text_seconds_or_milliseconds() {
        let at: Timestamp = "2026-11-20T12:00:00Z".parse().unwrap();
        for value in [
            HeaderValue::from("2026-11-20T12:00:00Z"),
            at.as_second().into(),
            at.as_millisecond().into(),
            HeaderValue::from(at.as_millisecond().to_string()),
        ] {
            assert_eq!(moment(&value), Some(at), "{value:?}");
        }
        assert_eq!(moment(&HeaderValue::from("yesterday")), None);
    }
}
