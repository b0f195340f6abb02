//! The steps of a message's path, for whoever watches: the crash tests stop the process at one of them.

use std::{fmt, str::FromStr};

use crate::protocol::TaskId;

/// A step of a message's path, just done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The delivery is here.
    Received,
    /// It is a task.
    Decoded,
    /// The journal knows it.
    Admitted,
    /// It is queued in the window.
    Queued,
    /// It has a slot and its project's turn.
    Turn,
    /// The journal knows that an attempt runs.
    Begun,
    /// The executor asked for the last time before the point of no return, and goes on.
    Asked,
    /// The attempt has ended.
    Executed,
    /// The journal knows the outcome and what is owed.
    Settled,
    /// The broker has the dead-letter copy.
    DeadLetterConfirmed,
    /// The dead-letter copy is struck off.
    DeadLetterStruck,
    /// The broker has the terminal event.
    EventConfirmed,
    /// The terminal event is struck off.
    EventStruck,
    /// The history of a project whose tree came first is attached, or given up.
    HistoryDone,
    /// The journal knows what became of the history, and owes the event.
    HistoryNoted,
    /// The broker has the event that tells of the history.
    HistoryConfirmed,
    /// That event is struck off.
    HistoryStruck,
    /// The broker has the copy for the next attempt.
    CopyConfirmed,
    /// The journal knows of that copy.
    CopyNoted,
    /// The delivery is acknowledged.
    Acked,
}

impl Step {
    /// Every step, in order.
    pub const ALL: [Self; 20] = [
        Self::Received,
        Self::Decoded,
        Self::Admitted,
        Self::Queued,
        Self::Turn,
        Self::Begun,
        Self::Asked,
        Self::Executed,
        Self::Settled,
        Self::DeadLetterConfirmed,
        Self::DeadLetterStruck,
        Self::EventConfirmed,
        Self::EventStruck,
        Self::HistoryDone,
        Self::HistoryNoted,
        Self::HistoryConfirmed,
        Self::HistoryStruck,
        Self::CopyConfirmed,
        Self::CopyNoted,
        Self::Acked,
    ];

    /// The step's name as an argument.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Received => "received",
            Self::Decoded => "decoded",
            Self::Admitted => "admitted",
            Self::Queued => "queued",
            Self::Turn => "turn",
            Self::Begun => "begun",
            Self::Asked => "asked",
            Self::Executed => "executed",
            Self::Settled => "settled",
            Self::DeadLetterConfirmed => "dead-letter-confirmed",
            Self::DeadLetterStruck => "dead-letter-struck",
            Self::EventConfirmed => "event-confirmed",
            Self::EventStruck => "event-struck",
            Self::HistoryDone => "history-done",
            Self::HistoryNoted => "history-noted",
            Self::HistoryConfirmed => "history-confirmed",
            Self::HistoryStruck => "history-struck",
            Self::CopyConfirmed => "copy-confirmed",
            Self::CopyNoted => "copy-noted",
            Self::Acked => "acked",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|step| step.as_str() == text).ok_or_else(|| format!("there is no step {text:?}"))
    }
}

/// Told of every step, synchronously: what it does happens before the next one.
pub trait Observe: Send + Sync + 'static {
    /// A step is done.
    fn reached(&self, step: Step, task: Option<&TaskId>);
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observe for Unobserved {
    fn reached(&self, _step: Step, _task: Option<&TaskId>) {}
}
