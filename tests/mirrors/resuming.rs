//! A link too slow for the time that transfers live.

use std::{
    fmt::Write as _,
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use haul::git::mirror::{Fetched, Want};
use serde_json::json;

use crate::{
    githttp::{Noise, Server, Upstream, git_command},
    node::{Bounds, Node, assert_sound},
    place::{self, packs},
};

/// Bytes a second of the link.
const RATE: u64 = 200_000;
/// How long a transfer lives.
const LIFE: Duration = Duration::from_millis(2500);

/// A link that carries so many bytes a second from the server, over all connections, and counts them.
struct Link {
    port: u16,
    carried: Arc<AtomicU64>,
}

impl Link {
    /// With `old` the client's wish for version 2 of the protocol is not passed on.
    fn to(server: &str, rate: u64, old: bool) -> Self {
        let far: SocketAddr = format!("127.0.0.1:{}", server.rsplit(':').next().unwrap()).parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let carried = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&carried);
        // Ends with the process of the test.
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(far) else { continue };
                let (near_in, far_in) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                std::thread::spawn(move || drop(ask(near_in, far_in, old)));
                let count = Arc::clone(&count);
                std::thread::spawn(move || carry(far, near, rate, &count));
            }
        });
        Self { port, carried }
    }

    fn url(&self) -> String {
        format!("http://localhost:{}/app.git", self.port)
    }

    fn carried(&self) -> u64 {
        self.carried.load(Ordering::SeqCst)
    }
}

fn ask(mut from: TcpStream, mut to: TcpStream, old: bool) -> std::io::Result<()> {
    let mut buffer = [0; 16 << 10];
    while let read @ 1.. = from.read(&mut buffer)? {
        let wish = b"version=2";
        let at = buffer[..read].windows(wish.len()).position(|window| window.eq_ignore_ascii_case(wish));
        if let Some(at) = at.filter(|_| old) {
            buffer[at..at + wish.len()].copy_from_slice(b"version=0");
        }
        to.write_all(&buffer[..read])?;
    }
    to.shutdown(Shutdown::Write)
}

fn carry(mut from: TcpStream, mut to: TcpStream, rate: u64, count: &AtomicU64) {
    let mut buffer = [0; 8192];
    let begun = Instant::now();
    let mut sent = 0_u64;
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
        sent += read as u64;
        count.fetch_add(read as u64, Ordering::SeqCst);
        let due = Duration::from_millis(sent * 1000 / rate);
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
    }
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// A repository that `git fast-import` makes of a stream.
fn imported(stream: &str) -> Upstream {
    let upstream = Upstream::new();
    upstream.git(&["rev-parse", "--git-dir"]);
    let mut git =
        git_command(&upstream.path()).args(["fast-import", "--quiet", "--done"]).stdin(Stdio::piped()).spawn().unwrap();
    git.stdin.take().unwrap().write_all(stream.as_bytes()).unwrap();
    assert!(git.wait().unwrap().success());
    upstream.git(&["repack", "-adq"]);
    upstream
}

/// A history whose first commit has all that is large, in many files, and after it a few small ones.
fn large_commit() -> Upstream {
    let (mut stream, mut noise) = (String::new(), Noise::new(0));
    for n in 1..=5 {
        let _ = write!(stream, "commit refs/heads/main\nmark :{n}\ncommitter A <a@example.org> {n} +0000\ndata 1\nc\n");
        if n > 1 {
            let _ = writeln!(stream, "from :{}", n - 1);
        }
        for file in 0..if n == 1 { 90 } else { 1 } {
            let text = noise.text(40_000);
            let _ = write!(stream, "M 100644 inline {}/{n}-{file}.txt\ndata {}\n{text}\n", file % 7, text.len());
        }
        // A link, a program, and a submodule, which no repository here has.
        let _ = write!(stream, "M 120000 inline link-{n}\ndata 4\n0/1-\nM 100755 inline run-{n}\ndata 2\nx\n\n");
        let _ = writeln!(stream, "M 160000 {n:040x} module-{n}");
    }
    stream.push_str("done\n");
    let upstream = imported(&stream);
    upstream.git(&["config", "uploadpack.allowFilter", "true"]);
    upstream
}

/// A history of many commits, each with something that does not compress; with merges, and a branch beside it.
fn long_history(tags: bool) -> Upstream {
    let (mut stream, mut noise) = (String::new(), Noise::new(0));
    for n in 1..=300 {
        let text = noise.text(5000);
        let message = format!("commit {n}");
        let _ = write!(
            stream,
            "commit refs/heads/main\nmark :{n}\ncommitter A <a@example.org> {} +0000\n",
            1_600_000_000 + n * 60
        );
        let _ = write!(stream, "data {}\n{message}\n", message.len());
        if n > 1 {
            let _ = writeln!(stream, "from :{}", n - 1);
        }
        if n > 20 && n % 40 == 0 {
            let _ = writeln!(stream, "merge :{}", n - 15);
        }
        let _ = write!(stream, "M 100644 inline {}/{n}.txt\ndata {}\n{text}\n", n % 10, text.len());
        if tags && n % 25 == 0 {
            let _ = write!(stream, "tag v1.{n}\nfrom :{n}\ntagger A <a@example.org> 1600000000 +0000\ndata 1\nt\n");
        }
    }
    stream.push_str("reset refs/heads/side\nfrom :150\n\ndone\n");
    imported(&stream)
}

fn bytes_of(packs: &[std::path::PathBuf]) -> Vec<u64> {
    packs.iter().map(|pack| fs::metadata(pack).unwrap().len()).collect()
}

/// Kills every transfer child of this node, as the kernel would.
fn kill(storage: &Path) -> usize {
    crate::world::kill_children(storage, "transfer")
}

/// Fetches again and again, each transfer killed after [`LIFE`]; returns how many were.
async fn fetch_under_fire(node: &Node, url: &str) -> (Fetched, usize) {
    for kills in 0..40 {
        let fetch = node.fetch_as(url, None, &Want::All);
        let fire = async {
            loop {
                // Not a wait for an effect: this is the fault that is being injected.
                tokio::time::sleep(LIFE).await;
                if kill(node.storage.path()) > 0 {
                    std::future::pending::<()>().await;
                }
            }
        };
        let fetched = tokio::select! {
            fetched = fetch => fetched,
            () = fire => unreachable!("the fetch ends when its child is killed"),
        };
        match fetched {
            Ok(fetched) => return (fetched, kills),
            Err(failure) => assert!(failure.message.contains("killed by signal 9"), "{failure}"),
        }
    }
    panic!("it never came to an end");
}

async fn completes(upstream: Upstream, old: bool) {
    let server = Server::start(upstream.root());
    let link = Link::to(server.url("").trim_end_matches('/'), RATE, old);
    let node = place::node().await;
    let size: u64 = bytes_of(&packs(&upstream.path())).iter().sum();
    // Plain fetch never finishes in the time that a transfer has.
    assert!(size > RATE * LIFE.as_secs() * 3 / 2, "{size}");
    let (fetched, kills) = fetch_under_fire(&node, &link.url()).await;
    assert!(kills > 0);
    let units = bytes_of(&packs(&fetched.path));
    let largest = units.iter().max().copied().unwrap();
    let carried = link.carried();
    println!(
        "{size} bytes came in {} units of at most {largest}, with {kills} kills and {carried} bytes carried",
        units.len()
    );
    assert!(units.len() > 2, "{units:?}");
    // The first try is one fetch and is lost; every later kill costs one unit at most. Beside packs there are listings
    // and questions, and the packs of units share less with each other.
    let first = RATE * (LIFE.as_secs() + 1);
    let allowed = size * 3 / 2 + first + (kills as u64 - 1) * (largest + RATE / 10);
    assert!(carried <= allowed, "{carried} > {allowed}");
    assert_sound(&fetched.path);
    for name in ["transfer.json", "refs/haul", "outline"] {
        assert!(!fetched.path.join(name).exists(), "{name}");
    }
    assert_eq!(fetched.listing.refs["refs/heads/main"], upstream.git(&["rev-parse", "main"]));
    // And from then on it is a mirror like any other.
    let before = server.counts();
    upstream.commit("main", &[("a.txt", "new")]);
    node.fetch(&server.url("app.git")).await.unwrap();
    node.fetch(&link.url()).await.unwrap();
    assert!(server.counts().packs > before.packs);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_transfers_killed_all_the_time_a_history_with_tags_comes_in_units() {
    completes(long_history(true), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_transfers_killed_all_the_time_a_history_without_tags_comes_in_units() {
    completes(long_history(false), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_cannot_be_asked_where_to_cut_is_cut_at_its_tags() {
    completes(long_history(true), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_transfers_killed_all_the_time_a_single_large_commit_comes_by_its_files() {
    completes(large_commit(), false).await;
}

/// What tries that died leave beside a mirror: a plan to bring `target`, from `reach` on, by its files, one at a time.
fn leave_plan(mirror: &Path, target: &str, reach: u32) {
    let plan = json!({ "target": target, "reach": reach, "step": 1, "aim": 1000, "under_way": false, "files": 1 });
    fs::write(mirror.join("transfer.json"), json!({ "attempts": 3, "plan": plan }).to_string()).unwrap();
}

/// A mirror that has `upstream` but for what `more` adds to it, and an earlier try that died so often that it left a plan
/// to bring the object that `more` returns by its files, one at a time, and an outline of something else: the next
/// completes. How often it asked for a pack.
async fn goes_on_by_files(upstream: Upstream, more: impl FnOnce(&Upstream) -> String) -> usize {
    let server = Server::start(upstream.root());
    let node = place::node().await;
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    let target = more(&upstream);
    leave_plan(&fetched.path, &target, 2);
    fs::create_dir_all(fetched.path.join("outline/objects/pack")).unwrap();
    let (mirror, before) = (fetched.path.clone(), server.counts().packs);
    drop(fetched);
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert!(fetched.listing.refs.values().any(|oid| *oid == target), "{target}");
    assert_sound(&mirror);
    assert!(!mirror.join("outline").exists() && !mirror.join("transfer.json").exists());
    server.counts().packs - before
}

#[tokio::test]
async fn an_upstream_that_cannot_leave_files_out_sends_a_large_commit_whole() {
    let upstream = large_commit();
    upstream.git(&["config", "uploadpack.allowFilter", "false"]);
    let packs = goes_on_by_files(upstream, |upstream| upstream.commit("main", &[("a.txt", "new"), ("b.txt", "newer")]));
    assert_eq!(packs.await, 2, "one that asks where to cut, and one that brings it");
}

#[tokio::test]
async fn what_comes_by_its_files_has_those_that_only_tags_lead_to() {
    let packs = goes_on_by_files(large_commit(), |upstream| {
        fs::write(upstream.path().join("note"), "only a tag leads here").unwrap();
        let blob = upstream.git(&["hash-object", "-w", "note"]);
        upstream.git(&["tag", "-a", "-m", "a note", "note", &blob]);
        upstream.git(&["rev-parse", "refs/tags/note"])
    });
    assert_eq!(packs.await, 3, "one that asks where to cut, the tag, and the file");
}

#[tokio::test]
async fn an_upstream_that_refuses_files_by_their_ids_is_asked_for_whole_units_again() {
    let upstream = large_commit();
    let server = Server::start(upstream.root());
    let node = place::node().await;
    let mirror = node.fetch(&server.url("app.git")).await.unwrap().path.clone();
    let target = upstream.commit("main", &[("a.txt", "new")]);
    // What is not there is refused in the same words.
    let blob = upstream.git(&["rev-parse", &format!("{target}:a.txt")]);
    let (directory, file) = blob.split_at(2);
    let (there, away) = (upstream.path().join("objects").join(directory).join(file), upstream.root().join("away"));
    fs::rename(&there, &away).unwrap();
    leave_plan(&mirror, &target, 1);
    node.fetch(&server.url("app.git")).await.unwrap_err();
    let remembered: serde_json::Value =
        serde_json::from_slice(&fs::read(mirror.join("transfer.json")).unwrap()).unwrap();
    assert_eq!((&remembered["no_files"], &remembered["only_listed"]), (&json!(true), &json!(false)), "{remembered}");
    fs::rename(&away, &there).unwrap();
    let before = server.counts().packs;
    let fetched = node.fetch(&server.url("app.git")).await.unwrap();
    assert_eq!((&fetched.listing.refs["refs/heads/main"], server.counts().packs - before), (&target, 1));
    assert_sound(&mirror);
}

#[tokio::test]
async fn a_fetch_that_would_miss_its_deadline_goes_over_to_units_at_once() {
    let upstream = long_history(false);
    let server = Server::start(upstream.root());
    let link = Link::to(server.url("").trim_end_matches('/'), RATE / 2, false);
    let node = place::node().await;
    let bounds = Bounds { deadline: Duration::from_secs(9), ..Bounds::default() };
    let failure = node.fetch_within(&link.url(), None, &Want::All, bounds).await.unwrap_err();
    assert_eq!(failure.class, haul::failure::ErrorClass::Timeout, "{failure}");
    // What came after the fifth second is kept.
    let mirror = node.directory().join(&place::names(&node.directory())[0]);
    assert!(!packs(&mirror).is_empty() && mirror.join("refs/haul/milestone").exists());
    let fetched = node.fetch(&server.url("app.git")).await;
    assert_sound(&fetched.unwrap().path);
}
