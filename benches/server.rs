//! Git over smart HTTP on loopback, for both sides alike: `git http-backend` behind a listener that counts, and that can
//! hold the link to a rate.
//!
//! The first part of a path is free (`/r3/app.git`), so that every round has an address that nobody has a mirror of.

#[path = "../tests/support/cgi.rs"]
mod cgi;

use std::{
    collections::HashMap,
    io::Write,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use self::cgi::Request;

/// What was asked for so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) listings: u64,
    pub(crate) packs: u64,
    /// Bytes of the answers to requests for packs.
    pub(crate) pack_bytes: u64,
}

#[derive(Clone)]
pub(crate) struct Server {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    repositories: Mutex<HashMap<String, PathBuf>>,
    listings: AtomicU64,
    packs: AtomicU64,
    pack_bytes: AtomicU64,
    /// Bytes a second; 0 for no limit.
    rate: AtomicU64,
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(Shared::default());
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serving = Arc::clone(&serving);
                // A client that hangs up is its own affair.
                std::thread::spawn(move || drop(serving.serve(stream)));
            }
        });
        Self { port, shared }
    }

    /// Serves the repository at `path` as `name`.
    pub(crate) fn offer(&self, name: &str, path: &Path) {
        self.shared.repositories.lock().expect("nobody panicked").insert(format!("{name}.git"), path.to_owned());
    }

    /// An address of the repository `name`; another `round` is another address of the same.
    pub(crate) fn url(&self, round: &str, name: &str) -> String {
        format!("http://127.0.0.1:{}/{round}/{name}.git", self.port)
    }

    pub(crate) fn limit(&self, bytes_a_second: u64) {
        self.shared.rate.store(bytes_a_second, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> Counts {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            listings: load(&self.shared.listings),
            packs: load(&self.shared.packs),
            pack_bytes: load(&self.shared.pack_bytes),
        }
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut stream = &stream;
        let request = Request::read(&mut stream)?;
        let mut parts = request.path.trim_start_matches('/').splitn(3, '/');
        let (_, name, rest) = (parts.next(), parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let is_pack = request.is_for_a_pack();
        self.listings.fetch_add(u64::from(request.has(b"command=ls-refs")), Ordering::Relaxed);
        self.packs.fetch_add(u64::from(is_pack), Ordering::Relaxed);
        let Some(directory) = self.repositories.lock().expect("nobody panicked").get(name).cloned() else {
            return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        };
        let mut git = Command::new("git");
        git.env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_COUNT", "3")
            .env("GIT_CONFIG_KEY_0", "safe.directory")
            .env("GIT_CONFIG_VALUE_0", "*")
            // As the big hosts allow it.
            .env("GIT_CONFIG_KEY_1", "uploadpack.allowAnySHA1InWant")
            .env("GIT_CONFIG_VALUE_1", "true")
            .env("GIT_CONFIG_KEY_2", "uploadpack.allowFilter")
            .env("GIT_CONFIG_VALUE_2", "true")
            .env("PATH_TRANSLATED", directory.join(rest));
        let begun = Instant::now();
        let mut sent = 0_u64;
        cgi::answer(git, &request, &mut stream, 64 << 10, |stream, bytes| {
            stream.write_all(&cgi::piece(bytes))?;
            sent += bytes.len() as u64;
            if is_pack {
                self.pack_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                let rate = self.rate.load(Ordering::Relaxed);
                if rate > 0 {
                    let due = Duration::from_secs_f64(sent as f64 / rate as f64);
                    std::thread::sleep(due.saturating_sub(begun.elapsed()));
                }
            }
            Ok(true)
        })
        .map(drop)
    }
}
