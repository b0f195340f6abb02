//! Journals that are truncated, overwritten, bent or gone: on their own by the hundred, and under a real agent that was
//! killed with tasks in hand. What is read of one is what was written, or nothing; it can be written to again; tasks end.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

#[path = "support/githttp.rs"]
mod githttp;
#[path = "journal_faults/scene.rs"]
mod scene;
mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use githttp::{Behaviour, Server, Upstream};
use haul::{
    protocol::Status,
    store::{Journal, JournalError, Rows as _, SET_ASIDE, SqliteRows},
};
use scene::{Chance, Journals, TASKS, aside, beside, entries, read};
use serde_json::json;
use support::{
    agent::Agent,
    eventually,
    rabbit::Rabbit,
    repository::{Repository, assert_whole},
};

/// Opens a journal that something was done to, reads it, writes to it, opens it again; how many tasks it still knows.
async fn survives(journals: &Journals, path: &Path, what: &str) -> usize {
    let open = || async {
        let rows = SqliteRows::open(path).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        Journal::open(rows).await.unwrap_or_else(|error| panic!("{what}: {error}"))
    };
    let journal = open().await;
    let mut known = 0;
    for (task, versions) in &journals.versions {
        for entry in read(&journal, task, what).await {
            assert!(versions.contains(&entry), "{what}: {task} is not what was written: {entry:#?}");
            known += 1;
        }
    }
    // A damaged one is told of once, and all that is asked after that is answered.
    for (task, entry) in entries(&journal, what).await {
        assert!(journals.versions[&task].contains(&entry), "{what}: {task} owes what it never did");
    }
    journal.set_note("written", Some("after")).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    journal.close().await;
    let journal = open().await;
    assert_eq!(journal.note("written").await.unwrap().as_deref(), Some("after"), "{what}");
    journal.close().await;
    known
}

/// Whether the damage was noticed.
fn told(path: &Path) -> bool {
    !aside(path).is_empty()
}

#[tokio::test]
async fn a_journal_that_nothing_happened_to_is_whole_and_nothing_is_set_aside() {
    let journals = Journals::new().await;
    for path in [journals.killed("k"), journals.closed("c")] {
        assert_eq!(survives(&journals, &path, "whole").await, TASKS);
        assert!(!told(&path));
    }
}

#[tokio::test]
async fn a_journal_that_is_truncated_anywhere_is_survived() {
    let journals = Journals::new().await;
    let mut chance = Chance::new(1);
    let mut saved = 0;
    for number in 0..40 {
        let path = journals.either(number);
        let length = fs::metadata(&path).unwrap().len();
        let left = if number < 4 { number as u64 * 1024 } else { chance.below(length) };
        fs::File::options().write(true).open(&path).unwrap().set_len(left).unwrap();
        let known = survives(&journals, &path, &format!("truncated to {left} of {length}")).await;
        // What the log still has is not lost.
        assert!(
            told(&path) || known == TASKS,
            "truncated to {left} of {length}: {known} rows are left, and nobody says so"
        );
        saved += known;
    }
    assert!(saved > 40 * TASKS / 5, "{saved} of {} rows were saved", 40 * TASKS);
}

#[tokio::test]
async fn a_bit_that_flips_anywhere_is_survived_and_never_believed() {
    let journals = Journals::new().await;
    let mut chance = Chance::new(2);
    let mut saved = 0;
    for number in 0..240 {
        let path = journals.either(number);
        let mut bytes = fs::read(&path).unwrap();
        // A third of them where there is most to break: in the head, the schema and the inner pages.
        let range = if number % 3 == 0 { 8192 } else { bytes.len() as u64 };
        let (place, bit) = (usize::try_from(chance.below(range)).unwrap(), chance.below(8));
        bytes[place] ^= 1 << bit;
        fs::write(&path, bytes).unwrap();
        saved += survives(&journals, &path, &format!("bit {bit} of byte {place} flipped")).await;
    }
    assert!(saved > 240 * TASKS * 4 / 5, "{saved} of {} rows were saved", 240 * TASKS);
}

#[tokio::test]
async fn pages_that_are_zeroed_or_full_of_noise_are_survived() {
    let journals = Journals::new().await;
    let mut chance = Chance::new(3);
    let mut saved = 0;
    for number in 0..60 {
        let path = journals.either(number);
        let mut bytes = fs::read(&path).unwrap();
        let pages = 1 + chance.below(3);
        for _ in 0..pages {
            let page = usize::try_from(chance.below(bytes.len() as u64 / 4096)).unwrap() * 4096;
            for byte in &mut bytes[page..page + 4096] {
                *byte = if number % 4 < 2 { 0 } else { u8::try_from(chance.below(256)).unwrap() };
            }
        }
        fs::write(&path, bytes).unwrap();
        saved += survives(&journals, &path, &format!("{pages} pages overwritten, case {number}")).await;
    }
    assert!(saved > 60 * TASKS / 2, "{saved} of {} rows were saved", 60 * TASKS);
}

#[tokio::test]
async fn a_log_that_is_cut_short_is_noticed_wherever_it_is_cut() {
    let journals = Journals::new().await;
    let mut chance = Chance::new(4);
    for number in 0..30 {
        let path = journals.killed(&format!("cut{number}"));
        let log = beside(&path, "-wal");
        let length = fs::metadata(&log).unwrap().len();
        let left = if number == 0 { 0 } else { chance.below(length) };
        fs::File::options().write(true).open(&log).unwrap().set_len(left).unwrap();
        survives(&journals, &path, &format!("log cut to {left} of {length}")).await;
        assert!(told(&path), "a log cut to {left} of {length} was not noticed");
    }
}

#[tokio::test]
async fn a_bit_that_flips_in_the_log_is_noticed() {
    let journals = Journals::new().await;
    let mut chance = Chance::new(5);
    for number in 0..40 {
        let path = journals.killed(&format!("log{number}"));
        let log = beside(&path, "-wal");
        let mut bytes = fs::read(&log).unwrap();
        let place =
            usize::try_from(if number < 8 { chance.below(32) } else { chance.below(bytes.len() as u64) }).unwrap();
        bytes[place] ^= 1 << chance.below(8);
        fs::write(&log, bytes).unwrap();
        survives(&journals, &path, &format!("byte {place} of the log flipped")).await;
        // One whose head is bent looks like one that was begun anew: what was written before is believed, row by row.
        assert!(told(&path) || place < 32, "byte {place} of the log");
    }
}

#[tokio::test]
async fn a_log_that_is_gone_is_noticed() {
    let journals = Journals::new().await;
    let path = journals.killed("gone");
    fs::remove_file(beside(&path, "-wal")).unwrap();
    survives(&journals, &path, "log gone").await;
    assert!(told(&path));
    // With its index gone too it looks like one that was closed: what is there is believed, row by row.
    let path = journals.killed("both");
    for ending in ["-wal", "-shm"] {
        fs::remove_file(beside(&path, ending)).unwrap();
    }
    survives(&journals, &path, "log and index gone").await;
}

#[tokio::test]
async fn a_journal_that_is_gone_or_empty_is_begun_anew_and_told_of() {
    let journals = Journals::new().await;
    let path = journals.killed("gone");
    fs::remove_file(&path).unwrap();
    assert_eq!(survives(&journals, &path, "gone").await, 0);
    let rows = SqliteRows::open(&path).await.unwrap();
    let journal = Journal::open(rows).await.unwrap();
    assert!(journal.note(SET_ASIDE).await.unwrap().is_some());
    // Its log is kept for a look all the same.
    assert!(fs::read_dir(path.parent().unwrap()).unwrap().flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.contains(".damaged-") && name.ends_with("-wal")
    }));
    let path = journals.killed("empty");
    fs::write(&path, "").unwrap();
    assert_eq!(survives(&journals, &path, "empty").await, 0);
    assert!(told(&path));
    // Where nothing was before, there is nothing to tell.
    let first = journals.place("first");
    assert_eq!(survives(&journals, &first, "first").await, 0);
    let journal = Journal::open(SqliteRows::open(&first).await.unwrap()).await.unwrap();
    assert_eq!(journal.note(SET_ASIDE).await.unwrap(), None);
}

#[tokio::test]
async fn what_is_owed_and_what_is_noted_is_saved_where_it_can_be_read() {
    let journals = Journals::new().await;
    let path = journals.killed("debts");
    // Its last page holds none of what matters, by the order in which it was written.
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 4096;
    bytes[last..].fill(0xa5);
    fs::write(&path, bytes).unwrap();
    survives(&journals, &path, "last page").await;
    let journal = Journal::open(SqliteRows::open(&path).await.unwrap()).await.unwrap();
    assert_eq!(journal.note("paused").await.unwrap().as_deref(), Some("yes"));
    let owing: BTreeMap<_, _> = journal.owing().await.unwrap().into_iter().collect();
    assert!(owing.len() * 10 >= journals.owing * 8, "{} of {} debts", owing.len(), journals.owing);
    let last: i64 = journal.note("last_arrival").await.unwrap().unwrap().parse().unwrap();
    assert_eq!(last, journals.last_arrival, "the order of arrival goes on");
}

#[tokio::test]
async fn a_journal_of_a_later_version_is_refused_and_left_alone() {
    let journals = Journals::new().await;
    let path = journals.closed("later");
    let mut bytes = fs::read(&path).unwrap();
    // SQLite's own place for both numbers.
    assert_eq!(bytes[60..64], 1_u32.to_be_bytes());
    bytes[60..64].copy_from_slice(&2_u32.to_be_bytes());
    bytes[68..72].copy_from_slice(&0x4861_0002_u32.to_be_bytes());
    fs::write(&path, &bytes).unwrap();
    let refused = SqliteRows::open(&path).await.err().unwrap();
    assert!(matches!(refused, JournalError::Later { version: 2, .. }), "{refused}");
    assert!(!told(&path));
    assert_eq!(fs::read(&path).unwrap().len(), bytes.len());
}

/// A journal as one was made before versions were written, in a table without row numbers.
async fn of_before(journals: &Journals, name: &str) -> PathBuf {
    use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};
    let path = journals.closed(&format!("{name}-now"));
    let old = journals.place(name);
    let mut source = SqliteConnectOptions::new().filename(&path).create_if_missing(true).connect().await.unwrap();
    let attach = format!("ATTACH '{}' AS old", old.display());
    for sql in [
        attach.as_str(),
        "CREATE TABLE old.entry (task TEXT NOT NULL, round INTEGER NOT NULL, seen INTEGER NOT NULL, \
         owes INTEGER NOT NULL, waiting_clone INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY (task, round)) \
         WITHOUT ROWID",
        "CREATE TABLE old.note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "INSERT INTO old.entry SELECT task, round, seen, owes, waiting_clone, body FROM main.entry",
        "INSERT INTO old.note SELECT name, value FROM main.note",
    ] {
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut source).await.unwrap();
    }
    source.close().await.unwrap();
    old
}

#[tokio::test]
async fn a_journal_of_before_versions_were_written_is_taken_over() {
    let journals = Journals::new().await;
    let old = of_before(&journals, "old").await;
    assert_eq!(survives(&journals, &old, "an earlier one").await, TASKS);
    assert!(!told(&old));
}

#[tokio::test]
async fn a_damaged_journal_without_row_numbers_is_saved_from_both_ends() {
    let journals = Journals::new().await;
    let mut saved = 0;
    for number in 0..8 {
        let old = of_before(&journals, &format!("old{number}")).await;
        assert_eq!(survives(&journals, &old, "an earlier one").await, TASKS);
        let mut bytes = fs::read(&old).unwrap();
        let pages = bytes.len() / 4096;
        let page = (pages / 4 + number * pages / 16) * 4096;
        bytes[page..page + 4096].fill(0);
        fs::write(&old, bytes).unwrap();
        saved += survives(&journals, &old, &format!("page at {page} zeroed")).await;
    }
    assert!(saved > 8 * TASKS * 2 / 3, "{saved} of {} rows were saved", 8 * TASKS);
}

#[tokio::test]
async fn of_damaged_journals_the_newest_three_are_kept() {
    let journals = Journals::new().await;
    let path = journals.closed("many");
    let mut names = Vec::new();
    for number in 0..5 {
        fs::write(&path, format!("no journal {number}").repeat(1000)).unwrap();
        SqliteRows::open(&path).await.unwrap().close().await;
        names.extend(aside(&path).into_iter().filter(|name| !names.contains(name)).collect::<Vec<_>>());
    }
    assert_eq!(names.len(), 5);
    assert_eq!(aside(&path), names[2..]);
    assert!(fs::read_to_string(path.parent().unwrap().join(&names[4])).unwrap().starts_with("no journal 4"));
}

#[tokio::test]
async fn a_recovery_that_a_crash_cut_short_is_ended_by_the_next_start() {
    let journals = Journals::new().await;
    // Before the damaged one was moved: it is looked at again.
    let path = journals.closed("before");
    fs::copy(&path, beside(&path, ".salvaged")).unwrap();
    fs::write(&path, "no journal".repeat(1000)).unwrap();
    assert_eq!(survives(&journals, &path, "before").await, 0);
    assert!(told(&path) && !beside(&path, ".salvaged").exists());
    // After that: what was made takes its place.
    let path = journals.closed("after");
    fs::rename(&path, beside(&path, ".salvaged")).unwrap();
    assert_eq!(survives(&journals, &path, "after").await, TASKS);
    // In the making of it.
    let path = journals.closed("making");
    fs::write(beside(&path, ".salvaging"), "half").unwrap();
    assert_eq!(survives(&journals, &path, "making").await, TASKS);
}

#[tokio::test]
async fn damage_that_is_found_while_it_runs_is_told_once_and_the_journal_goes_on() {
    let journals = Journals::new().await;
    for (case, mode) in ["noise", "zeroes", "cut"].into_iter().enumerate() {
        let path = journals.closed(&format!("running{case}"));
        let journal = Journal::open(SqliteRows::open(&path).await.unwrap()).await.unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        let length = file.metadata().unwrap().len();
        if mode == "cut" {
            file.set_len(8192).unwrap();
        } else {
            let noise = vec![if mode == "noise" { 0x5a } else { 0 }; usize::try_from(length - 8192).unwrap()];
            std::os::unix::fs::FileExt::write_all_at(&file, &noise, 8192).unwrap();
        }
        let mut refused = 0;
        for (task, versions) in &journals.versions {
            let step = || journal.step(task, scene::now(), |step| step.page.entries.clone());
            let found = match step().await {
                Ok(found) => found,
                Err(error) => {
                    assert!(matches!(error, JournalError::Damaged { .. }), "{mode}: {error}");
                    refused += 1;
                    step().await.unwrap()
                }
            };
            assert!(found.iter().all(|entry| versions.contains(entry)), "{mode}");
        }
        assert_eq!(refused, 1, "{mode}");
        assert!(told(&path) && journal.note(SET_ASIDE).await.unwrap().is_some(), "{mode}");
        journal.set_note("n", Some("v")).await.unwrap();
        journal.close().await;
        let journal = Journal::open(SqliteRows::open(&path).await.unwrap()).await.unwrap();
        assert_eq!(journal.note("n").await.unwrap().as_deref(), Some("v"), "{mode}");
    }
}

/// What is done to the journal of an agent that was killed.
#[derive(Clone, Copy, Debug)]
enum Harm {
    Garbage,
    Truncated,
    Empty,
    Gone,
    LogGone,
    LogCut,
    Page,
}

impl Harm {
    fn befall(self, journal: &Path) {
        let cut = |path: &Path, part: u64| {
            let file = fs::File::options().write(true).open(path).unwrap();
            file.set_len(file.metadata().unwrap().len() / part).unwrap();
        };
        let log = beside(journal, "-wal");
        match self {
            Self::Garbage => {
                for file in [journal, &log] {
                    fs::write(file, "garbage".repeat(9000)).unwrap();
                }
            }
            Self::Truncated => {
                for file in [journal, &log] {
                    cut(file, 2);
                }
            }
            Self::Empty => fs::write(journal, "").unwrap(),
            Self::Gone => fs::remove_file(journal).unwrap(),
            Self::LogGone => fs::remove_file(log).unwrap(),
            Self::LogCut => cut(&log, 3),
            Self::Page => {
                fs::remove_file(&log).unwrap();
                let mut bytes = fs::read(journal).unwrap();
                bytes[4096..].fill(0);
                fs::write(journal, bytes).unwrap();
            }
        }
    }
}

/// An agent with a project at generation 5, a clone that runs, one that waits for its retry, a pull behind that, and a
/// task that waits; it is killed, harm is done to its journal, and it starts again.
async fn ends_all_after(harm: Harm) {
    let repository = Upstream::new();
    let head = repository.commit("main", &[("a.txt", "hello\n")]);
    let upstream = Server::start(repository.root());
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.set("AGENT_SLOTS", "3");
    agent.start(&[]);
    let applied = Repository::new();
    let generation = |id: &str, generation: u64, upstream: &Repository| {
        let mut task = Agent::clone_task(id, 5, upstream, "5_app");
        task["generation"] = generation.into();
        task
    };
    agent.publish(&generation("newest", 5, &applied)).await;
    assert_eq!(agent.end("newest", 0).await.status, Status::Succeeded);
    agent.drained().await;

    upstream.behave(Behaviour::HoldPack);
    let clone = |id: &str, project: i64, url: &str| {
        json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project, "git_url": url,
               "target_path": format!("{project}_app")})
    };
    agent.publish(&clone("runs", 1, &upstream.url("app.git"))).await;
    eventually("the clone waits for its pack", async || upstream.counts().packs == 1).await;
    agent.publish(&Agent::task("waits", "status", 1)).await;
    agent.saw("waits", Status::Accepted).await;
    // Nobody listens on port 1 yet, and nobody ever will: it is retried and then fails.
    agent.publish(&clone("retried", 2, "http://127.0.0.1:1/x.git")).await;
    agent.saw("retried", Status::Retrying).await;
    agent.publish(&Agent::task("behind", "pull", 2)).await;
    agent.kill().await;
    harm.befall(&agent.storage.path().join(".haul/journal.db"));
    upstream.behave(Behaviour::Serve);
    agent.set("AGENT_RETRY__MAX_ATTEMPTS", "3");
    agent.start(&[]);
    agent.ready().await;

    assert!(agent.log().contains("the journal is damaged"), "{harm:?}: {}", agent.log());
    for (id, expected) in [
        ("runs", Status::Succeeded),
        ("waits", Status::Succeeded),
        ("retried", Status::Failed),
        ("behind", Status::Failed),
    ] {
        let end = agent.end(id, 0).await;
        assert_eq!(end.status, expected, "{harm:?}: {end:?}");
    }
    assert_whole(&agent.projects().join("1_app"), &head);
    // What was applied is known from the project itself: an older task does nothing to it, a newer one does.
    let tip = applied.commit("README", "newer\n");
    agent.publish(&generation("older", 4, &applied)).await;
    assert_eq!(agent.end("older", 0).await.status, Status::Superseded, "{harm:?}");
    let mut newer = Agent::task("newer", "pull", 5);
    newer["generation"] = 6.into();
    agent.publish(&newer).await;
    assert_eq!(agent.end("newer", 0).await.result.unwrap().head, Some(tip), "{harm:?}");

    agent.control(&json!({"v": 1, "command": "inspect", "control_id": "c"})).await;
    assert!(agent.answered("state").await.journal_set_aside.is_some(), "{harm:?}");
    agent.drained().await;
    agent.signal(rustix::process::Signal::TERM);
    assert!(agent.ended().await.success(), "{}", agent.log());
    for id in ["newest", "runs", "waits", "retried", "behind", "older", "newer"] {
        let states = agent.terminal_states(id, 0);
        assert_eq!(states.len(), 1, "{harm:?}: {id}: {states:?}");
    }
}

macro_rules! harm {
    ($($test:ident: $harm:ident;)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() { ends_all_after(Harm::$harm).await; })*
    };
}

harm! {
    an_agent_whose_journal_is_garbage_ends_every_task: Garbage;
    an_agent_whose_journal_is_truncated_ends_every_task: Truncated;
    an_agent_whose_journal_is_empty_ends_every_task: Empty;
    an_agent_whose_journal_is_gone_ends_every_task: Gone;
    an_agent_whose_log_is_gone_ends_every_task: LogGone;
    an_agent_whose_log_is_cut_short_ends_every_task: LogCut;
    an_agent_whose_pages_are_zeroed_ends_every_task: Page;
}

#[tokio::test]
async fn an_agent_refuses_a_journal_of_a_later_version_in_a_sentence() {
    let journals = Journals::new().await;
    let mut agent = Agent::new(Rabbit::shared()).await;
    let directory = agent.storage.path().join(".haul");
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("journal.db");
    fs::copy(journals.closed("later"), &path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[60..64].copy_from_slice(&7_u32.to_be_bytes());
    bytes[68..72].copy_from_slice(&0x4861_0007_u32.to_be_bytes());
    fs::write(&path, &bytes).unwrap();
    agent.start(&[]);
    assert_eq!(agent.ended().await.code(), Some(1));
    assert!(agent.log().contains("version 7, which a later agent wrote"), "{}", agent.log());
}
