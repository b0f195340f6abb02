//! Row 14: links of an upstream lead anywhere, and are never followed.

use std::fs;

use git2::Oid;
use serde_json::json;

use crate::{
    cases::listing,
    forge::Forge,
    scene::{assert_untouched, execute, git, job, open, program, snapshot},
    server::{Served, Server},
};

#[tokio::test]
async fn links_may_lead_anywhere_and_are_never_followed() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir_all(outside.join("dir")).unwrap();
    fs::write(outside.join("dir/f.txt"), "one\n").unwrap();
    fs::write(outside.join("precious"), "precious\n").unwrap();
    let before = snapshot(&outside);
    let storage = dir.path().join("storage");
    let server = Server::start();
    let executor = open(&storage, program()).await;
    let mut forge = Forge::default();
    let (one, two) = (forge.blob("one\n"), forge.blob("two\n"));
    let absolute = forge.blob(outside.join("dir").to_str().unwrap());
    let file = forge.blob(outside.join("precious").to_str().unwrap());
    let climbing = forge.blob("../../../outside/dir");
    let (itself, git_dir, proc) = (forge.blob("self"), forge.blob(".git"), forge.blob("/proc/self/fd/0"));
    let links: Vec<(&str, &[u8], Oid)> = vec![
        ("120000", b"absolute", absolute),
        ("120000", b"climbing", climbing),
        ("120000", b"file", file),
        ("120000", b"git", git_dir),
        ("120000", b"proc", proc),
        ("120000", b"self", itself),
    ];
    let with = |forge: &mut Forge, more: Vec<(&'static str, &'static [u8], Oid)>, parent: Option<Oid>| {
        let mut entries = links.clone();
        for (mode, name, id) in more {
            entries.retain(|(_, other, _)| *other != name);
            entries.push((mode, name, id));
        }
        entries
            .sort_by_key(|(mode, name, _)| if *mode == "40000" { [name, &b"/"[..]].concat() } else { name.to_vec() });
        let tree = forge.tree(&entries);
        forge.commit(tree, &parent.into_iter().collect::<Vec<_>>())
    };
    let inner = forge.tree(&[("100644", b"f.txt", one)]);
    let changed = forge.tree(&[("100644", b"f.txt", two), ("100644", b"new.txt", two)]);
    // Links; then directories and files where they were; then other links; and back.
    let first = with(&mut forge, vec![("40000", b"dir", inner)], None);
    let second = with(
        &mut forge,
        vec![
            ("40000", b"absolute", changed),
            ("40000", b"climbing", changed),
            ("100644", b"file", two),
            ("40000", b"git", changed),
            ("100644", b"self", one),
            ("40000", b"dir", changed),
        ],
        Some(first),
    );
    let third = with(&mut forge, vec![("120000", b"dir", absolute)], Some(second));
    let fourth = with(&mut forge, vec![("40000", b"dir", changed), ("40000", b"climbing", inner)], Some(third));
    let serve = |tip: Oid| server.serve(Served { refs: listing(tip, &[]), pack: forge.pack() });
    let project = storage.join("projects/p");
    serve(first);
    let fields = json!({"git_url": server.url("links.git"), "target_path": "p"});
    execute(&executor, &job(1, "clone", 1, &fields)).await.unwrap();
    assert_eq!(fs::read_link(project.join("absolute")).unwrap(), outside.join("dir"));
    assert_untouched(&before, &snapshot(&outside), "a clone of links");
    for (number, tip) in [second, third, fourth].into_iter().enumerate() {
        serve(tip);
        let number = i64::try_from(number).unwrap();
        let pulled = execute(&executor, &job(10 + number, "pull", 1, &json!({}))).await.unwrap();
        assert_eq!(pulled.head, Some(tip.to_string()));
        assert_eq!(git(&project, &["status", "--porcelain"]), "", "{number}");
        execute(&executor, &job(20 + number, "status", 1, &json!({}))).await.unwrap();
        assert_untouched(&before, &snapshot(&outside), "a pull of links");
    }
    assert!(fs::symlink_metadata(project.join("git")).unwrap().is_symlink());
    execute(&executor, &job(30, "delete", 1, &json!({}))).await.unwrap();
    assert_untouched(&before, &snapshot(&outside), "a delete of links");
}
