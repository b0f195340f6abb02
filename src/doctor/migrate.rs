//! Queues with other arguments than the contract's, made anew without losing a message or the order of what waited.
//!
//! A broker changes no arguments, so the queue has to go and come back under its name. [`migrations`] decides what there is
//! to do, from facts alone; [`migrate`] does it, and leaves all its state on the broker: who runs it again after it was
//! interrupted, however, completes it.

mod run;

use std::collections::BTreeSet;

use serde::Serialize;

use super::{
    Facts, State, Wanted,
    plan::{Item, plan},
    policy::{quoted, shell},
};
use crate::{
    broker::{
        Topology,
        management::{DeliveryLimit, Inventory, QueueView, Told},
        topology::{Binding, Exchange, ExchangeKind, Lifetime, Names, Queue},
    },
    protocol::{NodeName, wire::HeaderValue},
};

pub use run::{MigrateError, MigrateStep, Migrated, Surgeon};

/// How far a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The old queue is there: everything is still to be done.
    Replace,
    /// The old queue is gone, and the new one is not there yet.
    Remake,
    /// The new queue is there; what was put aside has to come back.
    Return,
}

/// One queue to be made anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Migration {
    /// Its name.
    pub queue: String,
    /// What is wrong with it, or how far an earlier run came.
    pub how: String,
    /// What is left to do.
    pub stage: Stage,
    /// Why it is left alone, and what to do first.
    pub blocked: Option<String>,
    /// The queue as it should be.
    #[serde(skip)]
    pub wanted: Queue,
    /// Exchange and key of every binding that it has or should have.
    #[serde(skip)]
    pub routes: BTreeSet<(String, String)>,
    /// Queues that nobody may consume meanwhile.
    #[serde(skip)]
    pub quiet: Vec<String>,
    /// Whether the old queue understands a guarded removal.
    #[serde(skip)]
    pub guarded: bool,
    /// Where messages are kept meanwhile.
    #[serde(skip)]
    pub aside: Aside,
}

/// What a migration makes for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aside {
    /// The queue that takes what is published meanwhile.
    pub incoming: String,
    /// The queue, and the exchange before it, that take what was in the old queue.
    pub backlog: String,
    /// The exchange on whose way everything comes back.
    pub back: String,
    /// Where a queue of these sends what it would drop.
    dead: String,
}

impl Aside {
    fn new(names: &Names, queue: &str) -> Self {
        let name = |part: &str| format!("{}{part}.{queue}", names.migration());
        Self { incoming: name("new"), backlog: names.set_aside(queue), back: name("back"), dead: names.dlx() }
    }

    /// Its exchanges and queues, without the bindings that catch what is published.
    #[must_use]
    pub fn topology(&self) -> Topology {
        // By a fanout exchange, not by the default one: that way the routing key stays, and with it the way of a retry.
        let exchange = |name: &String| Exchange { name: name.clone(), kind: ExchangeKind::Fanout, alternate: None };
        let queue = |name: &String| Queue {
            name: name.clone(),
            lifetime: Lifetime::Durable,
            // Dead letters, so that a run that is killed again and again can use up no delivery limit unseen.
            arguments: [
                ("x-queue-type", HeaderValue::from("quorum")),
                ("x-overflow", "reject-publish".into()),
                ("x-dead-letter-exchange", self.dead.as_str().into()),
                ("x-dead-letter-strategy", "at-least-once".into()),
            ]
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        };
        Topology {
            exchanges: vec![exchange(&self.backlog), exchange(&self.back)],
            queues: vec![queue(&self.incoming), queue(&self.backlog)],
            bindings: vec![Binding {
                exchange: self.backlog.clone(),
                queue: self.backlog.clone(),
                routing_key: String::new(),
            }],
        }
    }
}

/// An exchange that is otherwise than it should be: it is left alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OtherExchange {
    /// Its name.
    pub exchange: String,
    /// What is wrong with it.
    pub how: String,
    /// What to do.
    pub mend: String,
}

/// Everything that cannot be mended by declaring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Migrations {
    /// Queues.
    pub queues: Vec<Migration>,
    /// Exchanges.
    pub exchanges: Vec<OtherExchange>,
}

/// What there is to be made anew, by the facts.
///
/// # Errors
/// When the management API did not tell: arguments are seen nowhere else. The reason.
pub fn migrations(wanted: &Wanted, facts: &Facts) -> Result<Migrations, String> {
    let inventory = match &facts.inventory {
        Told::Yes(inventory) => inventory,
        Told::No(reason) => return Err(reason.clone()),
    };
    let items = plan(wanted, facts);
    let topology = wanted.topology(&facts.nodes);
    let mut migrations = Migrations::default();
    for item in items.iter().filter(|item| item.what == "exchange") {
        if let State::Differs { how } = &item.state {
            let mend = exchange_mend(facts, &item.name);
            migrations.exchanges.push(OtherExchange { exchange: item.name.clone(), how: how.clone(), mend });
        }
    }
    for item in items.iter().filter(|item| item.what == "queue") {
        let Some(queue) = topology.queues.iter().find(|queue| queue.name == item.name) else { continue };
        migrations.queues.extend(migration(wanted, facts, inventory, item, queue, &topology));
    }
    Ok(migrations)
}

fn migration(
    wanted: &Wanted,
    facts: &Facts,
    inventory: &Inventory,
    item: &Item,
    queue: &Queue,
    topology: &Topology,
) -> Option<Migration> {
    let aside = Aside::new(&wanted.names, &queue.name);
    let left =
        aside.topology().exchanges.iter().any(|one| inventory.exchanges.iter().any(|found| found.name == one.name))
            || aside.topology().queues.iter().any(|one| inventory.queues.iter().any(|found| found.name == one.name));
    let (stage, how) = match &item.state {
        State::Differs { how } => (Stage::Replace, how.clone()),
        State::Missing if left => (Stage::Remake, "an earlier run was interrupted before it was made anew".to_owned()),
        State::Equal if left => (Stage::Return, "an earlier run was interrupted before it was finished".to_owned()),
        _ => return None,
    };
    let found = inventory.queues.iter().find(|found| found.name == queue.name);
    let ours = topology.bindings.iter().filter(|binding| binding.queue == queue.name);
    let theirs = inventory.bindings.iter().filter(|binding| {
        let to_us = binding.destination == queue.name || binding.destination == aside.incoming;
        to_us && binding.destination_type == "queue" && !binding.source.starts_with(&wanted.names.migration())
    });
    let routes = ours
        .map(|binding| (binding.exchange.clone(), binding.routing_key.clone()))
        .chain(theirs.clone().map(|binding| (binding.source.clone(), binding.routing_key.clone())))
        .collect();
    let by_arguments = theirs.clone().find(|binding| !binding.arguments.is_empty());
    let blocked = if let Some(binding) = by_arguments {
        Some(format!(
            "it is bound to {} by arguments, which cannot be kept: unbind it there, and bind it again afterwards",
            binding.source
        ))
    } else {
        found.filter(|_| stage == Stage::Replace).and_then(|found| danger(wanted, facts, found))
    };
    let guarded = found.is_some_and(|found| found.kind == "classic");
    let quiet = together(wanted, &facts.nodes, &queue.name);
    Some(Migration {
        queue: queue.name.clone(),
        how,
        stage,
        blocked,
        wanted: queue.clone(),
        routes,
        quiet,
        guarded,
        aside,
    })
}

/// Why emptying the old queue could lose something.
fn danger(wanted: &Wanted, facts: &Facts, found: &QueueView) -> Option<String> {
    if found.kind == "stream" {
        return Some(
            "it is a stream, which cannot be emptied by reading: read what you need of it, delete it by hand, then \
                     run haul topology apply"
                .to_owned(),
        );
    }
    if let Some(state) = found.state.as_deref().filter(|&state| !matches!(state, "running" | "idle" | "flow")) {
        return Some(format!("its state is {state}: bring back the nodes of the broker that hold it first"));
    }
    let has_dead_letters =
        found.arguments.contains_key("x-dead-letter-exchange") || found.effective.contains_key("dead-letter-exchange");
    match found.delivery_limit(facts.version) {
        DeliveryLimit::Of(limit) if found.kind == "quorum" && !has_dead_letters => {
            let has_policy = !found.name.starts_with(&format!("{}.control.", wanted.names.prefix()));
            let first = if found.arguments.contains_key("x-delivery-limit") || !has_policy {
                let vhost = shell(&facts.vhost);
                let pattern = shell(&format!("^{}$", quoted(&found.name)));
                let definition = shell(&format!(r#"{{"dead-letter-exchange":"{}"}}"#, wanted.names.dlx()));
                let name = shell(&format!("{}-migrate", wanted.names.prefix()));
                format!(
                    "rabbitmqctl set_policy --vhost {vhost} --priority 90 --apply-to queues {name} {pattern} {definition}, \
                     and afterwards rabbitmqctl clear_policy --vhost {vhost} {name}"
                )
            } else {
                "haul topology apply, which sets the policy that lifts it".to_owned()
            };
            Some(format!(
                "it drops a message that was delivered {limit} times, and has no dead-letter exchange to catch it; first run \
                 {first}"
            ))
        }
        _ => None,
    }
}

/// The queue, and with a node's queue its other one: an agent that runs is seen on one of them at least.
fn together(wanted: &Wanted, nodes: &[NodeName], queue: &str) -> Vec<String> {
    let names = &wanted.names;
    let pair = nodes.iter().map(|node| [names.node(node), names.control_node(node)]);
    pair.into_iter()
        .find(|pair| pair.iter().any(|name| name == queue))
        .map_or_else(|| vec![queue.to_owned()], Vec::from)
}

/// An exchange is not exchanged under traffic: until the new one is there, publishes to it fail.
pub(super) fn exchange_mend(facts: &Facts, exchange: &str) -> String {
    let base = facts.management_base.as_deref().unwrap_or("http://localhost:15672");
    let encoded =
        |text: &str| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string();
    format!(
        "stop masters and agents, since publishes fail while there is no such exchange, then: curl -u USER -X DELETE \
         {base}/api/exchanges/{}/{} && haul topology apply --enrolled",
        encoded(&facts.vhost),
        encoded(exchange)
    )
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::broker::{
        management::{BindingView, ExchangeView},
        version::Version,
    };

    const QUEUE: &str = "haul.node.a";

    fn wanted() -> Wanted {
        let names = Names::default();
        Wanted {
            results: names.master_event(),
            names,
            nodes: vec![NodeName::new("a").unwrap()],
            longest_deadline: Duration::from_mins(25),
        }
    }

    fn view(name: &str, arguments: &[(&str, HeaderValue)]) -> QueueView {
        let kind = arguments.iter().find(|(name, _)| *name == "x-queue-type").and_then(|(_, kind)| kind.as_text());
        QueueView {
            name: name.to_owned(),
            kind: kind.unwrap_or("classic").to_owned(),
            durable: true,
            arguments: arguments.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
            policy: Some(None),
            state: Some("running".to_owned()),
            ..QueueView::default()
        }
    }

    fn bound(exchange: &str, queue: &str, key: &str) -> BindingView {
        BindingView {
            source: exchange.to_owned(),
            destination: queue.to_owned(),
            destination_type: "queue".to_owned(),
            routing_key: key.to_owned(),
            ..BindingView::default()
        }
    }

    /// What there is to do on a broker with these queues and bindings.
    fn found(version: &str, queues: Vec<QueueView>, bindings: Vec<BindingView>) -> Vec<Migration> {
        let names = [QUEUE.to_owned()];
        let missing = names.into_iter().filter(|name| !queues.iter().any(|queue| queue.name == *name)).collect();
        let version: Version = version.parse().unwrap();
        let facts = Facts {
            addresses: Vec::new(),
            version: Some(version),
            nodes: wanted().nodes,
            missing,
            depths: BTreeMap::new(),
            inventory: Told::Yes(Inventory { version: Some(version), queues, bindings, ..Inventory::default() }),
            management_base: None,
            vhost: "/".to_owned(),
            consumer_timeout: Duration::from_mins(30),
        };
        migrations(&wanted(), &facts).unwrap().queues
    }

    fn right() -> QueueView {
        let queue = wanted().topology(&wanted().nodes).queues.into_iter().find(|queue| queue.name == QUEUE).unwrap();
        QueueView { kind: "quorum".to_owned(), arguments: queue.arguments, ..view(QUEUE, &[]) }
    }

    #[test]
    fn the_stage_is_seen_on_the_broker() {
        let wrong = || view(QUEUE, &[("x-queue-type", "classic".into())]);
        let aside = |part: &str| view(&format!("haul.migrate.{part}.{QUEUE}"), &[("x-queue-type", "quorum".into())]);
        let stages = |queues| found("4.3.6", queues, Vec::new()).iter().map(|one| one.stage).collect::<Vec<_>>();
        assert_eq!(stages(vec![right()]), []);
        assert_eq!(stages(vec![]), [], "what is only missing is for apply");
        assert_eq!(stages(vec![wrong()]), [Stage::Replace]);
        assert_eq!(stages(vec![wrong(), aside("new"), aside("old")]), [Stage::Replace]);
        assert_eq!(stages(vec![aside("new"), aside("old")]), [Stage::Remake]);
        assert_eq!(stages(vec![right(), aside("old")]), [Stage::Return]);
    }

    #[test]
    fn every_route_is_kept_also_one_of_a_stranger_and_one_that_only_the_queue_aside_has() {
        let incoming = format!("haul.migrate.new.{QUEUE}");
        let wrong = view(QUEUE, &[("x-queue-type", "classic".into())]);
        let bindings = vec![
            bound("haul.task", QUEUE, "a"),
            bound("audit", QUEUE, "#"),
            bound("haul.return", &incoming, "other"),
            bound(&format!("haul.migrate.back.{QUEUE}"), QUEUE, ""),
            bound("haul.task", "haul.node.b", "b"),
        ];
        let migration = found("4.3.6", vec![wrong.clone()], bindings).remove(0);
        let routes: Vec<_> = migration.routes.iter().map(|(from, key)| (from.as_str(), key.as_str())).collect();
        assert_eq!(routes, [("audit", "#"), ("haul.return", "a"), ("haul.return", "other"), ("haul.task", "a")]);
        assert_eq!(migration.quiet, [QUEUE, "haul.control.a"]);
        assert!(migration.guarded && migration.blocked.is_none(), "{migration:?}");
        let by_header =
            BindingView { arguments: [("x-match".to_owned(), "all".into())].into(), ..bound("h", QUEUE, "") };
        let blocked = found("4.3.6", vec![wrong], vec![by_header]).remove(0).blocked.unwrap();
        assert!(blocked.contains("bound to h by arguments"), "{blocked}");
    }

    #[test]
    fn what_could_be_dropped_on_its_way_out_is_left_alone() {
        let quorum = ("x-queue-type", HeaderValue::from("quorum"));
        let limit = |limit: i64| ("x-delivery-limit", HeaderValue::Int(limit));
        let letters = ("x-dead-letter-exchange", HeaderValue::from("haul.dlx"));
        let blocked = |version: &str, arguments: &[(&str, HeaderValue)]| {
            found(version, vec![view(QUEUE, arguments)], Vec::new()).remove(0).blocked.unwrap_or_default()
        };
        for (version, arguments, said) in [
            ("3.10.8", vec![quorum.clone()], ""),
            // The trap of 3.10: the first return drops the message.
            ("3.10.8", vec![quorum.clone(), limit(-1)], "delivered 0 times"),
            ("3.10.8", vec![quorum.clone(), limit(-1), letters.clone()], ""),
            ("4.0.5", vec![quorum.clone()], "haul topology apply"),
            ("4.0.5", vec![quorum.clone(), limit(5)], "rabbitmqctl set_policy --vhost / --priority 90"),
            ("4.3.6", vec![quorum.clone(), limit(-1)], ""),
            ("4.3.6", vec![quorum, limit(5), letters], ""),
            ("4.3.6", vec![("x-queue-type", "classic".into())], ""),
            ("4.3.6", vec![("x-queue-type", "stream".into())], "it is a stream"),
        ] {
            let why = blocked(version, &arguments);
            assert!(
                if said.is_empty() { why.is_empty() } else { why.contains(said) },
                "{version} {arguments:?}: {why}"
            );
        }
    }

    #[test]
    fn an_exchange_is_explained_and_not_touched() {
        let mut facts = Facts {
            addresses: Vec::new(),
            version: None,
            nodes: Vec::new(),
            missing: Vec::new(),
            depths: BTreeMap::new(),
            inventory: Told::default(),
            management_base: Some("http://mq:15672".to_owned()),
            vhost: "/".to_owned(),
            consumer_timeout: Duration::ZERO,
        };
        let task = ExchangeView {
            name: "haul.task".to_owned(),
            kind: "topic".to_owned(),
            durable: true,
            ..ExchangeView::default()
        };
        facts.inventory = Told::Yes(Inventory { exchanges: vec![task], ..Inventory::default() });
        let found = migrations(&wanted(), &facts).unwrap();
        assert_eq!(found.queues, []);
        let [other] = found.exchanges.as_slice() else { panic!("{found:?}") };
        assert!(other.how.contains("its type is topic, not direct"));
        assert!(other.mend.contains("DELETE http://mq:15672/api/exchanges/%2F/haul%2Etask"), "{}", other.mend);
        facts.inventory = Told::No("401".to_owned());
        assert_eq!(migrations(&wanted(), &facts), Err("401".to_owned()));
    }
}
