//! Everything that should be on the broker, one by one, and whether it is.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Facts, Wanted};
use crate::{
    broker::{
        management::{Inventory, PolicyView, Told},
        topology::{Binding, Exchange, ExchangeKind, Queue},
    },
    protocol::wire::HeaderValue,
};

/// Stands between exchange and queue in a binding's name.
pub(super) const BINDS: &str = " → ";

/// Whether a thing is as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// It is.
    Equal,
    /// It is not there.
    Missing,
    /// It is there, but otherwise.
    Differs {
        /// How.
        how: String,
    },
    /// It is there; only the management API could tell whether it is equal.
    Unknown,
}

/// One exchange, queue, binding or policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// `exchange`, `queue`, `binding` or `policy`.
    pub what: &'static str,
    /// Its name.
    pub name: String,
    /// Type and arguments, key, or definition.
    pub detail: String,
    /// Whether it is as it should be.
    #[serde(flatten)]
    pub state: State,
}

/// Compares what should be with what is.
#[must_use]
pub fn plan(wanted: &Wanted, facts: &Facts) -> Vec<Item> {
    let topology = wanted.topology(&facts.nodes);
    let inventory = match &facts.inventory {
        Told::Yes(inventory) => Some(inventory),
        Told::No(_) => None,
    };
    let mut items = Vec::new();
    for exchange in &topology.exchanges {
        items.push(Item {
            what: "exchange",
            name: exchange.name.clone(),
            detail: described(kind(exchange.kind), &exchange_arguments(exchange)),
            state: exchange_state(exchange, facts, inventory),
        });
    }
    for queue in &topology.queues {
        items.push(Item {
            what: "queue",
            name: queue.name.clone(),
            detail: described("durable", &queue.arguments),
            state: queue_state(queue, facts, inventory),
        });
    }
    for binding in &topology.bindings {
        items.push(Item {
            what: "binding",
            name: format!("{}{BINDS}{}", binding.exchange, binding.queue),
            detail: binding.routing_key.clone(),
            state: binding_state(binding, facts, inventory),
        });
    }
    for policy in facts.version.map(|version| wanted.policies(version)).unwrap_or_default() {
        items.push(Item {
            what: "policy",
            name: policy.name.clone(),
            detail: described(&policy.pattern, &policy.definition),
            state: policy_state(&policy, inventory),
        });
    }
    items
}

fn exchange_state(exchange: &Exchange, facts: &Facts, inventory: Option<&Inventory>) -> State {
    if facts.missing.contains(&exchange.name) {
        return State::Missing;
    }
    let Some(inventory) = inventory else { return State::Unknown };
    let Some(found) = inventory.exchanges.iter().find(|found| found.name == exchange.name) else {
        return State::Missing;
    };
    let mut differences = Vec::new();
    if found.kind != kind(exchange.kind) {
        differences.push(format!("its type is {}, not {}", found.kind, kind(exchange.kind)));
    }
    if !found.durable {
        differences.push("it is transient".to_owned());
    }
    if found.internal {
        differences.push("it is internal: clients may not publish to it".to_owned());
    }
    differences.extend(argument_differences(&exchange_arguments(exchange), &found.arguments));
    state(differences)
}

fn queue_state(queue: &Queue, facts: &Facts, inventory: Option<&Inventory>) -> State {
    if facts.missing.contains(&queue.name) {
        return State::Missing;
    }
    let Some(inventory) = inventory else { return State::Unknown };
    let Some(found) = inventory.queues.iter().find(|found| found.name == queue.name) else { return State::Missing };
    let mut differences = argument_differences(&queue.arguments, &found.arguments);
    if !found.durable {
        differences.push("it is transient".to_owned());
    }
    state(differences)
}

fn binding_state(binding: &Binding, facts: &Facts, inventory: Option<&Inventory>) -> State {
    if facts.missing.contains(&binding.exchange) || facts.missing.contains(&binding.queue) {
        return State::Missing;
    }
    let Some(inventory) = inventory else { return State::Unknown };
    let there = inventory.bindings.iter().any(|found| {
        found.source == binding.exchange
            && found.destination == binding.queue
            && found.destination_type == "queue"
            && found.routing_key == binding.routing_key
    });
    if there { State::Equal } else { State::Missing }
}

fn policy_state(policy: &PolicyView, inventory: Option<&Inventory>) -> State {
    let Some(Inventory { policies: Told::Yes(policies), .. }) = inventory else { return State::Unknown };
    let Some(found) = policies.iter().find(|found| found.name == policy.name) else { return State::Missing };
    let mut differences = Vec::new();
    if found.pattern != policy.pattern {
        differences.push(format!("its pattern is {}", found.pattern));
    }
    if found.definition != policy.definition {
        differences.push(format!("it sets {}", described("", &found.definition).trim()));
    }
    if found.priority < policy.priority {
        differences.push(format!("its priority is {}, below {}", found.priority, policy.priority));
    }
    if !matches!(found.apply_to.as_str(), "queues" | "all" | "quorum_queues") {
        differences.push(format!("it applies to {}", found.apply_to));
    }
    state(differences)
}

fn state(differences: Vec<String>) -> State {
    if differences.is_empty() { State::Equal } else { State::Differs { how: differences.join("; ") } }
}

fn argument_differences(wanted: &BTreeMap<String, HeaderValue>, found: &BTreeMap<String, HeaderValue>) -> Vec<String> {
    let mut differences = Vec::new();
    for (name, value) in wanted {
        match found.get(name) {
            Some(other) if other == value => {}
            Some(other) => differences.push(format!("{name} is {other}, not {value}")),
            // A broker before queue types wrote none for a classic queue.
            None if name == "x-queue-type" && value.as_text() == Some("classic") => {}
            None => differences.push(format!("{name}={value} is missing")),
        }
    }
    differences.extend(
        found
            .iter()
            .filter(|(name, _)| !wanted.contains_key(*name))
            .map(|(name, value)| format!("it has {name}={value}")),
    );
    differences
}

fn exchange_arguments(exchange: &Exchange) -> BTreeMap<String, HeaderValue> {
    let alternate = exchange.alternate.iter();
    alternate.map(|name| ("alternate-exchange".to_owned(), HeaderValue::from(name.as_str()))).collect()
}

/// An exchange's type as AMQP writes it.
fn kind(kind: ExchangeKind) -> &'static str {
    match kind {
        ExchangeKind::Direct => "direct",
        ExchangeKind::Fanout => "fanout",
        ExchangeKind::Topic => "topic",
    }
}

fn described(first: &str, arguments: &BTreeMap<String, HeaderValue>) -> String {
    let mut words = vec![first.to_owned()];
    words.extend(arguments.iter().map(|(name, value)| format!("{name}={value}")));
    words.join(" ")
}
