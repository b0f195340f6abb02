//! Damaged mirrors are noticed, put aside and fetched anew, within the task that noticed.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use haul::{failure::ErrorClass, git::mirror::Source};
use serde_json::json;

use crate::{
    githttp::{Server, Upstream},
    node::{assert_sound, eventually},
    place::{self, packs},
    world::{World, assert_alike, git, read, write},
};

type Harm = (&'static str, fn(&Path));

/// What becomes of disks.
const HARMS: [Harm; 10] = [
    ("flipped bytes in a pack", |mirror| flip(&packs(mirror)[0])),
    ("a pack cut short", |mirror| cut(&packs(mirror)[0])),
    ("an index cut short", |mirror| cut(&packs(mirror)[0].with_extension("idx"))),
    ("a missing pack", |mirror| fs::remove_file(&packs(mirror)[0]).unwrap()),
    ("a missing index", |mirror| fs::remove_file(packs(mirror)[0].with_extension("idx")).unwrap()),
    ("a pack missing with its index", |mirror| {
        let pack = packs(mirror)[0].clone();
        fs::remove_file(pack.with_extension("idx")).unwrap();
        fs::remove_file(pack).unwrap();
    }),
    ("a shallow file", |mirror| fs::write(mirror.join("shallow"), format!("{}\n", "1".repeat(40))).unwrap()),
    ("a garbage HEAD", |mirror| fs::write(mirror.join("HEAD"), [0xff; 40]).unwrap()),
    ("no HEAD", |mirror| fs::remove_file(mirror.join("HEAD")).unwrap()),
    ("garbage refs", |mirror| fs::write(mirror.join("packed-refs"), "\0\0\0 garbage\n").unwrap()),
];

fn writable(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Flips bytes everywhere but in what is checked when a mirror is opened.
fn flip(path: &Path) {
    writable(path);
    let mut bytes = fs::read(path).unwrap();
    let end = bytes.len() - 20;
    for byte in bytes[12..end].iter_mut().step_by(5) {
        *byte ^= 0x5a;
    }
    fs::write(path, bytes).unwrap();
}

fn cut(path: &Path) {
    writable(path);
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
}

async fn cloned() -> (World, PathBuf) {
    let world = World::new().await;
    let text: String = (0..3000).flat_map(|line| ["line ".to_owned(), line.to_string(), "\n".to_owned()]).collect();
    world.commit(&[("a.txt", &text), ("dir/b.txt", "b\n")]);
    world.commit(&[("a.txt", &text.replace('5', "five")), ("dir/c.txt", "c\n")]);
    world.clone(1, "first", json!({})).await.unwrap();
    let mirrors = fs::read_dir(world.mirrors()).unwrap().map(|entry| entry.unwrap().path());
    let mirror = mirrors.into_iter().find(|path| path.extension().is_some_and(|end| end == "git")).unwrap();
    (world, mirror)
}

#[tokio::test]
async fn a_clone_from_a_damaged_mirror_is_whole_and_so_is_the_mirror_after_it() {
    for (what, harm) in HARMS {
        let (world, mirror) = cloned().await;
        write(&world.project("first"), "mine", "of the user");
        harm(&mirror);
        let result = world.clone(2, "second", json!({})).await.unwrap_or_else(|failure| panic!("{what}: {failure}"));
        assert_eq!(result.source.as_deref(), Some("upstream"), "{what}");
        assert_alike(&world.project("second"), &world.reference(&[]));
        assert_sound(&mirror);
        assert_eq!(read(&world.project("first"), "mine"), "of the user");
        git(&world.project("first"), &["fsck", "--full"]);
        assert!(world.leftovers().is_empty(), "{what}: {:?}", world.leftovers());
        eventually("what was put aside is removed", || fs::read_dir(world.mirrors()).unwrap().count() == 2).await;
    }
}

#[tokio::test]
async fn a_pull_from_a_damaged_mirror_brings_what_is_new_and_keeps_what_is_the_users() {
    for (what, harm) in HARMS {
        let (world, mirror) = cloned().await;
        world.clone(2, "second", json!({})).await.unwrap();
        let tip = world.commit(&[("new.txt", "n\n")]);
        // The mirror has it, the first project has not.
        world.pull(2, json!({})).await.unwrap();
        if what.starts_with("flipped") {
            for pack in packs(&mirror) {
                flip(&pack);
            }
        } else {
            harm(&mirror);
        }
        write(&world.project("first"), "mine", "of the user");
        let result = world.pull(1, json!({})).await.unwrap_or_else(|failure| panic!("{what}: {failure}"));
        assert_eq!((result.updated, result.head.as_deref()), (Some(true), Some(tip.as_str())), "{what}");
        assert_eq!(git(&world.project("first"), &["status", "--porcelain"]), "?? mine", "{what}");
        git(&world.project("first"), &["fsck", "--full"]);
        assert_sound(&mirror);
    }
}

#[tokio::test]
async fn history_with_a_hole_is_refused_before_any_ref_leads_to_it_and_asked_for_again_only_once() {
    let upstream = Upstream::new();
    upstream.commit("main", &[("a.txt", "1")]);
    let second = upstream.commit("main", &[("a.txt", "2")]);
    upstream.commit("main", &[("a.txt", "3")]);
    // The upstream takes the second for a root, and says nothing of it.
    fs::write(upstream.path().join("info/grafts"), format!("{second}\n")).unwrap();
    let server = Server::start(upstream.root());
    let node = place::node().await;
    let url = server.url("app.git");
    let failure = node.fetch(&url).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Corrupt, "{failure}");
    assert!(failure.message.contains("hole"), "{failure}");
    assert_eq!(server.counts().packs, 2);
    let mirror = node.directory().join(&place::names(&node.directory())[0]);
    assert!(packs(&mirror).is_empty() && !mirror.join("packed-refs").exists());
    // It is the upstream's own: told at once from now on.
    assert_eq!(node.fetch(&url).await.unwrap_err().class, ErrorClass::Corrupt);
    assert_eq!(server.counts().packs, 3);
    fs::remove_file(upstream.path().join("info/grafts")).unwrap();
    let fetched = node.fetch(&url).await.unwrap();
    assert_eq!(fetched.source, Source::Upstream);
    assert_sound(&fetched.path);
}
