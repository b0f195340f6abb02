//! Pulls bring what is new and keep whatever is the user's: one test for each line of the table.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use haul::failure::{ErrorClass, Failure};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::world::{Shut, World, assert_alike, class, git, git_raw, kill_children, read, write};

async fn cloned() -> World {
    let world = World::new().await;
    world.commit(&[("a.txt", "one\n"), ("b.txt", "b\n"), ("dir/c.txt", "c\n"), (".gitignore", "*.log\n")]);
    world.clone(1, "p", json!({})).await.unwrap();
    world
}

fn head(world: &World) -> String {
    git(&world.project("p"), &["rev-parse", "HEAD"])
}

#[tokio::test]
async fn a_project_behind_is_brought_to_what_git_would_clone() {
    let world = cloned().await;
    let seed = world.seed();
    fs::remove_file(seed.join("b.txt")).unwrap();
    fs::set_permissions(seed.join("a.txt"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("a.txt", seed.join("link")).unwrap();
    // A directory becomes a file, and a file a directory.
    fs::remove_dir_all(seed.join("dir")).unwrap();
    write(&seed, "dir", "now a file");
    write(&seed, "b.txt/inner", "now a directory");
    let tip = world.commit(&[("new/deep/file", "n")]);
    git(&seed, &["tag", "-a", "-m", "t", "v2"]);
    git(&seed, &["push", "-q", "--tags"]);
    let result = world.pull(1, json!({})).await.unwrap();
    assert_eq!((result.updated, result.head.as_deref()), (Some(true), Some(tip.as_str())));
    assert_alike(&world.project("p"), &world.reference(&[]));
    assert_eq!(world.seq(1).await, 2);
    assert!(world.leftovers().is_empty());
    // And back again.
    git(&seed, &["revert", "--no-edit", "HEAD"]);
    world.push("back");
    world.pull(1, json!({})).await.unwrap();
    assert_alike(&world.project("p"), &world.reference(&[]));
}

#[tokio::test]
async fn with_nothing_new_nothing_is_done() {
    let world = cloned().await;
    let result = world.pull(1, json!({})).await.unwrap();
    assert_eq!((result.updated, result.objects, result.branch.as_deref()), (Some(false), Some(0), Some("main")));
    assert_eq!(world.seq(1).await, 2);
}

#[tokio::test]
async fn unrelated_changes_of_the_user_stay() {
    let world = cloned().await;
    let project = world.project("p");
    write(&project, "b.txt", "mine\n");
    write(&project, "untracked", "u");
    write(&project, "debug.log", "ignored");
    write(&project, "staged", "s");
    git(&project, &["add", "staged"]);
    world.commit(&[("a.txt", "two\n"), ("d.txt", "d\n")]);
    assert_eq!(world.pull(1, json!({})).await.unwrap().updated, Some(true));
    assert_eq!((read(&project, "a.txt").as_str(), read(&project, "d.txt").as_str()), ("two\n", "d\n"));
    assert_eq!((read(&project, "b.txt").as_str(), read(&project, "untracked").as_str()), ("mine\n", "u"));
    assert_eq!(read(&project, "debug.log"), "ignored");
    assert_eq!(git(&project, &["status", "--porcelain"]), " M b.txt\nA  staged\n?? untracked");
}

#[tokio::test]
async fn anything_of_the_users_in_the_way_is_a_conflict_and_nothing_changes() {
    let world = cloned().await;
    let project = world.project("p");
    let before = head(&world);
    git(&world.seed(), &["rm", "-q", "b.txt"]);
    world.commit(&[("a.txt", "two\n"), ("new.txt", "n"), ("out.log", "l"), ("dir/c.txt", "cc\n"), ("x/y", "y")]);
    git(&world.seed(), &["add", "-f", "out.log"]);
    world.push("ignored");
    let prepare: [(&str, &dyn Fn()); 9] = [
        ("a.txt", &|| write(&project, "a.txt", "mine\n")),
        ("b.txt", &|| write(&project, "b.txt", "mine\n")),
        ("new.txt", &|| write(&project, "new.txt", "mine")),
        ("out.log", &|| write(&project, "out.log", "mine")),
        ("a.txt", &|| fs::set_permissions(project.join("a.txt"), fs::Permissions::from_mode(0o755)).unwrap()),
        ("new.txt", &|| write(&project, "new.txt/inner", "mine")),
        ("x", &|| write(&project, "x", "mine")),
        ("dir", &|| {
            fs::rename(project.join("dir"), project.join("elsewhere")).unwrap();
            symlink("elsewhere", project.join("dir")).unwrap();
        }),
        ("a.txt", &|| {
            write(&project, "a.txt", "staged\n");
            git(&project, &["add", "a.txt"]);
        }),
    ];
    for (number, (name, change)) in prepare.into_iter().enumerate() {
        change();
        let kept = crate::world::listing(&project);
        let failure = world.pull(1, json!({})).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Conflict, "{number}");
        assert!(failure.message.contains(name), "{number}: {failure}");
        assert_eq!(crate::world::listing(&project), kept, "{number}");
        assert_eq!(head(&world), before);
        assert!(world.leftovers().is_empty(), "{number}");
        git(&project, &["reset", "-q", "--hard"]);
        git(&project, &["clean", "-qfdx"]);
    }
    assert_eq!(world.seq(1).await, 1);
    // A file that is missing, or is what the upstream has already, loses nothing.
    fs::remove_file(project.join("a.txt")).unwrap();
    write(&project, "new.txt", "n");
    world.pull(1, json!({})).await.unwrap();
    assert_alike(&project, &world.reference(&[]));
}

#[tokio::test]
async fn reset_keeps_what_was_in_the_way_as_a_commit() {
    let world = cloned().await;
    let project = world.project("p");
    world.commit(&[("a.txt", "two\n"), ("new.txt", "n"), ("x/y", "y"), ("b.txt", "bb\n")]);
    write(&world.seed(), "out.log", "l");
    git(&world.seed(), &["add", "-f", "out.log"]);
    world.push("ignored");
    write(&project, "a.txt", "mine\n");
    write(&project, "new.txt/inner", "deep");
    write(&project, "out.log", "ignored but mine");
    write(&project, "x", "a file in the way");
    write(&project, "b.txt", "staged\n");
    git(&project, &["add", "b.txt"]);
    write(&project, "b.txt", "and changed again\n");
    write(&project, "unrelated", "stays");
    let result = world.pull(1, json!({"on_conflict": "reset"})).await.unwrap();
    let backup = result.backup_ref.unwrap();
    assert!(backup.starts_with("refs/haul/backup/"), "{backup}");
    let kept = |path: &str| git(&project, &["show", &format!("{backup}:{path}")]);
    assert_eq!(kept("a.txt"), "mine");
    assert_eq!(kept("new.txt/inner"), "deep");
    assert_eq!(kept("out.log"), "ignored but mine");
    assert_eq!(kept("x"), "a file in the way");
    assert_eq!(kept("b.txt"), "and changed again");
    assert_eq!(git(&project, &["show", &format!("{backup}^2:b.txt")]), "staged");
    assert_eq!(read(&project, "unrelated"), "stays");
    fs::remove_file(project.join("unrelated")).unwrap();
    assert_eq!(crate::world::listing(&project), crate::world::listing(&world.reference(&[])));
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
}

#[tokio::test]
async fn a_project_ahead_is_left_as_it_is() {
    let world = cloned().await;
    let project = world.project("p");
    git(&project, &["commit", "-q", "--allow-empty", "-m", "mine"]);
    let mine = head(&world);
    let result = world.pull(1, json!({})).await.unwrap();
    assert_eq!((result.updated, result.head.as_deref()), (Some(false), Some(mine.as_str())));
}

#[tokio::test]
async fn a_diverged_project_is_a_conflict_and_reset_keeps_its_commits() {
    let world = cloned().await;
    let project = world.project("p");
    write(&project, "mine.txt", "m");
    git(&project, &["add", "-A"]);
    git(&project, &["commit", "-q", "-m", "mine"]);
    let mine = head(&world);
    let tip = world.commit(&[("a.txt", "two\n")]);
    assert_eq!(class(&world.pull(1, json!({})).await), ErrorClass::Conflict);
    assert_eq!(head(&world), mine);
    // Where the upstream is can be seen all the same.
    assert_eq!(git(&project, &["rev-parse", "origin/main"]), tip);
    let status = world.run(&world.job("status", 1, json!({}))).await.unwrap();
    assert_eq!((status.ahead, status.behind), (Some(1), Some(1)));
    assert_eq!(class(&world.pull(1, json!({})).await), ErrorClass::Conflict);
    let result = world.pull(1, json!({"on_conflict": "reset"})).await.unwrap();
    assert_eq!(head(&world), tip);
    let backup = result.backup_ref.unwrap();
    assert!(git_raw(&project, &["merge-base", "--is-ancestor", &mine, &backup]).status.success());
    assert_eq!(crate::world::listing(&project), crate::world::listing(&world.reference(&[])));
}

#[tokio::test]
async fn a_force_pushed_upstream_is_a_conflict_and_reset_follows_it() {
    let world = cloned().await;
    world.commit(&[("a.txt", "two\n")]);
    world.pull(1, json!({})).await.unwrap();
    git(&world.seed(), &["reset", "-q", "--hard", "HEAD~1"]);
    let tip = world.commit(&[("a.txt", "another\n")]);
    assert_eq!(class(&world.pull(1, json!({})).await), ErrorClass::Conflict);
    world.pull(1, json!({"on_conflict": "reset"})).await.unwrap();
    assert_eq!(head(&world), tip);
    assert_eq!(git(&world.project("p"), &["rev-parse", "origin/main"]), tip);
}

#[tokio::test]
async fn another_branch_or_a_detached_head_is_not_touched_but_the_tracking_refs_move() {
    let world = cloned().await;
    let project = world.project("p");
    git(&project, &["checkout", "-q", "-b", "mine"]);
    let tip = world.commit(&[("a.txt", "two\n")]);
    let result = world.pull(1, json!({})).await.unwrap();
    assert_eq!((result.updated, result.branch.as_deref()), (Some(false), Some("mine")));
    assert_eq!(git(&project, &["rev-parse", "origin/main"]), tip);
    git(&project, &["-c", "advice.detachedHead=false", "checkout", "-q", "--detach"]);
    write(&project, "a.txt", "mine\n");
    let tip = world.commit(&[("a.txt", "three\n")]);
    let result = world.pull(1, json!({})).await.unwrap();
    assert_eq!((result.updated, result.branch), (Some(false), None));
    assert_eq!(git(&project, &["rev-parse", "origin/main"]), tip);
    assert_eq!(read(&project, "a.txt"), "mine\n");
    git(&world.seed(), &["tag", "v1"]);
    git(&world.seed(), &["push", "-q", "--tags"]);
    world.clone(2, "tagged", json!({"tag": "v1"})).await.unwrap();
    let newer = world.commit(&[("a.txt", "four\n")]);
    assert_eq!(world.pull(2, json!({})).await.unwrap().updated, Some(false));
    assert_eq!(git(&world.project("tagged"), &["rev-parse", "origin/main"]), newer);
}

#[tokio::test]
async fn a_merge_under_way_is_a_conflict() {
    let world = cloned().await;
    let project = world.project("p");
    git(&project, &["checkout", "-q", "-b", "side"]);
    git(&project, &["commit", "-q", "--allow-empty", "-m", "side"]);
    git(&project, &["checkout", "-q", "main"]);
    git(&project, &["commit", "-q", "--allow-empty", "-m", "mine"]);
    git(&project, &["merge", "-q", "--no-commit", "--no-ff", "side"]);
    world.commit(&[("a.txt", "two\n")]);
    assert_eq!(class(&world.pull(1, json!({})).await), ErrorClass::Conflict);
    assert_eq!(class(&world.pull(1, json!({"on_conflict": "reset"})).await), ErrorClass::Conflict);
}

#[tokio::test]
async fn a_held_lock_is_a_conflict_and_stays() {
    let world = cloned().await;
    world.commit(&[("a.txt", "two\n")]);
    write(&world.project("p"), ".git/index.lock", "");
    assert_eq!(class(&world.pull(1, json!({})).await), ErrorClass::Conflict);
    assert_eq!(read(&world.project("p"), "a.txt"), "one\n");
    assert!(world.project("p/.git/index.lock").exists());
}

#[tokio::test]
async fn what_is_gone_is_not_found() {
    let world = cloned().await;
    assert_eq!(class(&world.pull(9, json!({})).await), ErrorClass::NotFound);
    git(&world.seed(), &["checkout", "-q", "-b", "other"]);
    world.commit(&[("a.txt", "two\n")]);
    git(&world.path("up.git"), &["symbolic-ref", "HEAD", "refs/heads/other"]);
    git(&world.path("up.git"), &["branch", "-q", "-D", "main"]);
    let failure = world.pull(1, json!({})).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound);
    assert!(failure.message.contains("main"), "{failure}");
    fs::remove_dir_all(world.project("p")).unwrap();
    assert_eq!(class(&world.pull(1, json!({})).await), ErrorClass::NotFound);
}

#[tokio::test]
async fn an_empty_project_gets_the_first_commits() {
    let world = World::new().await;
    world.clone(1, "p", json!({})).await.unwrap();
    assert_eq!(world.pull(1, json!({})).await.unwrap().updated, Some(false));
    write(&world.project("p"), "mine", "m");
    let tip = world.commit(&[("a.txt", "one\n"), ("d/e", "e")]);
    let result = world.pull(1, json!({})).await.unwrap();
    assert_eq!((result.updated, result.head.as_deref()), (Some(true), Some(tip.as_str())));
    assert_eq!(git(&world.project("p"), &["status", "--porcelain"]), "?? mine");
}

#[tokio::test]
async fn a_narrow_clone_pulls_its_branch_alone() {
    let world = cloned().await;
    world.clone(2, "narrow", json!({"branch": "main", "single_branch": true})).await.unwrap();
    git(&world.seed(), &["push", "-q", "origin", "HEAD:refs/heads/other"]);
    let tip = world.commit(&[("a.txt", "two\n")]);
    world.pull(2, json!({})).await.unwrap();
    let project = world.project("narrow");
    assert_eq!(git(&project, &["rev-parse", "HEAD"]), tip);
    assert_eq!(git(&project, &["for-each-ref", "--format=%(refname)", "refs/remotes"]).lines().count(), 2);
}

#[tokio::test]
async fn files_that_a_filter_rewrites_are_clean() {
    let world = World::new().await;
    world.commit(&[(".gitattributes", "*.crlf text eol=crlf\n"), ("lines.crlf", "x\ny\n")]);
    world.clone(1, "p", json!({})).await.unwrap();
    assert_eq!(read(&world.project("p"), "lines.crlf"), "x\r\ny\r\n");
    world.commit(&[("lines.crlf", "x\ny\nz\n"), ("more.crlf", "m\n")]);
    world.pull(1, json!({})).await.unwrap();
    assert_alike(&world.project("p"), &world.reference(&[]));
}

#[tokio::test]
async fn a_pull_refused_at_the_last_question_writes_nothing() {
    let world = cloned().await;
    world.commit(&[("a.txt", "two\n")]);
    let job = world.job("pull", 1, json!({}));
    world.run_with(&job, CancellationToken::new(), &|_| (), &Shut).await.unwrap_err();
    assert_eq!(read(&world.project("p"), "a.txt"), "one\n");
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn a_pull_interrupted_while_writing_is_completed_by_the_next() {
    let mut world = cloned().await;
    let project = world.project("p");
    let old = head(&world);
    let tip = world.commit(&[("a.txt", "two\n"), ("b.txt", "bb\n"), ("only-now", "x")]);
    // As the kill leaves it: noted, some files written, index and HEAD not.
    let note = json!({"project": 1, "old": old, "new": tip});
    fs::write(world.project(".haul/pulls/p"), note.to_string()).unwrap();
    git(&project, &["fetch", "-q"]);
    write(&project, "a.txt", "two\n");
    write(&project, "only-now", "x");
    fs::create_dir_all(project.join(".git/haul-waiting-0123/d")).unwrap();
    // The upstream has gone on meanwhile, and dropped a file that was written already.
    git(&world.seed(), &["rm", "-q", "only-now"]);
    world.commit(&[("b.txt", "bbb\n")]);
    world.restart().await;
    assert_eq!(world.pull(1, json!({})).await.unwrap().updated, Some(true));
    assert_alike(&project, &world.reference(&[]));
    assert!(world.leftovers().is_empty());
    assert!(!project.join(".git/haul-waiting-0123").exists());
}

#[tokio::test]
async fn a_pull_killed_after_its_last_write_is_reported_as_an_update_by_the_next() {
    let mut world = cloned().await;
    let old = head(&world);
    let tip = world.commit(&[("a.txt", "two\n")]);
    world.pull(1, json!({})).await.unwrap();
    fs::write(world.project(".haul/pulls/p"), json!({"project": 1, "old": old, "new": tip}).to_string()).unwrap();
    world.restart().await;
    assert_eq!(world.pull(1, json!({})).await.unwrap().updated, Some(true));
    assert_eq!(world.pull(1, json!({})).await.unwrap().updated, Some(false));
}

#[tokio::test]
async fn what_the_user_stages_during_a_pull_is_not_lost() {
    let world = cloned().await;
    let project = world.project("p");
    let old = head(&world);
    world.commit(&[("a.txt", "two\n")]);
    let stage = |progress: haul::protocol::Progress| {
        if progress.phase == "checkout" {
            write(&project, "staged", "s");
            git(&project, &["add", "staged"]);
        }
    };
    let job = world.job("pull", 1, json!({}));
    let first = world.run_with(&job, CancellationToken::new(), &stage, &crate::world::Open).await;
    if let Err(failure) = first {
        assert_eq!((failure.class, head(&world)), (ErrorClass::Conflict, old));
        world.pull(1, json!({})).await.unwrap();
    }
    assert_eq!(git(&project, &["status", "--porcelain"]), "A  staged");
    assert_eq!(read(&project, "a.txt"), "two\n");
}

#[tokio::test]
async fn a_pull_stopped_at_any_phase_is_completed_by_the_next() {
    let world = cloned().await;
    for (number, phase) in ["connecting", "receiving", "resolving", "checkout"].into_iter().enumerate() {
        let files: Vec<(String, String)> =
            (0..200).map(|file| (format!("many/{file}"), format!("{number} {file}"))).collect();
        let files: Vec<(&str, &str)> = files.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        world.commit(&files);
        let cancel = CancellationToken::new();
        let seen = cancel.clone();
        let stop = move |progress: haul::protocol::Progress| {
            if progress.phase == phase {
                seen.cancel();
            }
        };
        let job = world.job("pull", 1, json!({}));
        let stopped: Result<_, Failure> = world.run_with(&job, cancel, &stop, &crate::world::Open).await;
        world.run(&job).await.unwrap_or_else(|failure| panic!("{phase}: {failure} after {stopped:?}"));
        assert_alike(&world.project("p"), &world.reference(&[]));
    }
}

#[tokio::test]
async fn a_second_address_over_a_project_is_a_conflict() {
    let world = cloned().await;
    let other = format!("file://{}", world.path("elsewhere.git").display());
    assert_eq!(class(&world.pull(1, json!({"git_url": other})).await), ErrorClass::Conflict);
}

#[tokio::test]
async fn hooks_and_programs_of_the_user_are_not_run() {
    let world = cloned().await;
    let project = world.project("p");
    let mark = world.path("ran");
    let script = format!("#!/bin/sh\ntouch {}\n", mark.display());
    for hook in ["post-checkout", "post-merge", "reference-transaction", "pre-commit", "post-index-change"] {
        write(&project, &format!(".git/hooks/{hook}"), &script);
        fs::set_permissions(project.join(".git/hooks").join(hook), fs::Permissions::from_mode(0o755)).unwrap();
    }
    write(&project, ".git/evil", &script);
    fs::set_permissions(project.join(".git/evil"), fs::Permissions::from_mode(0o755)).unwrap();
    let evil = project.join(".git/evil").display().to_string();
    for (key, value) in [
        ("core.fsmonitor", evil.as_str()),
        ("filter.evil.clean", &evil),
        ("filter.evil.smudge", &evil),
        ("filter.evil.process", &evil),
        ("core.sshCommand", &evil),
        ("credential.helper", &evil),
    ] {
        // Set without git, which would run some of them.
        let config = read(&project, ".git/config");
        let (section, name) = key.rsplit_once('.').unwrap();
        let section = section.replacen('.', " \"", 1) + if section.contains('.') { "\"" } else { "" };
        write(&project, ".git/config", &format!("{config}[{section}]\n\t{name} = {value}\n"));
    }
    write(&project, ".git/info/attributes", "* filter=evil\n");
    write(&project, "c.txt", "mine");
    world.commit(&[("a.txt", "two\n"), ("c.txt", "c")]);
    world.pull(1, json!({"on_conflict": "reset"})).await.unwrap();
    world.run(&world.job("status", 1, json!({}))).await.unwrap();
    assert_eq!(read(&project, "a.txt"), "two\n");
    assert!(!mark.exists());
}

#[tokio::test]
async fn a_pull_whose_child_is_killed_is_completed_by_the_next() {
    let world = cloned().await;
    for (number, phase) in ["resolving", "checkout", "checkout"].into_iter().enumerate() {
        let files: Vec<(String, String)> =
            (0..400).map(|file| (format!("many/{file}"), format!("{number} {file}"))).collect();
        let files: Vec<(&str, &str)> = files.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        world.commit(&files);
        write(&world.project("p"), "mine", "stays");
        let dir = world.dir.path().to_owned();
        let killed = std::sync::atomic::AtomicUsize::new(0);
        let strike = |progress: haul::protocol::Progress| {
            if progress.phase == phase && killed.load(std::sync::atomic::Ordering::Relaxed) == 0 {
                killed.fetch_add(kill_children(&dir, "workspace"), std::sync::atomic::Ordering::Relaxed);
            }
        };
        let job = world.job("pull", 1, json!({}));
        let stopped = world.run_with(&job, CancellationToken::new(), &strike, &crate::world::Open).await;
        if let Err(failure) = &stopped {
            assert_eq!(failure.class, ErrorClass::Internal, "{phase}: {failure}");
        }
        world.run(&job).await.unwrap_or_else(|failure| panic!("{phase}: {failure} after {stopped:?}"));
        assert_eq!(read(&world.project("p"), "mine"), "stays");
        fs::remove_file(world.project("p/mine")).unwrap();
        assert_alike(&world.project("p"), &world.reference(&[]));
    }
}
