//! Where pages are kept, behind one face.

use async_trait::async_trait;
use jiff::Timestamp;

use crate::{journal::Entry, protocol::TaskId};

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
    /// What is in it is not what was written. It is set aside; what was asked for is to be asked again.
    #[error("the journal at {path} is damaged: {reason}")]
    Damaged {
        /// The database.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A later version of the agent wrote it.
    #[error(
        "the journal at {path} is of version {version}, which a later agent wrote: start that one, or move the file \
         away and let this one begin anew"
    )]
    Later {
        /// The database.
        path: String,
        /// Its version.
        version: i32,
    },
    /// A step panicked: a fault of ours. Nothing of it holds.
    #[error("a step on the journal broke down; this is a fault of the agent")]
    Broken,
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
    /// After [`JournalError::Damaged`]: begins anew with what can be saved. Only what is on a disk can be damaged.
    async fn renew(&mut self, reason: &str) -> Result<(), JournalError> {
        Err(JournalError::Damaged { path: "memory".to_owned(), reason: reason.to_owned() })
    }
    /// Nothing is asked any more.
    async fn close(&mut self) {}
    /// The entries of a task.
    async fn entries(&mut self, task: &TaskId) -> Result<Vec<Entry>, JournalError>;
    /// Every entry that owes something.
    async fn owing(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError>;
    /// Every clone that waits for a retry.
    async fn waiting_clones(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError>;
    /// Every entry of which an attempt is under way, as far as is known.
    async fn running(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError>;
    /// A value kept beside the pages.
    async fn note(&mut self, name: &str) -> Result<Option<String>, JournalError>;
    /// The notes with this beginning, with their values.
    async fn notes(&mut self, prefix: &str) -> Result<Vec<(String, String)>, JournalError>;
    /// Removes up to `most` entries last seen before `limit` that owe nothing.
    async fn prune(&mut self, limit: Timestamp, most: u32) -> Result<u64, JournalError>;
}
