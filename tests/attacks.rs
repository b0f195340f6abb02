//! Hostile tasks against a real agent on a real broker, row by row: each table holds the spellings of one attack, and
//! after each the node must be as it was, with a reason in the dead letters and the next good task done.
//!
//! Longer than 400 lines because the tables of nine rows stand beside each other.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/githttp.rs"]
mod githttp;
#[path = "attacks/messages.rs"]
mod messages;
#[path = "attacks/race.rs"]
mod race;
#[path = "attacks/secrets.rs"]
mod secrets;
mod support;
#[path = "attacks/world.rs"]
mod world;

use std::{fs, os::unix::fs::symlink};

use haul::{failure::ErrorClass, protocol::Status};
use serde_json::{Value, json};
use support::{agent::Agent, repository::Repository};
use world::{GOOD, GOOD_PROJECT, World, assert_is_a_sentence};

const INVALID: &[ErrorClass] = &[ErrorClass::Invalid];
const FORBIDDEN: &[ErrorClass] = &[ErrorClass::Forbidden];
const REFUSED: &[ErrorClass] = &[ErrorClass::Invalid, ErrorClass::Forbidden];

/// A clone and a pull with this address.
fn both(world: &World, url: &str) -> [Value; 2] {
    let mut pull = Agent::task(&world.id(), "pull", GOOD_PROJECT);
    pull["git_url"] = url.into();
    [world.clone_with(&json!({"git_url": url})), pull]
}

#[tokio::test]
async fn addresses_of_other_schemes_are_refused() {
    let world = World::strict().await;
    let (mark, port) = (world.mark(), world.trap.port);
    let local = world.upstream.bare().display().to_string();
    let invalid = [
        format!("ext::sh -c 'touch {mark}'"),
        format!("ext::sh -c touch% {mark}"),
        format!("ext::touch%20{mark}"),
        format!("EXT::touch {mark}"),
        format!("ext://touch%20{mark}"),
        format!("git-remote-ext::touch {mark}"),
        format!("git-remote-ext://touch/{mark}"),
        "fd::0".to_owned(),
        "fd::17,18/x".to_owned(),
        "fd://0".to_owned(),
        format!("git://127.0.0.1:{port}/x"),
        format!("git+ssh://127.0.0.1:{port}/x"),
        format!("ssh+git://127.0.0.1:{port}/x"),
        format!("git+https://127.0.0.1:{port}/x"),
        format!("ftp://127.0.0.1:{port}/x"),
        format!("ftps://127.0.0.1:{port}/x"),
        format!("gopher://127.0.0.1:{port}/x"),
        format!("rsync://127.0.0.1:{port}/x"),
        format!("dict://127.0.0.1:{port}/x"),
        format!("ws://127.0.0.1:{port}/x"),
        format!("HTTP://127.0.0.1:{port}/x"),
        format!("hTTps://127.0.0.1:{port}/x"),
        format!("http:127.0.0.1:{port}/x"),
        format!("http:/127.0.0.1:{port}/x"),
        format!("http:///127.0.0.1:{port}/x"),
        format!("http::http://127.0.0.1:{port}/x"),
        format!("https://http://127.0.0.1:{port}/x"),
        format!("https://upstream.invalid/http://127.0.0.1:{port}/x"),
        format!("//127.0.0.1:{port}/x"),
        format!("127.0.0.1:{port}/x"),
        format!("git@127.0.0.1:{port}/x"),
        "git@127.0.0.1:x.git".to_owned(),
        "host:x.git".to_owned(),
        "file:".to_owned(),
        format!("file:{local}"),
        format!("file:/{local}"),
        format!("FILE://{local}"),
        format!("file://upstream.invalid{local}"),
        format!("file::{local}"),
        local.clone(),
        format!("{local}/../upstream.git"),
        "../upstream.git".to_owned(),
        "./upstream.git".to_owned(),
        "upstream.git".to_owned(),
        "~/upstream.git".to_owned(),
        "C:\\upstream".to_owned(),
        "C:/upstream".to_owned(),
        "\\\\server\\share".to_owned(),
        "\\\\?\\C:\\upstream".to_owned(),
        "https:\\\\upstream.invalid\\x".to_owned(),
        "bundle.bundle".to_owned(),
        "transport::address".to_owned(),
        "://upstream.invalid/x".to_owned(),
        " https://upstream.invalid/x".to_owned(),
        "https://".to_owned(),
        "javascript://upstream.invalid/x".to_owned(),
        String::new(),
    ];
    let tasks: Vec<_> = invalid.iter().flat_map(|url| both(&world, url)).collect();
    world.refuses(&tasks, INVALID, true).await;
    // A proper address of a kind that this node does not allow.
    let forbidden = [format!("file://{local}"), "file:///etc".to_owned(), "file:///proc/self/cwd/x".to_owned()];
    let tasks: Vec<_> = forbidden.iter().flat_map(|url| both(&world, url)).collect();
    world.refuses(&tasks, FORBIDDEN, true).await;
}

#[tokio::test]
async fn what_a_program_would_read_as_an_option_is_refused() {
    let world = World::strict().await;
    let mark = world.mark();
    let addresses = [
        format!("--upload-pack=touch {mark}"),
        format!("-u{mark}"),
        "--config=core.sshCommand=id".to_owned(),
        "--".to_owned(),
        format!("ssh://-oProxyCommand=touch%20{mark}/x"),
        format!("ssh://-oProxyCommand=touch${{IFS}}{mark}/x"),
        format!("ssh://git@-oProxyCommand=touch%20{mark}/x"),
        format!("ssh://%2doProxyCommand=touch%20{mark}/x"),
        format!("ssh://-oProxyCommand=touch%20{mark}@upstream.invalid/x"),
        "ssh://-lroot@upstream.invalid/x".to_owned(),
        "ssh://%2dlroot@upstream.invalid/x".to_owned(),
        "ssh://upstream.invalid/-x".to_owned(),
        "ssh://upstream.invalid/a/--upload-pack=id".to_owned(),
        "ssh://upstream.invalid/%2d-x".to_owned(),
        "ssh://upstream.invalid/%2Dx/y".to_owned(),
        "ssh://upstream.invalid:-1/x".to_owned(),
        "ssh://git@upstream.invalid;touch/x".to_owned(),
        format!("ssh://git@`touch {mark}`/x"),
        format!("ssh://$(touch {mark})/x"),
        "https://-upstream.invalid/x".to_owned(),
        "https://upstream.invalid/-x.git".to_owned(),
        "https://upstream.invalid/a/%2d-x.git".to_owned(),
    ];
    let mut tasks: Vec<_> = addresses.iter().flat_map(|url| both(&world, url)).collect();
    for name in ["-x", "--upload-pack=id", "-", "--", "-c", "a/-b", "--exec=touch"] {
        for field in ["branch", "tag", "commit", "expect_commit", "target_path", "credential", "owner"] {
            if !(field == "target_path" && name.contains('/')) {
                tasks.push(world.clone_with(&json!({field: name})));
            }
        }
    }
    world.refuses(&tasks, INVALID, true).await;
}

#[tokio::test]
async fn control_characters_are_refused_in_every_field() {
    let world = World::strict().await;
    let mut tasks = Vec::new();
    let hidden =
        ["\0", "\n", "\r", "\t", "\u{1b}[2J", "\u{7f}", "\u{85}", "\u{9b}", "\u{200b}", "\u{202e}", "\u{feff}"];
    for c in hidden {
        for (field, plain) in [
            ("git_url", "https://upstream.invalid/a.git"),
            ("branch", "main"),
            ("tag", "v1"),
            ("commit", "1111111111111111111111111111111111111111"),
            ("expect_commit", "1111111111111111111111111111111111111111"),
            ("target_path", "99_app"),
            ("credential", "team"),
            ("owner", "1000:1000"),
            ("not_after", "2099-01-01T00:00:00Z"),
        ] {
            for spelling in [format!("{plain}{c}"), format!("{c}{plain}"), format!("{}{c}{}", &plain[..1], &plain[1..])]
            {
                tasks.push(world.clone_with(&json!({field: spelling})));
            }
        }
    }
    for hidden in ["%00", "%0a", "%0D", "%09", "%1b", "%7f", "%250a", "%2500", "%c2%85", "%e2%80%ae", "%ff", "%c0%8a"] {
        for url in [
            format!("https://upstream.invalid/a{hidden}.git"),
            format!("https://upstream.invalid/{hidden}"),
            format!("https://up{hidden}stream.invalid/a.git"),
            format!("ssh://git{hidden}@upstream.invalid/a.git"),
            format!("ssh://git@upstream.invalid{hidden}/a.git"),
            format!("ssh://git@upstream.invalid/a{hidden}b"),
        ] {
            tasks.push(world.clone_with(&json!({"git_url": url})));
        }
    }
    for target in ["99%00app", "99%0aapp", "..%2fapp"] {
        tasks.push(world.clone_with(&json!({"target_path": target})));
    }
    world.refuses(&tasks, INVALID, true).await;
}

#[tokio::test]
async fn addresses_of_this_machine_are_refused_in_every_notation() {
    let world = World::strict().await;
    let port = world.trap.port;
    let hosts = [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "127.0.0.1.",
        "127.255.255.254",
        "0x7f.0.0.1",
        "0x7f000001",
        "0X7F.1",
        "0177.0.0.1",
        "017700000001",
        "2130706433",
        "0x7f.0.0x0.1",
        "127.0x0.1",
        "0",
        "0.0.0.0",
        "0x0",
        "0.1",
        "%31%32%37.0.0.1",
        "\u{ff11}\u{ff12}\u{ff17}.0.0.1",
        "127\u{3002}0\u{3002}0\u{3002}1",
        "\u{2460}\u{2461}\u{2466}.0.0.1",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::ffff:0:127.0.0.1]",
        "[::127.0.0.1]",
        "[0::1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "[febf::1]",
        "[ff02::1]",
        "[fd00:ec2::254]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::a9fe:a9fe]",
        "169.254.169.254",
        "0xa9fea9fe",
        "2852039166",
        "169.254.1",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "198.51.100.1",
        "[2001:db8::1]",
    ];
    let tasks: Vec<_> = hosts
        .iter()
        .flat_map(|host| ["http", "https"].map(|scheme| format!("{scheme}://{host}:{port}/x.git")))
        .flat_map(|url| both(&world, &url))
        .collect();
    world.refuses(&tasks, REFUSED, true).await;
    // Names, and what only the system's resolver takes for an address: known once a child has asked it.
    let named = ["localhost", "LOCALHOST", "LocalHost"].map(|host| format!("http://{host}:{port}/x.git"));
    let resolved = ["127.1", "0x7f000001", "2130706433", "0177.0.0.1", "0", "localhost", "[::1]", "[::ffff:127.0.0.1]"]
        .map(|host| format!("ssh://git@{host}:{port}/x.git"));
    let tasks: Vec<_> = named.iter().chain(&resolved).map(|url| world.clone_with(&json!({"git_url": url}))).collect();
    for end in world.refuses(&tasks, FORBIDDEN, false).await {
        assert!(end.error.unwrap().message.contains("is at "));
    }
    // Not every system's resolver knows these two.
    let odd = ["localhost.", "ip6-localhost"].map(|host| format!("http://{host}:{port}/x.git"));
    let tasks: Vec<_> = odd.iter().map(|url| world.clone_with(&json!({"git_url": url}))).collect();
    world.refuses(&tasks, &[ErrorClass::Forbidden, ErrorClass::Network], false).await;
}

#[tokio::test]
async fn only_a_plain_component_is_a_target_path() {
    let world = World::strict().await;
    let long = "x".repeat(5000);
    let (just_too_long, wide) = ("x".repeat(256), "\u{e4}".repeat(128));
    let targets = [
        "",
        ".",
        "..",
        "...",
        "../x",
        "../../etc",
        "x/..",
        "x/../y",
        "/x",
        "/etc/passwd",
        "//",
        "/",
        "a/b",
        "a//b",
        "a/",
        "./x",
        "a\\b",
        "..\\x",
        "\\x",
        "x.",
        "x ",
        " x",
        "x..",
        "x. ",
        "\u{a0}/x",
        ".haul",
        ".HAUL",
        ".git",
        ".GIT",
        ".hidden",
        "CON",
        "con",
        "NUL.txt",
        "aux",
        "COM1",
        "lpt9.x",
        "~",
        "~root",
        "a:b",
        "C:",
        "a::$DATA",
        "a*",
        "a?",
        "a|b",
        "a<b",
        "a>b",
        "a\"b",
        "%2e%2e",
        "..%2fx",
        "a%00",
        "x\0y",
        "x\u{2028}y",
        "x\u{202e}y",
        "\u{feff}x",
        &long,
        &just_too_long,
        &wide,
    ];
    let mut tasks: Vec<_> = targets.iter().map(|target| world.clone_with(&json!({"target_path": target}))).collect();
    for kind in ["pull", "delete", "status"] {
        for target in ["..", "../good", "/", "good/", "good/.git", "", ".haul", "./good"] {
            let mut task = Agent::task(&world.id(), kind, GOOD_PROJECT);
            task["target_path"] = target.into();
            tasks.push(task);
        }
    }
    tasks.extend(
        [json!(null), json!(1), json!(["x"]), json!({"x": 1}), json!(true)]
            .map(|odd| world.clone_with(&json!({"target_path": odd}))),
    );
    world.refuses(&tasks, INVALID, true).await;
}

#[tokio::test]
async fn what_belongs_to_somebody_else_is_a_conflict() {
    let world = World::open().await;
    let projects = world.agent.projects();
    fs::create_dir(projects.join("foreign")).unwrap();
    fs::write(projects.join("foreign/mine"), "mine").unwrap();
    fs::create_dir(projects.join("empty")).unwrap();
    fs::write(projects.join("file"), "mine").unwrap();
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), projects.join("link")).unwrap();
    symlink("nowhere", projects.join("dangling")).unwrap();
    symlink(GOOD, projects.join("alias")).unwrap();
    let other = Repository::new();
    let before = world.files();
    let mut tasks: Vec<_> = [GOOD, "foreign", "empty", "file", "link", "dangling", "alias"]
        .map(|target| Agent::clone_task(&world.id(), 99, &world.upstream, target))
        .into();
    // The project's own number with another address, at its path and at another.
    tasks.push(Agent::clone_task(&world.id(), GOOD_PROJECT, &other, GOOD));
    tasks.push(Agent::clone_task(&world.id(), GOOD_PROJECT, &other, "elsewhere"));
    tasks.push(Agent::clone_task(&world.id(), GOOD_PROJECT, &world.upstream, "elsewhere"));
    let mut pull = Agent::task(&world.id(), "pull", GOOD_PROJECT);
    pull["git_url"] = other.url().into();
    tasks.push(pull);
    for kind in ["pull", "delete", "status"] {
        let mut task = Agent::task(&world.id(), kind, GOOD_PROJECT);
        task["target_path"] = "foreign".into();
        tasks.push(task);
    }
    for task in &tasks {
        world.agent.publish(task).await;
        let end = world.agent.end(task["task_id"].as_str().unwrap(), 0).await;
        let error = end.error.clone().unwrap_or_else(|| panic!("{task} ended as {end:?}"));
        assert_eq!((end.status, error.class), (Status::Failed, ErrorClass::Conflict), "{task} ended as {end:?}");
        assert_is_a_sentence(&error.message);
    }
    let mirrors = |path: &std::path::Path| path.components().any(|part| part.as_os_str() == "mirrors");
    let after: std::collections::BTreeMap<_, _> =
        world.files().into_iter().filter(|(path, _)| before.contains_key(path) || !mirrors(path)).collect();
    assert_eq!(after, before, "something was written");
    assert!(fs::read_dir(outside.path()).unwrap().next().is_none());
    assert!(world.letters().await.is_empty(), "a conflict is not a dead letter");
    world.unharmed().await;
}

#[tokio::test]
async fn revisions_that_are_no_names_or_do_not_exist_are_told_apart() {
    let world = World::open().await;
    let tip = world.upstream.commit("README", "second\n");
    let blob = support::repository::git(&world.upstream.work(), &["rev-parse", "HEAD:README"]);
    let clone = |fields: Value| {
        let mut task = world.clone_with(&fields);
        task["git_url"] = world.upstream.url().into();
        task
    };
    let names = [
        "",
        "-x",
        "a..b",
        "a b",
        "a~1",
        "a^",
        "a:b",
        "a?",
        "a*",
        "a[",
        "a\\b",
        "a.lock",
        "a/b.LOCK/c",
        ".a",
        "a/.b",
        "/a",
        "a/",
        "a//b",
        "@",
        "a@{1}",
        "@{-1}",
        "HEAD",
        "a.",
        "a\nb",
        "a\u{7f}",
        "refs/heads/x",
        "refs/heads/main",
        "main^{commit}",
        ":/first",
        "main:README",
        &"x".repeat(251),
    ];
    let mut tasks: Vec<_> =
        names.iter().flat_map(|name| [json!({"branch": name}), json!({"tag": name})]).map(&clone).collect();
    let oids = [
        "",
        "1",
        "HEAD",
        &"0".repeat(40),
        &"g".repeat(40),
        &tip[..39],
        &format!("{tip}0"),
        &"1".repeat(64),
        &"-".repeat(40),
    ];
    tasks.extend(oids.iter().flat_map(|oid| [json!({"commit": oid}), json!({"expect_commit": oid})]).map(&clone));
    tasks.extend(
        [
            json!({"branch": "main", "tag": "v1"}),
            json!({"branch": "main", "commit": tip}),
            json!({"branch": 1}),
            json!({"tag": ["v1"]}),
        ]
        .map(&clone),
    );
    world.refuses(&tasks, INVALID, true).await;
    for (fields, class) in [
        (json!({"branch": "no-such-branch"}), ErrorClass::NotFound),
        (json!({"branch": "MAIN"}), ErrorClass::NotFound),
        (json!({"branch": "v9"}), ErrorClass::NotFound),
        (json!({"tag": "main"}), ErrorClass::NotFound),
        (json!({"tag": "no-such-tag"}), ErrorClass::NotFound),
        (json!({"commit": "1".repeat(40)}), ErrorClass::NotFound),
        (json!({"branch": "main", "expect_commit": "2".repeat(40)}), ErrorClass::NotFound),
        (json!({"branch": "no-such-branch", "single_branch": true}), ErrorClass::NotFound),
        (json!({"commit": blob}), ErrorClass::Invalid),
    ] {
        let task = clone(fields);
        world.agent.publish(&task).await;
        let end = world.agent.end(task["task_id"].as_str().unwrap(), 0).await;
        let error = end.error.unwrap();
        assert_eq!((end.status, error.class), (Status::Failed, class), "{task}: {}", error.message);
        assert_is_a_sentence(&error.message);
        let letters = world.new_letters(1).await;
        assert_eq!(letters.last().unwrap().class, class.as_str());
    }
    assert!(!world.agent.projects().join("99_app").exists());
    world.unharmed().await;
}
