//! What the agent remembers of its tasks, and what follows from it. Pure: every function takes the moment it needs
//! and returns a decision; the `store` adapter keeps the pages durable.
//!
//! A [`Page`] is all that is known of one task identity: one [`Entry`] a round. Deciding and noting happen on the same
//! page in one step, so that two deliveries of one task never see each other half-done.

mod admission;
mod ages;
mod entry;
pub mod settings;

pub use admission::{Admission, Sighting, Ticket};
pub use ages::Ages;
pub use entry::{CancelAnswer, Concluded, Debt, Entry, Envelope, Key, OwedHistory, Page, Phase, WaitingClone};

/// Crashes of the agent that a task may be running at before it is given up as `crashed`; twice as many where it never
/// ran alone at one of them.
pub const CRASH_BUDGET: u32 = 3;
