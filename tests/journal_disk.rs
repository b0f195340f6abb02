//! A journal on a file system that is really full: the agent takes no more tasks, what was begun is settled from the
//! journal's reserve, and all goes on once there is room. The disk is a real one on a loop device: it needs root.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

#[expect(dead_code, reason = "made for more tests than this one")]
#[path = "support/disk.rs"]
mod disk;
#[path = "support/githttp.rs"]
mod githttp;
mod support;

use std::path::Path;

use disk::Disk;
use githttp::{Behaviour, Server, Upstream};
use haul::protocol::Status;
use serde_json::json;
use support::{
    agent::Agent,
    eventually,
    rabbit::Rabbit,
    repository::{Repository, assert_whole},
};

/// Whether the agent said last that it is ready.
fn is_ready(agent: &Agent) -> bool {
    let log = agent.log();
    let last = log.lines().rev().find(|line| line.contains(r#""message":"readiness""#));
    last.is_some_and(|line| line.contains(r#""ready":true"#))
}

/// Leaves nothing of a disk, not even what a file that grows finds in its last block.
fn fill(disk: &Disk, at: &Path) {
    disk.leave(0);
    let mut number = 0;
    while std::fs::write(at.join(format!("ballast-{number}")), [0_u8; 4096]).is_ok() {
        number += 1;
    }
}

fn clear(disk: &Disk, at: &Path) {
    for entry in std::fs::read_dir(at).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("ballast-") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    disk.clear();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_what_was_begun_is_settled_and_nothing_new_is_begun_until_there_is_room() {
    let place = tempfile::tempdir().unwrap();
    let storage = place.path().join("storage");
    let disk = Disk::new(&storage, 24, 2048);
    let repository = Upstream::new();
    let head = repository.commit("main", &[("a.txt", "hello\n")]);
    let upstream = Server::start(repository.root());
    upstream.behave(Behaviour::HoldPack);
    let small = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    let projects = place.path().join("projects");
    for (name, value) in [
        ("AGENT_STORAGE_PATH", storage.to_str().unwrap()),
        ("AGENT_PROJECTS_PATH", projects.to_str().unwrap()),
        ("AGENT_DISK__RESERVE", "0B"),
        ("AGENT_SLOTS", "2"),
    ] {
        agent.set(name, value);
    }
    agent.start(&[]);
    agent.ready().await;
    let clone = json!({"v": 1, "task_id": "begun", "kind": "clone", "project_id": 1,
                       "git_url": upstream.url("app.git"), "target_path": "1_app"});
    agent.publish(&clone).await;
    eventually("the clone waits for its pack", async || upstream.counts().packs == 1).await;
    agent.publish(&Agent::task("waits", "pull", 1)).await;
    agent.saw("waits", Status::Accepted).await;

    let reserve = storage.join(".haul/journal.reserve");
    assert!(reserve.metadata().unwrap().len() >= 1 << 20);
    fill(&disk, &storage);
    // More than the log has room for in blocks that it has already.
    let mut new = Vec::new();
    for number in 10..40 {
        let id = format!("new{number}");
        agent.publish(&Agent::task(&id, "status", number)).await;
        new.push(id);
        if reserve.exists() {
            continue;
        }
        break;
    }
    agent.until_async("the reserve to be given up", async || !reserve.exists()).await;
    agent.until_async("it to be not ready", async || !is_ready(&agent)).await;
    agent.until_async("it to take no more", async || agent.log().contains(r#""reason":"Trouble""#)).await;
    let late = ["late1", "late2"];
    for (number, id) in (50..).zip(late) {
        agent.publish(&Agent::clone_task(id, number, &small, &format!("{number}_app"))).await;
    }
    // What was begun ends, by what the reserve left.
    upstream.behave(Behaviour::Serve);
    let end = agent.end("begun", 0).await;
    assert_eq!(end.status, Status::Succeeded, "{end:?}");
    assert_whole(&projects.join("1_app"), &head);
    // What waited for it was given back.
    assert!(agent.terminal_states("waits", 0).is_empty());
    assert!(late.iter().all(|id| agent.events(id).is_empty()), "nothing new was begun");
    assert!(agent.is_running() && !is_ready(&agent));

    clear(&disk, &storage);
    agent.until_async("it to be ready again", async || is_ready(&agent)).await;
    assert!(reserve.metadata().unwrap().len() >= 1 << 20, "the reserve is held again");
    for id in late.into_iter().chain(["waits"]) {
        assert_eq!(agent.end(id, 0).await.status, Status::Succeeded);
    }
    for id in &new {
        assert_eq!(agent.end(id, 0).await.status, Status::Failed, "there is no such project");
    }
    agent.drained().await;
    agent.signal(rustix::process::Signal::TERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
    for id in late.iter().map(|id| (*id).to_owned()).chain(new).chain(["begun".to_owned(), "waits".to_owned()]) {
        assert_eq!(agent.terminal_states(&id, 0).len(), 1, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_journal_on_a_disk_without_room_is_recovered_with_what_the_reserve_leaves() {
    let place = tempfile::tempdir().unwrap();
    let storage = place.path().join("storage");
    let disk = Disk::new(&storage, 24, 2048);
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_STORAGE_PATH", storage.to_str().unwrap());
    agent.set("AGENT_PROJECTS_PATH", place.path().join("projects").to_str().unwrap());
    agent.set("AGENT_DISK__RESERVE", "0B");
    agent.start(&[]);
    agent.publish(&Agent::clone_task("first", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("first", 0).await.status, Status::Succeeded);
    agent.drained().await;
    agent.kill().await;
    let journal = storage.join(".haul/journal.db");
    let length = journal.metadata().unwrap().len();
    std::fs::File::options().write(true).open(&journal).unwrap().set_len(length - 4096).unwrap();
    fill(&disk, &storage);
    agent.start(&[]);
    agent.until_async("it to be told", async || agent.log().contains("the journal is damaged")).await;
    agent.consuming().await;
    clear(&disk, &storage);
    agent.until_async("it to be ready", async || is_ready(&agent)).await;
    agent.publish(&Agent::task("second", "pull", 1)).await;
    assert_eq!(agent.end("second", 0).await.status, Status::Succeeded);
}
