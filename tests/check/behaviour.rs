//! What a task makes the ledger's executor do: it stands in the task's id, so that nothing of it is on the wire.

use haul::{
    failure::ErrorClass,
    protocol::{Kind, Status},
};

/// The highest number of failures that [`Behaviour::Retries`] asks for; below the agents' limit of attempts.
pub(crate) const MOST_RETRIES: u32 = 2;

/// What executing a task comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// Success.
    Good,
    /// Success after some milliseconds.
    Slow(u32),
    /// Failures that are worth another try, so many times; then success.
    Retries(u32),
    /// Failure for good; success when it is replayed.
    Fails,
    /// Failure for good of the one class that leaves no dead letter.
    Conflicts,
    /// It is no task.
    Malformed,
    /// Real work.
    Git,
}

impl Behaviour {
    /// The id of a task that behaves so.
    pub(crate) fn id(self, number: usize) -> String {
        let code = match self {
            Self::Good => "ok".to_owned(),
            Self::Slow(ms) => format!("slow{ms}"),
            Self::Retries(times) => format!("retry{times}"),
            Self::Fails => "fail".to_owned(),
            Self::Conflicts => "conflict".to_owned(),
            Self::Malformed => "bad".to_owned(),
            Self::Git => "git".to_owned(),
        };
        format!("{number:07}.{code}")
    }

    /// How a task behaves.
    pub(crate) fn of(task: &str) -> Option<Self> {
        let (_, code) = task.split_once('.')?;
        let number = |prefix: &str| code.strip_prefix(prefix)?.parse().ok();
        Some(match code {
            "ok" => Self::Good,
            "fail" => Self::Fails,
            "conflict" => Self::Conflicts,
            "bad" => Self::Malformed,
            "git" => Self::Git,
            _ => number("slow").map(Self::Slow).or_else(|| number("retry").map(Self::Retries))?,
        })
    }

    /// How an attempt fails, if it does.
    pub(crate) fn failure(self, round: u32, attempt: u32) -> Option<ErrorClass> {
        match self {
            Self::Retries(times) if attempt <= times => Some(ErrorClass::Network),
            Self::Fails if round == 0 => Some(ErrorClass::Corrupt),
            Self::Conflicts => Some(ErrorClass::Conflict),
            _ => None,
        }
    }

    /// Whether a task that behaves so may end like that; a crash is another matter.
    pub(crate) fn may_end(self, kind: Kind, round: u32, status: Status, class: Option<ErrorClass>) -> bool {
        match (status, class) {
            (Status::Superseded, _) => kind.changes_project() && self != Self::Malformed,
            (Status::Succeeded, _) => match self {
                Self::Fails => round > 0,
                Self::Conflicts | Self::Malformed => false,
                Self::Good | Self::Slow(_) | Self::Retries(_) | Self::Git => true,
            },
            // Whether the project was there is judged where its state is.
            (Status::Failed, Some(ErrorClass::NotFound)) => {
                matches!(kind, Kind::Pull | Kind::Status) && self != Self::Malformed
            }
            (Status::Failed, Some(ErrorClass::Corrupt)) => self == Self::Fails && round == 0,
            (Status::Failed, Some(ErrorClass::Conflict)) => self == Self::Conflicts,
            (Status::Rejected, _) => self == Self::Malformed,
            _ => false,
        }
    }
}
