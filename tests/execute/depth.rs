//! Clones of some depth equal those of git, and are pulled as git would.

use std::fs;

use serde_json::json;

use crate::world::{World, assert_alike, class, git, git_raw, read, write};
use haul::failure::ErrorClass;

/// An upstream with six commits on `main`, a branch, and tags of both kinds along the way.
async fn furnished() -> World {
    let world = World::new().await;
    let seed = world.seed();
    for number in 0..6 {
        world.commit(&[("a.txt", &format!("{number}\n")), (&format!("only-{number}"), "x")]);
        git(&seed, &["tag", &format!("light-{number}")]);
        git(&seed, &["tag", "-a", "-m", "annotated", &format!("v{number}")]);
    }
    git(&seed, &["checkout", "-q", "-b", "dev", "light-3"]);
    world.commit(&[("dev.txt", "dev")]);
    git(&seed, &["checkout", "-q", "main"]);
    git(&seed, &["push", "-q", "origin", "--tags"]);
    world
}

fn is_shallow(world: &World, target: &str) -> bool {
    git(&world.project(target), &["rev-parse", "--is-shallow-repository"]) == "true"
}

#[tokio::test]
async fn a_clone_of_some_depth_equals_that_of_git() {
    let world = furnished().await;
    let cases = [
        (json!({"depth": 1}), &["--depth", "1"][..]),
        (json!({"depth": 3}), &["--depth", "3"]),
        (json!({"depth": 2, "branch": "dev"}), &["--depth", "2", "--branch", "dev"]),
        (json!({"depth": 2, "tag": "v2"}), &["--depth", "2", "--branch", "v2"]),
        (json!({"depth": 1, "tag": "light-4"}), &["--depth", "1", "--branch", "light-4"]),
        (json!({"depth": 2, "single_branch": false}), &["--depth", "2", "--no-single-branch"]),
        (json!({"depth": 100}), &["--depth", "100"]),
    ];
    for (number, (fields, args)) in (0..).zip(cases) {
        let target = format!("p{number}");
        let result = world.clone(number, &target, fields.clone()).await.unwrap_or_else(|e| panic!("{fields}: {e}"));
        let reference = world.reference(args);
        assert_alike(&world.project(&target), &reference);
        let shallow = |at: &std::path::Path| fs::read_to_string(at.join(".git/shallow")).ok();
        assert_eq!(shallow(&world.project(&target)), shallow(&reference), "{fields}");
        assert_eq!(result.source.as_deref(), Some("upstream"));
        assert_eq!(result.history, None, "what was asked for is whole");
    }
    assert!(is_shallow(&world, "p0") && !is_shallow(&world, "p6"));
    assert_eq!(fs::read_dir(world.mirrors()).unwrap().count(), 0, "neither a tip store nor a mirror is left");
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn a_commit_can_be_cloned_to_a_depth_and_what_is_not_there_is_named() {
    let world = furnished().await;
    let commit = git(&world.seed(), &["rev-parse", "light-2"]);
    world.clone(1, "p", json!({"depth": 2, "commit": commit})).await.unwrap();
    let project = world.project("p");
    assert_eq!(git(&project, &["rev-parse", "HEAD"]), commit);
    assert_eq!(git(&project, &["rev-list", "--count", "HEAD"]), "2");
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
    git(&project, &["fsck", "--full", "--strict"]);
    let absent = world.clone(2, "q", json!({"depth": 1, "commit": "1".repeat(40)})).await;
    assert_eq!(class(&absent), ErrorClass::NotFound, "{absent:?}");
    assert_eq!(class(&world.clone(3, "r", json!({"depth": 1, "tag": "nope"})).await), ErrorClass::NotFound);
    assert_eq!(fs::read_dir(world.mirrors()).unwrap().count(), 0);
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn an_empty_upstream_has_no_depth() {
    let world = World::new().await;
    world.clone(1, "p", json!({"depth": 1})).await.unwrap();
    assert_eq!(git(&world.project("p"), &["symbolic-ref", "HEAD"]), "refs/heads/main");
}

#[tokio::test]
async fn the_users_own_git_deepens_and_unshallows() {
    let world = furnished().await;
    world.clone(1, "p", json!({"depth": 1})).await.unwrap();
    let project = world.project("p");
    git(&project, &["fetch", "-q", "--deepen", "2"]);
    assert_eq!(git(&project, &["rev-list", "--count", "HEAD"]), "3");
    git(&project, &["fetch", "-q", "--unshallow"]);
    assert!(!is_shallow(&world, "p"));
    assert_eq!(git(&project, &["rev-list", "--count", "HEAD"]), "6");
    git(&project, &["fsck", "--full", "--strict"]);
}

#[tokio::test]
async fn a_shallow_project_is_pulled_and_stays_shallow() {
    let world = furnished().await;
    world.clone(1, "p", json!({"depth": 2})).await.unwrap();
    let project = world.project("p");
    let boundary = read(&project, ".git/shallow");
    assert_eq!(world.pull(1, json!({})).await.unwrap().updated, Some(false));
    write(&project, "mine", "kept");
    for number in 6..9 {
        let new = world.commit(&[("a.txt", &format!("{number}\n")), ("dir/more", &format!("{number}"))]);
        let pulled = world.pull(1, json!({})).await.unwrap();
        assert_eq!((pulled.updated, pulled.head.as_deref()), (Some(true), Some(new.as_str())));
        git(&project, &["fsck", "--full", "--strict"]);
    }
    assert_eq!(git(&project, &["rev-list", "--count", "HEAD"]), "5");
    assert_eq!(read(&project, ".git/shallow"), boundary);
    assert_eq!(read(&project, "mine"), "kept");
    assert_eq!(git(&project, &["status", "--porcelain"]), "?? mine");
    let status = world.run(&world.job("status", 1, json!({}))).await.unwrap();
    assert_eq!((status.ahead, status.behind), (Some(0), Some(0)));
}

/// Merges a branch that began before the boundary, and a root of its own.
fn merge_older(world: &World) -> String {
    let seed = world.seed();
    git(&seed, &["checkout", "-q", "-b", "old", "light-1"]);
    write(&seed, "from-old", "x");
    git(&seed, &["add", "-A"]);
    git(&seed, &["commit", "-q", "-m", "on old"]);
    git(&seed, &["checkout", "-q", "--orphan", "apart"]);
    git(&seed, &["rm", "-q", "-r", "-f", "."]);
    write(&seed, "from-apart", "x");
    git(&seed, &["add", "-A"]);
    git(&seed, &["commit", "-q", "-m", "apart"]);
    git(&seed, &["checkout", "-q", "main"]);
    git(&seed, &["merge", "-q", "--no-edit", "old"]);
    git(&seed, &["merge", "-q", "--no-edit", "--allow-unrelated-histories", "apart"]);
    world.push("after")
}

#[tokio::test]
async fn a_merge_that_brings_older_commits_brings_their_history() {
    for depth in [1, 3] {
        let world = furnished().await;
        world.clone(1, "p", json!({"depth": depth})).await.unwrap();
        let reference = world.reference(&["--depth", &depth.to_string()]);
        let new = merge_older(&world);
        let pulled = world.pull(1, json!({})).await.unwrap();
        assert_eq!(pulled.head.as_deref(), Some(new.as_str()));
        let project = world.project("p");
        git(&project, &["fsck", "--full", "--strict"]);
        git(&reference, &["pull", "-q", "--ff-only", "--no-tags"]);
        for args in [&["log", "--format=%H", "HEAD"][..], &["ls-files", "--stage"], &["status", "--porcelain"]] {
            assert_eq!(git(&project, args), git(&reference, args), "{args:?}");
        }
        git(&project, &["fetch", "-q", "--unshallow"]);
        git(&project, &["fsck", "--full", "--strict"]);
        assert_eq!(
            git(&project, &["rev-list", "--count", "HEAD"]),
            git(&world.seed(), &["rev-list", "--count", "HEAD"])
        );
    }
}

#[tokio::test]
async fn a_force_pushed_upstream_of_a_shallow_project_is_a_conflict_and_reset_follows_it() {
    let world = furnished().await;
    world.clone(1, "p", json!({"depth": 1})).await.unwrap();
    let project = world.project("p");
    write(&project, "mine", "x");
    git(&project, &["add", "mine"]);
    git(&project, &["commit", "-q", "-m", "mine"]);
    git(&world.seed(), &["reset", "-q", "--hard", "light-2"]);
    let new = world.commit(&[("other", "x")]);
    assert_eq!(class(&world.pull(1, json!({})).await), ErrorClass::Conflict);
    let mine = git(&project, &["rev-parse", "HEAD"]);
    let pulled = world.pull(1, json!({"on_conflict": "reset"})).await.unwrap();
    assert_eq!(pulled.head.as_deref(), Some(new.as_str()));
    let kept = pulled.backup_ref.unwrap();
    git(&project, &["merge-base", "--is-ancestor", &mine, &kept]);
    git(&project, &["fsck", "--full", "--strict"]);
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
}

#[tokio::test]
async fn a_boundary_that_the_user_made_up_harms_nobody_else() {
    let world = furnished().await;
    world.clone(1, "p", json!({})).await.unwrap();
    let project = world.project("p");
    // Every commit a boundary, one that is none, and one that does not exist.
    let all = git(&project, &["rev-list", "HEAD"]);
    write(&project, ".git/shallow", &format!("{all}\n{}\n", "2".repeat(40)));
    world.commit(&[("a.txt", "new\n")]);
    let pulled = world.pull(1, json!({})).await;
    assert!(pulled.as_ref().is_ok_and(|pulled| pulled.updated == Some(true)), "{pulled:?}");
    write(&project, ".git/shallow", &"x".repeat(5_000_000));
    world.commit(&[("a.txt", "newer\n")]);
    assert_eq!(class(&world.pull(1, json!({})).await), ErrorClass::Conflict);
    let flood = (0..5000).map(|number| format!("{number:040}")).collect::<Vec<_>>().join("\n");
    write(&project, ".git/shallow", &flood);
    assert_eq!(class(&world.pull(1, json!({})).await), ErrorClass::Conflict);
    fs::remove_file(project.join(".git/shallow")).unwrap();
    world.pull(1, json!({})).await.unwrap();
    let out = git_raw(&project, &["fsck", "--full"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}
