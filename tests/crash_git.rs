//! Git work is killed at many points, once the child that does it and once the whole agent with it; what is on disk is
//! looked at before anything runs again, and the next attempt completes.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

#[path = "crash_git/scene.rs"]
mod scene;
mod support;
#[expect(dead_code, reason = "made for more tests than this one")]
#[path = "execute/world.rs"]
mod world;

use std::{collections::BTreeMap, path::Path};

use haul::protocol::Status;
use scene::{Chance, Point, Scene, Tally, count};
use serde_json::{Value, json};
use support::{agent::Agent, rabbit::Rabbit};
use world::World;

/// Where a pull is struck, and the child that is killed where only a child is.
const PULL: [(Point, &str); 16] = [
    (Point::Child("transfer"), "transfer"),
    (Point::Child("workspace"), "workspace"),
    (Point::Child("pack"), "pack"),
    (Point::Waiting, "workspace"),
    (Point::Waiting, "pack"),
    (Point::Noted, "workspace"),
    (Point::Noted, "workspace"),
    (Point::Written(0), "workspace"),
    (Point::Written(40), "workspace"),
    (Point::Written(120), "workspace"),
    (Point::Written(200), "workspace"),
    (Point::Written(300), "workspace"),
    (Point::Written(399), "workspace"),
    (Point::Written(399), "workspace"),
    (Point::Indexed, "workspace"),
    (Point::Moved, "workspace"),
];
/// Where a clone is struck.
const CLONE: [(Point, &str); 10] = [
    (Point::Child("transfer"), "transfer"),
    (Point::Child("transfer"), "transfer"),
    (Point::Mirrored, "transfer"),
    (Point::Staged, "workspace"),
    (Point::Child("workspace"), "workspace"),
    (Point::Child("workspace"), "workspace"),
    (Point::CheckedOut, "workspace"),
    (Point::CheckedOut, "workspace"),
    (Point::Bound, "workspace"),
    (Point::There, "workspace"),
];
/// Where a delete is struck; no child takes part.
const DELETE: [Point; 10] = [
    Point::Gone,
    Point::Gone,
    Point::Buried,
    Point::Buried,
    Point::Unbound,
    Point::Unbound,
    Point::Removing,
    Point::Removing,
    Point::Removing,
    Point::MirrorGone,
];

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_leaves_a_clone_or_delete_done_or_not_done_and_a_pull_with_every_file_old_new_or_the_users() {
    let tally = Tally::default();
    // Each has an upstream and an agent of its own; most of the time goes into waiting for agents to start.
    let children = async {
        children_of_a_pull(&tally).await;
        children_of_a_clone(&tally).await;
    };
    tokio::join!(children, agent_at_a_pull(&tally), agent_at_a_clone(&tally), agent_at_a_delete(&tally));
    eprintln!("{tally:?}");
    // Kills that came too late to matter would prove nothing.
    assert!(tally.mixed.get() >= 3, "{tally:?}");
    assert!(tally.pull_failed.get() >= 10 && tally.clone_failed.get() >= 5, "{tally:?}");
}

async fn children_of_a_pull(tally: &Tally) {
    let mut world = World::new().await;
    let mut chance = Chance::new(1);
    let scene = Scene::new(&world, world.path("storage"), 1);
    scene.change(&world, 0);
    world.clone(1, "p", json!({})).await.unwrap();
    scene.user_works();
    for (round, (point, role)) in (1..).zip(PULL) {
        let (old, new) = scene.change(&world, round);
        let strike = scene.strike(point, role, std::process::id(), chance.delay());
        let job = world.job("pull", 1, json!({}));
        let first = world.run(&job).await;
        strike.over();
        count(&tally.mixed, scene.every_file_is_old_new_or_the_users(&old, &new));
        count(&tally.pull_failed, first.is_err());
        world.run(&job).await.unwrap_or_else(|failure| panic!("{point:?}: {failure} after {first:?}"));
        scene.is_pulled(&new);
        assert_eq!(world.leftovers(), Vec::<String>::new(), "{point:?}");
    }
    world.restart().await;
    scene.is_swept();
}

async fn children_of_a_clone(tally: &Tally) {
    let mut world = World::new().await;
    let mut chance = Chance::new(2);
    for (project, (point, role)) in (1..).zip(CLONE) {
        let scene = Scene::new(&world, world.path("storage"), project);
        let (_, new) = scene.change(&world, u32::try_from(project).unwrap());
        let strike = scene.strike(point, role, std::process::id(), chance.delay());
        let job = world.clone_job(project, &scene.target, json!({}));
        let first = world.run(&job).await;
        strike.over();
        assert_eq!(scene.is_cloned_or_not(&new), first.is_ok(), "{point:?}: {first:?}");
        assert_eq!(world.leftovers(), Vec::<String>::new(), "{point:?}");
        count(&tally.clone_failed, first.is_err());
        world.run(&job).await.unwrap_or_else(|failure| panic!("{point:?}: {failure} after {first:?}"));
        assert!(scene.is_cloned_or_not(&new), "{point:?}");
        // The next one begins with nothing fetched.
        world.run(&world.job("delete", project, json!({}))).await.unwrap();
    }
    world.restart().await;
    Scene::new(&world, world.path("storage"), 1).is_swept();
}

/// Publishes `task`, kills agent and children at `point`, and waits until they are gone.
async fn killed(agent: &mut Agent, scene: &Scene, point: Point, delay: std::time::Duration, task: &Value) {
    let strike = scene.strike_all(point, agent.pid(), delay);
    agent.publish(task).await;
    agent.ended().await;
    strike.over();
}

/// Starts the agent again and waits for the one end of `task`.
async fn completed(agent: &mut Agent, point: Point, task: &str) {
    agent.start(&[]);
    let end = agent.end(task, 0).await;
    assert_eq!(end.status, Status::Succeeded, "{point:?}: {end:?}");
    agent.ready().await;
    assert_eq!(agent.terminal_states(task, 0).len(), 1, "{point:?}");
}

fn clone_task(world: &World, scene: &Scene, id: &str) -> Value {
    json!({"v": 1, "task_id": id, "kind": "clone", "project_id": scene.project, "git_url": world.url(),
           "target_path": scene.target})
}

/// An agent that runs, and a scene in its storage.
async fn agent_with(world: &World, project: i64) -> (Agent, Scene) {
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_DISK__RESERVE", "0B");
    agent.start(&[]);
    agent.ready().await;
    let scene = Scene::new(world, agent.storage.path().to_owned(), project);
    (agent, scene)
}

async fn agent_at_a_pull(tally: &Tally) {
    let world = World::new().await;
    let mut chance = Chance::new(3);
    let (mut agent, scene) = agent_with(&world, 1).await;
    scene.change(&world, 0);
    agent.publish(&clone_task(&world, &scene, "clone")).await;
    assert_eq!(agent.end("clone", 0).await.status, Status::Succeeded);
    scene.user_works();
    for (round, (point, _)) in (1..).zip(PULL) {
        let (old, new) = scene.change(&world, round);
        let id = format!("pull-{round}");
        killed(&mut agent, &scene, point, chance.delay(), &Agent::task(&id, "pull", 1)).await;
        count(&tally.mixed, scene.every_file_is_old_new_or_the_users(&old, &new));
        completed(&mut agent, point, &id).await;
        scene.is_pulled(&new);
        scene.is_swept();
    }
}

async fn agent_at_a_clone(tally: &Tally) {
    let world = World::new().await;
    let mut chance = Chance::new(4);
    let (mut agent, _) = agent_with(&world, 1).await;
    for (project, (point, _)) in (1..).zip(CLONE) {
        let scene = Scene::new(&world, agent.storage.path().to_owned(), project);
        let (_, new) = scene.change(&world, u32::try_from(project).unwrap());
        let id = format!("clone-{project}");
        killed(&mut agent, &scene, point, chance.delay(), &clone_task(&world, &scene, &id)).await;
        count(&tally.clone_failed, !scene.is_cloned_or_not(&new));
        completed(&mut agent, point, &id).await;
        assert!(scene.is_cloned_or_not(&new), "{point:?}");
        scene.is_swept();
        let gone = format!("delete-{project}");
        agent.publish(&Agent::task(&gone, "delete", project)).await;
        assert_eq!(agent.end(&gone, 0).await.status, Status::Succeeded);
    }
}

async fn agent_at_a_delete(tally: &Tally) {
    let world = World::new().await;
    let mut chance = Chance::new(5);
    let (mut agent, first) = agent_with(&world, 1).await;
    let (_, new): (_, BTreeMap<_, _>) = first.change(&world, 0);
    for (project, point) in (1..).zip(DELETE) {
        let scene = Scene::new(&world, agent.storage.path().to_owned(), project);
        let (clone, delete) = (format!("clone-{project}"), format!("delete-{project}"));
        agent.publish(&clone_task(&world, &scene, &clone)).await;
        assert_eq!(agent.end(&clone, 0).await.status, Status::Succeeded);
        killed(&mut agent, &scene, point, chance.delay(), &Agent::task(&delete, "delete", project)).await;
        count(&tally.delete_done, !scene.is_cloned_or_not(&new));
        completed(&mut agent, point, &delete).await;
        assert!(!scene.is_cloned_or_not(&new), "{point:?}");
        scene.is_swept();
        assert!(!Path::new(&scene.owner()).exists(), "{point:?}");
    }
}
