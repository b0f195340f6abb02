//! What is wrong, and what mends it: a pure function of the facts.

mod queues;
mod users;

use std::collections::{HashMap, HashSet};

use super::{
    Facts, Finding, Item, Severity, State, Wanted,
    migrate::exchange_mend,
    plan::{BINDS, plan},
    policy::{quoted, set_policy_command, shell},
};
use crate::{
    broker::{
        management::{Inventory, Told},
        version::Version,
    },
    protocol::NodeName,
};

/// Everything that is not as it should be, the worst first.
#[must_use]
pub fn examine(wanted: &Wanted, facts: &Facts) -> Vec<Finding> {
    let exam = Exam { wanted, facts };
    let mut findings = Vec::new();
    exam.addresses(&mut findings);
    exam.version(&mut findings);
    exam.objects(&mut findings);
    exam.consumers(&mut findings);
    exam.dead_letters(&mut findings);
    match &facts.inventory {
        Told::Yes(inventory) => {
            exam.queues(inventory, &mut findings);
            exam.left_by_a_migration(inventory, &mut findings);
            exam.users(inventory, &mut findings);
            exam.alarms(inventory, &mut findings);
        }
        Told::No(reason) => exam.unseen(reason, &mut findings),
    }
    exam.consumer_timeout(&mut findings);
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    findings
}

struct Exam<'a> {
    wanted: &'a Wanted,
    facts: &'a Facts,
}

fn finding(severity: Severity, subject: &str, problem: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { severity, subject: subject.to_owned(), problem: problem.into(), mend: mend.into(), lagging: false }
}

/// The same finding, resting on the broker's statistics.
fn lagging(finding: Finding) -> Finding {
    Finding { lagging: true, ..finding }
}

impl Exam<'_> {
    fn addresses(&self, findings: &mut Vec<Finding>) {
        let ours = shell(&format!("^{}\\.", quoted(self.wanted.names.prefix())));
        for address in self.facts.addresses.iter().filter(|address| !address.is_loopback()) {
            let authority = address.authority();
            if !address.tls {
                findings.push(finding(
                    Severity::Red,
                    &authority,
                    "the address is amqp:// to another machine: the password and every task travel in plain text",
                    format!(
                        "enable TLS on the broker and set broker.urls to amqps://{}:5671/… (broker.ca_file for an \
                         authority of your own)",
                        address.host
                    ),
                ));
            }
            if address.user == "guest" {
                findings.push(finding(
                    Severity::Red,
                    &authority,
                    "the user is guest, whom everybody knows and whom brokers refuse from other machines",
                    format!(
                        "haul topology users prints users of your own; for one machine: rabbitmqctl add_user haul && \
                         rabbitmqctl set_permissions --vhost {} haul {ours} {ours} {ours}, then put that user into \
                         broker.urls",
                        shell(&self.facts.vhost)
                    ),
                ));
            }
        }
    }

    fn version(&self, findings: &mut Vec<Finding>) {
        match self.facts.version {
            None => findings.push(finding(
                Severity::Yellow,
                "broker",
                "it does not tell its version, so version-dependent settings were not examined",
                "rabbitmqctl version",
            )),
            Some(version) if version < Version::OLDEST => findings.push(finding(
                Severity::Red,
                "broker",
                format!("version {version} is not supported: before {} retries can be lost", Version::OLDEST),
                format!("upgrade RabbitMQ to {} or later", Version::RECOMMENDED),
            )),
            Some(version) if version < Version::RECOMMENDED => findings.push(finding(
                Severity::Yellow,
                "broker",
                format!("version {version} works, but {} or later is recommended", Version::RECOMMENDED),
                format!("upgrade RabbitMQ to {} or later", Version::RECOMMENDED),
            )),
            Some(_) => {}
        }
    }

    fn objects(&self, findings: &mut Vec<Finding>) {
        let missing: HashSet<&str> = self.facts.missing.iter().map(String::as_str).collect();
        let is_missing = |name: &str| missing.contains(name);
        for item in plan(self.wanted, self.facts) {
            // A binding goes with its exchange and its queue, which are findings of their own.
            if item.what == "binding" && item.name.split(BINDS).any(is_missing) {
                continue;
            }
            match &item.state {
                State::Equal | State::Unknown => {}
                State::Missing if item.what == "policy" => findings.push(self.policy(&item, "it is missing")),
                State::Differs { how } if item.what == "policy" => findings.push(self.policy(&item, how)),
                State::Missing => findings.push(finding(
                    Severity::Red,
                    &item.name,
                    match item.what {
                        "binding" => format!("the binding with key {:?} is missing", item.detail),
                        what => format!("the {what} is missing"),
                    },
                    self.apply(&item.name),
                )),
                State::Differs { how } => findings.push(self.differing(&item, how)),
            }
        }
    }

    fn policy(&self, item: &Item, problem: &str) -> Finding {
        let policies = self.facts.version.map(|version| self.wanted.policies(version)).unwrap_or_default();
        let mend = policies.iter().find(|policy| policy.name == item.name);
        let mend = mend.map(|policy| set_policy_command(policy, &self.facts.vhost)).unwrap_or_default();
        finding(Severity::Red, &format!("policy {}", item.name), problem, mend)
    }

    fn differing(&self, item: &Item, how: &str) -> Finding {
        let problem = if how.contains("x-dead-letter-exchange") && how.contains("missing") {
            format!("it has no dead-letter exchange: what it gives up is lost ({how})")
        } else {
            format!("it differs from the contract: {how}")
        };
        let mend = if item.what == "queue" { migrate(&item.name) } else { exchange_mend(self.facts, &item.name) };
        finding(Severity::Red, &item.name, problem, mend)
    }

    /// What is put aside is not where it should be.
    fn left_by_a_migration(&self, inventory: &Inventory, findings: &mut Vec<Finding>) {
        let aside = self.wanted.names.migration();
        let of = |name: &str| name.strip_prefix(&aside)?.split_once('.').map(|(_, queue)| queue.to_owned());
        let queues = inventory.queues.iter().map(|queue| &queue.name);
        let exchanges = inventory.exchanges.iter().map(|exchange| &exchange.name);
        let mut left: Vec<_> = queues.chain(exchanges).filter_map(|name| of(name)).collect();
        left.sort();
        left.dedup();
        findings.extend(left.iter().map(|queue| {
            let problem = "it is being made anew by haul topology migrate, or was and that was interrupted: messages of it may \
                           be put aside";
            finding(Severity::Red, queue, problem, migrate(queue))
        }));
    }

    fn consumers(&self, findings: &mut Vec<Finding>) {
        // Of a queue with a single active consumer AMQP counts that one only; the API lists those who wait too.
        let mut listed: HashMap<&str, usize> = HashMap::new();
        if let Told::Yes(inventory) = &self.facts.inventory {
            for consumer in &inventory.consumers {
                *listed.entry(&consumer.queue).or_default() += 1;
            }
        }
        for node in &self.facts.nodes {
            let queue = self.wanted.names.node(node);
            let Some(depth) = self.facts.depths.get(&queue) else { continue };
            let listed = listed.get(queue.as_str()).copied().unwrap_or_default();
            match listed.max(depth.consumers as usize) {
                0 => findings.push(finding(
                    Severity::Yellow,
                    &queue,
                    format!("no agent consumes it, and {} tasks wait", depth.messages),
                    format!("start `haul worker` on {node}"),
                )),
                1 => {}
                several => findings.push(self.second_consumer(&queue, several)),
            }
        }
    }

    fn second_consumer(&self, queue: &str, consumers: usize) -> Finding {
        let waiting: Vec<_> = match &self.facts.inventory {
            Told::Yes(inventory) => {
                let here = inventory.consumers.iter().filter(|one| one.queue == queue && !one.active);
                here.map(|one| format!("{} ({})", one.connection, one.tag)).collect()
            }
            Told::No(_) => Vec::new(),
        };
        let list = if waiting.is_empty() { String::new() } else { format!("; waiting: {}", waiting.join(", ")) };
        finding(
            Severity::Yellow,
            queue,
            format!(
                "it has {consumers} consumers: a second agent of the same name, or the ghost of an earlier one{list}"
            ),
            format!(
                "rabbitmqctl list_consumers --vhost {} queue_name channel_pid consumer_tag active, then stop that \
                 agent or close its connection: rabbitmqctl close_connection PID 'not the owner'",
                shell(&self.facts.vhost)
            ),
        )
    }

    fn dead_letters(&self, findings: &mut Vec<Finding>) {
        let queue = self.wanted.names.dead();
        if let Some(depth) = self.facts.depths.get(&queue).filter(|depth| depth.messages > 0) {
            findings.push(finding(
                Severity::Info,
                &queue,
                format!("{} dead letters wait for a decision", depth.messages),
                "haul dead list",
            ));
        }
    }

    fn alarms(&self, inventory: &Inventory, findings: &mut Vec<Finding>) {
        let nodes = match &inventory.nodes {
            Told::Yes(nodes) => nodes,
            Told::No(reason) => {
                let problem = format!("alarms could not be examined: {reason}");
                findings.push(finding(Severity::Yellow, "broker", problem, self.tags()));
                return;
            }
        };
        for node in nodes {
            let mut alarm = |raised: bool, problem: &str, mend: &str| {
                if raised {
                    findings.push(finding(Severity::Red, &node.name, problem, mend));
                }
            };
            let on = shell(&node.name);
            alarm(
                node.mem_alarm,
                "its memory alarm is raised: nobody can publish",
                &format!("rabbitmq-diagnostics -n {on} memory_breakdown, then free memory or raise the watermark"),
            );
            alarm(
                node.disk_free_alarm,
                "its disk alarm is raised: nobody can publish",
                &format!("free space on its data directory; rabbitmq-diagnostics -n {on} alarms"),
            );
            alarm(!node.running, "it does not run", &format!("rabbitmqctl -n {on} start_app"));
            alarm(
                !node.partitions.is_empty(),
                "it cannot see all the other nodes of its cluster",
                &format!("rabbitmqctl -n {on} cluster_status"),
            );
        }
    }

    /// Without the management API.
    fn unseen(&self, reason: &str, findings: &mut Vec<Finding>) {
        let which = if self.facts.nodes.is_empty() { ", and which nodes are enrolled" } else { "" };
        findings.push(finding(
            Severity::Yellow,
            "management API",
            format!(
                "it could not be asked ({reason}), so arguments, bindings, policies, delivery limits, second consumers and alarms were not \
                 examined{which}"
            ),
            format!(
                "rabbitmq-plugins enable rabbitmq_management; {}; set broker.management_url where it is not at {}",
                self.tags(),
                self.facts.management_base.as_deref().unwrap_or("the usual port")
            ),
        ));
    }

    /// The command that lets our user see policies and alarms.
    fn tags(&self) -> String {
        let user = self.facts.addresses.first().map_or("USER", |address| address.user.as_str());
        format!("rabbitmqctl set_user_tags {} monitoring policymaker", shell(user))
    }

    /// The command that makes what is missing; `name` may also be a binding's.
    fn apply(&self, name: &str) -> String {
        let queue = name.rsplit(BINDS).next().unwrap_or(name);
        let prefix = self.wanted.names.prefix();
        let node = [".node.", ".control."]
            .iter()
            .find_map(|infix| queue.strip_prefix(prefix)?.strip_prefix(infix))
            .filter(|name| NodeName::new(*name).is_ok());
        node.map_or_else(|| "haul topology apply".to_owned(), |node| format!("haul topology apply --node {node}"))
    }
}

/// The command that makes a queue anew.
fn migrate(queue: &str) -> String {
    format!("haul topology migrate --queue {}", shell(queue))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use secrecy::SecretString;

    use super::*;
    use crate::{
        broker::{
            Depth, Names,
            address::Address,
            management::{BindingView, ConsumerView, ExchangeView, NodeView, PolicyView, QueueView},
        },
        protocol::wire::HeaderValue,
    };

    fn node() -> NodeName {
        NodeName::new("a").unwrap()
    }

    fn wanted() -> Wanted {
        let names = Names::default();
        Wanted { results: names.master_event(), names, nodes: vec![node()], longest_deadline: Duration::from_mins(25) }
    }

    fn address(text: &str) -> Address {
        Address::parse(&SecretString::from(text)).unwrap()
    }

    /// Facts of a broker that has everything as it should be.
    fn healthy(version: &str) -> Facts {
        let wanted = wanted();
        let version: Version = version.parse().unwrap();
        let topology = wanted.topology(&[node()]);
        let policies = wanted.policies(version);
        let exchange = |exchange: &crate::broker::topology::Exchange| ExchangeView {
            name: exchange.name.clone(),
            kind: format!("{:?}", exchange.kind).to_lowercase(),
            durable: true,
            internal: false,
            arguments: exchange
                .alternate
                .iter()
                .map(|name| ("alternate-exchange".to_owned(), HeaderValue::from(name.as_str())))
                .collect(),
        };
        let queue = |queue: &crate::broker::topology::Queue| {
            let class = if queue.name.starts_with("haul.node.") { "haul-node" } else { "haul-shared" };
            let classic = queue.name.starts_with("haul.control.");
            let policy = policies.iter().find(|policy| policy.name == class && !classic);
            QueueView {
                name: queue.name.clone(),
                kind: if classic { "classic" } else { "quorum" }.to_owned(),
                durable: true,
                arguments: queue.arguments.clone(),
                policy: Some(policy.map(|policy| policy.name.clone())),
                operator_policy: None,
                effective: policy.map(|policy| policy.definition.clone()).unwrap_or_default(),
                state: Some("running".to_owned()),
            }
        };
        let binding = |binding: &crate::broker::topology::Binding| BindingView {
            source: binding.exchange.clone(),
            destination: binding.queue.clone(),
            destination_type: "queue".to_owned(),
            routing_key: binding.routing_key.clone(),
            arguments: BTreeMap::new(),
        };
        let depth = |messages, consumers| Depth { messages, consumers };
        Facts {
            addresses: vec![address("amqp://haul:secret@127.0.0.1/")],
            version: Some(version),
            nodes: vec![node()],
            missing: Vec::new(),
            depths: BTreeMap::from([("haul.node.a".to_owned(), depth(0, 1)), ("haul.dead".to_owned(), depth(0, 0))]),
            inventory: Told::Yes(Inventory {
                version: Some(version),
                exchanges: topology.exchanges.iter().map(exchange).collect(),
                queues: topology.queues.iter().map(queue).collect(),
                bindings: topology.bindings.iter().map(binding).collect(),
                consumers: Vec::new(),
                policies: Told::Yes(policies.clone()),
                nodes: Told::Yes(vec![NodeView {
                    name: "rabbit@localhost".to_owned(),
                    running: true,
                    ..NodeView::default()
                }]),
                ..Inventory::default()
            }),
            management_base: Some("http://127.0.0.1:15672".to_owned()),
            vhost: "/".to_owned(),
            consumer_timeout: Duration::from_mins(30),
        }
    }

    /// The findings after a fault was planted into a healthy broker.
    fn after(version: &str, plant: impl FnOnce(&mut Facts)) -> Vec<Finding> {
        let mut facts = healthy(version);
        plant(&mut facts);
        examine(&wanted(), &facts)
    }

    fn inventory(facts: &mut Facts) -> &mut Inventory {
        match &mut facts.inventory {
            Told::Yes(inventory) => inventory,
            Told::No(_) => panic!("there is no inventory"),
        }
    }

    fn queue<'a>(facts: &'a mut Facts, name: &str) -> &'a mut QueueView {
        inventory(facts).queues.iter_mut().find(|queue| queue.name == name).unwrap()
    }

    /// The one finding there is.
    fn only(findings: Vec<Finding>, severity: Severity, subject: &str, problem: &str, mend: &str) {
        assert_eq!(findings.len(), 1, "{findings:#?}");
        let found = &findings[0];
        assert_eq!((found.severity, found.subject.as_str()), (severity, subject), "{found:#?}");
        assert!(found.problem.contains(problem), "{found:#?}");
        assert!(found.mend.contains(mend), "{found:#?}");
    }

    const NEW: &str = "4.3.6";

    #[test]
    fn a_broker_that_is_as_it_should_be_has_no_findings() {
        assert_eq!(after(NEW, |_| {}), []);
    }

    #[test]
    fn an_old_version_is_named() {
        only(after("3.10.8", |_| {}), Severity::Yellow, "broker", "recommended", "upgrade");
        only(after("4.3.2", |_| {}), Severity::Yellow, "broker", "recommended", "upgrade");
        only(after("3.9.29", |_| {}), Severity::Red, "broker", "not supported", "upgrade");
    }

    #[test]
    fn plain_text_and_the_default_user_are_red_on_another_machine_only() {
        let remote = |text: &'static str| after(NEW, |facts| facts.addresses = vec![address(text)]);
        only(remote("amqp://haul:x@mq.example/"), Severity::Red, "mq.example:5672", "plain text", "amqps://mq.example");
        only(remote("amqps://guest:x@mq.example/"), Severity::Red, "mq.example:5671", "guest", "'^haul\\.'");
        assert_eq!(remote("amqps://haul:x@mq.example/"), []);
        assert_eq!(remote("amqp://guest:guest@[::1]/"), []);
    }

    #[test]
    fn what_is_missing_is_named_with_its_command() {
        let missing = |name: &'static str| after(NEW, |facts| facts.missing = vec![name.to_owned()]);
        only(missing("haul.event"), Severity::Red, "haul.event", "exchange is missing", "haul topology apply");
        only(missing("haul.node.a"), Severity::Red, "haul.node.a", "queue is missing", "haul topology apply --node a");
        only(
            missing("haul.control.a"),
            Severity::Red,
            "haul.control.a",
            "queue is missing",
            "haul topology apply --node a",
        );
    }

    #[test]
    fn a_missing_binding_is_named() {
        let without = |queue: &'static str, key: &'static str| {
            after(NEW, |facts| {
                inventory(facts)
                    .bindings
                    .retain(|binding| !(binding.destination == queue && binding.routing_key == key));
            })
        };
        let subject = "haul.event → haul.master.event";
        only(without("haul.master.event", "*.*.failed"), Severity::Red, subject, "*.*.failed", "haul topology apply");
        let both = without("haul.node.a", "a");
        assert_eq!(both.len(), 2);
        assert!(both.iter().all(|finding| finding.mend == "haul topology apply --node a"));
    }

    #[test]
    fn a_queue_without_a_dead_letter_exchange_is_red() {
        let findings = after(NEW, |facts| {
            queue(facts, "haul.node.a").arguments.remove("x-dead-letter-exchange");
        });
        let mend = "haul topology migrate --queue haul.node.a";
        only(findings, Severity::Red, "haul.node.a", "no dead-letter exchange", mend);
    }

    #[test]
    fn other_arguments_than_the_contracts_are_red() {
        let findings = after(NEW, |facts| {
            queue(facts, "haul.retry.5s").arguments.insert("x-message-ttl".to_owned(), 6000.into());
        });
        only(
            findings,
            Severity::Red,
            "haul.retry.5s",
            "x-message-ttl is 6000, not 5000",
            "migrate --queue haul.retry.5s",
        );
        let findings = after(NEW, |facts| {
            queue(facts, "haul.node.a").arguments.insert("x-max-length".to_owned(), 10.into());
        });
        only(findings, Severity::Red, "haul.node.a", "it has x-max-length=10", "migrate");
        let findings = after(NEW, |facts| {
            let exchange = inventory(facts).exchanges.iter_mut().find(|one| one.name == "haul.return").unwrap();
            exchange.arguments.clear();
        });
        only(
            findings,
            Severity::Red,
            "haul.return",
            "alternate-exchange=haul.dlx is missing",
            "/api/exchanges/%2F/haul",
        );
    }

    #[test]
    fn what_a_migration_left_aside_is_red() {
        let findings = after(NEW, |facts| {
            let aside = ["old", "new"].map(|part| QueueView {
                name: format!("haul.migrate.{part}.haul.node.a"),
                kind: "quorum".to_owned(),
                ..QueueView::default()
            });
            inventory(facts).queues.extend(aside);
        });
        only(findings, Severity::Red, "haul.node.a", "put aside", "haul topology migrate --queue haul.node.a");
    }

    #[test]
    fn a_missing_policy_is_red_with_the_command_that_sets_it() {
        let findings = after(NEW, |facts| {
            inventory(facts).policies = Told::Yes(Vec::new());
        });
        assert_eq!(findings.len(), 2);
        assert!(findings[0].mend.starts_with("rabbitmqctl set_policy --vhost / --priority 50 --apply-to queues haul-"));
    }

    #[test]
    fn a_policy_that_another_one_hides_is_red() {
        let findings = after(NEW, |facts| {
            let catch_all = PolicyView {
                name: "ha-all".to_owned(),
                pattern: ".*".to_owned(),
                priority: 90,
                apply_to: "all".to_owned(),
                ..PolicyView::default()
            };
            let Told::Yes(policies) = &mut inventory(facts).policies else { panic!("policies are told") };
            policies.push(catch_all);
            queue(facts, "haul.dead").policy = Some(Some("ha-all".to_owned()));
        });
        only(findings, Severity::Red, "haul.dead", "haul-shared is ignored, since ha-all applies", "--priority 100");
    }

    #[test]
    fn a_delivery_limit_in_force_is_red() {
        let findings = after(NEW, |facts| {
            let queue = queue(facts, "haul.dead");
            queue.effective.insert("delivery-limit".to_owned(), 20.into());
        });
        only(findings, Severity::Red, "haul.dead", "a delivery limit of 20", "set_policy");
        let findings = after("3.13.7", |facts| {
            let queue = queue(facts, "haul.dead");
            queue.policy = Some(Some("limits".to_owned()));
            queue.effective.insert("delivery-limit".to_owned(), 5.into());
        });
        let red: Vec<_> = findings.into_iter().filter(|finding| finding.severity == Severity::Red).collect();
        only(red, Severity::Red, "haul.dead", "a delivery limit of 5", "clear_policy --vhost / limits");
    }

    #[test]
    fn a_policy_that_lets_messages_go_is_red() {
        let findings = after(NEW, |facts| {
            queue(facts, "haul.node.a").effective.insert("message-ttl".to_owned(), 1000.into());
        });
        only(findings, Severity::Red, "haul.node.a", "message-ttl=1000", "take message-ttl out");
    }

    #[test]
    fn a_consumer_timeout_below_the_longest_deadline_is_red() {
        let short = |facts: &mut Facts| facts.consumer_timeout = Duration::from_mins(20);
        let red = |findings: Vec<Finding>| {
            findings.into_iter().filter(|finding| finding.severity == Severity::Red).collect::<Vec<_>>()
        };
        // The policy of a new broker speaks for itself.
        assert_eq!(after(NEW, short), []);
        only(red(after("3.10.8", short)), Severity::Red, "haul.node.a", "20 min", "consumer_timeout = 1800000");
        let policy = |facts: &mut Facts| {
            queue(facts, "haul.node.a").effective.insert("consumer-timeout".to_owned(), 60_000.into());
        };
        only(after(NEW, policy), Severity::Red, "haul.node.a", "1 min", "set_policy");
        let none = |facts: &mut Facts| facts.consumer_timeout = Duration::ZERO;
        assert_eq!(red(after("3.10.8", none)), []);
    }

    #[test]
    fn consumers_are_exactly_one() {
        let consumers = |tags: &'static [&'static str]| {
            after(NEW, |facts| {
                let active = u32::from(!tags.is_empty());
                facts.depths.insert("haul.node.a".to_owned(), Depth { messages: 3, consumers: active });
                let consumer = |(place, tag): (usize, &&str)| ConsumerView {
                    queue: "haul.node.a".to_owned(),
                    tag: (*tag).to_owned(),
                    connection: format!("10.0.0.{place}:4 -> 10.0.0.9:5672"),
                    active: place == 0,
                };
                inventory(facts).consumers = tags.iter().enumerate().map(consumer).collect();
            })
        };
        only(consumers(&[]), Severity::Yellow, "haul.node.a", "no agent consumes it, and 3 tasks wait", "haul worker");
        assert_eq!(consumers(&["haul-1"]), []);
        let two = consumers(&["haul-1", "haul-2"]);
        only(two, Severity::Yellow, "haul.node.a", "waiting: 10.0.0.1:4 -> 10.0.0.9:5672 (haul-2)", "close_connection");
    }

    #[test]
    fn dead_letters_are_worth_a_word_but_no_alarm() {
        let findings = after(NEW, |facts| {
            facts.depths.insert("haul.dead".to_owned(), Depth { messages: 7, consumers: 0 });
        });
        only(findings, Severity::Info, "haul.dead", "7 dead letters", "haul dead list");
    }

    #[test]
    fn alarms_are_red() {
        let findings = after(NEW, |facts| {
            let Told::Yes(nodes) = &mut inventory(facts).nodes else { panic!("nodes are told") };
            nodes[0].mem_alarm = true;
        });
        only(findings, Severity::Red, "rabbit@localhost", "memory alarm", "memory_breakdown");
    }

    #[test]
    fn what_cannot_be_seen_is_said() {
        let findings = after(NEW, |facts| facts.inventory = Told::No("connection refused".to_owned()));
        only(findings, Severity::Yellow, "management API", "connection refused", "rabbitmq-plugins enable");
        let findings = after(NEW, |facts| {
            let inventory = inventory(facts);
            inventory.policies = Told::No("401".to_owned());
            inventory.nodes = Told::No("401".to_owned());
        });
        assert_eq!(findings.len(), 2);
        assert!(findings.iter().all(|finding| {
            finding.severity == Severity::Yellow && finding.mend.contains("set_user_tags haul monitoring policymaker")
        }));
    }
}
