//! Clones equal those of git, once, whole, and only where they belong.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt, fs::symlink},
};

use haul::{execute::Execute, failure::ErrorClass, git::GitSettings};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::world::{Open, Shut, World, assert_alike, class, git, git_raw, kill_children, read, write};

/// An upstream with two branches, tags of both kinds, and every kind of entry.
async fn furnished() -> World {
    let world = World::new().await;
    let seed = world.seed();
    world.commit(&[
        ("a.txt", "one\n"),
        ("dir/b.txt", "two\n"),
        ("dir/deep/c", "three"),
        (".gitattributes", "*.crlf eol=crlf\n"),
    ]);
    fs::write(seed.join("run.sh"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(seed.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    write(&seed, "lines.crlf", "x\ny\n");
    symlink("a.txt", seed.join("inside")).unwrap();
    symlink("/etc/passwd", seed.join("outside")).unwrap();
    symlink("nowhere/../..", seed.join("dangling")).unwrap();
    fs::write(seed.join(OsStr::from_bytes(b"odd-\xff\xfe-name")), "bytes").unwrap();
    write(&seed, "spaces and \"quotes\"", "q");
    git(&seed, &["update-index", "--add", "--cacheinfo", "160000,1111111111111111111111111111111111111111,sub"]);
    git(&seed, &["add", "-A", "--", ".", ":!sub"]);
    git(&seed, &["update-index", "--add", "--cacheinfo", "160000,1111111111111111111111111111111111111111,sub"]);
    git(&seed, &["commit", "-q", "-m", "every kind"]);
    git(&seed, &["tag", "light"]);
    git(&seed, &["tag", "-a", "-m", "annotated", "v1"]);
    git(&seed, &["push", "-q", "origin", "HEAD", "--tags"]);
    git(&seed, &["rm", "-q", "--cached", "sub"]);
    git(&seed, &["checkout", "-q", "-b", "dev/one"]);
    world.commit(&[("dev.txt", "dev")]);
    git(&seed, &["tag", "only-dev"]);
    git(&seed, &["push", "-q", "origin", "--tags"]);
    git(&seed, &["checkout", "-q", "main"]);
    world.commit(&[("last.txt", "last")]);
    world
}

#[tokio::test]
async fn every_variant_of_a_clone_equals_that_of_git() {
    let world = furnished().await;
    let first = git(&world.seed(), &["rev-list", "--max-parents=0", "main"]);
    let cases = [
        (json!({}), &[][..]),
        (json!({"branch": "dev/one"}), &["--branch", "dev/one"]),
        (json!({"tag": "light"}), &["--branch", "light"]),
        (json!({"tag": "v1"}), &["--branch", "v1"]),
        (json!({"branch": "dev/one", "single_branch": true}), &["--branch", "dev/one", "--single-branch"]),
        (json!({"branch": "main", "single_branch": true}), &["--branch", "main", "--single-branch"]),
    ];
    for (number, (fields, args)) in (0..).zip(cases) {
        let target = format!("p{number}");
        let result = world.clone(number, &target, fields.clone()).await.unwrap_or_else(|e| panic!("{fields}: {e}"));
        let reference = world.reference(args);
        assert_alike(&world.project(&target), &reference);
        assert_eq!(result.head.as_deref(), Some(git(&reference, &["rev-parse", "HEAD"]).as_str()));
        assert_eq!(result.local_path.as_deref(), Some(target.as_str()));
        assert_eq!(result.branch.is_some(), fields.get("tag").is_none());
    }
    world.clone(99, "commit", json!({"commit": first})).await.unwrap();
    let reference = world.reference(&[]);
    git(&reference, &["-c", "advice.detachedHead=false", "checkout", "-q", &first]);
    git(&reference, &["branch", "-q", "-D", "main"]);
    let ours = world.project("commit");
    assert_eq!(git(&ours, &["rev-parse", "HEAD"]), first);
    assert_eq!(git(&ours, &["status", "--porcelain"]), "");
    assert_eq!(crate::world::listing(&ours), crate::world::listing(&reference));
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn the_users_own_pull_and_push_work_in_a_clone() {
    let world = furnished().await;
    world.clone(1, "p", json!({})).await.unwrap();
    let new = world.commit(&[("a.txt", "newer\n")]);
    let project = world.project("p");
    git(&project, &["pull", "-q", "--ff-only"]);
    assert_eq!(git(&project, &["rev-parse", "HEAD"]), new);
    write(&project, "mine", "x");
    git(&project, &["add", "mine"]);
    git(&project, &["commit", "-q", "-m", "mine"]);
    git(&project, &["push", "-q"]);
}

#[tokio::test]
async fn an_empty_upstream_becomes_an_empty_project() {
    let world = World::new().await;
    let result = world.clone(1, "p", json!({})).await.unwrap();
    assert_eq!((result.head, result.branch.as_deref()), (None, Some("main")));
    assert_eq!(git(&world.project("p"), &["symbolic-ref", "HEAD"]), "refs/heads/main");
    assert_eq!(git(&world.project("p"), &["status", "--porcelain"]), "");
    assert_eq!(git(&world.project("p"), &["config", "remote.origin.url"]), world.url());
    let failed = world.clone(2, "q", json!({"branch": "main"})).await;
    assert_eq!(class(&failed), ErrorClass::NotFound);
}

#[tokio::test]
async fn objects_are_no_links_into_the_mirror() {
    use std::os::unix::fs::MetadataExt;
    let world = furnished().await;
    world.clone(1, "p", json!({})).await.unwrap();
    let mut packs = 0;
    for entry in fs::read_dir(world.project("p/.git/objects/pack")).unwrap() {
        let stat = entry.unwrap().metadata().unwrap();
        assert_eq!((stat.nlink(), stat.mode() & 0o777), (1, 0o444));
        packs += 1;
    }
    assert!(packs > 0);
}

#[tokio::test]
async fn a_clone_is_done_once_and_counted_once() {
    let world = furnished().await;
    let job = world.clone_job(1, "p", json!({}));
    world.run(&job).await.unwrap();
    write(&world.project("p"), "mine", "kept");
    // The same task again, as after a crash before it was settled.
    world.run(&job).await.unwrap();
    assert_eq!(world.seq(1).await, 1);
    let again = world.clone(1, "p", json!({"branch": "main"})).await.unwrap();
    assert_eq!((again.objects, world.seq(1).await), (Some(0), 2));
    assert_eq!(read(&world.project("p"), "mine"), "kept");
    let state = world.executor.project(1).await;
    assert!(state.active && !state.deleted);
    assert_eq!(state.mark.unwrap().arrived, 2);
    assert_eq!(class(&world.clone(1, "p", json!({"tag": "v1"})).await), ErrorClass::Conflict);
}

#[tokio::test]
async fn a_path_in_use_is_a_conflict_and_stays_as_it_is() {
    let world = furnished().await;
    world.clone(1, "p", json!({})).await.unwrap();
    write(&world.project("foreign"), "f", "x");
    fs::write(world.project("file"), "x").unwrap();
    symlink(world.path("seed"), world.project("link")).unwrap();
    for target in ["p", "foreign", "file", "link"] {
        assert_eq!(class(&world.clone(2, target, json!({})).await), ErrorClass::Conflict, "{target}");
    }
    assert_eq!(class(&world.clone(1, "elsewhere", json!({})).await), ErrorClass::Conflict);
    git(world.dir.path(), &["clone", "-q", "--bare", "up.git", "other.git"]);
    let other = format!("file://{}", world.path("other.git").display());
    assert_eq!(class(&world.clone(1, "p", json!({"git_url": other})).await), ErrorClass::Conflict);
    assert_eq!(read(&world.project("foreign"), "f"), "x");
    assert!(world.leftovers().is_empty());
    assert!(!world.executor.project(2).await.active);
}

#[tokio::test]
async fn a_project_that_its_user_removed_is_cloned_anew() {
    let world = furnished().await;
    world.clone(1, "p", json!({})).await.unwrap();
    fs::remove_dir_all(world.project("p")).unwrap();
    assert!(!world.executor.project(1).await.active);
    world.clone(1, "p", json!({})).await.unwrap();
    assert_alike(&world.project("p"), &world.reference(&[]));
    assert_eq!(world.seq(1).await, 2);
}

#[tokio::test]
async fn a_projects_directory_swapped_for_a_link_is_refused() {
    let world = furnished().await;
    world.clone(1, "p", json!({})).await.unwrap();
    fs::rename(world.path("storage/projects"), world.path("away")).unwrap();
    symlink(world.path("away"), world.path("storage/projects")).unwrap();
    for job in [world.clone_job(2, "q", json!({})), world.job("delete", 1, json!({})), world.job("pull", 1, json!({}))]
    {
        assert_eq!(class(&world.run(&job).await), ErrorClass::Forbidden, "{:?}", job.task.kind());
    }
    assert!(world.path("away/p/a.txt").exists());
}

#[tokio::test]
async fn what_does_not_exist_is_named() {
    let world = furnished().await;
    let cases = [
        (json!({"branch": "nope"}), "nope"),
        (json!({"tag": "v9"}), "v9"),
        (json!({"commit": "1".repeat(40)}), "1111111"),
        (json!({"branch": "main", "expect_commit": "2".repeat(40)}), "2222222"),
    ];
    for (fields, name) in cases {
        let failure = world.clone(1, "p", fields.clone()).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::NotFound, "{fields}: {failure}");
        assert!(failure.message.contains(name), "{failure}");
    }
    let tip = git(&world.seed(), &["rev-parse", "v1^{commit}"]);
    world.clone(1, "p", json!({"tag": "v1", "expect_commit": tip})).await.unwrap();
}

#[tokio::test]
async fn an_owner_that_no_setting_allows_is_refused() {
    let world = World::new().await;
    let failure = world.clone(1, "p", json!({"owner": "1000:1000"})).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Forbidden);
    assert!(failure.message.contains("git.owners"), "{failure}");
}

#[tokio::test]
async fn a_tree_over_the_budget_is_not_checked_out() {
    let small = GitSettings { allow_file: true, tree_first_after: None, max_files: 3, ..GitSettings::default() };
    let world = World::with(small).await;
    world.commit(&[("a", "1"), ("b", "2"), ("c", "3"), ("d/e", "4")]);
    assert_eq!(class(&world.clone(1, "p", json!({})).await), ErrorClass::Quota);
    let thin = GitSettings {
        allow_file: true,
        tree_first_after: None,
        max_bytes: bytesize::ByteSize(100),
        ..GitSettings::default()
    };
    let world = World::with(thin).await;
    world.commit(&[("a", &"x".repeat(200))]);
    assert_eq!(class(&world.clone(1, "p", json!({})).await), ErrorClass::Quota);
    assert!(world.leftovers().is_empty() && !world.project("p").exists());
}

#[tokio::test]
async fn hostile_trees_are_refused_before_anything_is_written() {
    let world = World::new().await;
    let seed = world.seed();
    world.commit(&[("a", "1")]);
    let blob = git(&seed, &["rev-parse", "HEAD:a"]);
    let tree = git(&seed, &["rev-parse", "HEAD^{tree}"]);
    for (number, lines) in [
        format!("100644 blob {blob}\t.GIT"),
        format!("040000 tree {tree}\t.git"),
        format!("100644 blob {blob}\tgit~1"),
        format!("100644 blob {blob}\t.g\u{200c}it"),
        format!("120000 blob {blob}\t.gitmodules"),
        format!("120000 blob {blob}\tx\n040000 tree {tree}\tx"),
        format!("100644 blob {blob}\t.."),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("evil{number}");
        let script = "printf '%s\\n' \"$1\" | git mktree";
        let out =
            std::process::Command::new("sh").current_dir(&seed).args(["-c", script, "sh", &lines]).output().unwrap();
        let evil = String::from_utf8(out.stdout).unwrap().trim().to_owned();
        assert!(out.status.success() && !evil.is_empty(), "{lines}");
        let commit = git(&seed, &["commit-tree", "-m", "evil", &evil]);
        git(&seed, &["push", "-q", "origin", &format!("{commit}:refs/heads/{name}")]);
        let failure = world.clone(1, "p", json!({"branch": name})).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Forbidden, "{lines}: {failure}");
        assert!(!world.project("p").exists());
    }
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn a_task_refused_at_the_last_question_leaves_nothing() {
    let world = furnished().await;
    let job = world.clone_job(1, "p", json!({}));
    let refused = world.run_with(&job, CancellationToken::new(), &|_| (), &Shut).await;
    assert_eq!(refused.unwrap_err().message, "superseded");
    assert!(!world.project("p").exists() && world.leftovers().is_empty());
    assert_eq!(world.seq(1).await, 0);
    world.run(&job).await.unwrap();
}

#[tokio::test]
async fn a_clone_stopped_at_any_phase_is_done_or_not_done() {
    let world = furnished().await;
    for phase in ["connecting", "receiving", "resolving", "checkout"] {
        let cancel = CancellationToken::new();
        let seen = cancel.clone();
        let stop = move |progress: haul::protocol::Progress| {
            if progress.phase == phase {
                seen.cancel();
            }
        };
        let job = world.clone_job(1, "p", json!({}));
        let result = world.run_with(&job, cancel, &stop, &Open).await;
        assert_eq!(result.is_ok(), world.project("p").exists(), "{phase}");
        assert!(world.leftovers().is_empty(), "{phase}: {:?}", world.leftovers());
        if result.is_ok() {
            world.run(&world.job("delete", 1, json!({}))).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_project_half_made_by_a_killed_agent_is_swept_and_made_again() {
    let mut world = furnished().await;
    let job = world.clone_job(1, "p", json!({}));
    // Dropping the future is what the end of the process is to the children: they are killed.
    let staged = std::sync::Arc::new(tokio::sync::Notify::new());
    let seen = std::sync::Arc::clone(&staged);
    let progress = move |progress: haul::protocol::Progress| {
        if progress.phase == "checkout" {
            seen.notify_one();
        }
    };
    tokio::select! {
        _ = world.run_with(&job, CancellationToken::new(), &progress, &Open) => {}
        () = staged.notified() => {}
    }
    world.restart().await;
    assert!(world.leftovers().is_empty());
    world.run(&job).await.unwrap();
    assert_alike(&world.project("p"), &world.reference(&[]));
    assert_eq!(world.seq(1).await, 1);
}

#[tokio::test]
async fn filters_of_the_users_machine_are_not_run() {
    let world = World::new().await;
    world.commit(&[(".gitattributes", "* filter=evil\n"), ("a", "plain")]);
    world.clone(1, "p", json!({})).await.unwrap();
    assert_eq!(read(&world.project("p"), "a"), "plain");
    let out = git_raw(&world.project("p"), &["status", "--porcelain"]);
    assert!(out.status.success() && out.stdout.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_whose_child_is_killed_leaves_nothing_and_runs_again() {
    let world = World::new().await;
    let files: Vec<(String, String)> = (0..3000).map(|file| (format!("many/{file}"), format!("{file}"))).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    world.commit(&files);
    for role in ["transfer", "workspace"] {
        let job = world.clone_job(1, "p", json!({}));
        let ended = std::sync::atomic::AtomicBool::new(false);
        let killed = std::thread::scope(|scope| {
            let strike = scope.spawn(|| {
                while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                    if kill_children(world.dir.path(), role) > 0 {
                        return true;
                    }
                }
                false
            });
            let result = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(world.run(&job)));
            ended.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(result.is_ok(), world.project("p").exists(), "{role}: {result:?}");
            strike.join().unwrap()
        });
        assert!(killed, "{role}");
        assert!(world.leftovers().is_empty(), "{role}: {:?}", world.leftovers());
    }
    world.clone(1, "p", json!({})).await.unwrap();
    assert_alike(&world.project("p"), &world.reference(&[]));
}

#[tokio::test]
async fn below_the_reserve_no_clone_and_no_pull_begins_and_everything_else_does() {
    let mut world = furnished().await;
    world.clone(1, "p", json!({})).await.unwrap();
    world.reserve = bytesize::ByteSize::b(u64::MAX);
    world.restart().await;
    for job in [world.clone_job(2, "q", json!({})), world.job("pull", 1, json!({}))] {
        let failure = world.run(&job).await.unwrap_err();
        assert_eq!((failure.class, failure.deferred), (ErrorClass::Disk, true));
        assert!(failure.message.contains("disk.reserve"), "{failure}");
    }
    assert!(!world.project("q").exists() && world.leftovers().is_empty());
    // A clone that is there already takes no space.
    world.clone(1, "p", json!({})).await.unwrap();
    world.run(&world.job("status", 1, json!({}))).await.unwrap();
    world.run(&world.job("delete", 1, json!({}))).await.unwrap();
    assert!(!world.project("p").exists());
}
