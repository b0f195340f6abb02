//! Deletes remove what is the project's and nothing else; status changes nothing.

use std::{fs, os::unix::fs::symlink};

use haul::{execute::Execute, failure::ErrorClass};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::world::{Shut, World, class, git, read, write};

async fn cloned() -> World {
    let world = World::new().await;
    world.commit(&[("a.txt", "one\n"), ("dir/b.txt", "two\n")]);
    world.clone(1, "p", json!({})).await.unwrap();
    world
}

#[tokio::test]
async fn a_deleted_project_is_gone_and_its_order_goes_on() {
    let mut world = cloned().await;
    let job = world.job("delete", 1, json!({"target_path": "p"}));
    let result = world.run(&job).await.unwrap();
    assert_eq!(result.local_path.as_deref(), Some("p"));
    assert!(!world.project("p").exists() && world.leftovers().is_empty());
    // The same task again, as after a crash, and a later one.
    world.run(&job).await.unwrap();
    assert_eq!(world.seq(1).await, 2);
    world.run(&world.job("delete", 1, json!({}))).await.unwrap();
    world.restart().await;
    let state = world.executor.project(1).await;
    assert_eq!((state.seq, state.active, state.deleted), (3, false, true));
    world.clone(1, "q", json!({})).await.unwrap();
    let state = world.executor.project(1).await;
    assert_eq!((state.seq, state.active, state.deleted), (4, true, false));
    world.executor.forget(1).await.unwrap();
    assert_eq!(world.executor.project(1).await.mark, None);
}

#[tokio::test]
async fn deleting_what_was_never_there_succeeds_and_is_remembered() {
    let world = World::new().await;
    world.run(&world.job("delete", 7, json!({}))).await.unwrap();
    let state = world.executor.project(7).await;
    assert_eq!((state.seq, state.deleted, state.mark.is_some()), (1, true, true));
}

#[tokio::test]
async fn a_path_that_is_not_the_projects_own_is_a_conflict() {
    let world = cloned().await;
    world.clone(2, "q", json!({})).await.unwrap();
    for job in [
        world.job("delete", 1, json!({"target_path": "q"})),
        world.job("delete", 3, json!({"target_path": "q"})),
        world.job("pull", 1, json!({"target_path": "q"})),
        world.job("status", 1, json!({"target_path": "other"})),
    ] {
        assert_eq!(class(&world.run(&job).await), ErrorClass::Conflict, "{:?}", job.task.work);
    }
    assert!(world.project("p").exists() && world.project("q").exists());
}

#[tokio::test]
async fn a_foreign_directory_under_the_projects_name_is_never_deleted() {
    let world = cloned().await;
    fs::rename(world.project("p"), world.path("taken")).unwrap();
    write(&world.project("p"), "theirs", "x");
    world.run(&world.job("delete", 1, json!({}))).await.unwrap();
    assert_eq!(read(&world.project("p"), "theirs"), "x");
    world.clone(2, "q", json!({})).await.unwrap();
    fs::remove_dir_all(world.project("q")).unwrap();
    symlink(world.path("taken"), world.project("q")).unwrap();
    world.run(&world.job("delete", 2, json!({}))).await.unwrap();
    assert!(world.path("taken/a.txt").exists() && world.project("q").is_symlink());
}

#[tokio::test]
async fn links_in_a_deleted_project_are_not_followed() {
    let world = cloned().await;
    write(&world.path("outside"), "keep", "x");
    symlink(world.path("outside"), world.project("p/link")).unwrap();
    fs::create_dir_all(world.project("p/node_modules/a/b")).unwrap();
    world.run(&world.job("delete", 1, json!({}))).await.unwrap();
    assert_eq!(read(&world.path("outside"), "keep"), "x");
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn a_delete_refused_at_the_last_question_changes_nothing() {
    let world = cloned().await;
    let job = world.job("delete", 1, json!({}));
    world.run_with(&job, CancellationToken::new(), &|_| (), &Shut).await.unwrap_err();
    assert!(world.project("p/a.txt").exists());
    assert_eq!(world.seq(1).await, 1);
}

#[tokio::test]
async fn status_tells_how_a_project_stands() {
    let world = cloned().await;
    let status = async || world.run(&world.job("status", 1, json!({}))).await.unwrap();
    let clean = status().await;
    assert_eq!((clean.dirty, clean.ahead, clean.behind), (Some(false), Some(0), Some(0)));
    assert_eq!(clean.branch.as_deref(), Some("main"));
    assert_eq!(clean.head.as_deref(), Some(git(&world.seed(), &["rev-parse", "HEAD"]).as_str()));
    assert!(clean.last_fetch.is_some());
    let project = world.project("p");
    write(&project, "untracked", "x");
    assert_eq!(status().await.dirty, Some(true));
    git(&project, &["add", "-A"]);
    git(&project, &["commit", "-q", "-m", "mine"]);
    world.commit(&[("a.txt", "two\n")]);
    git(&project, &["fetch", "-q"]);
    let apart = status().await;
    assert_eq!((apart.dirty, apart.ahead, apart.behind), (Some(false), Some(1), Some(1)));
    git(&project, &["-c", "advice.detachedHead=false", "checkout", "-q", "HEAD~1"]);
    let detached = status().await;
    assert_eq!((detached.branch, detached.ahead), (None, None));
    assert_eq!(world.seq(1).await, 1);
}

#[tokio::test]
async fn a_status_of_nothing_is_not_found() {
    let world = cloned().await;
    assert_eq!(class(&world.run(&world.job("status", 5, json!({}))).await), ErrorClass::NotFound);
    fs::remove_dir_all(world.project("p")).unwrap();
    assert_eq!(class(&world.run(&world.job("status", 1, json!({}))).await), ErrorClass::NotFound);
}

#[tokio::test]
async fn an_altered_workspace_is_a_conflict_and_hangs_nothing() {
    let world = cloned().await;
    let git_dir = world.project("p/.git");
    let fifo = |name: &str| {
        let path = git_dir.join(name);
        let _ = fs::remove_file(&path);
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    };
    for name in ["config", "index", "packed-refs", "shallow", "info/exclude", "refs/heads/main", "HEAD"] {
        let path = git_dir.join(name);
        let kept = fs::read(&path).ok();
        fifo(name);
        let job = world.job("status", 1, json!({}));
        assert_eq!(class(&world.run(&job).await), ErrorClass::Conflict, "{name}");
        fs::remove_file(&path).unwrap();
        if let Some(kept) = kept {
            fs::write(&path, kept).unwrap();
        }
    }
    world.run(&world.job("status", 1, json!({}))).await.unwrap();
    write(&git_dir, "objects/info/alternates", "/elsewhere\n");
    assert_eq!(class(&world.run(&world.job("status", 1, json!({}))).await), ErrorClass::Conflict);
    fs::remove_file(git_dir.join("objects/info/alternates")).unwrap();
    git(&world.project("p"), &["config", "core.worktree", "/tmp"]);
    assert_eq!(class(&world.run(&world.job("status", 1, json!({}))).await), ErrorClass::Conflict);
    git(&world.project("p"), &["config", "--unset", "core.worktree"]);
    fs::rename(&git_dir, world.path("moved.git")).unwrap();
    symlink(world.path("moved.git"), &git_dir).unwrap();
    assert_eq!(class(&world.run(&world.job("status", 1, json!({}))).await), ErrorClass::Conflict);
    // A delete needs nothing of what is inside.
    world.run(&world.job("delete", 1, json!({}))).await.unwrap();
    assert!(world.path("moved.git/HEAD").exists());
}

fn mirrors(world: &World) -> usize {
    let entries = fs::read_dir(world.mirrors()).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "git")).count()
}

#[tokio::test]
async fn the_mirror_goes_with_the_last_project_on_it() {
    let mut world = World::new().await;
    world.commit(&[("a.txt", "one")]);
    world.clone(1, "a", json!({})).await.unwrap();
    world.clone(2, "b", json!({})).await.unwrap();
    world.run(&world.job("delete", 1, json!({}))).await.unwrap();
    assert_eq!(mirrors(&world), 1);
    assert_eq!(world.pull(2, json!({})).await.unwrap().objects, Some(0));
    world.run(&world.job("delete", 2, json!({}))).await.unwrap();
    assert_eq!(fs::read_dir(world.mirrors()).unwrap().count(), 0);
    world.settings.keep_mirrors = true;
    world.restart().await;
    world.clone(3, "c", json!({})).await.unwrap();
    world.run(&world.job("delete", 3, json!({}))).await.unwrap();
    assert_eq!(mirrors(&world), 1);
}

#[tokio::test]
async fn a_mirror_that_nobody_uses_goes_at_a_start_after_a_day() {
    let mut world = World::new().await;
    world.commit(&[("a.txt", "one")]);
    world.clone(1, "a", json!({})).await.unwrap();
    // The fetch succeeds, the clone does not: what was fetched is there for the next attempt.
    git(world.dir.path(), &["clone", "-q", "--bare", "up.git", "other.git"]);
    let other = format!("file://{}", world.path("other.git").display());
    world.clone(2, "b", json!({"git_url": other, "branch": "nope"})).await.unwrap_err();
    world.restart().await;
    assert_eq!(mirrors(&world), 2);
    for entry in fs::read_dir(world.mirrors()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "lock") {
            let long_ago = std::time::SystemTime::now() - std::time::Duration::from_hours(25);
            fs::File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
        }
    }
    world.restart().await;
    assert_eq!(mirrors(&world), 1);
    assert_eq!(world.pull(1, json!({})).await.unwrap().objects, Some(0));
}
