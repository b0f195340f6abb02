//! Why a task could not be done, and what follows from it.
//!
//! The place that knows the cause builds the [`Failure`]; nobody guesses later from its text.

use std::{fmt, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The closed set of error classes of wire contract version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// The upstream could not be reached, or the connection broke.
    Network,
    /// The task's deadline passed.
    Timeout,
    /// Nothing moved for the stall limit.
    Stalled,
    /// The upstream asked us to slow down; `Retry-After` is honoured.
    Throttled,
    /// No space, no inodes, or a file system that refuses writes.
    Disk,
    /// A fault of ours, or one that we cannot name.
    Internal,
    /// The task itself is wrong.
    Invalid,
    /// The upstream refused the credential, or asked for one.
    Auth,
    /// The repository, the revision or the project does not exist.
    NotFound,
    /// The workspace holds something that would have to be overwritten.
    Conflict,
    /// A size or count limit was exceeded.
    Quota,
    /// The upstream or the local copy is damaged.
    Corrupt,
    /// The task was running at too many crashes of the agent.
    Crashed,
    /// A policy of this node forbids it.
    Forbidden,
    /// The task's `not_after` has passed, or it was deferred for too long.
    Expired,
}

/// What an [`ErrorClass`] decides when nothing more is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Try again, charging an attempt.
    Retry,
    /// Give up: `failed`.
    Final,
}

impl ErrorClass {
    /// Every class, in the order of the contract.
    pub const ALL: [Self; 15] = [
        Self::Network,
        Self::Timeout,
        Self::Stalled,
        Self::Throttled,
        Self::Disk,
        Self::Internal,
        Self::Invalid,
        Self::Auth,
        Self::NotFound,
        Self::Conflict,
        Self::Quota,
        Self::Corrupt,
        Self::Crashed,
        Self::Forbidden,
        Self::Expired,
    ];

    /// The class's name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::Timeout => "timeout",
            Self::Stalled => "stalled",
            Self::Throttled => "throttled",
            Self::Disk => "disk",
            Self::Internal => "internal",
            Self::Invalid => "invalid",
            Self::Auth => "auth",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::Quota => "quota",
            Self::Corrupt => "corrupt",
            Self::Crashed => "crashed",
            Self::Forbidden => "forbidden",
            Self::Expired => "expired",
        }
    }

    /// Whether the class asks for another attempt.
    #[must_use]
    pub const fn disposition(self) -> Disposition {
        match self {
            Self::Network | Self::Timeout | Self::Stalled | Self::Throttled | Self::Disk | Self::Internal => {
                Disposition::Retry
            }
            Self::Invalid
            | Self::Auth
            | Self::NotFound
            | Self::Conflict
            | Self::Quota
            | Self::Corrupt
            | Self::Crashed
            | Self::Forbidden
            | Self::Expired => Disposition::Final,
        }
    }
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One failed execution: the class that decides, and a sentence for people.
///
/// The message says what happened, to what, why, and what to do; it never holds a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{class}: {message}")]
pub struct Failure {
    /// What decides.
    pub class: ErrorClass,
    /// One sentence for people.
    pub message: String,
    /// The upstream's own wish (`Retry-After`): not before this much time has passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<Duration>,
    /// The cause is outside the task (a full disk, a host that is down): it waits without spending attempts.
    #[serde(default)]
    pub deferred: bool,
    /// The upstream's host could not be reached at all, or a gateway before it said that it is down.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unreachable: bool,
    /// The process that did the work was killed from outside: it says nothing about the work.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub killed: bool,
}

impl Failure {
    /// A failure of `class` with a sentence for people; `disk` is deferred by its nature.
    #[must_use]
    pub fn new(class: ErrorClass, message: impl Into<String>) -> Self {
        Self {
            class,
            message: message.into(),
            retry_after: None,
            deferred: class == ErrorClass::Disk,
            unreachable: false,
            killed: false,
        }
    }

    /// Short for a failure of class `invalid`.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Invalid, message)
    }

    /// Short for a failure of class `internal`.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Internal, message)
    }

    /// Short for a failure of class `conflict`.
    #[must_use]
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Conflict, message)
    }

    /// Short for a failure of class `forbidden`.
    #[must_use]
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Forbidden, message)
    }

    /// The same failure, not to be tried again before `wait` has passed.
    #[must_use]
    pub fn not_before(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// The same failure, of a host that is not there.
    #[must_use]
    pub fn unreachable(mut self) -> Self {
        self.unreachable = true;
        self
    }

    /// The same failure, waiting without spending attempts.
    #[must_use]
    pub fn deferred(mut self) -> Self {
        self.deferred = true;
        self
    }
}

impl From<std::io::Error> for Failure {
    /// Maps the errors that a full or refusing file system gives to `disk`, the rest to `internal`.
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind;
        let class = match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::ReadOnlyFilesystem => ErrorClass::Disk,
            _ if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => ErrorClass::Disk,
            _ => ErrorClass::Internal,
        };
        Self::new(class, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_the_decision_of_the_contract() {
        let retried: Vec<_> =
            ErrorClass::ALL.into_iter().filter(|class| class.disposition() == Disposition::Retry).collect();
        assert_eq!(
            retried.iter().map(|class| class.as_str()).collect::<Vec<_>>(),
            ["network", "timeout", "stalled", "throttled", "disk", "internal"]
        );
    }

    #[test]
    fn a_class_prints_as_it_is_written_on_the_wire() {
        for class in ErrorClass::ALL {
            assert_eq!(serde_json::to_value(class).unwrap(), class.as_str());
        }
    }

    #[test]
    fn a_full_disk_waits_without_spending_attempts() {
        let failure = Failure::from(std::io::Error::from(std::io::ErrorKind::StorageFull));
        assert_eq!((failure.class, failure.deferred), (ErrorClass::Disk, true));
    }
}
