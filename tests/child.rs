//! What the agent makes of children that answer, fail, crash, hang, or say what is not in the protocol.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up shall fail loudly")]

#[path = "support/githttp.rs"]
mod githttp;
#[path = "support/node.rs"]
mod node;

use std::{
    io::{Read, Write},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use haul::{
    failure::{ErrorClass, Failure},
    git::{
        child::{Children, Role},
        pack,
    },
    protocol::Progress,
};
use node::{Bounds, Running};
use serde_json::{Value, json};
use tokio::time::Instant;

/// Bounds that are not reached.
fn patient() -> Running {
    within(Duration::from_secs(30), Duration::from_secs(20))
}

fn within(deadline: Duration, stall: Duration) -> Running {
    Running::within_bounds(Bounds { deadline, stall })
}

/// Asks a child that misbehaves for this.
async fn asked(running: &Running, request: &str) -> Result<Value, Failure> {
    let request = json!({ "do": request });
    running.run(async |run| misbehaving().run(Role::Workspace, &request, Vec::new(), run).await).await
}

/// The processes that a stubborn child told of.
async fn stubborn(running: &Running) -> Vec<i32> {
    loop {
        if let Some(progress) = running.progress.lock().unwrap().first() {
            return progress.phase.split(' ').map(|pid| pid.parse().unwrap()).collect();
        }
        running.moved.notified().await;
    }
}

/// Children that do as their request says, however bad.
fn misbehaving() -> Children {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/child.sh");
    Children::new(program, Duration::from_millis(300)).unwrap()
}

fn real() -> Children {
    Children::new(env!("CARGO_BIN_EXE_haul").into(), Duration::from_secs(2)).unwrap()
}

async fn assert_gone(pids: &[i32]) {
    let alive = |pid: &i32| {
        // A zombie that nobody has reaped yet is gone all the same.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
    };
    let gone = async {
        while pids.iter().any(alive) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), gone).await.expect("a process of the group is still there");
}

#[tokio::test]
async fn a_child_reports_and_answers() {
    let running = patient();
    assert_eq!(asked(&running, "answer").await.unwrap(), 42);
    let expected = Progress { phase: "receiving".to_owned(), done: 1, total: Some(2), bytes: 3, ..Progress::default() };
    assert_eq!(*running.progress.lock().unwrap(), [expected]);
}

#[tokio::test]
async fn a_childs_failure_keeps_its_class_and_loses_its_controls() {
    let failure = asked(&patient(), "fail").await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Auth);
    assert!(!failure.message.chars().any(char::is_control), "{failure:?}");
}

#[tokio::test]
async fn a_childs_question_is_answered_or_refused() {
    let ask = async |refused: bool| {
        let answer = |question: Value| -> futures_util::future::BoxFuture<'static, _> {
            Box::pin(async move {
                if refused {
                    return Err(Failure::conflict("no"));
                }
                Ok(json!(question["number"].as_i64().unwrap() + 1))
            })
        };
        patient()
            .run(async |run| {
                let request = json!({ "do": "ask" });
                misbehaving().run_asking::<_, Value, _>(Role::Workspace, &request, Vec::new(), run, answer).await
            })
            .await
    };
    assert_eq!(ask(false).await.unwrap(), "thanks");
    assert_eq!(ask(true).await.unwrap_err().class, ErrorClass::Conflict);
    // Nobody listens: the child is told so, and does not wait for ever.
    assert_eq!(asked(&patient(), "ask").await.unwrap_err().class, ErrorClass::Conflict);
}

#[tokio::test]
async fn a_crash_is_told_with_the_end_of_what_was_said() {
    let failure = asked(&patient(), "crash").await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Internal);
    assert!(failure.message.contains("exited with code 7"), "{failure}");
    assert!(failure.message.ends_with("the last words") && failure.message.len() < 5000, "{failure}");
    let failure = asked(&patient(), "die").await.unwrap_err();
    assert!(failure.message.contains("killed by signal 11"), "{failure}");
}

#[tokio::test]
async fn what_is_not_in_the_protocol_is_a_fault_and_is_bounded() {
    for request in ["silent", "garbage", "half", "flood"] {
        let started = Instant::now();
        let failure = asked(&patient(), request).await.unwrap_err();
        assert_eq!(failure.class, ErrorClass::Internal, "{request}: {failure}");
        assert!(failure.message.len() < 500, "{request}");
        assert!(started.elapsed() < Duration::from_secs(10), "{request}");
    }
}

#[tokio::test]
async fn a_child_that_lingers_after_its_answer_is_killed() {
    let started = Instant::now();
    assert_eq!(asked(&patient(), "linger").await.unwrap(), 1);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn each_bound_ends_the_whole_group_of_a_stubborn_child() {
    let short = Duration::from_millis(500);
    for (running, class) in [
        (within(short, Duration::from_secs(20)), ErrorClass::Timeout),
        (within(Duration::from_secs(30), short), ErrorClass::Stalled),
    ] {
        let failure = asked(&running, "stubborn").await.unwrap_err();
        assert_eq!(failure.class, class);
        assert_gone(&stubborn(&running).await).await;
    }
    let running = patient();
    let cancel = async {
        stubborn(&running).await;
        running.cancel.cancel();
    };
    let (result, ()) = tokio::join!(asked(&running, "stubborn"), cancel);
    assert_eq!(result.unwrap_err(), Failure::internal("cancelled"));
    assert_gone(&stubborn(&running).await).await;
}

#[tokio::test]
async fn a_run_that_is_dropped_kills_the_group() {
    let running = patient();
    let pids = tokio::select! {
        _ = asked(&running, "stubborn") => panic!("it never ends by itself"),
        pids = stubborn(&running) => pids,
    };
    assert_gone(&pids).await;
}

#[tokio::test]
async fn steps_keep_a_slow_child_alive() {
    let running = within(Duration::from_secs(30), Duration::from_secs(1));
    assert_eq!(asked(&running, "busy").await.unwrap(), 1);
}

#[tokio::test]
async fn a_run_that_is_cancelled_before_it_starts_starts_nothing() {
    let running = patient();
    running.cancel.cancel();
    assert_eq!(asked(&running, "stubborn").await.unwrap_err(), Failure::internal("cancelled"));
    assert!(running.progress.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_child_sees_nothing_of_the_agents_surroundings() {
    assert_eq!(asked(&patient(), "around").await.unwrap(), "/ none /nonexistent");
}

#[tokio::test]
async fn a_program_that_is_not_there_waits_without_spending_attempts() {
    let children = Children::new("/nonexistent/haul".into(), Duration::from_secs(1)).unwrap();
    let failure = patient()
        .run(async |run| children.run::<_, Value>(Role::Pack, &json!({}), Vec::new(), run).await)
        .await
        .unwrap_err();
    assert_eq!((failure.class, failure.deferred), (ErrorClass::Internal, true));
}

#[test]
fn a_child_whose_parent_is_another_does_nothing() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_haul"))
        .args(["child", "transfer"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let request = json!({
        "url": "https://git.example/x.git", "mirror": "/nonexistent", "want": "all", "credential": null,
        "policy": { "allow_http": false, "allow_file": false, "allow_loopback": false, "allow_private": false, "hosts": [] },
        "ca_file": null, "known_hosts": null, "max_bytes": 1,
    });
    writeln!(child.stdin.take().unwrap(), "{}", json!({ "parent": 1, "request": request })).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
}

#[test]
fn an_unknown_role_is_refused() {
    assert_eq!(Command::new(env!("CARGO_BIN_EXE_haul")).args(["child", "other"]).status().unwrap().code(), Some(2));
}

/// Streams a pack and indexes it in `target`, which must end up sound.
async fn packed(mirror: &Path, wants: &[&str], haves: &[&str], target: &Path) -> Result<pack::Packed, Failure> {
    let (mut from, into) = std::io::pipe().unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let owned = |oids: &[&str]| oids.iter().map(|&oid| oid.to_owned()).collect::<Vec<_>>();
    let (wants, haves) = (owned(wants), owned(haves));
    let packed =
        patient().run(async |run| pack::stream(&real(), mirror, &wants, &haves, &[], into.into(), run).await).await?;
    let bytes = reading.await.unwrap();
    assert_eq!(bytes.len() as u64, packed.bytes);
    if packed.objects > 0 {
        let mut index = githttp::git_command(target)
            .args(["index-pack", "--stdin", "--strict", "--fix-thin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        index.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(index.wait().unwrap().success());
    }
    Ok(packed)
}

#[tokio::test]
async fn a_pack_holds_what_is_wanted_and_not_yet_there() {
    let upstream = githttp::Upstream::new();
    let first = upstream.commit("main", &[("a.txt", "1"), ("same.txt", "same")]);
    upstream.git(&["tag", "-a", "-m", "a tag", "v1", &first]);
    let tag = upstream.git(&["rev-parse", "refs/tags/v1"]);
    let target = githttp::Upstream::new();
    let all = packed(&upstream.path(), &[&first, &tag], &[], &target.path()).await.unwrap();
    assert_eq!(all.objects, 5);
    let second = upstream.commit("main", &[("a.txt", "2"), ("same.txt", "same")]);
    // A have that the mirror never saw is no hindrance.
    let unknown = "1".repeat(40);
    let more = packed(&upstream.path(), &[&second], &[&first, &unknown], &target.path()).await.unwrap();
    assert_eq!(more.objects, 3);
    target.git(&["update-ref", "refs/heads/main", &second]);
    target.git(&["update-ref", "refs/tags/v1", &tag]);
    target.git(&["fsck", "--full", "--strict"]);
    let nothing = packed(&upstream.path(), &[&first], &[&second], &target.path()).await.unwrap();
    assert_eq!((nothing.objects, nothing.bytes), (0, 0));
}

#[tokio::test]
async fn a_want_that_the_mirror_lacks_is_not_found() {
    let upstream = githttp::Upstream::new();
    upstream.commit("main", &[("a.txt", "1")]);
    let failure = packed(&upstream.path(), &[&"1".repeat(40)], &[], &upstream.path()).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::NotFound);
}
