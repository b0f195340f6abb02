//! Masters that publish twice, in another order, or far too much of one project.

use std::collections::BTreeMap;

use haul::protocol::Status;
use serde_json::{Value, json};

use crate::{
    githttp::{Behaviour, Server, Upstream},
    support::{agent::Agent, repository::Repository},
    together,
};

/// A number from a seed, the same each time.
fn chance(state: &mut u64, below: usize) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    usize::try_from((*state >> 33) % below as u64).unwrap()
}

/// A clone and a delete of each of twelve projects, every one of them three times, in an order of chance: what is there in
/// the end is what the newest of each project said, whichever came first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn duplicated_and_reordered_publishes_end_once_and_as_the_newest_said() {
    const PROJECTS: i64 = 12;
    let (_together, rabbit) = together().await;
    let upstream = Repository::new();
    let mut agent = Agent::new(rabbit).await;
    agent.start(&[]);
    agent.ready().await;
    // Of even projects the clone is the newest, of odd ones the delete.
    let clone_is_newest = |project: i64| project % 2 == 0;
    let mut tasks = Vec::new();
    for project in 0..PROJECTS {
        let (cloned, deleted) = if clone_is_newest(project) { (2, 1) } else { (1, 2) };
        let mut clone = Agent::clone_task(&format!("clone-{project}"), project, &upstream, &format!("{project}_app"));
        clone["generation"] = cloned.into();
        let mut delete = Agent::task(&format!("delete-{project}"), "delete", project);
        delete["generation"] = deleted.into();
        tasks.extend([clone, delete].into_iter().flat_map(|task| [task.clone(), task.clone(), task]));
    }
    let mut state = 4;
    for last in (1..tasks.len()).rev() {
        tasks.swap(last, chance(&mut state, last + 1));
    }
    let first_seen: BTreeMap<_, _> =
        tasks.iter().enumerate().rev().map(|(at, task)| (task["task_id"].as_str().unwrap(), at)).collect();
    let early = (0..PROJECTS).filter(|&project| {
        let newest = if clone_is_newest(project) { ("clone", "delete") } else { ("delete", "clone") };
        first_seen[format!("{}-{project}", newest.0).as_str()] < first_seen[format!("{}-{project}", newest.1).as_str()]
    });
    assert!(early.count() >= 3, "the seed puts no newer task first");
    for task in &tasks {
        agent.publish(task).await;
    }
    for project in 0..PROJECTS {
        let (newest, older) = if clone_is_newest(project) { ("clone", "delete") } else { ("delete", "clone") };
        let end = agent.end(&format!("{newest}-{project}"), 0).await;
        assert_eq!(end.status, Status::Succeeded, "{end:?}");
        let end = agent.end(&format!("{older}-{project}"), 0).await;
        assert!(matches!(end.status, Status::Succeeded | Status::Superseded), "{end:?}");
    }
    agent.drained().await;
    agent.each_ended_once();
    for project in 0..PROJECTS {
        let there = agent.projects().join(format!("{project}_app/README")).exists();
        assert_eq!(there, clone_is_newest(project), "project {project}");
    }
    let starts: BTreeMap<String, usize> = agent
        .all_events()
        .into_iter()
        .filter(|event| event.status == Status::Started)
        .map(|event| (event.event_id, event.task_id.to_string()))
        .collect::<BTreeMap<_, _>>()
        .into_values()
        .fold(BTreeMap::new(), |mut starts, id| {
            *starts.entry(id).or_default() += 1;
            starts
        });
    assert!(starts.values().all(|&count| count == 1), "{starts:?}");
    agent.dead_letters(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_project_with_a_backlog_of_three_windows_holds_up_nobody_and_loses_nothing() {
    const WINDOW: usize = 8;
    let (_together, rabbit) = together().await;
    let repository = Upstream::new();
    repository.commit("main", &[("a.txt", "hello\n")]);
    let server = Server::start(repository.root());
    server.behave(Behaviour::HoldPack);
    let clone = |id: &str, project: i64, url: &str| -> Value {
        json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project, "git_url": url,
               "target_path": format!("{project}_app")})
    };
    let mut agent = Agent::new(rabbit).await;
    agent.set("AGENT_SLOTS", "2");
    agent.set("AGENT_WINDOW", &WINDOW.to_string());
    agent.start(&[]);
    agent.ready().await;
    agent.publish(&clone("slow", 1, &server.url("app.git"))).await;
    agent.saw("slow", Status::Started).await;
    let backlog: Vec<_> = (0..3 * WINDOW).map(|n| format!("b-{n}")).collect();
    for id in &backlog {
        agent.publish(&Agent::task(id, "status", 1)).await;
    }
    let other = Repository::new();
    agent.publish(&Agent::clone_task("other", 2, &other, "2_app")).await;
    assert_eq!(agent.end("other", 0).await.status, Status::Succeeded);
    assert!(agent.terminal_states("slow", 0).is_empty(), "the other one came through while the project was busy");
    server.behave(Behaviour::Serve);
    for id in &backlog {
        let end = agent.end(id, 0).await;
        assert_eq!((end.status, end.attempt), (Status::Succeeded, 1), "{end:?}");
    }
    agent.drained().await;
    agent.each_ended_once();
    assert_eq!(server.counts().packs, 1);
}
