//! Why a worker ends, and why a message's path is cut short.

use crate::store::JournalError;

/// Why a role ended otherwise than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The broker could not be used.
    #[error(transparent)]
    Broker(#[from] crate::broker::BrokerError),
    /// The journal could not be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Somebody else consumes our queue.
    #[error(
        "another consumer is on queue {queue:?}: an agent of the same name runs elsewhere; stop it, rename this node, \
         or take the queue with --force"
    )]
    Occupied {
        /// The queue.
        queue: String,
    },
    /// What the queue needs is missing and we may not make it.
    #[error("the broker has no {missing}: run `haul topology apply` as a user who may, then start again")]
    Topology {
        /// What is missing.
        missing: String,
    },
}

/// Why a message's path ended early; its deliveries go back to the broker.
#[derive(Debug)]
pub(super) enum Interrupted {
    /// The worker stops.
    Stopping,
    /// The journal cannot be written.
    Journal(JournalError),
    /// A step broke down.
    Broken,
}

impl From<JournalError> for Interrupted {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::Broken => Self::Broken,
            error => Self::Journal(error),
        }
    }
}
