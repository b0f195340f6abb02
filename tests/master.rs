//! The master's half of the contract: what it publishes arrives or is told of, what it hears it believes rightly, and what
//! does not end it can explain.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "master/away.rs"]
mod away;
#[path = "master/diagnosing.rs"]
mod diagnosing;
#[path = "master/living.rs"]
mod living;
#[path = "master/projecting.rs"]
mod projecting;
#[path = "master/publishing.rs"]
mod publishing;
#[path = "master/reading.rs"]
mod reading;
#[path = "master/runs.rs"]
mod runs;
mod support;

use std::sync::Arc;

use haul::{
    broker::{Broker, Names, memory::Memory},
    master::{Client, ClientSettings, Submission},
    protocol::NodeName,
};

/// A node's name.
fn node(name: &str) -> NodeName {
    NodeName::new(name).unwrap()
}

/// A clone task.
fn clone_of(project: i64) -> Submission {
    Submission::clone(project, "https://git.example/team/app.git", format!("{project}_app")).build().unwrap()
}

/// A fleet of the node `n1` on a broker in memory, without an agent.
async fn fleet() -> (Memory, Names) {
    let (memory, names) = (Memory::new(), Names::default());
    let topology = names
        .shared_topology(&names.master_event())
        .and(names.node_topology(&node("n1")))
        .and(names.control_topology(&node("n1")));
    memory.declare(&topology).await.unwrap();
    (memory, names)
}

/// A client on a broker.
fn client(broker: impl Broker) -> Client {
    Client::new(Arc::new(broker), Names::default(), ClientSettings::default())
}
