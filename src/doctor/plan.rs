//! Everything that should be on the broker, one by one, and whether it is.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Serialize;

use super::{Facts, Wanted};
use crate::{
    broker::{
        management::{ExchangeView, Inventory, PolicyView, QueueView, Told},
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

/// Compares what should be with what is, in an order that depends on what should be alone.
#[must_use]
pub fn plan(wanted: &Wanted, facts: &Facts) -> Vec<Item> {
    let topology = wanted.topology(&facts.nodes);
    let seen = Seen::new(facts);
    let mut items = Vec::new();
    for exchange in &topology.exchanges {
        items.push(Item {
            what: "exchange",
            name: exchange.name.clone(),
            detail: described(kind(exchange.kind), &exchange_arguments(exchange)),
            state: seen.exchange(exchange),
        });
    }
    for queue in &topology.queues {
        items.push(Item {
            what: "queue",
            name: queue.name.clone(),
            detail: described("durable", &queue.arguments),
            state: seen.queue(queue),
        });
    }
    for binding in &topology.bindings {
        items.push(Item {
            what: "binding",
            name: format!("{}{BINDS}{}", binding.exchange, binding.queue),
            detail: binding.routing_key.clone(),
            state: seen.binding(binding),
        });
    }
    for policy in facts.version.map(|version| wanted.policies(version)).unwrap_or_default() {
        items.push(Item {
            what: "policy",
            name: policy.name.clone(),
            detail: described(&policy.pattern, &policy.definition),
            state: policy_state(&policy, seen.inventory),
        });
    }
    items
}

/// The facts by name: a fleet has thousands of them.
struct Seen<'a> {
    missing: HashSet<&'a str>,
    inventory: Option<&'a Inventory>,
    exchanges: HashMap<&'a str, &'a ExchangeView>,
    queues: HashMap<&'a str, &'a QueueView>,
    bindings: HashSet<(&'a str, &'a str, &'a str)>,
}

impl<'a> Seen<'a> {
    fn new(facts: &'a Facts) -> Self {
        let inventory = match &facts.inventory {
            Told::Yes(inventory) => Some(inventory),
            Told::No(_) => None,
        };
        let exchanges = inventory.iter().flat_map(|inventory| &inventory.exchanges);
        let queues = inventory.iter().flat_map(|inventory| &inventory.queues);
        let bindings = inventory.iter().flat_map(|inventory| &inventory.bindings);
        Self {
            missing: facts.missing.iter().map(String::as_str).collect(),
            inventory,
            exchanges: exchanges.map(|exchange| (exchange.name.as_str(), exchange)).collect(),
            queues: queues.map(|queue| (queue.name.as_str(), queue)).collect(),
            bindings: bindings
                .filter(|binding| binding.destination_type == "queue")
                .map(|binding| (binding.source.as_str(), binding.destination.as_str(), binding.routing_key.as_str()))
                .collect(),
        }
    }

    fn exchange(&self, exchange: &Exchange) -> State {
        if self.missing.contains(exchange.name.as_str()) {
            return State::Missing;
        }
        if self.inventory.is_none() {
            return State::Unknown;
        }
        let Some(found) = self.exchanges.get(exchange.name.as_str()) else { return State::Missing };
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

    fn queue(&self, queue: &Queue) -> State {
        if self.missing.contains(queue.name.as_str()) {
            return State::Missing;
        }
        if self.inventory.is_none() {
            return State::Unknown;
        }
        let Some(found) = self.queues.get(queue.name.as_str()) else { return State::Missing };
        let mut differences = argument_differences(&queue.arguments, &found.arguments);
        if !found.durable {
            differences.push("it is transient".to_owned());
        }
        state(differences)
    }

    fn binding(&self, binding: &Binding) -> State {
        let (exchange, queue) = (binding.exchange.as_str(), binding.queue.as_str());
        if self.missing.contains(exchange) || self.missing.contains(queue) {
            State::Missing
        } else if self.inventory.is_none() {
            State::Unknown
        } else if self.bindings.contains(&(exchange, queue, binding.routing_key.as_str())) {
            State::Equal
        } else {
            State::Missing
        }
    }
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::{
        broker::{Names, management::BindingView, version::Version},
        protocol::NodeName,
    };

    /// What should be for a fleet, and the facts of a broker that has it; `turned` lists everything the other way round.
    fn fleet(nodes: usize, turned: bool) -> (Wanted, Facts) {
        let names = Names::default();
        let mut nodes: Vec<_> = (0..nodes).map(|number| NodeName::new(format!("n{number:04}")).unwrap()).collect();
        nodes.sort();
        let wanted = Wanted {
            results: names.master_event(),
            names,
            nodes: nodes.clone(),
            longest_deadline: Duration::from_mins(25),
        };
        let version = Version::RECOMMENDED;
        let topology = wanted.topology(&nodes);
        let exchange = |one: &Exchange| ExchangeView {
            name: one.name.clone(),
            kind: kind(one.kind).to_owned(),
            durable: true,
            internal: false,
            arguments: exchange_arguments(one),
        };
        let queue = |one: &Queue| QueueView {
            name: one.name.clone(),
            durable: true,
            arguments: one.arguments.clone(),
            ..QueueView::default()
        };
        let binding = |one: &Binding| BindingView {
            source: one.exchange.clone(),
            destination: one.queue.clone(),
            destination_type: "queue".to_owned(),
            routing_key: one.routing_key.clone(),
            arguments: BTreeMap::new(),
        };
        let mut inventory = Inventory {
            version: Some(version),
            exchanges: topology.exchanges.iter().map(exchange).collect(),
            queues: topology.queues.iter().map(queue).collect(),
            bindings: topology.bindings.iter().map(binding).collect(),
            policies: Told::Yes(wanted.policies(version)),
            ..Inventory::default()
        };
        if turned {
            inventory.exchanges.reverse();
            inventory.queues.reverse();
            inventory.bindings.reverse();
        }
        let facts = Facts {
            addresses: Vec::new(),
            version: Some(version),
            nodes,
            missing: Vec::new(),
            depths: BTreeMap::new(),
            inventory: Told::Yes(inventory),
            management_base: None,
            vhost: "/".to_owned(),
            consumer_timeout: Duration::from_mins(30),
        };
        (wanted, facts)
    }

    fn inventory(facts: &mut Facts) -> &mut Inventory {
        let Told::Yes(inventory) = &mut facts.inventory else { panic!("the fleet is seen") };
        inventory
    }

    #[test]
    fn a_plan_of_a_thousand_nodes_names_exactly_what_differs() {
        let (wanted, mut facts) = fleet(1000, false);
        let begun = Instant::now();
        let items = plan(&wanted, &facts);
        let took = begun.elapsed();
        println!("a plan of 1,000 nodes: {} things in {took:?}", items.len());
        assert_eq!(items.len(), 12 + 9 + 2000 + 8 + 10 + 3000 + 2);
        assert!(items.iter().all(|item| item.state == State::Equal));
        assert!(took < Duration::from_secs(2), "{took:?}");

        inventory(&mut facts).queues.retain(|queue| queue.name != "haul.node.n0500");
        let limited = |queue: &&mut QueueView| queue.name == "haul.node.n0700";
        let queue = inventory(&mut facts).queues.iter_mut().find(limited).unwrap();
        queue.arguments.insert("x-max-length".to_owned(), 1.into());
        let unbound = |one: &BindingView| one.source == "haul.return" && one.destination == "haul.node.n0900";
        inventory(&mut facts).bindings.retain(|one| !unbound(one));
        let other: Vec<_> = plan(&wanted, &facts).into_iter().filter(|item| item.state != State::Equal).collect();
        let named: Vec<_> = other.iter().map(|item| (item.what, item.name.as_str(), &item.state)).collect();
        let differs = State::Differs { how: "it has x-max-length=1".to_owned() };
        assert_eq!(
            named,
            [
                ("queue", "haul.node.n0500", &State::Missing),
                ("queue", "haul.node.n0700", &differs),
                ("binding", "haul.return → haul.node.n0900", &State::Missing),
            ]
        );
    }

    #[test]
    fn a_plan_is_printed_alike_whatever_the_order_of_the_broker_s_answers() {
        let text = |turned| {
            let (wanted, facts) = fleet(3, turned);
            serde_json::to_string(&plan(&wanted, &facts)).unwrap()
        };
        assert_eq!(text(false), text(true));
        assert!(text(false).starts_with(
            r#"[{"what":"exchange","name":"haul.dlx","detail":"fanout","state":"equal"},{"what":"exchange","name":"haul.task","detail":"direct","state":"equal"},"#
        ));
        let differing = Item {
            what: "queue",
            name: "q".to_owned(),
            detail: "durable".to_owned(),
            state: State::Differs { how: "so".to_owned() },
        };
        assert_eq!(
            serde_json::to_string(&differing).unwrap(),
            r#"{"what":"queue","name":"q","detail":"durable","state":"differs","how":"so"}"#
        );
    }
}
