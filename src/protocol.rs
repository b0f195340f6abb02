//! The wire contract, version 1: what travels between masters and agents.
//!
//! Frozen once released: fields are added, never changed; unknown fields are ignored, never an error.

mod control;
mod event;
mod giturl;
mod ids;
mod names;
mod order;
pub mod schema;
mod task;
pub mod wire;

pub use control::{Control, ControlAnswer, ControlCommand, ControlMessage, HostState};
pub use event::{Event, EventError, Origin, Outcome, Progress, ProjectStatus, Status, TaskResult};
pub use giturl::{GitUrl, Scheme};
pub use ids::{EventId, NodeName, ProjectId, Round, TaskId, new_event_id};
pub use names::{CredentialName, Owner, RefName, TargetPath};
pub use order::Place;
pub use task::{
    CloneTask, DeleteTask, Kind, OnConflict, Priority, PullTask, Revision, StatusTask, Task, TaskMessage, Work,
};

pub(crate) use task::printable;

/// The version of the contract that this program speaks.
pub const VERSION: u32 = 1;
