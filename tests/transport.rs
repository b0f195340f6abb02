//! One suite for both transports: whatever speaks with the upstream, a fetch does the same.
//!
//! Each test runs once with the library and once with the `git` command. Where they may differ, it says so.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up shall fail loudly")]

#[path = "support/githttp.rs"]
mod githttp;
#[path = "support/node.rs"]
mod node;

use std::{fs, path::PathBuf, time::Duration};

use githttp::{Behaviour, Server, Upstream};
use haul::{
    failure::ErrorClass,
    git::{
        mirror::{Source, Want},
        settings::Engine,
    },
};
use node::{Node, assert_sound, eventually, refs, rich, with_both};
use tokio::time::Instant;

/// The secret that must appear nowhere, and what is sent of it.
const CANARY: &str = "c4n4ry-of-both";
const CANARY_LOGIN: &str = "eC1hY2Nlc3MtdG9rZW46YzRuNHJ5LW9mLWJvdGg=";

with_both! {
    a_mirror_equals_what_git_itself_would_clone
    a_fetch_with_nothing_new_lists_once_and_asks_for_no_pack
    only_what_is_new_is_received_and_what_is_gone_is_forgotten
    a_thin_pack_is_completed
    an_empty_repository_has_no_refs
    one_branch_comes_with_the_tags_that_point_into_it
    a_commit_that_no_ref_leads_to_is_fetched_or_not_found
    a_file_upstream_is_read_where_that_is_allowed
    names_of_refs_are_never_taken_for_options
    a_credential_opens_the_upstream_and_appears_nowhere
    each_answer_has_its_class
    a_redirect_is_reported_and_not_followed
    what_cannot_be_connected_to_is_a_matter_of_the_network
    only_a_trusted_certificate_is_talked_to
    loopback_is_refused_unless_allowed_and_nothing_is_connected_to
    an_upstream_that_falls_silent_is_stalled_within_the_limit
    a_deadline_ends_a_transfer_and_all_it_started
    a_cancel_ends_the_child_and_all_it_started
    a_connection_that_breaks_mid_pack_is_retried_and_leaves_nothing_that_hinders
    a_damaged_pack_is_not_taken
    more_than_the_quota_is_not_taken
    a_disk_below_its_reserve_stops_a_transfer
}

/// The other processes whose arguments or surroundings hold `text`.
fn processes_with(text: &str) -> Vec<String> {
    let own = std::process::id().to_string();
    let numbers = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let others = numbers.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && *name != own);
    others
        .flat_map(|pid| ["cmdline", "environ"].map(|file| format!("/proc/{pid}/{file}")))
        .filter(|file| fs::read(file).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text)))
        .collect()
}

async fn a_mirror_equals_what_git_itself_would_clone(engine: Engine) {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!(fetched.source, Source::Upstream);
    assert_eq!(fetched.listing.head.as_deref(), Some("refs/heads/main"));
    assert_eq!(fetched.listing.refs, refs(&upstream.path()));
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    assert_eq!(fetched.listing.peeled["refs/tags/v1.0"], fetched.listing.refs["refs/heads/main"]);
    // Two commits of main and one of the other branch, their trees, two tags, and the texts "1" and "2".
    assert_eq!(fetched.objects, 10);
    assert!(fetched.received_bytes > 0);
    assert_sound(&fetched.path);
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

async fn a_fetch_with_nothing_new_lists_once_and_asks_for_no_pack(engine: Engine) {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    let first = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!((server.counts().listings, server.counts().packs), (1, 1));
    let again = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!((server.counts().listings, server.counts().packs), (2, 1));
    assert_eq!((again.source, again.objects, again.received_bytes), (Source::Mirror, 0, 0));
    assert_eq!(again.listing, first.listing);
}

async fn only_what_is_new_is_received_and_what_is_gone_is_forgotten(engine: Engine) {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    node.fetch(&server.url("app.git")).await.unwrap();
    upstream.commit("main", &[("a.txt", "3"), ("b.txt", "1")]);
    upstream.git(&["update-ref", "-d", "refs/heads/feature/x"]);
    // Where there was a directory there is a branch now.
    upstream.commit("feature", &[("d.txt", "1")]);
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    // Two commits, two trees, and the one text that is new.
    assert_eq!(fetched.objects, 5);
    assert_sound(&fetched.path);
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

async fn a_thin_pack_is_completed(engine: Engine) {
    let upstream = Upstream::new();
    let text = |changed: usize| {
        let mut lines: Vec<String> = (0..2000).map(|line| line.to_string()).collect();
        "changed".clone_into(&mut lines[changed]);
        lines.join("\n")
    };
    for changed in 0..12 {
        upstream.commit("main", &[("a.txt", &text(changed * 10))]);
    }
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    let first = node.fetch(&server.url("app.git")).await.unwrap();
    assert_sound(&first.path);
    upstream.commit("main", &[("a.txt", &text(1999))]);
    upstream.git(&["repack", "-adfq", "--depth=50"]);
    let second = node.fetch(&server.url("app.git")).await.unwrap();
    let text_alone = 2000;
    match engine {
        Engine::Gix => assert!(second.received_bytes < text_alone, "{}", second.received_bytes),
        // Of a pack this small git does not tell how much of it came from the upstream and how much it added.
        Engine::Git => assert!(second.received_bytes > 0),
    }
    assert_eq!(refs(&second.path), refs(&upstream.path()));
    assert_sound(&second.path);
}

async fn an_empty_repository_has_no_refs(engine: Engine) {
    let upstream = Upstream::new();
    upstream.git(&["symbolic-ref", "HEAD", "refs/heads/trunk"]);
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    // The command does not tell where a HEAD points whose branch has no commit yet.
    let head = (engine == Engine::Gix).then_some("refs/heads/trunk");
    assert_eq!(fetched.listing.head.as_deref(), head);
    assert!(fetched.listing.refs.is_empty());
    assert_eq!(server.counts().packs, 0);
    let tip = upstream.commit("trunk", &[("a.txt", "1")]);
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!(fetched.listing.head.as_deref(), Some("refs/heads/trunk"));
    assert_eq!(fetched.listing.refs["refs/heads/trunk"], tip);
}

async fn one_branch_comes_with_the_tags_that_point_into_it(engine: Engine) {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    let want = Want::Branch("feature/x".to_owned());
    let fetched = node.fetch_as(&server.url("app.git"), None, &want).await.unwrap();
    assert!(fetched.listing.refs.contains_key("refs/heads/feature/x"));
    assert!(!fetched.listing.refs.contains_key("refs/heads/main"));
    drop(node.fetch(&server.url("app.git")).await.unwrap());
    let fetched = node.fetch_as(&server.url("app.git"), None, &want).await.unwrap();
    assert_eq!(fetched.listing.refs.keys().collect::<Vec<_>>(), ["refs/heads/feature/x", "refs/tags/other"]);
    let missing = Want::Branch("nowhere".to_owned());
    let failure = node.fetch_as(&server.url("app.git"), None, &missing).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound);
}

async fn a_commit_that_no_ref_leads_to_is_fetched_or_not_found(engine: Engine) {
    let upstream = rich();
    let hidden = upstream.commit("gone", &[("h.txt", "1")]);
    upstream.git(&["update-ref", "-d", "refs/heads/gone"]);
    upstream.git(&["config", "uploadpack.allowAnySHA1InWant", "true"]);
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    let url = server.url("app.git");
    node.fetch_as(&url, None, &Want::Commit(hidden)).await.unwrap();
    let absent = Want::Commit("1".repeat(40));
    let failure = node.fetch_as(&url, None, &absent).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound, "{failure}");
    let tag = upstream.git(&["rev-parse", "refs/tags/v1.0"]);
    assert_eq!(node.fetch_as(&url, None, &Want::Commit(tag)).await.unwrap_err().class, ErrorClass::Invalid);
}

async fn a_file_upstream_is_read_where_that_is_allowed(engine: Engine) {
    let upstream = rich();
    let node = Node::new(engine).await;
    let fetched = node.fetch(&upstream.file_url()).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    let failure = node.fetch("file:///nowhere/at/all.git").await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound, "{failure}");
    let node = Node::with(engine, |settings| settings.allow_file = false).await;
    assert_eq!(node.fetch(&upstream.file_url()).await.unwrap_err().class, ErrorClass::Forbidden);
}

async fn names_of_refs_are_never_taken_for_options(engine: Engine) {
    let upstream = rich();
    for name in ["-x", "--upload-pack=x", "$(x)", "'x'", "x;y", "x|y", "ü", "HEAD", "a\"b", "FETCH_HEAD", "x%00y"] {
        upstream.git(&["update-ref", &format!("refs/heads/{name}"), "refs/heads/main"]);
        upstream.git(&["update-ref", &format!("refs/tags/{name}"), "refs/heads/main"]);
    }
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!(fetched.listing.head.as_deref(), Some("refs/heads/main"));
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    let want = Want::Branch("--upload-pack=x".to_owned());
    node.fetch_as(&server.url("app.git"), None, &want).await.unwrap();
}

async fn a_credential_opens_the_upstream_and_appears_nowhere(engine: Engine) {
    let upstream = rich();
    let server = Server::start(upstream.root());
    server.require(CANARY_LOGIN);
    let node = Node::new(engine).await;
    let url = server.url("app.git");
    let refused = node.fetch(&url).await.unwrap_err();
    assert_eq!(refused.class, ErrorClass::Auth, "{refused}");
    node.credential("wrong.token", "c4n4ry-of-both-2");
    let wrong = node.fetch_as(&url, Some("wrong"), &Want::All).await.unwrap_err();
    assert_eq!(wrong.class, ErrorClass::Auth, "{wrong}");
    node.credential("team.token", CANARY);
    let fetched = node.fetch_as(&url, Some("team"), &Want::All).await.unwrap();
    for text in [refused.message, wrong.message, format!("{fetched:?}")] {
        assert!(!text.contains(CANARY) && !text.contains(CANARY_LOGIN), "{text}");
    }
    // Also not while it is in use, where any user of the node could look.
    upstream.commit("main", &[("more.txt", "x")]);
    let requests = server.counts().requests;
    server.behave(Behaviour::Stall);
    let look = async {
        eventually("it asks", || server.counts().requests > requests).await;
        let found = [processes_with(CANARY), processes_with(CANARY_LOGIN)].concat();
        node.running.cancel.cancel();
        found
    };
    let (stopped, found) = tokio::join!(node.fetch_as(&url, Some("team"), &Want::All), look);
    assert_eq!(stopped.unwrap_err().message, "cancelled");
    assert_eq!(found, Vec::<String>::new());
    let found = std::process::Command::new("grep")
        .args(["-rlE", &format!("{CANARY}|{CANARY_LOGIN}")])
        .arg(node.storage.path().join(".haul"))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
}

async fn each_answer_has_its_class(engine: Engine) {
    let upstream = rich();
    let server = Server::start(upstream.root());
    // The command does not tell what the upstream wishes besides its status.
    let told = |seconds: u64| (engine == Engine::Gix).then_some(Duration::from_secs(seconds));
    let unavailable = if engine == Engine::Gix { ErrorClass::Throttled } else { ErrorClass::Network };
    for (behaviour, class, wait) in [
        (Behaviour::status(401), ErrorClass::Auth, None),
        (Behaviour::status(403), ErrorClass::Forbidden, None),
        (Behaviour::status(404), ErrorClass::NotFound, None),
        (Behaviour::status(410), ErrorClass::NotFound, None),
        (Behaviour::status(429).header("Retry-After", "7"), ErrorClass::Throttled, told(7)),
        (Behaviour::status(500), ErrorClass::Network, None),
        (Behaviour::status(503).header("Retry-After", "9"), unavailable, told(9)),
        (Behaviour::status(200), ErrorClass::NotFound, None),
    ] {
        server.behave(behaviour.clone());
        // One that has not been asked to wait.
        let node = Node::new(engine).await;
        let failure = node.fetch(&server.url("app.git")).await.unwrap_err();
        assert_eq!(failure.class, class, "{behaviour:?}: {failure}");
        assert_eq!(failure.retry_after, wait, "{behaviour:?}");
    }
    server.behave(Behaviour::Serve);
    let failure = Node::new(engine).await.fetch(&server.url("absent.git")).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound, "{failure}");
}

async fn a_redirect_is_reported_and_not_followed(engine: Engine) {
    let upstream = rich();
    let elsewhere = Server::start(upstream.root());
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    node.credential("team.token", CANARY);
    for status in [301, 302, 307, 308] {
        let location = format!("{}/info/refs?service=git-upload-pack", elsewhere.url("app.git"));
        server.behave(Behaviour::status(status).header("Location", &location));
        let failure = node.fetch_as(&server.url("app.git"), Some("team"), &Want::All).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Invalid, "{failure}");
        assert!(failure.message.contains("redirect"), "{failure}");
    }
    assert_eq!(elsewhere.counts().requests, 0);
}

async fn what_cannot_be_connected_to_is_a_matter_of_the_network(engine: Engine) {
    let node = Node::new(engine).await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let upstream = rich();
    let server = Server::start(upstream.root());
    let plain = server.url("app.git").replace("http://", "https://");
    let closed = format!("http://127.0.0.1:{port}/app.git");
    for url in [closed.as_str(), "https://nowhere.invalid/app.git", &plain] {
        let failure = node.fetch(url).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Network, "{url}: {failure}");
        // What the breaker of a host counts.
        assert_eq!(failure.unreachable, url == closed, "{url}: {failure}");
    }
}

async fn only_a_trusted_certificate_is_talked_to(engine: Engine) {
    let upstream = rich();
    let server = Server::start_tls(upstream.root());
    server.require(CANARY_LOGIN);
    let url = server.url("app.git");
    let node = Node::new(engine).await;
    node.credential("team.token", CANARY);
    let failure = node.fetch_as(&url, Some("team"), &Want::All).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Network, "{failure}");
    assert!(failure.message.contains("no trusted connection"), "{failure}");
    assert_eq!(server.counts().authorised, 0);
    let node = Node::with(engine, |settings| settings.ca_file = Some(githttp::ca_file())).await;
    node.credential("team.token", CANARY);
    let fetched = node.fetch_as(&url, Some("team"), &Want::All).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
}

async fn loopback_is_refused_unless_allowed_and_nothing_is_connected_to(engine: Engine) {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::with(engine, |settings| settings.allow_loopback = false).await;
    let named = server.url("app.git");
    for url in [named.clone(), named.replace("localhost", "127.0.0.1"), named.replace("localhost", "0x7f.1")] {
        let failure = node.fetch(&url).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Forbidden, "{url}: {failure}");
    }
    assert_eq!(server.counts().requests, 0);
}

async fn an_upstream_that_falls_silent_is_stalled_within_the_limit(engine: Engine) {
    let upstream = rich();
    upstream.commit_noise("noise", 400_000);
    let server = Server::start(upstream.root());
    let mut node = Node::new(engine).await;
    node.running.bounds.stall = Duration::from_secs(1);
    let url = server.url("app.git");
    for behaviour in [Behaviour::Stall, Behaviour::StallPack { after: 100_000 }] {
        server.behave(behaviour);
        let started = Instant::now();
        let failure = node.fetch(&url).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Stalled, "{failure}");
        assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    }
    eventually("its processes are gone", || processes_with(&url).is_empty()).await;
}

async fn a_deadline_ends_a_transfer_and_all_it_started(engine: Engine) {
    let upstream = rich();
    let server = Server::start(upstream.root());
    server.behave(Behaviour::Stall);
    let mut node = Node::new(engine).await;
    node.running.bounds.deadline = Duration::from_millis(500);
    let url = server.url("app.git");
    assert_eq!(node.fetch(&url).await.unwrap_err().class, ErrorClass::Timeout);
    eventually("its processes are gone", || processes_with(&url).is_empty()).await;
}

async fn a_cancel_ends_the_child_and_all_it_started(engine: Engine) {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    server.behave(Behaviour::StallPack { after: 100_000 });
    let node = Node::new(engine).await;
    let url = server.url("app.git");
    let cancel = async {
        node.receiving().await;
        let running = processes_with(&url).len();
        node.running.cancel.cancel();
        running
    };
    let (fetched, running) = tokio::join!(node.fetch(&url), cancel);
    let failure = fetched.unwrap_err();
    assert_eq!((failure.class, failure.message.as_str()), (ErrorClass::Internal, "cancelled"));
    // The library's child has the address on its standard input only.
    assert!(running >= if engine == Engine::Gix { 0 } else { 2 }, "{running}");
    eventually("its processes are gone", || processes_with(&url).is_empty()).await;
}

async fn a_connection_that_breaks_mid_pack_is_retried_and_leaves_nothing_that_hinders(engine: Engine) {
    let upstream = rich();
    upstream.commit_noise("noise", 400_000);
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    server.behave(Behaviour::CutPack { after: 100_000 });
    let failure = node.fetch(&server.url("app.git")).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Network, "{failure}");
    server.behave(Behaviour::Serve);
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_sound(&fetched.path);
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

async fn a_damaged_pack_is_not_taken(engine: Engine) {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    let node = Node::new(engine).await;
    server.behave(Behaviour::DamagePack { at: 50_000, asked_by: "agent=" });
    let failure = node.fetch(&server.url("app.git")).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Corrupt, "{failure}");
    server.behave(Behaviour::Serve);
    assert_sound(&node.fetch(&server.url("app.git")).await.unwrap().path);
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

async fn more_than_the_quota_is_not_taken(engine: Engine) {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    let node = Node::with(engine, |settings| settings.max_bytes = bytesize::ByteSize::kb(50)).await;
    for url in [server.url("app.git"), upstream.file_url()] {
        let failure = node.fetch(&url).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Quota, "{failure}");
    }
}

async fn a_disk_below_its_reserve_stops_a_transfer(engine: Engine) {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    // More than any disk has.
    let mut node = Node::new(engine).await;
    node.mirrors = node.mirrors.keeping_free(u64::MAX);
    // Held back until somebody looks.
    server.behave(Behaviour::StallPack { after: 100_000 });
    let failure = node.fetch(&server.url("app.git")).await.unwrap_err();
    assert_eq!((failure.class, failure.deferred), (ErrorClass::Disk, true), "{failure}");
    assert!(failure.message.contains("disk.reserve"), "{failure}");
    node.mirrors = node.mirrors.keeping_free(0);
    server.behave(Behaviour::Serve);
    assert_sound(&node.fetch(&server.url("app.git")).await.unwrap().path);
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn what_the_library_cannot_read_is_fetched_by_the_command_in_the_same_attempt() {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    server.behave(Behaviour::DamagePack { at: 50_000, asked_by: "agent=haul/" });
    let alone = Node::new(Engine::Gix).await;
    assert_eq!(alone.fetch(&server.url("app.git")).await.unwrap_err().class, ErrorClass::Corrupt);
    let node = Node::with(Engine::Gix, |settings| settings.transport_fallback = true).await;
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    assert_sound(&fetched.path);
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn damage_that_both_see_is_told_in_both_their_words() {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    server.behave(Behaviour::DamagePack { at: 50_000, asked_by: "agent=" });
    let node = Node::with(Engine::Gix, |settings| settings.transport_fallback = true).await;
    let failure = node.fetch(&server.url("app.git")).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Corrupt);
    assert!(failure.message.contains("the git command did no better"), "{failure}");
}
