//! One run: publish, disturb, drain, and write down what is there in the end.

use std::{
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use haul::{
    broker::{Broker as _, Consume, Names, Topology, topology::RETRY_DELAYS},
    dead::{DeadLetters, Letter, Selection},
    protocol::NodeName,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    broker::BrokerNode,
    faults::World,
    fleet::Member,
    git::Upstreams,
    history::{Fault, FaultKind, History, Record, Work, now},
    ledger,
    master::Master,
    options::Options,
    schedule::{Planned, schedule},
    wire::Wire,
    workload::{self, Workload},
};
use crate::support::proxy::Proxy;

/// Publishes at a time.
const PUBLISHING: usize = 64;
/// Tasks that the broker has and that have not ended: what the master lets pile up.
const MOST_OPEN: usize = 2000;
/// What a fault takes, roughly: tasks are published so fast that faults and tasks are over together.
const A_FAULT: Duration = Duration::from_millis(2200);
/// Publishing may be so many faults ahead.
const AHEAD: usize = 2;
/// The slowest wait that anything may rest in between two signs of life; beyond it what is missing is stuck.
const STUCK: Duration = Duration::from_secs(90);
/// Beyond it the broker is asked whether it serves at all.
const UNSERVED: Duration = Duration::from_secs(25);
/// Queues are empty for so many looks in a row before everything is taken for quiet.
const QUIET: usize = 3;
/// A queue that delivers nothing for so long is read to its end.
const LAST_DELIVERY: Duration = Duration::from_secs(1);
const GLANCE: Duration = Duration::from_millis(250);

/// Runs one kind of work, its history in `directory`.
pub(crate) async fn run(options: &Options, work: Work, broker: &BrokerNode, directory: &Path) -> Result<(), String> {
    let history = Arc::new(History::create(directory).map_err(|error| error.to_string())?);
    let prefix = format!("check-{}", if work == Work::Ledger { "ledger" } else { "git" });
    let (tasks, faults) = match work {
        // Real work is slow work: it is there for its children.
        Work::Git if options.works.len() > 1 => ((options.tasks / 50).clamp(40, 1000), (options.faults / 3).min(40)),
        Work::Ledger | Work::Git => (options.tasks, options.faults),
    };
    let master = Master::start(broker.rabbit(), Names::new(prefix.as_str()), history.clone()).await?;
    let version = master.broker.about().await.ok().and_then(|about| about.version).unwrap_or_default();
    let begin =
        Record::Run { at: now(), seed: options.seed, tasks, faults, nodes: options.nodes, work, broker: version };
    history.add(&begin);
    let mut members = Vec::new();
    for number in 1..=options.nodes {
        let name = format!("n{number}");
        let storage = directory.join(&name);
        std::fs::create_dir_all(&storage).map_err(|error| error.to_string())?;
        let proxy = Proxy::start(broker.rabbit()).await;
        let wire = Wire::start(&proxy.url).await.map_err(|error| error.to_string())?;
        members.push(Arc::new(Member::new(name, storage, wire, proxy, work, &prefix, history.clone())));
    }
    apply_policies(broker, &prefix).await?;
    let world = Arc::new(World { broker: broker.clone(), members, master, history });
    let upstreams = if work == Work::Git { Some(Upstreams::start(options.seed)) } else { None };
    let load = match &upstreams {
        Some(upstreams) => workload::git(options.seed, tasks, options.nodes, &upstreams.urls()),
        None => workload::ledger(options.seed, tasks, options.nodes),
    };
    let plan = schedule(options.seed, faults, options.nodes, work, &options.only);
    let mut around = JoinSet::new();
    for member in &world.members {
        member.start().await;
        let member = member.clone();
        around.spawn(async move { member.keep().await });
    }
    let master = world.master.clone();
    around.spawn(async move { master.reconcile().await });
    let (watched, logs) = (world.clone(), directory.join("broker"));
    around.spawn(async move { mend_the_broker(&watched, &logs).await });
    let ready = async {
        for queue in queues(&world).into_iter().take(options.nodes) {
            while !matches!(world.master.broker.depth(&queue).await, Ok(Some(depth)) if depth.consumers > 0) {
                tokio::time::sleep(GLANCE).await;
            }
        }
    };
    tokio::time::timeout(STUCK, ready).await.map_err(|_| "the agents did not become ready".to_owned())?;
    disturb_and_publish(&world, load, plan, upstreams.as_ref()).await;
    let drained = drain(&world).await;
    if !drained {
        // Before the agents end: who held what.
        let seen = broker.get("queues".to_owned()).await.unwrap_or_else(|refusal| refusal);
        let _ = std::fs::write(directory.join("queues.json"), seen);
    }
    around.shutdown().await;
    for member in &world.members {
        member.stop().await;
    }
    write_down_the_end(&world, work).await?;
    world.history.add(&Record::Over { at: now(), drained });
    world.history.flush();
    world.master.broker.close().await;
    Ok(())
}

/// What operators do on a broker that limits deliveries: the command that they are told to use.
async fn apply_policies(broker: &BrokerNode, prefix: &str) -> Result<(), String> {
    let prefix = prefix.to_owned();
    let applied = broker.on(move |rabbit| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
        command
            .args(["topology", "apply"])
            .env("AGENT_PREFIX", prefix)
            .env("AGENT_AMQP_URL", &rabbit.url)
            .env("AGENT_BROKER__MANAGEMENT_URL", &rabbit.management_url);
        command.output()
    });
    let output = applied.await?.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("haul topology apply failed: {said}")) }
}

/// Publishes everything while the faults happen; neither gets far ahead of the other.
async fn disturb_and_publish(world: &Arc<World>, load: Workload, plan: Vec<Planned>, upstreams: Option<&Upstreams>) {
    let (sent, suffered) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (total, faults) = (load.sends.len(), plan.len());
    // The last faults come while there is still something to do.
    let due = move |fault: usize| (fault + 1) * total / (faults + 2);
    let disturbing = {
        let (world, sent, suffered) = (world.clone(), sent.clone(), suffered.clone());
        async move {
            for (number, planned) in plan.into_iter().enumerate() {
                while sent.load(Ordering::Relaxed) < due(number) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                world.suffer(planned).await;
                suffered.store(number + 1, Ordering::Relaxed);
            }
        }
    };
    let publishing = async {
        let begun = Instant::now();
        let whole = A_FAULT * u32::try_from(faults).unwrap_or(u32::MAX);
        let tasks = Arc::new(load.tasks);
        let mut publishes = JoinSet::new();
        for (number, send) in load.sends.into_iter().enumerate() {
            let pace = whole.mul_f64(ratio(number, total));
            while begun.elapsed() < pace
                || world.master.open() >= MOST_OPEN
                || number > due(suffered.load(Ordering::Relaxed) + AHEAD)
            {
                if suffered.load(Ordering::Relaxed) == faults && world.master.open() < MOST_OPEN {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if let Some(upstreams) = upstreams {
                upstreams.grow(number);
            }
            while publishes.len() >= PUBLISHING {
                publishes.join_next().await;
            }
            let (world, tasks) = (world.clone(), tasks.clone());
            publishes.spawn(async move {
                let task = &tasks[send.task];
                world.master.publish(task, &world.members[task.node].name, send.why).await;
            });
            sent.store(number + 1, Ordering::Relaxed);
        }
        publishes.join_all().await;
    };
    // What cannot be published for ever is for the drain to tell.
    let both = async { tokio::join!(disturbing, publishing) };
    tokio::select! {
        _ = both => {}
        () = nothing_moves(world, STUCK) => {}
    }
    world.heal().await;
}

#[expect(clippy::cast_precision_loss, reason = "a part of a run")]
fn ratio(part: usize, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// Ends when nothing was confirmed and nothing ended for so long.
async fn nothing_moves(world: &World, patience: Duration) {
    let (mut last, mut since) = (world.master.moved(), Instant::now());
    while since.elapsed() < patience {
        tokio::time::sleep(GLANCE).await;
        let moved = world.master.moved();
        if moved != last {
            (last, since) = (moved, Instant::now());
        }
    }
}

/// What an operator does where the broker itself came back from a fault unable to serve any queue: starts it anew. It is
/// a fault too, and is noted as one; what the broker wrote is kept beside the history.
async fn mend_the_broker(world: &World, logs: &Path) {
    loop {
        nothing_moves(world, UNSERVED).await;
        if world.broker.serves().await {
            continue;
        }
        let at = now();
        let _ = Command::new("cp").arg("-r").arg(world.broker.rabbit().log()).arg(logs).status();
        let done = world.broker.on(|rabbit| {
            rabbit.crash();
            rabbit.restart();
        });
        let done = done.await.is_ok();
        let note = "it served no queue any more".to_owned();
        world.history.add(&Record::Fault(Fault {
            at,
            until: now(),
            kind: FaultKind::BrokerKilled,
            node: None,
            done,
            note,
        }));
    }
}

/// Waits until everything has ended and all queues of tasks are empty; false where something is stuck.
async fn drain(world: &World) -> bool {
    let quiet = async {
        let mut looks = 0;
        while looks < QUIET {
            tokio::time::sleep(GLANCE).await;
            let quiet = world.master.open() == 0 && queues_are_empty(world).await;
            looks = if quiet { looks + 1 } else { 0 };
        }
    };
    tokio::select! {
        () = quiet => true,
        () = nothing_moves(world, STUCK) => false,
    }
}

/// The queues that tasks travel in.
fn queues(world: &World) -> Vec<String> {
    let names = &world.master.names;
    let nodes = world.members.iter().filter_map(|member| NodeName::new(member.name.clone()).ok());
    nodes.map(|node| names.node(&node)).chain(RETRY_DELAYS.iter().map(|&delay| names.retry(delay))).collect()
}

async fn queues_are_empty(world: &World) -> bool {
    for queue in queues(world) {
        if !matches!(world.master.broker.depth(&queue).await, Ok(Some(depth)) if depth.messages == 0) {
            return false;
        }
    }
    true
}

/// Ledgers, projects, dead letters, and what is left in the queues.
async fn write_down_the_end(world: &World, work: Work) -> Result<(), String> {
    let (history, stop) = (&world.history, CancellationToken::new());
    for member in &world.members {
        let projects = match work {
            Work::Ledger => ledger::projects(&member.name, &member.storage),
            Work::Git => super::git::projects(&member.name, &member.storage),
        };
        for execution in ledger::executions(&member.storage) {
            history.add(&Record::Execution(execution));
        }
        for project in projects {
            history.add(&Record::Project(project));
        }
    }
    let broker = &world.master.broker;
    let letters = DeadLetters::new(broker.clone(), world.master.names.clone());
    let found = letters.list(&Selection::default(), &stop).await.map_err(|error| error.to_string())?;
    for letter in found.into_iter().map(|found| found.letter) {
        let task = letter.task_id.unwrap_or_default();
        history.add(&Record::Letter { task, round: letter.round, class: letter.class });
    }
    for queue in queues(world) {
        for (task, round) in left_in(world, &queue).await? {
            history.add(&Record::Left { queue: queue.clone(), task, round });
        }
    }
    Ok(())
}

/// The tasks that lie in a queue. A queue with a single active consumer cannot be read otherwise than by consuming it.
async fn left_in(world: &World, queue: &str) -> Result<Vec<(String, u32)>, String> {
    let broker = &world.master.broker;
    let depth = broker.depth(queue).await.map_err(|error| error.to_string())?;
    if depth.is_none_or(|depth| depth.messages == 0) {
        return Ok(Vec::new());
    }
    let consume =
        Consume { queue: queue.to_owned(), tag: "check-end".to_owned(), prefetch: 5000, declare: Topology::default() };
    let mut consumer = broker.consume(consume).await.map_err(|error| error.to_string())?;
    let mut left = Vec::new();
    while let Ok(Some(delivery)) = tokio::time::timeout(LAST_DELIVERY, consumer.next()).await {
        let letter = Letter::read(&delivery.message, 1);
        left.push((letter.task_id.unwrap_or_default(), letter.round));
        delivery.abandon();
    }
    Ok(left)
}
