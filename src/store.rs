//! The journal on disk: one writer, group commit.
//!
//! Every step loads one task's [`Page`], lets a pure function decide and note, and is answered only after the commit
//! that made it durable. Steps that arrive while a commit is under way share the next one.

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

/// Where pages are kept. Two backends: [`SqliteRows`] on disk, [`MemoryRows`] for pipeline tests and the embedded demo.
#[async_trait]
pub trait Rows: Send + 'static {
    /// Opens a batch.
    async fn begin(&mut self) -> Result<(), JournalError>;
    /// Makes the batch durable.
    async fn commit(&mut self) -> Result<(), JournalError>;
    /// Forgets the batch.
    async fn rollback(&mut self);
    /// The entries of a task.
    async fn entries(&mut self, task: &TaskId) -> Result<Vec<Entry>, JournalError>;
    /// Writes an entry.
    async fn put(&mut self, task: &TaskId, entry: &Entry) -> Result<(), JournalError>;
    /// Every entry that owes something.
    async fn owing(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError>;
    /// Every clone that waits for a retry.
    async fn waiting_clones(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError>;
    /// A value kept beside the pages.
    async fn note(&mut self, name: &str) -> Result<Option<String>, JournalError>;
    /// Keeps a value beside the pages, or forgets it.
    async fn set_note(&mut self, name: &str, value: Option<&str>) -> Result<(), JournalError>;
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

enum Request {
    Step { task: TaskId, now: Timestamp, decide: Decide },
    Owing { reply: oneshot::Sender<Result<Vec<(TaskId, Entry)>, JournalError>> },
    Note { name: String, reply: oneshot::Sender<Result<Option<String>, JournalError>> },
    SetNote { name: String, value: Option<String>, reply: oneshot::Sender<Result<(), JournalError>> },
    Prune { limit: Timestamp, reply: oneshot::Sender<Result<u64, JournalError>> },
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

    async fn ask<A>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<A, JournalError>>) -> Request,
    ) -> Result<A, JournalError> {
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
    /// Pages with an open entry or a debt; the others are read when they are asked for.
    live: HashMap<TaskId, Page>,
    clones: HashMap<Key, (ProjectId, WaitingClone)>,
    cancels: BTreeSet<TaskId>,
    last_arrival: i64,
}

/// Names of the notes that the writer itself keeps.
const LAST_ARRIVAL: &str = "last_arrival";
const CANCEL: &str = "cancel:";

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

    async fn page(&mut self, rows: &mut impl Rows, task: &TaskId) -> Result<Page, JournalError> {
        if let Some(page) = self.live.remove(task) {
            return Ok(page);
        }
        let entries = rows.entries(task).await?;
        Ok(Page { entries, cancel_pending: self.cancels.contains(task) })
    }

    /// Runs one step and writes what it changed.
    async fn run(
        &mut self,
        rows: &mut impl Rows,
        task: TaskId,
        now: Timestamp,
        decide: Decide,
    ) -> Result<Answer, Failed> {
        let mut page = match self.page(rows, &task).await {
            Ok(page) => page,
            Err(error) => return Err((Some(blank(decide)), error)),
        };
        let before = page.clone();
        let arrival = now.as_microsecond().max(self.last_arrival + 1);
        let clones = &self.clones;
        let of_project = |project: ProjectId| {
            clones.values().filter(|(of, _)| *of == project).map(|(_, clone)| *clone).collect::<Vec<_>>()
        };
        let answer = decide(Step { page: &mut page, clones: &of_project, next_arrival: arrival });
        match self.save(rows, &task, now, &before, page).await {
            Ok(()) => Ok(answer),
            Err(error) => Err((Some(answer), error)),
        }
    }

    async fn save(
        &mut self,
        rows: &mut impl Rows,
        task: &TaskId,
        now: Timestamp,
        before: &Page,
        page: Page,
    ) -> Result<(), JournalError> {
        for entry in page.entries.iter().filter(|entry| before.round(entry.round) != Some(entry)) {
            rows.put(task, entry).await?;
            self.last_arrival = self.last_arrival.max(entry.place.arrived);
            self.track_clone(task, entry);
        }
        if page.cancel_pending != before.cancel_pending {
            let name = format!("{CANCEL}{task}");
            let at = now.to_string();
            rows.set_note(&name, page.cancel_pending.then_some(at.as_str())).await?;
            if page.cancel_pending {
                self.cancels.insert(task.clone())
            } else {
                self.cancels.remove(task)
            };
        }
        if page.entries.iter().any(|entry| entry.is_open() || entry.owes()) {
            self.live.insert(task.clone(), page);
        }
        Ok(())
    }
}

/// The answer of a step that could not be tried: it decides on a blank page, and nobody sees what it decided.
fn blank(decide: Decide) -> Answer {
    decide(Step { page: &mut Page::default(), clones: &|_| Vec::new(), next_arrival: 0 })
}

/// The writer: takes what has arrived, decides and writes it in one batch, commits, answers.
async fn write(mut rows: impl Rows, mut state: State, mut requests: mpsc::Receiver<Request>) {
    let mut batch = Vec::new();
    while requests.recv_many(&mut batch, LARGEST_BATCH).await > 0 {
        let mut answers: Vec<Answer> = Vec::with_capacity(batch.len());
        let written = write_batch(&mut rows, &mut state, &mut batch, &mut answers).await;
        if let Err(error) = &written {
            tracing::error!(error = %error, "journal batch failed");
            rows.rollback().await;
            // What is in memory may be ahead of the disk now: read it again.
            match State::load(&mut rows).await {
                Ok(fresh) => state = fresh,
                Err(_) => state.live.clear(),
            }
        }
        for answer in answers {
            answer(written.clone());
        }
    }
}

async fn write_batch(
    rows: &mut impl Rows,
    state: &mut State,
    batch: &mut Vec<Request>,
    answers: &mut Vec<Answer>,
) -> Result<(), JournalError> {
    let arrival_before = state.last_arrival;
    let mut failed = rows.begin().await;
    for request in batch.drain(..) {
        if let Err(error) = &failed {
            answers.push(refuse(request, error.clone()));
            continue;
        }
        match perform(rows, state, request).await {
            Ok(answer) => answers.push(answer),
            Err((answer, error)) => {
                answers.extend(answer);
                failed = Err(error);
            }
        }
    }
    failed?;
    if state.last_arrival != arrival_before {
        rows.set_note(LAST_ARRIVAL, Some(&state.last_arrival.to_string())).await?;
    }
    rows.commit().await
}

/// The answer to a request that was not tried, since its batch had failed.
fn refuse(request: Request, error: JournalError) -> Answer {
    match request {
        Request::Step { decide, .. } => {
            let answer = blank(decide);
            Box::new(move |_| answer(Err(error)))
        }
        Request::Owing { reply } => Box::new(move |_| drop(reply.send(Err(error)))),
        Request::Note { reply, .. } => Box::new(move |_| drop(reply.send(Err(error)))),
        Request::SetNote { reply, .. } => Box::new(move |_| drop(reply.send(Err(error)))),
        Request::Prune { reply, .. } => Box::new(move |_| drop(reply.send(Err(error)))),
    }
}

type Failed = (Option<Answer>, JournalError);

async fn perform(rows: &mut impl Rows, state: &mut State, request: Request) -> Result<Answer, Failed> {
    /// A reader's answer holds whether or not the batch commits; a writer's only if it does.
    fn answer<A: Send + 'static>(
        reply: oneshot::Sender<Result<A, JournalError>>,
        result: Result<A, JournalError>,
    ) -> Result<Answer, Failed> {
        match result {
            Ok(value) => Ok(Box::new(move |committed| drop(reply.send(committed.map(|()| value))))),
            Err(error) => {
                let told = error.clone();
                Err((Some(Box::new(move |_| drop(reply.send(Err(told))))), error))
            }
        }
    }
    match request {
        Request::Step { task, now, decide } => state.run(rows, task, now, decide).await,
        Request::Owing { reply } => answer(reply, rows.owing().await),
        Request::Note { name, reply } => answer(reply, rows.note(&name).await),
        Request::SetNote { name, value, reply } => answer(reply, rows.set_note(&name, value.as_deref()).await),
        Request::Prune { limit, reply } => answer(reply, rows.prune(limit, 1000).await),
    }
}
