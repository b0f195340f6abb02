//! Why a command ends without having done its work, and with which code.

use crate::{
    broker::{BrokerError, PublishError},
    config::ConfigError,
    lock::LockError,
    master::Unpublished,
    protocol::NodeName,
    shutdown::exit,
    store::JournalError,
    worker::WorkerError,
};

/// One sentence: what happened, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The arguments cannot be used.
    #[error("{0}")]
    Usage(String),
    /// The broker cannot be used.
    #[error("{0}{remedy}", remedy = remedy(.0))]
    Broker(#[from] BrokerError),
    /// A message was not taken.
    #[error("{0}; is the topology in place? `haul topology doctor` tells")]
    Publish(#[from] PublishError),
    /// A task was not published.
    #[error(transparent)]
    Unpublished(#[from] Unpublished),
    /// No queue takes what is sent to this node.
    #[error("node {node} is not enrolled: start its agent, or run haul topology apply --node {node}")]
    NotEnrolled {
        /// The node.
        node: NodeName,
    },
    /// What was asked for was refused by the one who was asked, or ended otherwise.
    #[error("{0}")]
    Refused(String),
    /// The time given ran out.
    #[error("{0}")]
    TimedOut(String),
    /// The results cannot be printed or written.
    #[error("cannot write {what}: {source}")]
    Output {
        /// What was to be written.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The projects of this node cannot be read or changed.
    #[error("{0}")]
    Projects(String),
    /// The agent must not be running.
    #[error("an agent (process {holder}) uses the storage directory {path}: stop the agent first")]
    AgentRuns {
        /// The directory.
        path: std::path::PathBuf,
        /// The process.
        holder: String,
    },
    /// The running agent does not make room.
    #[error("{0}")]
    TakeOver(String),
    /// The storage directory cannot be used.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The agent could not begin.
    #[error("{0}{remedy}", remedy = if let WorkerError::Broker(error) = .0 { remedy(error) } else { "" })]
    Worker(#[from] WorkerError),
    /// The process cannot run anything.
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
}

impl CliError {
    /// The exit code.
    pub(super) fn code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Usage(_) | Self::Broker(BrokerError::Settings(_)) => exit::USAGE,
            Self::NotEnrolled { .. } | Self::Refused(_) | Self::Unpublished(Unpublished::NotEnrolled { .. }) => {
                exit::TASK
            }
            Self::TimedOut(_) => exit::TIMED_OUT,
            Self::Lock(LockError::Held { .. }) | Self::AgentRuns { .. } | Self::TakeOver(_) => exit::LOCKED,
            Self::Broker(_)
            | Self::Publish(_)
            | Self::Unpublished(_)
            | Self::Worker(WorkerError::Broker(_) | WorkerError::Topology { .. }) => exit::BROKER,
            Self::Output { .. }
            | Self::Projects(_)
            | Self::Runtime(_)
            | Self::Lock(_)
            | Self::Journal(_)
            | Self::Worker(_) => exit::FAILED,
        }
    }
}

/// What to do about it, where the broker's own words do not say.
fn remedy(error: &BrokerError) -> &'static str {
    match error {
        BrokerError::Unreachable { .. } => "; is it running, and is broker.urls (AGENT_AMQP_URL) right?",
        BrokerError::Refused { reason, .. } if reason.starts_with("ACCESS_REFUSED - Login") => {
            "; check user and password in broker.urls (AGENT_AMQP_URL)"
        }
        BrokerError::Refused { reason, .. } if reason.starts_with("NOT_ALLOWED") => {
            "; check the virtual host in broker.urls (AGENT_AMQP_URL) and the user's permissions there"
        }
        BrokerError::Refused { .. } | BrokerError::Settings(_) => "",
    }
}
