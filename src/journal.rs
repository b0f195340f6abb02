//! What the agent remembers of its tasks, and what follows from it. Pure: every function takes the moment it needs
//! and returns a decision; the `store` adapter keeps the pages durable.
//!
//! A [`Page`] is all that is known of one task identity: one [`Entry`] a round. Deciding and noting happen on the same
//! page in one step, so that two deliveries of one task never see each other half-done.

mod admission;
mod entry;
pub mod settings;

pub use admission::{Admission, Sighting, Ticket};
pub use entry::{CancelAnswer, Concluded, Debt, Entry, Envelope, Key, OwedHistory, Page, Phase, WaitingClone};

/// Crashes of the agent that a task may be running at before it is given up as `crashed`.
pub const CRASH_BUDGET: u32 = 3;
