//! What the management API tells of a virtual host, in our words.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::Value;

use crate::{broker::version::Version, protocol::wire::HeaderValue};

/// Everything that was asked of the management API at one moment.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    /// The broker's version.
    pub version: Option<Version>,
    /// Exchanges.
    pub exchanges: Vec<ExchangeView>,
    /// Queues.
    pub queues: Vec<QueueView>,
    /// Bindings.
    pub bindings: Vec<BindingView>,
    /// Consumers.
    pub consumers: Vec<ConsumerView>,
    /// Policies, or why they cannot be seen.
    pub policies: Told<Vec<PolicyView>>,
    /// Nodes of the broker, or why they cannot be seen.
    pub nodes: Told<Vec<NodeView>>,
    /// What users may do, or why that cannot be seen: only administrators may ask.
    pub permissions: Told<Vec<PermissionView>>,
    /// What users may do by routing key, or why that cannot be seen.
    pub topic_permissions: Told<Vec<TopicPermissionView>>,
}

/// An answer, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told<T> {
    /// The answer.
    Yes(T),
    /// Why there is none.
    No(String),
}

impl<T: Default> Default for Told<T> {
    fn default() -> Self {
        Self::Yes(T::default())
    }
}

/// An exchange.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ExchangeView {
    /// Its name.
    pub name: String,
    /// How it chooses queues: `direct`, `fanout`, `topic` or another.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it survives a restart.
    #[serde(default)]
    pub durable: bool,
    /// Whether clients may publish to it.
    #[serde(default)]
    pub internal: bool,
    /// Its arguments.
    #[serde(default, deserialize_with = "table")]
    pub arguments: BTreeMap<String, HeaderValue>,
}

/// A queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct QueueView {
    /// Its name.
    pub name: String,
    /// `classic`, `quorum` or `stream`.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Whether it survives a restart.
    #[serde(default)]
    pub durable: bool,
    /// Its arguments.
    #[serde(default, deserialize_with = "table")]
    pub arguments: BTreeMap<String, HeaderValue>,
    /// The policy in force; absent while the broker's statistics have not caught up with a new queue.
    #[serde(default, deserialize_with = "told")]
    pub policy: Option<Option<String>>,
    /// The operator policy in force.
    #[serde(default)]
    pub operator_policy: Option<String>,
    /// What policy and operator policy come to together.
    #[serde(default, rename = "effective_policy_definition", deserialize_with = "table")]
    pub effective: BTreeMap<String, HeaderValue>,
    /// `running`, or what else; absent while the statistics have not caught up.
    #[serde(default)]
    pub state: Option<String>,
}

/// A binding of a queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct BindingView {
    /// The exchange.
    pub source: String,
    /// The queue or exchange.
    pub destination: String,
    /// `queue` or `exchange`.
    #[serde(default)]
    pub destination_type: String,
    /// Routing key or pattern.
    #[serde(default)]
    pub routing_key: String,
    /// Its arguments; ours have none.
    #[serde(default, deserialize_with = "table")]
    pub arguments: BTreeMap<String, HeaderValue>,
}

/// A consumer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsumerView {
    /// The queue.
    pub queue: String,
    /// Its tag.
    pub tag: String,
    /// Its connection's name, as the broker's tools take it.
    pub connection: String,
    /// Whether it is the one that gets messages.
    pub active: bool,
}

/// A policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct PolicyView {
    /// Its name.
    pub name: String,
    /// Which queues or exchanges.
    pub pattern: String,
    /// What it sets.
    #[serde(default, deserialize_with = "table")]
    pub definition: BTreeMap<String, HeaderValue>,
    /// The highest one that matches is in force, alone.
    #[serde(default)]
    pub priority: i64,
    /// `queues`, `exchanges`, `all` or a kind of queue.
    #[serde(default, rename = "apply-to")]
    pub apply_to: String,
}

/// A node of the broker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Whether it runs.
    #[serde(default)]
    pub running: bool,
    /// Whether its memory alarm stops publishers.
    #[serde(default)]
    pub mem_alarm: bool,
    /// Whether its disk alarm stops publishers.
    #[serde(default)]
    pub disk_free_alarm: bool,
    /// Nodes that it cannot see.
    #[serde(default)]
    pub partitions: Vec<String>,
}

/// What a user may do in the virtual host, as three patterns of names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct PermissionView {
    /// The user.
    pub user: String,
    /// What it may declare and delete.
    pub configure: String,
    /// What it may publish to, and bind.
    pub write: String,
    /// What it may consume, and bind to.
    pub read: String,
}

/// What a user may do with a topic exchange, as patterns of routing keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct TopicPermissionView {
    /// The user.
    pub user: String,
    /// The exchange.
    pub exchange: String,
    /// Keys that it may publish with.
    pub write: String,
    /// Keys that it may bind with.
    pub read: String,
}

/// Messages of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Load {
    /// All of them: ready, in hands, and on their way to a dead-letter exchange.
    pub messages: u64,
}

/// How often a queue delivers one message before it drops or dead-letters it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryLimit {
    /// As often as it takes.
    None,
    /// This often.
    Of(i64),
    /// The broker does not say.
    Unknown,
}

impl QueueView {
    /// The delivery limit in force, by the rules of the broker's version.
    ///
    /// Since 4.0 the limit is 20 where nothing is set and a negative value lifts it; before, nothing set means none
    /// and a negative argument drops a message on its first return.
    #[must_use]
    pub fn delivery_limit(&self, version: Option<Version>) -> DeliveryLimit {
        let argument = self.arguments.get("x-delivery-limit").and_then(HeaderValue::as_int);
        let policy = self.effective.get("delivery-limit").and_then(HeaderValue::as_int);
        let modern = version.map(Version::limits_deliveries);
        let strictest = match (argument, policy) {
            (Some(a), Some(b)) if modern == Some(true) && (a < 0 || b < 0) => Some(a.max(b)),
            (Some(a), Some(b)) => Some(a.min(b)),
            (one, other) => one.or(other),
        };
        match (strictest, modern) {
            (Some(limit), Some(true)) if limit < 0 => DeliveryLimit::None,
            (Some(limit), Some(false)) => DeliveryLimit::Of(limit.max(0)),
            (Some(limit), _) if limit >= 0 => DeliveryLimit::Of(limit),
            (None, Some(false)) => DeliveryLimit::None,
            // The default is in force only if it is known that no policy is.
            (None, Some(true)) if self.policy.is_some() => DeliveryLimit::Of(20),
            _ => DeliveryLimit::Unknown,
        }
    }
}

impl ConsumerView {
    pub(super) fn read(value: &Value) -> Self {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
        Self {
            queue: text(value.pointer("/queue/name")),
            tag: text(value.get("consumer_tag")),
            connection: text(value.pointer("/channel_details/connection_name")),
            active: value.get("active").and_then(Value::as_bool).unwrap_or(true),
        }
    }
}

/// Reads a list, leaving out what does not have the form it should.
pub(super) fn list<T: DeserializeOwned>(value: Value) -> Vec<T> {
    let Value::Array(items) = value else { return Vec::new() };
    items.into_iter().filter_map(|item| serde_json::from_value(item).ok()).collect()
}

/// The API writes an empty table as `{}`, `[]`, `null` or `""`.
fn table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, HeaderValue>, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::Object(map) => map.iter().map(|(name, value)| (name.clone(), header(value))).collect(),
        _ => BTreeMap::new(),
    })
}

/// Tells "no policy" from "not said".
#[expect(clippy::option_option, reason = "absent, null and a name are three answers of the API")]
fn told<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Ok(Some(Option::<String>::deserialize(deserializer)?.filter(|name| !name.is_empty())))
}

fn header(value: &Value) -> HeaderValue {
    match value {
        Value::Bool(value) => HeaderValue::Bool(*value),
        Value::Number(number) => number.as_i64().map_or(HeaderValue::Other, HeaderValue::Int),
        Value::String(text) => HeaderValue::Text(text.clone()),
        Value::Array(items) => HeaderValue::List(items.iter().map(header).collect()),
        Value::Object(map) => HeaderValue::Table(map.iter().map(|(name, v)| (name.clone(), header(v))).collect()),
        Value::Null => HeaderValue::Other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_queue_that_the_statistics_do_not_know_yet_says_nothing_of_its_policy() {
        let fresh: QueueView = serde_json::from_value(json!({"name": "q", "arguments": []})).unwrap();
        assert_eq!(fresh.policy, None);
        let known: QueueView =
            serde_json::from_value(json!({"name": "q", "policy": null, "effective_policy_definition": []})).unwrap();
        assert_eq!(known.policy, Some(None));
    }

    #[test]
    fn the_delivery_limit_in_force_depends_on_the_version() {
        let queue = |argument: Option<i64>, policy: Option<i64>| {
            let mut queue = QueueView { policy: Some(None), ..QueueView::default() };
            queue.arguments.extend(argument.map(|limit| ("x-delivery-limit".to_owned(), limit.into())));
            queue.effective.extend(policy.map(|limit| ("delivery-limit".to_owned(), limit.into())));
            queue
        };
        let (old, new) = (Some(Version::new(3, 10, 8)), Some(Version::new(4, 3, 6)));
        for (argument, policy, version, limit) in [
            (None, None, old, DeliveryLimit::None),
            (None, None, new, DeliveryLimit::Of(20)),
            (None, None, None, DeliveryLimit::Unknown),
            (None, Some(-1), new, DeliveryLimit::None),
            (Some(-1), None, old, DeliveryLimit::Of(0)),
            (Some(-1), None, new, DeliveryLimit::None),
            (Some(5), Some(9), new, DeliveryLimit::Of(5)),
            (Some(5), Some(-1), new, DeliveryLimit::Of(5)),
            (None, Some(7), old, DeliveryLimit::Of(7)),
        ] {
            assert_eq!(queue(argument, policy).delivery_limit(version), limit, "{argument:?} {policy:?} {version:?}");
        }
        let fresh = QueueView::default();
        assert_eq!(fresh.delivery_limit(new), DeliveryLimit::Unknown);
    }
}
