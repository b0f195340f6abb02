//! One task's page in the journal.

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::protocol::{Kind, Place, ProjectId, Round, Status, TaskId, wire::Message};

/// A task in one round.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The task.
    pub task_id: TaskId,
    /// The round.
    pub round: Round,
}

/// A message with its route, kept until the broker has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// The exchange.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
    /// The message.
    pub message: Message,
}

/// Where an open task stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Known, not running: it waits here, or the broker will deliver it.
    Waiting,
    /// An attempt is under way in this start of the agent.
    Running {
        /// The start of the agent.
        boot: String,
        /// Nothing else ran beside it: if the agent dies meanwhile, it was this one's doing if it was anybody's.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        alone: bool,
    },
    /// The broker has it: a copy that is held in a retry queue until then, or what was given back.
    Released {
        /// When it is due.
        until: Timestamp,
    },
    /// It has ended.
    Settled {
        /// How.
        status: Status,
    },
}

/// What a settled task still owes, in the order of payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Debt {
    /// The copy for the dead-letter queue.
    DeadLetter,
    /// The terminal event.
    Event,
    /// The event that tells what became of a history.
    History,
}

/// The history of a project whose tree was shown first, still to be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwedHistory {
    /// How many tasks were applied to the project when its tree was shown: one that was made later is another.
    pub seq: u64,
    /// How often it failed.
    #[serde(default)]
    pub failures: u32,
    /// Since when it is deferred, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deferred_since: Option<Timestamp>,
}

/// What is known of a task in one round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The round.
    pub round: Round,
    /// SHA-256 of the body, hexadecimal: the same key with another body is another task in disguise.
    pub digest: String,
    /// Kind of task.
    pub kind: Kind,
    /// Its project.
    pub project: ProjectId,
    /// Its place in the order of its project, fixed at first admission.
    pub place: Place,
    /// Where it stands.
    pub phase: Phase,
    /// The highest attempt that was begun.
    #[serde(default)]
    pub attempt: u32,
    /// Deliveries with a lower attempt have a newer copy under way and are acknowledged.
    #[serde(default)]
    pub released: u32,
    /// Crashes of the agent at which it was running.
    #[serde(default)]
    pub crashes: u32,
    /// At one of them nothing else was running.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub crashed_alone: bool,
    /// A cancel arrived while it was open.
    #[serde(default)]
    pub cancelled: bool,
    /// The terminal event, byte for byte, once settled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<Arc<Envelope>>,
    /// Whether the broker has not confirmed the terminal event yet.
    #[serde(default)]
    pub owes_event: bool,
    /// The copy for the dead-letter queue, until the broker has confirmed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owes_dead_letter: Option<Arc<Envelope>>,
    /// The history that is still to be attached. It is no debt to the broker, and is not paid by publishing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owes_history: Option<OwedHistory>,
    /// The event that tells what became of the history, until the broker has confirmed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owes_history_event: Option<Arc<Envelope>>,
    /// Last sighting or acknowledgement.
    pub seen: Timestamp,
}

/// A clone that waits for its retry: later tasks of its project wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitingClone {
    /// Its place.
    pub place: Place,
    /// When its copy is due.
    pub until: Timestamp,
}

/// All that is known of one task identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// One entry a round, ascending.
    pub entries: Vec<Entry>,
    /// A cancel came before the task did; it applies to round 0.
    pub cancel_pending: bool,
}

/// What came of settling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Concluded {
    /// Settled now.
    Now,
    /// It was settled before, and this is its terminal event.
    Before(Option<Arc<Envelope>>),
}

/// What came of a cancel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CancelAnswer {
    /// Never seen: the cancel waits for it.
    Pending,
    /// Open in this round, and marked: whoever holds it must end it; if nobody here does, it is settled at once.
    Open(Box<Entry>),
    /// Settled before, with this terminal event.
    Settled(Option<Arc<Envelope>>),
}

impl Entry {
    /// A task that is seen for the first time.
    #[must_use]
    pub fn new(round: Round, digest: String, kind: Kind, project: ProjectId, place: Place, now: Timestamp) -> Self {
        Self {
            round,
            digest,
            kind,
            project,
            place,
            phase: Phase::Waiting,
            attempt: 0,
            released: 0,
            crashes: 0,
            crashed_alone: false,
            cancelled: false,
            event: None,
            owes_event: false,
            owes_dead_letter: None,
            owes_history: None,
            owes_history_event: None,
            seen: now,
        }
    }

    /// Whether it has not ended.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !matches!(self.phase, Phase::Settled { .. })
    }

    /// Whether a copy of it is held in a retry queue.
    #[must_use]
    pub fn is_released(&self) -> bool {
        matches!(self.phase, Phase::Released { .. })
    }

    /// Whether something is still owed, to the broker or to the project.
    #[must_use]
    pub fn owes(&self) -> bool {
        self.owes_event
            || self.owes_dead_letter.is_some()
            || self.owes_history.is_some()
            || self.owes_history_event.is_some()
    }

    /// What is owed to the broker, in the order of payment.
    #[must_use]
    pub fn debts(&self) -> Vec<(Debt, Arc<Envelope>)> {
        let dead = self.owes_dead_letter.clone().map(|envelope| (Debt::DeadLetter, envelope));
        let event = self.event.clone().filter(|_| self.owes_event).map(|envelope| (Debt::Event, envelope));
        let history = self.owes_history_event.clone().map(|envelope| (Debt::History, envelope));
        dead.into_iter().chain(event).chain(history).collect()
    }

    /// The clone that waits for a retry, if it is one.
    #[must_use]
    pub fn waiting_clone(&self) -> Option<WaitingClone> {
        match (&self.phase, self.kind) {
            (Phase::Released { until }, Kind::Clone) => Some(WaitingClone { place: self.place, until: *until }),
            _ => None,
        }
    }
}

impl Page {
    /// The entry of a round.
    #[must_use]
    pub fn round(&self, round: Round) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.round == round)
    }

    pub(super) fn round_mut(&mut self, round: Round) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.round == round)
    }

    /// The highest round known.
    #[must_use]
    pub fn highest(&self) -> Option<Round> {
        self.entries.iter().map(|entry| entry.round).max()
    }

    /// Adds the entry of a new round.
    pub fn insert(&mut self, entry: Entry) {
        self.entries.push(entry);
        self.entries.sort_by_key(|entry| entry.round);
    }

    /// The entry of a round; what was lost with a damaged journal is put there as `lost` has it.
    ///
    /// Whoever holds a task knows it: that the journal does not must not keep it from its end.
    pub fn known(&mut self, round: Round, lost: impl FnOnce() -> Entry) -> &mut Entry {
        if self.round(round).is_none() {
            self.insert(Entry { round, ..lost() });
        }
        self.round_mut(round).expect("the entry was inserted above")
    }

    /// Notes that an attempt begins; false if the task was settled or cancelled meanwhile.
    pub fn begin(&mut self, round: Round, attempt: u32, boot: &str, alone: bool) -> bool {
        match self.round_mut(round) {
            Some(entry) if entry.is_open() && !entry.cancelled => {
                entry.attempt = entry.attempt.max(attempt);
                entry.phase = Phase::Running { boot: boot.to_owned(), alone };
                true
            }
            _ => false,
        }
    }

    /// Notes that the broker has it again, uncharged, as at a drain. What is given back one by one may come again in
    /// another order: if it is a clone, later tasks of its project wait for it.
    pub fn give_back(&mut self, round: Round, now: Timestamp) {
        if let Some(entry) = self.round_mut(round)
            && matches!(entry.phase, Phase::Running { .. } | Phase::Waiting)
        {
            entry.phase = Phase::Released { until: now };
        }
    }

    /// Notes that a copy asking for `attempt` is held in a retry queue until `until`. Returns the entry where a cancel
    /// came meanwhile: whoever holds it must end it, the copy is answered on its return.
    pub fn release(&mut self, round: Round, attempt: u32, until: Timestamp) -> Option<Entry> {
        let entry = self.round_mut(round).filter(|entry| entry.is_open())?;
        entry.released = entry.released.max(attempt);
        entry.phase = Phase::Released { until };
        entry.cancelled.then(|| entry.clone())
    }

    /// Ends a round. The first end wins: settling again returns what was recorded.
    pub fn settle(&mut self, round: Round, status: Status, event: Envelope, dead: Option<Envelope>) -> Concluded {
        match self.round_mut(round) {
            Some(entry) if entry.is_open() => {
                entry.phase = Phase::Settled { status };
                entry.event = Some(Arc::new(event));
                entry.owes_event = true;
                entry.owes_dead_letter = dead.map(Arc::new);
                Concluded::Now
            }
            Some(entry) => Concluded::Before(entry.event.clone()),
            None => Concluded::Before(None),
        }
    }

    /// Strikes off a debt that the broker has confirmed.
    pub fn strike(&mut self, round: Round, debt: Debt, now: Timestamp) {
        if let Some(entry) = self.round_mut(round) {
            entry.seen = now;
            match debt {
                Debt::DeadLetter => entry.owes_dead_letter = None,
                Debt::Event => entry.owes_event = false,
                Debt::History => entry.owes_history_event = None,
            }
        }
    }

    /// Notes, together with the end of a round, that the project's history is still to be attached.
    pub fn owe_history(&mut self, round: Round, seq: u64) {
        if let Some(entry) = self.round_mut(round) {
            entry.owes_history = Some(OwedHistory { seq, failures: 0, deferred_since: None });
        }
    }

    /// Notes that attaching a history failed and is tried again.
    pub fn put_off_history(&mut self, round: Round, failures: u32, deferred_since: Option<Timestamp>) {
        if let Some(owed) = self.round_mut(round).and_then(|entry| entry.owes_history.as_mut()) {
            (owed.failures, owed.deferred_since) = (failures, deferred_since);
        }
    }

    /// Ends the matter of a history: with an event that tells of it, or silently where its project is no more.
    pub fn history_over(&mut self, round: Round, event: Option<Envelope>) {
        if let Some(entry) = self.round_mut(round)
            && entry.owes_history.take().is_some()
        {
            entry.owes_history_event = event.map(Arc::new);
        }
    }

    /// Applies a cancel to the highest round known, else to round 0 when it comes.
    pub fn cancel(&mut self) -> CancelAnswer {
        let Some(highest) = self.highest() else {
            self.cancel_pending = true;
            return CancelAnswer::Pending;
        };
        match self.round_mut(highest) {
            Some(entry) if entry.is_open() => {
                entry.cancelled = true;
                CancelAnswer::Open(Box::new(entry.clone()))
            }
            Some(entry) => CancelAnswer::Settled(entry.event.clone()),
            None => CancelAnswer::Pending,
        }
    }
}
