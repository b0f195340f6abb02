//! LFS files of a clone, from a server of the test's own that can misbehave.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

#[path = "support/githttp.rs"]
mod githttp;
#[path = "support/owners.rs"]
mod owners;
#[path = "execute/world.rs"]
#[allow(dead_code, reason = "each suite uses its own part of it")]
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex},
    time::Duration,
};

use githttp::{Request, Server};
use haul::{
    failure::{ErrorClass, Failure},
    git::GitSettings,
    protocol::{Owner, TaskResult},
};
use owners::owners;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use world::{World, class, git, git_raw, read, write};

/// The secret that must appear nowhere but at its own host, as it travels.
const CANARY: &str = "Basic eC1hY2Nlc3MtdG9rZW46Y2FuYXJ5";

/// What the stub does, and what it saw.
#[derive(Default)]
struct Script {
    /// The objects it has.
    objects: BTreeMap<String, Vec<u8>>,
    /// Answers the batch request itself with this.
    batch: Option<Answer>,
    /// Says this of every object instead of offering it.
    refusal: Option<u16>,
    /// Leads there instead of to itself; the id follows.
    link: Option<String>,
    /// Headers of every link.
    header: Option<Value>,
    /// Answers downloads with this.
    download: Option<Answer>,
    /// Says that it knows another size.
    size: Option<u64>,
    /// How many objects each batch asked for.
    batches: Vec<usize>,
    /// Paths that were downloaded, with the credential and the test's own header.
    downloads: Vec<(String, Option<String>, Option<String>)>,
    /// Credentials of batch requests.
    logins: Vec<Option<String>>,
}

#[derive(Clone)]
enum Answer {
    /// A status, header lines and a body.
    Whole(u16, String, Vec<u8>),
    /// Bytes without an end.
    Endless,
    /// Fewer bytes than were announced.
    Cut,
}

/// An upstream with LFS.
struct Stage {
    world: World,
    server: Server,
    script: Arc<Mutex<Script>>,
    _credentials: tempfile::TempDir,
}

fn oid(content: &[u8]) -> String {
    Sha256::digest(content).iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

fn pointer(content: &[u8]) -> String {
    pointer_to(&oid(content), content.len() as u64)
}

fn pointer_to(oid: &str, size: u64) -> String {
    format!("version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n")
}

fn serve(server: &Server, script: &Arc<Mutex<Script>>) {
    let (script, base) = (Arc::clone(script), server.url("objects/"));
    server.handle(move |request, out| answer(&mut script.lock().unwrap(), &base, request, out));
}

fn answer(script: &mut Script, base: &str, request: &Request, out: &mut dyn Write) -> bool {
    let login = request.header("authorization").map(str::to_owned);
    let text = if request.path.ends_with(".git/info/lfs/objects/batch") {
        script.logins.push(login);
        match script.batch.clone() {
            Some(scripted) => scripted,
            None => Answer::Whole(200, String::new(), batch(script, base, &request.body)),
        }
    } else if let Some((_, oid)) = request.path.split_once("/objects/") {
        let own = request.header("x-own").map(str::to_owned);
        script.downloads.push((request.path.clone(), login, own));
        match (script.download.clone(), script.objects.get(oid)) {
            (Some(scripted), _) => scripted,
            (None, Some(content)) => Answer::Whole(200, String::new(), content.clone()),
            (None, None) => Answer::Whole(404, String::new(), Vec::new()),
        }
    } else {
        return false;
    };
    // A client that has seen enough hangs up.
    let _ = send(&text, out);
    true
}

fn send(answer: &Answer, out: &mut dyn Write) -> std::io::Result<()> {
    match answer {
        Answer::Whole(status, headers, body) => {
            let length = body.len();
            write!(out, "HTTP/1.1 {status} S\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n")?;
            out.write_all(body)
        }
        Answer::Endless => {
            write!(out, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            loop {
                out.write_all(&[b' '; 8192])?;
            }
        }
        Answer::Cut => out.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhe"),
    }
}

fn batch(script: &mut Script, base: &str, question: &[u8]) -> Vec<u8> {
    let question: Value = serde_json::from_slice(question).unwrap();
    assert_eq!((&question["operation"], &question["transfers"]), (&json!("download"), &json!(["basic"])));
    let asked = question["objects"].as_array().unwrap();
    script.batches.push(asked.len());
    let link = script.link.clone().unwrap_or_else(|| base.to_owned());
    let objects: Vec<Value> = asked
        .iter()
        .map(|object| {
            let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap());
            if let Some(code) = script.refusal.or_else(|| (!script.objects.contains_key(oid)).then_some(404)) {
                return json!({"oid": oid, "size": size, "error": {"code": code, "message": "\u{1b}[31mno\u{1b}"}});
            }
            let mut download = json!({"href": format!("{link}{oid}")});
            if let Some(header) = &script.header {
                download["header"] = header.clone();
            }
            json!({"oid": oid, "size": script.size.unwrap_or(size), "actions": {"download": download}})
        })
        .collect();
    json!({"transfer": "basic", "objects": objects}).to_string().into_bytes()
}

impl Stage {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut GitSettings)) -> Self {
        let credentials = tempfile::tempdir().unwrap();
        let token = credentials.path().join("localhost/team.token");
        fs::create_dir(token.parent().unwrap()).unwrap();
        fs::write(&token, "canary").unwrap();
        fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
        let mut settings = GitSettings {
            allow_http: true,
            allow_loopback: true,
            tree_first_after: None,
            credentials_path: Some(credentials.path().to_owned()),
            ..GitSettings::default()
        };
        change(&mut settings);
        let world = World::with(settings).await;
        let server = Server::start(world.dir.path());
        let script = Arc::default();
        serve(&server, &script);
        Self { world, server, script, _credentials: credentials }
    }

    /// Commits files as they are, and large ones as pointers to contents that the server has.
    fn commit(&self, files: &[(&str, &str)], large: &[(&str, &[u8])]) -> String {
        write(&self.world.seed(), ".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n");
        for (name, content) in large {
            write(&self.world.seed(), name, &pointer(content));
            self.script.lock().unwrap().objects.insert(oid(content), content.to_vec());
        }
        self.world.commit(files)
    }

    async fn clone(&self, project: i64, target: &str) -> Result<TaskResult, Failure> {
        let fields = json!({"lfs": true, "credential": "team", "git_url": self.server.url("up.git")});
        self.world.clone(project, target, fields).await
    }

    fn set(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    fn assert_nothing(&self, target: &str) {
        assert!(!self.world.project(target).exists() && self.world.leftovers().is_empty());
    }
}

#[tokio::test]
async fn lfs_files_are_in_their_places_and_git_finds_the_project_clean() {
    let stage = Stage::new().await;
    let seed = stage.world.seed();
    stage.commit(
        &[("plain.txt", "plain"), ("not.bin.txt", &pointer(b"not of the attributes")), ("small.bin", "no pointer")],
        &[
            ("a.bin", b"large a"),
            ("dir/deep/b.bin", &vec![7; 300_000]),
            ("same.bin", b"large a"),
            ("run.bin", b"#!/bin/sh\n"),
        ],
    );
    fs::set_permissions(seed.join("run.bin"), fs::Permissions::from_mode(0o755)).unwrap();
    stage.world.push("executable");
    stage.clone(1, "p").await.unwrap();
    let project = stage.world.project("p");
    assert_eq!(read(&project, "a.bin"), "large a");
    assert_eq!(read(&project, "same.bin"), "large a");
    assert_eq!(fs::read(project.join("dir/deep/b.bin")).unwrap(), vec![7; 300_000]);
    assert_eq!(read(&project, "small.bin"), "no pointer");
    assert_eq!(read(&project, "not.bin.txt"), pointer(b"not of the attributes"));
    let mode = |name: &str| project.join(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("run.bin"), mode("a.bin")), (0o755, 0o644));
    let kept = oid(b"large a");
    assert_eq!(read(&project, &format!(".git/lfs/objects/{}/{}/{kept}", &kept[..2], &kept[2..4])), "large a");
    // Without git-lfs, and with a filter that would find the files changed if it were asked.
    for filter in [&[][..], &["-c", "filter.lfs.clean=cat", "-c", "filter.lfs.required=true"]] {
        let args = [filter, &["status", "--porcelain"]].concat();
        assert_eq!(git(&project, &args), "", "{filter:?}");
    }
    assert!(git_raw(&project, &["fsck", "--full", "--strict"]).status.success());
    let status = stage.world.run(&stage.world.job("status", 1, json!({}))).await.unwrap();
    assert_eq!(status.dirty, Some(false));
    assert_eq!(stage.script.lock().unwrap().batches, [3]);
    // A change of the user's is one.
    write(&project, "a.bin", "changed");
    assert_eq!(git(&project, &["status", "--porcelain"]), " M a.bin");
    assert!(stage.world.leftovers().is_empty());
}

#[tokio::test]
async fn lfs_files_are_their_owners_like_everything_else() {
    assert!(rustix::process::getuid().is_root(), "this test changes users: run it as root (scripts/test does)");
    let owner = Owner { uid: 54_321, gid: 54_322 };
    let stage = Stage::with(|settings| settings.run_as = Some(owner)).await;
    stage.commit(&[("plain.txt", "plain")], &[("a.bin", b"large a"), ("dir/deep/b.bin", &vec![7; 300_000])]);
    stage.clone(1, "p").await.unwrap();
    let project = stage.world.project("p");
    let all_theirs = || assert_eq!(owners(&project), BTreeSet::from([(owner.uid, owner.gid)]));
    // Git is told that it may work in what is somebody else's.
    let clean = || assert_eq!(git(&project, &["-c", "safe.directory=*", "status", "--porcelain"]), "");
    all_theirs();
    clean();
    assert_eq!(read(&project, "a.bin"), "large a");
    assert_eq!(fs::read(project.join("dir/deep/b.bin")).unwrap(), vec![7; 300_000]);
    let kept = oid(b"large a");
    assert_eq!(read(&project, &format!(".git/lfs/objects/{}/{}/{kept}", &kept[..2], &kept[2..4])), "large a");
    // From what the node has by now, and for another owner's project apart from the first.
    stage.clone(2, "q").await.unwrap();
    assert_eq!(stage.script.lock().unwrap().downloads.len(), 2);
    assert_eq!(owners(&stage.world.project("q")), BTreeSet::from([(owner.uid, owner.gid)]));
    stage.commit(&[], &[("a.bin", b"large a, changed")]);
    stage.world.pull(1, json!({})).await.unwrap();
    assert_eq!(read(&project, "a.bin"), pointer(b"large a, changed"));
    all_theirs();
    clean();
    stage.world.run(&stage.world.job("delete", 1, json!({}))).await.unwrap();
    stage.assert_nothing("p");
}

#[tokio::test]
async fn a_clone_of_some_depth_has_the_lfs_files_of_its_tree_and_no_older_ones() {
    let stage = Stage::new().await;
    for number in 0..4 {
        stage.commit(&[("plain.txt", &number.to_string())], &[("a.bin", format!("large {number}").as_bytes())]);
    }
    let clone = |project, target, more: Value| {
        let mut fields = json!({"lfs": true, "credential": "team", "git_url": stage.server.url("up.git")});
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        stage.world.clone_job(project, target, fields)
    };
    stage.world.run(&clone(1, "p", json!({"depth": 2}))).await.unwrap();
    let project = stage.world.project("p");
    assert_eq!(
        (read(&project, "a.bin").as_str(), stage.script.lock().unwrap().batches.as_slice()),
        ("large 3", &[1][..])
    );
    assert_eq!(git(&project, &["rev-list", "--count", "HEAD"]), "2");
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
    git(&project, &["fsck", "--full", "--strict"]);
    // Neither a store of objects nor one of files is left of it.
    assert_eq!(fs::read_dir(stage.world.mirrors()).unwrap().count(), 0);
    stage.commit(&[], &[("b.bin", b"more")]);
    stage.world.pull(1, json!({})).await.unwrap();
    assert_eq!((read(&project, "a.bin").as_str(), read(&project, "b.bin")), ("large 3", pointer(b"more")));
    assert!(stage.world.leftovers().is_empty());
}

#[tokio::test]
async fn what_is_here_is_used_only_where_the_upstream_offers_it() {
    let stage = Stage::new().await;
    stage.commit(&[], &[("a.bin", b"large a")]);
    stage.clone(1, "p").await.unwrap();
    stage.clone(2, "q").await.unwrap();
    {
        let script = stage.script.lock().unwrap();
        assert_eq!((script.batches.len(), script.downloads.len()), (2, 1));
        assert!(script.logins.iter().all(|login| login.as_deref() == Some(CANARY)));
    }
    assert_eq!(read(&stage.world.project("q"), "a.bin"), "large a");
    stage.set(|script| script.refusal = Some(403));
    assert_eq!(class(&stage.clone(3, "r").await), ErrorClass::Forbidden);
    stage.assert_nothing("r");
    for project in [1, 2] {
        stage.world.run(&stage.world.job("delete", project, json!({}))).await.unwrap();
    }
    assert_eq!(fs::read_dir(stage.world.mirrors()).unwrap().count(), 0);
}

#[tokio::test]
async fn what_is_not_what_the_pointer_says_is_refused() {
    let whole = |body: &[u8]| Answer::Whole(200, String::new(), body.to_vec());
    let gone = |location: &str| Answer::Whole(302, format!("Location: {location}\r\n"), Vec::new());
    let slow = Answer::Whole(429, "Retry-After: 7\r\n".to_owned(), Vec::new());
    let status = |code| Answer::Whole(code, String::new(), Vec::new());
    let stage = Stage::new().await;
    stage.commit(&[], &[("a.bin", b"hello")]);
    for (answer, wanted) in [
        (whole(b"hellO"), ErrorClass::Corrupt),
        (whole(b"hell"), ErrorClass::Corrupt),
        (whole(b"hello!"), ErrorClass::Corrupt),
        (whole(b""), ErrorClass::Corrupt),
        (Answer::Endless, ErrorClass::Corrupt),
        (Answer::Cut, ErrorClass::Network),
        (gone("http://169.254.169.254/"), ErrorClass::Invalid),
        (status(401), ErrorClass::Auth),
        (status(403), ErrorClass::Forbidden),
        (status(404), ErrorClass::NotFound),
        (slow.clone(), ErrorClass::Throttled),
        (status(500), ErrorClass::Network),
    ] {
        stage.set(|script| script.download = Some(answer));
        let failure = stage.clone(1, "p").await.unwrap_err();
        assert_eq!(failure.class, wanted, "{failure}");
        stage.assert_nothing("p");
    }
    stage.set(|script| script.download = None);
    for (answer, wanted) in [
        (whole(b"no json"), ErrorClass::Invalid),
        (whole(b"{\"objects\": []}"), ErrorClass::NotFound),
        (Answer::Endless, ErrorClass::Quota),
        (gone("https://elsewhere.example/"), ErrorClass::Invalid),
        (status(401), ErrorClass::Auth),
        (status(403), ErrorClass::Forbidden),
        (status(404), ErrorClass::NotFound),
        (slow, ErrorClass::Throttled),
        (status(500), ErrorClass::Network),
    ] {
        stage.set(|script| script.batch = Some(answer));
        let failure = stage.clone(1, "p").await.unwrap_err();
        assert_eq!(failure.class, wanted, "{failure}");
        assert_eq!(failure.retry_after, (wanted == ErrorClass::Throttled).then_some(Duration::from_secs(7)));
        stage.assert_nothing("p");
    }
    stage.set(|script| script.batch = None);
    for (code, wanted) in [(404, ErrorClass::NotFound), (403, ErrorClass::Forbidden), (500, ErrorClass::Network)] {
        stage.set(|script| script.refusal = Some(code));
        let failure = stage.clone(1, "p").await.unwrap_err();
        assert_eq!(failure.class, wanted, "{failure}");
        assert!(failure.message.contains(&oid(b"hello")) && !failure.message.contains('\u{1b}'), "{failure}");
        stage.assert_nothing("p");
    }
    stage.set(|script| (script.refusal, script.size) = (None, Some(6)));
    assert_eq!(class(&stage.clone(1, "p").await), ErrorClass::Corrupt);
    stage.set(|script| script.size = None);
    stage.clone(1, "p").await.unwrap();
    assert_eq!(read(&stage.world.project("p"), "a.bin"), "hello");
}

#[tokio::test]
async fn links_lead_only_where_an_upstream_may_be() {
    let stage = Stage::new().await;
    stage.commit(&[], &[("a.bin", b"hello")]);
    for link in [
        "http://169.254.169.254/latest/",
        "http://2852039166/latest/",
        "http://[::ffff:169.254.169.254]/",
        "http://0.0.0.0/",
        "file:///etc/",
        "ftp://localhost/",
        "http://user:canary@localhost/",
        "/objects/",
        "",
    ] {
        stage.set(|script| script.link = Some(link.to_owned()));
        let failure = stage.clone(1, "p").await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Forbidden, "{link}: {failure}");
        assert!(!failure.message.contains("canary"));
        stage.assert_nothing("p");
    }
    assert_eq!(stage.script.lock().unwrap().downloads, []);
}

#[tokio::test]
async fn the_credential_is_never_sent_to_another_host() {
    let stage = Stage::new().await;
    stage.commit(&[], &[("a.bin", b"hello")]);
    let storage = Server::start(stage.world.dir.path());
    let away: Arc<Mutex<Script>> = Arc::default();
    away.lock().unwrap().objects.insert(oid(b"hello"), b"hello".to_vec());
    serve(&storage, &away);
    let link = storage.url("objects/");
    stage.set(|script| {
        script.link = Some(link);
        script.header = Some(json!({"X-Own": "for the storage", "Host": "elsewhere.example"}));
    });
    stage.clone(1, "p").await.unwrap();
    assert_eq!(away.lock().unwrap().downloads.len(), 1);
    assert_eq!(away.lock().unwrap().downloads[0].1, None);
    assert_eq!(away.lock().unwrap().downloads[0].2.as_deref(), Some("for the storage"));
    assert_eq!(storage.counts().authorised, 0);
    // What the server itself says to send goes instead of the credential, also to its own host.
    stage.world.run(&stage.world.job("delete", 1, json!({}))).await.unwrap();
    stage.set(|script| (script.link, script.header) = (None, Some(json!({"Authorization": "Bearer own"}))));
    stage.clone(2, "q").await.unwrap();
    assert_eq!(stage.script.lock().unwrap().downloads[0].1.as_deref(), Some("Bearer own"));
    stage.world.run(&stage.world.job("delete", 2, json!({}))).await.unwrap();
    stage.set(|script| script.header = None);
    stage.clone(3, "r").await.unwrap();
    assert_eq!(stage.script.lock().unwrap().downloads[1].1.as_deref(), Some(CANARY));
    let config = read(&stage.world.project("r"), ".git/config");
    assert!(!config.contains("canary") && !config.contains(CANARY));
}

#[tokio::test]
async fn an_lfs_config_in_the_tree_is_not_read() {
    let stage = Stage::new().await;
    let other = Server::start(stage.world.dir.path());
    let text = format!("[lfs]\n\turl = {}\n[remote \"origin\"]\n\tlfsurl = {}\n", other.url("x"), other.url("y"));
    stage.commit(&[(".lfsconfig", &text)], &[("a.bin", b"hello")]);
    stage.clone(1, "p").await.unwrap();
    assert_eq!(other.counts().requests, 0);
    assert_eq!(read(&stage.world.project("p"), "a.bin"), "hello");
}

#[tokio::test]
async fn pointers_to_more_than_the_node_takes_are_a_matter_of_quota() {
    let stage = Stage::with(|settings| settings.max_bytes = bytesize::ByteSize(10_000)).await;
    for (name, size) in [("huge", u64::MAX), ("large", 20_000), ("sum", 6000)] {
        let seed = stage.world.seed();
        git(&seed, &["checkout", "-q", "--orphan", name]);
        write(&seed, ".gitattributes", "*.bin filter=lfs\n");
        write(&seed, "a.bin", &pointer_to(&oid(b"a"), size));
        write(&seed, "b.bin", &pointer_to(&oid(b"b"), 6000));
        stage.world.push(name);
        let fields = json!({"lfs": true, "branch": name, "git_url": stage.server.url("up.git")});
        let failure = stage.world.clone(1, "p", fields).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Quota, "{name}: {failure}");
        stage.assert_nothing("p");
    }
    assert_eq!(stage.script.lock().unwrap().batches, [0; 0]);
}

#[tokio::test]
async fn a_thousand_objects_are_asked_for_by_the_hundred() {
    let stage = Stage::new().await;
    let contents: Vec<(String, String)> =
        (0..1000).map(|number| (format!("many/{number}.bin"), format!("content {number}"))).collect();
    let large: Vec<(&str, &[u8])> = contents.iter().map(|(name, text)| (name.as_str(), text.as_bytes())).collect();
    stage.commit(&[], &large);
    stage.clone(1, "p").await.unwrap();
    assert_eq!(stage.script.lock().unwrap().batches, [100; 10]);
    assert_eq!(read(&stage.world.project("p"), "many/999.bin"), "content 999");
    assert_eq!(git(&stage.world.project("p"), &["status", "--porcelain"]), "");
}

#[tokio::test]
async fn a_pull_writes_pointers_over_fetched_files_and_keeps_what_the_user_changed() {
    let stage = Stage::new().await;
    stage.commit(&[], &[("a.bin", b"one"), ("b.bin", b"two"), ("gone.bin", b"three"), ("user.bin", b"four")]);
    stage.clone(1, "p").await.unwrap();
    let project = stage.world.project("p");
    fs::remove_file(stage.world.seed().join("gone.bin")).unwrap();
    stage.commit(&[("c.txt", "c")], &[("a.bin", b"one, changed")]);
    let pulled = stage.world.pull(1, json!({})).await.unwrap();
    assert_eq!((pulled.updated, pulled.lfs_changed), (Some(true), Some(1)));
    assert_eq!(read(&project, "a.bin"), pointer(b"one, changed"));
    assert_eq!((read(&project, "b.bin"), read(&project, "c.txt")), ("two".to_owned(), "c".to_owned()));
    assert!(!project.join("gone.bin").exists());
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
    // Something else than what the pointer points to is the user's own, also of the same length.
    write(&project, "user.bin", "mine");
    stage.commit(&[], &[("user.bin", b"four, changed")]);
    let failure = stage.world.pull(1, json!({})).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Conflict);
    assert!(failure.message.contains("user.bin"), "{failure}");
    assert_eq!(read(&project, "user.bin"), "mine");
    // And with what it points to it is not, whoever put it there.
    write(&project, "user.bin", "four, changed");
    stage.world.pull(1, json!({})).await.unwrap();
    assert_eq!(read(&project, "user.bin"), pointer(b"four, changed"));
}

#[tokio::test]
async fn submodules_have_their_lfs_files_too() {
    let stage = Stage::new().await;
    let world = &stage.world;
    let inner = stage.commit(&[], &[("inner.bin", b"inner")]);
    git(world.dir.path(), &["clone", "-q", "--bare", "up.git", "inner.git"]);
    write(&world.seed(), ".gitmodules", "[submodule \"in\"]\n\tpath = in\n\turl = ../inner.git\n");
    git(&world.seed(), &["add", "-A"]);
    git(&world.seed(), &["update-index", "--add", "--cacheinfo", &format!("160000,{inner},in")]);
    git(&world.seed(), &["commit", "-q", "-m", "in"]);
    git(&world.seed(), &["push", "-q", "origin", "HEAD"]);
    let fields = json!({"lfs": true, "submodules": true, "git_url": stage.server.url("up.git")});
    world.clone(1, "p", fields).await.unwrap();
    let project = world.project("p");
    assert_eq!((read(&project, "inner.bin"), read(&project, "in/inner.bin")), ("inner".into(), "inner".into()));
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
    assert_eq!(git(&project.join("in"), &["status", "--porcelain"]), "");
}

#[tokio::test]
async fn lfs_of_an_upstream_that_is_not_on_the_web_is_refused_by_name() {
    let world = World::new().await;
    for address in [world.url(), "ssh://git@host.example/x.git".to_owned()] {
        let failure = world.clone(1, "p", json!({"lfs": true, "git_url": address})).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Invalid);
        assert!(failure.message.contains("lfs"), "{failure}");
    }
}
