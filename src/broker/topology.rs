//! Which exchanges, queues and bindings there are, and what they are called.

use std::{collections::BTreeMap, time::Duration};

use crate::protocol::{NodeName, Status, wire::HeaderValue};

/// The holding times of the shared retry queues, the shortest first.
pub const RETRY_DELAYS: [Duration; 7] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(15),
    Duration::from_mins(1),
    Duration::from_mins(5),
    Duration::from_mins(15),
    Duration::from_hours(1),
];

/// How an exchange chooses queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExchangeKind {
    /// By equal routing key.
    Direct,
    /// All of them.
    Fanout,
    /// By pattern.
    Topic,
}

/// A durable exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// How it chooses.
    pub kind: ExchangeKind,
    /// Where messages go that no queue takes.
    pub alternate: Option<String>,
}

/// How long a queue lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Lifetime {
    /// Until it is deleted; survives a restart of the broker.
    #[default]
    Durable,
    /// With the connection that declared it: exclusive, auto-delete, not durable. The only kind of queue for
    /// passers-by (`haul events`, `--wait`): RabbitMQ 4.3 refuses transient queues that are not exclusive.
    Session,
}

/// A queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// How long it lives.
    pub lifetime: Lifetime,
    /// Its arguments, frozen with version 1 of the contract.
    pub arguments: BTreeMap<String, HeaderValue>,
}

/// A binding of a queue to an exchange.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Binding {
    /// From.
    pub exchange: String,
    /// To.
    pub queue: String,
    /// Routing key or pattern.
    pub routing_key: String,
}

/// A set of exchanges, queues and bindings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Exchanges.
    pub exchanges: Vec<Exchange>,
    /// Queues.
    pub queues: Vec<Queue>,
    /// Bindings.
    pub bindings: Vec<Binding>,
}

impl Topology {
    /// Both together.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.exchanges.extend(other.exchanges);
        self.queues.extend(other.queues);
        self.bindings.extend(other.bindings);
        self
    }
}

/// The names of everything on the broker, under one prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    prefix: String,
}

impl Default for Names {
    fn default() -> Self {
        Self::new("haul")
    }
}

impl Names {
    /// Names under `prefix`.
    #[must_use]
    pub fn new(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into() }
    }

    /// The prefix.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Where masters publish tasks.
    #[must_use]
    pub fn task(&self) -> String {
        format!("{}.task", self.prefix)
    }

    /// Where retries come back.
    #[must_use]
    pub fn returned(&self) -> String {
        format!("{}.return", self.prefix)
    }

    /// A node's queue of tasks.
    #[must_use]
    pub fn node(&self, node: &NodeName) -> String {
        format!("{}.node.{node}", self.prefix)
    }

    /// The exchange and queue that hold copies for `delay`, one of [`RETRY_DELAYS`].
    #[must_use]
    pub fn retry(&self, delay: Duration) -> String {
        let seconds = delay.as_secs();
        let text = match seconds {
            0..60 => format!("{seconds}s"),
            60..3600 => format!("{}m", seconds / 60),
            _ => format!("{}h", seconds / 3600),
        };
        format!("{}.retry.{text}", self.prefix)
    }

    /// Where dead letters are published.
    #[must_use]
    pub fn dlx(&self) -> String {
        format!("{}.dlx", self.prefix)
    }

    /// The fleet's queue of dead letters.
    #[must_use]
    pub fn dead(&self) -> String {
        format!("{}.dead", self.prefix)
    }

    /// Where events are published.
    #[must_use]
    pub fn event(&self) -> String {
        format!("{}.event", self.prefix)
    }

    /// The master's durable queue of events.
    #[must_use]
    pub fn master_event(&self) -> String {
        format!("{}.master.event", self.prefix)
    }

    /// Where control messages are published.
    #[must_use]
    pub fn control(&self) -> String {
        format!("{}.control", self.prefix)
    }

    /// A node's queue of control messages.
    #[must_use]
    pub fn control_node(&self, node: &NodeName) -> String {
        format!("{}.control.{node}", self.prefix)
    }

    /// What a node has of its own: its queue of tasks.
    #[must_use]
    pub fn node_topology(&self, node: &NodeName) -> Topology {
        let queue = self.node(node);
        let bind = |exchange| Binding { exchange, queue: queue.clone(), routing_key: node.to_string() };
        Topology {
            exchanges: Vec::new(),
            bindings: vec![bind(self.task()), bind(self.returned())],
            queues: vec![Queue {
                name: queue,
                lifetime: Lifetime::Durable,
                arguments: arguments([
                    ("x-queue-type", "quorum".into()),
                    ("x-single-active-consumer", HeaderValue::Bool(true)),
                    ("x-dead-letter-exchange", self.dlx().into()),
                    ("x-dead-letter-strategy", "at-least-once".into()),
                    ("x-overflow", "reject-publish".into()),
                ]),
            }],
        }
    }

    /// What a node has for control.
    #[must_use]
    pub fn control_topology(&self, node: &NodeName) -> Topology {
        let queue = self.control_node(node);
        Topology {
            exchanges: Vec::new(),
            bindings: vec![Binding { exchange: self.control(), queue: queue.clone(), routing_key: node.to_string() }],
            queues: vec![Queue {
                name: queue,
                lifetime: Lifetime::Durable,
                arguments: arguments([("x-queue-type", "classic".into())]),
            }],
        }
    }

    /// What somebody who follows events for a while has: a queue that ends with its connection, bound to `patterns`
    /// (`<node>.<kind>.<status>`, `*` for any).
    #[must_use]
    pub fn follow_topology(&self, queue: &str, patterns: &[String]) -> Topology {
        let bind = |pattern: &String| Binding {
            exchange: self.event(),
            queue: queue.to_owned(),
            routing_key: pattern.clone(),
        };
        Topology {
            exchanges: Vec::new(),
            queues: vec![Queue { name: queue.to_owned(), lifetime: Lifetime::Session, arguments: BTreeMap::new() }],
            bindings: patterns.iter().map(bind).collect(),
        }
    }

    /// The name of a follower's queue; `unique` tells followers apart.
    #[must_use]
    pub fn follow(&self, unique: &str) -> String {
        format!("{}.follow.{unique}", self.prefix)
    }

    /// The beginning of the names of everything that a migration makes for a while.
    #[must_use]
    pub fn migration(&self) -> String {
        format!("{}.migrate.", self.prefix)
    }

    /// The queue, and the exchange before it, that hold what was in a queue while that one is made anew.
    #[must_use]
    pub fn set_aside(&self, queue: &str) -> String {
        format!("{}old.{queue}", self.migration())
    }

    /// What the fleet shares. `results` names the master's queue of events; empty for none.
    #[must_use]
    pub fn shared_topology(&self, results: &str) -> Topology {
        let exchange = |name, kind| Exchange { name, kind, alternate: None };
        let mut topology = Topology {
            exchanges: vec![
                exchange(self.dlx(), ExchangeKind::Fanout),
                exchange(self.task(), ExchangeKind::Direct),
                Exchange { name: self.returned(), kind: ExchangeKind::Direct, alternate: Some(self.dlx()) },
                exchange(self.event(), ExchangeKind::Topic),
                exchange(self.control(), ExchangeKind::Direct),
            ],
            queues: vec![Queue {
                name: self.dead(),
                lifetime: Lifetime::Durable,
                arguments: arguments([("x-queue-type", "quorum".into()), ("x-overflow", "reject-publish".into())]),
            }],
            bindings: vec![Binding { exchange: self.dlx(), queue: self.dead(), routing_key: String::new() }],
        };
        for delay in RETRY_DELAYS {
            let name = self.retry(delay);
            topology.exchanges.push(exchange(name.clone(), ExchangeKind::Fanout));
            topology.queues.push(Queue {
                name: name.clone(),
                lifetime: Lifetime::Durable,
                arguments: arguments([
                    ("x-queue-type", "quorum".into()),
                    ("x-message-ttl", HeaderValue::Int(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX))),
                    ("x-dead-letter-exchange", self.returned().into()),
                    ("x-dead-letter-strategy", "at-least-once".into()),
                    ("x-overflow", "reject-publish".into()),
                ]),
            });
            topology.bindings.push(Binding { exchange: name.clone(), queue: name, routing_key: String::new() });
        }
        if !results.is_empty() {
            topology.queues.push(Queue {
                name: results.to_owned(),
                lifetime: Lifetime::Durable,
                arguments: arguments([("x-queue-type", "quorum".into()), ("x-overflow", "reject-publish".into())]),
            });
            let statuses = Status::ALL.into_iter().filter(|&status| status != Status::Progress);
            topology.bindings.extend(statuses.map(|status| Binding {
                exchange: self.event(),
                queue: results.to_owned(),
                routing_key: format!("*.*.{status}"),
            }));
            topology.bindings.push(Binding {
                exchange: self.event(),
                queue: results.to_owned(),
                routing_key: "*.control.*".to_owned(),
            });
        }
        topology
    }
}

fn arguments<const N: usize>(list: [(&str, HeaderValue); N]) -> BTreeMap<String, HeaderValue> {
    list.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_contract() {
        let names = Names::default();
        let node = NodeName::new("worker-001").unwrap();
        assert_eq!(names.node(&node), "haul.node.worker-001");
        assert_eq!(names.control_node(&node), "haul.control.worker-001");
        let retries: Vec<_> = RETRY_DELAYS.iter().map(|&delay| names.retry(delay)).collect();
        assert_eq!(retries, ["1s", "5s", "15s", "1m", "5m", "15m", "1h"].map(|text| format!("haul.retry.{text}")));
    }

    #[test]
    fn no_queue_has_a_delivery_limit_or_a_length_as_an_argument() {
        let names = Names::default();
        let all = names.shared_topology(&names.master_event()).and(names.node_topology(&NodeName::new("n").unwrap()));
        for queue in all.queues {
            assert!(!queue.arguments.keys().any(|name| name.contains("limit") || name.contains("length")));
        }
    }

    #[test]
    fn the_masters_queue_is_bound_to_every_status_but_progress() {
        let names = Names::default();
        let keys: Vec<_> = names
            .shared_topology(&names.master_event())
            .bindings
            .into_iter()
            .filter(|binding| binding.exchange == names.event())
            .map(|binding| binding.routing_key)
            .collect();
        assert!(keys.contains(&"*.*.succeeded".to_owned()) && !keys.iter().any(|key| key.contains("progress")));
    }
}
