//! Many nodes on one broker: what their queues cost, and how fast a task starts on any of them.
//!
//! The nodes are real workers with two connections each, in one process, with journals in memory: what is measured is the
//! broker, not a thousand disks.

use std::time::{Duration, Instant};

use haul::{broker::Broker as _, protocol::NodeName};
use rand::Rng as _;

use crate::{
    World,
    agent::{Agent, node_name},
    cases::{Listener, under_load},
    log, process,
    rig::{self, Rig},
};

/// Beginning of the nodes' names.
const STEM: &str = "node";
/// Each node does little.
const SIZE: (usize, u16) = (2, 8);
/// Tasks that come a second.
const A_SECOND: u64 = 100;
/// For the broker to let go of what was only for a moment.
const CALM: Duration = Duration::from_secs(5);

/// Prints what they cost.
pub(crate) async fn run(world: &mut World) {
    let place = world.place("nodes");
    let rig = Rig::new().await;
    let all = world.arguments.nodes;
    let empty = resident();
    let begun = Instant::now();
    let mut steps = Vec::new();
    for number in 0..all {
        let node = NodeName::new(node_name(STEM, number)).expect("a node name");
        let own = rig.names.node_topology(&node).and(rig.names.control_topology(&node));
        rig.master.declare(&own).await.expect("queues can be declared");
        if [all / 4, all / 2, all].contains(&(number + 1)) {
            steps.push((number + 1, begun.elapsed().as_secs_f64(), resident()));
        }
    }
    for (nodes, seconds, bytes) in &steps {
        world.fact(format!(
            "nodes: {nodes} nodes' queues declared in {seconds:.1} s; the broker {:.0} MB, {:.0} MB more than before",
            process::megabytes(*bytes),
            process::megabytes(bytes.saturating_sub(empty))
        ));
    }
    tokio::time::sleep(CALM).await;
    let declared = resident();
    let mut start = rig.agent(None, log(&place, "agents"), SIZE);
    (start.node, start.agents) = (STEM, all);
    let begun = Instant::now();
    let agents = Agent::start(&start);
    agents.says("ready");
    let connected = begun.elapsed().as_secs_f64();
    tokio::time::sleep(CALM).await;
    let running = resident();
    world.fact(format!(
        "nodes: {all} agents consume after {connected:.1} s; the broker {:.0} MB, {:.0} MB for {} connections",
        process::megabytes(running),
        process::megabytes(running.saturating_sub(declared)),
        2 * all
    ));
    let listener = Listener::new(&rig).await;
    let any = move || node_name(STEM, rand::rng().random_range(0..all));
    let latency = under_load(&rig, listener, A_SECOND, any).await;
    world.fact(format!("nodes: publish to started over {all} nodes, {A_SECOND} tasks a second: {latency}"));
    predict(world, &steps, all, running.saturating_sub(declared), empty);
    agents.end();
    rig.remove((0..all).map(|number| node_name(STEM, number)).chain([rig::NODE.to_owned()])).await;
}

/// What the slope from a quarter to all of the nodes says of five thousand.
fn predict(world: &mut World, steps: &[(usize, f64, u64)], all: usize, connections: u64, empty: u64) {
    const WANTED: f64 = 5000.0;
    let (Some(first), Some(last)) = (steps.first(), steps.last()) else { return };
    let between = (last.0 - first.0) as f64;
    let (second, byte) = ((last.1 - first.1) / between, last.2.saturating_sub(first.2) as f64 / between);
    let connection = connections as f64 / all as f64;
    world.fact(format!(
        "nodes: a node costs the broker {:.0} kB for its queues, {:.0} kB for its connections and {:.1} ms to declare; 5000 \
         nodes would so need {:.1} GB and {:.0} s to declare, if it stays as linear as from {} to {} nodes",
        byte / 1e3,
        connection / 1e3,
        second * 1e3,
        (empty as f64 + (byte + connection) * WANTED) / 1e9,
        second * WANTED,
        first.0,
        last.0
    ));
}

/// Memory of the broker's process; nothing where it is not one of this machine.
fn resident() -> u64 {
    rig::broker_pid().and_then(process::holds).map_or(0, |holds| holds.resident)
}
