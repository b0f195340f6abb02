//! What a user does between the tree and its history, or beside it, is the user's.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use haul::failure::ErrorClass;
use serde_json::json;

use crate::{
    githttp::Behaviour,
    scene::Scene,
    world::{git, git_raw, read, write},
};

#[tokio::test]
async fn commits_branches_and_refs_of_the_user_stay() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    let project = scene.project();
    write(&project, "mine", "committed");
    git(&project, &["add", "mine"]);
    git(&project, &["commit", "-q", "-m", "mine"]);
    git(&project, &["branch", "own"]);
    // Names that the upstream has too.
    git(&project, &["tag", "v1"]);
    git(&project, &["update-ref", "refs/remotes/origin/dev", "HEAD"]);
    write(&project, "untracked", "kept");
    let mine = git(&project, &["rev-parse", "HEAD"]);
    scene.server.behave(Behaviour::Serve);
    scene.history().await.unwrap().unwrap();
    for name in ["HEAD", "main", "own", "refs/tags/v1", "refs/remotes/origin/dev"] {
        assert_eq!(git(&project, &["rev-parse", name]), mine, "{name}");
    }
    assert_eq!(git(&project, &["rev-parse", "refs/tags/v0^{}"]), git(&scene.world.seed(), &["rev-parse", "light-0"]));
    assert_eq!(git(&project, &["rev-list", "--count", "HEAD"]), "7");
    assert_eq!(git(&project, &["status", "--porcelain"]), "?? untracked");
    assert!(!scene.is_shallow());
    git(&project, &["fsck", "--full", "--strict"]);
    scene.nothing_strays();
}

#[tokio::test]
async fn a_project_that_its_user_unshallowed_is_whole() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    scene.server.behave(Behaviour::Serve);
    git(&scene.project(), &["fetch", "-q", "--unshallow", "--tags"]);
    scene.history().await.unwrap().unwrap();
    scene.equals_one_that_waited(&json!({}));
}

#[tokio::test]
async fn a_history_that_its_user_cut_elsewhere_is_left_to_them() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    scene.server.behave(Behaviour::Serve);
    git(&scene.project(), &["fetch", "-q", "--deepen", "2"]);
    let theirs = read(&scene.project(), ".git/shallow");
    let failure = scene.history().await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Conflict);
    assert!(failure.message.contains("--unshallow"), "{failure}");
    assert_eq!(read(&scene.project(), ".git/shallow"), theirs);
    scene.nothing_strays();
    git(&scene.project(), &["fsck", "--full", "--strict"]);
    git(&scene.project(), &["fetch", "-q", "--unshallow"]);
    scene.history().await.unwrap().unwrap();
    scene.equals_one_that_waited(&json!({}));
}

#[tokio::test]
async fn a_lock_of_somebody_else_is_waited_for_and_never_removed() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    scene.server.behave(Behaviour::Serve);
    write(&scene.project(), ".git/shallow.lock", "theirs");
    for _ in 0..2 {
        let failure = scene.history().await.unwrap_err();
        assert!(failure.deferred && failure.message.contains("shallow.lock"), "{failure}");
        assert!(scene.is_shallow());
        assert_eq!(read(&scene.project(), ".git/shallow.lock"), "theirs");
    }
    // What waits for the next try survives the user's own cleaning.
    fs::remove_file(scene.project().join(".git/shallow.lock")).unwrap();
    git(&scene.project(), &["gc", "-q", "--prune=now"]);
    scene.history().await.unwrap().unwrap();
    scene.equals_one_that_waited(&json!({}));
}

#[tokio::test]
async fn a_keep_of_the_users_own_stays() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    let packs = scene.project().join(".git/objects/pack");
    let pack = fs::read_dir(&packs)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "pack"));
    let keep = pack.unwrap().with_extension("keep");
    fs::write(&keep, "").unwrap();
    scene.server.behave(Behaviour::Serve);
    scene.history().await.unwrap().unwrap();
    assert!(keep.exists());
    fs::remove_file(keep).unwrap();
    scene.equals_one_that_waited(&json!({}));
}

#[tokio::test]
async fn a_project_that_its_user_removed_owes_nothing() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    scene.server.behave(Behaviour::Serve);
    fs::remove_dir_all(scene.project()).unwrap();
    assert_eq!(scene.history().await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_collects_garbage_all_the_time_loses_nothing() {
    let (mut cleaned, mut attached) = (0, 0);
    for _ in 0..20 {
        let scene = Scene::new().await;
        scene.tree_first(json!({})).await;
        scene.server.behave(Behaviour::Serve);
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let user = {
            let (project, stop, count) = (scene.project(), Arc::clone(&stop), Arc::clone(&count));
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    // It may meet a lock of ours, and says so.
                    let done = git_raw(&project, &["gc", "-q", "--prune=now"]);
                    count.fetch_add(usize::from(done.status.success()), Ordering::SeqCst);
                }
            })
        };
        // Its own lock is waited for, as the worker does.
        let mut tries = 0;
        let done = loop {
            match scene.history().await {
                Err(failure) if failure.deferred && tries < 100 => tries += 1,
                other => break other,
            }
        };
        stop.store(true, Ordering::SeqCst);
        user.join().unwrap();
        done.unwrap().unwrap();
        cleaned += count.load(Ordering::SeqCst);
        attached += 1;
        scene.equals_one_that_waited(&json!({}));
    }
    eprintln!("{attached} histories attached beside {cleaned} collections");
    assert!(cleaned > 0);
}
