//! Git work: transfers, mirrors, working trees. Git libraries are written only below this module.
//!
//! The agent itself never opens a repository: the work is done in short-lived children of this same binary.

pub mod run;
pub mod settings;

pub use run::{Fence, Run};
