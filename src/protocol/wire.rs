//! What a message is made of: the body, the properties we use, and our headers.
//!
//! Both broker backends speak [`Message`]; the journal keeps what is owed as one. A copy of a task (a retry, a dead
//! letter, a forwarded one) is built from an allow-list here, so that a hostile property never travels on.

pub mod header;

mod decode;
mod headers;
mod redact;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use self::{
    decode::{Identity, Undecodable, decode_control, decode_task},
    headers::{CopyHeaders, HeaderValue, Headers},
    redact::without_secrets,
};
use super::{ControlMessage, Event, TaskMessage};

/// The only content type of the contract.
pub const CONTENT_TYPE: &str = "application/json";
/// The largest body that an agent reads, in bytes: a task is a few hundred.
pub const LARGEST_BODY: usize = 64 * 1024;
/// All of our headers together, in bytes; above it a copy drops history and text.
pub const LARGEST_HEADERS: usize = 8 * 1024;
/// Entries kept in [`header::HISTORY`].
pub const LONGEST_HISTORY: usize = 10;

/// A message, without its route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The payload.
    #[serde(with = "body_text")]
    pub body: Bytes,
    /// `content_type`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// `message_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message_id: Option<String>,
    /// `type`: `task.<kind>`, `event.<status>`, `control.<command>`.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub type_: Option<String>,
    /// `timestamp`, in seconds since the epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
    /// `priority`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// `app_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_id: Option<String>,
    /// `expiration`, in milliseconds; only on transient events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiration_ms: Option<u64>,
    /// Not written to disk by the broker; only on transient events.
    #[serde(default)]
    pub transient: bool,
    /// Headers.
    #[serde(default)]
    pub headers: Headers,
}

/// A body is JSON nearly always; what is not UTF-8 is kept as numbers.
mod body_text {
    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Body {
        Text(String),
        Raw(Vec<u8>),
    }

    pub(super) fn serialize<S: Serializer>(body: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(body) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => Body::Raw(body.to_vec()).serialize(serializer),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        Ok(match Body::deserialize(deserializer)? {
            Body::Text(text) => Bytes::from(text),
            Body::Raw(raw) => Bytes::from(raw),
        })
    }
}

impl Message {
    /// A durable message of ours with a JSON body.
    ///
    /// # Panics
    /// Never: the types of the contract always serialise.
    #[must_use]
    pub fn json<T: Serialize>(body: &T, message_id: &str, type_: String, at: Timestamp) -> Self {
        Self {
            body: serde_json::to_vec(body).expect("the types of the contract serialise").into(),
            content_type: Some(CONTENT_TYPE.to_owned()),
            message_id: Some(message_id.to_owned()),
            type_: Some(type_),
            timestamp: u64::try_from(at.as_second()).ok(),
            app_id: Some("haul".to_owned()),
            ..Self::default()
        }
    }

    /// A task as a master publishes it.
    #[must_use]
    pub fn task(task: &TaskMessage, at: Timestamp) -> Self {
        let mut message = Self::json(task, task.task_id.as_str(), format!("task.{}", task.kind), at);
        message.priority = Some(task.priority.unwrap_or_default().amqp());
        message
    }

    /// An event as an agent publishes it.
    #[must_use]
    pub fn event(event: &Event, traceparent: Option<&str>) -> Self {
        let mut message = Self::json(event, &event.event_id, format!("event.{}", event.status), event.at);
        if let Some(trace) = traceparent {
            message.headers.insert(header::TRACEPARENT.to_owned(), trace.into());
        }
        message
    }

    /// A control message as a master publishes it.
    #[must_use]
    pub fn control(control: &ControlMessage, at: Timestamp) -> Self {
        let id = control.control_id.clone().unwrap_or_else(super::new_event_id);
        Self::json(control, &id, format!("control.{}", control.command.as_str()), at)
    }

    /// The trace context, if it is well-formed.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        let text = self.headers.get(header::TRACEPARENT)?.as_text()?;
        let fits = text.len() <= 128 && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        fits.then_some(text)
    }

    /// A copy of a delivered task that may travel on: body, identity and what is ours; nothing else.
    ///
    /// Never `user_id`, `expiration`, `CC`, `x-death`; headers of ours stay under [`LARGEST_HEADERS`].
    #[must_use]
    pub fn copy(&self) -> Self {
        // A short string of AMQP holds 255 bytes.
        let short = |text: &Option<String>| text.clone().filter(|text| text.len() <= 255);
        let mut headers = Headers::new();
        if let Some(trace) = self.traceparent() {
            headers.insert(header::TRACEPARENT.to_owned(), trace.into());
        }
        for name in [header::ROUND, header::ATTEMPT, header::ARRIVED, header::DEFERRED, header::NODE, header::HISTORY] {
            if let Some(value @ (HeaderValue::Int(_) | HeaderValue::Text(_))) = self.headers.get(name) {
                headers.insert(name.to_owned(), value.clone());
            }
        }
        let mut copy = Self {
            body: self.body.clone(),
            content_type: short(&self.content_type),
            message_id: short(&self.message_id),
            type_: short(&self.type_),
            timestamp: self.timestamp,
            headers,
            ..Self::default()
        };
        copy.limit_headers();
        copy
    }

    /// Sets a header.
    pub fn set(&mut self, name: &str, value: impl Into<HeaderValue>) {
        self.headers.insert(name.to_owned(), value.into());
    }

    /// Drops history, then shortens text, until all headers fit in [`LARGEST_HEADERS`].
    pub fn limit_headers(&mut self) {
        let weight = |headers: &Headers| headers.iter().map(|(name, value)| name.len() + value.weight()).sum::<usize>();
        if weight(&self.headers) > LARGEST_HEADERS {
            self.headers.remove(header::HISTORY);
        }
        for value in self.headers.values_mut() {
            if let HeaderValue::Text(text) = value {
                truncate(text, 1024);
            }
        }
        while weight(&self.headers) > LARGEST_HEADERS && self.headers.pop_last().is_some() {}
    }
}

/// Cuts `text` to at most `longest` bytes at a character boundary.
pub fn truncate(text: &mut String, longest: usize) {
    if text.len() > longest {
        let end = (0..=longest).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(body: impl Into<Bytes>) -> Message {
        Message { body: body.into(), content_type: Some(CONTENT_TYPE.to_owned()), ..Message::default() }
    }

    #[test]
    fn a_copy_takes_along_only_what_is_on_the_list() {
        let mut original = message("{\"v\":1}");
        original.expiration_ms = Some(1);
        original.transient = true;
        original.app_id = Some("stranger".to_owned());
        original.priority = Some(255);
        original.message_id = Some("m".repeat(256));
        original.type_ = Some("task.clone".to_owned());
        for name in ["CC", "BCC", "x-death", "x-first-death-queue", "x-delay", "x-haul-unknown", "x-haul-not-before"] {
            original.set(name, "x");
        }
        original.set(header::ROUND, 2);
        original.set(header::TRACEPARENT, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        original.headers.insert(header::ARRIVED.to_owned(), HeaderValue::List(vec![]));
        let copy = original.copy();
        assert_eq!(copy.headers.keys().collect::<Vec<_>>(), [header::TRACEPARENT, header::ROUND]);
        assert_eq!((copy.priority, copy.expiration_ms, copy.transient, copy.app_id), (None, None, false, None));
        assert_eq!((copy.message_id, copy.type_.as_deref()), (None, Some("task.clone")));
        assert_eq!(copy.body, original.body);
    }

    #[test]
    fn the_headers_of_a_copy_stay_small() {
        let mut original = message("{}");
        original.set(header::HISTORY, "h".repeat(128 * 1024));
        original.set(header::NODE, "\u{1F600}".repeat(64 * 1024));
        original.set(header::TRACEPARENT, "0".repeat(1024 * 1024));
        let copy = original.copy();
        let weight: usize = copy.headers.iter().map(|(name, value)| name.len() + value.weight()).sum();
        assert!(weight <= LARGEST_HEADERS, "{weight}");
        assert_eq!(copy.headers.keys().collect::<Vec<_>>(), [header::NODE]);
    }

    #[test]
    fn a_message_survives_the_journal_whatever_its_body_is() {
        for body in [&b"{\"v\":1}"[..], b"\xff\x00", b""] {
            let mut kept = message(body.to_vec());
            kept.set(header::ROUND, 1);
            let text = serde_json::to_string(&kept).unwrap();
            assert_eq!(serde_json::from_str::<Message>(&text).unwrap(), kept);
        }
    }
}
