//! A journal with something of everything in it, as an agent that was killed leaves it and as one that ended well does.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use haul::{
    journal::{Debt, Entry, Envelope, Sighting},
    protocol::{Kind, Status, TaskId, wire::Message},
    store::{Journal, JournalError, SqliteRows, Step},
};
use jiff::Timestamp;

/// Tasks in it.
pub(crate) const TASKS: usize = 240;

/// The journal, twice.
pub(crate) struct Journals {
    place: tempfile::TempDir,
    /// What was ever written of a task.
    pub(crate) versions: BTreeMap<TaskId, Vec<Entry>>,
    /// How many owe something.
    pub(crate) owing: usize,
    pub(crate) last_arrival: i64,
}

pub(crate) fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

/// A file beside `path`, of the same name with this ending.
pub(crate) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

/// The names of the journals that were set aside, the oldest first.
pub(crate) fn aside(path: &Path) -> Vec<String> {
    let names = fs::read_dir(path.parent().unwrap()).unwrap().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let logs = ["-wal", "-shm", "-journal"];
    let mut names: Vec<_> =
        names.filter(|name| name.contains(".damaged-") && !logs.iter().any(|ending| name.ends_with(ending))).collect();
    names.sort();
    names
}

/// What the journal has of a task. Damage is told to whoever meets it first; who asks again is answered.
pub(crate) async fn read(journal: &Journal, task: &TaskId, what: &str) -> Vec<Entry> {
    let step = || journal.step(task, now(), |step| step.page.entries.clone());
    match step().await {
        Ok(entries) => entries,
        Err(JournalError::Damaged { .. }) => step().await.unwrap_or_else(|error| panic!("{what}: {error}")),
        Err(error) => panic!("{what}: {error}"),
    }
}

/// What the journal finds by its indices.
pub(crate) async fn entries(journal: &Journal, what: &str) -> Vec<(TaskId, Entry)> {
    let mut all = Vec::new();
    for _ in 0..2 {
        match (journal.owing().await, journal.running().await) {
            (Ok(owing), Ok(running)) => {
                all.extend(owing);
                all.extend(running);
                return all;
            }
            (Err(JournalError::Damaged { .. }), _) | (_, Err(JournalError::Damaged { .. })) => {}
            (owing, running) => panic!("{what}: {owing:?} {running:?}"),
        }
    }
    panic!("{what}: damaged again and again");
}

fn envelope(text: &str) -> Envelope {
    let body = format!("{{\"text\": \"{}\"}}", text.repeat(30));
    let message = Message { message_id: Some(text.to_owned()), body: body.into(), ..Message::default() };
    Envelope { exchange: "haul.event".to_owned(), routing_key: "n.clone.failed".to_owned(), message }
}

impl Journals {
    pub(crate) async fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let mut journals = Self { place, versions: BTreeMap::new(), owing: 0, last_arrival: 0 };
        let path = journals.place("base");
        let journal = Journal::open(SqliteRows::open(&path).await.unwrap()).await.unwrap();
        journal.set_note("paused", Some("yes")).await.unwrap();
        for number in 0..TASKS {
            journals.write(&journal, number).await;
            if number == TASKS * 5 / 6 {
                // What was written until here has left the log.
                journal.close().await;
                let journal = Journal::open(SqliteRows::open(&path).await.unwrap()).await.unwrap();
                for number in number + 1..TASKS {
                    journals.write(&journal, number).await;
                }
                journals.last_arrival = journal.note("last_arrival").await.unwrap().unwrap().parse().unwrap();
                // What a kill leaves is what is in the files at that moment.
                let killed = journals.place("killed");
                for ending in ["", "-wal", "-shm"] {
                    fs::copy(beside(&path, ending), beside(&killed, ending)).unwrap();
                }
                journal.close().await;
                break;
            }
        }
        assert!(!beside(&path, "-wal").exists(), "it was closed");
        journals
    }

    /// One task on its way, as far as its number says; each step is a commit of its own.
    async fn write(&mut self, journal: &Journal, number: usize) {
        let task = TaskId::new(format!("task-{:03}", (number * 37) % TASKS)).unwrap();
        let steps: &[fn(&mut Step<'_>)] = &[
            |step| {
                let sighting = Sighting {
                    round: 0,
                    digest: "d".repeat(64),
                    kind: Kind::Clone,
                    project: step.next_arrival % 50,
                    generation: None,
                    arrived: None,
                    next_arrival: step.next_arrival,
                    attempt: 1,
                    not_before: None,
                    not_after: None,
                    mark: None,
                    boot: "boot".to_owned(),
                    now: now(),
                };
                step.page.admit(&sighting, &[]);
            },
            |step| assert!(step.page.begin(0, 1, "boot", false)),
            |step| drop(step.page.settle(0, Status::Failed, envelope("event"), Some(envelope("dead")))),
            |step| step.page.strike(0, Debt::DeadLetter, now()),
            |step| step.page.strike(0, Debt::Event, now()),
        ];
        let (released, until) = (number.is_multiple_of(8), if number % 8 < 5 { number % 8 + 1 } else { 5 });
        for step in &steps[..until] {
            let step = *step;
            let noted = journal.step(&task, now(), move |mut of| {
                step(&mut of);
                of.page.entries[0].clone()
            });
            self.versions.entry(task.clone()).or_default().push(noted.await.unwrap());
        }
        if released {
            let noted = journal.step(&task, now(), |of| {
                of.page.release(0, 2, now());
                of.page.entries[0].clone()
            });
            self.versions.get_mut(&task).unwrap().push(noted.await.unwrap());
        }
        self.owing += usize::from(self.versions[&task].last().unwrap().owes());
    }

    /// Where a journal of its own could be.
    pub(crate) fn place(&self, name: &str) -> PathBuf {
        let directory = self.place.path().join(name);
        fs::create_dir(&directory).unwrap();
        directory.join("journal.db")
    }

    fn copy(&self, of: &str, name: &str) -> PathBuf {
        let (from, to) = (self.place.path().join(of).join("journal.db"), self.place(name));
        for ending in ["", "-wal", "-shm"] {
            let _ = fs::copy(beside(&from, ending), beside(&to, ending));
        }
        // Every journal has it beside it; its size does not matter here.
        fs::write(to.with_extension("reserve"), "").unwrap();
        to
    }

    /// As an agent that was killed leaves it.
    pub(crate) fn killed(&self, name: &str) -> PathBuf {
        self.copy("killed", name)
    }

    /// As an agent that ended well leaves it.
    pub(crate) fn closed(&self, name: &str) -> PathBuf {
        self.copy("base", name)
    }

    /// One of both.
    pub(crate) fn either(&self, number: usize) -> PathBuf {
        let name = format!("case{number}");
        if number.is_multiple_of(2) { self.killed(&name) } else { self.closed(&name) }
    }
}

/// Numbers that only the seed decides (xorshift64).
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
