//! What happens to mirrors beside the tasks.

use std::{fs, time::Duration};

use bytesize::ByteSize;
use haul::git::{GitSettings, mirror::Source, settings::Repack};
use serde_json::json;

use crate::{
    githttp::{Server, Upstream},
    node::{Bounds, assert_sound, eventually},
    place::{self, names, packs},
    world::{World, assert_alike, git},
};

async fn is_repacked(repack: Repack) {
    let upstream = Upstream::new();
    upstream.commit("main", &[("a.txt", "0")]);
    let server = Server::start(upstream.root());
    let node = place::node_with(|settings| settings.repack = repack).await;
    let url = server.url("app.git");
    let path = node.fetch(&url).await.unwrap().path;
    for n in 1..20 {
        upstream.commit("main", &[("a.txt", &n.to_string())]);
        drop(node.fetch(&url).await.unwrap());
    }
    // No ref leads to this any more, but a project may be about to be made from it.
    let dropped = upstream.commit("gone", &[("g.txt", "g")]);
    let reader = node.fetch(&url).await.unwrap();
    assert_eq!(packs(&path).len(), 21);
    upstream.git(&["update-ref", "-d", "refs/heads/gone"]);
    upstream.commit("main", &[("a.txt", "last")]);
    drop(node.fetch(&url).await.unwrap());
    // A reader keeps its packs, for as long as it likes.
    if repack == Repack::Git {
        eventually("the new pack is made", || path.join("repack/replaces").exists()).await;
    }
    assert_eq!(packs(&path).len(), 22);
    drop(reader);
    upstream.commit("main", &[("a.txt", "and one more")]);
    drop(node.fetch(&url).await.unwrap());
    // What arrived while the new one was made stands beside it: the last commit or two.
    eventually("its packs are few", || packs(&path).len() <= 3 && !path.join("repack").exists()).await;
    let again = node.fetch(&url).await.unwrap();
    if repack == Repack::Git {
        git(&path, &["cat-file", "-e", &dropped]);
        // One that was fetched beside may lack what came meanwhile, and then that is fetched again.
        assert_eq!(again.source, Source::Mirror);
    }
    assert_eq!(again.listing.refs["refs/heads/main"], upstream.git(&["rev-parse", "main"]));
    assert_sound(&again.path);
    eventually("nothing is left over", || place::names(&node.directory()).len() == 2).await;
    assert_eq!(names(&path.join("objects/pack")).iter().filter(|name| name.starts_with("tmp")).count(), 0);
}

#[tokio::test]
async fn a_mirror_of_many_packs_becomes_one_of_few_and_no_reader_notices() {
    is_repacked(Repack::Git).await;
}

#[tokio::test]
async fn without_git_a_mirror_of_many_packs_is_fetched_anew() {
    is_repacked(Repack::Fetch).await;
}

#[tokio::test]
async fn a_mirror_beyond_the_budget_goes_and_its_projects_go_on() {
    let settings = GitSettings {
        allow_file: true,
        tree_first_after: None,
        mirror_budget: ByteSize::b(1),
        ..GitSettings::default()
    };
    let world = World::with(settings).await;
    world.commit(&[("a.txt", "one\n")]);
    world.clone(1, "p", json!({})).await.unwrap();
    eventually("the mirror is gone", || names(&world.mirrors()).is_empty()).await;
    git(&world.project("p"), &["fsck", "--full", "--connectivity-only"]);
    let tip = world.commit(&[("a.txt", "two\n")]);
    let pulled = world.pull(1, json!({})).await.unwrap();
    assert_eq!((pulled.head.as_deref(), pulled.source.as_deref()), (Some(tip.as_str()), Some("upstream")));
    assert_alike(&world.project("p"), &world.reference(&[]));
}

#[tokio::test]
async fn within_the_budget_a_mirror_stays_also_over_a_start_and_beyond_it_the_start_removes_it() {
    let mut world = World::new().await;
    world.commit(&[("a.txt", "one\n")]);
    world.clone(1, "p", json!({})).await.unwrap();
    world.restart().await;
    let kept = names(&world.mirrors());
    assert_eq!(kept.len(), 2, "{kept:?}");
    // What a crash left, and tip stores, which serve only the task that made them.
    let tip = world.mirrors().join(kept[0].replace(".git", ".tip-1.git"));
    fs::create_dir_all(tip.join("objects")).unwrap();
    fs::create_dir_all(world.mirrors().join(format!("{}.old-1", kept[0]))).unwrap();
    world.restart().await;
    assert_eq!(names(&world.mirrors()), kept);
    world.settings.mirror_budget = ByteSize::b(1);
    world.restart().await;
    assert_eq!(names(&world.mirrors()), Vec::<String>::new());
}

#[tokio::test]
async fn what_a_killed_transfer_left_is_gone_before_anything_else_arrives() {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    server.behave(crate::githttp::Behaviour::StallPack { after: 100_000 });
    let node = place::node().await;
    let url = server.url("app.git");
    let bounds = Bounds { stall: Duration::from_millis(700), ..Bounds::default() };
    let want = haul::git::mirror::Want::All;
    node.fetch_within(&url, None, &want, bounds).await.unwrap_err();
    // Beside the tasks, without another one.
    let packs = node.directory().join(&place::names(&node.directory())[0]).join("objects/pack");
    eventually("it is swept", || names(&packs).is_empty()).await;
}
