//! An upstream that lists and sends whatever a test says, over the second version of the protocol.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

/// What is served.
#[derive(Clone, Default)]
pub(crate) struct Served {
    /// Lines of the listing, as they go over the wire.
    pub(crate) refs: Vec<String>,
    /// The pack, whatever is asked for.
    pub(crate) pack: Vec<u8>,
}

pub(crate) struct Server {
    port: u16,
    served: Arc<Mutex<Served>>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = Arc::new(Mutex::new(Served::default()));
        let state = served.clone();
        // Ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                std::thread::spawn(move || {
                    let served = state.lock().unwrap().clone();
                    let _ = answer(stream, &served);
                });
            }
        });
        Self { port, served }
    }

    pub(crate) fn serve(&self, served: Served) {
        *self.served.lock().unwrap() = served;
    }

    pub(crate) fn url(&self, name: &str) -> String {
        format!("http://localhost:{}/{name}", self.port)
    }
}

fn answer(mut stream: TcpStream, served: &Served) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let is_listing = line.starts_with("GET");
    let mut length = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header == "\r\n" {
            break;
        }
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let has = |what: &[u8]| body.windows(what.len()).any(|window| window == what);
    let (kind, bytes) = if is_listing {
        let mut bytes = packet(b"# service=git-upload-pack\n");
        bytes.extend(b"0000");
        for line in ["version 2\n", "agent=hostile\n", "ls-refs=unborn\n", "fetch=shallow\n", "object-format=sha1\n"] {
            bytes.extend(packet(line.as_bytes()));
        }
        bytes.extend(b"0000");
        ("advertisement", bytes)
    } else if has(b"command=ls-refs") {
        let mut bytes: Vec<u8> = served.refs.iter().flat_map(|line| packet(format!("{line}\n").as_bytes())).collect();
        bytes.extend(b"0000");
        ("result", bytes)
    } else {
        let mut bytes = Vec::new();
        if !has(b"0009done") {
            bytes.extend(packet(b"acknowledgments\n"));
            bytes.extend(packet(b"ready\n"));
            bytes.extend(b"0001");
        }
        bytes.extend(packet(b"packfile\n"));
        for chunk in served.pack.chunks(65_000) {
            bytes.extend(packet(&[&[1], chunk].concat()));
        }
        bytes.extend(b"0000");
        ("result", bytes)
    };
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/x-git-upload-pack-{kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        bytes.len()
    )?;
    stream.write_all(&bytes)
}

fn packet(data: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{:04x}", data.len() + 4).into_bytes();
    bytes.extend_from_slice(data);
    bytes
}
