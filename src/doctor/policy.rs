//! The policies that our queues need, by the broker's version.
//!
//! One policy applies to a queue, so there is one merged policy for each class of queue, with only the keys that the
//! version knows: an unknown key would refuse the whole policy.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    broker::{Names, management::PolicyView, version::Version},
    protocol::wire::HeaderValue,
};

/// Above the catch-all policies that broker operators usually have.
const PRIORITY: i64 = 50;
/// How long a queue waits for consumers whose node of the cluster is gone.
const DISCONNECTED: Duration = Duration::from_secs(3);
/// What an attempt may take besides its deadline: waiting in the agent, stopping children, settling.
pub const DEADLINE_MARGIN: Duration = Duration::from_mins(5);

/// The policies that this version of the broker should have; none before 3.12, which needs none.
#[must_use]
pub fn wanted_policies(names: &Names, results: &str, longest: Duration, version: Version) -> Vec<PolicyView> {
    let mut definition = BTreeMap::new();
    if version.limits_deliveries() {
        // Crashes are counted by the agent; a limit of the broker would drop tasks and dead letters.
        definition.insert("delivery-limit".to_owned(), HeaderValue::Int(-1));
    }
    if version.keeps_places_of_the_disconnected() {
        // A minute by default, in which a single active consumer that is gone with its node keeps its place.
        definition.insert("consumer-disconnected-timeout".to_owned(), HeaderValue::Int(millis(DISCONNECTED)));
    }
    let prefix = quoted(names.prefix());
    let mut policies = Vec::new();
    let mut class = |name: &str, pattern: String, definition: BTreeMap<String, HeaderValue>| {
        if !definition.is_empty() {
            policies.push(PolicyView {
                name: format!("{}-{name}", names.prefix()),
                pattern,
                definition,
                priority: PRIORITY,
                apply_to: "queues".to_owned(),
            });
        }
    };
    let mut tasks = definition.clone();
    if version.has_consumer_timeout_policy() {
        tasks.insert("consumer-timeout".to_owned(), HeaderValue::Int(millis(needed_timeout(longest))));
    }
    class("node", format!("^{prefix}\\.node\\."), tasks);
    let master = quoted(results);
    let others = if results.is_empty() { String::new() } else { format!("|^{master}$") };
    class("shared", format!("^{prefix}\\.(dead$|retry\\.|migrate\\.){others}"), definition);
    policies
}

/// The consumer timeout that a node's queue needs: never below the broker's own default.
#[must_use]
pub fn needed_timeout(longest: Duration) -> Duration {
    (longest + DEADLINE_MARGIN).max(Duration::from_mins(30))
}

/// The command that sets a policy.
#[must_use]
pub fn set_policy_command(policy: &PolicyView, vhost: &str) -> String {
    format!(
        "rabbitmqctl set_policy --vhost {} --priority {} --apply-to {} {} {} {}",
        shell(vhost),
        policy.priority,
        shell(&policy.apply_to),
        shell(&policy.name),
        shell(&policy.pattern),
        shell(&serde_json::to_string(&policy.definition).unwrap_or_default()),
    )
}

/// A word as a shell takes it.
#[must_use]
pub(super) fn shell(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/' | b':' | b',' | b'@' | b'%');
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// A name as it stands in a pattern for itself.
pub(super) fn quoted(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for c in name.chars() {
        if !(c.is_alphanumeric() || matches!(c, '_' | '-')) {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_mins(25);

    fn policies(version: &str) -> Vec<PolicyView> {
        let names = Names::default();
        wanted_policies(&names, &names.master_event(), LONGEST, version.parse().unwrap())
    }

    #[test]
    fn each_class_of_queue_gets_what_its_version_knows_and_nothing_else() {
        let unlimited = ("delivery-limit".to_owned(), HeaderValue::Int(-1));
        let gone = ("consumer-disconnected-timeout".to_owned(), HeaderValue::Int(3000));
        let patient = ("consumer-timeout".to_owned(), HeaderValue::Int(30 * 60 * 1000));
        // An unknown key would refuse the whole policy, and a limit of -1 drops messages before 4.0.
        for (version, tasks, shared) in [
            ("3.10.8", vec![], vec![]),
            ("3.11.28", vec![], vec![]),
            ("3.12.0", vec![patient.clone()], vec![]),
            ("3.13.7", vec![patient.clone()], vec![]),
            ("4.0.5", vec![patient.clone(), unlimited.clone()], vec![unlimited.clone()]),
            ("4.2.1", vec![patient.clone(), unlimited.clone()], vec![unlimited.clone()]),
            ("4.3.6", vec![gone.clone(), patient, unlimited.clone()], vec![gone, unlimited]),
        ] {
            let wanted: Vec<_> = [("haul-node", tasks), ("haul-shared", shared)]
                .into_iter()
                .filter(|(_, keys)| !keys.is_empty())
                .map(|(name, keys)| (name.to_owned(), BTreeMap::from_iter(keys), 50, "queues".to_owned()))
                .collect();
            let found: Vec<_> = policies(version)
                .into_iter()
                .map(|policy| (policy.name, policy.definition, policy.priority, policy.apply_to))
                .collect();
            assert_eq!(found, wanted, "{version}");
        }
    }

    #[test]
    fn patterns_match_our_names_only_and_commands_survive_a_shell() {
        let shared = &policies("4.3.6")[1];
        assert_eq!(shared.pattern, r"^haul\.(dead$|retry\.|migrate\.)|^haul\.master\.event$");
        assert_eq!(
            set_policy_command(shared, "/"),
            r#"rabbitmqctl set_policy --vhost / --priority 50 --apply-to queues haul-shared '^haul\.(dead$|retry\.|migrate\.)|^haul\.master\.event$' '{"consumer-disconnected-timeout":3000,"delivery-limit":-1}'"#
        );
        assert_eq!(shell("a'b c"), r"'a'\''b c'");
    }

    #[test]
    fn the_timeout_leaves_room_after_the_longest_deadline() {
        assert_eq!(needed_timeout(LONGEST), Duration::from_mins(30));
        assert_eq!(needed_timeout(Duration::from_hours(1)), Duration::from_mins(65));
    }
}
