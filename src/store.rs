//! The journal on disk: one writer, group commit.
//!
//! Every step loads one task's [`Page`], lets a pure function decide and note, and is answered only after the commit
//! that made it durable. Steps that arrive while a commit is under way share the next one.

mod cache;
mod clones;
pub mod memory;
mod rows;
pub mod sqlite;
mod trouble;

use std::{
    collections::{BTreeMap, HashMap},
    panic::{AssertUnwindSafe, catch_unwind},
};

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};

pub use memory::MemoryRows;
pub use rows::{JournalError, Rows, Write};
pub use sqlite::SqliteRows;

use crate::{
    journal::{Entry, Page, WaitingClone},
    protocol::{ProjectId, TaskId},
};
use clones::Clones;
use trouble::{read_again, refuse, write_or_relieve};

/// Steps that one commit carries at most: bounds the time that the first of them waits.
const LARGEST_BATCH: usize = 512;

/// The note that says when a damaged journal was last set aside.
pub const SET_ASIDE: &str = "set_aside";

/// The journal: a handle to its writer. Cheap to clone.
#[derive(Clone)]
pub struct Journal {
    steps: mpsc::Sender<Request>,
    strained: watch::Receiver<bool>,
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
    Running { reply: Reply<Vec<(TaskId, Entry)>> },
    Close { reply: Reply<()> },
    Prune { limit: Timestamp, reply: Reply<u64> },
    Probe { reply: Reply<()> },
}

impl Journal {
    /// Starts the writer over `rows`.
    ///
    /// # Errors
    /// When what it needs at start cannot be read, nor begun anew.
    pub async fn open(mut rows: impl Rows) -> Result<Self, JournalError> {
        let mut state = State::default();
        read_again(&mut rows, &mut state).await?;
        let (steps, requests) = mpsc::channel(4 * LARGEST_BATCH);
        let (strain, strained) = watch::channel(false);
        tokio::spawn(write(rows, state, requests, strain));
        Ok(Self { steps, strained })
    }

    /// Whether the disk is full and the reserve given up: what is left is for what was begun.
    #[must_use]
    pub fn strained(&self) -> watch::Receiver<bool> {
        self.strained.clone()
    }

    /// Whether the writer has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.steps.is_closed()
    }

    /// Ends the writer once it has done what was asked before.
    pub async fn close(&self) {
        // It may have ended before.
        let _ = self.ask(|reply| Request::Close { reply }).await;
    }

    /// Runs one step on a task's page and returns its answer once it is durable.
    ///
    /// # Errors
    /// When the commit failed: nothing of the step holds.
    pub fn step<'a, A: Send + 'static, D: FnOnce(Step<'_>) -> A + Send + 'static>(
        &'a self,
        task: &TaskId,
        now: Timestamp,
        decide: D,
    ) -> impl Future<Output = Result<A, JournalError>> + Send + use<'a, A, D> {
        let (reply, answer) = oneshot::channel();
        // Boxed before anything waits: a future that holds what is decided with would be several times as large.
        let decide: Decide = Box::new(move |step| {
            let decided = decide(step);
            // The receiver may be gone: its task was stopped, and nobody waits for the answer.
            Box::new(move |committed| drop(reply.send(committed.map(|()| decided))))
        });
        let request = Request::Step { task: task.clone(), now, decide };
        async move {
            self.send(request).await?;
            answer.await.map_err(|_| if self.is_closed() { JournalError::Closed } else { JournalError::Broken })?
        }
    }

    /// Every entry that owes something.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn owing(&self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.ask(|reply| Request::Owing { reply }).await
    }

    /// Every entry of which an attempt is under way, or was when the agent died.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn running(&self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.ask(|reply| Request::Running { reply }).await
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
    /// Pages with a task in hand or a debt, and those of the batch at hand; the others are read when asked for.
    live: HashMap<TaskId, Page>,
    /// Tasks of the batch at hand.
    touched: Vec<TaskId>,
    clones: Clones,
    /// When cancels came whose tasks have not.
    cancels: BTreeMap<TaskId, Timestamp>,
    last_arrival: i64,
    damage: Option<JournalError>,
    /// What is in memory is not what is on disk: it has to be read before anything is decided on it.
    stale: bool,
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
            state.clones.track(&task, &entry, None);
        }
        for (task, entry) in rows.running().await? {
            state.clones.left_behind(&task, &entry);
        }
        for (name, value) in rows.notes(CANCEL).await? {
            if let Ok(task) = TaskId::new(name.strip_prefix(CANCEL).unwrap_or(&name)) {
                state.cancels.insert(task, value.parse().unwrap_or(Timestamp::UNIX_EPOCH));
            }
        }
        let last = rows.note(LAST_ARRIVAL).await?;
        state.last_arrival = last.and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok(state)
    }

    /// Runs one step on its page; what it changed joins the batch. A step that panics has changed nothing.
    fn decide(
        &mut self,
        mut page: Page,
        task: TaskId,
        now: Timestamp,
        decide: Decide,
        batch: &mut Vec<Write>,
    ) -> Option<Answer> {
        let before = page.clone();
        self.clones.date(now);
        let clones = &self.clones;
        let of_project = |project: ProjectId| clones.of(project, now);
        let next_arrival = now.as_microsecond().max(self.last_arrival + 1);
        let step = Step { page: &mut page, clones: &of_project, next_arrival };
        let Ok(answer) = catch_unwind(AssertUnwindSafe(|| decide(step))) else {
            self.live.insert(task, before);
            return None;
        };
        for entry in page.entries.iter().filter(|entry| before.round(entry.round) != Some(entry)) {
            self.last_arrival = self.last_arrival.max(entry.place.arrived);
            self.clones.track(&task, entry, Some(now));
            batch.push(Write::Entry(task.clone(), Box::new(entry.clone())));
        }
        if page.cancel_pending != before.cancel_pending {
            batch.push(Write::Note(format!("{CANCEL}{task}"), page.cancel_pending.then(|| now.to_string())));
            if page.cancel_pending {
                self.cancels.insert(task.clone(), now);
            } else {
                self.cancels.remove(&task);
            }
        }
        self.live.insert(task.clone(), page);
        self.touched.push(task);
        Some(answer)
    }

    /// Takes note of damage in what was read or written.
    fn seen<A>(&mut self, result: Result<A, JournalError>) -> Result<A, JournalError> {
        if let Err(error @ JournalError::Damaged { .. }) = &result {
            self.damage = Some(error.clone());
        }
        result
    }

    /// Forgets cancels from before `limit` whose tasks never came.
    fn forget_cancels(&mut self, limit: Timestamp, batch: &mut Vec<Write>) {
        let old = self.cancels.iter().filter(|(_, since)| **since < limit).map(|(task, _)| task.clone());
        for task in old.collect::<Vec<_>>() {
            batch.push(Write::Note(format!("{CANCEL}{task}"), None));
            self.cancels.remove(&task);
            if let Some(page) = self.live.get_mut(&task) {
                page.cancel_pending = false;
            }
        }
    }
}

/// The writer: takes what has arrived, decides, writes it in one batch, answers.
async fn write(
    mut rows: impl Rows,
    mut state: State,
    mut requests: mpsc::Receiver<Request>,
    strain: watch::Sender<bool>,
) {
    let mut arrived = Vec::new();
    while requests.recv_many(&mut arrived, LARGEST_BATCH).await > 0 {
        if state.stale
            && let Err(error) = read_again(&mut rows, &mut state).await
        {
            arrived.drain(..).for_each(|request| refuse(request, &error));
            continue;
        }
        let arrival_before = state.last_arrival;
        let absent = state.absent(&arrived);
        let fetched = state.fetch(&mut rows, absent).await;
        let fetched = state.seen(fetched);
        let (mut batch, mut answers, mut closing) = (Vec::new(), Vec::<Answer>::new(), None);
        for request in arrived.drain(..) {
            match request {
                Request::Close { reply } => closing = Some(reply),
                request => answers.extend(take(&mut rows, &mut state, request, &fetched, &mut batch, &strain).await),
            }
        }
        if state.last_arrival != arrival_before {
            batch.push(Write::Note(LAST_ARRIVAL.to_owned(), Some(state.last_arrival.to_string())));
        }
        let written = match state.damage.take() {
            Some(damage) => Err(damage),
            None => write_or_relieve(&mut rows, &batch, &strain).await,
        };
        match &written {
            Ok(()) => state.settle_down(),
            Err(error) => {
                tracing::error!(error = %error, "journal batch not written");
                // What is in memory is ahead of the disk now. If it cannot be read again, who asks next is told why not.
                (state.stale, state.damage) = (true, Some(error.clone()));
                let _ = read_again(&mut rows, &mut state).await;
            }
        }
        for answer in answers {
            answer(written.clone());
        }
        if let Some(reply) = closing {
            rows.close().await;
            drop(reply.send(Ok(())));
            return;
        }
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
    strain: &watch::Sender<bool>,
) -> Option<Answer> {
    match request {
        Request::Step { task, now, decide } => {
            if let Some(page) = state.live.remove(&task) {
                return state.decide(page, task, now, decide, batch);
            }
            // What was read of the batch has every page that it asks for.
            let error = fetched.clone().err().unwrap_or(JournalError::Broken);
            refuse(Request::Step { task, now, decide }, &error);
        }
        Request::SetNote { name, value, reply } => {
            batch.push(Write::Note(name, value));
            return Some(Box::new(move |written| drop(reply.send(written))));
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
            drop(reply.send(state.seen(note)));
        }
        Request::Owing { reply } => {
            let owing = rows.owing().await;
            drop(reply.send(state.seen(owing)));
        }
        Request::Running { reply } => {
            let running = rows.running().await;
            drop(reply.send(state.seen(running)));
        }
        Request::Prune { limit, reply } => {
            state.forget_cancels(limit, batch);
            let pruned = rows.prune(limit, PRUNED_AT_A_TIME).await;
            drop(reply.send(state.seen(pruned)));
        }
        Request::Probe { reply } => {
            let probed = rows.replenish().await;
            if probed.is_ok() {
                strain.send_replace(false);
            }
            drop(reply.send(state.seen(probed)));
        }
        Request::Close { reply } => drop(reply.send(Ok(()))),
    }
    None
}
