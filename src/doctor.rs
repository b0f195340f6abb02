//! The broker's health: what there should be, what there is, and the command that mends the difference.
//!
//! [`look`] gathers [`Facts`]; everything after is a pure function of them.

mod migrate;
mod node;
mod plan;
mod policy;
mod rules;
mod users;

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::Serialize;

pub use migrate::{
    MigrateError, MigrateStep, Migrated, Migration, Migrations, OtherExchange, Stage, Surgeon, migrations,
};
pub use node::{NodeFacts, examine_node};
pub use plan::{Item, State, plan};
pub use policy::{DEADLINE_MARGIN, needed_timeout, set_policy_command, wanted_policies};
pub use rules::examine;
pub use users::{User, UserRole, definitions, password_hash};

use crate::{
    broker::{
        Broker, BrokerError, Depth, Names, Topology,
        address::Address,
        management::{Inventory, Management, PolicyView, Told},
        version::Version,
    },
    protocol::NodeName,
};

/// Queues that are asked for within one deadline.
const ASKED_TOGETHER: usize = 100;
/// Queues that are measured at a time.
const ASKED_AT_A_TIME: usize = 16;

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
    /// Messages and consumers of the nodes' queues and the dead letters' queue, once they were [measured](measure).
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
    #[must_use]
    pub fn nodes_with(&self, inventory: &Told<Inventory>) -> Vec<NodeName> {
        let mut nodes = self.nodes.clone();
        if let Told::Yes(inventory) = inventory {
            let prefix = format!("{}.node.", self.names.prefix());
            let aside = self.names.migration();
            let found = inventory.queues.iter().filter_map(|queue| {
                // A node whose queue is being made anew has what is put aside of it.
                let name = queue.name.strip_prefix(&aside).and_then(|rest| rest.split_once('.'));
                name.map_or(queue.name.as_str(), |(_, name)| name).strip_prefix(&prefix)
            });
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
    let mut missing = Vec::new();
    for part in asked_for(wanted.topology(&nodes), &inventory) {
        missing.extend(broker.missing(&part).await?);
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
        depths: BTreeMap::new(),
        inventory,
        management_base: management.map(|api| api.base().to_owned()),
        consumer_timeout: given.consumer_timeout,
    })
}

/// What has to be asked for by name, in parts: each thing is asked for by itself, and an answer has a deadline.
///
/// A few queues are all asked for. Of a fleet only those that the inventory does not list: the API may give a list that is
/// some seconds old, which does no harm where nobody could look at all of them within that time.
fn asked_for(mut topology: Topology, inventory: &Told<Inventory>) -> Vec<Topology> {
    if let Told::Yes(inventory) = inventory
        && topology.queues.len() > ASKED_TOGETHER
    {
        let listed: HashSet<&str> = inventory.queues.iter().map(|queue| queue.name.as_str()).collect();
        topology.queues.retain(|queue| !listed.contains(queue.name.as_str()));
    }
    let exchanges = Topology { exchanges: topology.exchanges, ..Topology::default() };
    let queues = topology.queues.chunks(ASKED_TOGETHER);
    let parts = queues.map(|part| Topology { queues: part.to_vec(), ..Topology::default() });
    std::iter::once(exchanges).chain(parts).collect()
}

/// Asks for messages and consumers of every node's queue and of the dead letters.
///
/// # Errors
/// When the broker cannot be asked.
pub async fn measure(facts: &mut Facts, wanted: &Wanted, broker: &dyn Broker) -> Result<(), BrokerError> {
    let queues = facts.nodes.iter().map(|node| wanted.names.node(node)).chain([wanted.names.dead()]);
    let queues: Vec<_> = queues.filter(|queue| !facts.missing.contains(queue)).collect();
    let asked = stream::iter(queues).map(async |queue| {
        let depth = broker.depth(&queue).await?;
        Ok::<_, BrokerError>(depth.map(|depth| (queue, depth)))
    });
    let found: Vec<_> = asked.buffer_unordered(ASKED_AT_A_TIME).try_collect().await?;
    facts.depths = found.into_iter().flatten().collect();
    Ok(())
}
