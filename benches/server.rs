//! Git over smart HTTP on loopback, for both sides alike: `git http-backend` behind a listener that counts, and that can
//! hold the link to a rate.
//!
//! The first part of a path is free (`/r3/app.git`), so that every round has an address that nobody has a mirror of.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

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
        let mut reader = BufReader::new(stream.try_clone()?);
        let (line, headers) = head(&mut reader)?;
        let header = |name: &str| headers.get(name).map_or("", String::as_str);
        let mut words = line.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut parts = path.trim_start_matches('/').splitn(3, '/');
        let (_, name, rest) = (parts.next(), parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        if header("expect").eq_ignore_ascii_case("100-continue") {
            (&stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let body = body(&mut reader, header("transfer-encoding"), header("content-length"))?;
        let has = |what: &[u8]| body.windows(what.len()).any(|window| window == what);
        let is_pack = has(b"command=fetch");
        self.listings.fetch_add(u64::from(has(b"command=ls-refs")), Ordering::Relaxed);
        self.packs.fetch_add(u64::from(is_pack), Ordering::Relaxed);
        let Some(directory) = self.repositories.lock().expect("nobody panicked").get(name).cloned() else {
            return (&stream).write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        };
        let mut backend = Command::new("git")
            .arg("http-backend")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_COUNT", "3")
            .env("GIT_CONFIG_KEY_0", "safe.directory")
            .env("GIT_CONFIG_VALUE_0", "*")
            // As the big hosts allow it.
            .env("GIT_CONFIG_KEY_1", "uploadpack.allowAnySHA1InWant")
            .env("GIT_CONFIG_VALUE_1", "true")
            .env("GIT_CONFIG_KEY_2", "uploadpack.allowFilter")
            .env("GIT_CONFIG_VALUE_2", "true")
            .env("GIT_HTTP_EXPORT_ALL", "1")
            .env("REQUEST_METHOD", method)
            .env("PATH_TRANSLATED", directory.join(rest))
            .env("QUERY_STRING", query)
            .env("CONTENT_TYPE", header("content-type"))
            .env("CONTENT_LENGTH", body.len().to_string())
            .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
            .env("GIT_PROTOCOL", header("git-protocol"))
            .env("REMOTE_ADDR", "127.0.0.1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let _ = backend.stdin.take().map(|mut stdin| stdin.write_all(&body));
        let told = backend.stdout.take().map(|output| self.relay(output, &stream, is_pack));
        let _ = backend.kill();
        backend.wait()?;
        told.unwrap_or(Ok(()))
    }

    fn relay(&self, output: impl Read, mut stream: &TcpStream, is_pack: bool) -> std::io::Result<()> {
        let mut output = BufReader::with_capacity(64 << 10, output);
        let mut status = "200 OK".to_owned();
        let mut answer = String::new();
        loop {
            let mut line = String::new();
            output.read_line(&mut line)?;
            match line.trim_end() {
                "" => break,
                line => match line.strip_prefix("Status: ") {
                    Some(text) => text.clone_into(&mut status),
                    None => answer.extend([line, "\r\n"]),
                },
            }
        }
        write!(stream, "HTTP/1.1 {status}\r\n{answer}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")?;
        let begun = Instant::now();
        let mut sent = 0_u64;
        let mut chunk = Vec::with_capacity(66 << 10);
        loop {
            let piece = output.fill_buf()?;
            let count = piece.len();
            if count == 0 {
                return stream.write_all(b"0\r\n\r\n");
            }
            chunk.clear();
            write!(chunk, "{count:x}\r\n")?;
            chunk.extend_from_slice(piece);
            chunk.extend_from_slice(b"\r\n");
            output.consume(count);
            stream.write_all(&chunk)?;
            sent += count as u64;
            if is_pack {
                self.pack_bytes.fetch_add(count as u64, Ordering::Relaxed);
                let rate = self.rate.load(Ordering::Relaxed);
                if rate > 0 {
                    let due = Duration::from_secs_f64(sent as f64 / rate as f64);
                    std::thread::sleep(due.saturating_sub(begun.elapsed()));
                }
            }
        }
    }
}

fn head(reader: &mut impl BufRead) -> std::io::Result<(String, HashMap<String, String>)> {
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_owned()),
            None => return Ok((first, headers)),
        };
    }
}

fn body(reader: &mut impl BufRead, encoding: &str, length: &str) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if encoding.contains("chunked") {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let size = u64::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
            reader.by_ref().take(size).read_to_end(&mut body)?;
            reader.read_line(&mut line)?;
            if size == 0 {
                return Ok(body);
            }
        }
    }
    reader.take(length.parse().unwrap_or(0)).read_to_end(&mut body)?;
    Ok(body)
}
