//! The journal on disk: one writer, group commit.
//!
//! Every step loads one task's [`Page`], lets a pure function decide and note, and is answered only after the commit
//! that made it durable. Steps that arrive while a commit is under way share the next one.

mod cache;
pub mod memory;
pub mod sqlite;

use std::collections::{BTreeSet, HashMap};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};

pub use memory::MemoryRows;
pub use sqlite::SqliteRows;

use crate::{
    journal::{Entry, Key, Page, WaitingClone},
    protocol::{ProjectId, TaskId},
};

/// Steps that one commit carries at most: bounds the time that the first of them waits.
const LARGEST_BATCH: usize = 512;

/// Why the journal could not be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum JournalError {
    /// The database refused; on a full disk this is the first thing to see.
    #[error("the journal at {path} cannot be {doing}: {reason}")]
    Database {
        /// The database.
        path: String,
        /// What we wanted.
        doing: &'static str,
        /// The database's words.
        reason: String,
    },
    /// The writer has ended.
    #[error("the journal is closed")]
    Closed,
}

/// One thing that a batch writes.
#[derive(Clone, Debug)]
pub enum Write {
    /// An entry of a task.
    Entry(TaskId, Box<Entry>),
    /// A value kept beside the pages; without one it is forgotten.
    Note(String, Option<String>),
}

/// Where pages are kept. Two backends: [`SqliteRows`] on disk, [`MemoryRows`] for pipeline tests and the embedded demo.
#[async_trait]
pub trait Rows: Send + 'static {
    /// Writes a batch durably: all of it or, with an error, nothing.
    async fn write(&mut self, batch: &[Write]) -> Result<(), JournalError>;
    /// Gives up what was held back for a full disk; false if there is nothing left to give up.
    async fn relieve(&mut self) -> bool;
    /// Holds it back again, once there is room; an error while there is none.
    async fn replenish(&mut self) -> Result<(), JournalError>;
    /// The entries of a task.
    async fn entries(&mut self, task: &TaskId) -> Result<Vec<Entry>, JournalError>;
    /// The entries of several tasks, each task's rounds ascending; in one question where the backend can.
    async fn entries_of(&mut self, tasks: &[TaskId]) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        let mut found = Vec::new();
        for task in tasks {
            found.extend(self.entries(task).await?.into_iter().map(|entry| (task.clone(), entry)));
        }
        Ok(found)
    }
    /// Every entry that owes something.
    async fn owing(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError>;
    /// Every clone that waits for a retry.
    async fn waiting_clones(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError>;
    /// A value kept beside the pages.
    async fn note(&mut self, name: &str) -> Result<Option<String>, JournalError>;
    /// The names of notes with this beginning.
    async fn notes(&mut self, prefix: &str) -> Result<Vec<String>, JournalError>;
    /// Removes up to `most` entries last seen before `limit` that owe nothing.
    async fn prune(&mut self, limit: Timestamp, most: u32) -> Result<u64, JournalError>;
}

/// The journal: a handle to its writer. Cheap to clone.
#[derive(Clone)]
pub struct Journal {
    steps: mpsc::Sender<Request>,
}

/// What a step sees and may change.
pub struct Step<'a> {
    /// The task's page.
    pub page: &'a mut Page,
    /// Clones of the task's project that wait for a retry.
    pub clones: &'a dyn Fn(ProjectId) -> Vec<WaitingClone>,
    /// A unique order of arrival, not before `now`.
    pub next_arrival: i64,
}

type Answer = Box<dyn FnOnce(Result<(), JournalError>) + Send>;
type Decide = Box<dyn FnOnce(Step<'_>) -> Answer + Send>;
type Reply<A> = oneshot::Sender<Result<A, JournalError>>;

enum Request {
    Step { task: TaskId, now: Timestamp, decide: Decide },
    SetNote { name: String, value: Option<String>, reply: Reply<()> },
    Note { name: String, reply: Reply<Option<String>> },
    Owing { reply: Reply<Vec<(TaskId, Entry)>> },
    Prune { limit: Timestamp, reply: Reply<u64> },
    Probe { reply: Reply<()> },
}

impl Journal {
    /// Starts the writer over `rows`.
    ///
    /// # Errors
    /// When what it needs at start cannot be read.
    pub async fn open(mut rows: impl Rows) -> Result<Self, JournalError> {
        let state = State::load(&mut rows).await?;
        let (steps, requests) = mpsc::channel(4 * LARGEST_BATCH);
        tokio::spawn(write(rows, state, requests));
        Ok(Self { steps })
    }

    /// Runs one step on a task's page and returns its answer once it is durable.
    ///
    /// # Errors
    /// When the commit failed: nothing of the step holds.
    pub async fn step<A: Send + 'static>(
        &self,
        task: &TaskId,
        now: Timestamp,
        decide: impl FnOnce(Step<'_>) -> A + Send + 'static,
    ) -> Result<A, JournalError> {
        let (reply, answer) = oneshot::channel();
        let decide: Decide = Box::new(move |step| {
            let decided = decide(step);
            // The receiver may be gone: its task was stopped, and nobody waits for the answer.
            Box::new(move |committed| drop(reply.send(committed.map(|()| decided))))
        });
        self.send(Request::Step { task: task.clone(), now, decide }).await?;
        answer.await.map_err(|_| JournalError::Closed)?
    }

    /// Every entry that owes something.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn owing(&self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.ask(|reply| Request::Owing { reply }).await
    }

    /// A value kept beside the pages.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn note(&self, name: &str) -> Result<Option<String>, JournalError> {
        self.ask(|reply| Request::Note { name: name.to_owned(), reply }).await
    }

    /// Keeps a value beside the pages, durably, or forgets it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn set_note(&self, name: &str, value: Option<&str>) -> Result<(), JournalError> {
        let value = value.map(str::to_owned);
        self.ask(|reply| Request::SetNote { name: name.to_owned(), value, reply }).await
    }

    /// Removes entries last seen before `limit` that owe nothing; returns how many.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn prune(&self, limit: Timestamp) -> Result<u64, JournalError> {
        self.ask(|reply| Request::Prune { limit, reply }).await
    }

    /// Whether the journal can be written and has its reserve, after it could not.
    ///
    /// # Errors
    /// While it has not.
    pub async fn probe(&self) -> Result<(), JournalError> {
        self.ask(|reply| Request::Probe { reply }).await
    }

    async fn ask<A>(&self, request: impl FnOnce(Reply<A>) -> Request) -> Result<A, JournalError> {
        let (reply, answer) = oneshot::channel();
        self.send(request(reply)).await?;
        answer.await.map_err(|_| JournalError::Closed)?
    }

    async fn send(&self, request: Request) -> Result<(), JournalError> {
        self.steps.send(request).await.map_err(|_| JournalError::Closed)
    }
}

/// What the writer keeps in memory: the little that every step may need.
#[derive(Default)]
struct State {
    /// Pages of tasks in hand, and those of the batch at hand; the others are read when they are asked for.
    live: HashMap<TaskId, Page>,
    /// Tasks of the batch at hand.
    touched: Vec<TaskId>,
    clones: HashMap<Key, (ProjectId, WaitingClone)>,
    cancels: BTreeSet<TaskId>,
    last_arrival: i64,
}

/// Names of the notes that the writer itself keeps.
const LAST_ARRIVAL: &str = "last_arrival";
const CANCEL: &str = "cancel:";
/// Entries removed at a time, so that nobody waits long behind it.
const PRUNED_AT_A_TIME: u32 = 1000;

impl State {
    async fn load(rows: &mut impl Rows) -> Result<Self, JournalError> {
        let mut state = Self::default();
        for (task, entry) in rows.waiting_clones().await? {
            state.track_clone(&task, &entry);
        }
        for name in rows.notes(CANCEL).await? {
            if let Ok(task) = TaskId::new(name.trim_start_matches(CANCEL)) {
                state.cancels.insert(task);
            }
        }
        let last = rows.note(LAST_ARRIVAL).await?;
        state.last_arrival = last.and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok(state)
    }

    fn track_clone(&mut self, task: &TaskId, entry: &Entry) {
        let key = Key { task_id: task.clone(), round: entry.round };
        match entry.waiting_clone() {
            Some(clone) => drop(self.clones.insert(key, (entry.project, clone))),
            None => drop(self.clones.remove(&key)),
        }
    }

    /// Runs one step on its page; what it changed joins the batch.
    fn decide(
        &mut self,
        mut page: Page,
        task: TaskId,
        now: Timestamp,
        decide: Decide,
        batch: &mut Vec<Write>,
    ) -> Answer {
        let before = page.clone();
        let clones = &self.clones;
        let of_project = |project: ProjectId| {
            clones.values().filter(|(of, _)| *of == project).map(|(_, clone)| *clone).collect::<Vec<_>>()
        };
        let next_arrival = now.as_microsecond().max(self.last_arrival + 1);
        let answer = decide(Step { page: &mut page, clones: &of_project, next_arrival });
        for entry in page.entries.iter().filter(|entry| before.round(entry.round) != Some(entry)) {
            self.last_arrival = self.last_arrival.max(entry.place.arrived);
            self.track_clone(&task, entry);
            batch.push(Write::Entry(task.clone(), Box::new(entry.clone())));
        }
        if page.cancel_pending != before.cancel_pending {
            batch.push(Write::Note(format!("{CANCEL}{task}"), page.cancel_pending.then(|| now.to_string())));
            if page.cancel_pending {
                self.cancels.insert(task.clone())
            } else {
                self.cancels.remove(&task)
            };
        }
        self.live.insert(task.clone(), page);
        self.touched.push(task);
        answer
    }
}

/// The writer: takes what has arrived, decides, writes it in one batch, answers.
async fn write(mut rows: impl Rows, mut state: State, mut requests: mpsc::Receiver<Request>) {
    let mut arrived = Vec::new();
    while requests.recv_many(&mut arrived, LARGEST_BATCH).await > 0 {
        let arrival_before = state.last_arrival;
        let absent = state.absent(&arrived);
        let fetched = state.fetch(&mut rows, absent).await;
        let (mut batch, mut answers) = (Vec::new(), Vec::<Answer>::new());
        for request in arrived.drain(..) {
            answers.extend(take(&mut rows, &mut state, request, &fetched, &mut batch).await);
        }
        if state.last_arrival != arrival_before {
            batch.push(Write::Note(LAST_ARRIVAL.to_owned(), Some(state.last_arrival.to_string())));
        }
        let written = write_or_relieve(&mut rows, &batch).await;
        match &written {
            Ok(()) => state.settle_down(),
            Err(error) => {
                tracing::error!(error = %error, "journal batch not written");
                // What is in memory is ahead of the disk now: read it again, or have it read when it is asked for.
                state = State::load(&mut rows).await.unwrap_or_default();
            }
        }
        for answer in answers {
            answer(written.clone());
        }
    }
}

/// Writes a batch; on a full disk the reserve is given up for it, so that what was begun can be settled.
async fn write_or_relieve(rows: &mut impl Rows, batch: &[Write]) -> Result<(), JournalError> {
    if batch.is_empty() {
        return Ok(());
    }
    match rows.write(batch).await {
        Err(error) if rows.relieve().await => {
            tracing::error!(error = %error, "the journal's reserve is given up");
            rows.write(batch).await
        }
        written => written,
    }
}

/// Takes one request: what only reads is answered at once, what writes is answered after the batch.
///
/// `fetched`: what came of reading the pages of this batch.
async fn take(
    rows: &mut impl Rows,
    state: &mut State,
    request: Request,
    fetched: &Result<(), JournalError>,
    batch: &mut Vec<Write>,
) -> Option<Answer> {
    // Whoever asked may be gone; then nobody waits for the answer.
    match request {
        Request::Step { task, now, decide } => match (state.live.remove(&task), fetched) {
            (Some(page), _) => Some(state.decide(page, task, now, decide, batch)),
            (None, fetched) => {
                // It decides on a blank page, so that it can be told; nothing of that is kept.
                let blank = Step { page: &mut Page::default(), clones: &|_| Vec::new(), next_arrival: 0 };
                let error = fetched.clone().err().unwrap_or(JournalError::Closed);
                decide(blank)(Err(error));
                None
            }
        },
        Request::SetNote { name, value, reply } => {
            batch.push(Write::Note(name, value));
            Some(Box::new(move |written| drop(reply.send(written))))
        }
        Request::Note { name, reply } => {
            let pending = batch.iter().rev().find_map(|write| match write {
                Write::Note(written, value) if *written == name => Some(value.clone()),
                _ => None,
            });
            let note = match pending {
                Some(value) => Ok(value),
                None => rows.note(&name).await,
            };
            drop(reply.send(note));
            None
        }
        Request::Owing { reply } => {
            drop(reply.send(rows.owing().await));
            None
        }
        Request::Prune { limit, reply } => {
            drop(reply.send(rows.prune(limit, PRUNED_AT_A_TIME).await));
            None
        }
        Request::Probe { reply } => {
            drop(reply.send(rows.replenish().await));
            None
        }
    }
}
