//! What the master publishes, and in which order: a function of the seed.

use haul::protocol::Kind;
use serde_json::{Value, json};

use super::{
    behaviour::{Behaviour, MOST_RETRIES},
    history::Why,
    seed::Chance,
};

/// A task that the master wants done.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) id: String,
    pub(crate) node: usize,
    pub(crate) project: i64,
    pub(crate) kind: Kind,
    pub(crate) generation: Option<u64>,
    pub(crate) body: Value,
    pub(crate) priority: u8,
}

/// One publish.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Send {
    /// The task's place in the plan.
    pub(crate) task: usize,
    pub(crate) why: Why,
}

/// Everything that is published.
#[derive(Clone, Debug, Default)]
pub(crate) struct Workload {
    pub(crate) tasks: Vec<Planned>,
    pub(crate) sends: Vec<Send>,
}

/// Tasks of a project, roughly.
const TASKS_A_PROJECT: usize = 25;
/// One task in so many goes to the one project that everybody wants.
const HOT: usize = 50;
/// Publishes that a reordered task or a duplicate may come late by.
const LATE: usize = 120;
const PRIORITIES: [(&str, u8); 5] = [("critical", 9), ("high", 7), ("normal", 4), ("low", 2), ("idle", 0)];

/// The workload of the ledger's agents.
pub(crate) fn ledger(seed: u64, count: usize, nodes: usize) -> Workload {
    let mut chance = Chance::new(seed, "workload");
    let projects = (count / TASKS_A_PROJECT).max(2 * nodes);
    let mut made = vec![0_u64; projects];
    let mut there = vec![false; projects];
    let tasks = (0..count).map(|number| {
        let project = if chance.below(HOT) == 0 { 0 } else { chance.below(projects) };
        let order = made[project];
        made[project] += 1;
        // One project in five leaves the order to the order of arrival.
        let generation = (project % 5 != 4).then_some(order + 1);
        let kind = match chance.below(100) {
            _ if !there[project] => Kind::Clone,
            0..15 => Kind::Clone,
            15..75 => Kind::Pull,
            75..85 => Kind::Delete,
            _ => Kind::Status,
        };
        there[project] = kind != Kind::Delete;
        let behaviour = match chance.below(1000) {
            0..60 => Behaviour::Slow(u32::try_from(chance.between(20, 400)).unwrap_or(20)),
            60..110 => Behaviour::Retries(1 + u32::try_from(chance.below(MOST_RETRIES as usize)).unwrap_or(0)),
            110..130 => Behaviour::Fails,
            130..140 => Behaviour::Conflicts,
            140..145 => Behaviour::Malformed,
            _ => Behaviour::Good,
        };
        planned(&mut chance, number, project, project % nodes, kind, behaviour, generation)
    });
    let tasks: Vec<_> = tasks.collect();
    let sends = order(&mut chance, tasks.len());
    Workload { tasks, sends }
}

/// The workload of real agents: a few projects of each upstream on each node.
pub(crate) fn git(seed: u64, count: usize, nodes: usize, upstreams: &[String]) -> Workload {
    let mut chance = Chance::new(seed, "git workload");
    let projects = upstreams.len() * nodes;
    let mut made = vec![0_u64; projects];
    let mut there = vec![false; projects];
    let tasks = (0..count).map(|number| {
        let project = chance.below(projects);
        let order = made[project];
        made[project] += 1;
        let kind = match chance.below(100) {
            _ if !there[project] => Kind::Clone,
            0..20 => Kind::Clone,
            20..70 => Kind::Pull,
            70..85 => Kind::Delete,
            _ => Kind::Status,
        };
        there[project] = kind != Kind::Delete;
        let mut task = planned(&mut chance, number, project, project % nodes, kind, Behaviour::Git, Some(order + 1));
        if kind == Kind::Clone {
            task.body["git_url"] = upstreams[project / nodes].clone().into();
        }
        task
    });
    let tasks: Vec<_> = tasks.collect();
    let sends = order(&mut chance, tasks.len());
    Workload { tasks, sends }
}

fn planned(
    chance: &mut Chance,
    number: usize,
    project: usize,
    node: usize,
    kind: Kind,
    behaviour: Behaviour,
    generation: Option<u64>,
) -> Planned {
    let id = behaviour.id(number);
    let project = i64::try_from(project).expect("there are few projects") + 1;
    let mut body = json!({"v": 1, "task_id": id, "kind": kind.as_str(), "project_id": project});
    if kind == Kind::Clone {
        body["git_url"] = "https://git.example/team/app.git".into();
        body["target_path"] = format!("{project}_app").into();
    }
    let mut priority = PRIORITIES[2];
    if let Some(generation) = generation {
        body["generation"] = generation.into();
        if chance.percent(20) {
            priority = *chance.pick(&PRIORITIES);
        }
        body["priority"] = priority.0.into();
    }
    if behaviour == Behaviour::Malformed {
        body["timeout_secs"] = "soon".into();
    }
    Planned { id, node, project, kind, generation, body, priority: priority.1 }
}

/// The order of publishes: that of the tasks, but some come late, and some come twice.
fn order(chance: &mut Chance, count: usize) -> Vec<Send> {
    let mut sends: Vec<(usize, Send)> = Vec::with_capacity(count + count / 16);
    for task in 0..count {
        let late = if chance.percent(5) { chance.below(LATE) } else { 0 };
        sends.push((task + late, Send { task, why: Why::First }));
        if chance.percent(5) {
            let again = task + late + chance.below(LATE);
            sends.push((again, Send { task, why: Why::Duplicate }));
        }
    }
    // Stable: what is not late keeps its order, and a duplicate follows its first.
    sends.sort_by_key(|(at, _)| *at);
    sends.into_iter().map(|(_, send)| send).collect()
}
