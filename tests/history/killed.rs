//! Killed at any point, a tree that comes first and its history are done or not done, and the next try completes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use haul::{protocol::Status, worker::Step};
use serde_json::{Value, json};

use crate::{
    githttp::Behaviour,
    scene::Scene,
    support::{agent::Agent, rabbit::Rabbit},
    world::{git, kill_children},
};

/// Kills every child of this role that works below the scene's directory, some time after it began, until told.
fn killer(scene: &Scene, role: &'static str, delay: Duration) -> impl FnOnce() -> usize {
    let (stop, dir) = (Arc::new(AtomicBool::new(false)), scene.world.dir.path().to_owned());
    let told = Arc::clone(&stop);
    let thread = std::thread::spawn(move || {
        let mut killed = 0;
        while !told.load(Ordering::SeqCst) && killed == 0 {
            std::thread::sleep(delay);
            killed += kill_children(&dir, role);
        }
        killed
    });
    move || {
        stop.store(true, Ordering::SeqCst);
        thread.join().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_whose_child_is_killed_anywhere_is_completed_by_the_next_try() {
    let mut killed = 0;
    for delay in [0, 1, 2, 4, 6, 9, 13, 20] {
        let scene = Scene::new().await;
        scene.tree_first(json!({})).await;
        scene.server.behave(Behaviour::Serve);
        let over = killer(&scene, "workspace", Duration::from_millis(delay));
        let first = scene.history().await;
        killed += over();
        // Half-way or not, the project is a sound one.
        git(&scene.project(), &["fsck", "--full", "--strict"]);
        assert_eq!(git(&scene.project(), &["status", "--porcelain"]), "");
        if let Err(failure) = &first {
            assert!(scene.history().await.unwrap().is_some(), "after {failure}");
        }
        scene.equals_one_that_waited(&json!({}));
    }
    eprintln!("{killed} killed");
    assert!(killed >= 2, "{killed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_whose_transfers_are_killed_is_completed_by_the_next_try() {
    for delay in [0, 5, 15] {
        let scene = Scene::new().await;
        scene.server.behave(Behaviour::HoldWhole);
        let dir = scene.world.dir.path().to_owned();
        let killed = async {
            // Either of the two, or both, as it comes.
            let strike = tokio::task::spawn_blocking(move || {
                std::thread::sleep(Duration::from_millis(delay));
                while kill_children(&dir, "transfer") == 0 {
                    std::thread::yield_now();
                }
            });
            strike.await.unwrap();
            scene.server.behave(Behaviour::Serve);
        };
        let (first, ()) = tokio::join!(scene.clone(json!({})), killed);
        assert_eq!(scene.tip_stores(), Vec::<String>::new());
        assert_eq!(scene.project().exists(), first.is_ok());
        let second = scene.clone(json!({})).await.unwrap();
        if second.history.is_some() {
            scene.history().await.unwrap().unwrap();
        }
        scene.equals_one_that_waited(&json!({}));
    }
}

/// An agent that is killed at `step` of a clone whose tree comes first; the next start goes on.
async fn agent_killed_at(step: Step) {
    let scene = Scene::new().await;
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_GIT__TREE_FIRST_AFTER", "0s");
    agent.set("AGENT_DISK__RESERVE", "0B");
    scene.server.behave(Behaviour::HoldWhole);
    agent.start(&["--observe", step.as_str()]);
    let task: Value = json!({"v": 1, "task_id": "t", "kind": "clone", "project_id": 1, "git_url": scene.url(),
                             "target_path": "p"});
    agent.publish(&task).await;
    // Past the tree the whole may come.
    let project = agent.projects().join("p");
    agent.until_async("the tree", async || project.exists()).await;
    scene.server.behave(Behaviour::Serve);
    agent.ended().await;
    assert!(agent.log().contains(&format!("killed at step {step}")), "{}", agent.log());
    agent.start(&[]);
    assert_eq!(agent.end("t", 0).await.status, Status::Succeeded);
    let told = agent.saw("t", Status::History).await;
    assert!(told.error.is_none(), "{told:?}");
    assert_eq!(told.result.unwrap().history.as_deref(), Some("attached"));
    assert_eq!(git(&project, &["rev-parse", "--is-shallow-repository"]), "false");
    assert_eq!(git(&project, &["rev-list", "--count", "HEAD"]), "6");
    git(&project, &["fsck", "--full", "--strict"]);
    agent.ready().await;
    agent.drained().await;
    assert_eq!(agent.terminal_states("t", 0).len(), 1);
    agent.signal(rustix::process::Signal::TERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
}

macro_rules! killed_at {
    ($($test:ident: $step:ident;)*) => {
        $(#[tokio::test] async fn $test() { agent_killed_at(Step::$step).await; })*
    };
}

killed_at! {
    an_agent_killed_when_the_tree_is_shown: Executed;
    an_agent_killed_when_the_history_is_owed: Settled;
    an_agent_killed_when_the_tree_is_told_of: EventStruck;
    an_agent_killed_when_the_history_is_attached: HistoryDone;
    an_agent_killed_when_the_history_is_noted: HistoryNoted;
    an_agent_killed_when_the_history_is_told_of: HistoryConfirmed;
}
