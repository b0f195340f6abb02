//! One suite for both backends of the journal, and what only the one on disk can show.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, sync::atomic::Ordering};

use haul::{
    journal::{Admission, Concluded, Debt, Entry, Envelope, Sighting},
    protocol::{Kind, Place, Status, TaskId, wire::Message},
    store::{Journal, JournalError, MemoryRows, Rows, SqliteRows, Write},
};
use jiff::{SignedDuration, Timestamp};

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn task(name: &str) -> TaskId {
    TaskId::new(name).unwrap()
}

fn envelope(text: &str) -> Envelope {
    let message = Message { message_id: Some(text.to_owned()), ..Message::default() };
    Envelope { exchange: "haul.event".to_owned(), routing_key: "n.clone.failed".to_owned(), message }
}

fn sighting(kind: Kind, next_arrival: i64) -> Sighting {
    Sighting {
        round: 0,
        digest: "digest".to_owned(),
        kind,
        project: 7,
        generation: None,
        arrived: None,
        next_arrival,
        attempt: 1,
        not_before: None,
        not_after: None,
        mark: None,
        boot: "boot".to_owned(),
        now: now(),
    }
}

async fn admit(journal: &Journal, id: &TaskId, kind: Kind) -> Admission {
    let admitted = journal.step(id, now(), move |step| {
        let sighting = sighting(kind, step.next_arrival);
        let clones = (step.clones)(sighting.project);
        step.page.admit(&sighting, &clones).0
    });
    admitted.await.unwrap()
}

async fn on_disk(path: &Path) -> Journal {
    Journal::open(SqliteRows::open(path).await.unwrap()).await.unwrap()
}

async fn a_settled_task_is_remembered_with_its_debts(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    let id = task("settled");
    assert!(matches!(admit(&journal, &id, Kind::Clone).await, Admission::Fresh(_)));
    let settled =
        journal.step(&id, now(), |step| step.page.settle(0, Status::Failed, envelope("event"), Some(envelope("dead"))));
    assert_eq!(settled.await.unwrap(), Concluded::Now);
    assert_eq!(journal.owing().await.unwrap().len(), 1);
    journal.step(&id, now(), |step| step.page.strike(0, Debt::DeadLetter, now())).await.unwrap();
    let Admission::Settled(entry) = admit(&journal, &id, Kind::Clone).await else { panic!("not settled") };
    assert_eq!(entry.debts(), [(Debt::Event, envelope("event").into())]);
    journal.step(&id, now(), |step| step.page.strike(0, Debt::Event, now())).await.unwrap();
    assert!(journal.owing().await.unwrap().is_empty());
    assert!(matches!(admit(&journal, &id, Kind::Clone).await, Admission::Settled(_)));
}

async fn arrivals_are_unique_and_ascending(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    let mut last = 0;
    for number in 0..50 {
        let Admission::Fresh(ticket) = admit(&journal, &task(&format!("t{number}")), Kind::Pull).await else {
            panic!("not fresh")
        };
        assert!(ticket.place.arrived > last, "two tasks in one microsecond share a place");
        last = ticket.place.arrived;
    }
}

async fn a_pull_waits_behind_a_released_clone(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    let clone = task("clone");
    admit(&journal, &clone, Kind::Clone).await;
    journal.step(&clone, now(), |step| step.page.release(0, 2, now())).await.unwrap();
    assert!(matches!(admit(&journal, &task("pull"), Kind::Pull).await, Admission::Behind(_)));
    journal.step(&clone, now(), |step| step.page.settle(0, Status::Failed, envelope("e"), None)).await.unwrap();
    assert!(matches!(admit(&journal, &task("pull"), Kind::Pull).await, Admission::Fresh(_)));
}

async fn only_what_is_old_and_paid_is_pruned(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    for name in ["paid", "owing"] {
        admit(&journal, &task(name), Kind::Delete).await;
        let settle = |step: haul::store::Step<'_>| step.page.settle(0, Status::Succeeded, envelope("e"), None);
        journal.step(&task(name), now(), settle).await.unwrap();
    }
    journal.step(&task("paid"), now(), |step| step.page.strike(0, Debt::Event, now())).await.unwrap();
    assert_eq!(journal.prune(now()).await.unwrap(), 0, "nothing is older than now");
    assert_eq!(journal.prune(now() + SignedDuration::from_secs(1)).await.unwrap(), 1);
    assert!(matches!(admit(&journal, &task("paid"), Kind::Delete).await, Admission::Fresh(_)));
    assert!(matches!(admit(&journal, &task("owing"), Kind::Delete).await, Admission::Settled(_)));
}

async fn notes_are_kept_and_forgotten(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    assert_eq!(journal.note("paused").await.unwrap(), None);
    journal.set_note("paused", Some("yes")).await.unwrap();
    assert_eq!(journal.note("paused").await.unwrap().as_deref(), Some("yes"));
    journal.set_note("paused", None).await.unwrap();
    assert_eq!(journal.note("paused").await.unwrap(), None);
}

async fn a_batch_of_any_size_is_written_whole(rows: impl Rows) {
    let mut rows = rows;
    // Around the sizes of statements, and several of the largest.
    for size in [0, 1, 3, 12, 13, 256, 257, 700] {
        let place = Place { generation: None, arrived: 1 };
        let entry = |round| Entry::new(round, "d".to_owned(), Kind::Pull, 1, place, now());
        let id = task(&format!("batch-{size}"));
        let mut batch: Vec<_> = (0..size).map(|round| Write::Entry(id.clone(), Box::new(entry(round)))).collect();
        // Of what is written twice the last counts, and a note may come and go.
        if size > 1 {
            let last = Entry { attempt: 7, ..entry(0) };
            batch.push(Write::Entry(id.clone(), Box::new(last)));
        }
        let notes = (0..6).map(|note| Write::Note(format!("n{note}"), Some(size.to_string())));
        batch.extend(notes.take(usize::try_from(size % 7).unwrap()));
        batch.push(Write::Note("gone".to_owned(), Some("here".to_owned())));
        batch.push(Write::Note("gone".to_owned(), None));
        rows.write(&batch).await.unwrap();
        let found = rows.entries_of(&[task("nobody"), id.clone()]).await.unwrap();
        assert!(found.iter().map(|(_, entry)| entry.round).eq(0..size), "a batch of {size}");
        assert!(found.iter().all(|(of, _)| *of == id));
        assert_eq!(found.first().map(|(_, entry)| entry.attempt), [None, Some(0), Some(7)][size.min(2) as usize]);
        if size % 7 > 0 {
            assert_eq!(rows.note("n0").await.unwrap(), Some(size.to_string()));
        }
        assert_eq!(rows.note("gone").await.unwrap(), None);
    }
}

async fn tasks_that_come_together_share_what_is_read_and_written(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    let ids: Vec<TaskId> = (0..600).map(|number| task(&format!("t{number}"))).collect();
    for expected_attempt in 0..2 {
        let steps = ids.iter().map(|id| {
            journal.step(id, now(), move |step| {
                let sighting = sighting(Kind::Pull, step.next_arrival);
                let before = step.page.round(0).map_or(0, |entry| entry.attempt);
                let admission = step.page.admit(&sighting, &[]).0;
                step.page.begin(0, before + 1, "boot", false);
                // Held by nobody here: its page is read again the next time.
                step.page.release(0, 1, now());
                (before, admission)
            })
        });
        for answer in futures_util::future::join_all(steps).await {
            let (before, admission) = answer.unwrap();
            assert!(before == expected_attempt && matches!(admission, Admission::Fresh(_)), "{before} {admission:?}");
        }
    }
}

async fn what_runs_is_known_after_a_crash(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    for name in ["runs", "waits", "ended"] {
        admit(&journal, &task(name), Kind::Clone).await;
    }
    for name in ["runs", "ended"] {
        assert!(journal.step(&task(name), now(), |step| step.page.begin(0, 1, "boot", false)).await.unwrap());
    }
    let settle = |step: haul::store::Step<'_>| step.page.settle(0, Status::Succeeded, envelope("e"), None);
    journal.step(&task("ended"), now(), settle).await.unwrap();
    let running: Vec<_> = journal.running().await.unwrap().into_iter().map(|(task, _)| task).collect();
    assert_eq!(running, [task("runs")]);
}

async fn a_step_that_panics_changes_nothing_and_harms_nobody(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    admit(&journal, &task("t"), Kind::Clone).await;
    let id = task("t");
    let broken = journal.step(&id, now(), |step| {
        step.page.settle(0, Status::Failed, envelope("e"), None);
        assert!(step.page.highest().is_none(), "told to panic");
    });
    assert!(matches!(broken.await, Err(JournalError::Broken)));
    assert!(matches!(admit(&journal, &task("t"), Kind::Clone).await, Admission::Fresh(_)));
}

async fn a_cancel_whose_task_never_comes_is_forgotten(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    for name in ["old", "new"] {
        let at = if name == "old" { now() - SignedDuration::from_secs(9) } else { now() };
        journal.step(&task(name), at, |step| step.page.cancel()).await.unwrap();
    }
    journal.prune(now()).await.unwrap();
    assert!(matches!(admit(&journal, &task("old"), Kind::Clone).await, Admission::Fresh(_)));
    assert!(matches!(admit(&journal, &task("new"), Kind::Clone).await, Admission::Cancelled(_)));
}

async fn nothing_is_asked_of_a_journal_that_was_closed(rows: impl Rows) {
    let journal = Journal::open(rows).await.unwrap();
    journal.set_note("n", Some("kept")).await.unwrap();
    journal.close().await;
    assert!(matches!(journal.note("n").await, Err(JournalError::Closed)));
    assert!(journal.is_closed());
}

macro_rules! both {
    ($($name:ident),*) => {
        mod in_memory {
            $(#[tokio::test] async fn $name() { super::$name(haul::store::MemoryRows::default()).await; })*
        }
        mod on_sqlite {
            $(#[tokio::test] async fn $name() {
                let dir = tempfile::tempdir().unwrap();
                super::$name(haul::store::SqliteRows::open(&dir.path().join("journal.db")).await.unwrap()).await;
            })*
        }
    };
}
both!(
    a_settled_task_is_remembered_with_its_debts,
    arrivals_are_unique_and_ascending,
    a_pull_waits_behind_a_released_clone,
    only_what_is_old_and_paid_is_pruned,
    notes_are_kept_and_forgotten,
    a_batch_of_any_size_is_written_whole,
    tasks_that_come_together_share_what_is_read_and_written,
    what_runs_is_known_after_a_crash,
    a_step_that_panics_changes_nothing_and_harms_nobody,
    a_cancel_whose_task_never_comes_is_forgotten,
    nothing_is_asked_of_a_journal_that_was_closed
);

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal.db");
    let first = on_disk(&path).await;
    let Admission::Fresh(before) = admit(&first, &task("t"), Kind::Clone).await else { panic!("not fresh") };
    first.step(&task("later"), now(), |step| step.page.cancel()).await.unwrap();
    first.step(&task("t"), now(), |step| step.page.release(0, 2, now())).await.unwrap();
    drop(first);
    let second = on_disk(&path).await;
    assert!(matches!(admit(&second, &task("later"), Kind::Clone).await, Admission::Cancelled(_)));
    assert!(matches!(admit(&second, &task("t"), Kind::Clone).await, Admission::Released));
    let Admission::Behind(after) = admit(&second, &task("p"), Kind::Pull).await else { panic!("not behind") };
    assert!(after.place.arrived > before.place.arrived, "arrival goes on where it was");
}

#[tokio::test]
async fn a_journal_that_cannot_write_says_so_and_keeps_nothing_of_the_step() {
    let rows = MemoryRows::default();
    let full = rows.full_switch();
    let journal = Journal::open(rows).await.unwrap();
    full.store(true, Ordering::SeqCst);
    let id = task("t");
    let refused = journal.step(&id, now(), |step| {
        let sighting = sighting(Kind::Clone, step.next_arrival);
        step.page.admit(&sighting, &[]).0
    });
    assert!(refused.await.is_err());
    full.store(false, Ordering::SeqCst);
    let known = journal.step(&task("t"), now(), |step| step.page.highest()).await.unwrap();
    assert_eq!(known, None);
}

/// A disk that is full until its reserve is given up.
#[derive(Default)]
struct FullDisk {
    rows: MemoryRows,
    relieved: bool,
}

#[async_trait::async_trait]
impl Rows for FullDisk {
    async fn write(&mut self, batch: &[Write]) -> Result<(), JournalError> {
        if !self.relieved {
            let reason = "database or disk is full".to_owned();
            return Err(JournalError::Database { path: "disk".to_owned(), doing: "written", reason });
        }
        self.rows.write(batch).await
    }
    async fn relieve(&mut self) -> bool {
        !std::mem::replace(&mut self.relieved, true)
    }
    async fn replenish(&mut self) -> Result<(), JournalError> {
        self.rows.replenish().await
    }
    async fn entries(&mut self, task: &TaskId) -> Result<Vec<Entry>, JournalError> {
        self.rows.entries(task).await
    }
    async fn owing(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.rows.owing().await
    }
    async fn waiting_clones(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.rows.waiting_clones().await
    }
    async fn running(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.rows.running().await
    }
    async fn note(&mut self, name: &str) -> Result<Option<String>, JournalError> {
        self.rows.note(name).await
    }
    async fn notes(&mut self, prefix: &str) -> Result<Vec<(String, String)>, JournalError> {
        self.rows.notes(prefix).await
    }
    async fn prune(&mut self, limit: Timestamp, most: u32) -> Result<u64, JournalError> {
        self.rows.prune(limit, most).await
    }
}

#[tokio::test]
async fn on_a_full_disk_the_reserve_is_given_up_for_what_was_begun() {
    let journal = Journal::open(FullDisk::default()).await.unwrap();
    assert!(!*journal.strained().borrow());
    assert!(matches!(admit(&journal, &task("t"), Kind::Clone).await, Admission::Fresh(_)));
    assert!(*journal.strained().borrow(), "whoever takes tasks has to know");
    assert!(matches!(admit(&journal, &task("t"), Kind::Clone).await, Admission::Fresh(_)));
    journal.probe().await.unwrap();
    assert!(!*journal.strained().borrow());
}

#[tokio::test]
async fn the_journal_on_disk_holds_a_reserve_and_takes_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal.db");
    let mut rows = SqliteRows::open(&path).await.unwrap();
    let reserve = path.with_extension("reserve");
    assert!(reserve.metadata().unwrap().len() >= 1 << 20);
    assert!(rows.relieve().await && !reserve.exists());
    assert!(!rows.relieve().await, "there is nothing left to give up");
    rows.replenish().await.unwrap();
    assert!(reserve.exists());
}

#[tokio::test]
async fn steps_that_come_together_share_a_commit_and_each_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let journal = on_disk(&dir.path().join("journal.db")).await;
    let steps = (0..300).map(|number| {
        let journal = journal.clone();
        tokio::spawn(async move { admit(&journal, &task(&format!("t{number}")), Kind::Status).await })
    });
    for step in steps.collect::<Vec<_>>() {
        assert!(matches!(step.await.unwrap(), Admission::Fresh(_)));
    }
}
