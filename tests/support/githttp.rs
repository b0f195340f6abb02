//! A small git server over smart HTTP, for tests: `git http-backend` behind a listener of our own, with knobs for all
//! the ways in which an upstream can misbehave.
//!
//! ```ignore
//! #[path = "support/githttp.rs"]
//! mod githttp;
//!
//! let upstream = githttp::Upstream::new();          // a bare repository below a temporary directory
//! upstream.commit("main", &[("a.txt", "hello")]);   // commits straight into it, through git's plumbing
//! let server = githttp::Server::start(upstream.root());
//! let url = server.url("app.git");                  // http://localhost:<port>/app.git
//! server.behave(githttp::Behaviour::status(429).header("Retry-After", "7"));
//! assert_eq!(server.counts().packs, 0);
//! ```
//!
//! Every request gets a connection of its own. The server ends when it is dropped, stalled answers included.

#![allow(dead_code, reason = "each suite that includes this file uses its own part of it")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up shall fail loudly")]

#[path = "cgi.rs"]
mod cgi;

use std::{
    fmt::Write as _,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

pub(crate) use cgi::Request;
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// A bare repository `app.git` that tests commit to.
pub(crate) struct Upstream {
    root: tempfile::TempDir,
}

/// How the server answers.
#[derive(Clone, Debug)]
pub(crate) enum Behaviour {
    /// As git does.
    Serve,
    /// With this status and these headers, and no git at all.
    Answer {
        /// The status code.
        status: u16,
        /// Header lines.
        headers: Vec<(String, String)>,
    },
    /// Not at all: the request is read and nothing is said.
    Stall,
    /// Packs wait until the behaviour changes and are then served; all else as git does.
    HoldPack,
    /// Packs of a whole history wait until the behaviour changes; those of some depth are served, and all else as git does.
    HoldWhole,
    /// The reverse.
    HoldDepth,
    /// Packs stop after so many bytes, and the connection stays open; all else as git does.
    StallPack {
        /// Bytes of the answer's body that are still sent.
        after: usize,
    },
    /// Packs stop after so many bytes, and the connection is closed; all else as git does.
    CutPack {
        /// Bytes of the answer's body that are still sent.
        after: usize,
    },
    /// One byte of each pack is another, for clients whose request holds this text; all else as git does.
    DamagePack {
        /// The place in the answer's body.
        at: usize,
        /// Part of the request.
        asked_by: &'static str,
    },
}

/// What was asked for so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// All requests.
    pub(crate) requests: usize,
    /// Listings of refs (`ls-refs` of protocol version 2).
    pub(crate) listings: usize,
    /// Requests for a pack, rounds of negotiation included.
    pub(crate) packs: usize,
    /// Those of them that asked for some depth only.
    pub(crate) depths: usize,
    /// Requests that carried a credential.
    pub(crate) authorised: usize,
}

/// The server.
pub(crate) struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
    scheme: &'static str,
}

/// A connection, encrypted or not.
trait Stream: Read + Write {}

impl<S: Read + Write> Stream for S {}

struct Shared {
    tls: Option<Arc<ServerConfig>>,
    root: PathBuf,
    stopped: AtomicBool,
    state: Mutex<State>,
}

/// Answers a request that is not for git, and tells whether it did.
pub(crate) type Handler = Arc<dyn Fn(&Request, &mut dyn Write) -> bool + Send + Sync>;

struct State {
    behaviour: Behaviour,
    /// Asked first.
    handler: Option<Handler>,
    /// The value of `Authorization` that is required.
    authorization: Option<String>,
    counts: Counts,
}

/// Texts that do not compress.
pub(crate) struct Noise(u64);

impl Noise {
    /// Always the same ones for the same `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self(0x9e37_79b9_7f4a_7c15 ^ seed)
    }

    /// The next, of at least `length` bytes.
    pub(crate) fn text(&mut self, length: usize) -> String {
        let mut text = String::with_capacity(length);
        while text.len() < length {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let _ = write!(text, "{:016x}", self.0);
        }
        text
    }
}

impl Upstream {
    /// An empty repository whose `HEAD` is `main`.
    pub(crate) fn new() -> Self {
        let upstream = Self { root: tempfile::tempdir().unwrap() };
        upstream.git(&["init", "--quiet", "--bare", "--initial-branch=main", "."]);
        upstream
    }

    /// The directory to serve.
    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    /// The repository itself.
    pub(crate) fn path(&self) -> PathBuf {
        self.root.path().join("app.git")
    }

    /// Its address for a transport without a server.
    pub(crate) fn file_url(&self) -> String {
        format!("file://{}", self.path().display())
    }

    /// Commits `files` (and nothing else) to `branch` and returns the commit.
    pub(crate) fn commit(&self, branch: &str, files: &[(&str, &str)]) -> String {
        let mut tree = String::new();
        for (name, text) in files {
            let blob = self.feed(&["hash-object", "-w", "--stdin"], text.as_bytes());
            let _ = writeln!(tree, "100644 blob {blob}\t{name}");
        }
        let tree = self.feed(&["mktree"], tree.as_bytes());
        let name = format!("refs/heads/{branch}");
        let parent = self.git_output(&["rev-parse", "--quiet", "--verify", &name]);
        let mut arguments = vec!["commit-tree", "-m", "a commit", &tree];
        if let Some(parent) = &parent {
            arguments.extend(["-p", parent]);
        }
        let commit = self.feed(&arguments, b"");
        self.git(&["update-ref", &name, &commit]);
        commit
    }

    /// Commits a file of so many bytes that do not compress.
    pub(crate) fn commit_noise(&self, branch: &str, bytes: usize) -> String {
        self.commit(branch, &[("noise.txt", &Noise::new(bytes as u64).text(bytes))])
    }

    /// Runs git in the repository; it must succeed.
    pub(crate) fn git(&self, arguments: &[&str]) -> String {
        self.git_output(arguments).unwrap_or_else(|| panic!("git {arguments:?} failed"))
    }

    fn git_output(&self, arguments: &[&str]) -> Option<String> {
        std::fs::create_dir_all(self.path()).unwrap();
        let output = git_command(&self.path()).args(arguments).stderr(Stdio::null()).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }

    fn feed(&self, arguments: &[&str], input: &[u8]) -> String {
        let mut child =
            git_command(&self.path()).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "git {arguments:?} failed");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

/// The authority that signed the certificate of [`Server::start_tls`].
pub(crate) fn ca_file() -> PathBuf {
    tls_directory().join("ca.pem")
}

/// The authority that signed `wrong-name.pem` and `expired.pem`.
pub(crate) fn other_ca_file() -> PathBuf {
    tls_directory().join("other-ca.pem")
}

fn tls_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/tls")
}

/// Git in `directory`, independent of who runs the tests.
pub(crate) fn git_command(directory: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(directory).env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
    for role in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{role}_NAME"), "Tester").env(format!("GIT_{role}_EMAIL"), "tester@example.org");
        command.env(format!("GIT_{role}_DATE"), "2026-01-01T00:00:00Z");
    }
    command
}

impl Behaviour {
    /// An answer with this status.
    pub(crate) fn status(status: u16) -> Self {
        Self::Answer { status, headers: Vec::new() }
    }

    /// The same answer with one more header.
    pub(crate) fn header(self, name: &str, value: &str) -> Self {
        match self {
            Self::Answer { status, mut headers } => {
                headers.push((name.to_owned(), value.to_owned()));
                Self::Answer { status, headers }
            }
            other => other,
        }
    }
}

impl Server {
    /// Serves the repositories below `root` on a free port of the loopback address.
    pub(crate) fn start(root: &Path) -> Self {
        Self::listen(root, None, 0)
    }

    /// The same on a port where there was nothing before.
    pub(crate) fn start_at(root: &Path, port: u16) -> Self {
        Self::listen(root, None, port)
    }

    /// The same over TLS, with a certificate for `localhost` by the authority in [`ca_file`].
    pub(crate) fn start_tls(root: &Path) -> Self {
        Self::start_tls_with(root, "cert.pem")
    }

    /// The same with another certificate for the same key.
    pub(crate) fn start_tls_with(root: &Path, certificate: &str) -> Self {
        let read = |pem: &str| std::fs::read(tls_directory().join(pem)).unwrap();
        let certificate = CertificateDer::from_pem_slice(&read(certificate)).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&read("key.pem")).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        Self::listen(root, Some(Arc::new(config)), 0)
    }

    fn listen(root: &Path, tls: Option<Arc<ServerConfig>>, port: u16) -> Self {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let address = listener.local_addr().unwrap();
        let state =
            State { behaviour: Behaviour::Serve, handler: None, authorization: None, counts: Counts::default() };
        let shared =
            Arc::new(Shared { tls, root: root.to_owned(), stopped: AtomicBool::new(false), state: Mutex::new(state) });
        let serving = shared.clone();
        let listener = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.stopped.load(Ordering::SeqCst) {
                    break;
                }
                let serving = serving.clone();
                // A client that hangs up is its own affair.
                std::thread::spawn(move || drop(serving.accept(&stream)));
            }
        });
        Self { address, shared, listener: Some(listener), scheme }
    }

    /// The address of one repository.
    pub(crate) fn url(&self, repository: &str) -> String {
        format!("{}://localhost:{}/{repository}", self.scheme, self.address.port())
    }

    /// How requests are answered from now on.
    pub(crate) fn behave(&self, behaviour: Behaviour) {
        self.shared.state.lock().unwrap().behaviour = behaviour;
    }

    /// Lets `handler` answer what it wants to answer, before anything else is looked at.
    pub(crate) fn handle(&self, handler: impl Fn(&Request, &mut dyn Write) -> bool + Send + Sync + 'static) {
        self.shared.state.lock().unwrap().handler = Some(Arc::new(handler));
    }

    /// Requires Basic authentication from now on; `encoded` is the base64 of `user:password`.
    pub(crate) fn require(&self, encoded: &str) {
        self.shared.state.lock().unwrap().authorization = Some(format!("Basic {encoded}"));
    }

    /// What was asked for so far.
    pub(crate) fn counts(&self) -> Counts {
        self.shared.state.lock().unwrap().counts
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes the listener.
        drop(TcpStream::connect(self.address));
        if let Some(listener) = self.listener.take() {
            listener.join().unwrap();
        }
    }
}

impl Shared {
    fn accept(&self, socket: &TcpStream) -> std::io::Result<()> {
        match &self.tls {
            Some(config) => {
                let tls = ServerConnection::new(config.clone()).map_err(std::io::Error::other)?;
                let mut stream = StreamOwned::new(tls, socket);
                let served = self.serve(&mut stream, socket);
                stream.conn.send_close_notify();
                let _ = stream.flush();
                served
            }
            None => self.serve(&mut &*socket, socket),
        }
    }

    fn serve(&self, stream: &mut impl Stream, socket: &TcpStream) -> std::io::Result<()> {
        let request = Request::read(stream)?;
        let is_pack = request.is_for_a_pack();
        // Whoever says where its history ends already wants no more of it.
        let is_depth = is_pack && (request.has(b"deepen ") || request.has(b"shallow "));
        let handler = self.state.lock().unwrap().handler.clone();
        let answered = handler.is_some_and(|handler| handler(&request, stream));
        let behaviour = {
            let mut state = self.state.lock().unwrap();
            let authorization = request.header("authorization").map(str::to_owned);
            state.counts.requests += 1;
            state.counts.packs += usize::from(is_pack);
            state.counts.depths += usize::from(is_depth);
            state.counts.listings += usize::from(request.has(b"command=ls-refs"));
            state.counts.authorised += usize::from(authorization.is_some());
            if state.authorization.is_some() && state.authorization != authorization {
                Behaviour::status(401).header("WWW-Authenticate", "Basic realm=\"git\"")
            } else {
                state.behaviour.clone()
            }
        };
        if answered {
            return Ok(());
        }
        match behaviour {
            Behaviour::Serve => self.answer(stream, &request, usize::MAX).map(drop),
            Behaviour::DamagePack { at, asked_by } => {
                let at = if is_pack && request.has(asked_by.as_bytes()) { at } else { usize::MAX };
                self.answer(&mut Damaging { stream, left: at }, &request, usize::MAX).map(drop)
            }
            Behaviour::Answer { status, headers } => {
                let mut head = format!("HTTP/1.1 {status} Status\r\nContent-Length: 0\r\nConnection: close\r\n");
                for (name, value) in headers {
                    let _ = write!(head, "{name}: {value}\r\n");
                }
                stream.write_all(format!("{head}\r\n").as_bytes())
            }
            Behaviour::Stall => {
                self.hang(stream, socket);
                Ok(())
            }
            Behaviour::HoldPack | Behaviour::HoldWhole | Behaviour::HoldDepth => {
                let held = match behaviour {
                    Behaviour::HoldWhole => is_pack && !is_depth,
                    Behaviour::HoldDepth => is_depth,
                    _ => is_pack,
                };
                if held {
                    self.wait_for_another_behaviour();
                }
                self.answer(stream, &request, usize::MAX).map(drop)
            }
            Behaviour::StallPack { after } => {
                if self.answer(stream, &request, if is_pack { after } else { usize::MAX })? {
                    self.hang(stream, socket);
                }
                Ok(())
            }
            Behaviour::CutPack { after } => {
                self.answer(stream, &request, if is_pack { after } else { usize::MAX })?;
                socket.shutdown(Shutdown::Both)
            }
        }
    }

    fn wait_for_another_behaviour(&self) {
        let holds = |behaviour: &Behaviour| {
            matches!(behaviour, Behaviour::HoldPack | Behaviour::HoldWhole | Behaviour::HoldDepth)
        };
        let held = || holds(&self.state.lock().unwrap().behaviour);
        while held() && !self.stopped.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Says nothing until the client hangs up or the server stops.
    fn hang(&self, stream: &mut impl Stream, socket: &TcpStream) {
        let _ = socket.set_read_timeout(Some(Duration::from_millis(50)));
        while !self.stopped.load(Ordering::SeqCst) {
            match stream.read(&mut [0]) {
                Ok(0) => return,
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return,
                _ => {}
            }
        }
    }

    /// Answers as git does, but with at most `most` bytes of the body; whether that cut it short.
    fn answer(&self, stream: &mut impl Stream, request: &Request, most: usize) -> std::io::Result<bool> {
        let mut git = git_command(&self.root);
        git.env("GIT_PROJECT_ROOT", &self.root).env("PATH_INFO", &request.path);
        let mut left = most;
        cgi::answer(git, request, stream, 8192, |stream, bytes| {
            let piece = cgi::piece(&bytes[..bytes.len().min(left)]);
            left = left.saturating_sub(bytes.len());
            // One that is cut has no end either.
            stream.write_all(if left == 0 { &piece[..piece.len() - 2] } else { &piece })?;
            Ok(left > 0)
        })
    }
}

/// A stream that changes one byte of what is written.
struct Damaging<'a, S> {
    stream: &'a mut S,
    left: usize,
}

impl<S: Read> Read for Damaging<'_, S> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.stream.read(into)
    }
}

impl<S: Write> Write for Damaging<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut bytes = bytes.to_vec();
        if let Some(byte) = bytes.get_mut(self.left) {
            *byte ^= 0xff;
            self.left = usize::MAX;
        } else if self.left != usize::MAX {
            self.left -= bytes.len();
        }
        self.stream.write_all(&bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}
