//! The broker's health: what there should be, what there is, and the command that mends the difference.
//!
//! [`look`] gathers [`Facts`]; everything after is a pure function of them.

mod node;
mod plan;
mod policy;
mod rules;

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

pub use node::{NodeFacts, examine_node};
pub use plan::{Item, State, plan};
pub use policy::{DEADLINE_MARGIN, needed_timeout, set_policy_command, wanted_policies};
pub use rules::examine;

use crate::{
    broker::{
        Broker, BrokerError, Depth, Names, Topology,
        address::Address,
        management::{Inventory, Management, PolicyView, Told},
        version::Version,
    },
    protocol::NodeName,
};

/// What there should be.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Names of everything.
    pub names: Names,
    /// The master's queue of events; empty for none.
    pub results: String,
    /// Nodes that should be enrolled.
    pub nodes: Vec<NodeName>,
    /// The longest deadline that a task may ask for.
    pub longest_deadline: Duration,
}

/// What there is, as far as could be seen.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Addresses that the settings name.
    pub addresses: Vec<Address>,
    /// The broker's version.
    pub version: Option<Version>,
    /// Nodes that are examined: those that should be there, and those found.
    pub nodes: Vec<NodeName>,
    /// Exchanges and queues that are not there.
    pub missing: Vec<String>,
    /// Messages and consumers of the nodes' queues and the dead letters' queue.
    pub depths: BTreeMap<String, Depth>,
    /// What the management API tells, or why it does not.
    pub inventory: Told<Inventory>,
    /// The management API's address, for commands.
    pub management_base: Option<String>,
    /// The virtual host, for commands.
    pub vhost: String,
    /// The broker's own consumer timeout, by the settings; zero for none.
    pub consumer_timeout: Duration,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Works, but should be seen to; or could not be examined.
    Yellow,
    /// Unsafe or broken.
    Red,
}

impl Severity {
    /// The sign before a finding.
    #[must_use]
    pub const fn mark(self) -> &'static str {
        match self {
            Self::Red => "✗",
            Self::Yellow => "!",
            Self::Info => "·",
        }
    }
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// What: an exchange, a queue, a policy, an address, the broker.
    pub subject: String,
    /// What is wrong, in a sentence.
    pub problem: String,
    /// The command that mends it, or what to change.
    pub mend: String,
    /// Whether it rests on the broker's statistics, which follow a change some seconds later.
    #[serde(skip)]
    pub lagging: bool,
}

impl Wanted {
    /// Everything that should be declared for `nodes` and the fleet.
    #[must_use]
    pub fn topology(&self, nodes: &[NodeName]) -> Topology {
        nodes.iter().fold(self.names.shared_topology(&self.results), |topology, node| {
            topology.and(self.names.node_topology(node)).and(self.names.control_topology(node))
        })
    }

    /// The policies that a broker of this version should have.
    #[must_use]
    pub fn policies(&self, version: Version) -> Vec<PolicyView> {
        wanted_policies(&self.names, &self.results, self.longest_deadline, version)
    }

    /// The nodes whose queues stand in an inventory, and those that should.
    fn nodes_with(&self, inventory: &Told<Inventory>) -> Vec<NodeName> {
        let mut nodes = self.nodes.clone();
        if let Told::Yes(inventory) = inventory {
            let prefix = format!("{}.node.", self.names.prefix());
            let found = inventory.queues.iter().filter_map(|queue| queue.name.strip_prefix(&prefix));
            nodes.extend(found.filter_map(|name| NodeName::new(name).ok()));
        }
        nodes.sort();
        nodes.dedup();
        nodes
    }
}

/// What is known before the broker is asked.
#[derive(Clone, Debug)]
pub struct Given {
    /// Addresses that the settings name.
    pub addresses: Vec<Address>,
    /// The version that the broker told when it was connected to.
    pub version: Option<Version>,
    /// The broker's own consumer timeout, by the settings; zero for none.
    pub consumer_timeout: Duration,
}

/// Asks the broker and its management API, changing nothing.
///
/// # Errors
/// When the broker cannot be asked; a silent management API is a fact, not an error.
pub async fn look(
    wanted: &Wanted,
    given: Given,
    broker: &dyn Broker,
    management: Option<&Management>,
) -> Result<Facts, BrokerError> {
    let inventory = match management {
        None => Told::No("no management API is known".to_owned()),
        Some(api) => match api.inventory(wanted.names.prefix(), std::slice::from_ref(&wanted.results)).await {
            Ok(inventory) => Told::Yes(inventory),
            Err(error) => Told::No(error.to_string()),
        },
    };
    let nodes = wanted.nodes_with(&inventory);
    let missing = broker.missing(&wanted.topology(&nodes)).await?;
    let mut depths = BTreeMap::new();
    let queues = nodes.iter().map(|node| wanted.names.node(node)).chain([wanted.names.dead()]);
    for queue in queues.filter(|queue| !missing.contains(queue)) {
        if let Some(depth) = broker.depth(&queue).await? {
            depths.insert(queue, depth);
        }
    }
    let told_version = match &inventory {
        Told::Yes(inventory) => inventory.version,
        Told::No(_) => None,
    };
    Ok(Facts {
        vhost: given.addresses.first().map_or_else(|| "/".to_owned(), |address| address.vhost.clone()),
        addresses: given.addresses,
        version: told_version.or(given.version),
        nodes,
        missing,
        depths,
        inventory,
        management_base: management.map(|api| api.base().to_owned()),
        consumer_timeout: given.consumer_timeout,
    })
}
