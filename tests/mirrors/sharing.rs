//! Many tasks of one upstream: each asks for itself what there is, and one receives for all.

use std::time::Duration;

use futures_util::future::join_all;
use haul::{
    failure::ErrorClass,
    git::mirror::{Source, Want},
};

use crate::{
    githttp::{Behaviour, Server, Upstream},
    node::{Bounds, assert_sound, eventually},
    place,
};

fn upstream() -> Upstream {
    let upstream = Upstream::new();
    upstream.commit("main", &[("a.txt", "1")]);
    upstream.commit("main", &[("a.txt", "2")]);
    upstream.git(&["tag", "-a", "-m", "a tag", "v1", "main"]);
    upstream.commit("small", &[("s.txt", "1")]);
    upstream
}

#[tokio::test]
async fn fifty_fetches_of_a_cold_upstream_are_fifty_listings_and_one_pack() {
    let upstream = upstream();
    let server = Server::start(upstream.root());
    server.behave(Behaviour::HoldPack);
    let node = place::node().await;
    let url = server.url("app.git");
    let older = Want::Commit(upstream.git(&["rev-parse", "main~1"]));
    // Two revisions: the branches as they are, and a commit below them.
    let fetches = (0..50).map(|n| node.fetch_as(&url, None, if n % 2 == 0 { &Want::All } else { &older }));
    let serve = async {
        // All have listed, and all but one wait.
        eventually("forty-nine wait", || node.running.told("waiting") == 49).await;
        assert_eq!((server.counts().listings, server.counts().packs), (50, 1));
        server.behave(Behaviour::Serve);
    };
    let (all, ()) = tokio::join!(join_all(fetches), serve);
    let sources: Vec<Source> = all.iter().map(|fetched| fetched.as_ref().unwrap().source).collect();
    assert_eq!(sources.iter().filter(|source| **source == Source::Upstream).count(), 1);
    assert_eq!((server.counts().listings, server.counts().packs), (50, 1));
    assert_sound(&all[0].as_ref().unwrap().path);
    drop(all);
    let again = join_all((0..50).map(|_| node.fetch(&url))).await;
    assert!(again.iter().all(|fetched| fetched.as_ref().unwrap().source == Source::Mirror));
    assert_eq!((server.counts().listings, server.counts().packs), (100, 1));
    assert_eq!(node.running.told("waiting"), 49, "who only reads waits for nobody");
}

#[tokio::test]
async fn who_waits_for_a_mirror_leaves_the_place_at_its_host_to_others() {
    let upstream = upstream();
    let server = Server::start(upstream.root());
    server.behave(Behaviour::HoldPack);
    let node = place::node_with(|settings| settings.host_limit = 2).await;
    let url = server.url("app.git");
    let serve = async {
        // One has a place of the two all the time.
        eventually("all have listed", || server.counts().listings == 6).await;
        server.behave(Behaviour::Serve);
    };
    let (all, ()) = tokio::join!(join_all((0..6).map(|_| node.fetch(&url))), serve);
    assert!(all.iter().all(Result::is_ok), "{all:?}");
    assert_eq!((server.counts().listings, server.counts().packs), (6, 1));
    assert!(node.mirrors.hosts().is_empty(), "every place was given back");
}

#[tokio::test]
async fn each_credential_has_its_own_mirror_and_its_own_pack() {
    let upstream = upstream();
    let server = Server::start(upstream.root());
    let node = place::node().await;
    let url = server.url("app.git");
    let names = [Some("a"), Some("b")];
    let all = join_all((0..12).map(|n| node.fetch_as(&url, names[n % 2], &Want::All))).await;
    let paths: std::collections::BTreeSet<_> =
        all.iter().map(|fetched| fetched.as_ref().unwrap().path.clone()).collect();
    assert_eq!(paths.len(), 2);
    let counts = server.counts();
    assert_eq!((counts.listings, counts.packs), (12, 2));
    assert_eq!(counts.authorised, counts.requests);
    // Access that was revoked is gone at once, whatever the mirror holds.
    server.behave(Behaviour::status(403));
    let failure = node.fetch_as(&url, names[0], &Want::All).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Forbidden);
}

#[tokio::test]
async fn who_waited_and_still_lacks_something_lists_again_and_receives_that_alone() {
    let upstream = upstream();
    let server = Server::start(upstream.root());
    server.behave(Behaviour::HoldPack);
    let node = place::node().await;
    let url = server.url("app.git");
    let small = Want::Branch("small".to_owned());
    let one = node.fetch_as(&url, None, &small);
    let other = async {
        eventually("the first receives", || server.counts().packs == 1).await;
        let fetch = node.fetch(&url);
        let serve = async {
            eventually("the second waits", || node.running.told("waiting") == 1).await;
            // What it listed is not there any more.
            upstream.git(&["update-ref", "-d", "refs/tags/v1"]);
            upstream.commit("main", &[("a.txt", "3")]);
            server.behave(Behaviour::Serve);
        };
        tokio::join!(fetch, serve).0
    };
    let (one, other) = tokio::join!(one, other);
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!((one.source, other.source), (Source::Upstream, Source::Upstream));
    assert_eq!(one.listing.refs.len(), 1);
    assert_eq!(other.listing.refs["refs/heads/main"], upstream.git(&["rev-parse", "main"]));
    assert_eq!((server.counts().listings, server.counts().packs), (3, 2));
    assert_sound(&other.path);
}

#[tokio::test]
async fn waiting_has_the_tasks_deadline_and_stalls_nobody() {
    let upstream = upstream();
    let server = Server::start(upstream.root());
    server.behave(Behaviour::HoldPack);
    let node = place::node().await;
    let url = server.url("app.git");
    let first = node.fetch(&url);
    let others = async {
        eventually("the first receives", || server.counts().packs == 1).await;
        let hasty = Bounds { deadline: Duration::from_secs(2), ..Bounds::default() };
        let touchy = Bounds { stall: Duration::from_secs(1), ..Bounds::default() };
        let hasty = async {
            let failure = node.fetch_within(&url, None, &Want::All, hasty).await.unwrap_err();
            // Longer than the other's stall limit.
            server.behave(Behaviour::Serve);
            failure
        };
        tokio::join!(hasty, node.fetch_within(&url, None, &Want::All, touchy))
    };
    let (first, (hasty, touchy)) = tokio::join!(first, others);
    assert_eq!(hasty.class, ErrorClass::Timeout, "{hasty}");
    assert_eq!(first.unwrap().source, Source::Upstream);
    assert_eq!(touchy.unwrap().source, Source::Mirror);
    assert_eq!(server.counts().packs, 1);
}
