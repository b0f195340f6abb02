//! What is wrong with queues that exist: policies, delivery limits, timeouts.

use std::{collections::HashMap, time::Duration};

use super::{Exam, finding, lagging, migrate};
use crate::{
    broker::management::{DeliveryLimit, Inventory, PolicyView, QueueView, Told},
    doctor::{
        Finding, Severity,
        policy::{DEADLINE_MARGIN, needed_timeout, set_policy_command, shell},
    },
    protocol::{NodeName, wire::HeaderValue},
};

impl Exam<'_> {
    pub(super) fn queues(&self, inventory: &Inventory, findings: &mut Vec<Finding>) {
        let topology = self.wanted.topology(&self.facts.nodes);
        let dead = self.wanted.names.dead();
        let found: HashMap<&str, &QueueView> =
            inventory.queues.iter().map(|queue| (queue.name.as_str(), queue)).collect();
        for wanted in &topology.queues {
            let Some(&queue) = found.get(wanted.name.as_str()) else { continue };
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
                    format!(
                        "rabbitmq-queues quorum_status --vhost {} {}",
                        shell(&self.facts.vhost),
                        shell(&queue.name)
                    ),
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
                    migrate(&queue.name)
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

    pub(super) fn consumer_timeout(&self, findings: &mut Vec<Finding>) {
        let needed = self.wanted.longest_deadline + DEADLINE_MARGIN;
        let mut told: HashMap<&str, Duration> = HashMap::new();
        if let Told::Yes(inventory) = &self.facts.inventory {
            told.extend(inventory.queues.iter().filter_map(|queue| {
                let policy = queue.effective.get("consumer-timeout");
                let value = queue.arguments.get("x-consumer-timeout").or(policy)?.as_int()?;
                Some((queue.name.as_str(), Duration::from_millis(u64::try_from(value).ok()?)))
            }));
        }
        let mut short: Vec<(Duration, String)> = Vec::new();
        for node in &self.facts.nodes {
            let queue = self.wanted.names.node(node);
            let timeout = told.get(queue.as_str()).copied().unwrap_or(self.facts.consumer_timeout);
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
            let by_policy = policy.filter(|policy| policy.definition.contains_key("consumer-timeout"));
            let millis = needed_timeout(self.wanted.longest_deadline).as_millis();
            let by_hand = format!(
                "put consumer_timeout = {millis} into rabbitmq.conf, now: rabbitmqctl eval \
                 'application:set_env(rabbit, consumer_timeout, {millis}).', and set broker.consumer_timeout alike; or \
                 lower git.max_timeout"
            );
            let mend = by_policy.map_or(by_hand, |policy| set_policy_command(&policy, &self.facts.vhost));
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

    /// The policy of ours that a queue should have on this version.
    fn policy_of(&self, queue: &str) -> Option<PolicyView> {
        let class = if self.node_of(queue).is_some() { "node" } else { "shared" };
        let name = format!("{}-{class}", self.wanted.names.prefix());
        self.wanted.policies(self.facts.version?).into_iter().find(|policy| policy.name == name)
    }

    /// The node whose queue of tasks it is.
    fn node_of(&self, queue: &str) -> Option<NodeName> {
        let name = queue.strip_prefix(self.wanted.names.prefix())?.strip_prefix(".node.")?;
        NodeName::new(name).ok()
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
