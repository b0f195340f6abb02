//! Least privilege on the broker: a user for each node, one for masters, one for operators.
//!
//! RabbitMQ knows three patterns of names for each user: what it may configure, write and read. To bind a queue takes `write`
//! on the queue and `read` on the exchange, whatever the routing key: who may bind its queue to the exchange of tasks may
//! have a copy of everybody's. So a node's user binds nothing unless it is asked to enrol itself. By routing key the broker
//! judges publishes to topic exchanges only, which is what keeps a node from reporting in another's name.

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::policy::{quoted, shell};
use crate::{
    broker::{
        Names,
        management::{PermissionView, TopicPermissionView, base64},
        topology::RETRY_DELAYS,
    },
    protocol::NodeName,
};

/// Matches no name, nor any routing key that is used.
const NOTHING: &str = "^$";

/// Whose user it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserRole {
    /// The agent of a node.
    Node {
        /// The node.
        node: NodeName,
        /// Whether it may make and bind its own two queues. It can then also bind them to the keys of other nodes.
        enrols_itself: bool,
    },
    /// A master: publishes tasks and control messages, reads events.
    Master,
    /// Who looks after the fleet: topology, dead letters, everything a master does.
    Operator,
}

/// A user of the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its tags: what it may ask of the management API.
    pub tags: &'static [&'static str],
    /// What it may do.
    pub permission: PermissionView,
    /// What it may do by routing key.
    pub topic: Option<TopicPermissionView>,
}

impl User {
    /// The user for a role; `results` names the master's queue of events, empty for none.
    #[must_use]
    pub fn new(names: &Names, results: &str, role: &UserRole) -> Self {
        let prefix = quoted(names.prefix());
        let event = quoted(&names.event());
        match role {
            UserRole::Node { node, enrols_itself } => {
                let name = format!("{}-node-{node}", names.prefix());
                let own = format!(r"{prefix}\.(node|control)\.{}", quoted(node.as_str()));
                // To see that the queue is being made anew: a broker shows what exists only to who may do something with it.
                let aside = quoted(&names.set_aside(&names.node(node)));
                let retries: Vec<_> = RETRY_DELAYS.iter().map(|&delay| quoted(&names.retry(delay))).collect();
                let publishes =
                    format!(r"{}|{}|{event}|{}", quoted(&names.task()), quoted(&names.dlx()), retries.join("|"));
                let sources =
                    format!("{}|{}|{}", quoted(&names.task()), quoted(&names.returned()), quoted(&names.control()));
                let permission = if *enrols_itself {
                    [format!("^{own}$"), format!("^({publishes}|{own})$"), format!("^({sources}|{own}|{aside})$")]
                } else {
                    [NOTHING.to_owned(), format!("^({publishes})$"), format!("^({own}|{aside})$")]
                };
                let topic = TopicPermissionView {
                    user: name.clone(),
                    exchange: names.event(),
                    write: format!(r"^{}\.", quoted(node.as_str())),
                    read: NOTHING.to_owned(),
                };
                Self { tags: &[], permission: permitted(name, permission), topic: Some(topic) }
            }
            UserRole::Master => {
                // Followers of events (`--wait`, `haul events`) have a queue that ends with their connection.
                let follow = format!(r"{prefix}\.follow\..*");
                let reads = if results.is_empty() { String::new() } else { format!("|{}", quoted(results)) };
                let permission = [
                    format!("^{follow}$"),
                    format!("^({}|{}|{follow})$", quoted(&names.task()), quoted(&names.control())),
                    format!("^({event}|{follow}{reads})$"),
                ];
                Self { tags: &[], permission: permitted(format!("{}-master", names.prefix()), permission), topic: None }
            }
            UserRole::Operator => {
                let elsewhere = !results.is_empty() && !results.starts_with(&format!("{}.", names.prefix()));
                let also = if elsewhere { format!("|^{}$", quoted(results)) } else { String::new() };
                let all = format!(r"^{prefix}\.{also}");
                Self {
                    tags: &["monitoring", "policymaker"],
                    permission: permitted(format!("{}-operator", names.prefix()), [all.clone(), all.clone(), all]),
                    topic: None,
                }
            }
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.permission.user
    }

    /// The command that adds it. The password is an argument, which the process list shows for a moment: with recent
    /// versions of Erlang `rabbitmqctl` cannot read it from its input.
    #[must_use]
    pub fn add_command(&self, password: &str) -> String {
        format!("rabbitmqctl add_user {} {password}", shell(self.name()))
    }

    /// The commands that give it what it may do, no more.
    #[must_use]
    pub fn permission_commands(&self, vhost: &str) -> Vec<String> {
        let (vhost, name) = (shell(vhost), shell(self.name()));
        let PermissionView { configure, write, read, .. } = &self.permission;
        let [configure, write, read] = [configure, write, read].map(|pattern| shell(pattern));
        let mut commands =
            vec![format!("rabbitmqctl set_permissions --vhost {vhost} {name} {configure} {write} {read}")];
        if let Some(TopicPermissionView { exchange, write, read, .. }) = &self.topic {
            let [exchange, write, read] = [exchange, write, read].map(|word| shell(word));
            commands
                .push(format!("rabbitmqctl set_topic_permissions --vhost {vhost} {name} {exchange} {write} {read}"));
        }
        if !self.tags.is_empty() {
            commands.push(format!("rabbitmqctl set_user_tags {name} {}", self.tags.join(" ")));
        }
        commands
    }
}

fn permitted(user: String, [configure, write, read]: [String; 3]) -> PermissionView {
    PermissionView { user, configure, write, read }
}

/// The users as a file that `rabbitmqctl import_definitions` takes. A user without a hash is expected to exist: only its
/// permissions are in it.
#[must_use]
pub fn definitions<'a>(users: impl IntoIterator<Item = (&'a User, Option<String>)>, vhost: &str) -> Value {
    let (mut logins, mut permissions, mut topics) = (Vec::new(), Vec::new(), Vec::new());
    for (user, hash) in users {
        if let Some(hash) = hash {
            logins.push(json!({
                "name": user.name(),
                "password_hash": hash,
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": user.tags,
            }));
        }
        let PermissionView { user: name, configure, write, read } = &user.permission;
        permissions.push(json!({"user": name, "vhost": vhost, "configure": configure, "write": write, "read": read}));
        if let Some(TopicPermissionView { user: name, exchange, write, read }) = &user.topic {
            topics.push(json!({"user": name, "vhost": vhost, "exchange": exchange, "write": write, "read": read}));
        }
    }
    json!({ "users": logins, "permissions": permissions, "topic_permissions": topics })
}

/// A password as RabbitMQ keeps it: salt, then SHA-256 of salt and password.
#[must_use]
pub fn password_hash(password: &str, salt: [u8; 4]) -> String {
    let digest = Sha256::new().chain_update(salt).chain_update(password.as_bytes()).finalize();
    base64(&[&salt[..], &digest[..]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(role: &UserRole) -> User {
        User::new(&Names::default(), "haul.master.event", role)
    }

    fn node(enrols_itself: bool) -> User {
        user(&UserRole::Node { node: NodeName::new("worker-001").unwrap(), enrols_itself })
    }

    #[test]
    fn a_node_reads_its_own_queues_and_configures_nothing_unless_it_enrols_itself() {
        let strict = node(false);
        assert_eq!(strict.name(), "haul-node-worker-001");
        let retries = r"haul\.retry\.1s|haul\.retry\.5s|haul\.retry\.15s|haul\.retry\.1m|haul\.retry\.5m|haul\.retry\.15m|haul\.retry\.1h";
        let publishes = format!(r"haul\.task|haul\.dlx|haul\.event|{retries}");
        let own = r"haul\.(node|control)\.worker-001";
        assert_eq!(strict.permission.configure, "^$");
        assert_eq!(strict.permission.write, format!("^({publishes})$"));
        let aside = r"haul\.migrate\.old\.haul\.node\.worker-001";
        assert_eq!(strict.permission.read, format!("^({own}|{aside})$"));
        let loose = node(true);
        assert_eq!(loose.permission.configure, format!("^{own}$"));
        assert_eq!(loose.permission.write, format!("^({publishes}|{own})$"));
        assert_eq!(loose.permission.read, format!(r"^(haul\.task|haul\.return|haul\.control|{own}|{aside})$"));
        for one in [strict, loose] {
            let topic = one.topic.unwrap();
            assert_eq!(
                (topic.exchange.as_str(), topic.write.as_str(), topic.read.as_str()),
                ("haul.event", r"^worker-001\.", "^$")
            );
        }
    }

    #[test]
    fn a_master_publishes_and_reads_events_and_an_operator_has_everything_of_ours() {
        let master = user(&UserRole::Master).permission;
        assert_eq!(master.configure, r"^haul\.follow\..*$");
        assert_eq!(master.write, r"^(haul\.task|haul\.control|haul\.follow\..*)$");
        assert_eq!(master.read, r"^(haul\.event|haul\.follow\..*|haul\.master\.event)$");
        let operator = user(&UserRole::Operator);
        assert_eq!(operator.permission.write, r"^haul\.");
        assert_eq!(operator.tags, ["monitoring", "policymaker"]);
        let elsewhere = User::new(&Names::default(), "backend.results", &UserRole::Operator);
        assert_eq!(elsewhere.permission.read, r"^haul\.|^backend\.results$");
    }

    #[test]
    fn commands_survive_a_shell() {
        let commands = node(false).permission_commands("fleet a");
        assert_eq!(commands.len(), 2);
        assert!(commands[0].starts_with("rabbitmqctl set_permissions --vhost 'fleet a' haul-node-worker-001 '^$' '^("));
        assert_eq!(
            commands[1],
            r"rabbitmqctl set_topic_permissions --vhost 'fleet a' haul-node-worker-001 haul.event '^worker-001\.' '^$'"
        );
        assert_eq!(node(false).add_command("\"$PASSWORD\""), "rabbitmqctl add_user haul-node-worker-001 \"$PASSWORD\"");
    }

    #[test]
    fn a_password_is_hashed_as_the_broker_s_documentation_shows() {
        // https://www.rabbitmq.com/docs/passwords: "test12" with the salt 908DC60A.
        let hash = password_hash("test12", [0x90, 0x8d, 0xc6, 0x0a]);
        assert_eq!(hash, "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR");
    }

    #[test]
    fn definitions_hold_what_is_to_be_imported() {
        let (one, other) = (node(false), user(&UserRole::Master));
        let all = definitions([(&one, Some("HASH".to_owned())), (&other, None)], "/");
        assert_eq!(all["users"].as_array().unwrap().len(), 1);
        assert_eq!(all["users"][0]["password_hash"], "HASH");
        assert_eq!(all["permissions"].as_array().unwrap().len(), 2);
        assert_eq!(all["topic_permissions"][0]["write"], r"^worker-001\.");
    }
}
