//! Three RabbitMQ nodes that make a cluster, and what becomes of an agent when some of them go: nothing is lost, and it is
//! consuming again within fifteen seconds.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

mod support;

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use haul::protocol::Status;
use rustix::process::Signal;
use support::{agent::Agent, cluster::Cluster, eventually, repository::Repository};
use tokio::sync::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// From a node's death, or from the return of a majority, to the end of a task that is published then.
const CONSUMING_AGAIN: Duration = Duration::from_secs(15);
/// Nodes of the cluster.
const NODES: usize = 3;
/// Between two tasks of the load.
const PAUSE: Duration = Duration::from_millis(100);
/// Projects that the load asks about.
const PROJECTS: usize = 4;

/// The cluster of this binary, whole and to oneself: these tests break it for everybody.
async fn cluster() -> (MutexGuard<'static, ()>, &'static Cluster) {
    static ALONE: Mutex<()> = Mutex::const_new(());
    static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();
    support::logs();
    let alone = ALONE.lock().await;
    let start = || CLUSTER.get_or_init(|| std::panic::catch_unwind(|| Cluster::start(NODES)).ok()).as_ref();
    let cluster = blocking(start).await;
    (alone, cluster.expect("the cluster started; the first test that wanted it says why not"))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// An agent with some projects, that knows all addresses.
async fn agent_at(cluster: &Cluster, first: usize) -> Agent {
    let upstream = Repository::new();
    let mut agent = Agent::at(&cluster.urls(first)).await;
    agent.set("AGENT_SLOTS", "2");
    agent.set("AGENT_BROKER__MANAGEMENT_URL", &cluster.nodes[first].management_url);
    // An administrator sets the policies, without which newer brokers wait a minute for a consumer that is gone.
    let mut apply = agent.command(&["topology", "apply"]);
    let applied = blocking(move || apply.output().unwrap()).await;
    assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    agent.start(&[]);
    agent.ready().await;
    for project in 0..PROJECTS {
        let (id, target) = (format!("clone-{project}"), format!("{project}_app"));
        agent.publish(&Agent::clone_task(&id, i64::try_from(project).unwrap(), &upstream, &target)).await;
    }
    for project in 0..PROJECTS {
        assert_eq!(agent.end(&format!("clone-{project}"), 0).await.status, Status::Succeeded);
    }
    agent
}

/// A task that takes next to nothing.
fn probe(id: &str, number: usize) -> serde_json::Value {
    Agent::task(id, "status", i64::try_from(number % PROJECTS).unwrap())
}

/// Publishes tasks until it is told to stop, each until the broker has confirmed it; the ids.
fn load(agent: &Arc<Agent>, stop: &CancellationToken) -> tokio::task::JoinHandle<Vec<String>> {
    let (agent, stop) = (Arc::clone(agent), stop.clone());
    tokio::spawn(async move {
        let mut publishing = Vec::new();
        let mut tick = tokio::time::interval(PAUSE);
        while stop.run_until_cancelled(tick.tick()).await.is_some() {
            let (number, agent) = (publishing.len(), Arc::clone(&agent));
            let id = format!("load-{number}");
            publishing.push(tokio::spawn(async move {
                agent.publish(&probe(&id, number)).await;
                id
            }));
        }
        let mut ids = Vec::new();
        for publish in publishing {
            ids.push(publish.await.unwrap());
        }
        ids
    })
}

/// Publishes a task now; when it has ended.
#[expect(clippy::print_stdout, reason = "the time it took is a figure that people ask for")]
async fn consumes_within(limit: Duration, agent: &Agent, what: &str, since: Instant) -> Duration {
    let id = format!("probe-{}", uuid::Uuid::new_v4());
    agent.publish(&probe(&id, 0)).await;
    let end = agent.end(&id, 0).await;
    let took = since.elapsed();
    println!("{what}: consuming again after {took:?}");
    assert_eq!(end.status, Status::Succeeded, "{end:?}");
    assert!(took < limit, "{what}: it took {took:?}; the agent's log:\n{}", agent.log());
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_killed_in_turn_under_load_loses_nothing_and_is_consuming_again_within_15_s() {
    let (_alone, cluster) = cluster().await;
    let rounds: usize = std::env::var("HAUL_CLUSTER_ROUNDS").map_or(1, |text| text.parse().expect("a number"));
    let agent = Arc::new(agent_at(cluster, 0).await);
    let pid = agent.pid();
    // The queue is on all of them.
    let queue = agent.names.node(agent.node());
    let members = blocking(|| cluster.nodes[0].ctl(&["list_queues", "--no-table-headers", "name", "members"])).await;
    let members = members.lines().find(|line| line.starts_with(&queue)).unwrap_or_default().to_owned();
    assert_eq!(members.matches("@localhost").count(), NODES, "{members}");
    let stop = CancellationToken::new();
    let publishing = load(&agent, &stop);
    let mut times = Vec::new();
    for victim in (0..rounds).flat_map(|_| 0..NODES) {
        blocking(move || cluster.nodes[victim].crash()).await;
        times.push(consumes_within(CONSUMING_AGAIN, &agent, &format!("node {victim} killed"), Instant::now()).await);
        blocking(move || cluster.nodes[victim].restart()).await;
        consumes_within(CONSUMING_AGAIN, &agent, &format!("node {victim} back"), Instant::now()).await;
    }
    stop.cancel();
    let ids = publishing.await.unwrap();
    for id in &ids {
        assert_eq!(agent.end(id, 0).await.status, Status::Succeeded);
    }
    times.sort();
    tell(&format!("{} tasks; of {} kills the worst took {:?}", ids.len(), times.len(), times.last().unwrap()));
    assert_eq!(agent.pid(), pid);
    let mut agent = Arc::into_inner(agent).expect("nobody else has it");
    assert!(agent.is_running(), "{}", agent.log());
    ended_well(&mut agent).await;
}

#[expect(clippy::print_stdout, reason = "figures that people ask for")]
fn tell(figures: &str) {
    println!("{figures}");
}

/// An orderly end, after which nothing is left and everything had one end.
async fn ended_well(agent: &mut Agent) {
    agent.drained().await;
    agent.signal(Signal::TERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
    agent.drained().await;
    agent.each_ended_once();
    agent.dead_letters(0).await;
}

/// Two of three gone: no queue can move, nobody fails and nobody forgets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_majority_that_was_lost_and_came_back() {
    let (_alone, cluster) = cluster().await;
    let agent = Arc::new(agent_at(cluster, 0).await);
    for gone in [1, 2] {
        blocking(move || cluster.nodes[gone].crash()).await;
    }
    let publishing = tokio::spawn({
        let agent = Arc::clone(&agent);
        async move {
            for number in 0..5 {
                agent.publish(&probe(&format!("meanwhile-{number}"), number)).await;
            }
        }
    });
    // Long enough to be noticed by whoever waits for a word of the broker.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(agent.events("meanwhile-0").is_empty());
    blocking(|| cluster.nodes[1].restart()).await;
    consumes_within(CONSUMING_AGAIN, &agent, "two of three are back", Instant::now()).await;
    publishing.await.unwrap();
    for number in 0..5 {
        assert_eq!(agent.end(&format!("meanwhile-{number}"), 0).await.status, Status::Succeeded);
    }
    blocking(|| cluster.nodes[2].restart()).await;
    let mut agent = Arc::into_inner(agent).expect("nobody else has it");
    ended_well(&mut agent).await;
}

/// A node that is cut off from the others takes connections, answers heartbeats, and serves no queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_comes_to_a_node_without_a_quorum_goes_on_to_another() {
    let (_alone, cluster) = cluster().await;
    // The master stays where the others are; the agent's next start comes to the first node.
    let mut agent = agent_at(cluster, 1).await;
    agent.signal(Signal::TERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
    blocking(|| cluster.cut_off(0)).await;
    eventually("the others have noticed", async || {
        blocking(|| cluster.nodes[1].ctl(&["eval", "length(nodes())."])).await.trim() == "1"
    })
    .await;
    agent.publish(&probe("meanwhile", 0)).await;
    agent.set("AGENT_BROKER__CONFIRM_TIMEOUT", "5s");
    agent.set("AGENT_AMQP_URL", &cluster.urls(0).join(","));
    let (begun, said) = (Instant::now(), agent.log().len());
    agent.start(&[]);
    let end = agent.end("meanwhile", 0).await;
    assert_eq!(end.status, Status::Succeeded, "{end:?}");
    tell(&format!("an agent at a node without a quorum ended its first task after {:?}", begun.elapsed()));
    let log = agent.log();
    let came = format!(r#""broker.address":"amqp://{}""#, cluster.nodes[0].address());
    assert!(log[said..].contains(&came), "it never came to the first node:\n{}", &log[said..]);
    ended_well(&mut agent).await;
    blocking(|| {
        cluster.nodes[0].crash();
        cluster.nodes[0].restart();
    })
    .await;
}
