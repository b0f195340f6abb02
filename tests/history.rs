//! A tree that is shown first, and its history that follows: whatever happens in between, nothing of a user is lost, and
//! what comes out equals a clone that waited.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

#[path = "support/githttp.rs"]
mod githttp;
#[path = "history/scene.rs"]
mod scene;
mod support;
#[expect(dead_code, reason = "made for more tests than this one")]
#[path = "execute/world.rs"]
mod world;

#[path = "history/hostile.rs"]
mod hostile;
#[path = "history/killed.rs"]
mod killed;
#[path = "history/users.rs"]
mod users;
#[path = "hostile_writer/writer.rs"]
mod writer;

use std::time::Duration;

use futures_util::{StreamExt, stream::FuturesUnordered};
use githttp::{Behaviour, Server};
use haul::{
    failure::ErrorClass,
    git::{GitSettings, settings::Engine},
};
use scene::Scene;
use serde_json::json;
use world::{git, write};

#[tokio::test]
async fn a_clone_shows_its_tree_first_and_with_its_history_equals_one_that_waited() {
    let first = json!({});
    let cases = [
        first.clone(),
        json!({"branch": "dev"}),
        json!({"branch": "dev", "single_branch": true}),
        json!({"tag": "v2"}),
        json!({"tag": "v2", "single_branch": true}),
    ];
    for fields in cases {
        let scene = Scene::new().await;
        let result = scene.tree_first(fields.clone()).await;
        assert_eq!(
            (result.history.as_deref(), result.source.as_deref()),
            (Some("pending"), Some("upstream")),
            "{fields}"
        );
        assert!(scene.is_shallow(), "{fields}");
        assert_eq!(git(&scene.project(), &["status", "--porcelain"]), "", "{fields}");
        assert_eq!(scene.tip_stores(), Vec::<String>::new(), "{fields}");
        git(&scene.project(), &["fsck", "--full", "--strict"]);
        scene.server.behave(Behaviour::Serve);
        let attached = scene.history().await.unwrap().unwrap();
        assert_eq!(attached.history.as_deref(), Some("attached"));
        let counts = scene.server.counts();
        assert_eq!((counts.packs, counts.depths), (2, 1), "{fields}: the whole was fetched once, the tree once");
        // Again, as after a crash before it was told of.
        scene.history().await.unwrap().unwrap();
        assert_eq!(scene.server.counts().packs, 2);
        scene.equals_one_that_waited(&fields);
    }
}

/// The same whatever the encryption, and whatever speaks with the upstream.
async fn shows_its_tree_first(transport: Engine, tls: bool) {
    let settings = GitSettings {
        tree_first_after: Some(Duration::ZERO),
        transport,
        transport_fallback: false,
        ca_file: tls.then(githttp::ca_file),
        ..GitSettings::default()
    };
    let scene = Scene::serving(settings, if tls { Server::start_tls } else { Server::start }).await;
    let result = scene.tree_first(json!({})).await;
    assert_eq!(result.source.as_deref(), Some("upstream"));
    assert!(scene.is_shallow());
    assert_eq!(git(&scene.project(), &["status", "--porcelain"]), "");
    scene.server.behave(Behaviour::Serve);
    scene.history().await.unwrap().unwrap();
    let counts = scene.server.counts();
    // The command asks once more for the tags that point to the tree's commit.
    let asked = if transport == Engine::Git { (3, 2) } else { (2, 1) };
    assert_eq!((counts.packs, counts.depths), asked, "the whole was fetched once, the tree once");
    scene.equals_one_that_waited(&json!({}));
    let new = scene.world.commit(&[("a.txt", "newer\n")]);
    assert_eq!(scene.world.pull(1, json!({})).await.unwrap().head, Some(new));
    scene.equals_one_that_waited(&json!({}));
}

#[tokio::test]
async fn a_tree_comes_first_over_tls() {
    shows_its_tree_first(Engine::Gix, true).await;
}

#[tokio::test]
async fn a_tree_comes_first_by_the_git_command() {
    shows_its_tree_first(Engine::Git, false).await;
}

#[tokio::test]
async fn a_tree_comes_first_by_the_git_command_over_tls() {
    shows_its_tree_first(Engine::Git, true).await;
}

#[tokio::test]
async fn a_host_with_one_transfer_at_a_time_shows_its_trees_first_too() {
    let settings = GitSettings { tree_first_after: Some(Duration::ZERO), host_limit: 1, ..GitSettings::default() };
    let scene = Scene::with(settings).await;
    scene.tree_first(json!({})).await;
    scene.server.behave(Behaviour::Serve);
    scene.history().await.unwrap().unwrap();
    scene.equals_one_that_waited(&json!({}));
}

#[tokio::test]
async fn of_several_clones_of_a_cold_upstream_one_shows_its_tree_first_and_the_others_come_whole() {
    let scene = Scene::new().await;
    scene.server.behave(Behaviour::HoldWhole);
    let job = |number: i64| scene.world.clone_job(number, &format!("p{number}"), json!({"git_url": scene.url()}));
    let jobs = [1, 2, 3].map(job);
    let mut clones: FuturesUnordered<_> = jobs.iter().map(|job| scene.world.run(job)).collect();
    let first = clones.next().await.unwrap().unwrap();
    assert_eq!(first.history.as_deref(), Some("pending"));
    scene.server.behave(Behaviour::Serve);
    while let Some(next) = clones.next().await {
        assert_eq!(next.unwrap().history, None);
    }
    let counts = scene.server.counts();
    assert_eq!((counts.packs, counts.depths), (2, 1), "the whole was fetched once, the tree once");
}

#[tokio::test]
async fn a_commit_is_shown_first_too() {
    let scene = Scene::new().await;
    let commit = git(&scene.world.seed(), &["rev-parse", "light-3"]);
    scene.tree_first(json!({"commit": commit})).await;
    assert_eq!(git(&scene.project(), &["rev-list", "--count", "HEAD"]), "1");
    scene.server.behave(Behaviour::Serve);
    scene.history().await.unwrap().unwrap();
    assert!(!scene.is_shallow());
    assert_eq!(git(&scene.project(), &["rev-parse", "HEAD"]), commit);
    assert_eq!(git(&scene.project(), &["rev-list", "--count", "HEAD"]), "4");
    git(&scene.project(), &["fsck", "--full", "--strict"]);
}

#[tokio::test]
async fn a_small_repository_pays_nothing_for_it() {
    let scene = Scene::after(Some(Duration::from_mins(1))).await;
    let result = scene.clone(json!({})).await.unwrap();
    assert_eq!(result.history, None);
    let counts = scene.server.counts();
    assert_eq!((counts.listings, counts.packs), (1, 1));
    // Neither does one that the node has a mirror of.
    let again = scene.world.clone_job(2, "q", json!({"git_url": scene.url()}));
    assert_eq!(scene.world.run(&again).await.unwrap().history, None);
    assert_eq!(scene.server.counts().packs, 1);
    scene.equals_one_that_waited(&json!({}));
}

#[tokio::test]
async fn a_full_fetch_that_wins_is_used() {
    let scene = Scene::new().await;
    scene.server.behave(Behaviour::HoldDepth);
    let result = scene.clone(json!({})).await.unwrap();
    assert_eq!(result.history, None);
    assert_eq!(scene.server.counts().depths, 1, "it did race");
    scene.equals_one_that_waited(&json!({}));
    assert_eq!(scene.tip_stores(), Vec::<String>::new());
}

#[tokio::test]
async fn a_tree_that_cannot_be_had_alone_waits_for_the_whole() {
    let scene = Scene::new().await;
    scene.world.commit(&[("large", &"x".repeat(100))]);
    // The depth is cut short, and so is the first full one: the attempt fails as it would have.
    scene.server.behave(Behaviour::CutPack { after: 50 });
    let failed = scene.clone(json!({})).await;
    assert!(failed.as_ref().is_err_and(|failure| failure.class == ErrorClass::Network), "{failed:?}");
    scene.server.behave(Behaviour::Serve);
    scene.clone(json!({})).await.unwrap();
    assert_eq!(scene.tip_stores(), Vec::<String>::new());
}

#[tokio::test]
async fn a_restart_between_tree_and_history_loses_nothing() {
    let mut scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    // The agent goes, and the full fetch with it; a tip store that a crash left is swept.
    std::fs::create_dir(scene.world.mirrors().join(format!("{}.tip-{}.git", "a".repeat(64), "b".repeat(40)))).unwrap();
    scene.restart().await;
    assert_eq!(scene.tip_stores(), Vec::<String>::new());
    scene.server.behave(Behaviour::Serve);
    // The same task delivered again, as after a crash before its end was noted: its history is pending still.
    let again = scene.world.run(&scene.job).await.unwrap();
    assert_eq!(again.history.as_deref(), Some("pending"));
    scene.history().await.unwrap().unwrap();
    scene.equals_one_that_waited(&json!({}));
    assert_eq!(scene.world.run(&scene.job).await.unwrap().history, None);
}

#[tokio::test]
async fn a_history_that_cannot_be_fetched_says_why_and_comes_later() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    scene.server.behave(Behaviour::status(503));
    // What went on meanwhile fails with it.
    assert!(scene.history().await.is_err_and(|failure| failure.class == ErrorClass::Network));
    assert!(scene.is_shallow());
    scene.server.behave(Behaviour::Serve);
    scene.history().await.unwrap().unwrap();
    scene.equals_one_that_waited(&json!({}));
}

#[tokio::test]
async fn a_force_push_in_between_does_not_lose_the_history_of_what_was_shown() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    let shown = git(&scene.project(), &["rev-parse", "HEAD"]);
    let before = git(&scene.world.seed(), &["rev-list", "--count", "HEAD"]);
    git(&scene.world.seed(), &["reset", "-q", "--hard", "light-1"]);
    scene.world.commit(&[("other", "x")]);
    let mut scene = scene;
    // The fetch that knew the old refs is gone with the agent.
    scene.restart().await;
    scene.server.behave(Behaviour::Serve);
    scene.history().await.unwrap().unwrap();
    assert_eq!(git(&scene.project(), &["rev-parse", "HEAD"]), shown);
    assert_eq!(git(&scene.project(), &["rev-list", "--count", "HEAD"]), before);
    git(&scene.project(), &["fsck", "--full", "--strict"]);
}

#[tokio::test]
async fn a_project_that_was_deleted_or_made_anew_owes_no_history() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    let delete = scene.world.job("delete", 1, json!({}));
    scene.world.run(&delete).await.unwrap();
    // The fetch that went on for it is stopped, and its mirror goes with the project.
    assert_eq!(std::fs::read_dir(scene.world.mirrors()).unwrap().count(), 0);
    scene.server.behave(Behaviour::Serve);
    assert_eq!(scene.history().await.unwrap(), None);
    let again = scene.world.clone_job(1, "p", json!({"git_url": scene.url(), "branch": "dev"}));
    scene.world.run(&again).await.unwrap();
    assert_eq!(scene.history().await.unwrap(), None, "another clone of the project is another matter");
}

#[tokio::test]
async fn a_pull_brings_the_history_with_it() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    let new = scene.world.commit(&[("a.txt", "newer\n")]);
    write(&scene.project(), "mine", "kept");
    scene.server.behave(Behaviour::Serve);
    let pulled = scene.world.pull(1, json!({})).await.unwrap();
    assert_eq!(pulled.head.as_deref(), Some(new.as_str()));
    assert!(!scene.is_shallow());
    std::fs::remove_file(scene.project().join("mine")).unwrap();
    scene.equals_one_that_waited(&json!({}));
    assert_eq!(scene.history().await.unwrap().unwrap().history.as_deref(), Some("attached"));
}

#[tokio::test]
async fn a_pull_that_cannot_bring_the_history_brings_its_branch() {
    let scene = Scene::new().await;
    scene.tree_first(json!({})).await;
    let new = scene.world.commit(&[("a.txt", "newer\n")]);
    write(&scene.project(), ".git/shallow.lock", "");
    scene.server.behave(Behaviour::Serve);
    let pulled = scene.world.pull(1, json!({})).await.unwrap();
    assert_eq!(pulled.head.as_deref(), Some(new.as_str()));
    assert!(scene.is_shallow());
    git(&scene.project(), &["fsck", "--full", "--strict"]);
    std::fs::remove_file(scene.project().join(".git/shallow.lock")).unwrap();
    scene.history().await.unwrap().unwrap();
    scene.equals_one_that_waited(&json!({}));
}
