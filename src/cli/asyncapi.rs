//! The AsyncAPI document: the contract with its exchanges, queues, bindings and headers, for one agent.
//!
//! What it says of the broker is read from the same [`Topology`] that the agent declares.

use serde_json::{Map, Value, json};

use crate::{
    broker::{
        Names, Topology,
        topology::{Exchange, ExchangeKind, Queue},
    },
    protocol::{NodeName, Status, VERSION, schema, wire::header},
};

/// Stands for the node while names are made; the document has a parameter in its place.
const NODE: &str = "NODE";

/// One header, for people and for programs.
struct Header {
    name: &'static str,
    kind: &'static str,
    description: &'static str,
    /// Only on dead letters.
    dead: bool,
}

const HEADERS: [Header; 15] = [
    text(header::TRACEPARENT, "W3C trace context; carried from the task to its events."),
    int(header::ROUND, "Replays so far; 0 if absent."),
    int(header::ATTEMPT, "The attempt that this copy asks for, from 1."),
    int(header::ARRIVED, "Order of first arrival at the node, in microseconds since the epoch."),
    int(header::NOT_BEFORE, "Milliseconds since the epoch before which the copy is not due."),
    int(header::LEFT, "Milliseconds that the copy still has to wait when it comes back, at most."),
    int(header::DEFERRED, "Milliseconds since the epoch when the task was first deferred."),
    text(header::NODE, "The node whose task it is."),
    text(header::HISTORY, "The last failures, one a line, the newest last; at most ten."),
    dead(text(header::ERROR_CLASS, "Class of the failure.")),
    dead(text(header::ERROR, "The failure in a sentence.")),
    dead(int(header::ATTEMPTS, "Attempts that were charged.")),
    dead(int(header::DEAD_AT, "Milliseconds since the epoch when it was given up.")),
    dead(text(header::KIND, "Kind of the task.")),
    dead(int(header::PROJECT, "Project of the task.")),
];

const fn text(name: &'static str, description: &'static str) -> Header {
    Header { name, kind: "string", description, dead: false }
}

const fn int(name: &'static str, description: &'static str) -> Header {
    Header { name, kind: "integer", description, dead: false }
}

const fn dead(header: Header) -> Header {
    Header { dead: true, ..header }
}

/// The document for names under one prefix.
///
/// # Panics
/// Never: the word that stands for the node is a node name.
#[must_use]
pub fn document(names: &Names) -> Value {
    let node = NodeName::new(NODE).expect("a word of letters is a node name");
    let topology =
        names.shared_topology(&names.master_event()).and(names.node_topology(&node)).and(names.control_topology(&node));
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Haul agent",
            "version": format!("{VERSION}.0.0"),
            "description": "Masters publish tasks and commands for a node; its agent executes them and publishes events. \
                Fields are added, never changed; unknown fields are ignored.",
            "license": {"name": "MIT OR Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"broker": {"host": "rabbitmq.example:5672", "protocol": "amqp", "protocolVersion": "0-9-1",
            "description": "RabbitMQ 3.10 to 4.3; amqps for TLS."}},
        "channels": channels(names, &topology),
        "operations": operations(names),
        "components": {"messages": messages()},
    })
}

fn channels(names: &Names, topology: &Topology) -> Value {
    let exchanges = topology.exchanges.iter().map(|exchange| (id(&exchange.name), exchange_channel(names, exchange)));
    let queues = topology.queues.iter().map(|queue| {
        // An exchange and a queue of one name (the retry pairs) are two channels.
        (format!("{}-queue", id(&queue.name)), queue_channel(names, topology, queue))
    });
    Value::Object(exchanges.chain(queues).collect())
}

fn exchange_channel(names: &Names, exchange: &Exchange) -> Value {
    let (kind, address) = match exchange.kind {
        ExchangeKind::Direct => ("direct", "{node}"),
        ExchangeKind::Fanout => ("fanout", "{node}"),
        ExchangeKind::Topic => ("topic", "{node}.{kind}.{status}"),
    };
    let mut parameters = Map::from_iter([("node".to_owned(), node_parameter())]);
    if exchange.kind == ExchangeKind::Topic {
        let statuses: Vec<_> = Status::ALL.iter().map(|status| status.as_str()).collect();
        parameters.insert(
            "kind".to_owned(),
            json!({"description": "Kind of the task, or control for answers to commands.",
                "enum": ["clone", "pull", "delete", "status", "control"]}),
        );
        parameters.insert(
            "status".to_owned(),
            json!({"description": format!("Status of the event ({}), or the answer to a command.", statuses.join(", "))}),
        );
    }
    let mut channel = json!({
        "address": address,
        "description": purpose(names, &exchange.name),
        "parameters": parameters,
        "messages": carried(names, &exchange.name),
        "bindings": {"amqp": {
            "is": "routingKey",
            "exchange": {"name": exchange.name, "type": kind, "durable": true, "autoDelete": false, "vhost": "/"},
            "bindingVersion": "0.3.0",
        }},
    });
    if let Some(alternate) = &exchange.alternate {
        channel["x-arguments"] = json!({"alternate-exchange": alternate});
    }
    channel
}

fn queue_channel(names: &Names, topology: &Topology, queue: &Queue) -> Value {
    let bindings: Vec<_> = topology
        .bindings
        .iter()
        .filter(|binding| binding.queue == queue.name)
        .map(|binding| json!({"exchange": binding.exchange, "routingKey": shown(&binding.routing_key)}))
        .collect();
    let mut channel = json!({
        "address": shown(&queue.name),
        "description": purpose(names, &queue.name),
        "messages": carried(names, &queue.name),
        "bindings": {"amqp": {
            "is": "queue",
            "queue": {"name": shown(&queue.name), "durable": true, "exclusive": false, "autoDelete": false, "vhost": "/"},
            "bindingVersion": "0.3.0",
        }},
        "x-arguments": queue.arguments,
        "x-bindings": bindings,
    });
    if queue.name.contains(NODE) {
        channel["parameters"] = json!({"node": node_parameter()});
    }
    channel
}

/// The messages that an exchange or queue carries.
fn carried(names: &Names, name: &str) -> Value {
    let carried: &[&str] = if name == names.event() || name == names.master_event() {
        &["event", "control-answer"]
    } else if name.starts_with(&names.control()) {
        &["control"]
    } else if name == names.dlx() || name == names.dead() {
        &["dead-letter"]
    } else {
        &["task"]
    };
    let reference = |name: &&str| ((*name).to_owned(), json!({"$ref": format!("#/components/messages/{name}")}));
    Value::Object(carried.iter().map(reference).collect())
}

fn purpose(names: &Names, name: &str) -> &'static str {
    if name == names.task() {
        "Masters publish tasks here, mandatory: a node without a queue is an error at once."
    } else if name == names.returned() {
        "Retries come back here when their time is over; a copy for a node that is gone becomes a dead letter."
    } else if name == names.event() {
        "Agents publish events and answers here; a master binds a queue of its own or uses the durable one."
    } else if name == names.master_event() {
        "Keeps every event but progress until the master takes it."
    } else if name == names.control() {
        "Masters publish commands here, mandatory."
    } else if name.starts_with(&names.control()) {
        "Commands for one node."
    } else if name == names.dlx() {
        "Agents publish tasks here that they give up."
    } else if name == names.dead() {
        "The dead letters of the fleet, each ready to be replayed as it is."
    } else if name.contains(NODE) {
        "Tasks of one node; consumed by one agent at a time."
    } else {
        "Holds copies of tasks until their next attempt is due."
    }
}

fn operations(names: &Names) -> Value {
    let operation = |action: &str, channel: &str, message: &str, summary: &str, binding: Value| {
        json!({
            "action": action,
            "channel": {"$ref": format!("#/channels/{channel}")},
            "messages": [{"$ref": format!("#/channels/{channel}/messages/{message}")}],
            "summary": summary,
            "bindings": {"amqp": binding},
        })
    };
    let node = NodeName::new(NODE).map(|node| (names.node(&node), names.control_node(&node)));
    let (tasks, commands) = node.unwrap_or_default();
    let queue = |name: &str| format!("{}-queue", id(name));
    let sent = json!({"deliveryMode": 2, "mandatory": true, "timestamp": true, "bindingVersion": "0.3.0"});
    let received = json!({"ack": true, "bindingVersion": "0.3.0"});
    json!({
        "receiveTask": operation("receive", &queue(&tasks), "task",
            "Take a task; acknowledged once it has ended and its event is confirmed.", received.clone()),
        "sendEvent": operation("send", &id(&names.event()), "event",
            "Report where a task stands; progress is transient, not mandatory and expires soon.", sent.clone()),
        "receiveControl": operation("receive", &queue(&commands), "control",
            "Take a command.", received),
        "sendControlAnswer": operation("send", &id(&names.event()), "control-answer",
            "Answer a command.", sent.clone()),
        "sendDeadLetter": operation("send", &id(&names.dlx()), "dead-letter",
            "Give up a task, with the reason in its headers.", sent),
    })
}

fn messages() -> Value {
    let message = |name: &str, title: &str, headers: Value, correlation: &str, message_type: &str| {
        json!({
            "name": name,
            "title": title,
            "contentType": "application/json",
            "payload": {
                "schemaFormat": "application/schema+json;version=draft-2020-12",
                "schema": {"$ref": format!("./{}.schema.json", if name == "dead-letter" { "task" } else { name })},
            },
            "headers": headers,
            "correlationId": {"location": format!("$message.payload#/{correlation}")},
            "bindings": {"amqp": {"messageType": message_type, "bindingVersion": "0.3.0"}},
        })
    };
    let some = |wanted: &dyn Fn(&Header) -> bool| {
        let property =
            |header: &Header| (header.name.to_owned(), json!({"type": header.kind, "description": header.description}));
        let properties: Map<_, _> = HEADERS.iter().filter(|header| wanted(header)).map(property).collect();
        json!({"type": "object", "properties": properties})
    };
    let trace = some(&|header| header.name == header::TRACEPARENT);
    let mut messages = Map::new();
    for name in schema::NAMES {
        messages.insert(
            name.to_owned(),
            match name {
                "task" => message(name, "Task", some(&|header| !header.dead), "task_id", "task.<kind>"),
                "event" => message(name, "Event", trace.clone(), "task_id", "event.<status>"),
                "control" => message(name, "Command", trace.clone(), "control_id", "control.<command>"),
                _ => message(name, "Answer to a command", trace.clone(), "control_id", "control.<answer>"),
            },
        );
    }
    let letter = message("dead-letter", "Dead letter", some(&|_| true), "task_id", "task.<kind>");
    messages.insert("dead-letter".to_owned(), letter);
    Value::Object(messages)
}

fn node_parameter() -> Value {
    json!({"description": "Name of the node: 1–63 characters of [A-Za-z0-9_-]."})
}

/// The name with a parameter for the node.
fn shown(name: &str) -> String {
    name.replace(NODE, "{node}")
}

/// The name as the key of a channel.
fn id(name: &str) -> String {
    name.replace(NODE, "node").replace('.', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_within_the_document_leads_somewhere() {
        fn references(value: &Value, found: &mut Vec<String>) {
            match value {
                Value::Object(fields) => {
                    for (name, field) in fields {
                        match field.as_str().filter(|_| name == "$ref") {
                            Some(reference) => found.push(reference.to_owned()),
                            None => references(field, found),
                        }
                    }
                }
                Value::Array(items) => items.iter().for_each(|item| references(item, found)),
                _ => {}
            }
        }
        let document = document(&Names::default());
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 20);
        for reference in found {
            match reference.strip_prefix('#') {
                Some(pointer) => assert!(document.pointer(pointer).is_some(), "{reference}"),
                None => assert!(schema::NAMES.iter().any(|name| reference == format!("./{name}.schema.json"))),
            }
        }
    }

    #[test]
    fn every_exchange_and_queue_of_the_topology_is_a_channel() {
        let names = Names::new("other");
        let document = document(&names);
        let channels = document["channels"].as_object().unwrap();
        assert!(channels.keys().all(|key| key.starts_with("other-")));
        let topology = names.shared_topology(&names.master_event());
        // And the two queues of a node.
        assert_eq!(channels.len(), topology.exchanges.len() + topology.queues.len() + 2);
        assert_eq!(document["channels"]["other-node-node-queue"]["address"], "other.node.{node}");
    }

    #[test]
    fn every_header_of_ours_is_described() {
        let source = include_str!("../protocol/wire/header.rs");
        let ours =
            |name: &&str| name.starts_with(header::OURS) && *name != header::OURS || *name == header::TRACEPARENT;
        let names: Vec<_> = source.split('"').skip(1).step_by(2).filter(ours).collect();
        for name in &names {
            assert!(HEADERS.iter().any(|header| header.name == *name), "{name}");
        }
        assert_eq!(names.len(), HEADERS.len());
    }
}
