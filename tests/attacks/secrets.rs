//! A canary in the place of a secret: it may be in no log, event, dead letter, argument, environment or file.

use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::Path,
};

use haul::{failure::ErrorClass, protocol::Status};
use serde_json::{Value, json};

use crate::{
    INVALID, both,
    githttp::{Behaviour, Server, Upstream},
    support::{agent::Agent, eventually},
    world::World,
};

/// What is searched for, in any case.
const CANARY: &str = "canary7f3";
/// A token that the upstream takes, what is sent for it, and the same for a password.
const TOKEN: (&str, &str) = ("canary7f3TOKEN", "eC1hY2Nlc3MtdG9rZW46Y2FuYXJ5N2YzVE9LRU4=");
const PASSWORD: (&str, &str) = ("canary7f3PASSWORD", "ZGVwbG95OmNhbmFyeTdmM1BBU1NXT1JE");

/// Whether these bytes hold the canary, as it is or as it is sent.
fn holds_canary(bytes: &[u8]) -> bool {
    let text = bytes.to_ascii_lowercase();
    [CANARY, TOKEN.1, PASSWORD.1].iter().any(|secret| {
        let secret = secret.to_ascii_lowercase();
        text.windows(secret.len()).any(|window| window == secret.as_bytes())
    })
}

/// Nothing that the agent wrote or said holds the canary.
async fn assert_silence(world: &World) {
    let mut searched = 0;
    search(world.agent.storage.path(), &mut searched);
    assert!(searched > 5, "there was hardly anything to search");
    let events = serde_json::to_vec(&world.agent.all_events()).unwrap();
    assert!(!holds_canary(&events), "an event tells the secret");
    for letter in world.letters().await {
        let message = serde_json::to_vec(&letter.message).unwrap();
        assert!(!holds_canary(&message) && !holds_canary(&letter.message.body), "a dead letter tells the secret");
    }
    assert_processes_are_silent(&world.agent);
}

fn search(path: &Path, searched: &mut usize) {
    assert!(!holds_canary(path.as_os_str().as_encoded_bytes()), "{}", path.display());
    let kind = fs::symlink_metadata(path).unwrap().file_type();
    if kind.is_symlink() || kind.is_socket() {
        return;
    }
    if kind.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            search(&entry.unwrap().path(), searched);
        }
    } else {
        *searched += 1;
        let bytes = fs::read(path).unwrap();
        if holds_canary(&bytes) {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let at = text.to_ascii_lowercase().find(CANARY).unwrap_or(0);
            let around: String = text[..at].chars().rev().take(400).collect::<Vec<_>>().into_iter().rev().collect();
            panic!("{} holds the secret after {around:?}", path.display());
        }
    }
}

/// The processes of the agent: itself and all below it.
fn processes(agent: &Agent) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?))
        })
        .collect();
    let mut found = vec![agent.pid()];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found
}

/// No argument and no variable of the agent's processes holds the canary; returns what was looked at.
fn assert_processes_are_silent(agent: &Agent) -> String {
    let mut commands = String::new();
    for pid in processes(agent) {
        for file in ["cmdline", "environ"] {
            // A child may have ended by now.
            let Ok(bytes) = fs::read(format!("/proc/{pid}/{file}")) else { continue };
            assert!(!holds_canary(&bytes), "{file} of {} tells the secret", String::from_utf8_lossy(&bytes));
            if file == "cmdline" {
                commands.push_str(&String::from_utf8_lossy(&bytes).replace('\0', " "));
                commands.push('\n');
            }
        }
    }
    commands
}

#[tokio::test]
async fn a_secret_in_a_task_is_refused_and_told_nobody() {
    let world = World::strict().await;
    let port = world.trap.port;
    let urls = [
        format!("https://{CANARY}@upstream.invalid/x"),
        format!("https://{CANARY}:x-oauth-basic@upstream.invalid/x"),
        format!("https://user:{CANARY}@upstream.invalid/x"),
        format!("https://:{CANARY}@upstream.invalid/x"),
        format!("https://user:{CANARY}@127.0.0.1:{port}/x"),
        format!("http://{CANARY}@127.0.0.1:{port}/x"),
        format!("http://a:b@{CANARY}@127.0.0.1:{port}/x"),
        format!("https://user:%63{CANARY}@upstream.invalid/x"),
        format!("https://us%65r:p%40{CANARY}@upstream.invalid/x"),
        format!("https://user:{CANARY}@[::1]:{port}/x"),
        format!("https://user:{CANARY}@[broken/x"),
        format!("https://user:{CANARY}@upstream.invalid:99999/x"),
        format!("https://user:{CANARY}@/x"),
        format!("https://user:{CANARY}@up stream.invalid/x"),
        format!("https://user:{CANARY}@upstream.invalid/x\n"),
        format!("https://user:{CANARY}@upstream.invalid\\x"),
        format!("https://user:{CANARY}@upstream.invalid/{}", "x".repeat(3000)),
        format!("HTTPS://user:{CANARY}@upstream.invalid/x"),
        format!("ssh://git:{CANARY}@upstream.invalid/x"),
        format!("git+ssh://git:{CANARY}@upstream.invalid/x"),
        format!("ftp://user:{CANARY}@upstream.invalid/x"),
        format!("file://user:{CANARY}@upstream.invalid/x"),
        format!("https:user:{CANARY}@upstream.invalid/x"),
        format!("https:/user:{CANARY}@upstream.invalid/x"),
        format!("https:///user:{CANARY}@upstream.invalid/x"),
        format!("https://https://user:{CANARY}@upstream.invalid/x"),
        format!("user:{CANARY}@upstream.invalid/x"),
        format!("user:{CANARY}@upstream.invalid:x.git"),
        format!("{CANARY}@upstream.invalid:x.git"),
        format!("https://upstream.invalid/x?private_token={CANARY}"),
        format!("https://upstream.invalid/x?a=b&access_token={CANARY}#x"),
        format!("https://upstream.invalid/x#{CANARY}"),
        format!("https://upstream.invalid/?{CANARY}"),
        format!("ssh://git@upstream.invalid/x?{CANARY}"),
        format!("ext::sh -c 'curl https://user:{CANARY}@upstream.invalid/'"),
    ];
    let mut tasks: Vec<_> = urls.iter().flat_map(|url| both(&world, url)).collect();
    let fields = [
        format!("{CANARY}/+="),
        format!("user:{CANARY}"),
        format!("Bearer {CANARY}"),
        format!("ghp_{CANARY}"),
        format!("glpat-{CANARY}"),
        format!("../{CANARY}"),
        format!("{CANARY}{}", "x".repeat(64)),
        format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}\n"),
    ];
    tasks.extend(fields.iter().map(|field| world.clone_with(&json!({"credential": field}))));
    tasks.extend(
        [json!({"token": CANARY}), json!([CANARY]), json!([[CANARY]])]
            .map(|odd: Value| world.clone_with(&json!({"credential": odd}))),
    );
    world.refuses(&tasks, INVALID, true).await;
    assert_silence(&world).await;
}

#[tokio::test]
async fn a_credential_of_the_node_leaves_no_trace() {
    let mut world = World::open().await;
    let credentials = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("localhost/team.token", format!("{}\n", TOKEN.0)),
        ("deploy.toml", format!("user = \"deploy\"\npassword = \"{}\"\nhosts = [\"localhost\"]\n", PASSWORD.0)),
        ("localhost/wrong.token", format!("{CANARY}WRONG")),
        ("broken.toml", format!("user = \"deploy\"\npassword = \"{CANARY}\"\nhots = [\"x\"]\n")),
        ("elsewhere.toml", format!("user = \"u\"\npassword = \"{CANARY}\"\nhosts = [\"elsewhere.invalid\"]\n")),
    ] {
        let path = credentials.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }
    world.agent.kill().await;
    world.agent.set("AGENT_GIT__CREDENTIALS_PATH", credentials.path().to_str().unwrap());
    world.agent.set("AGENT_RETRY__MAX_ATTEMPTS", "3");
    world.agent.set("AGENT_LOG__FILTER", "debug");
    world.agent.start(&[]);
    world.agent.ready().await;
    let upstream = Upstream::new();
    upstream.commit_noise("main", 400_000);
    let server = Server::start(upstream.root());
    server.require(TOKEN.1);
    let url = server.url("app.git");
    let clone = |id: &str, project: i64, credential: &str| {
        json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project, "git_url": url,
            "target_path": format!("{project}_app"), "credential": credential, "stall_secs": 3})
    };

    // A clone that is held up in the middle, with the credential in use, to be looked at; then it goes on.
    server.behave(Behaviour::StallPack { after: 10_000 });
    world.agent.publish(&clone("token", 2, "team")).await;
    eventually("the pack is under way", async || server.counts().packs > 0).await;
    let commands = assert_processes_are_silent(&world.agent);
    assert!(commands.contains("child transfer"), "no transfer is under way: {commands}");
    server.behave(Behaviour::Serve);
    assert_eq!(world.agent.end("token", 0).await.status, Status::Succeeded);

    server.require(PASSWORD.1);
    world.agent.publish(&clone("password", 3, "deploy")).await;
    assert_eq!(world.agent.end("password", 0).await.status, Status::Succeeded);
    upstream.commit("main", &[("new", "new")]);
    world.agent.publish(&Agent::task("pull", "pull", 3)).await;
    assert_eq!(world.agent.end("pull", 0).await.status, Status::Succeeded);

    // Refused by the upstream, and of no use already here.
    for (name, class) in [
        ("wrong", ErrorClass::Auth),
        ("broken", ErrorClass::Auth),
        ("elsewhere", ErrorClass::Forbidden),
        ("absent", ErrorClass::Auth),
    ] {
        world.agent.publish(&clone(name, 4, name)).await;
        let end = world.agent.end(name, 0).await;
        assert_eq!(end.error.unwrap().class, class, "{name}");
    }
    assert!(server.counts().authorised > 0);
    world.new_letters(4).await;
    // The mirrors and the projects with their configuration are below the storage.
    assert!(world.agent.projects().join("2_app/.git/config").exists());
    assert_silence(&world).await;
}
