//! Row 20: nobody who owns a workspace can change a mirror, and nobody reads from one what upstream does not let them.

use std::{collections::HashSet, fs, os::unix::fs::MetadataExt, path::Path};

use haul::failure::ErrorClass;
use serde_json::json;

use crate::{
    githttp,
    scene::{Scene, USER, execute, git, job, open_with, privileged, program, snapshot},
};

/// The inode of every file below `dir`.
fn inodes(dir: &Path) -> HashSet<(u64, u64)> {
    let mut all = HashSet::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(path) = waiting.pop() {
        let stat = path.symlink_metadata().unwrap();
        if stat.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            all.insert((stat.dev(), stat.ino()));
        }
    }
    all
}

#[tokio::test]
async fn a_workspace_shares_no_file_with_the_mirror_and_what_is_done_to_it_reaches_no_other() {
    let scene = Scene::new(false).await;
    scene.clone(1, "p").await.unwrap();
    let (project, mirrors) = (scene.project("p"), scene.storage().join(".haul/mirrors"));
    assert!(inodes(&project).is_disjoint(&inodes(&mirrors)), "a file of the project is one of the mirror");
    let before = snapshot(&mirrors);
    // Its user overwrites every object in place, whatever its mode, and lies about what is where.
    let mut waiting = vec![project.join(".git/objects")];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            let mut mode = fs::metadata(&path).unwrap().permissions();
            std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o644);
            fs::set_permissions(&path, mode).unwrap();
            fs::write(&path, "poison").unwrap();
        }
    }
    let spoilt = scene.run("pull", 1, json!({})).await;
    assert!(spoilt.is_err() || spoilt.unwrap().updated == Some(false));
    let ignoring_lists = |all: std::collections::BTreeMap<std::path::PathBuf, String>| -> Vec<_> {
        all.into_iter().filter(|(path, _)| path.components().any(|part| part.as_os_str() == "objects")).collect()
    };
    assert_eq!(ignoring_lists(snapshot(&mirrors)), ignoring_lists(before));
    scene.clone(2, "q").await.unwrap();
    git(&scene.project("q"), &["fsck", "--full", "--strict"]);
    assert_eq!(fs::read_to_string(scene.project("q").join("a.txt")).unwrap(), "two\n");
}

#[tokio::test]
async fn a_mirror_is_closed_to_every_other_user() {
    let scene = Scene::new(false).await;
    scene.clone(1, "p").await.unwrap();
    let mirrors = scene.storage().join(".haul/mirrors");
    for entry in fs::read_dir(&mirrors).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o077, 0, "{} is open to others", path.display());
    }
    if privileged() {
        use std::os::unix::process::CommandExt;
        let try_it = |line: &str| {
            let script = format!("for m in {}/*.git; do {line}; done", mirrors.display());
            std::process::Command::new("sh")
                .args(["-c", &script])
                .uid(USER)
                .gid(USER)
                .output()
                .unwrap()
                .status
                .success()
        };
        assert!(!try_it("ls $m/objects") && !try_it("cat $m/packed-refs") && !try_it("touch $m/x"));
    }
}

#[tokio::test]
async fn whoever_lost_access_gets_nothing_from_the_mirror() {
    let upstream = githttp::Upstream::new();
    upstream.commit("main", &[("a.txt", "private\n")]);
    let server = githttp::Server::start(upstream.root());
    // dGVhbTpzZXNhbWU= is team:sesame
    server.require("dGVhbTpzZXNhbWU=");
    let dir = tempfile::tempdir().unwrap();
    let credentials = dir.path().join("credentials");
    fs::create_dir(&credentials).unwrap();
    for name in ["team", "other"] {
        let password = if name == "team" { "sesame" } else { "guess" };
        let text = format!("user = \"team\"\npassword = \"{password}\"\nhosts = [\"localhost\"]\n");
        fs::write(credentials.join(name), text).unwrap();
        fs::set_permissions(credentials.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    let executor =
        open_with(&dir.path().join("storage"), program(), |settings| settings.credentials_path = Some(credentials))
            .await;
    let clone = |number: i64, credential: Option<&str>| {
        let mut fields = json!({"git_url": server.url("app.git"), "target_path": format!("p{number}")});
        if let Some(credential) = credential {
            fields["credential"] = credential.into();
        }
        job(number, "clone", number, &fields)
    };
    execute(&executor, &clone(1, Some("team"))).await.unwrap();
    // Another credential, and none, while the mirror is warm.
    assert_eq!(execute(&executor, &clone(2, Some("other"))).await.unwrap_err().class, ErrorClass::Auth);
    assert_eq!(execute(&executor, &clone(3, None)).await.unwrap_err().class, ErrorClass::Auth);
    // The same one, once upstream revoked it: by clone and by pull.
    server.require("bm9ib2R5Om5vd2hlcmU=");
    assert_eq!(execute(&executor, &clone(4, Some("team"))).await.unwrap_err().class, ErrorClass::Auth);
    let pull = job(5, "pull", 1, &json!({}));
    assert_eq!(execute(&executor, &pull).await.unwrap_err().class, ErrorClass::Auth);
    for number in 2..5 {
        assert!(!dir.path().join(format!("storage/projects/p{number}")).exists());
    }
}
