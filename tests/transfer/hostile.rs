//! Upstreams that mean harm, or are out of their minds: each ends within the limits set, with its class, and what they say
//! is shown short and without what a terminal would obey.

use std::{
    io::{BufRead as _, BufReader, Read},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use super::*;

const OID: &str = "1111111111111111111111111111111111111111";
const HEAD: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\n";

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Capabilities,
    Refs,
    Pack,
}

/// A server that writes what it likes.
struct Raw {
    port: u16,
    requests: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
}

impl Raw {
    /// `answer` writes to the connection until it likes no more, or writing fails.
    fn start(answer: impl Fn(Asked, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (requests, stopped): (Arc<AtomicUsize>, Arc<AtomicBool>) = Default::default();
        let (count, over, answer) = (requests.clone(), stopped.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                if over.load(Ordering::SeqCst) {
                    break;
                }
                let (count, answer) = (count.clone(), answer.clone());
                std::thread::spawn(move || {
                    let asked = hear(&mut stream)?;
                    count.fetch_add(1, Ordering::SeqCst);
                    answer(asked, &mut stream)
                });
            }
        });
        Self { port, requests, stopped }
    }

    fn url(&self) -> String {
        format!("http://localhost:{}/app.git", self.port)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn hear(stream: &mut TcpStream) -> std::io::Result<Asked> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut head, mut body) = (String::new(), Vec::new());
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    let length = head.to_ascii_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    reader.take(length.unwrap_or(0)).read_to_end(&mut body)?;
    let body = String::from_utf8_lossy(&body);
    Ok(match () {
        () if head.starts_with("GET") => Asked::Capabilities,
        () if body.contains("command=ls-refs") => Asked::Refs,
        () => Asked::Pack,
    })
}

/// A line of git's protocol.
fn line(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [format!("{:04x}", text.len() + 4).as_bytes(), text].concat()
}

/// A line on one of the channels beside each other.
fn band(channel: u8, text: impl AsRef<[u8]>) -> Vec<u8> {
    line([&[channel], text.as_ref()].concat())
}

fn whole(stream: &mut TcpStream, kind: &str, body: &[u8]) -> std::io::Result<()> {
    write!(
        stream,
        "{HEAD}Content-Type: application/x-git-upload-pack-{kind}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body)
}

fn capabilities() -> Vec<u8> {
    let lines = ["version 2\n", "agent=x\n", "ls-refs=unborn\n", "fetch=shallow\n", "object-format=sha1\n"].map(line);
    [line("# service=git-upload-pack\n"), b"0000".to_vec(), lines.concat(), b"0000".to_vec()].concat()
}

fn listed(refs: &[&str]) -> Vec<u8> {
    [refs.iter().flat_map(|name| line(format!("{OID} {name}\n"))).collect(), b"0000".to_vec()].concat()
}

/// What a proper server answers before the pack, for those that misbehave later.
fn properly(asked: Asked, stream: &mut TcpStream) -> std::io::Result<()> {
    match asked {
        Asked::Capabilities => whole(stream, "advertisement", &capabilities()),
        _ => whole(stream, "result", &listed(&["refs/heads/main"])),
    }
}

/// The beginning of an answer without a length.
fn begin(stream: &mut TcpStream, kind: &str) -> std::io::Result<()> {
    write!(stream, "{HEAD}Content-Type: application/x-git-upload-pack-{kind}\r\n\r\n")
}

/// The beginning of a pack of so many objects.
fn pack(objects: u32) -> Vec<u8> {
    [b"PACK\0\0\0\x02".to_vec(), objects.to_be_bytes().to_vec()].concat()
}

fn assert_shown_safely(failure: &Failure) {
    let shown = &failure.message;
    assert!(shown.len() < 4000 && !shown.chars().any(char::is_control), "{shown:?}");
}

/// A little again and again, for ever.
fn trickle(stream: &mut TcpStream, little: &[u8]) -> std::io::Result<()> {
    loop {
        stream.write_all(little)?;
        stream.flush()?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[tokio::test]
async fn a_trickle_is_a_stall_wherever_it_comes() {
    type Drip = fn(Asked, &mut TcpStream) -> std::io::Result<()>;
    let drips: [(&str, Drip); 5] = [
        ("the head of an answer", |_, stream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\nX: ")?;
            trickle(stream, b"x")
        }),
        ("the first listing", |_, stream| {
            begin(stream, "advertisement")?;
            stream.write_all(b"fff0")?;
            trickle(stream, b"#")
        }),
        ("the refs", |asked, stream| {
            if asked == Asked::Capabilities {
                return properly(asked, stream);
            }
            begin(stream, "result")?;
            stream.write_all(b"fff0")?;
            trickle(stream, b"1")
        }),
        ("words beside the pack", |asked, stream| {
            if asked != Asked::Pack {
                return properly(asked, stream);
            }
            begin(stream, "result")?;
            stream.write_all(&line("packfile\n"))?;
            trickle(stream, &band(2, "."))
        }),
        ("the pack", |asked, stream| {
            if asked != Asked::Pack {
                return properly(asked, stream);
            }
            begin(stream, "result")?;
            stream.write_all(&[line("packfile\n"), band(1, pack(1000))].concat())?;
            // An empty blob each.
            trickle(stream, &band(1, b"\x30\x78\x9c\x03\0\0\0\0\x01"))
        }),
    ];
    let mut node = Node::new(Engine::Gix).await;
    node.running.bounds.stall = Duration::from_millis(1500);
    for (what, drip) in drips {
        let server = Raw::start(drip);
        let started = Instant::now();
        let failure = node.fetch(&server.url()).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Stalled, "{what}: {failure}");
        assert!(started.elapsed() < Duration::from_secs(12), "{what}: {:?}", started.elapsed());
        assert!(node.processes().is_empty());
    }
}

#[tokio::test]
async fn what_never_ends_is_taken_up_to_the_quota() {
    // Of refs, and of words beside a pack that never begins.
    let refs = Raw::start(|asked, stream| {
        if asked == Asked::Capabilities {
            return properly(asked, stream);
        }
        begin(stream, "result")?;
        let many = line(format!("{OID} refs/heads/{}\n", "x".repeat(200))).repeat(1000);
        loop {
            stream.write_all(&many)?;
        }
    });
    let words = Raw::start(|asked, stream| {
        if asked != Asked::Pack {
            return properly(asked, stream);
        }
        begin(stream, "result")?;
        stream.write_all(&line("packfile\n"))?;
        let words = band(2, "\u{1b}[2J\u{7}remote: ".repeat(4000));
        loop {
            stream.write_all(&words)?;
        }
    });
    let node = Node::with(Engine::Gix, |settings| settings.max_bytes = bytesize::ByteSize::mb(5)).await;
    for server in [refs, words] {
        let failure = node.fetch(&server.url()).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Quota, "{failure}");
        assert_shown_safely(&failure);
    }
    let heads = Raw::start(|_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\n")?;
        loop {
            stream.write_all(b"X-More: and more\r\n")?;
        }
    });
    let failure = node.fetch(&heads.url()).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Network, "{failure}");
}

#[tokio::test]
async fn a_listing_that_grows_when_it_is_unpacked_is_taken_up_to_the_quota() {
    let mut gzip = Command::new("gzip").arg("-1").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = gzip.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        let many = line(format!("{OID} refs/heads/{}\n", "x".repeat(900))).repeat(1000);
        for _ in 0..100 {
            stdin.write_all(&many).unwrap();
        }
    });
    let bomb = gzip.wait_with_output().unwrap().stdout;
    writer.join().unwrap();
    assert!(bomb.len() < 2_000_000, "{}", bomb.len());
    let server = Raw::start(move |asked, stream| {
        if asked == Asked::Capabilities {
            return properly(asked, stream);
        }
        let length = bomb.len();
        write!(
            stream,
            "{HEAD}Content-Type: application/x-git-upload-pack-result\r\nContent-Encoding: gzip\r\nContent-Length: {length}\r\n\r\n"
        )?;
        stream.write_all(&bomb)
    });
    let failure = Node::new(Engine::Gix).await.fetch(&server.url()).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Quota, "{failure}");
}

#[tokio::test]
async fn broken_lines_and_packs_end_with_a_class_and_hold_nothing_up() {
    let node = Node::new(Engine::Gix).await;
    let mut bodies: Vec<(Asked, Vec<u8>)> = Vec::new();
    for cut in ["zzzz", "0003", "-001", "ffff", "0009abc", "00", "\0\0\0\0", "+00a ref"] {
        bodies.push((Asked::Capabilities, [capabilities(), cut.as_bytes().to_vec()].concat()));
        bodies.push((Asked::Capabilities, cut.as_bytes().to_vec()));
        bodies.push((Asked::Refs, cut.as_bytes().to_vec()));
        bodies.push((Asked::Pack, [line("packfile\n"), cut.as_bytes().to_vec()].concat()));
    }
    for refs in [
        line(format!("{OID}\n")),
        line("refs/heads/main\n"),
        line(format!("{}x refs/heads/main\n", &OID[1..])),
        line(format!("{OID} refs/heads/main peeled:{}\n", &OID[1..])),
        line(format!("{OID} refs/heads/main symref-target:\n")),
    ] {
        bodies.push((Asked::Refs, [refs, b"0000".to_vec()].concat()));
    }
    for packed in [
        vec![],
        pack(1),
        pack(u32::MAX),
        b"PACK\0\0\0\x09\0\0\0\x01".to_vec(),
        b"JUNK".repeat(100),
        // More objects than announced, and none of them right.
        [pack(1), b"\x30\x78\x9c\x03\0\0\0\0\x01".repeat(50)].concat(),
        // An object of more bytes than anybody has.
        [pack(1), vec![0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0x78, 0x9c, 3, 0, 0, 0, 0, 1]].concat(),
    ] {
        bodies.push((Asked::Pack, [line("packfile\n"), band(1, packed), b"0000".to_vec()].concat()));
    }
    for (at, body) in bodies {
        let shown = String::from_utf8_lossy(&body).into_owned();
        let server = Raw::start(move |asked, stream| match asked {
            asked if asked == at => {
                whole(stream, if at == Asked::Capabilities { "advertisement" } else { "result" }, &body)
            }
            asked => properly(asked, stream),
        });
        let failure = node.fetch(&server.url()).await.unwrap_err();
        // What announces more than any memory holds is a matter of quota.
        let expected = [ErrorClass::Network, ErrorClass::Corrupt, ErrorClass::NotFound, ErrorClass::Quota];
        assert!(expected.contains(&failure.class), "{at:?} {shown:?}: {failure}");
        assert_shown_safely(&failure);
        assert!(!failure.unreachable, "{failure}");
    }
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn what_an_upstream_says_is_shown_without_what_a_terminal_obeys() {
    let escapes = "\u{1b}]0;owned\u{7}\u{1b}[2J\u{9b}31m\u{202e}evil\r\n\0";
    let node = Node::new(Engine::Gix).await;
    for channel in [Some(3), None] {
        let server = Raw::start(move |asked, stream| {
            if asked != Asked::Pack {
                return properly(asked, stream);
            }
            let said = match channel {
                Some(channel) => [line("packfile\n"), band(channel, escapes.repeat(200))].concat(),
                None => line(format!("ERR {escapes}")),
            };
            whole(stream, "result", &[said, b"0000".to_vec()].concat())
        });
        let failure = node.fetch(&server.url()).await.unwrap_err();
        assert!(matches!(failure.class, ErrorClass::Network | ErrorClass::Corrupt), "{failure}");
        assert_shown_safely(&failure);
        assert!(!failure.message.contains('\u{202e}'), "{failure}");
    }
    // In the status line and in the names of a redirect.
    let server = Raw::start(|_, stream| {
        stream.write_all(b"HTTP/1.1 302 \x1b[31mFound\r\nLocation: http://\x1b[2J/\r\nContent-Length: 0\r\n\r\n")
    });
    assert_shown_safely(&node.fetch(&server.url()).await.unwrap_err());
    for progress in node.running.progress.lock().unwrap().iter() {
        assert!(!progress.phase.chars().any(char::is_control));
    }
}

#[tokio::test]
async fn refs_with_odd_names_are_left_out_and_those_that_fight_over_a_name_are_kept_apart() {
    let server = Raw::start(|asked, stream| match asked {
        Asked::Refs => whole(
            stream,
            "result",
            &listed(&[
                "refs/heads/a\u{1b}[31m",
                "refs/heads/../../x",
                "refs/heads/",
                "HEAD symref-target:refs/x",
                "refs/pull/1/head",
            ]),
        ),
        asked => properly(asked, stream),
    });
    let node = Node::new(Engine::Gix).await;
    let fetched = node.fetch(&server.url()).await.unwrap();
    assert!(fetched.listing.refs.is_empty() && fetched.listing.head.is_none(), "{:?}", fetched.listing);
    assert_eq!(server.requests.load(Ordering::SeqCst), 2);

    // A directory and a file of one name, two names that some file systems take for one, a HEAD that leads nowhere.
    let upstream = rich();
    let tip = upstream.git(&["rev-parse", "main"]);
    let packed: String =
        ["refs/heads/Main", "refs/heads/d", "refs/heads/d/f", "refs/heads/main", "refs/tags/V", "refs/tags/v"]
            .iter()
            .map(|name| [tip.as_str(), " ", name, "\n"].concat())
            .collect();
    for name in ["heads", "tags"] {
        fs::remove_dir_all(upstream.path().join("refs").join(name)).unwrap();
        fs::create_dir(upstream.path().join("refs").join(name)).unwrap();
    }
    fs::write(upstream.path().join("packed-refs"), format!("# pack-refs with: sorted \n{packed}")).unwrap();
    fs::write(upstream.path().join("HEAD"), "ref: refs/heads/nowhere\n").unwrap();
    let real = Server::start(upstream.root());
    for source in [Source::Upstream, Source::Mirror] {
        let fetched = node.fetch(&real.url("app.git")).await.unwrap();
        assert_eq!(fetched.source, source);
        assert_eq!(fetched.listing.refs.len(), 6, "{:?}", fetched.listing);
        assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed_wherever_it_leads() {
    let elsewhere = Raw::start(properly);
    let node = Node::new(Engine::Gix).await;
    node.credential("team.token", CANARY);
    let port = elsewhere.port;
    for location in [
        format!("http://localhost:{port}/app.git/info/refs?service=git-upload-pack"),
        format!("http://127.0.0.1:{port}/"),
        format!("//localhost:{port}/"),
        "http://169.254.169.254/latest/meta-data/".to_owned(),
        "https://localhost/".to_owned(),
        "file:///etc/passwd".to_owned(),
        "ssh://-oProxyCommand=id/x".to_owned(),
        "ext::id".to_owned(),
        "/elsewhere.git/info/refs".to_owned(),
        String::new(),
    ] {
        // Also when it comes late, for the refs or the pack.
        for late in [Asked::Capabilities, Asked::Refs, Asked::Pack] {
            let location = location.clone();
            let server = Raw::start(move |asked, stream| {
                if asked != late {
                    return properly(asked, stream);
                }
                write!(
                    stream,
                    "HTTP/1.1 307 Moved\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            });
            let failure = node.fetch_as(&server.url(), Some("team"), &Want::All).await.unwrap_err();
            assert_eq!(failure.class, ErrorClass::Invalid, "{failure}");
            assert!(failure.message.contains("redirect"), "{failure}");
        }
    }
    assert_eq!(elsewhere.requests.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn whoever_asks_for_a_credential_gets_none_but_that_of_its_host() {
    let node = Node::new(Engine::Gix).await;
    node.credential_at("git.example/team.token", CANARY);
    for (status, ask) in [
        (401, "WWW-Authenticate: Basic realm=\"git.example\""),
        (401, "WWW-Authenticate: Bearer realm=\"http://169.254.169.254/token\""),
        (401, "WWW-Authenticate: Negotiate"),
        (407, "Proxy-Authenticate: Basic realm=\"x\""),
    ] {
        let server = Raw::start(move |_, stream| {
            write!(stream, "HTTP/1.1 {status} No\r\n{ask}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        });
        let failure = node.fetch(&server.url()).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Auth, "{ask}: {failure}");
        assert_eq!(server.requests.load(Ordering::SeqCst), 1, "{ask}");
        // Named in a task for another host than its own.
        let failure = node.fetch_as(&server.url(), Some("team"), &Want::All).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Auth, "{failure}");
        assert_eq!(server.requests.load(Ordering::SeqCst), 1, "it was asked");
    }
}

#[tokio::test]
async fn connections_that_break_at_any_moment_are_a_matter_of_the_network() {
    let node = Node::new(Engine::Gix).await;
    for at in [Asked::Capabilities, Asked::Refs, Asked::Pack] {
        for said in ["", "HTTP/1.1 2", "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n0008", "nonsense\r\n\r\n"] {
            let server = Raw::start(move |asked, stream| {
                if asked != at {
                    return properly(asked, stream);
                }
                stream.write_all(said.as_bytes())
            });
            let failure = node.fetch(&server.url()).await.unwrap_err();
            assert!(matches!(failure.class, ErrorClass::Network | ErrorClass::NotFound), "{at:?} {said:?}: {failure}");
            assert_shown_safely(&failure);
        }
    }
}

#[tokio::test]
async fn a_certificate_of_another_name_or_another_time_is_not_trusted() {
    let upstream = rich();
    let node = Node::with(Engine::Gix, |settings| settings.ca_file = Some(githttp::other_ca_file())).await;
    node.credential("team.token", CANARY);
    for certificate in ["wrong-name.pem", "expired.pem", "cert.pem"] {
        let server = Server::start_tls_with(upstream.root(), certificate);
        let failure = node.fetch_as(&server.url("app.git"), Some("team"), &Want::All).await.unwrap_err();
        assert_eq!((failure.class, failure.unreachable), (ErrorClass::Network, false), "{certificate}: {failure}");
        assert!(failure.message.contains("no trusted connection"), "{certificate}: {failure}");
        assert_eq!(server.counts().requests, 0);
    }
}
