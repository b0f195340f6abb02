//! Transfers into mirrors, by real children of the real binary, from a git server that can misbehave.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up shall fail loudly")]

#[path = "transfer/dns.rs"]
mod dns;
#[path = "support/githttp.rs"]
mod githttp;
#[path = "transfer/hostile.rs"]
mod hostile;
#[path = "support/node.rs"]
mod node;
#[path = "transfer/proxy.rs"]
mod proxy;
#[path = "transfer/ssh.rs"]
mod ssh;

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use githttp::{Behaviour, Server, Upstream};
use haul::{
    failure::{ErrorClass, Failure},
    git::{
        mirror::{Source, Want},
        settings::{Engine, GitSettings},
    },
    protocol::GitUrl,
};
use node::{Node, assert_sound, eventually, refs, rich};
use tokio::time::Instant;

/// The secret that must appear nowhere; with the user of tokens it is `eC1hY2Nlc3MtdG9rZW46Y2FuYXJ5` in base64.
const CANARY: &str = "canary";
const CANARY_LOGIN: &str = "eC1hY2Nlc3MtdG9rZW46Y2FuYXJ5";

#[tokio::test]
async fn a_mirror_equals_what_git_itself_would_clone() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!(fetched.source, Source::Upstream);
    assert_eq!(fetched.listing.head.as_deref(), Some("refs/heads/main"));
    assert_eq!(fetched.listing.refs, refs(&upstream.path()));
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    assert_eq!(fetched.listing.peeled["refs/tags/v1.0"], fetched.listing.refs["refs/heads/main"]);
    assert!(fetched.objects > 0 && fetched.received_bytes > 0);
    assert_sound(&fetched.path);
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_fetch_with_nothing_new_lists_once_and_asks_for_no_pack() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    let first = node.fetch(&server.url("app.git")).await.unwrap();
    let before = server.counts();
    let again = node.fetch(&server.url("app.git")).await.unwrap();
    let after = server.counts();
    assert_eq!((after.listings - before.listings, after.packs - before.packs), (1, 0));
    assert_eq!((again.source, again.objects, again.received_bytes), (Source::Mirror, 0, 0));
    assert_eq!(again.listing, first.listing);
}

#[tokio::test]
async fn only_what_is_new_is_received_and_what_is_gone_is_forgotten() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
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
}

#[tokio::test]
async fn deltas_are_resolved_also_against_what_is_already_there() {
    let upstream = Upstream::new();
    let text = |changed: usize| {
        let mut lines: Vec<String> = (0..2000).map(|line| line.to_string()).collect();
        "changed".clone_into(&mut lines[changed]);
        lines.join("\n")
    };
    for changed in 0..12 {
        upstream.commit("main", &[("a.txt", &text(changed * 10))]);
    }
    upstream.git(&["repack", "-adfq", "--depth=50"]);
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    let first = node.fetch(&server.url("app.git")).await.unwrap();
    assert_sound(&first.path);
    upstream.commit("main", &[("a.txt", &text(1999))]);
    upstream.git(&["repack", "-adfq", "--depth=50"]);
    let second = node.fetch(&server.url("app.git")).await.unwrap();
    assert!(second.received_bytes < 2000, "{}", second.received_bytes);
    assert_eq!(refs(&second.path), refs(&upstream.path()));
    assert_sound(&second.path);
}

#[tokio::test]
async fn a_rewritten_branch_is_followed() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    node.fetch(&server.url("app.git")).await.unwrap();
    upstream.git(&["update-ref", "-d", "refs/heads/main"]);
    let tip = upstream.commit("main", &[("new.txt", "x")]);
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!(fetched.listing.refs["refs/heads/main"], tip);
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
}

#[tokio::test]
async fn an_empty_repository_has_a_head_and_nothing_else() {
    let upstream = Upstream::new();
    upstream.git(&["symbolic-ref", "HEAD", "refs/heads/trunk"]);
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!(fetched.listing.head.as_deref(), Some("refs/heads/trunk"));
    assert!(fetched.listing.refs.is_empty());
    assert_eq!(server.counts().packs, 0);
    let tip = upstream.commit("trunk", &[("a.txt", "1")]);
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!(fetched.listing.refs["refs/heads/trunk"], tip);
}

#[tokio::test]
async fn one_branch_comes_with_the_tags_that_point_into_it() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    let want = Want::Branch("feature/x".to_owned());
    let fetched = node.fetch_as(&server.url("app.git"), None, &want).await.unwrap();
    assert!(fetched.listing.refs.contains_key("refs/heads/feature/x"));
    assert!(!fetched.listing.refs.contains_key("refs/heads/main"));
    assert!(!fetched.listing.refs.contains_key("refs/tags/v1.0"));
    // Also where the mirror has everything.
    drop(node.fetch(&server.url("app.git")).await.unwrap());
    let fetched = node.fetch_as(&server.url("app.git"), None, &want).await.unwrap();
    let names: Vec<_> = fetched.listing.refs.keys().collect();
    assert_eq!(names, ["refs/heads/feature/x", "refs/tags/other"]);
    let missing = Want::Branch("nowhere".to_owned());
    let failure = node.fetch_as(&server.url("app.git"), None, &missing).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound);
}

#[tokio::test]
async fn a_commit_that_no_ref_leads_to_is_fetched_or_not_found() {
    let upstream = rich();
    let hidden = upstream.commit("gone", &[("h.txt", "1")]);
    upstream.git(&["update-ref", "-d", "refs/heads/gone"]);
    upstream.git(&["config", "uploadpack.allowAnySHA1InWant", "true"]);
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    let url = server.url("app.git");
    node.fetch_as(&url, None, &Want::Commit(hidden)).await.unwrap();
    let absent = Want::Commit("1".repeat(40));
    let failure = node.fetch_as(&url, None, &absent).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound, "{failure}");
    let tag = upstream.git(&["rev-parse", "refs/tags/v1.0"]);
    assert_eq!(node.fetch_as(&url, None, &Want::Commit(tag)).await.unwrap_err().class, ErrorClass::Invalid);
}

#[tokio::test]
async fn a_file_upstream_is_read_where_that_is_allowed() {
    let upstream = rich();
    let node = Node::new(Engine::Gix).await;
    let fetched = node.fetch(&upstream.file_url()).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    let failure = node.fetch("file:///nowhere/at/all.git").await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound);
    let node = Node::with(Engine::Gix, |settings| settings.allow_file = false).await;
    assert_eq!(node.fetch(&upstream.file_url()).await.unwrap_err().class, ErrorClass::Forbidden);
}

#[tokio::test]
async fn a_credential_opens_the_upstream_and_appears_nowhere() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    server.require(CANARY_LOGIN);
    let node = Node::new(Engine::Gix).await;
    let url = server.url("app.git");
    let refused = node.fetch(&url).await.unwrap_err();
    assert_eq!(refused.class, ErrorClass::Auth, "{refused}");
    node.credential("wrong.token", "canary2");
    let wrong = node.fetch_as(&url, Some("wrong"), &Want::All).await.unwrap_err();
    assert_eq!(wrong.class, ErrorClass::Auth);
    let absent = node.fetch_as(&url, Some("absent"), &Want::All).await.unwrap_err();
    assert_eq!(absent.class, ErrorClass::Auth);
    node.credential("team.token", CANARY);
    let fetched = node.fetch_as(&url, Some("team"), &Want::All).await.unwrap();
    for text in [refused.message, wrong.message, absent.message, format!("{fetched:?}")] {
        assert!(!text.contains(CANARY) && !text.contains(CANARY_LOGIN), "{text}");
    }
    let found = std::process::Command::new("grep")
        .args(["-rlE", &format!("{CANARY}|{CANARY_LOGIN}")])
        .arg(node.storage.path().join(".haul"))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
}

#[tokio::test]
async fn what_one_credential_may_see_is_not_served_to_another() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    node.credential("team.token", CANARY);
    let url = server.url("app.git");
    let with = node.fetch_as(&url, Some("team"), &Want::All).await.unwrap();
    let without = node.fetch(&url).await.unwrap();
    assert_ne!(with.path, without.path);
    // Access that was revoked is gone at once, whatever the mirror holds.
    server.behave(Behaviour::status(403));
    assert_eq!(node.fetch(&url).await.unwrap_err().class, ErrorClass::Forbidden);
}

#[tokio::test]
async fn a_credential_that_is_bound_to_no_host_or_to_another_is_not_sent() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    node.credential_at("loose.token", CANARY);
    node.credential_at("loose2.toml", "user = \"u\"\npassword = \"canary\"");
    node.credential_at("elsewhere.toml", "token = \"canary\"\nhosts = [\"*.git.example\"]");
    node.credential_at("git.example/team.token", CANARY);
    for (name, class) in [
        ("loose", ErrorClass::Forbidden),
        ("loose2", ErrorClass::Forbidden),
        ("elsewhere", ErrorClass::Forbidden),
        ("team", ErrorClass::Auth),
    ] {
        let failure = node.fetch_as(&server.url("app.git"), Some(name), &Want::All).await.unwrap_err();
        assert_eq!(failure.class, class, "{name}: {failure}");
        assert!(!failure.message.contains(CANARY), "{failure}");
    }
    assert_eq!(server.counts().requests, 0);
}

#[tokio::test]
async fn a_credential_is_not_sent_in_the_clear_beyond_this_machine() {
    let node = Node::new(Engine::Gix).await;
    node.credential_at("10.255.255.1/team.token", CANARY);
    let failure = node.fetch_as("http://10.255.255.1/app.git", Some("team"), &Want::All).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Forbidden);
    assert!(failure.message.contains("without encryption"), "{failure}");
}

#[tokio::test]
async fn a_mirror_that_cannot_be_used_is_made_anew() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    let url = server.url("app.git");
    for (file, text) in [("config", "[core"), ("shallow", "1")] {
        let path = node.fetch(&url).await.unwrap().path;
        fs::write(path.join(file), text).unwrap();
        let again = node.fetch(&url).await.unwrap();
        assert_eq!(again.source, Source::Upstream, "{file}");
        assert_eq!(refs(&again.path), refs(&upstream.path()));
    }
}

#[tokio::test]
async fn a_transfer_dies_with_the_agent() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    server.behave(Behaviour::Stall);
    let storage = tempfile::tempdir().unwrap();
    fs::create_dir(storage.path().join("x.git")).unwrap();
    // A shell in the place of the agent.
    let mut agent = std::process::Command::new("sh")
        .args(["-c", "\"$0\" child transfer; true", env!("CARGO_BIN_EXE_haul")])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let request = serde_json::json!({
        "url": server.url("app.git"), "mirror": storage.path().join("x.git"), "want": "all", "credential": null,
        "policy": { "allow_http": true, "allow_file": false, "allow_loopback": true, "allow_private": false, "hosts": [] },
        "ca_file": null, "known_hosts": null, "max_bytes": 1,
    });
    let mut stdin = agent.stdin.take().unwrap();
    writeln!(stdin, "{}", serde_json::json!({ "parent": agent.id(), "request": request })).unwrap();
    eventually("it asks", || server.counts().requests == 1).await;
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.id())).unwrap();
    let child = PathBuf::from("/proc").join(children.trim());
    assert!(fs::read_to_string(child.join("cmdline")).unwrap().contains("transfer"));
    agent.kill().unwrap();
    agent.wait().unwrap();
    // Gone, or waiting only to be reaped.
    eventually("it is gone", || !fs::read_to_string(child.join("cmdline")).is_ok_and(|line| line.contains("transfer")))
        .await;
}

#[tokio::test]
async fn each_answer_has_its_class() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    for (behaviour, class, wait) in [
        (Behaviour::status(401), ErrorClass::Auth, None),
        (Behaviour::status(403), ErrorClass::Forbidden, None),
        (Behaviour::status(404), ErrorClass::NotFound, None),
        (Behaviour::status(410), ErrorClass::NotFound, None),
        (Behaviour::status(408), ErrorClass::Network, None),
        (Behaviour::status(502), ErrorClass::Network, None),
        (Behaviour::status(504).header("Retry-After", "0"), ErrorClass::Network, Some(0)),
        (Behaviour::status(429).header("Retry-After", "7"), ErrorClass::Throttled, Some(7)),
        (Behaviour::status(500), ErrorClass::Network, None),
        (Behaviour::status(503).header("Retry-After", "9"), ErrorClass::Throttled, Some(9)),
        (Behaviour::status(200), ErrorClass::NotFound, None),
    ] {
        server.behave(behaviour.clone());
        // A node of its own for each: one that was asked to slow down leaves the host alone.
        let failure = Node::new(Engine::Gix).await.fetch(&server.url("app.git")).await.unwrap_err();
        assert_eq!(failure.class, class, "{behaviour:?}: {failure}");
        assert_eq!(failure.retry_after, wait.map(Duration::from_secs), "{behaviour:?}");
    }
    server.behave(Behaviour::Serve);
    let node = Node::new(Engine::Gix).await;
    let failure = node.fetch(&server.url("absent.git")).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound, "{failure}");
}

#[tokio::test]
async fn a_redirect_is_reported_and_not_followed() {
    let upstream = rich();
    let elsewhere = Server::start(upstream.root());
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
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

#[tokio::test]
async fn a_host_that_is_down_is_left_alone_and_one_that_throttles_too_and_others_are_not() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let other = Server::start(upstream.root());
    let node = Node::with(Engine::Gix, |settings| {
        settings.breaker_after = 2;
        settings.breaker_pause = Duration::from_millis(300);
    })
    .await;
    let url = server.url("app.git");
    server.behave(Behaviour::status(502));
    assert!(!node.fetch(&url).await.unwrap_err().deferred);
    assert!(node.fetch(&url).await.unwrap_err().deferred);
    let before = server.counts().requests;
    let refused = node.fetch(&url).await.unwrap_err();
    assert_eq!((refused.class, refused.deferred), (ErrorClass::Network, true), "{refused}");
    assert_eq!(server.counts().requests, before);
    assert_eq!(node.mirrors.hosts()[0].paused.as_deref(), Some("down"));
    node.fetch(&other.url("app.git")).await.unwrap();
    server.behave(Behaviour::Serve);
    tokio::time::sleep(refused.retry_after.unwrap()).await;
    node.fetch(&url).await.unwrap();
    server.behave(Behaviour::status(429).header("Retry-After", "600"));
    assert!(!node.fetch(&url).await.unwrap_err().deferred);
    let held = node.fetch(&url).await.unwrap_err();
    assert_eq!((held.class, held.deferred), (ErrorClass::Throttled, true), "{held}");
    assert!(held.retry_after.unwrap() > Duration::from_secs(590));
}

#[tokio::test]
async fn a_host_has_no_more_transfers_at_a_time_than_its_limit() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    server.behave(Behaviour::HoldPack);
    let node = Node::with(Engine::Gix, |settings| settings.host_limit = 1).await;
    let waits = |node: &Node| node.running.progress.lock().unwrap().iter().any(|progress| progress.phase == "waiting");
    let release = async {
        eventually("one waits and one receives", || waits(&node) && server.counts().packs == 1).await;
        server.behave(Behaviour::Serve);
    };
    // Two mirrors of one host: one for each credential.
    node.credential("team.token", CANARY);
    let url = server.url("app.git");
    let (first, second, ()) = tokio::join!(node.fetch(&url), node.fetch_as(&url, Some("team"), &Want::All), release);
    assert_ne!(first.unwrap().path, second.unwrap().path);
    assert_eq!(server.counts().packs, 2);
}

#[tokio::test]
async fn a_closed_port_is_a_matter_of_the_network() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let failure = Node::new(Engine::Gix).await.fetch(&format!("http://127.0.0.1:{port}/app.git")).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Network, "{failure}");
}

#[tokio::test]
async fn plain_text_where_tls_is_expected_is_a_matter_of_the_network() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let url = server.url("app.git").replace("http://", "https://");
    let failure = Node::new(Engine::Gix).await.fetch(&url).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Network, "{failure}");
}

#[tokio::test]
async fn only_a_trusted_certificate_is_talked_to() {
    let upstream = rich();
    let server = Server::start_tls(upstream.root());
    server.require(CANARY_LOGIN);
    let url = server.url("app.git");
    let node = Node::new(Engine::Gix).await;
    node.credential("team.token", CANARY);
    let failure = node.fetch_as(&url, Some("team"), &Want::All).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Network, "{failure}");
    assert!(failure.message.contains("no trusted connection"), "{failure}");
    assert_eq!(server.counts().requests, 0);
    let node = Node::with(Engine::Gix, |settings| settings.ca_file = Some(githttp::ca_file())).await;
    node.credential("team.token", CANARY);
    let fetched = node.fetch_as(&url, Some("team"), &Want::All).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
}

#[tokio::test]
async fn loopback_is_refused_unless_allowed_and_nothing_is_connected_to() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::with(Engine::Gix, |settings| settings.allow_loopback = false).await;
    let named = server.url("app.git");
    for url in [named.clone(), named.replace("localhost", "127.0.0.1"), named.replace("localhost", "0x7f.1")] {
        let failure = node.fetch(&url).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Forbidden, "{url}: {failure}");
        assert!(failure.message.contains("git.allow_loopback"), "{failure}");
    }
    assert_eq!(server.counts().requests, 0);
}

#[tokio::test]
async fn an_upstream_that_falls_silent_is_stalled_within_the_limit() {
    let upstream = rich();
    upstream.commit_noise("noise", 400_000);
    let server = Server::start(upstream.root());
    let mut node = Node::new(Engine::Gix).await;
    node.running.bounds.stall = Duration::from_secs(1);
    for behaviour in [Behaviour::Stall, Behaviour::StallPack { after: 100_000 }] {
        server.behave(behaviour);
        let started = Instant::now();
        let failure = node.fetch(&server.url("app.git")).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Stalled, "{failure}");
        assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    }
    assert!(node.processes().is_empty());
}

#[tokio::test]
async fn a_deadline_ends_a_transfer() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    server.behave(Behaviour::Stall);
    let mut node = Node::new(Engine::Gix).await;
    node.running.bounds.deadline = Duration::from_millis(500);
    assert_eq!(node.fetch(&server.url("app.git")).await.unwrap_err().class, ErrorClass::Timeout);
}

#[tokio::test]
async fn a_connection_that_breaks_mid_pack_is_retried_and_leaves_nothing_that_hinders() {
    let upstream = rich();
    upstream.commit_noise("noise", 400_000);
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    server.behave(Behaviour::CutPack { after: 100_000 });
    let failure = node.fetch(&server.url("app.git")).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Network, "{failure}");
    server.behave(Behaviour::Serve);
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_sound(&fetched.path);
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn more_than_the_quota_is_not_taken() {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    let node = Node::with(Engine::Gix, |settings| settings.max_bytes = bytesize::ByteSize::kb(50)).await;
    let failure = node.fetch(&server.url("app.git")).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Quota, "{failure}");
}

#[tokio::test]
async fn a_cancel_ends_the_child_and_all_it_started() {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    server.behave(Behaviour::StallPack { after: 100_000 });
    let node = Node::new(Engine::Gix).await;
    let url = server.url("app.git");
    let cancel = async {
        node.receiving().await;
        assert_eq!(node.processes().len(), 1);
        node.running.cancel.cancel();
    };
    let (fetched, ()) = tokio::join!(node.fetch(&url), cancel);
    let failure = fetched.unwrap_err();
    assert_eq!((failure.class, failure.message.as_str()), (ErrorClass::Internal, "cancelled"));
    assert!(node.processes().is_empty());
}

#[tokio::test]
async fn dropping_a_fetch_kills_its_child() {
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    server.behave(Behaviour::StallPack { after: 100_000 });
    let node = Node::new(Engine::Gix).await;
    let url = server.url("app.git");
    tokio::select! {
        _ = node.fetch(&url) => panic!("the pack never ends"),
        () = node.receiving() => {}
    }
    eventually("its processes are gone", || node.processes().is_empty()).await;
}

#[tokio::test]
async fn a_killed_child_is_a_fault_of_ours_and_the_next_fetch_works() {
    let upstream = rich();
    upstream.commit_noise("noise", 400_000);
    let server = Server::start(upstream.root());
    server.behave(Behaviour::StallPack { after: 100_000 });
    let node = Node::with(Engine::Gix, |settings| settings.transport_fallback = false).await;
    let url = server.url("app.git");
    let kill = async {
        node.receiving().await;
        for pid in node.processes() {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
    };
    let (fetched, ()) = tokio::join!(node.fetch(&url), kill);
    let failure = fetched.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Internal, "{failure}");
    assert!(failure.message.contains("killed by signal 9"), "{failure}");
    assert_ne!(node.leftovers(), Vec::<PathBuf>::new());
    server.behave(Behaviour::Serve);
    let fetched = node.fetch(&url).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn fetches_of_one_upstream_take_turns_and_all_succeed() {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let node = Node::new(Engine::Gix).await;
    let url = server.url("app.git");
    let all = futures_util::future::join_all((0..4).map(|_| node.fetch(&url))).await;
    let sources: Vec<_> = all.into_iter().map(|fetched| fetched.unwrap().source).collect();
    assert_eq!(sources.iter().filter(|&&source| source == Source::Upstream).count(), 1, "{sources:?}");
    assert_eq!((server.counts().listings, server.counts().packs), (4, 1));
}
