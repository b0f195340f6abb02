//! Whose files a project's are, and what becomes of files that are not their owner's.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output},
};

use haul::{failure::ErrorClass, git::GitSettings, protocol::Owner};
use serde_json::json;

use super::{
    GID, UID, require_root,
    whose::owners,
    world::{World, class, git, read, write},
};

fn settings() -> GitSettings {
    GitSettings {
        allow_file: true,
        tree_first_after: None,
        run_as: Some(Owner { uid: UID, gid: GID }),
        ..GitSettings::default()
    }
}

/// A world that its owners can enter.
async fn world(settings: GitSettings) -> World {
    require_root();
    let world = World::with(settings).await;
    // As the lock of an agent makes them.
    for (name, mode) in [("", 0o755), ("storage", 0o755), ("storage/.haul", 0o711)] {
        fs::set_permissions(world.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    world
}

/// A program as the owner would run it.
fn as_owner(program: &str, dir: &Path, arguments: &[&str]) -> Output {
    Command::new(program)
        .current_dir(dir)
        .args(arguments)
        .env_clear()
        .envs([("PATH", "/usr/local/bin:/usr/bin:/bin"), ("HOME", "/nonexistent"), ("GIT_CONFIG_NOSYSTEM", "1")])
        .envs([("GIT_AUTHOR_NAME", "A"), ("GIT_AUTHOR_EMAIL", "a@b.example")])
        .envs([("GIT_COMMITTER_NAME", "A"), ("GIT_COMMITTER_EMAIL", "a@b.example")])
        .uid(UID)
        .gid(GID)
        .output()
        .unwrap()
}

fn git_as_owner(dir: &Path, arguments: &[&str]) -> String {
    let output = as_owner("git", dir, arguments);
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn packs(project: &Path) -> Vec<PathBuf> {
    fs::read_dir(project.join(".git/objects/pack")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test]
async fn every_file_of_a_project_is_its_owners_from_clone_to_delete() {
    let world = world(settings()).await;
    world.commit(&[("a.txt", "1"), ("d/b.txt", "1")]);
    world.clone(1, "p", json!({})).await.unwrap();
    let project = world.project("p");
    assert_eq!(owners(&project), BTreeSet::from([(UID, GID)]));
    assert_eq!(fs::metadata(&project).unwrap().permissions().mode() & 0o7777, 0o755);
    assert!(!packs(&project).is_empty());
    for pack in packs(&project) {
        assert_eq!(fs::metadata(&pack).unwrap().permissions().mode() & 0o7777, 0o444, "{}", pack.display());
    }
    // Their own git takes it for theirs, and can go on with it.
    assert_eq!(git_as_owner(&project, &["status", "--porcelain"]), "");
    git_as_owner(&project, &["fsck", "--full", "--strict"]);
    write(&project, "own.txt", "mine");
    chown(project.join("own.txt"), Some(UID), Some(GID)).unwrap();

    let tip = world.commit(&[("a.txt", "2"), ("d/e/f.txt", "new")]);
    let pulled = world.pull(1, json!({})).await.unwrap();
    assert_eq!(pulled.head.as_deref(), Some(tip.as_str()));
    assert_eq!((read(&project, "a.txt").as_str(), read(&project, "d/e/f.txt").as_str()), ("2", "new"));
    assert_eq!(owners(&project), BTreeSet::from([(UID, GID)]));
    assert_eq!(git_as_owner(&project, &["status", "--porcelain"]), "?? own.txt");
    git_as_owner(&project, &["add", "own.txt"]);
    git_as_owner(&project, &["commit", "-q", "-m", "mine"]);

    let status = world.run(&world.job("status", 1, json!({}))).await.unwrap();
    assert_eq!((status.ahead, status.behind), (Some(1), Some(0)));
    // What only they may enter goes as well.
    as_owner("sh", &project, &["-c", "mkdir -p shut/in && touch shut/in/x && chmod 0 shut/in shut && chmod +t d"]);
    world.run(&world.job("delete", 1, json!({}))).await.unwrap();
    assert!(!project.exists());
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn an_owner_reaches_neither_mirrors_nor_the_agents_own_files() {
    let world = world(settings()).await;
    world.commit(&[("a.txt", "1")]);
    world.clone(1, "p", json!({})).await.unwrap();
    for hidden in ["storage/.haul/mirrors", "storage/projects/.haul/owners", "storage/projects/.haul/trash"] {
        let listed = as_owner("ls", world.dir.path(), &[hidden]);
        assert!(!listed.status.success(), "{hidden}");
    }
    let listed = as_owner("ls", world.dir.path(), &["storage/projects/.haul"]);
    assert!(!listed.status.success());
    let planted = as_owner("touch", world.dir.path(), &["storage/projects/.haul/x", "storage/projects/x"]);
    assert!(!planted.status.success() && !world.project("x").exists());
    // No object of theirs is one of the mirror's.
    for pack in packs(&world.project("p")) {
        assert_eq!(fs::metadata(&pack).unwrap().nlink(), 1);
    }
}

#[tokio::test]
async fn a_task_may_name_an_owner_among_those_allowed() {
    let owners_setting = vec![format!("{UID}-{}:{GID}", UID + 10).parse().unwrap()];
    let world = world(GitSettings {
        allow_file: true,
        tree_first_after: None,
        owners: owners_setting,
        ..GitSettings::default()
    })
    .await;
    world.commit(&[("a.txt", "1")]);
    let failure = world.clone(1, "p", json!({"owner": format!("{}:{GID}", UID + 11)})).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Forbidden);
    assert!(failure.message.contains("git.owners"), "{failure}");
    world.clone(1, "p", json!({"owner": format!("{}:{GID}", UID + 3)})).await.unwrap();
    assert_eq!(owners(&world.project("p")), BTreeSet::from([(UID + 3, GID)]));
    // Without a name, and without git.run_as, it stays the agent's; and one project never has two owners.
    world.clone(2, "q", json!({})).await.unwrap();
    assert_eq!(owners(&world.project("q")), BTreeSet::from([(0, 0)]));
    world.clone(1, "p", json!({})).await.unwrap();
    let again = world.clone(1, "p", json!({"owner": format!("{}:{GID}", UID + 4)})).await;
    assert_eq!(class(&again), ErrorClass::Conflict);
    // Every later task works as the owner that was remembered.
    world.commit(&[("a.txt", "2")]);
    world.pull(1, json!({})).await.unwrap();
    assert_eq!(owners(&world.project("p")), BTreeSet::from([(UID + 3, GID)]));
}

#[tokio::test]
async fn a_file_that_its_owner_cannot_touch_is_a_conflict() {
    let world = world(settings()).await;
    world.commit(&[("a.txt", "1"), ("d/b.txt", "1")]);
    world.clone(1, "p", json!({})).await.unwrap();
    let project = world.project("p");
    world.commit(&[("a.txt", "2"), ("d/b.txt", "2")]);
    let give = |name: &str, uid: u32, mode: u32| {
        chown(project.join(name), Some(uid), Some(uid)).unwrap();
        fs::set_permissions(project.join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    // Of root, and unreadable; a directory of root that cannot be written; the repository's own files.
    for (name, shut, open) in
        [("a.txt", 0o600, 0o644), ("d", 0o755, 0o755), (".git/index", 0o600, 0o644), (".git/HEAD", 0o600, 0o644)]
    {
        give(name, 0, shut);
        let result = world.pull(1, json!({})).await;
        assert_eq!(class(&result), ErrorClass::Conflict, "{name}: {result:?}");
        give(name, UID, open);
        chown(project.join(name), Some(UID), Some(GID)).unwrap();
    }
    world.pull(1, json!({})).await.unwrap();
    assert_eq!((read(&project, "a.txt").as_str(), read(&project, "d/b.txt").as_str()), ("2", "2"));
}

#[tokio::test]
async fn as_root_without_an_owner_a_project_of_somebody_else_is_forbidden() {
    let world = world(GitSettings { allow_file: true, tree_first_after: None, ..GitSettings::default() }).await;
    world.commit(&[("a.txt", "1")]);
    world.clone(1, "p", json!({})).await.unwrap();
    assert_eq!(git(&world.project("p"), &["status", "--porcelain"]), "");
    let given = Command::new("chown")
        .args(["-R", "--no-dereference", &format!("{UID}:{GID}")])
        .arg(world.project("p"))
        .status();
    assert!(given.unwrap().success());
    let failure = world.run(&world.job("status", 1, json!({}))).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Forbidden);
    assert!(failure.message.contains("git.run_as"), "{failure}");
}

#[test]
fn an_agent_without_the_capabilities_does_not_start_for_other_owners() {
    require_root();
    let storage = tempfile::tempdir().unwrap();
    chown(storage.path(), Some(UID), Some(GID)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_haul"))
        .args(["worker", "--config", "/dev/null"])
        .env_clear()
        .env("AGENT_NODE_NAME", "worker-001")
        .env("AGENT_AMQP_URL", "amqp://nobody:nobody@127.0.0.1:1/%2f")
        .env("AGENT_STORAGE_PATH", storage.path())
        .env("AGENT_GIT__RUN_AS", format!("{UID}:{}", GID + 1))
        .uid(UID)
        .gid(GID)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    for word in ["git.run_as", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL"] {
        assert!(said.contains(word), "{said}");
    }
}
