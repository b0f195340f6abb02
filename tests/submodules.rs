//! Submodules of a clone: equal to those of git, judged like upstreams, all or nothing.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

#[path = "support/githttp.rs"]
mod githttp;
#[path = "support/owners.rs"]
mod owners;
#[path = "execute/world.rs"]
#[allow(dead_code, reason = "each suite uses its own part of it")]
mod world;

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use githttp::Server;
use haul::{failure::ErrorClass, git::GitSettings, protocol::Owner};
use owners::owners;
use serde_json::json;
use world::{World, git, git_raw, listing, read, write};

/// One submodule as a test records it: its name, path, address and commit.
type Recorded<'a> = (&'a str, &'a str, &'a str, &'a str);

/// A second upstream beside the world's own, with `files` and submodules; returns its newest commit.
fn upstream(world: &World, name: &str, files: &[(&str, &str)], modules: &[Recorded<'_>]) -> String {
    let (bare, seed) = (format!("{name}.git"), world.path(&format!("seed-{name}")));
    if !seed.exists() {
        git(world.dir.path(), &["init", "-q", "--bare", "-b", "main", &bare]);
        fs::create_dir(&seed).unwrap();
        git(&seed, &["init", "-q", "-b", "main"]);
        git(&seed, &["remote", "add", "origin", &format!("../{bare}")]);
    }
    for (file, content) in files {
        write(&seed, file, content);
    }
    record(&seed, modules)
}

/// Commits what is in `seed` and records `modules`; returns the commit.
fn record(seed: &Path, modules: &[Recorded<'_>]) -> String {
    git(seed, &["add", "-A"]);
    let mut text = String::new();
    for (name, path, url, commit) in modules {
        let _ = write!(text, "[submodule \"{name}\"]\n\tpath = {path}\n\turl = {url}\n");
        if !commit.is_empty() {
            git(seed, &["update-index", "--add", "--cacheinfo", &format!("160000,{commit},{path}")]);
        }
    }
    if !text.is_empty() {
        write(seed, ".gitmodules", &text);
        git(seed, &["add", ".gitmodules"]);
    }
    git(seed, &["commit", "-q", "--allow-empty", "-m", "recorded"]);
    git(seed, &["push", "-q", "-f", "origin", "HEAD"]);
    git(seed, &["rev-parse", "HEAD"])
}

fn url(world: &World, name: &str) -> String {
    format!("file://{}", world.path(&format!("{name}.git")).display())
}

/// What is recorded and what is checked out, without how git would describe it.
fn submodule_status(project: &Path) -> Vec<String> {
    let status = git_raw(project, &["submodule", "status", "--recursive"]);
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let words = |line: &str| line.rsplit_once(" (").map_or(line, |(line, _)| line).to_owned();
    String::from_utf8_lossy(&status.stdout).lines().map(words).collect()
}

/// Two submodules, one by a relative address and with a submodule of its own.
async fn furnished() -> World {
    let world = World::new().await;
    let inner = upstream(&world, "inner", &[("inner.txt", "inner")], &[]);
    upstream(&world, "one", &[("old.txt", "old")], &[("inner", "in/ner", "../inner.git", &inner)]);
    let one = git(&world.path("seed-one"), &["rev-parse", "HEAD"]);
    // The recorded commit is not the newest.
    upstream(&world, "one", &[("newer.txt", "newer")], &[]);
    let two = upstream(&world, "two", &[("two.txt", "two"), (".gitattributes", "*.txt text\n")], &[]);
    write(&world.seed(), "a.txt", "a");
    let address = url(&world, "two");
    record(&world.seed(), &[("the/one", "libs/one", "../one.git", &one), ("two", "two", &address, &two)]);
    world
}

#[tokio::test]
async fn submodules_equal_those_of_git_and_their_users_git_goes_on_with_them() {
    let world = furnished().await;
    let result = world.clone(1, "p", json!({"submodules": true})).await.unwrap();
    let (ours, reference) = (world.project("p"), world.reference(&["--recurse-submodules"]));
    assert_eq!(listing(&ours), listing(&reference));
    assert_eq!(submodule_status(&ours), submodule_status(&reference));
    assert_eq!(submodule_status(&ours).len(), 3);
    assert_eq!(result.head.unwrap(), git(&reference, &["rev-parse", "HEAD"]));
    for at in ["", "libs/one", "libs/one/in/ner", "two"] {
        let (a, b) = (ours.join(at), reference.join(at));
        for args in [
            &["rev-parse", "HEAD"][..],
            &["status", "--porcelain=v1"],
            &["ls-files", "--stage"],
            &["config", "--get-regexp", "^(remote\\..*|submodule\\..*\\.url|core\\.worktree)$"],
            &["for-each-ref", "refs/remotes", "refs/tags"],
            &["rev-parse", "--git-dir"],
        ] {
            let clean =
                |text: String| text.replace(ours.to_str().unwrap(), "").replace(reference.to_str().unwrap(), "");
            assert_eq!(clean(git(&a, args)), clean(git(&b, args)), "{at} {args:?}");
        }
        assert_eq!(git(&a, &["status", "--porcelain"]), "");
        let fsck = git_raw(&a, &["fsck", "--full", "--strict"]);
        assert!(fsck.status.success(), "{at}: {}", String::from_utf8_lossy(&fsck.stderr));
    }
    assert!(!git_raw(&ours.join("two"), &["symbolic-ref", "-q", "HEAD"]).status.success());
    git(&ours, &["submodule", "update", "--init", "--recursive"]);
    assert_eq!(git(&ours, &["status", "--porcelain"]), "");
    // What their user does next: go to the newest commit of one, and back.
    git(&ours, &["submodule", "update", "--remote", "libs/one"]);
    assert_eq!(read(&ours, "libs/one/newer.txt"), "newer");
    git(&ours, &["submodule", "update", "--recursive"]);
    assert!(!ours.join("libs/one/newer.txt").exists());
    assert_eq!(git(&ours, &["status", "--porcelain"]), "");
    // No project is bound to the mirrors of submodules, and nothing will ask for them.
    let mirrors = fs::read_dir(world.mirrors()).unwrap().flatten();
    assert_eq!(mirrors.filter(|entry| entry.path().extension().is_some_and(|end| end == "git")).count(), 1);
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn a_clone_of_some_depth_has_its_submodules_with_their_whole_histories_as_git_makes_them() {
    let world = World::new().await;
    let mut sub = String::new();
    for number in 0..3 {
        sub = upstream(&world, "sub", &[("s.txt", &number.to_string())], &[]);
    }
    for number in 0..3 {
        world.commit(&[("b.txt", &number.to_string())]);
    }
    record(&world.seed(), &[("sub", "libs/sub", "../sub.git", &sub)]);
    world.clone(1, "p", json!({"submodules": true, "depth": 2})).await.unwrap();
    let (ours, reference) = (world.project("p"), world.reference(&["--depth", "2", "--recurse-submodules"]));
    assert_eq!(listing(&ours), listing(&reference));
    assert_eq!(submodule_status(&ours), submodule_status(&reference));
    assert_eq!(read(&ours, ".git/shallow"), read(&reference, ".git/shallow"));
    for (at, commits) in [("", "2"), ("libs/sub", "3")] {
        for project in [&ours, &reference] {
            assert_eq!(git(&project.join(at), &["rev-list", "--count", "HEAD"]), commits, "{at}");
        }
        let fsck = git_raw(&ours.join(at), &["fsck", "--full", "--strict"]);
        assert!(fsck.status.success(), "{at}: {}", String::from_utf8_lossy(&fsck.stderr));
        assert_eq!(git(&ours.join(at), &["status", "--porcelain"]), "");
    }
    // A pull goes on with it.
    write(&world.seed(), "b.txt", "more");
    let tip = record(&world.seed(), &[("sub", "libs/sub", "../sub.git", &sub)]);
    assert_eq!(world.pull(1, json!({})).await.unwrap().head, Some(tip));
    assert_eq!(git(&ours, &["status", "--porcelain"]), "");
    assert!(world.leftovers().is_empty());
}

#[tokio::test]
async fn a_clone_that_does_not_ask_for_submodules_has_none() {
    let world = furnished().await;
    world.clone(1, "p", json!({})).await.unwrap();
    assert!(!world.project("p/.git/modules").exists());
    assert_eq!(fs::read_dir(world.project("p/two")).unwrap().count(), 0);
    // And they come later by their user's own git.
    git(&world.project("p"), &["submodule", "update", "--init", "--recursive"]);
    assert_eq!(read(&world.project("p"), "libs/one/in/ner/inner.txt"), "inner");
}

#[tokio::test]
async fn a_pull_counts_submodules_that_changed_and_leaves_them() {
    let world = furnished().await;
    world.clone(1, "p", json!({"submodules": true})).await.unwrap();
    let project = world.project("p");
    let before = git(&project.join("two"), &["rev-parse", "HEAD"]);
    write(&project, "two/mine", "kept");
    let status = world.run(&world.job("status", 1, json!({}))).await.unwrap();
    assert_eq!(status.dirty, Some(false));
    let two = upstream(&world, "two", &[("two.txt", "changed")], &[]);
    let (seed, address) = (world.seed(), url(&world, "two"));
    git(&seed, &["update-index", "--add", "--cacheinfo", &format!("160000,{two},two")]);
    git(&seed, &["rm", "-q", "--cached", "libs/one"]);
    write(&seed, "b.txt", "b");
    write(&seed, ".gitmodules", &format!("[submodule \"two\"]\n\tpath = two\n\turl = {address}\n"));
    git(&seed, &["add", "b.txt", ".gitmodules"]);
    git(&seed, &["commit", "-q", "-m", "more"]);
    git(&seed, &["push", "-q", "origin", "HEAD"]);
    let pulled = world.pull(1, json!({})).await.unwrap();
    assert_eq!((pulled.updated, pulled.submodules_changed), (Some(true), Some(2)));
    assert_eq!(read(&project, "b.txt"), "b");
    assert_eq!(
        (git(&project.join("two"), &["rev-parse", "HEAD"]), read(&project, "two/mine")),
        (before, "kept".into())
    );
    assert_eq!(read(&project, "libs/one/old.txt"), "old");
    git(&project, &["submodule", "update"]);
    assert_eq!(read(&project, "two/two.txt"), "changed");
    assert_eq!(world.pull(1, json!({})).await.unwrap().submodules_changed, None);
    world.run(&world.job("delete", 1, json!({}))).await.unwrap();
    assert!(!project.exists() && world.leftovers().is_empty());
    assert_eq!(fs::read_dir(world.mirrors()).unwrap().count(), 0);
}

#[tokio::test]
async fn hostile_submodules_fail_the_clone_and_leave_nothing() {
    let world = World::with(GitSettings { allow_file: true, tree_first_after: None, ..GitSettings::default() }).await;
    let sub = upstream(&world, "sub", &[("s", "s")], &[]);
    let touched = world.path("touched");
    let ext = format!("ext::sh -c touch%20{}", touched.display());
    let good = url(&world, "sub");
    let many = "../".repeat(40);
    let escape = format!("{many}etc");
    let cases: &[(Recorded<'_>, ErrorClass, &str)] = &[
        (("s", "sub", &ext, &sub), ErrorClass::Invalid, "sub"),
        (("s", "sub", "-u", &sub), ErrorClass::Invalid, "sub"),
        (("s", "sub", "--upload-pack=touch", &sub), ErrorClass::Invalid, "sub"),
        (("s", "sub", "/etc", &sub), ErrorClass::Invalid, "sub"),
        (("s", "sub", "git@host.example:x", &sub), ErrorClass::Invalid, "sub"),
        (("s", "sub", "https://u:canary@host.example/x", &sub), ErrorClass::Invalid, "sub"),
        (("s", "sub", "http://host.example/x", &sub), ErrorClass::Forbidden, "git.allow_http"),
        (("s", "sub", "https://127.0.0.1/x", &sub), ErrorClass::Forbidden, "git.allow_loopback"),
        (("s", "sub", "https://169.254.169.254/x", &sub), ErrorClass::Forbidden, "sub"),
        (("s", "sub", "https://2852039166/x", &sub), ErrorClass::Forbidden, "sub"),
        (("s", "sub", &escape, &sub), ErrorClass::Forbidden, "out of"),
        (("s", "sub", "../nowhere.git", &sub), ErrorClass::NotFound, "sub"),
        (("../../x", "sub", &good, &sub), ErrorClass::Forbidden, "../../x"),
        (("..", "sub", &good, &sub), ErrorClass::Forbidden, "name"),
        ((".git", "sub", &good, &sub), ErrorClass::Forbidden, ".git"),
        (("a/GIT~1", "sub", &good, &sub), ErrorClass::Forbidden, "GIT~1"),
        (("a/.git::$INDEX_ALLOCATION", "sub", &good, &sub), ErrorClass::Forbidden, "name"),
        (("s", "link/sub", &good, ""), ErrorClass::Forbidden, "link/sub"),
        (("s", ".git/modules/x", &good, ""), ErrorClass::Forbidden, ".git/modules/x"),
        (("s", "../outside", &good, ""), ErrorClass::Forbidden, "../outside"),
        (("s", "sub", &good, "2222222222222222222222222222222222222222"), ErrorClass::NotFound, "sub"),
    ];
    for (number, (module, wanted, part)) in cases.iter().enumerate() {
        let seed = world.path(&format!("evil{number}"));
        fs::create_dir(&seed).unwrap();
        git(&seed, &["init", "-q", "-b", &format!("evil{number}")]);
        git(&seed, &["remote", "add", "origin", "../up.git"]);
        symlink(world.dir.path(), seed.join("link")).unwrap();
        record(&seed, &[*module]);
        let failure = world
            .clone(1, "p", json!({"submodules": true, "branch": format!("evil{number}")}))
            .await
            .expect_err(module.2);
        assert_eq!(failure.class, *wanted, "{module:?}: {failure}");
        assert!(failure.message.contains(part) && !failure.message.contains("canary"), "{module:?}: {failure}");
        assert!(!world.project("p").exists() && world.leftovers().is_empty(), "{module:?}");
        // The same tree without its submodules is no harm.
        if number == 0 {
            world.clone(2, "q", json!({"branch": "evil0"})).await.unwrap();
        }
    }
    assert!(!touched.exists() && !world.path("outside").exists() && !world.path("sub").exists());
}

#[tokio::test]
async fn submodules_are_their_owners_like_everything_else() {
    assert!(rustix::process::getuid().is_root(), "this test changes users: run it as root (scripts/test does)");
    let mut world = furnished().await;
    let owner = Owner { uid: 54_321, gid: 54_322 };
    world.settings.run_as = Some(owner);
    world.restart().await;
    world.clone(1, "p", json!({"submodules": true})).await.unwrap();
    assert_eq!(owners(&world.project("p")), BTreeSet::from([(owner.uid, owner.gid)]));
    assert_eq!(read(&world.project("p"), "libs/one/in/ner/inner.txt"), "inner");
    world.run(&world.job("delete", 1, json!({}))).await.unwrap();
    assert!(!world.project("p").exists() && world.leftovers().is_empty());
}

#[tokio::test]
async fn a_submodule_without_an_address_is_named() {
    let world = World::new().await;
    let sub = upstream(&world, "sub", &[("s", "s")], &[]);
    git(&world.seed(), &["update-index", "--add", "--cacheinfo", &format!("160000,{sub},some/where")]);
    git(&world.seed(), &["commit", "-q", "-m", "without"]);
    git(&world.seed(), &["push", "-q", "origin", "HEAD"]);
    let failure = world.clone(1, "p", json!({"submodules": true})).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound);
    assert!(failure.message.contains("some/where"), "{failure}");
}

#[tokio::test]
async fn a_project_within_itself_ends_at_a_depth() {
    let world = World::new().await;
    let mut commit = upstream(&world, "self", &[("f", "0")], &[]);
    for round in 1..6 {
        let content = round.to_string();
        commit = upstream(&world, "self", &[("f", &content)], &[("again", "again", "../self.git", &commit)]);
    }
    let address = url(&world, "self");
    let failure = world.clone(1, "p", json!({"submodules": true, "git_url": address})).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Quota);
    assert!(failure.message.contains("again/again/again/again"), "{failure}");
    assert!(!world.project("p").exists() && world.leftovers().is_empty());
}

#[tokio::test]
async fn too_many_submodules_and_too_many_files_in_them_are_a_matter_of_quota() {
    let world =
        World::with(GitSettings { allow_file: true, tree_first_after: None, max_files: 10, ..GitSettings::default() })
            .await;
    let files: Vec<(String, &str)> = (0..6).map(|file| (format!("f{file}"), "x")).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(file, text)| (file.as_str(), *text)).collect();
    let sub = upstream(&world, "sub", &files, &[]);
    // Each of the two is small enough, and the two together are not.
    let modules = [("a", "a", "../sub.git", sub.as_str()), ("b", "b", "../sub.git", sub.as_str())];
    record(&world.seed(), &modules);
    let failure = world.clone(1, "p", json!({"submodules": true})).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Quota);
    assert!(failure.message.contains("submodule at b"), "{failure}");

    let world = World::new().await;
    let sub = upstream(&world, "sub", &[("s", "s")], &[]);
    let names: Vec<String> = (0..200).map(|number| format!("m{number}")).collect();
    let modules: Vec<Recorded<'_>> =
        names.iter().map(|name| (name.as_str(), name.as_str(), "../sub.git", sub.as_str())).collect();
    record(&world.seed(), &modules);
    let failure = world.clone(1, "p", json!({"submodules": true})).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Quota);
    assert!(!world.project("p").exists() && world.leftovers().is_empty());
}

#[tokio::test]
async fn a_credential_goes_to_submodules_of_its_own_host_and_to_no_other() {
    let credentials = tempfile::tempdir().unwrap();
    let token = credentials.path().join("localhost/team.token");
    fs::create_dir(token.parent().unwrap()).unwrap();
    fs::write(&token, "canary").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let world = World::with(GitSettings {
        allow_http: true,
        allow_loopback: true,
        tree_first_after: None,
        credentials_path: Some(credentials.path().to_owned()),
        ..GitSettings::default()
    })
    .await;
    let (own, other) = (Server::start(world.dir.path()), Server::start(world.dir.path()));
    // The token of the user that services take with it.
    own.require("eC1hY2Nlc3MtdG9rZW46Y2FuYXJ5");
    let near = upstream(&world, "near", &[("near", "near")], &[]);
    let far = upstream(&world, "far", &[("far", "far")], &[("near", "near", "../near.git", &near)]);
    let address = other.url("far.git");
    record(&world.seed(), &[("near", "near", "../near.git", &near), ("far", "far", &address, &far)]);
    let fields = json!({"submodules": true, "credential": "team", "git_url": own.url("up.git")});
    world.clone(1, "p", fields).await.unwrap();
    assert_eq!(read(&world.project("p"), "far/near/near"), "near");
    assert_eq!(read(&world.project("p"), "near/near"), "near");
    assert_eq!(own.counts().authorised, own.counts().requests);
    assert!(other.counts().requests > 0);
    assert_eq!(other.counts().authorised, 0);
    // A file of this machine is no submodule of a project from the network.
    let seed = world.seed();
    record(&seed, &[("near", "near", &url(&world, "near"), &near)]);
    let fields = json!({"submodules": true, "credential": "team", "git_url": own.url("up.git")});
    let failure = world.clone(2, "q", fields).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Forbidden);
    assert!(!world.project("q").exists() && world.leftovers().is_empty());
}
