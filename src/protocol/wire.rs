//! What a message is made of: the body, the properties we use, and our headers.
//!
//! Both broker backends speak [`Message`]; the journal keeps what is owed as one. A copy of a task (a retry, a dead
//! letter, a forwarded one) is built from an allow-list here, so that a hostile property never travels on.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ControlMessage, Event, Kind, NodeName, ProjectId, Round, Task, TaskId, TaskMessage};
use crate::failure::Failure;

/// The only content type of the contract.
pub const CONTENT_TYPE: &str = "application/json";
/// The largest body that an agent reads, in bytes: a task is a few hundred.
pub const LARGEST_BODY: usize = 64 * 1024;
/// All of our headers together, in bytes; above it a copy drops history and text.
pub const LARGEST_HEADERS: usize = 8 * 1024;
/// Entries kept in [`header::HISTORY`].
pub const LONGEST_HISTORY: usize = 10;

/// Names of headers.
pub mod header {
    /// W3C trace context, carried from master to agent to event.
    pub const TRACEPARENT: &str = "traceparent";
    /// Replays so far.
    pub const ROUND: &str = "x-haul-round";
    /// The attempt that this copy asks for, from 1.
    pub const ATTEMPT: &str = "x-haul-attempt";
    /// Order of first arrival, in microseconds; fixed at first admission.
    pub const ARRIVED: &str = "x-haul-arrived";
    /// Milliseconds since the epoch before which a copy hops again.
    pub const NOT_BEFORE: &str = "x-haul-not-before";
    /// Milliseconds since the epoch when the task was first deferred.
    pub const DEFERRED: &str = "x-haul-deferred";
    /// The node whose task it is.
    pub const NODE: &str = "x-haul-node";
    /// Class of the failure, on dead letters.
    pub const ERROR_CLASS: &str = "x-haul-error-class";
    /// Sentence of the failure, on dead letters.
    pub const ERROR: &str = "x-haul-error";
    /// Attempts charged, on dead letters.
    pub const ATTEMPTS: &str = "x-haul-attempts";
    /// The last failures, one a line, on dead letters and retries.
    pub const HISTORY: &str = "x-haul-history";
    /// When it was dead-lettered, on dead letters.
    pub const DEAD_AT: &str = "x-haul-dead-at";
    /// The task's kind, on dead letters: for filters and for the console.
    pub const KIND: &str = "x-haul-kind";
    /// The task's project, on dead letters: for filters and for the console.
    pub const PROJECT: &str = "x-haul-project";
    /// Written by the broker when it dead-letters by itself.
    pub const DEATH: &str = "x-death";
    /// Prefix of all of ours.
    pub const OURS: &str = "x-haul-";
}

/// A header's value, as far as we understand it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HeaderValue {
    /// A boolean.
    Bool(bool),
    /// Any integer that fits.
    Int(i64),
    /// Any UTF-8 string.
    Text(String),
    /// An array.
    List(Vec<HeaderValue>),
    /// A table.
    Table(BTreeMap<String, HeaderValue>),
    /// Something else, of which we keep nothing.
    Other,
}

/// Headers by name.
pub type Headers = BTreeMap<String, HeaderValue>;

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

impl HeaderValue {
    /// The text, if it is one.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The number, if it is one, or text that is one (a master in another language may send either).
    #[must_use]
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(int) => Some(*int),
            Self::Text(text) => text.parse().ok(),
            _ => None,
        }
    }

    fn weight(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            _ => 8,
        }
    }
}

impl From<&str> for HeaderValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for HeaderValue {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for HeaderValue {
    fn from(int: i64) -> Self {
        Self::Int(int)
    }
}

impl fmt::Display for HeaderValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Text(value) => f.write_str(value),
            Self::List(values) => f.debug_list().entries(values).finish(),
            Self::Table(values) => f.debug_map().entries(values).finish(),
            Self::Other => f.write_str("?"),
        }
    }
}

/// What our headers say of a copy. Hostile values (negative, huge, of another type) read as absent or are clamped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyHeaders {
    /// Replays so far.
    pub round: Round,
    /// The attempt asked for; at least 1.
    pub attempt: u32,
    /// Order of first arrival, in microseconds.
    pub arrived: Option<i64>,
    /// Not before this moment.
    pub not_before: Option<Timestamp>,
    /// When it was first deferred.
    pub deferred_since: Option<Timestamp>,
    /// Whose task it is.
    pub node: Option<NodeName>,
    /// Failures so far, the oldest first.
    pub history: Vec<String>,
}

impl CopyHeaders {
    /// The highest round or attempt that is believed; a header above it is clamped.
    pub const HIGHEST: u32 = 1_000_000;

    /// Reads the headers of a delivery.
    #[must_use]
    pub fn read(headers: &Headers) -> Self {
        let int = |name: &str| headers.get(name).and_then(HeaderValue::as_int).filter(|&int| int >= 0);
        let count = |name: &str| int(name).map(|int| u32::try_from(int).unwrap_or(u32::MAX).min(Self::HIGHEST));
        let moment = |name: &str| int(name).and_then(|ms| Timestamp::from_millisecond(ms).ok());
        Self {
            round: count(header::ROUND).unwrap_or(0),
            attempt: count(header::ATTEMPT).unwrap_or(1).max(1),
            arrived: int(header::ARRIVED).filter(|&us| us > 0),
            not_before: moment(header::NOT_BEFORE),
            deferred_since: moment(header::DEFERRED),
            node: owner_node(headers),
            history: headers
                .get(header::HISTORY)
                .and_then(HeaderValue::as_text)
                .map(|text| text.lines().take(LONGEST_HISTORY).map(str::to_owned).collect())
                .unwrap_or_default(),
        }
    }
}

/// Whose task it is: our header, else the first routing key that the broker noted when it dead-lettered it.
fn owner_node(headers: &Headers) -> Option<NodeName> {
    if let Some(node) = headers.get(header::NODE).and_then(HeaderValue::as_text) {
        return NodeName::new(node).ok();
    }
    let Some(HeaderValue::List(deaths)) = headers.get(header::DEATH) else { return None };
    let Some(HeaderValue::Table(first)) = deaths.last() else { return None };
    let Some(HeaderValue::List(keys)) = first.get("routing-keys") else { return None };
    NodeName::new(keys.first()?.as_text()?).ok()
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
        let short = |text: &Option<String>| text.clone().filter(|text| text.len() <= 256);
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

/// Why a delivery is no task of ours, and as much of its identity as could be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Undecodable {
    /// Class `invalid`, with the reason.
    pub failure: Failure,
    /// Enough to report it with an event.
    pub identity: Option<Identity>,
}

/// What an event needs to know of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The task.
    pub task_id: TaskId,
    /// Its kind.
    pub kind: Kind,
    /// Its project.
    pub project_id: ProjectId,
    /// Its generation.
    pub generation: Option<u64>,
}

impl From<&Task> for Identity {
    fn from(task: &Task) -> Self {
        Self { task_id: task.id.clone(), kind: task.kind(), project_id: task.project, generation: task.generation }
    }
}

/// Reads a task from a delivered message.
///
/// # Errors
/// [`Undecodable`] with class `invalid`: not JSON, not UTF-8, too large, another content type, wrong types,
/// duplicate fields, an unknown kind, a higher version, or a field that is refused.
pub fn decode_task(message: &Message) -> Result<Task, Undecodable> {
    let anonymous = |failure| Undecodable { failure, identity: None };
    if message.body.len() > LARGEST_BODY {
        let size = message.body.len();
        return Err(anonymous(Failure::invalid(format!("the body has {size} bytes, more than {LARGEST_BODY}"))));
    }
    let known = |failure| Undecodable { failure, identity: identity(&message.body) };
    if let Some(content_type) = message.content_type.as_deref()
        && !is_json(content_type)
    {
        return Err(known(Failure::invalid(format!(
            "the content type is {}, not {CONTENT_TYPE}",
            super::names::quoted(content_type)
        ))));
    }
    let version = serde_json::from_slice::<VersionOnly>(&message.body).ok().and_then(|only| only.v);
    let parsed: Result<TaskMessage, _> = serde_json::from_slice(&message.body);
    match parsed {
        Ok(task) => Task::try_from(task).map_err(known),
        // A later version may have changed anything: say that it is later rather than what is odd about it.
        Err(_) if version.is_some_and(|v| v > u64::from(super::VERSION)) => Err(known(Failure::invalid(format!(
            "the task is of version {}, this agent speaks version {}",
            version.unwrap_or_default(),
            super::VERSION
        )))),
        Err(error) => Err(known(Failure::invalid(format!(
            "the body is not a task: {}",
            super::task::printable(&error.to_string())
        )))),
    }
}

/// Reads a control message from a delivered message.
///
/// # Errors
/// `invalid` with the reason.
pub fn decode_control(message: &Message) -> Result<ControlMessage, Failure> {
    if message.body.len() > LARGEST_BODY {
        return Err(Failure::invalid("the body of the command is too large"));
    }
    serde_json::from_slice(&message.body)
        .map_err(|error| Failure::invalid(format!("the body is not a command: {error}")))
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case(CONTENT_TYPE)
}

#[derive(Deserialize)]
struct VersionOnly {
    v: Option<u64>,
}

/// As much of a refused task's identity as can be read.
fn identity(body: &[u8]) -> Option<Identity> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    Some(Identity {
        task_id: TaskId::new(value.get("task_id")?.as_str()?).ok()?,
        kind: serde_json::from_value(value.get("kind")?.clone()).ok()?,
        project_id: value.get("project_id")?.as_i64()?,
        generation: value.get("generation").and_then(serde_json::Value::as_u64),
    })
}
