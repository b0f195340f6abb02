//! Hosts behind a proxy: every byte goes through it, none without it, and its password is told nobody.

use std::{
    io::{BufRead as _, BufReader, Write as _, copy},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

use haul::{failure::ErrorClass, git::settings::HostSettings};

use super::*;
use crate::node::with_both;

with_both! {
    a_host_behind_a_proxy_is_reached_through_it_alone_and_by_name
    tls_goes_through_the_proxy_to_the_upstream_and_each_host_has_its_own_authority
    what_can_be_judged_without_an_address_is_judged_before_the_proxy_is_asked
    a_proxy_that_refuses_is_told_without_its_password
}

/// A proxy that leads to one address, whatever the name, by CONNECT or with the whole address as the request's target, and
/// that wants to know who asks; and what it was asked.
pub(crate) struct Tunnel {
    pub(crate) port: u16,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Tunnel {
    /// `status` instead of a connection, unless it is 200.
    fn start(to: u16, status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = asked.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let heard = heard.clone();
                std::thread::spawn(move || drop(serve(client, to, status, &heard)));
            }
        });
        Self { port, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(mut client: TcpStream, to: u16, status: u16, heard: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
    }
    heard.lock().unwrap().push(request.clone());
    if status != 200 {
        return write!(client, "HTTP/1.1 {status} Status\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    if !request.contains("Proxy-Authorization: ") {
        let challenge = "Proxy-Authenticate: Basic realm=\"proxy\"";
        return write!(client, "HTTP/1.1 407 Who\r\n{challenge}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let mut server = TcpStream::connect(("127.0.0.1", to))?;
    if request.starts_with("CONNECT ") {
        write!(client, "HTTP/1.1 200 Connected\r\n\r\n")?;
    } else {
        let (method, rest) = request.split_once(" http://").unwrap();
        server.write_all(format!("{method} {}", &rest[rest.find('/').unwrap()..]).as_bytes())?;
    }
    let mut back = server.try_clone()?;
    let mut to_client = client.try_clone()?;
    std::thread::spawn(move || {
        let _ = copy(&mut back, &mut to_client);
        let _ = to_client.shutdown(std::net::Shutdown::Write);
    });
    let _ = copy(&mut reader, &mut server);
    let _ = server.shutdown(std::net::Shutdown::Write);
    Ok(())
}

fn port_of(server: &Server) -> u16 {
    server.url("").trim_end_matches('/').rsplit_once(':').unwrap().1.parse().unwrap()
}

/// A node whose `pattern` is behind the proxy.
async fn node(engine: Engine, pattern: &str, proxy: &Tunnel, change: impl FnOnce(&mut GitSettings)) -> Node {
    let address = format!("http://haul:{CANARY}@127.0.0.1:{}", proxy.port);
    let host = HostSettings { proxy: Some(address.try_into().unwrap()), ..HostSettings::default() };
    Node::with(engine, |settings| {
        settings.host.insert(pattern.to_owned(), host);
        change(settings);
    })
    .await
}

async fn a_host_behind_a_proxy_is_reached_through_it_alone_and_by_name(engine: Engine) {
    let upstream = rich();
    let server = Server::start(upstream.root());
    let proxy = Tunnel::start(port_of(&server), 200);
    // Neither does the name resolve here nor is the node allowed to talk to itself.
    let node = node(engine, "*.corp.invalid", &proxy, |settings| settings.allow_loopback = false).await;
    let fetched = node.fetch("http://git.corp.invalid/app.git").await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    let asked = proxy.asked();
    assert!(!asked.is_empty());
    for head in &asked {
        let by_name = match engine {
            Engine::Gix => head.starts_with("CONNECT git.corp.invalid:80 "),
            // Without encryption the command hands the whole address to the proxy.
            Engine::Git => head.split_once(' ').unwrap().1.starts_with("http://git.corp.invalid/app.git/"),
        };
        assert!(by_name, "{head}");
        // The command waits to be asked who it is.
        assert!(engine == Engine::Git || head.contains("Proxy-Authorization: "), "{head}");
    }
    // haul:canary
    assert!(asked.iter().any(|head| head.contains("Proxy-Authorization: Basic aGF1bDpjYW5hcnk=")), "{asked:?}");
    // Another host is not sent there.
    let asked = proxy.asked().len();
    assert_eq!(node.fetch("http://git.other.invalid/app.git").await.unwrap_err().class, ErrorClass::Network);
    assert_eq!(proxy.asked().len(), asked);
}

async fn tls_goes_through_the_proxy_to_the_upstream_and_each_host_has_its_own_authority(engine: Engine) {
    let upstream = rich();
    let server = Server::start_tls(upstream.root());
    server.require(CANARY_LOGIN);
    let proxy = Tunnel::start(port_of(&server), 200);
    let url = server.url("app.git");
    let through = node(engine, "localhost", &proxy, |settings| {
        // What the section says would not do.
        settings.ca_file = Some(githttp::other_ca_file());
        settings.host.get_mut("localhost").unwrap().ca_file = Some(githttp::ca_file());
    })
    .await;
    through.credential("team.token", CANARY);
    let fetched = through.fetch_as(&url, Some("team"), &Want::All).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    assert!(!proxy.asked().concat().contains(CANARY_LOGIN), "the upstream's credential was told to the proxy");
    let wrong = node(engine, "localhost", &proxy, |settings| settings.ca_file = Some(githttp::other_ca_file())).await;
    let failure = wrong.fetch(&url).await.unwrap_err();
    assert_eq!((failure.class, failure.unreachable), (ErrorClass::Network, false), "{failure}");
}

async fn what_can_be_judged_without_an_address_is_judged_before_the_proxy_is_asked(engine: Engine) {
    let proxy = Tunnel::start(1, 200);
    let node = node(engine, "*", &proxy, |settings| {
        settings.allow_loopback = false;
        settings.allow_private = false;
        settings.ports = vec![80, 443];
        settings.hosts = vec!["*".to_owned()];
    })
    .await;
    for url in [
        "https://127.0.0.1/x.git",
        "https://10.0.0.1/x.git",
        "https://0x7f.1/x.git",
        "https://[::1]/x.git",
        "https://169.254.169.254/x.git",
        "https://localhost/x.git",
        "https://a.localhost/x.git",
        "https://metadata.google.internal/x.git",
        "https://git.invalid:6379/x.git",
        "ssh://git@git.invalid:443/x.git",
    ] {
        let failure = node.fetch(url).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Forbidden, "{url}: {failure}");
    }
    // In the clear to the proxy, which nobody can say is this machine.
    node.credential_at("git.invalid/team.token", CANARY);
    let failure = node.fetch_as("http://git.invalid/x.git", Some("team"), &Want::All).await.unwrap_err();
    assert!(failure.message.contains("without encryption"), "{failure}");
    assert_eq!(proxy.asked(), Vec::<String>::new());
}

async fn a_proxy_that_refuses_is_told_without_its_password(engine: Engine) {
    for (status, class, unreachable) in
        [(403, ErrorClass::Forbidden, false), (407, ErrorClass::Network, true), (502, ErrorClass::Network, true)]
    {
        let proxy = Tunnel::start(1, status);
        let node = node(engine, "git.invalid", &proxy, |_| ()).await;
        let failure = node.fetch("https://git.invalid/x.git").await.unwrap_err();
        assert_eq!((failure.class, failure.unreachable), (class, unreachable), "{failure}");
        assert!(!failure.message.contains(CANARY), "{failure}");
    }
}
