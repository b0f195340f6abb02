//! Transfers over ssh, from a real OpenSSH server of the test's own.

use std::{
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
};

use super::*;

/// A server on a free port, whose user is whoever runs the tests.
struct Sshd {
    port: u16,
    user: String,
    directory: tempfile::TempDir,
    process: Child,
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

impl Sshd {
    /// Each key that may log in comes with what is put before it in `authorized_keys`.
    fn start(options: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        for key in ["host", "other-host", "stranger"].into_iter().chain(options.iter().map(|(key, _)| *key)) {
            run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", key, "-f", &at(key)]);
        }
        let authorized: String = options
            .iter()
            .map(|(key, option)| [option, fs::read_to_string(at(&format!("{key}.pub"))).unwrap().as_str()].concat())
            .collect();
        fs::write(at("authorized_keys"), authorized).unwrap();
        if run("id", &["-u"]) == "0" {
            // Where the server of root leaves its rights.
            fs::create_dir_all("/run/sshd").unwrap();
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\n\
             StrictModes no\nPasswordAuthentication yes\nKbdInteractiveAuthentication yes\nPermitRootLogin yes\n\
             AcceptEnv GIT_PROTOCOL\nLoginGraceTime 60\n",
            at("host"),
            at("authorized_keys")
        );
        fs::write(at("config"), config).unwrap();
        // It starts itself anew for each connection, so it wants to be called by its path.
        let program = ["/usr/sbin/sshd", "/usr/local/sbin/sshd", "/usr/bin/sshd"]
            .into_iter()
            .find(|path| Path::new(path).exists());
        let process = Command::new(program.expect("sshd is there (Debian: openssh-server)"))
            .args(["-D", "-e", "-f", &at("config")])
            .stdin(Stdio::null())
            .stderr(fs::File::create(at("log")).unwrap())
            .spawn()
            .unwrap();
        let begun = std::time::Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let log = fs::read_to_string(at("log")).unwrap();
            assert!(begun.elapsed() < Duration::from_secs(20), "the server does not start: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { port, user: run("id", &["-un"]), directory, process }
    }

    fn url(&self, path: &str) -> String {
        format!("ssh://{}@localhost:{}{path}", self.user, self.port)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.directory.path().join(name)).unwrap()
    }

    /// A node that knows this server by `host_key` and has all its users' keys.
    async fn node(&self, host_key: &str) -> Node {
        self.node_with(host_key, Engine::Gix).await
    }

    async fn node_with(&self, host_key: &str, engine: Engine) -> Node {
        let known = self.directory.path().join(format!("known hosts {host_key}"));
        fs::write(&known, format!("[localhost]:{} {}", self.port, self.read(&format!("{host_key}.pub")))).unwrap();
        let node = Node::with(Engine::Gix, |settings| {
            settings.known_hosts = Some(known);
            settings.transport = engine;
        })
        .await;
        for entry in fs::read_dir(self.directory.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if let Some(key) = name.strip_suffix(".pub") {
                node.credential_at(&format!("{key}.key"), &self.read(key));
            }
        }
        node
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.process.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

async fn refused(node: &Node, url: &str, key: &str) -> Failure {
    node.fetch_as(url, Some(key), &Want::All).await.unwrap_err()
}

#[tokio::test]
async fn ssh_brings_what_git_itself_would_and_later_what_is_new() {
    let sshd = Sshd::start(&[("user", "restrict ")]);
    let upstream = rich();
    let node = sshd.node("host").await;
    let url = sshd.url(upstream.path().to_str().unwrap());
    let fetched = node.fetch_as(&url, Some("user"), &Want::All).await.unwrap();
    assert_eq!(fetched.source, Source::Upstream);
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    assert_sound(&fetched.path);
    upstream.commit("main", &[("a.txt", "3")]);
    drop(fetched);
    let fetched = node.fetch_as(&url, Some("user"), &Want::All).await.unwrap();
    assert_eq!((fetched.objects, refs(&fetched.path)), (3, refs(&upstream.path())));
    let phases: Vec<_> = node.running.progress.lock().unwrap().iter().map(|progress| progress.phase.clone()).collect();
    assert!(phases.contains(&"connecting".to_owned()), "{phases:?}");
    assert!(node.processes().is_empty());
}

#[tokio::test]
async fn the_git_command_goes_the_same_way() {
    let sshd = Sshd::start(&[("user", "restrict ")]);
    let upstream = rich();
    let node = sshd.node_with("host", Engine::Git).await;
    let url = sshd.url(upstream.path().to_str().unwrap());
    let fetched = node.fetch_as(&url, Some("user"), &Want::All).await.unwrap();
    assert_eq!(refs(&fetched.path), refs(&upstream.path()));
    assert_sound(&fetched.path);
    for (node, key, path, class) in [
        (&sshd.node_with("other-host", Engine::Git).await, "user", upstream.path(), ErrorClass::Forbidden),
        (&node, "stranger", upstream.path(), ErrorClass::Auth),
        (&node, "user", upstream.path().join("absent.git"), ErrorClass::NotFound),
    ] {
        let failure = refused(node, &sshd.url(path.to_str().unwrap()), key).await;
        assert_eq!(failure.class, class, "{failure}");
    }
}

#[tokio::test]
async fn only_a_host_whose_key_is_known_is_talked_to() {
    let sshd = Sshd::start(&[("user", "")]);
    let upstream = rich();
    let url = sshd.url(upstream.path().to_str().unwrap());
    // Another key than the known one; a host that is not known; no list of known hosts at all.
    let changed = sshd.node("other-host").await;
    let failure = refused(&changed, &url, "user").await;
    assert_eq!(failure.class, ErrorClass::Forbidden, "{failure}");
    assert!(failure.message.contains("Host key verification failed"), "{failure}");
    let empty = sshd.directory.path().join("nobody");
    fs::write(&empty, "").unwrap();
    let unknown = Node::with(Engine::Gix, |settings| settings.known_hosts = Some(empty.clone())).await;
    unknown.credential_at("user.key", &sshd.read("user"));
    let failure = refused(&unknown, &url, "user").await;
    assert_eq!(failure.class, ErrorClass::Forbidden, "{failure}");
    assert_eq!(fs::read_to_string(empty).unwrap(), "", "a host was learnt");
    let none = Node::new(Engine::Gix).await;
    none.credential_at("user.key", &sshd.read("user"));
    let failure = refused(&none, &url, "user").await;
    assert_eq!(failure.class, ErrorClass::Forbidden, "{failure}");
    assert!(failure.message.contains("git.known_hosts"), "{failure}");
}

#[tokio::test]
async fn ssh_failures_have_their_classes_and_nobody_is_asked_for_a_password() {
    let sshd = Sshd::start(&[("user", "")]);
    let upstream = rich();
    let node = sshd.node("host").await;
    let url = sshd.url(upstream.path().to_str().unwrap());
    let started = Instant::now();
    let failure = refused(&node, &url, "stranger").await;
    assert_eq!((failure.class, failure.unreachable), (ErrorClass::Auth, false), "{failure}");
    let failure = node.fetch(&url).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Auth, "{failure}");
    let failure = refused(&node, &sshd.url("/nowhere/at/all.git"), "user").await;
    assert_eq!((failure.class, failure.unreachable), (ErrorClass::NotFound, false), "{failure}");
    let nobody = url.replace(&format!("{}@", sshd.user), "nobody-of-this-name@");
    assert_eq!(refused(&node, &nobody, "user").await.class, ErrorClass::Auth);
    node.credential_at("broken.key", "-----BEGIN OPENSSH PRIVATE KEY-----\nbm8=\n-----END OPENSSH PRIVATE KEY-----\n");
    assert_eq!(refused(&node, &url, "broken").await.class, ErrorClass::Auth);
    assert!(started.elapsed() < Duration::from_secs(20), "somebody waited for an answer");
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let failure = refused(&node, &url.replace(&sshd.port.to_string(), &closed.to_string()), "user").await;
    assert_eq!((failure.class, failure.unreachable), (ErrorClass::Network, true), "{failure}");
}

#[tokio::test]
async fn what_a_shell_or_ssh_would_run_stays_a_name() {
    let sshd = Sshd::start(&[("user", "")]);
    let node = sshd.node("host").await;
    let mark = sshd.directory.path().join("mark");
    let shown = mark.display();
    for path in [
        format!("/x';touch${{IFS}}{shown};'"),
        format!("/$(touch${{IFS}}{shown})"),
        format!("/`touch${{IFS}}{shown}`"),
        format!("/x;touch${{IFS}}{shown}"),
        format!("/x'%20;touch%20{shown};%20'"),
        format!("/%22;touch%20{shown};%22"),
        format!("/x%27%27;touch%20{shown};%27"),
    ] {
        let failure = refused(&node, &sshd.url(&path), "user").await;
        assert!(matches!(failure.class, ErrorClass::NotFound | ErrorClass::Invalid), "{path}: {failure}");
    }
    for url in [
        format!("ssh://-oProxyCommand=touch%20{shown}@localhost:{}/x", sshd.port),
        format!("ssh://localhost:{}/-oProxyCommand=x", sshd.port),
        format!("ssh://a%0aProxyCommand%20touch@localhost:{}/x", sshd.port),
        format!("ssh://a%24(touch)@localhost:{}/x", sshd.port),
    ] {
        assert_eq!(GitUrl::parse(&url).unwrap_err().class, ErrorClass::Invalid, "{url}");
    }
    assert!(!mark.exists());
}

#[tokio::test]
async fn a_server_that_falls_silent_is_stalled_before_and_after_it_greets() {
    let sshd = Sshd::start(&[("hangs", "command=\"exec sleep 30\" ")]);
    let mut node = sshd.node("host").await;
    node.running.bounds.stall = Duration::from_secs(1);
    let started = Instant::now();
    let failure = refused(&node, &sshd.url("/x.git"), "hangs").await;
    assert_eq!(failure.class, ErrorClass::Stalled, "{failure}");
    sshd.signal(rustix::process::Signal::STOP);
    let failure = refused(&node, &sshd.url("/x.git"), "hangs").await;
    sshd.signal(rustix::process::Signal::CONT);
    assert_eq!(failure.class, ErrorClass::Stalled, "{failure}");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert!(node.processes().is_empty());
}

#[tokio::test]
async fn neither_the_environment_nor_a_users_settings_lead_ssh_astray() {
    let sshd = Sshd::start(&[("user", "")]);
    let upstream = rich();
    let node = sshd.node("host").await;
    let home = tempfile::tempdir().unwrap();
    let mark = home.path().join("mark");
    fs::create_dir(home.path().join(".ssh")).unwrap();
    let hostile = format!(
        "Host *\n ProxyCommand touch {0}\n LocalCommand touch {0}\n PermitLocalCommand yes\n StrictHostKeyChecking no\n",
        mark.display()
    );
    fs::write(home.path().join(".ssh/config"), hostile).unwrap();
    let program = home.path().join("program");
    fs::write(&program, format!("#!/bin/sh\ntouch {}\n", mark.display())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    // The agent clears all of this; a child that it reached would not be led astray either.
    let mut child = Command::new(env!("CARGO_BIN_EXE_haul"))
        .args(["child", "transfer"])
        .envs([("HOME", home.path()), ("SSH_AUTH_SOCK", &home.path().join("socket"))])
        .envs(["GIT_SSH", "GIT_SSH_COMMAND", "SSH_ASKPASS", "GIT_PROXY_COMMAND"].map(|name| (name, &program)))
        .envs([("SSH_ASKPASS_REQUIRE", "force"), ("DISPLAY", ":0"), ("ALL_PROXY", "http://127.0.0.1:1")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The agent makes it before it starts the child.
    fs::create_dir(node.storage.path().join("x.git")).unwrap();
    let credential = node.storage.path().join("credentials/user.key").canonicalize().unwrap();
    let request = serde_json::json!({
        "url": sshd.url(upstream.path().to_str().unwrap()), "mirror": node.storage.path().join("x.git"), "want": "all",
        "credential": { "path": credential, "form": "key" },
        "policy": { "allow_http": false, "allow_file": false, "allow_loopback": true, "allow_private": false, "hosts": [] },
        "ca_file": null, "known_hosts": sshd.directory.path().join("known hosts host"), "max_bytes": 1_000_000,
    });
    let stdin = child.stdin.as_mut().unwrap();
    writeln!(stdin, "{}", serde_json::json!({ "parent": std::process::id(), "request": request })).unwrap();
    // It will ask whether it may write.
    writeln!(stdin, "{}", serde_json::json!({ "Ok": { "waited": false } })).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.lines().last().unwrap().contains("\"done\""), "{said}");
    assert_eq!(refs(&node.storage.path().join("x.git")), refs(&upstream.path()));
    assert!(!mark.exists());
}
