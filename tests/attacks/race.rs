//! The projects directory, and a task's target in it, swapped for symlinks while clones run.

use std::{
    fs,
    os::unix::fs::symlink,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use haul::protocol::Status;

use crate::{
    support::{agent::Agent, repository::assert_whole},
    world::World,
};

/// Clones that race with each swap.
const CLONES: i64 = 12;

#[tokio::test]
async fn nothing_is_written_through_a_projects_directory_swapped_for_a_symlink() {
    raced(|projects, outside, step| {
        let real = projects.with_file_name("projects.real");
        if step {
            let _ = fs::rename(projects, &real);
            let _ = symlink(outside, projects);
        } else {
            let _ = fs::remove_file(projects);
            let _ = fs::rename(&real, projects);
        }
    })
    .await;
}

#[tokio::test]
async fn nothing_is_written_through_a_target_swapped_for_a_symlink() {
    raced(|projects, outside, step| {
        for clone in 0..CLONES {
            let target = projects.join(format!("raced_{clone}"));
            if step {
                let _ = symlink(outside, &target);
            } else if target.is_symlink() {
                let _ = fs::remove_file(&target);
            }
        }
    })
    .await;
}

/// Clones while `swap` puts symlinks in place (true) and takes them away (false), over and over.
async fn raced(swap: impl Fn(&std::path::Path, &std::path::Path, bool) + Send + 'static) {
    let world = World::open().await;
    let outside = tempfile::tempdir().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let swapping = {
        let (projects, outside, stop) = (world.agent.projects(), outside.path().to_owned(), stop.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                for step in [true, false] {
                    swap(&projects, &outside, step);
                    std::thread::sleep(std::time::Duration::from_micros(300));
                }
            }
        })
    };
    let mut ended = Vec::new();
    for clone in 0..CLONES {
        let task =
            Agent::clone_task(&format!("raced-{clone}"), 100 + clone, &world.upstream, &format!("raced_{clone}"));
        world.agent.publish(&task).await;
    }
    for clone in 0..CLONES {
        ended.push(world.agent.end(&format!("raced-{clone}"), 0).await);
    }
    stop.store(true, Ordering::SeqCst);
    swapping.join().unwrap();
    assert!(fs::read_dir(outside.path()).unwrap().next().is_none(), "something was written outside");
    let head = crate::support::repository::git(&world.upstream.work(), &["rev-parse", "HEAD"]);
    for (clone, end) in ended.into_iter().enumerate() {
        if end.status == Status::Succeeded {
            assert_whole(&world.agent.projects().join(format!("raced_{clone}")), &head);
        } else {
            assert_eq!(end.status, Status::Failed, "{end:?}");
        }
    }
    world.agent.publish(&Agent::clone_task("after", 98, &world.upstream, "after")).await;
    assert_eq!(world.agent.end("after", 0).await.status, Status::Succeeded);
    assert_whole(&world.agent.projects().join("after"), &head);
    world.unharmed().await;
}
