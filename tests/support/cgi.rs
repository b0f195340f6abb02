//! Git over smart HTTP, the part that servers of tests and of benchmarks share: a request is read, `git http-backend` is
//! fed with it, and its answer is passed on chunk by chunk.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    process::{Command, Stdio},
};

/// One request.
pub(crate) struct Request {
    /// Its method.
    pub(crate) method: String,
    /// Its path.
    pub(crate) path: String,
    query: String,
    headers: Vec<(String, String)>,
    /// Its body.
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// Reads one whole, in chunks or of a length that it tells; a client that waits for a word is given it.
    pub(crate) fn read(stream: &mut (impl Read + Write)) -> io::Result<Self> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut words = line.split_whitespace();
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let (method, path, query) = (method.to_owned(), path.to_owned(), query.to_owned());
        let mut request = Self { method, path, query, headers: Vec::new(), body: Vec::new() };
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            request.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        if request.header("expect").is_some_and(|wanted| wanted.eq_ignore_ascii_case("100-continue")) {
            reader.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        request.body = if request.header("transfer-encoding").is_some_and(|coding| coding.contains("chunked")) {
            chunks(&mut reader)?
        } else {
            let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
            let mut body = Vec::new();
            reader.take(length).read_to_end(&mut body)?;
            body
        };
        Ok(request)
    }

    /// The value of a header, by its name in small letters.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Whether it asks for a pack. Git compresses what is longer than a kilobyte, as no question for a listing is.
    pub(crate) fn is_for_a_pack(&self) -> bool {
        let compressed = self.header("content-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("gzip"));
        self.has(b"command=fetch") || compressed && self.path.ends_with("/git-upload-pack")
    }

    /// Whether the body holds this.
    pub(crate) fn has(&self, what: &[u8]) -> bool {
        self.body.windows(what.len()).any(|window| window == what)
    }
}

fn chunks(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let size = u64::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
        reader.by_ref().take(size).read_to_end(&mut body)?;
        reader.read_line(&mut line)?;
        if size == 0 {
            return Ok(body);
        }
    }
}

/// Answers as git does. `git` says where the repositories are; `pass` writes each piece of up to `size` bytes of the
/// answer's body, as [`piece`] makes it, and says whether more is wanted: whether not is what this returns.
pub(crate) fn answer<S: Write>(
    mut git: Command,
    request: &Request,
    stream: &mut S,
    size: usize,
    pass: impl FnMut(&mut S, &[u8]) -> io::Result<bool>,
) -> io::Result<bool> {
    git.arg("http-backend")
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REQUEST_METHOD", &request.method)
        .env("QUERY_STRING", &request.query)
        .env("REMOTE_ADDR", "127.0.0.1")
        .env("CONTENT_LENGTH", request.body.len().to_string())
        .env("CONTENT_TYPE", request.header("content-type").unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    for (variable, header) in [("GIT_PROTOCOL", "git-protocol"), ("HTTP_CONTENT_ENCODING", "content-encoding")] {
        if let Some(value) = request.header(header) {
            git.env(variable, value);
        }
    }
    let mut backend = git.spawn()?;
    // It reads its whole request before it answers; one that ended early has said why.
    let _ = backend.stdin.take().map(|mut stdin| stdin.write_all(&request.body));
    let output = backend.stdout.take().map(|output| BufReader::with_capacity(size, output));
    let answered = output.map(|mut output| relay(stream, &mut output, pass));
    let _ = backend.kill();
    backend.wait()?;
    answered.unwrap_or(Ok(false))
}

/// Turns the output of a CGI program into an answer.
fn relay<S: Write>(
    stream: &mut S,
    output: &mut impl BufRead,
    mut pass: impl FnMut(&mut S, &[u8]) -> io::Result<bool>,
) -> io::Result<bool> {
    let mut status = "200 OK".to_owned();
    let mut head = String::new();
    loop {
        let mut line = String::new();
        output.read_line(&mut line)?;
        match line.trim_end() {
            "" => break,
            line => match line.strip_prefix("Status: ") {
                Some(text) => text.clone_into(&mut status),
                None => head.extend([line, "\r\n"]),
            },
        }
    }
    write!(stream, "HTTP/1.1 {status}\r\n{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")?;
    loop {
        let bytes = output.fill_buf()?;
        let count = bytes.len();
        if count == 0 {
            stream.write_all(b"0\r\n\r\n")?;
            return Ok(false);
        }
        if !pass(stream, bytes)? {
            return Ok(true);
        }
        output.consume(count);
    }
}

/// One piece of a body as it travels.
pub(crate) fn piece(bytes: &[u8]) -> Vec<u8> {
    let mut piece = Vec::with_capacity(bytes.len() + 16);
    piece.extend_from_slice(format!("{:x}\r\n", bytes.len()).as_bytes());
    piece.extend_from_slice(bytes);
    piece.extend_from_slice(b"\r\n");
    piece
}
