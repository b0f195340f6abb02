//! A name whose addresses change between two answers, in a network of the test's own: its only interface is the loopback
//! one, with an address that counts as public beside the usual, and its only name server is the test.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::*;

/// Says that this process is in the network already.
const INSIDE: &str = "HAUL_TEST_OWN_NETWORK";
/// Set on the loopback interface there; by itself it belongs to the world.
const PUBLIC: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);

/// Answers a name's `n`-th question with `addresses[n]`, and from then on with the last; returns what counts questions.
fn name_server(addresses: &'static [Ipv4Addr]) -> Arc<AtomicUsize> {
    let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    std::thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            let question = &packet[..length];
            let name = 12 + question[12..].iter().position(|&byte| byte == 0).unwrap() + 1;
            let is_v4 = question[name..name + 2] == [0, 1];
            let mut answer = question[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_v4), 0, 0, 0, 0]);
            answer.extend(&question[12..name + 4]);
            if is_v4 {
                let turn = count.fetch_add(1, Ordering::SeqCst).min(addresses.len() - 1);
                // No time to live at all.
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
                answer.extend(addresses[turn].octets());
            }
            socket.send_to(&answer, from).unwrap();
        }
    });
    asked
}

/// Hands every connection to `address` on to the port of the same machine; returns the port and what counts.
fn forward(address: Ipv4Addr, port: u16, to: Option<u16>) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind((address, port)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            count.fetch_add(1, Ordering::SeqCst);
            let Some(to) = to else { continue };
            let mut server = TcpStream::connect(("127.0.0.1", to)).unwrap();
            let (mut from_server, mut to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || drop(std::io::copy(&mut client, &mut server)));
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from_server, &mut to_client);
                let _ = to_client.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    (port, connections)
}

/// Runs the test of this name once more, in a network of its own.
fn in_a_network_of_its_own(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        let run = |program: &str, arguments: &[&str]| {
            assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
        };
        run("ip", &["link", "set", "lo", "up"]);
        run("ip", &["address", "add", &format!("{PUBLIC}/32"), "dev", "lo"]);
        let file = std::env::temp_dir().join(format!("haul-test-resolv-{}", std::process::id()));
        fs::write(&file, "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n").unwrap();
        run("mount", &["--bind", file.to_str().unwrap(), "/etc/resolv.conf"]);
        fs::remove_file(file).unwrap();
        return true;
    }
    // Who is not root becomes it in a user name space.
    let user = ["--user", "--map-root-user"];
    let is_root = rustix::process::getuid().is_root();
    let output = Command::new("unshare")
        .args(user.into_iter().filter(|_| !is_root))
        .args(["--mount", "--net"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "in a network of its own it failed; where none can be made, this test cannot pass: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

#[tokio::test]
async fn a_name_that_changes_its_addresses_is_connected_to_where_it_was_judged() {
    if !in_a_network_of_its_own("dns::a_name_that_changes_its_addresses_is_connected_to_where_it_was_judged") {
        return;
    }
    let upstream = rich();
    let server = Server::start(upstream.root());
    server.require(CANARY_LOGIN);
    let inner = server.url("").trim_end_matches('/').rsplit_once(':').unwrap().1.parse().unwrap();
    let (port, public) = forward(PUBLIC, 0, Some(inner));
    let (_, trap) = forward(Ipv4Addr::LOCALHOST, port, None);
    let asked = name_server(&[PUBLIC, Ipv4Addr::LOCALHOST]);
    let node = Node::with(Engine::Gix, |settings| settings.allow_loopback = false).await;
    let url = format!("http://changing.example:{port}/app.git");
    // Judged once, and every request of the transfer goes there, whatever the name is by now.
    let refused = node.fetch(&url).await.unwrap_err();
    assert_eq!(refused.class, ErrorClass::Auth, "{refused}");
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert!(public.load(Ordering::SeqCst) > 0);
    // By the next transfer it has changed, and that is judged.
    let failure = node.fetch(&url).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Forbidden, "{failure}");
    assert!(failure.message.contains("127.0.0.1"), "{failure}");
    assert_eq!(trap.load(Ordering::SeqCst), 0);
    assert_eq!(server.counts().authorised, 0);
}

#[tokio::test]
async fn a_name_that_was_this_machine_for_a_moment_gets_no_credential_in_the_clear() {
    if !in_a_network_of_its_own("dns::a_name_that_was_this_machine_for_a_moment_gets_no_credential_in_the_clear") {
        return;
    }
    let upstream = rich();
    let server = Server::start(upstream.root());
    let inner = server.url("").trim_end_matches('/').rsplit_once(':').unwrap().1.parse().unwrap();
    let (port, public) = forward(PUBLIC, 0, Some(inner));
    let (_, local) = forward(Ipv4Addr::LOCALHOST, port, Some(inner));
    name_server(&[Ipv4Addr::LOCALHOST, PUBLIC]);
    // A node that may talk to itself, also without encryption.
    let node = Node::new(Engine::Gix).await;
    node.credential_at("changing.example/team.token", CANARY);
    let url = format!("http://changing.example:{port}/app.git");
    let fetched = node.fetch_as(&url, Some("team"), &Want::All).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    assert!(local.load(Ordering::SeqCst) > 0);
    let failure = node.fetch_as(&url, Some("team"), &Want::All).await.unwrap_err();
    assert!(failure.message.contains("without encryption"), "{failure}");
    assert_eq!(public.load(Ordering::SeqCst), 0);
}
