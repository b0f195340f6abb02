//! What is wrong, and what mends it: a pure function of the facts.

use std::time::Duration;

use super::{
    Facts, Finding, Item, Severity, State, Wanted,
    plan::plan,
    policy::{DEADLINE_MARGIN, needed_timeout, set_policy_command, shell},
};
use crate::{
    broker::{
        management::{DeliveryLimit, Inventory, QueueView, Told},
        version::Version,
    },
    protocol::{NodeName, wire::HeaderValue},
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
                        "rabbitmqctl add_user haul && rabbitmqctl set_permissions --vhost {} haul '^haul\\.' \
                         '^haul\\.' '^haul\\.', then put that user into broker.urls",
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
        for item in plan(self.wanted, self.facts) {
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
        let vhost = shell(&self.facts.vhost);
        let apply = self.apply(&item.name);
        let problem = if how.contains("x-dead-letter-exchange") && how.contains("missing") {
            format!("it has no dead-letter exchange: what it gives up is lost ({how})")
        } else {
            format!("it differs from the contract: {how}")
        };
        let mend = if item.what == "queue" {
            let name = shell(&item.name);
            format!("rabbitmqctl delete_queue --vhost {vhost} --if-empty {name} && {apply}")
        } else {
            let base = self.facts.management_base.as_deref().unwrap_or("http://localhost:15672");
            let encoded = |text: &str| {
                percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
            };
            format!(
                "curl -u USER -X DELETE {base}/api/exchanges/{}/{} && {apply}",
                encoded(&self.facts.vhost),
                encoded(&item.name)
            )
        };
        finding(Severity::Red, &item.name, problem, mend)
    }

    fn queues(&self, inventory: &Inventory, findings: &mut Vec<Finding>) {
        let topology = self.wanted.topology(&self.facts.nodes);
        let dead = self.wanted.names.dead();
        for wanted in &topology.queues {
            let Some(queue) = inventory.queues.iter().find(|queue| queue.name == wanted.name) else { continue };
            let is_quorum = queue.arguments.get("x-queue-type").and_then(HeaderValue::as_text) == Some("quorum");
            if is_quorum {
                self.policy_in_force(queue, inventory, findings);
                self.delivery_limit(queue, queue.name == dead, findings);
            }
            Self::dangerous_policy(queue, findings);
            if let Some(state) = queue.state.as_deref().filter(|&state| !matches!(state, "running" | "idle" | "flow")) {
                findings.push(lagging(finding(
                    Severity::Red,
                    &queue.name,
                    format!("its state is {state}: no majority of its replicas answers"),
                    format!("rabbitmq-queues quorum_status --vhost {} {}", shell(&self.facts.vhost), shell(&queue.name)),
                )));
            }
        }
        if let Told::No(reason) = &inventory.policies {
            findings.push(finding(
                Severity::Yellow,
                "policies",
                format!("they could not be examined: {reason}"),
                self.tags(),
            ));
        }
    }

    /// Our policy exists, but another one is applied.
    fn policy_in_force(&self, queue: &QueueView, inventory: &Inventory, findings: &mut Vec<Finding>) {
        let Some(wanted) = self.policy_of(&queue.name) else { return };
        let Told::Yes(policies) = &inventory.policies else { return };
        // Without it the missing policy is a finding of its own.
        let Some(ours) = policies.iter().find(|policy| policy.name == wanted.name) else { return };
        match &queue.policy {
            None => {}
            Some(Some(name)) if *name == wanted.name => {}
            Some(other) => {
                let other = other.as_deref().unwrap_or("none");
                let above = policies.iter().find(|policy| policy.name == other).map(|policy| policy.priority);
                let mut raised = wanted;
                raised.priority = above.unwrap_or(ours.priority).saturating_add(10).max(raised.priority);
                findings.push(lagging(finding(
                    Severity::Red,
                    &queue.name,
                    format!(
                        "our policy {} is ignored, since {other} applies (priority {} against {}); a queue takes one \
                         policy only",
                        raised.name,
                        above.map_or_else(|| "unknown".to_owned(), |priority| priority.to_string()),
                        ours.priority
                    ),
                    set_policy_command(&raised, &self.facts.vhost),
                )));
            }
        }
    }

    fn delivery_limit(&self, queue: &QueueView, is_dead: bool, findings: &mut Vec<Finding>) {
        let consequence = if is_dead {
            "reading the dead letters spends it, and then they are lost"
        } else {
            "crashes of an agent spend it, and then the broker takes the task away from us"
        };
        match queue.delivery_limit(self.facts.version) {
            DeliveryLimit::None => {}
            DeliveryLimit::Unknown => findings.push(lagging(finding(
                Severity::Yellow,
                &queue.name,
                "the broker does not tell whether a delivery limit is in force",
                "haul topology doctor",
            ))),
            DeliveryLimit::Of(limit) => {
                let vhost = shell(&self.facts.vhost);
                let mend = if queue.arguments.contains_key("x-delivery-limit") {
                    let name = shell(&queue.name);
                    format!("rabbitmqctl delete_queue --vhost {vhost} --if-empty {name} && {}", self.apply(&queue.name))
                } else if let Some(policy) = self.policy_of(&queue.name) {
                    set_policy_command(&policy, &self.facts.vhost)
                } else if let Some(Some(policy)) = &queue.policy {
                    format!(
                        "take delivery-limit out of policy {policy}: rabbitmqctl clear_policy --vhost {vhost} {}",
                        shell(policy)
                    )
                } else {
                    let policy = queue.operator_policy.as_deref().unwrap_or("NAME");
                    format!("rabbitmqctl clear_operator_policy --vhost {vhost} {}", shell(policy))
                };
                findings.push(lagging(finding(
                    Severity::Red,
                    &queue.name,
                    format!("a delivery limit of {limit} is in force: {consequence}"),
                    mend,
                )));
            }
        }
    }

    /// What a policy of somebody else may do to our queues.
    fn dangerous_policy(queue: &QueueView, findings: &mut Vec<Finding>) {
        for (key, consequence) in [
            ("message-ttl", "messages leave before anybody handled them"),
            ("expires", "the queue is deleted when nobody uses it"),
            ("max-length", "it refuses messages at that length"),
            ("max-length-bytes", "it refuses messages at that size"),
        ] {
            let Some(value) = queue.effective.get(key) else { continue };
            let by = queue.policy.clone().flatten().or_else(|| queue.operator_policy.clone());
            let by = by.unwrap_or_else(|| "a policy".to_owned());
            findings.push(lagging(finding(
                if key.starts_with("max") { Severity::Yellow } else { Severity::Red },
                &queue.name,
                format!("policy {by} sets {key}={value}: {consequence}"),
                format!("take {key} out of {by}, or narrow its pattern: rabbitmqctl list_policies"),
            )));
        }
    }

    fn consumer_timeout(&self, findings: &mut Vec<Finding>) {
        let needed = self.wanted.longest_deadline + DEADLINE_MARGIN;
        let seen = |queue: &str| match &self.facts.inventory {
            Told::Yes(inventory) => inventory.queues.iter().find(|found| found.name == queue).and_then(|found| {
                let policy = found.effective.get("consumer-timeout");
                let value = found.arguments.get("x-consumer-timeout").or(policy)?.as_int()?;
                Some(Duration::from_millis(u64::try_from(value).ok()?))
            }),
            Told::No(_) => None,
        };
        let mut short: Vec<(Duration, String)> = Vec::new();
        for node in &self.facts.nodes {
            let queue = self.wanted.names.node(node);
            let timeout = seen(&queue).unwrap_or(self.facts.consumer_timeout);
            if !timeout.is_zero() && timeout < needed {
                short.push((timeout, queue));
            }
        }
        // A fleet without nodes is warned by the broker's own value.
        let own = self.facts.consumer_timeout;
        if self.facts.nodes.is_empty() && !own.is_zero() && own < needed {
            short.push((own, "broker".to_owned()));
        }
        for (timeout, subject) in short {
            let policy = self.policy_of(&self.wanted.names.node(&any_node()));
            let mend = match policy.filter(|policy| policy.definition.contains_key("consumer-timeout")) {
                Some(policy) => set_policy_command(&policy, &self.facts.vhost),
                None => {
                    let millis = needed_timeout(self.wanted.longest_deadline).as_millis();
                    format!(
                        "put consumer_timeout = {millis} into rabbitmq.conf, now: rabbitmqctl eval \
                         'application:set_env(rabbit, consumer_timeout, {millis}).', and set broker.consumer_timeout \
                         alike; or lower git.max_timeout"
                    )
                }
            };
            findings.push(lagging(finding(
                Severity::Red,
                &subject,
                format!(
                    "the consumer timeout is {}, shorter than the longest deadline of a task with its margin ({} + {}): \
                     the broker would take the consumer away while a task runs",
                    human(timeout),
                    human(self.wanted.longest_deadline),
                    human(DEADLINE_MARGIN)
                ),
                mend,
            )));
        }
    }

    fn consumers(&self, findings: &mut Vec<Finding>) {
        for node in &self.facts.nodes {
            let queue = self.wanted.names.node(node);
            let Some(depth) = self.facts.depths.get(&queue) else { continue };
            if depth.consumers == 0 {
                findings.push(finding(
                    Severity::Yellow,
                    &queue,
                    format!("no agent consumes it, and {} tasks wait", depth.messages),
                    format!("start `haul worker` on {node}"),
                ));
            } else if depth.consumers > 1 {
                findings.push(self.second_consumer(&queue, depth.consumers));
            }
        }
    }

    fn second_consumer(&self, queue: &str, consumers: u32) -> Finding {
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
            format!("it has {consumers} consumers: a second agent of the same name, or the ghost of an earlier one{list}"),
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
                "it could not be asked ({reason}), so arguments, bindings, policies, delivery limits and alarms were not \
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

    /// The policy of ours that a queue should have on this version.
    fn policy_of(&self, queue: &str) -> Option<crate::broker::management::PolicyView> {
        let class = if self.node_of(queue).is_some() { "node" } else { "shared" };
        let name = format!("{}-{class}", self.wanted.names.prefix());
        self.wanted.policies(self.facts.version?).into_iter().find(|policy| policy.name == name)
    }

    /// The node whose queue of tasks it is.
    fn node_of(&self, queue: &str) -> Option<NodeName> {
        let name = queue.strip_prefix(self.wanted.names.prefix())?.strip_prefix(".node.")?;
        NodeName::new(name).ok()
    }

    /// The command that makes what is missing; `name` may also be a binding's.
    fn apply(&self, name: &str) -> String {
        let queue = name.rsplit(" → ").next().unwrap_or(name);
        let prefix = self.wanted.names.prefix();
        let node = [".node.", ".control."]
            .iter()
            .find_map(|infix| queue.strip_prefix(prefix)?.strip_prefix(infix))
            .filter(|name| NodeName::new(*name).is_ok());
        node.map_or_else(|| "haul topology apply".to_owned(), |node| format!("haul topology apply --node {node}"))
    }
}

/// Some node: all have the same policy.
fn any_node() -> NodeName {
    NodeName::new("any").expect("the name keeps to its alphabet")
}

/// A time in its largest whole unit.
fn human(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 => format!("{} ms", time.as_millis()),
        _ if seconds.is_multiple_of(3600) => format!("{} h", seconds / 3600),
        _ if seconds.is_multiple_of(60) => format!("{} min", seconds / 60),
        _ => format!("{seconds} s"),
    }
}
